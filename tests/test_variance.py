"""Simulated studies with known variation between patients, folds and seeds."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from lbp_ray.intervals import compare_areas
from lbp_ray.metrics import roc_auc
from lbp_ray.variance import split_variance

FOLDS, POSITIVES, NEGATIVES = 10, 20, 60
"""Per fold the last two."""

SIMULATIONS = 200


def study(chance, between=0.0, seeds=1, seed_noise=0.0):
    """Normal scores of area 0.75; `between`: standard deviation of the true areas of the folds."""
    folds = np.repeat(np.arange(FOLDS), POSITIVES + NEGATIVES)
    labels = np.tile(np.repeat([1, 0], [POSITIVES, NEGATIVES]), FOLDS)
    areas = np.clip(0.75 + between * chance.standard_normal(FOLDS), 0.5, 0.99)
    mean = chance.standard_normal(len(labels)) + labels * np.sqrt(2) * norm.ppf(areas)[folds]
    return labels, mean + seed_noise * chance.standard_normal((seeds, len(labels))), np.arange(len(labels)), folds


def fold_deviations(between):
    chance = np.random.default_rng(1)
    return np.array([split_variance(*study(chance, between)).fold_sd for _ in range(SIMULATIONS)])


def test_folds_that_differ_are_told_by_how_much():
    assert np.sqrt((fold_deviations(0.1) ** 2).mean()) == pytest.approx(0.1, rel=0.1)


def test_folds_that_do_not_differ_leave_nothing_about_every_second_time():
    found = fold_deviations(0.0)
    assert 0.35 < (found == 0).mean() < 0.7
    assert found.mean() < 0.02


def test_the_plain_spread_of_the_folds_would_have_told_of_a_difference_that_is_not_there():
    labels, scores, _, folds = study(np.random.default_rng(1))
    areas = [roc_auc(labels[folds == fold], scores[0, folds == fold]) for fold in range(FOLDS)]
    assert np.std(areas, ddof=1) > 0.04


def test_patients_vary_as_delong_says_of_the_averaged_scores():
    labels, scores, patients, folds = study(np.random.default_rng(2), seeds=3, seed_noise=1.0)
    expected = compare_areas(labels, scores.mean(0)[None], patients).covariance_KK[0, 0] ** 0.5
    assert split_variance(labels, scores, patients, folds).patient_sd == pytest.approx(expected)


def test_exams_of_a_patient_count_once():
    labels, scores, patients, folds = study(np.random.default_rng(3), seeds=2)
    twice = split_variance(*(np.repeat(part, 2, axis=-1) for part in (labels, scores, patients, folds)))
    once = split_variance(labels, scores, patients, folds)
    assert twice.patient_sd == pytest.approx(once.patient_sd, rel=0.01)
    assert twice.fold_sd == pytest.approx(once.fold_sd, abs=0.005)


def test_seeds_vary_as_their_pooled_areas():
    labels, scores, patients, folds = study(np.random.default_rng(4), seeds=5, seed_noise=0.5)
    expected = np.std([roc_auc(labels, row) for row in scores], ddof=1)
    assert split_variance(labels, scores, patients, folds).seed_sd == pytest.approx(expected)
    assert split_variance(labels, scores[:1], patients, folds).seed_sd is None


def test_perfect_folds_are_no_more_than_they_are():
    labels, _, patients, folds = study(np.random.default_rng(5))
    found = split_variance(labels, labels[None] * 1.0, patients, folds)
    assert (found.patient_sd, found.fold_sd) == (0, 0)


def test_folds_with_a_single_patient_of_a_class_say_nothing():
    labels = np.array([1, 0, 0, 1, 0, 0, 1, 1, 0, 0])
    folds = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2, 2])
    scores = np.array([[0.9, 0.1, 0.2, 0.1, 0.8, 0.9, 0.6, 0.3, 0.4, 0.2]])
    assert split_variance(labels, scores, np.arange(10), folds).fold_sd == 0
