"""Areas under ROC curves: their intervals cover, their comparison keeps its level, patients are the unit."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from lbp_ray.aggregate import compare_slice_counts
from lbp_ray.intervals import area_interval, compare_areas, difference_of, holm
from lbp_ray.metrics import MetricError, roc_auc

SIMULATIONS = 2000


def normal_cohorts(area, positives, negatives, *, correlation=None, areas=None, seed=0):
    """Scores of two classes, normal in each; with `areas` a pair of correlated scores of the same studies."""
    chance = np.random.default_rng(seed)
    labels = np.repeat([1, 0], [positives, negatives])
    for _ in range(SIMULATIONS):
        noise = chance.standard_normal((2, len(labels)))
        if areas is None:
            yield labels, (noise[0] + labels * np.sqrt(2) * norm.ppf(area))[None]
        else:
            second = correlation * noise[0] + np.sqrt(1 - correlation**2) * noise[1]
            shifts = np.sqrt(2) * norm.ppf(areas)
            yield labels, np.stack([noise[0] + labels * shifts[0], second + labels * shifts[1]])


def by_definition(labels, scores, patients):
    """Obuchowski's covariance, term by term as in the paper."""
    positive, negative = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)
    wins = (scores[:, positive, None] > scores[:, None, negative]) + 0.5 * (
        scores[:, positive, None] == scores[:, None, negative]
    )
    areas, above, below = wins.mean((1, 2)), wins.mean(2), wins.mean(1)
    clusters = np.unique(patients)
    sums = np.zeros((2, len(scores), len(clusters)))
    for number, cluster in enumerate(clusters):
        sums[0, :, number] = (above[:, patients[positive] == cluster] - areas[:, None]).sum(1)
        sums[1, :, number] = (below[:, patients[negative] == cluster] - areas[:, None]).sum(1)
    with_positive, with_negative = len(set(patients[positive])), len(set(patients[negative]))
    total, m, n = len(clusters), len(positive), len(negative)
    ten = with_positive / ((with_positive - 1) * m) * sums[0] @ sums[0].T
    one = with_negative / ((with_negative - 1) * n) * sums[1] @ sums[1].T
    mixed = total / (total - 1) * sums[0] @ sums[1].T
    return areas, ten / m + one / n + (mixed + mixed.T) / (m * n)


@pytest.mark.parametrize("patients", [30, 12], ids=["one exam each", "several exams"])
def test_covariance_is_that_of_the_papers(patients):
    chance = np.random.default_rng(1)
    labels = chance.integers(0, 2, 30)
    owners = np.arange(30) % patients
    scores = np.round(chance.standard_normal((3, 30)) + labels, 1)  # rounded: ties
    found = compare_areas(labels, scores, owners)
    areas, covariance = by_definition(labels, scores, owners)
    np.testing.assert_allclose(found.areas_K, areas)
    np.testing.assert_allclose(found.areas_K, [roc_auc(labels, row) for row in scores])
    np.testing.assert_allclose(found.covariance_KK, covariance)


@pytest.mark.parametrize(("positives", "negatives"), [(11, 42), (102, 371)])
@pytest.mark.parametrize("area", [0.6, 0.75, 0.9])
def test_logit_interval_covers(area, positives, negatives):
    patients = np.arange(positives + negatives)
    covered = 0
    for labels, scores in normal_cohorts(area, positives, negatives):
        low, high = area_interval(compare_areas(labels, scores, patients), 0, level=0.95)
        covered += low <= area <= high
    assert 0.93 <= covered / SIMULATIONS <= 0.97


@pytest.mark.parametrize("correlation", [0.5, 0.8])
def test_comparison_keeps_its_level(correlation):
    rejected = 0
    for labels, scores in normal_cohorts(None, 102, 371, correlation=correlation, areas=[0.7, 0.7]):
        areas = compare_areas(labels, scores, np.arange(473))
        rejected += difference_of(areas, 0, 1, level=0.95).p_value <= 0.05
    assert 0.035 <= rejected / SIMULATIONS <= 0.065


@pytest.mark.parametrize("correlation", [0.5, 0.8])
def test_comparison_has_power_at_the_studys_size_and_little_at_the_thesiss_test_set(correlation):
    power = []
    for positives, negatives in ((102, 371), (14, 39)):
        rejected = 0
        for labels, scores in normal_cohorts(None, positives, negatives, correlation=correlation, areas=[0.67, 0.75]):
            areas = compare_areas(labels, scores, np.arange(positives + negatives))
            rejected += difference_of(areas, 0, 1, level=0.95).p_value <= 0.05
        power.append(rejected / SIMULATIONS)
    assert power[0] >= 0.75
    assert 0.1 <= power[1] <= 0.35


