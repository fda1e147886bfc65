"""The shared training loop: schedule, poses, masks on a grid, resume, and two workers that give what one gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from lbp_ray.config import load_config
from lbp_ray.nets.unet import build_unet
from lbp_ray.nets.weights import VGG11_BN, load_backbone_weights
from lbp_ray.segment.config import SegmentConfig
from lbp_ray.segment.fold import LumbarTask, schedule_of
from lbp_ray.segment.infer import Segmenter
from lbp_ray.segment.loop import Schedule, Training
from lbp_ray.segment.loss import dice_per_image, loss_per_image
from lbp_ray.segment.network import SegmentError
from lbp_ray.segment.samples import Grid, Pose, TrainingSet, draw_poses, standardise_grid, turn

SCHEDULE = Schedule(
    epochs=3, learning_rate=1e-3, drops=((2, 1e-4), (3, 1e-5)), weight_decay=1e-3, batch_size=4, bfloat16=False, seed=7
)


def small_network(dimensions: int = 2) -> nn.Module:
    """A few layers with batch normalisation, in two or three dimensions."""
    convolution, norm = (nn.Conv2d, nn.BatchNorm2d) if dimensions == 2 else (nn.Conv3d, nn.BatchNorm3d)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            convolution(1, 4, 3, padding=1), norm(4), nn.ReLU(), convolution(4, 4, 3, padding=1), norm(4), nn.ReLU(),
            convolution(4, 1, 1),
        )  # fmt: skip


def discs(size: int, size_px: int = 32) -> TrainingSet:
    """Bright discs on noise, and their masks."""
    chance = np.random.default_rng(3)
    axis = np.arange(size_px)
    images, masks = [], []
    for _ in range(size):
        row, column, radius = [*chance.uniform(10, 22, 2).tolist(), chance.uniform(4, 8)]
        mask = (axis[:, None] - row) ** 2 + (axis[None, :] - column) ** 2 < radius**2
        images.append((100 + 20 * chance.standard_normal(mask.shape) + 200 * mask).astype(np.int16))
        masks.append(mask.astype(np.uint8))
    used = np.full((size, 2), size_px)
    return TrainingSet(np.stack(images), np.stack(masks), used)


def task(size: int = 18, validation: int = 5) -> LumbarTask:
    rows = np.arange(size)
    return LumbarTask(discs(size), rows[validation:], rows[:validation], "bce_dice", 0.5, 15.0, seed=7)


def curve(training: Training, checkpoint: Path) -> list[tuple[float, float | None, float | None]]:
    return [(r.train_loss, r.validation_loss, r.validation_dice) for r in training.epochs(checkpoint, checkpoint_s=60)]


# --- schedule and poses ----------------------------------------------------------------------------------------------


def test_learning_rate_drops_at_the_named_epochs():
    thesis = replace(SCHEDULE, epochs=41, learning_rate=1e-4, drops=((20, 1e-5), (40, 1e-6)))
    assert [thesis.learning_rate_at(epoch) for epoch in (1, 19, 20, 39, 40, 41)] == [1e-4, 1e-4, 1e-5, 1e-5, 1e-6, 1e-6]


@pytest.mark.parametrize(("size", "batch"), [(18, 4), (17, 16), (331, 16), (5, 16)])
def test_batches_hold_every_sample_once_and_none_is_tiny(size, batch):
    batches = replace(SCHEDULE, batch_size=batch).batches(size, epoch=2)
    assert sorted(np.concatenate(batches)) == list(range(size))
    sizes = [len(part) for part in batches]
    assert max(sizes) <= batch
    assert max(sizes) - min(sizes) <= 1


def test_poses_are_counted_not_remembered():
    settings = {"seed": 1, "size": 50, "flip_share": 0.5, "rotation_deg": 15.0}
    first, again, other = (draw_poses(epoch=epoch, **settings) for epoch in (3, 3, 4))
    assert np.array_equal(first.angle_deg_B, again.angle_deg_B)
    assert not np.array_equal(first.angle_deg_B, other.angle_deg_B)
    assert 10 < first.flip_B.sum() < 40
    assert np.abs(first.angle_deg_B).max() <= 15


def test_turn_mirrors_columns_and_rotates_counter_clockwise():
    image = torch.zeros(1, 1, 9, 9)
    image[0, 0, 4, 7] = 1.0  # right of the centre
    mirrored = turn(image, Pose(np.array([True]), np.array([0.0])))
    assert mirrored[0, 0, 4, 1] == pytest.approx(1.0)
    turned = turn(image, Pose(np.array([False]), np.array([90.0])))
    assert turned[0, 0, 1, 4] == pytest.approx(1.0, abs=1e-5)


def test_only_training_slices_are_turned():
    lumbar = task()
    plain = lumbar.data.batch(lumbar.validation_rows, "cpu")
    seen = lumbar.validation_batch(np.arange(lumbar.validation_size))
    assert all(torch.equal(one, other) for one, other in zip(plain, seen, strict=True))
    turned = lumbar.training_batch(np.arange(lumbar.size), epoch=1)
    straight = lumbar.data.batch(lumbar.training_rows, "cpu")
    assert not torch.equal(turned[0], straight[0])
    assert turned[1].unique().tolist() == [0.0, 1.0]


# --- grid and loss ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (64, 40), (30, 50), (129, 200)])
def test_grid_and_back(rows, columns):
    grid = Grid(rows, columns, 64)
    mask = np.zeros((rows, columns), bool)
    mask[rows // 4 : rows // 2, columns // 4 : columns // 2] = True
    back = grid.restore(grid.resample(mask) * 2 - 1)
    assert back.shape == mask.shape
    assert 2 * (back & mask).sum() / (back.sum() + mask.sum()) > 0.9
    outside = torch.ones(64, 64, dtype=torch.bool)
    outside[grid.place] = False
    assert grid.resample(mask)[outside].sum() == 0


def test_an_image_of_the_grids_size_is_untouched():
    image = np.random.default_rng(0).integers(0, 4000, (64, 64)).astype(np.int16)
    assert np.array_equal(Grid(64, 64, 64).resample(image).numpy(), image)


def test_padding_does_not_enter_mean_and_spread():
    image = torch.zeros(1, 8, 8)
    image[0, :, 2:6] = torch.arange(32).reshape(8, 4) + 100.0
    standard = standardise_grid(image, torch.tensor([[8, 4]]))[0, 0]
    assert standard[:, 2:6].mean() == pytest.approx(0, abs=1e-6)
    assert standard[:, 2:6].std(correction=0) == pytest.approx(1, abs=1e-5)
    assert (standard[:, :2] == 0).all()
    assert (standard[:, 6:] == 0).all()


def test_a_mirrored_narrow_image_lies_where_it_lay():
    """Else networks would learn a layout that no image has when it is segmented."""
    narrow = Grid(32, 16, 32).resample(np.ones((32, 16)))[None, None]
    assert torch.equal(turn(narrow, Pose(np.array([True]), np.array([0.0]))) > 0.5, narrow > 0.5)


def test_a_constant_image_is_refused():
    with pytest.raises(ValueError, match="image 1 of the batch is constant"):
        standardise_grid(torch.stack([torch.eye(8), torch.ones(8, 8)]), torch.tensor([[8, 8], [8, 8]]))


def test_dice_by_hand():
    targets = torch.tensor([[[[1.0, 1.0], [0.0, 0.0]]], [[[0.0, 0.0], [0.0, 0.0]]]])
    logits = torch.tensor([[[[5.0, -5.0], [-5.0, 5.0]]], [[[-5.0, -5.0], [-5.0, -5.0]]]])
    assert dice_per_image(logits, targets).tolist() == pytest.approx([0.5, 1.0])


@pytest.mark.parametrize("name", ["bce", "dice", "bce_dice"])
def test_loss_is_per_image_and_falls_with_agreement(name):
    targets = (torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    good, bad = (targets * 2 - 1) * 4, (1 - targets * 2) * 4
    both = torch.cat([good[:1], bad[1:]])
    losses = loss_per_image(both, targets, name=name)
    assert losses.shape == (3,)
    assert losses[0] < losses[1:].min()


# --- training --------------------------------------------------------------------------------------------------------


def test_training_learns_and_resumes_bit_equal(tmp_path):
    whole = curve(Training(small_network(), task(), SCHEDULE), tmp_path / "none.pt")
    assert whole[-1][0] < whole[0][0]
    cut = Training(small_network(), task(), SCHEDULE).epochs(tmp_path / "checkpoint.pt", checkpoint_s=0)
    next(cut), next(cut)  # the second epoch is lost with the process
    assert (tmp_path / "checkpoint.pt").is_file()
    resumed = Training(small_network(), task(), SCHEDULE)
    assert curve(resumed, tmp_path / "checkpoint.pt") == whole


def test_too_few_samples_are_refused():
    lonely = replace(task(), training_rows=np.arange(1))
    with pytest.raises(SegmentError, match="annotate more"):
        Training(small_network(), lonely, SCHEDULE)


def test_a_loss_that_is_not_finite_is_refused(tmp_path):
    wild = Training(small_network(), task(), replace(SCHEDULE, learning_rate=1e38, drops=()))
    with pytest.raises(SegmentError, match=r"not finite at epoch \d; lower recipe.learning_rate"):
        list(wild.epochs(tmp_path / "none.pt", checkpoint_s=60))


class Balls:
    """The same loop on volumes and with two classes: what a V-Net of discs and vertebrae will be trained for."""

    size, validation_size = 6, 2

    def _batch(self, samples: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        volumes = torch.randn(8, 1, 6, 8, 8, generator=generator)
        return volumes[samples], (volumes[samples] > 0).float()

    def training_batch(self, samples: np.ndarray, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._batch(samples)

    def validation_batch(self, samples: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        return self._batch(samples + 6)

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return loss_per_image(outputs, targets, name="dice")

    def dice(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return dice_per_image(outputs, targets)


def test_the_loop_trains_volumes_too(tmp_path):
    losses = [row[0] for row in curve(Training(small_network(3), Balls(), SCHEDULE), tmp_path / "none.pt")]
    assert losses[-1] < losses[0]


def test_the_thesiss_own_recipe_takes_its_steps(tmp_path, monkeypatch):
    """configs/roi_oulu.yaml with its batch, rate, loss and poses, from a random start and on small images."""
    monkeypatch.setenv("LBP_RAY_ROOT", "/data")
    config = load_config(SegmentConfig, Path(__file__).parents[1] / "configs" / "roi_oulu.yaml")
    assert (config.recipe.weights, config.recipe.epochs, config.folds.folds) == ("imagenet", 41, 5)
    recipe = config.recipe.model_copy(update={"weights": "random", "input_px": 64, "epochs": 3})
    rows = np.arange(36)
    lumbar = LumbarTask(
        discs(36, 64), rows[4:], rows[:4], recipe.loss, recipe.flip_share, recipe.rotation_deg, recipe.seed
    )
    training = Training(build_unet(None, seed=recipe.seed), lumbar, schedule_of(recipe))
    records = list(training.epochs(tmp_path / "none.pt", checkpoint_s=60))
    assert [record.learning_rate for record in records] == [1e-4] * 3
    assert [len(batch) for batch in training.schedule.batches(lumbar.size, 1)] == [16, 16]
    assert records[-1].train_loss < records[0].train_loss


# --- several workers -------------------------------------------------------------------------------------------------


def _worker(rank: int, folder: Path, dimensions: int, checkpoint: str = "none.pt") -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meet{dimensions}"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    chosen = task() if dimensions == 2 else Balls()
    training = Training(small_network(dimensions), chosen, SCHEDULE)
    rows = curve(training, folder / (checkpoint if rank == 0 else "unseen.pt"))
    if rank == 0:
        torch.save({"curve": rows, "state": training.network.state_dict()}, folder / f"two{dimensions}.pt")
    torch.distributed.destroy_process_group()


def test_workers_resume_together_though_one_host_does_not_see_the_file(tmp_path):
    """A network file system may show a new file late: the first worker's state is everybody's."""
    begun = Training(small_network(), task(), SCHEDULE).epochs(tmp_path / "seen.pt", checkpoint_s=0)
    next(begun), next(begun)
    mp.spawn(_worker, args=(tmp_path, 2, "seen.pt"), nprocs=2)
    two = torch.load(tmp_path / "two2.pt", weights_only=True)
    whole = curve(Training(small_network(), task(), SCHEDULE), tmp_path / "none.pt")
    np.testing.assert_allclose(two["curve"], whole, rtol=1e-4)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_two_workers_give_the_curve_of_one(tmp_path, dimensions):
    """Same global batches, batch normalisation over both workers: equal but for the order of float32 sums."""
    mp.spawn(_worker, args=(tmp_path, dimensions), nprocs=2)
    two = torch.load(tmp_path / f"two{dimensions}.pt", weights_only=True)
    one = Training(small_network(dimensions), task() if dimensions == 2 else Balls(), SCHEDULE)
    np.testing.assert_allclose(two["curve"], curve(one, tmp_path / "none.pt"), rtol=1e-4)
    for name, value in one.network.state_dict().items():
        torch.testing.assert_close(two["state"][name], value, rtol=2e-3, atol=2e-4, msg=name)


# --- the network -----------------------------------------------------------------------------------------------------


def test_unet_takes_a_torchvision_encoder_summed_over_channels(tmp_path):
    state = load_backbone_weights("random", seed=5, architecture=VGG11_BN)
    torch.save(state, tmp_path / "vgg.pt")
    again = load_backbone_weights(str(tmp_path / "vgg.pt"), architecture=VGG11_BN)
    network = build_unet(again, seed=0)
    grey = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = nn.functional.conv2d(grey.expand(-1, 3, -1, -1), state["features.0.weight"], padding=1)
    found = nn.functional.conv2d(grey, network.encoder.features[0].weight, padding=1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert network.eval()(grey).shape == (1, 1, 32, 32)


def test_random_starts_are_seeded():
    one, same, other = (build_unet(None, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_segmenter_masks_slices_of_any_size(tmp_path):
    torch.save(build_unet(None, seed=0).state_dict(), tmp_path / "model.pt")
    segmenter = Segmenter(tmp_path / "model.pt", input_px=64)
    chance = np.random.default_rng(0)
    images = [chance.integers(0, 1000, shape).astype(np.int16) for shape in [(64, 64), (100, 80), (33, 90)] * 6]
    masks = segmenter.masks(images)
    assert [mask.shape for mask in masks] == [image.shape for image in images]
    alone = segmenter.masks(images[1:2])[0]
    assert (alone == masks[1]).mean() > 0.999  # another batch size may round a border pixel otherwise


def test_a_blank_slice_has_an_empty_mask(tmp_path):
    torch.save(build_unet(None, seed=0).state_dict(), tmp_path / "model.pt")
    masks = Segmenter(tmp_path / "model.pt", input_px=32).masks([np.full((32, 32), 7), np.eye(32)])
    assert not masks[0].any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_trains_what_a_cpu_trains(tmp_path):
    on_cpu = curve(Training(small_network(), task(), SCHEDULE), tmp_path / "none.pt")
    there = replace(task(), device="cuda")
    on_gpu = curve(Training(small_network(), there, SCHEDULE, device="cuda"), tmp_path / "none.pt")
    np.testing.assert_allclose(on_gpu[0], on_cpu[0], rtol=1e-2)
