from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, matthews_corrcoef, roc_auc_score

from lbp_ray import metrics

DECISIONS = ("precision", "npv", "recall", "specificity", "balanced_accuracy", "mcc")
TABLE_5 = {
    1: ((2, 2, 12, 37), (0.500, 0.755, 0.143, 0.949, 0.546, 0.153)),
    3: ((8, 6, 6, 33), (0.571, 0.846, 0.571, 0.846, 0.709, 0.418)),
    5: ((11, 17, 3, 22), (0.393, 0.880, 0.786, 0.564, 0.675, 0.309)),
}
"""Confusion counts (tp, fp, fn, tn) that the thesis's Table 5 implies, and the table."""


@pytest.fixture
def scored():
    generator = np.random.default_rng(0)
    labels = (generator.random(60) < 0.4).astype(int)
    return labels, np.round(generator.random(60) + 0.3 * labels, 1)


@pytest.mark.parametrize("num_slices", TABLE_5)
def test_thesis_table_is_reproduced(num_slices):
    counts, expected = TABLE_5[num_slices]
    found = metrics.threshold_metrics(metrics.Counts(*(np.array([value]) for value in counts)))
    assert [round(float(found[name][0]), 3) for name in DECISIONS] == pytest.approx(expected, abs=6e-4)


def test_nothing_called_positive_gives_zeros_not_nan():
    found = metrics.threshold_metrics(metrics.confusion(np.array([0, 1]), np.array([0, 0])))
    assert (found["precision"][0], found["mcc"][0]) == (0, 0)


def test_resampled_metrics_equal_scikit_learn(scored):
    labels, scores = scored
    decisions = (scores > 0.6).astype(int)
    weights = metrics.patient_resamples(np.arange(60), labels, resamples=50, seed=1)
    found = metrics.resampled_metrics(labels, scores, decisions, weights)
    for row, weight in enumerate(weights):
        assert found["roc_auc"][row] == pytest.approx(roc_auc_score(labels, scores, sample_weight=weight))
        assert found["average_precision"][row] == pytest.approx(
            average_precision_score(labels, scores, sample_weight=weight)
        )
        assert found["mcc"][row] == pytest.approx(matthews_corrcoef(labels, decisions, sample_weight=weight))


def test_resamples_keep_a_patients_exams_together():
    patients = np.repeat(np.arange(20), 3)
    weights = metrics.patient_resamples(patients, np.tile([0, 1, 0], 20), resamples=100, seed=0)
    assert (weights.reshape(100, 20, 3) == weights.reshape(100, 20, 3)[..., :1]).all()
    assert (weights.sum(1) == 60).all()


def test_resamples_always_hold_both_classes():
    labels = np.array([1, 0, 0, 0])
    weights = metrics.patient_resamples(np.arange(4), labels, resamples=200, seed=0)
    assert (weights[:, 0] > 0).all()
    assert (weights[:, 1:].sum(1) > 0).all()


def test_bootstrap_interval_narrows_with_patients_not_with_slices():
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 1], 40)
    scores = generator.normal(labels, 1)
    widths = []
    for repeats in (1, 5):
        args = (np.repeat(labels, repeats), np.repeat(scores, repeats))
        patients = np.repeat(np.arange(80), repeats)
        weights = metrics.patient_resamples(patients, args[0], resamples=500, seed=0)
        low, high = metrics.percentile_interval(metrics.resampled_metrics(*args, args[0], weights)["roc_auc"], 0.95)
        widths.append(high - low)
    assert widths[0] == pytest.approx(widths[1])


def test_youden_prefers_specificity_on_ties():
    labels, scores = np.array([0, 1, 0, 1]), np.array([0.1, 0.2, 0.3, 0.4])
    assert metrics.fit_threshold(labels, scores) == 0.4


