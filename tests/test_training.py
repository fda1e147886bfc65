from __future__ import annotations

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from study_factory import make_data, make_spec, random_backbone, with_features

from lbp_ray.cell import TrialError, TrialPlace
from lbp_ray.features import FeatureCacheError, extract, features_id
from lbp_ray.nets.resnet import build_head, set_batchnorm_mode, standardise
from lbp_ray.nets.weights import RESNET50, VGG11_BN, WeightsError, load_backbone_weights, weights_sha256
from lbp_ray.resident import Resident
from lbp_ray.samples import batch_order, select_samples
from lbp_ray.steps import learning_rate
from lbp_ray.training import Training
from lbp_ray.trial import run_trial

FOLDS = [0, 0, 1, 1, 1, 1, 0, 0, -1, -1]


@pytest.fixture(scope="module")
def backbone():
    return random_backbone()


@pytest.fixture(scope="module")
def data(backbone):
    return with_features(make_data(FOLDS), backbone)


def run(spec, data, backbone, folder, **place):
    where = TrialPlace(folder / f"{spec.cell.name}-{spec.trial_id[:8]}", folder / f"{spec.trial_id[:8]}.pt", **place)
    records = list(run_trial(spec, data, Resident(copy.deepcopy(backbone)), where))
    return records, pd.read_parquet(where.final / "out_of_fold.parquet")["probability"].to_numpy()


def naive_logits(data, spec, backbone):
    """The loop most people would write: the whole network, frozen, in every step."""
    model = torch.nn.Sequential(copy.deepcopy(backbone), build_head(seed=spec.cell.seed))
    model[0].requires_grad_(False)
    model.eval()
    recipe = spec.recipe
    optimiser = torch.optim.Adam(
        model[1].parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
    )
    train = select_samples(data, np.flatnonzero(data.folds_N == 1), spec.cell.num_slices)
    held_out = select_samples(data, np.flatnonzero(data.folds_N == 0), spec.cell.num_slices)
    for epoch in range(1, recipe.frozen_epochs + 1):
        order = batch_order(seed=spec.cell.seed, epoch=epoch, size=train.size)
        optimiser.param_groups[0]["lr"] = learning_rate(recipe, epoch)
        for start in range(0, train.size, recipe.batch_size):
            rows = order[start : start + recipe.batch_size]
            images = standardise(torch.from_numpy(data.crops_NKHW[train.study_M[rows], train.offset_M[rows]]))
            target = torch.from_numpy(data.labels_N[train.study_M[rows]])[:, None]
            loss = torch.nn.functional.binary_cross_entropy_with_logits(model(images), target)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    with torch.no_grad():
        images = standardise(torch.from_numpy(data.crops_NKHW[held_out.study_M, held_out.offset_M]))
        return model(images)[:, 0]


