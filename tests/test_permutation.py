from __future__ import annotations

import numpy as np
import pytest
import torch
from study_factory import make_data, make_spec

from lbp_ray.cell import TrialData
from lbp_ray.metrics import fit_threshold, roc_auc, study_scores
from lbp_ray.permutation import BestEpoch, _study_scores, permutation_null, permute_labels, youden_thresholds
from lbp_ray.resident import Resident
from lbp_ray.selection import mcc_at_youden
from lbp_ray.splits import HOLDOUT
from lbp_ray.training import Training

RECIPE = make_spec(frozen_epochs=10, learning_rate=1e-2, learning_rate_late=1e-3, learning_rate_drop=8).recipe


def data_with_signal(strength, number=60):
    """Features drawn at random, shifted by the label."""
    folds = list(np.arange(number) // 2 % 3)
    data = make_data(folds, shape=(4, 4), offsets=1)
    generator = np.random.default_rng(0)
    features = generator.normal(size=(number, 1, 2048)).astype(np.float32)
    features[..., :50] += strength * data.labels_N[:, None, None]
    return TrialData(**{**vars(data), "features_NKF": torch.from_numpy(features)})


def null_of(data, count=60):
    return permutation_null(data, recipe=RECIPE, num_slices=1, count=count, seed=0, progress=False)


def test_signal_stands_out_of_its_null():
    null = null_of(data_with_signal(1.0))
    assert null.observed > 0.85
    assert null.p_value == pytest.approx(1 / 61)
    assert abs(null.mean - 0.5) < 0.05


def test_noise_does_not():
    assert null_of(data_with_signal(0.0)).p_value > 0.05


def test_true_labels_give_the_head_a_trial_would_train():
    data = data_with_signal(0.5)
    null_scores = null_of(data, count=2).observed
    scores = np.zeros(60)
    for fold in range(3):
        training = Training(make_spec(fold=fold, **RECIPE.model_dump()), data, Resident(torch.nn.Identity()))
        for epoch in range(1, 11):
            training._epoch(epoch, "frozen")
        scores[training.validation.study_M] = 1 / (1 + np.exp(-training.logits(training.validation)))
    assert null_scores == pytest.approx(roc_auc(data.labels_N, scores), abs=0.01)


def test_labels_stay_with_their_patient_and_folds_stay_stratified():
    patient = np.array(["a", "a", "b", "b", *"cdefghij"])
    labels = np.array([0, 1, 1, 0, 1, 0, 1, 0, 0, 1, 0, 1], dtype=np.float32)
    folds = np.array([0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1])
    permuted = permute_labels(labels, patient, folds, count=200, seed=0)
    assert {tuple(column) for column in permuted[:2].T} == {(0, 1), (1, 0)}
    for fold in (0, 1):
        single = (folds == fold) & ~np.isin(patient, ["a", "b"])
        assert (permuted[single].sum(axis=0) == labels[single].sum()).all()
    assert len({tuple(column) for column in permuted.T}) > 30


@pytest.fixture(scope="module")
def nothing_known():
    """240 studies in 10 folds, 52 positive, whose features are noise; 100 permutations."""
    generator = np.random.default_rng(3)
    data = make_data(list(np.arange(240) % 10), shape=(4, 4), offsets=1)
    changes = {
        "labels_N": (np.arange(240) // 10 % 9 < 2).astype(np.float32),
        "features_NKF": torch.from_numpy(generator.normal(size=(240, 1, 2048)).astype(np.float32)),
    }
    recipe = make_spec(frozen_epochs=15, batch_size=32).recipe
    return permutation_null(
        TrialData(**{**vars(data), **changes}), recipe=recipe, num_slices=1, count=100, seed=0, progress=False
    )


def test_judged_honestly_noise_gives_chance(nothing_known):
    honest = nothing_known.balanced_accuracy[0]
    assert (honest.selection, honest.threshold_source) == ("fixed_epochs", "cross_fitted")
    assert abs(honest.mean - 0.5) <= 0.02
    assert 0 < honest.sd < 0.08


def test_what_is_chosen_on_the_judged_fold_makes_noise_look_like_skill(nothing_known):
    honest, threshold, epoch, both = nothing_known.balanced_accuracy
    assert (threshold.selection, threshold.threshold_source) == ("fixed_epochs", "same_fold")
    assert (epoch.selection, epoch.threshold_source) == ("same_fold", "cross_fitted")
    assert (both.selection, both.threshold_source) == ("same_fold", "same_fold")
    assert epoch.mean < honest.mean + 0.05
    assert both.mean > threshold.mean > honest.mean + 0.05
    assert both.mean > 0.56


@pytest.mark.parametrize("seed", range(20))
def test_thresholds_of_many_heads_are_those_of_one_by_one(seed):
    generator = np.random.default_rng(seed)
    scores = np.round(generator.random((30, 8)), 1 + seed % 3).astype(np.float32)  # rounded: ties
    labels = (generator.random((30, 8)) < 0.3).astype(np.float32)
    labels[:2] = [[0] * 8, [1] * 8]
    expected = [fit_threshold(label, score) for label, score in zip(labels.T, scores.T, strict=True)]
    np.testing.assert_array_equal(youden_thresholds(labels, scores), np.array(expected, dtype=np.float32))


@pytest.mark.parametrize(("label", "called"), [(0, 0), (1, 3)], ids=["no positives", "no negatives"])
def test_a_fold_left_with_one_class_by_a_shuffle_is_called_that_class(label, called):
    scores = np.array([[0.2], [0.5], [0.4]])
    thresholds = youden_thresholds(np.full((3, 1), label), scores)
    assert (scores >= thresholds).sum() == called
    assert scores.min() <= thresholds[0] <= np.nextafter(scores.max(), 1)


def test_the_chosen_epoch_is_that_of_the_largest_mcc_up_to_the_lowest_loss():
    """Epochs by MCC, first head: middling, best, best again, worst; lowest loss at the third. Second: at the first."""
    labels = np.array([[1, 1], [1, 1], [0, 0], [0, 0]], dtype=np.float32)
    best = BestEpoch(labels)
    epochs = [[0.6, 0.2, 0.3, 0.1], [0.8, 0.7, 0.2, 0.1], [0.9, 0.8, 0.2, 0.1], [0.1, 0.2, 0.8, 0.9]]
    for scores, losses in zip(epochs, [(0.5, 0.2), (0.4, 0.3), (0.3, 0.4), (0.4, 0.2)], strict=True):
        best.see(np.array([scores, scores], dtype=np.float32).T, np.array(losses))
    assert mcc_at_youden(labels[:, 0], np.array(epochs[0])) < mcc_at_youden(labels[:, 0], np.array(epochs[1]))
    np.testing.assert_array_equal(best.chosen_SP, np.array([epochs[2], epochs[0]], dtype=np.float32).T)


@pytest.mark.parametrize("rule", ["any", "mean", "top_k", "noisy_or"])
def test_study_scores_of_many_heads_are_those_of_one_by_one(rule):
    study = np.repeat([4, 7, 9], 3)
    probabilities = np.random.default_rng(0).random((9, 5))
    rows, found = _study_scores(study, probabilities, make_spec(study_rule=rule, study_rule_k=2).recipe)
    assert rows.tolist() == [4, 7, 9]
    expected = [study_scores(study, column, rule=rule, k=2)[1] for column in probabilities.T]
    np.testing.assert_array_equal(found, np.stack(expected, axis=1).astype(np.float32))


def test_sealed_studies_have_no_part_in_the_null():
    data = data_with_signal(0.5)
    folds = np.where(np.arange(60) < 10, HOLDOUT, data.folds_N)
    sealed = TrialData(
        **{**vars(data), "folds_N": folds, "labels_N": np.where(folds == HOLDOUT, np.nan, data.labels_N)}
    )
    others = {name: np.array(getattr(data, name))[10:] for name in ("labels_N", "folds_N", "patient_ids")}
    alone = TrialData(**{**vars(data), **others, "features_NKF": data.features_NKF[10:]})
    assert null_of(sealed, count=3) == null_of(alone, count=3)


def test_a_single_permutation_has_no_spread():
    null = null_of(data_with_signal(0.0), count=1)
    assert null.sd == 0
    assert [protocol.sd for protocol in null.balanced_accuracy] == [0, 0, 0, 0]