def test_youden_on_reversed_scores_calls_nothing_positive():
    labels, scores = np.array([1, 0]), np.array([0.1, 0.9])
    assert (scores >= metrics.fit_threshold(labels, scores)).sum() == 0
    assert metrics.fit_threshold(labels, scores) == pytest.approx(0.9)  # still a score, for a mean of thresholds


def test_threshold_of_a_fold_ignores_its_own_scores(scored):
    labels, scores = scored
    folds = np.arange(60) % 3
    before = metrics.thresholds_by_fold(labels, scores, folds)
    changed = np.where(folds == 0, scores[::-1], scores)
    after = metrics.thresholds_by_fold(labels, changed, folds)
    assert before[0] == after[0]


RULES = {"any": [0.6, 0.3], "mean": [0.3, 0.3], "top_k": [0.4, 0.3], "noisy_or": [1 - 0.4 * 0.8 * 0.9, 0.3]}


@pytest.mark.parametrize("rule", RULES)
def test_study_rules(rule):
    studies = np.array(["b", "c", "b", "b"])
    found = metrics.study_scores(studies, np.array([0.1, 0.3, 0.6, 0.2]), rule=rule, k=2)
    assert found[0].tolist() == ["b", "c"]
    assert found[1] == pytest.approx(RULES[rule])


MERITS = {
    "youden": lambda recall, specificity, *_: recall + specificity,
    "closest": lambda recall, specificity, *_: -((1 - recall) ** 2 + (1 - specificity) ** 2),
    "g_mean": lambda recall, specificity, *_: recall * specificity,
    "max_mcc": lambda _r, _s, _n, mcc: mcc,
    "sensitivity": lambda recall, *_: recall >= 0.8,
    "npv": lambda _r, _s, npv, _m: npv >= 0.8,
}
"""Criterion → what it makes as large as possible; of equals the highest threshold is due."""


@pytest.mark.parametrize("criterion", MERITS)
def test_threshold_criteria_take_the_best_of_all_cuts(criterion):
    generator = np.random.default_rng(5)
    for _ in range(20):
        labels = np.append(generator.integers(0, 2, 28), [0, 1])
        scores = np.round(generator.random(30) + 0.4 * labels, 1)
        cuts = sorted({*scores, scores.max() + 1.0}, reverse=True)
        merits = []
        for cut in cuts:
            found = metrics.threshold_metrics(metrics.confusion(labels, (scores >= cut).astype(int)))
            parts = [float(found[name][0]) for name in ("recall", "specificity", "npv", "mcc")]
            merits.append(round(float(MERITS[criterion](*parts)), 9))
        target = 0.8 if criterion in ("sensitivity", "npv") else None
        expected = cuts[int(np.argmax(merits))]
        assert metrics.fit_threshold(labels, scores, criterion=criterion, target=target) == pytest.approx(expected)


def test_unreachable_target_is_refused():
    with pytest.raises(metrics.MetricError, match=r"no threshold reaches npv 0\.9"):
        metrics.fit_threshold(np.array([1, 1, 0]), np.array([0.1, 0.2, 0.3]), criterion="npv", target=0.9)


def test_same_fold_thresholds_use_nothing_else(scored):
    labels, scores = scored
    folds = np.arange(60) % 3
    changed = np.where(folds == 0, scores, 1.0 - scores)
    assert (
        metrics.thresholds_by_fold(labels, scores, folds, source="same_fold")[0]
        == metrics.thresholds_by_fold(labels, changed, folds, source="same_fold")[0]
    )


def test_separation_is_the_difference_of_mean_probabilities():
    assert metrics.separation(np.array([0, 1, 1]), np.array([0.2, 0.5, 0.7])) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("labels", "scores", "match"),
    [([0, 1], [0.1, np.nan], "must be finite"), ([1, 1], [0.1, 0.2], "both classes"), ([0, 2], [0.1, 0.2], "0 or 1")],
)
def test_spoilt_input_is_refused(labels, scores, match):
    with pytest.raises(metrics.MetricError, match=match):
        metrics.roc_auc(np.array(labels), np.array(scores))