def test_intervals_of_slices_as_if_independent_cover_too_seldom():
    """Five slices of a study at intra-class correlation 0.8: the patient is the unit, not the slice."""
    chance = np.random.default_rng(2)
    labels, area = np.repeat([1, 0], [102, 371]), 0.75
    covered = {"slices": 0, "patients": 0}
    for _ in range(300):
        study = np.sqrt(0.8) * chance.standard_normal(473)
        scores = np.repeat(study + labels * np.sqrt(2) * norm.ppf(area), 5)
        scores += np.sqrt(0.2) * chance.standard_normal(len(scores))
        for unit, owners in (("slices", np.arange(2365)), ("patients", np.repeat(np.arange(473), 5))):
            found = compare_areas(np.repeat(labels, 5), scores[None], owners)
            low, high = area_interval(found, 0, level=0.95)
            covered[unit] += low <= area <= high
    assert covered["slices"] / 300 < 0.85
    assert covered["patients"] / 300 > 0.92


@pytest.mark.parametrize(("sign", "expected"), [(1.0, (0.6915, 1.0)), (-1.0, (0.0, 0.3085))])
def test_perfect_scores_are_not_certain(sign, expected):
    labels = np.repeat([1, 0], [10, 30])
    areas = compare_areas(labels, sign * labels[None], np.arange(40))
    assert area_interval(areas, 0, level=0.95) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("positives", "expected"), [(10, (0.1871, 0.8129)), (11, (0.1675, 0.8325))])
def test_constant_scores_are_not_certain(positives, expected):
    """By Clopper and Pearson: 5 of 10; of 11 patients the low end of 5, the high end of 6."""
    labels = np.repeat([1, 0], [positives, 30])
    areas = compare_areas(labels, np.full((1, len(labels)), 0.3), np.arange(len(labels)))
    assert areas.areas_K == [0.5]
    assert area_interval(areas, 0, level=0.95) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("second", ["constant", "opposite", "perfect"])
def test_areas_that_do_not_vary_are_not_compared(second):
    labels = np.repeat([1, 0], [10, 30])
    scores = np.stack([labels, {"constant": np.zeros(40), "opposite": -labels, "perfect": 2 * labels}[second]])
    found = difference_of(compare_areas(labels, scores, np.arange(40)), 0, 1, level=0.95)
    assert found == ({"constant": 0.5, "opposite": 1.0, "perfect": 0.0}[second], -1.0, 1.0, 1.0)


def test_equal_scores_do_not_differ():
    labels = np.repeat([1, 0], [10, 30])
    scores = np.random.default_rng(0).standard_normal(40)
    areas = compare_areas(labels, np.stack([scores, scores]), np.arange(40))
    assert difference_of(areas, 0, 1, level=0.95) == (0.0, 0.0, 0.0, 1.0)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_missing_scores_are_refused():
    with pytest.raises(MetricError, match="scores must be finite"):
        compare_areas(np.array([0, 1]), np.array([[0.5, np.nan]]), np.arange(2))


def test_slice_counts_are_compared_on_the_same_studies():
    chance = np.random.default_rng(4)
    labels = np.repeat([1, 0], [60, 120])
    noise = chance.standard_normal(180)
    tables = {}
    for count, shift in ((1, 0.2), (3, 1.5), (5, 1.5)):
        scores = noise + 0.3 * chance.standard_normal(180) + shift * labels
        tables[count] = pd.DataFrame({"score": scores, "label": labels, "patient_id": np.arange(180)})
    found = {(pair.first, pair.second): pair for pair in compare_slice_counts(tables, level=0.95)}
    assert set(found) == {(1, 3), (1, 5), (3, 5)}
    for (first, second), pair in found.items():
        areas = [roc_auc(labels, tables[count]["score"].to_numpy()) for count in (first, second)]
        assert pair.difference == pytest.approx(areas[1] - areas[0])
        assert pair.low < pair.difference < pair.high
        assert pair.p_adjusted >= pair.p_value
    assert found[1, 3].p_adjusted < 0.001
    assert found[3, 5].p_adjusted > 0.05


def test_a_single_slice_count_is_compared_with_none():
    table = pd.DataFrame({"score": [0.1, 0.9, 0.2, 0.3], "label": [0, 1, 0, 1], "patient_id": list("abcd")})
    assert compare_slice_counts({3: table}, level=0.95) == ()
