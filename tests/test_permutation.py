from __future__ import annotations

import numpy as np
import pytest
import torch
from study_factory import make_data, make_spec

from lbp_ray.cell import TrialData
from lbp_ray.permutation import permutation_null, permute_labels
from lbp_ray.training import Resident, Training

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
    from lbp_ray.metrics import roc_auc

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