@pytest.mark.parametrize("epochs", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_cached_training_is_bit_equal_to_the_whole_network_in_the_loop(backbone, epochs):
    data = with_features(make_data([0, 0, 1, 1, 1, 1], shape=(400, 200), offsets=1), backbone)
    spec = make_spec(frozen_epochs=epochs, unfrozen_epochs=0)
    training = Training(spec, data, Resident(copy.deepcopy(backbone)))
    for epoch in range(1, epochs + 1):
        training._epoch(epoch, "frozen")
    cached = torch.from_numpy(training.logits(training.validation)).float()
    assert torch.equal(cached, naive_logits(data, spec, backbone))
    assert not torch.equal(cached, build_head(seed=0)(data.features_NKF[data.folds_N == 0, 0])[:, 0].detach())


def test_uncached_option_agrees_with_the_cache(data, backbone, tmp_path):
    cached = run(make_spec(unfrozen_epochs=0), data, backbone, tmp_path)[1]
    live = run(make_spec(unfrozen_epochs=0, feature_cache=False), data, backbone, tmp_path)[1]
    np.testing.assert_allclose(cached, live, atol=1e-4)


def test_drifting_batchnorm_gives_other_numbers(data, backbone, tmp_path):
    cached = run(make_spec(unfrozen_epochs=0), data, backbone, tmp_path)[1]
    drifting = make_spec(unfrozen_epochs=0, feature_cache=False, frozen_batchnorm="train")
    assert np.abs(run(drifting, data, backbone, tmp_path)[1] - cached).max() > 1e-2


def test_cache_refuses_train_mode(data, backbone):
    moving = copy.deepcopy(backbone)
    set_batchnorm_mode(moving, "train")
    with pytest.raises(FeatureCacheError, match="train mode"):
        extract(moving, data.crops_NKHW[:1])
    with pytest.raises(FeatureCacheError, match="BatchNorm in eval mode"):
        features_id(crops_hash="c", weights_hash="w", threads=1, batchnorm="train")


def test_features_do_not_depend_on_their_shard(data, backbone):
    np.testing.assert_allclose(extract(backbone, data.crops_NKHW[4:6]), data.features_NKF[4:6], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recipe", [{}, {"adam_at_unfreeze": "reset"}, {"unfrozen_epochs": 0}], ids=str)
def test_trial_in_a_used_process_equals_a_fresh_one(data, backbone, tmp_path, recipe):
    spec = make_spec(num_slices=3, **recipe)
    resident = Resident(copy.deepcopy(backbone))
    probabilities = []
    for attempt, other in enumerate([None, make_spec(seed=7)]):
        if other is not None:
            list(run_trial(other, data, resident, TrialPlace(tmp_path / "other", tmp_path / "other.pt")))
        place = TrialPlace(tmp_path / str(attempt), tmp_path / "c.pt")
        list(run_trial(spec, data, resident, place))
        probabilities.append(pd.read_parquet(place.final / "out_of_fold.parquet")["probability"])
    assert probabilities[0].equals(probabilities[1])


def test_unfrozen_epoch_trains_the_backbone(data, backbone, tmp_path):
    frozen = run(make_spec(unfrozen_epochs=0), data, backbone, tmp_path)[1]
    records, unfrozen = run(make_spec(), data, backbone, tmp_path, keep_model=True)
    assert [record.stage for record in records] == ["frozen"] * 3 + ["unfrozen"]
    assert np.abs(frozen - unfrozen).max() > 1e-4
    trained = torch.load(next(tmp_path.glob("*/model.pt")), weights_only=True)["backbone"]
    assert not torch.equal(trained["conv1.weight"], backbone.state_dict()["conv1.weight"])


def test_adam_moments_are_kept_or_reset_at_unfreezing(data, backbone):
    for choice, steps in (("keep", 1.0), ("reset", None)):
        training = Training(make_spec(adam_at_unfreeze=choice), data, Resident(copy.deepcopy(backbone)))
        training._epoch(1, "frozen")
        training.unfreeze()
        assert training.optimiser.state.get(training.head.bias, {}).get("step") == steps


def test_passes_give_what_a_whole_batch_gives_and_hold_fewer_images(data, backbone, tmp_path):
    apart = {"num_slices": 3, "fold_training": False}  # rounds less
    whole = run(make_spec(**apart), data, backbone, tmp_path)[1]
    spec, sizes = make_spec(**apart, images_per_pass=3), []
    training = Training(spec, data, Resident(copy.deepcopy(backbone)))
    training.unfreeze()
    training._network.register_forward_pre_hook(lambda _, images: sizes.append(len(images[0])))
    training.rehearse(1)
    assert sizes[:2] == [3, 1]
    assert max(sizes) == 3
    np.testing.assert_allclose(run(spec, data, backbone, tmp_path)[1], whole, rtol=1e-3)


def test_carried_norms_move_scores_by_rounding_only(data, backbone, tmp_path):
    apart, carried = (run(make_spec(fold_training=fold), data, backbone, tmp_path)[1] for fold in (False, True))
    np.testing.assert_allclose(apart, carried, rtol=1e-2)
    assert not np.array_equal(apart, carried)


def test_seconds_are_kept_over_an_interruption(data, backbone, tmp_path):
    spec, checkpoint = make_spec(), tmp_path / "checkpoint.pt"
    first, second = (Training(spec, data, Resident(copy.deepcopy(backbone))) for _ in range(2))
    next(epochs := first.epochs(checkpoint))
    for _ in range(spec.recipe.frozen_epochs - 1):
        next(epochs)
    list(second.epochs(checkpoint))
    assert second.seconds["frozen"] == first.seconds["frozen"] > 0
    assert second.seconds["unfrozen"] > 0 < second.seconds["evaluation"]


def test_learning_rate_drops_once(data, backbone, tmp_path):
    spec = make_spec(unfrozen_epochs=0, learning_rate=1e-3, learning_rate_late=1e-5, learning_rate_drop=3)
    records, _ = run(spec, data, backbone, tmp_path)
    assert [record.learning_rate for record in records] == [1e-3, 1e-3, 1e-5]


@pytest.mark.parametrize("stop_after", [1, 3, 4])
def test_interrupted_trial_resumes_to_the_same_numbers(data, backbone, tmp_path, stop_after):
    spec = make_spec(unfrozen_epochs=2, unfrozen_batchnorm="train")
    whole = run(spec, data, backbone, tmp_path / "whole")
    place = TrialPlace(tmp_path / "parts" / "final", tmp_path / "parts" / "checkpoint.pt")
    interrupted = run_trial(spec, data, Resident(copy.deepcopy(backbone)), place)
    for _ in range(stop_after):
        next(interrupted)
    interrupted.close()
    assert not place.final.exists()
    records = list(run_trial(spec, data, Resident(copy.deepcopy(backbone)), place))
    assert records == whole[0]
    assert (pd.read_parquet(place.final / "out_of_fold.parquet")["probability"] == whole[1]).all()
    assert not place.checkpoint.exists()


def test_finished_trial_is_not_trained_again(data, backbone, tmp_path):
    spec = make_spec()
    place = TrialPlace(tmp_path / "final", tmp_path / "checkpoint.pt")
    records = list(run_trial(spec, data, Resident(copy.deepcopy(backbone)), place))
    stamp = (place.final / "out_of_fold.parquet").stat().st_mtime_ns
    assert list(run_trial(spec, data, Resident(copy.deepcopy(backbone)), place)) == records
    assert (place.final / "out_of_fold.parquet").stat().st_mtime_ns == stamp


def test_holdout_is_predicted_but_has_no_label(data, backbone, tmp_path):
    run(make_spec(num_slices=3), data, backbone, tmp_path)
    table = pd.read_parquet(next(tmp_path.glob("*/holdout.parquet")))
    assert list(table.columns) == ["study_id", "slice_index", "slice_offset_mm", "probability"]
    assert sorted(set(table["study_id"])) == ["s008", "s009"]
    assert len(table) == 6


def test_more_slices_than_the_crops_hold_are_refused(data):
    with pytest.raises(TrialError, match="5 slices were asked for, but the crops hold 3"):
        select_samples(data, np.array([0]), 5)


def test_fold_with_one_class_is_refused(backbone):
    data = with_features(make_data([0, 1, 0, 1, 1, 1]), backbone)
    with pytest.raises(TrialError, match="evaluated studies must have labels 0 and 1"):
        Training(make_spec(), data, Resident(copy.deepcopy(backbone)))


def test_exploding_loss_is_refused(data, backbone, tmp_path):
    broken = type(data)(**{**vars(data), "features_NKF": data.features_NKF * float("inf")})
    with pytest.raises(TrialError, match="loss is not finite at epoch 1"):
        run(make_spec(), broken, backbone, tmp_path)


def test_blank_crop_cannot_be_standardised():
    with pytest.raises(ValueError, match="image 1 of the batch is constant"):
        standardise(torch.tensor([[[0, 1]], [[5, 5]]]))


def test_standardised_image_has_mean_0_and_sd_1():
    image = standardise(torch.randint(0, 4000, (2, 20, 10)))
    assert image.shape == (2, 3, 20, 10)
    assert image.mean((2, 3)).abs().max() < 1e-5
    assert (image.std((2, 3), correction=0) - 1).abs().max() < 1e-5


def test_trial_id_follows_numbers_not_places():
    base = make_spec().trial_id
    assert make_spec(weights="imagenet", weights_seed=5).trial_id == base
    different = [
        make_spec(seed=1),
        make_spec(fold=1),
        make_spec(num_slices=3),
        make_spec(threads=2),
        make_spec(batch_size=8),
    ]
    assert len({base, *(spec.trial_id for spec in different)}) == 6


def test_golden_numbers(data, backbone, tmp_path):
    """Raise `NUMERICS_VERSION` when this changes: old trials must not be mixed with new ones."""
    probabilities = run(make_spec(num_slices=1), data, backbone, tmp_path)[1]
    np.testing.assert_allclose(np.log(probabilities), GOLDEN_LOG_PROBABILITIES, rtol=1e-3)


GOLDEN_LOG_PROBABILITIES = [-38.04795, -23.40641, -36.34339, -23.14461]


@pytest.fixture
def weights_file(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(load_backbone_weights("random", seed=3), path)
    return path


def test_weights_from_a_file(weights_file):
    state = load_backbone_weights(str(weights_file))
    assert weights_sha256(state) == weights_sha256(load_backbone_weights("random", seed=3))
    assert weights_sha256(state) != weights_sha256(load_backbone_weights("random", seed=4))


def test_absent_weights_file_is_refused(tmp_path):
    with pytest.raises(WeightsError, match="weights file not found"):
        load_backbone_weights(str(tmp_path / "none.pt"))


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(WeightsError, match="does not fit ResNet50"):
        load_backbone_weights(str(tmp_path / "other.pt"))


IMAGENET_FILES = [(RESNET50, "resnet50-0676ba61.pth"), (VGG11_BN, "vgg11_bn-6002323d.pth")]


@pytest.mark.parametrize(("architecture", "name"), IMAGENET_FILES, ids=lambda value: getattr(value, "title", ""))
def test_absent_imagenet_weights_never_fall_back_to_random(tmp_path, monkeypatch, architecture, name):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(WeightsError, match=f"{name} where there is a network"):
        load_backbone_weights("imagenet", architecture=architecture)


@pytest.mark.parametrize(("architecture", "name"), IMAGENET_FILES, ids=lambda value: getattr(value, "title", ""))
def test_imagenet_weights_are_found_in_torch_home(tmp_path, monkeypatch, architecture, name):
    """The real loading code on a file of our own under the expected name; the loader checks sums of downloads only."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    ours = load_backbone_weights("random", seed=1, architecture=architecture)
    dropped = {f"{architecture.head_prefix}weight": torch.zeros(1)}
    torch.save(ours | dropped, tmp_path / "hub" / "checkpoints" / name)
    found = load_backbone_weights("imagenet", architecture=architecture)
    assert weights_sha256(found) == weights_sha256(ours)
