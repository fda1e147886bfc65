"""Areas under ROC curves: their intervals cover, their comparison keeps its level, patients are the unit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from benchmarks.intervals import cross_validations
from lbp_ray.aggregate import compare_slice_counts, out_of_fold_inflation
from lbp_ray.intervals import (
    _wilson_intervals,
    area_interval,
    compare_areas,
    cross_validation_inflation,
    delong_interval,
    difference_of,
    holm,
    metric_intervals,
    resampled_interval,
    wilson_interval,
)
from lbp_ray.metrics import MetricError, all_metrics, patient_resamples, percentile_interval, resampled_metrics, roc_auc
from lbp_ray.study import EvaluationConfig, StudyConfig

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


@pytest.mark.parametrize(
    ("correlation", "expected"),
    [
        (0.5, {"one model": 0.77, "widened": 0.44, "Holm": 0.22}),
        (0.8, {"one model": 0.99, "widened": 0.92, "Holm": 0.74}),
    ],
)
def test_power_of_the_comparison_that_a_study_makes_is_what_the_documentation_says(correlation, expected):
    """0.67 against 0.75 with a third count at 0.71, 10 folds; three standard errors of 400 simulations are 0.07."""
    chance, labels = np.random.default_rng(2), np.repeat([1, 0], [102, 371])
    shifts, told = np.sqrt(2) * norm.ppf([[0.67], [0.71], [0.75]]), dict.fromkeys(expected, 0)
    for _ in range(400):
        common, own = chance.standard_normal(473), chance.standard_normal((3, 473))
        scores = np.sqrt(correlation) * common + np.sqrt(1 - correlation) * own + labels * shifts
        once = compare_areas(labels, scores, np.arange(473))
        wide = replace(once, covariance_KK=cross_validation_inflation(10) * once.covariance_KK)
        plain, widened = (
            [difference_of(areas, *pair, level=0.95).p_value for pair in ((2, 0), (1, 0), (2, 1))]
            for areas in (once, wide)
        )
        for name, p_value in (("one model", plain[0]), ("widened", widened[0]), ("Holm", holm(widened)[0])):
            told[name] += p_value <= 0.05
    assert {name: count / 400 for name, count in told.items()} == pytest.approx(expected, abs=0.07)


@pytest.mark.parametrize("slices", [3, 5])
@pytest.mark.parametrize(("positives", "negatives"), [(11, 42), (102, 371)])
def test_intervals_of_slices_as_if_independent_cover_too_seldom(slices, positives, negatives):
    """Slices of a study at intra-class correlation 0.8: the patient is the unit, not the slice."""
    chance, number, area = np.random.default_rng(2), positives + negatives, 0.75
    labels = np.repeat([1, 0], [positives * slices, negatives * slices])
    covered = {"slices": 0, "patients": 0}
    for _ in range(400):
        scores = np.repeat(np.sqrt(0.8) * chance.standard_normal(number), slices) + labels * np.sqrt(2) * norm.ppf(area)
        scores += np.sqrt(0.2) * chance.standard_normal(len(scores))
        for unit, owners in (("slices", np.arange(len(labels))), ("patients", np.repeat(np.arange(number), slices))):
            low, high = area_interval(compare_areas(labels, scores[None], owners), 0, level=0.95)
            covered[unit] += low <= area <= high
    assert covered["slices"] / 400 < 0.85
    assert covered["patients"] / 400 > 0.91


def test_percentile_bootstrap_falls_short_where_the_logit_interval_does_not():
    """Few positives, high area: why the bootstrap is not the default."""
    patients, area, covered = np.arange(53), 0.9, {"logit": 0, "bootstrap": 0}
    cohorts = list(normal_cohorts(area, 11, 42))[:500]
    weights = patient_resamples(patients, cohorts[0][0], resamples=500, seed=0)
    for labels, scores in cohorts:
        values = resampled_metrics(labels, scores[0], labels, weights)["roc_auc"]
        logit = area_interval(compare_areas(labels, scores, patients), 0, level=0.95)
        for method, (low, high) in (("logit", logit), ("bootstrap", percentile_interval(values, 0.95))):
            covered[method] += low <= area <= high
    assert covered["bootstrap"] / 500 < 0.925
    assert covered["logit"] - covered["bootstrap"] > 10


@pytest.mark.parametrize(
    ("successes", "total", "expected"),
    [(8, 14, (0.3259, 0.7862)), (81, 263, (0.2553, 0.3662)), (0, 20, (0.0, 0.1611)), (1, 29, (0.0061, 0.1718))],
    ids=["recall of the Oulu thesis at three slices", *["Newcombe 1998, table I"] * 3],
)
def test_wilson_is_that_of_the_papers(successes, total, expected):
    assert wilson_interval(successes, total, level=0.95) == pytest.approx(expected, abs=6e-5)


def test_a_share_of_nothing_is_unknown():
    assert wilson_interval(0, 0, level=0.95) == (0.0, 1.0)


def judged(number=80, exams=1, seed=0):
    """Labels, scores, decisions and patients; exams of a patient say the same."""
    chance = np.random.default_rng(seed)
    labels = (np.arange(number) % 4 == 0).astype(int)
    scores = chance.standard_normal(number) + labels
    once = labels, scores, (scores > 0.7).astype(int), np.arange(number)
    return tuple(np.repeat(part, exams) for part in once)


def intervals_of(cohort, **evaluation):
    return metric_intervals(*cohort, evaluation=EvaluationConfig(bootstrap_resamples=300, **evaluation))


SHARES = {"precision", "npv", "recall", "specificity", "accuracy"}
RESAMPLED = {"average_precision", "mcc", "separation"}


def test_every_metric_has_an_interval_that_says_how_it_was_made():
    cohort = judged()
    found = intervals_of(cohort)
    metrics = all_metrics(*cohort[:3])
    assert set(found) == set(metrics) == {"roc_auc", "balanced_accuracy"} | SHARES | RESAMPLED
    assert all(found[name].low < metrics[name] < found[name].high for name in found)
    assert {found[name].method for name in SHARES} == {"Wilson over patients"}
    assert {found[name].method for name in RESAMPLED} == {"percentile bootstrap over patients, 300 resamples"}
    assert found["roc_auc"].method == "DeLong over patients, on the logit scale"
    assert found["balanced_accuracy"].method == "Wilson's of recall and specificity, combined"


def test_each_share_is_of_its_own_patients():
    labels, decisions = np.repeat([1, 0], [14, 39]), np.repeat([1, 0, 1, 0], [11, 3, 17, 22])
    found = intervals_of((labels, decisions * 1.0, decisions, np.arange(53)))
    of = {"precision": (11, 28), "npv": (22, 25), "recall": (11, 14), "specificity": (22, 39), "accuracy": (33, 53)}
    for name, (successes, total) in of.items():
        assert (found[name].low, found[name].high) == wilson_interval(successes, total, level=0.95)


def test_balanced_accuracy_is_not_surer_than_a_class_without_errors():
    labels, decisions = np.repeat([1, 0], [11, 42]), np.repeat([1, 0, 1], [11, 30, 12])
    found = intervals_of((labels, decisions * 1.0, decisions, np.arange(53)))["balanced_accuracy"]
    recall, specificity = (wilson_interval(*share, level=0.95) for share in ((11, 11), (30, 42)))
    assert found.low == pytest.approx((1 + 30 / 42) / 2 - np.hypot(1 - recall[0], 30 / 42 - specificity[0]) / 2)
    assert found.high == pytest.approx((1 + 30 / 42) / 2 + (specificity[1] - 30 / 42) / 2)
    assert found.low < 0.72


@pytest.mark.parametrize(("recall", "specificity"), [(0.57, 0.85), (0.9, 0.7), (0.95, 0.9)])
def test_interval_of_balanced_accuracy_covers_on_a_hold_out(recall, specificity):
    chance = np.random.default_rng(6)
    labels, truth, held = np.repeat([1, 0], [11, 42]), (recall + specificity) / 2, 0
    for _ in range(600):
        decisions = np.concatenate([chance.random(11) < recall, chance.random(42) >= specificity]).astype(int)
        found = _wilson_intervals(labels, decisions, level=0.95)["balanced_accuracy"]
        held += found.low <= truth <= found.high
    assert 0.92 <= held / 600 <= 0.98


@pytest.mark.parametrize("features", [30, 60])
def test_cross_validated_scores_need_the_inflation(features):
    """Nothing to learn: the area of every model is 0.5, and two equally good views never differ."""
    number, inflations = 250, (1.0, cross_validation_inflation(10))
    held, told = dict.fromkeys(inflations, 0), dict.fromkeys(inflations, 0)
    for labels, scores, truth in cross_validations(features, 0.0, simulations=number):
        assert truth == 0.5
        for inflation in inflations:
            areas = compare_areas(labels, scores, np.arange(len(labels)), inflation=inflation)
            low, high = area_interval(areas, 0, level=0.95)
            held[inflation] += low <= truth <= high
            told[inflation] += difference_of(areas, 0, 1, level=0.95).p_value <= 0.05
    plain, inflated = inflations
    assert inflated == pytest.approx(19 / 9)
    assert held[plain] / number < 0.9 < 0.92 < held[inflated] / number
    assert told[plain] / number > 0.1 > 0.085 > told[inflated] / number


def test_inflation_widens_every_interval_within_what_is_possible():
    labels, scores, decisions, patients = judged()
    cohort = labels, 1 / (1 + np.exp(-scores)), decisions, patients
    estimates, plain = all_metrics(*cohort[:3]), intervals_of(cohort)
    wide = metric_intervals(*cohort, evaluation=EvaluationConfig(bootstrap_resamples=300), inflation=4.0)
    for name, interval in wide.items():
        assert interval.low < plain[name].low < estimates[name] < plain[name].high < interval.high
        assert interval.low >= -1
        assert interval.high <= 1
        assert interval.method == f"{plain[name].method}, widened for cross-validation"
    recall, estimate = wide["recall"], estimates["recall"]
    assert estimate - recall.low == pytest.approx(2 * (estimate - plain["recall"].low))


@pytest.mark.parametrize(("positives", "negatives"), [(1, 42), (42, 1)])
def test_class_of_one_patient_tells_nothing(positives, negatives):
    labels = np.repeat([1, 0], [positives, negatives])
    scores = np.random.default_rng(1).standard_normal((2, len(labels)))
    areas = compare_areas(labels, scores, np.arange(len(labels)))
    assert area_interval(areas, 0, level=0.95) == (0.0, 1.0)
    assert difference_of(areas, 0, 1, level=0.95)[1:] == (-1.0, 1.0, 1.0)
    found = intervals_of((labels, scores[0], labels, np.arange(len(labels))))["roc_auc"]
    assert (found.low, found.high, found.method) == (0.0, 1.0, "one patient in a class: unknown")


def test_several_exams_of_a_patient_are_no_wilson_trials():
    once, thrice = intervals_of(judged()), intervals_of(judged(exams=3))
    for name in SHARES:
        assert thrice[name].method == "percentile bootstrap over patients, 300 resamples"
        assert thrice[name].high - thrice[name].low > 0.75 * (once[name].high - once[name].low)


def test_the_bootstrap_can_be_had_instead():
    found = intervals_of(judged(), area_interval="bootstrap", share_interval="bootstrap")
    assert {interval.method for interval in found.values()} == {"percentile bootstrap over patients, 300 resamples"}
    other = intervals_of(judged())
    assert all((found[name] == other[name]) == (name in RESAMPLED) for name in found)


@pytest.mark.parametrize("exams", [1, 2])
def test_nothing_called_positive_leaves_precision_unknown(exams):
    labels, scores, decisions, patients = judged(exams=exams)
    found = intervals_of((labels, scores, np.zeros_like(decisions), patients))
    assert (found["precision"].low, found["precision"].high) == (0, 1)
    assert (found["mcc"].low, found["mcc"].high) == (-1, 1)
    assert "unknown" in found["precision"].method
    assert "unknown" in found["mcc"].method


def test_resamples_that_agree_are_no_certainty():
    found = resampled_interval(np.ones(200), level=0.95)
    assert (found.low, found.high) == (0, 1)
    assert found.method == "percentile bootstrap over patients, 200 resamples that are all alike: unknown"


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


@pytest.mark.parametrize("score", [1.0, 0.0], ids=["perfect", "constant"])
@pytest.mark.parametrize("positives", [2, 3, 5, 10, 11, 40])
def test_scores_that_do_not_vary_are_widened_for_cross_validation_and_say_so(positives, score):
    labels = np.repeat([1, 0], [positives, 80])
    cohort = labels, score * labels, np.arange(len(labels))
    once, wide = (delong_interval(*cohort, level=0.95, inflation=factor) for factor in (1.0, 19 / 9))
    assert once.method == "Clopper-Pearson over patients of the smaller class"
    assert wide.method == f"{once.method}, widened for cross-validation"
    assert wide.low < once.low or once.low == 0
    assert wide.high > once.high or once.high == 1
    assert wide.high - wide.low > once.high - once.low


def test_the_widened_interval_of_perfect_scores_is_that_of_fewer_patients():
    """Of 10 patients at an inflation of 19 / 9 four are left: the low end is the fourth root of 0.025."""
    labels = np.repeat([1, 0], [10, 30])
    found = delong_interval(labels, labels * 1.0, np.arange(40), level=0.95, inflation=19 / 9)
    assert (found.low, found.high) == pytest.approx((0.025 ** (1 / 4), 1))


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


@pytest.mark.parametrize("correlation", [0.5, 0.8])
def test_holm_keeps_the_chance_of_any_false_claim_over_the_pairs_of_three(correlation):
    chance, labels, claims = np.random.default_rng(5), np.repeat([1, 0], [102, 371]), {"plain": 0, "holm": 0}
    for _ in range(600):
        common, own = chance.standard_normal(473), chance.standard_normal((3, 473))
        scores = np.sqrt(correlation) * common + np.sqrt(1 - correlation) * own + labels * np.sqrt(2) * norm.ppf(0.7)
        areas = compare_areas(labels, scores, np.arange(473))
        p_values = [difference_of(areas, *pair, level=0.95).p_value for pair in ((0, 1), (0, 2), (1, 2))]
        claims["plain"] += min(p_values) <= 0.05
        claims["holm"] += min(holm(p_values)) <= 0.05
    assert claims["plain"] / 600 > 0.08
    assert claims["holm"] / 600 < 0.065


def test_missing_scores_are_refused():
    with pytest.raises(MetricError, match="scores must be finite"):
        compare_areas(np.array([0, 1]), np.array([[0.5, np.nan]]), np.arange(2))


def study_table(scores, labels):
    """One slice per study, as `compare_slice_counts` takes it."""
    names = [f"s{study:03d}" for study in range(len(labels))]
    table = pd.DataFrame({"study_id": names, "slice_index": 7, "label": labels, "study_probability": scores})
    return table.assign(probability=table["study_probability"], threshold=0.5)


def test_slice_counts_are_compared_on_the_same_studies():
    chance = np.random.default_rng(4)
    labels = np.repeat([1, 0], [60, 120])
    noise = chance.standard_normal(180)
    tables = {}
    for count, shift in ((1, 0.2), (3, 1.5), (5, 1.5)):
        tables[count] = study_table(noise + 0.3 * chance.standard_normal(180) + shift * labels, labels)
    patient_of = {study: f"p{study}" for study in tables[1]["study_id"]}
    found = {(pair.first, pair.second): pair for pair in compare_slice_counts(tables, patient_of, 0.95, inflation=1.0)}
    assert set(found) == {(1, 3), (1, 5), (3, 5)}
    for (first, second), pair in found.items():
        areas = [roc_auc(labels, tables[count]["study_probability"].to_numpy()) for count in (first, second)]
        assert pair.difference == pytest.approx(areas[1] - areas[0])
        assert pair.low < pair.difference < pair.high
        assert pair.p_adjusted >= pair.p_value
    assert found[1, 3].p_adjusted < 0.001
    assert found[3, 5].p_adjusted > 0.05


def test_cross_validation_widens_the_difference_of_slice_counts():
    chance = np.random.default_rng(4)
    labels = np.repeat([1, 0], [60, 120])
    tables = {count: study_table(chance.standard_normal(180) + labels, labels) for count in (1, 3)}
    patient_of = {study: f"p{study}" for study in tables[1]["study_id"]}
    (plain,), (wide,) = (compare_slice_counts(tables, patient_of, 0.95, inflation=factor) for factor in (1.0, 4.0))
    assert wide.difference == plain.difference
    assert wide.high - wide.low == pytest.approx(2 * (plain.high - plain.low))
    assert wide.p_value > plain.p_value


@pytest.mark.parametrize(("how", "factor"), [("nadeau_bengio", 1 + 4 / 3), ("one_model", 1.0)])
def test_out_of_fold_variance_is_that_of_the_named_choice(tmp_path, how, factor):
    places = dict.fromkeys(("store", "questionnaire", "annotations", "runs"), tmp_path)
    sections = {"split": {"folds": 4}, "evaluation": {"cross_validated_variance": how}}
    config = StudyConfig.model_validate({"name": "s", "paths": places, **sections})
    assert out_of_fold_inflation(config) == pytest.approx(factor)


def test_a_single_slice_count_is_compared_with_none():
    table = study_table([0.1, 0.9, 0.2, 0.3], [0, 1, 0, 1])
    assert compare_slice_counts({3: table}, {study: study for study in table["study_id"]}, 0.95, inflation=1.0) == ()
