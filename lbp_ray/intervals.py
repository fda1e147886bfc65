"""How sure a metric is, and whether two areas under the ROC curve differ on the same exams.

Uncertainty is over patients, conditional on the trained models; that of cross-validated scores is inflated. Suffixes:
S studies, P positive studies, N negative studies, C patients, K sets of scores, B bootstrap resamples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.stats import beta, binomtest, norm, rankdata

from lbp_ray.metrics import (
    all_metrics,
    check_scores,
    confusion,
    patient_resamples,
    percentile_interval,
    resampled_metrics,
)
from lbp_ray.result import Interval

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lbp_ray.study import EvaluationConfig

FEWEST = 2
"""Patients of each class without which nothing varies over patients."""

NO_SPREAD = 1e-7
"""Standard deviation of an area, and difference of two, that is rounding error: one pair of exams moves more."""

WIDENED = ", widened for cross-validation"
"""Ends the method of an interval whose variance was inflated."""

RANGES = {"mcc": (-1.0, 1.0), "separation": (-1.0, 1.0)}
"""Where a metric can lie; from 0 to 1 unless it stands here."""


@dataclass(frozen=True)
class Areas:
    """Areas under the ROC curves of K sets of scores on the same studies, and their covariance over patients."""

    areas_K: np.ndarray
    covariance_KK: np.ndarray
    smaller_class: int
    """Patients of the class that has fewer."""
    inflation: float
    """Factor that the covariance was multiplied by."""


class Difference(NamedTuple):
    """Two areas on the same studies, compared."""

    difference: float
    """First minus second."""
    low: float
    high: float
    p_value: float
    """Two-sided, of no difference."""


def cross_validation_inflation(folds: int) -> float:
    """Return by how much the variance of cross-validated scores exceeds that of one model's scores of new patients.

    Every patient who is scored by one fold's network has trained the networks of all other folds. The scores of two
    folds therefore err together, which no variance over patients sees; an unbiased estimate of it does not exist.

    Parameters
    ----------
    folds
        K; each network is tested on one part and trained on K - 1.

    Returns
    -------
    float
        1 + K / (K - 1): 2.1 for ten folds.

    References
    ----------
    Nadeau and Bengio, Machine Learning 52 (2003); Bengio and Grandvalet, JMLR 5 (2004), on the unbiased estimate.
    """
    return 1 + folds / (folds - 1)


def compare_areas(
    labels_S: np.ndarray, scores_KS: np.ndarray, patients_S: np.ndarray, *, inflation: float = 1.0
) -> Areas:
    """Compute areas under ROC curves and how they vary together over patients.

    With one study per patient this is DeLong's covariance; with several, studies of a patient count as a cluster.

    Parameters
    ----------
    labels_S
        0 or 1, both present.
    scores_KS
        K scores of every study; higher means positive.
    patients_S
        Patient of every study.
    inflation
        Factor of the covariance, for cross-validated scores (`cross_validation_inflation`).

    Raises
    ------
    lbp_ray.metrics.MetricError
        If a score is not finite or a class is missing.

    References
    ----------
    DeLong, DeLong and Clarke-Pearson, Biometrics 44 (1988); Obuchowski, Biometrics 53 (1997) for clusters.
    """
    for scores in scores_KS:
        check_scores(labels_S, scores)
    positive = labels_S == 1
    above_KP, below_KN = zip(*(_placements(scores[positive], scores[~positive]) for scores in scores_KS), strict=True)
    areas_K = np.array([placements.mean() for placements in above_KP])
    _, patient_S = np.unique(patients_S, return_inverse=True)
    sums_KC = _cluster_sums(np.array(above_KP) - areas_K[:, None], patient_S[positive], patient_S.max() + 1)
    other_KC = _cluster_sums(np.array(below_KN) - areas_K[:, None], patient_S[~positive], patient_S.max() + 1)
    sums_KC, other_KC = sums_KC / positive.sum(), other_KC / (~positive).sum()
    first = _correction(patient_S[positive]) * sums_KC @ sums_KC.T
    second = _correction(patient_S[~positive]) * other_KC @ other_KC.T
    both = _correction(patient_S) * sums_KC @ other_KC.T
    smaller = min(len(np.unique(patient_S[chosen])) for chosen in (positive, ~positive))
    return Areas(areas_K, inflation * (first + second + both + both.T), smaller, inflation)


def _placements(scores_P: np.ndarray, scores_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of the other class that each study beats (ties count one half), for positives and for negatives."""
    ranks = rankdata(np.concatenate([scores_P, scores_N]))
    above_P = (ranks[: len(scores_P)] - rankdata(scores_P)) / len(scores_N)
    below_N = 1 - (ranks[len(scores_P) :] - rankdata(scores_N)) / len(scores_P)
    return above_P, below_N


def _cluster_sums(values_KM: np.ndarray, patient_M: np.ndarray, num_patients: int) -> np.ndarray:
    return np.array([np.bincount(patient_M, values, minlength=num_patients) for values in values_KM])


def _correction(patient_M: np.ndarray) -> float:
    count = len(np.unique(patient_M))
    return count / (count - 1) if count > 1 else 1.0


def area_interval(areas: Areas, row: int, *, level: float) -> tuple[float, float]:
    """Return the interval of one area, made on the logit scale so that it stays between 0 and 1.

    Parameters
    ----------
    areas
        From `compare_areas`.
    row
        Which set of scores.
    level
        Nominal coverage, e.g. 0.95.

    Notes
    -----
    Nothing is known of a class of one patient: the interval is 0 to 1. An area that does not vary is not known for
    certain: perfect or constant scores have no variance. Its interval is then that of a share of the patients of the
    smaller class, by Clopper and Pearson, which errs on the wide side: the low end of the area rounded down to whole
    patients, the high end of the area rounded up. Without a variance to inflate, the patients are divided by the
    inflation, and rounded down.

    References
    ----------
    Pepe, The Statistical Evaluation of Medical Tests (2003), section 5.2: intervals for the AUC by its logit.
    Clopper and Pearson, Biometrika 26 (1934).
    """
    if areas.smaller_class < FEWEST:
        return 0.0, 1.0
    area = float(areas.areas_K[row])
    spread = _deviation(areas.covariance_KK[row, row])
    if spread <= NO_SPREAD:
        return _share_interval(area, int(areas.smaller_class / areas.inflation), level=level)
    half = norm.ppf((1 + level) / 2) * spread / (area * (1 - area))
    logit = np.log(area / (1 - area))
    low, high = 1 / (1 + np.exp(-(logit - half))), 1 / (1 + np.exp(-(logit + half)))
    return float(low), float(high)


def delong_interval(
    labels_S: np.ndarray, scores_S: np.ndarray, patients_S: np.ndarray, *, level: float, inflation: float = 1.0
) -> Interval:
    """Return the interval of one set of scores' area, as `compare_areas` and `area_interval` make it."""
    areas = compare_areas(labels_S, scores_S[None], patients_S, inflation=inflation)
    low, high = area_interval(areas, 0, level=level)
    return Interval(low=low, high=high, level=level, method=_area_method(areas, 0))


def _area_method(areas: Areas, row: int) -> str:
    """Name what `area_interval` does."""
    if areas.smaller_class < FEWEST:
        return "one patient in a class: unknown"
    varies = _deviation(areas.covariance_KK[row, row]) > NO_SPREAD
    how = "DeLong over patients, on the logit scale" if varies else "Clopper-Pearson over patients of the smaller class"
    return f"{how}{WIDENED if areas.inflation > 1 else ''}"


def _deviation(variance: float) -> float:
    """Return the standard deviation; a variance over clusters may come out below 0."""
    return float(np.sqrt(max(variance, 0.0)))


def _share_interval(share: float, patients: int, *, level: float) -> tuple[float, float]:
    tail = (1 - level) / 2
    fewest, most = np.floor(share * patients), np.ceil(share * patients)
    low = float(beta.ppf(tail, fewest, patients - fewest + 1)) if fewest > 0 else 0.0
    high = float(beta.ppf(1 - tail, most + 1, patients - most)) if most < patients else 1.0
    return low, high


def difference_of(areas: Areas, first: int, second: int, *, level: float) -> Difference:
    """Compare two areas on the same studies.

    Parameters
    ----------
    areas
        From `compare_areas`.
    first, second
        Which sets of scores.
    level
        Nominal coverage of the interval.

    Notes
    -----
    Where a class has one patient, neither area varies (perfect or constant scores), or two that differ vary as one,
    nothing tells how far the difference would be another one on other patients. It is then not estimable: the interval
    is -1 to 1, the p-value 1.
    """
    difference = float(areas.areas_K[first] - areas.areas_K[second])
    if areas.smaller_class < FEWEST:
        return Difference(difference, -1.0, 1.0, p_value=1.0)
    covariance = areas.covariance_KK
    variance = covariance[first, first] + covariance[second, second] - 2 * covariance[first, second]
    spread = _deviation(variance)
    if spread <= NO_SPREAD:
        same = abs(difference) <= NO_SPREAD < _deviation(covariance[first, first])
        return Difference(difference, *((difference, difference) if same else (-1.0, 1.0)), p_value=1.0)
    half = float(norm.ppf((1 + level) / 2)) * spread
    return Difference(difference, difference - half, difference + half, float(2 * norm.sf(abs(difference) / spread)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values of several comparisons, so that the chance of any false claim stays at the level.

    References
    ----------
    Holm, Scandinavian Journal of Statistics 6 (1979).
    """
    order = np.argsort(p_values, kind="stable")
    steps = np.asarray(p_values)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return [float(value) for value in adjusted]


def wilson_interval(successes: int, total: int, *, level: float) -> tuple[float, float]:
    """Return Wilson's score interval of a share; of nothing it is 0 to 1.

    Parameters
    ----------
    successes, total
        Patients with, of all.
    level
        Nominal coverage, e.g. 0.95.

    References
    ----------
    Wilson, Journal of the American Statistical Association 22 (1927); Brown, Cai and DasGupta, Statistical Science 16
    (2001), on why not the normal approximation.
    """
    if total == 0:
        return 0.0, 1.0
    low, high = binomtest(successes, total).proportion_ci(confidence_level=level, method="wilson")
    return float(low), float(high)


def resampled_interval(values_B: np.ndarray, *, level: float, possible: tuple[float, float] = (0.0, 1.0)) -> Interval:
    """Return the percentile interval of a metric's values in resamples of patients.

    Parameters
    ----------
    values_B
        The metric in every resample.
    level
        Nominal coverage.
    possible
        Where the metric can lie: its interval where all resamples agree (no decision is wrong, say, or none positive).
        A bootstrap cannot imagine the patient that was not there, and without spread it knows nothing.
    """
    method = f"percentile bootstrap over patients, {len(values_B)} resamples"
    if np.ptp(values_B) <= NO_SPREAD:
        return Interval(low=possible[0], high=possible[1], level=level, method=f"{method} that are all alike: unknown")
    low, high = percentile_interval(values_B, level)
    return Interval(low=low, high=high, level=level, method=method)


def widened(
    interval: Interval, estimate: float, *, inflation: float, possible: tuple[float, float] = (0.0, 1.0)
) -> Interval:
    """Stretch an interval about its estimate as an inflated variance would, within what is possible."""
    if inflation == 1:
        return interval
    stretch = float(np.sqrt(inflation))
    low = max(possible[0], min(interval.low, estimate - stretch * (estimate - interval.low)))
    high = min(possible[1], max(interval.high, estimate + stretch * (interval.high - estimate)))
    return interval.model_copy(update={"low": low, "high": high, "method": f"{interval.method}{WIDENED}"})


def metric_intervals(
    labels_S: np.ndarray,
    scores_S: np.ndarray,
    decisions_S: np.ndarray,
    patients_S: np.ndarray,
    *,
    evaluation: EvaluationConfig,
    inflation: float = 1.0,
) -> dict[str, Interval]:
    """Return the interval of every metric that `lbp_ray.metrics.all_metrics` computes, over patients.

    Parameters
    ----------
    labels_S, scores_S, decisions_S
        What the metrics are computed from.
    patients_S
        Patient of every study (or slice).
    evaluation
        Level, resamples, seed, and which interval ROC-AUC and shares have.
    inflation
        Factor of the variance, for cross-validated scores (`cross_validation_inflation`).

    Notes
    -----
    Conditional on the trained models and their thresholds: what training again would change is not in them. ROC-AUC has
    DeLong's interval on the logit scale. Precision, NPV, recall, specificity and accuracy have Wilson's where every
    patient stands once, and balanced accuracy what follows from those of recall and specificity; several units of a
    patient are no independent trials, and patients are resampled instead. Average precision, MCC and separation always
    resample patients.

    References
    ----------
    Zou and Donner, Statistics in Medicine 27 (2008): intervals of a sum from those of its parts.
    """
    level = evaluation.interval_level
    weights_BS = patient_resamples(patients_S, labels_S, resamples=evaluation.bootstrap_resamples, seed=evaluation.seed)
    found = {
        name: resampled_interval(values_B, level=level, possible=RANGES.get(name, (0.0, 1.0)))
        for name, values_B in resampled_metrics(labels_S, scores_S, decisions_S, weights_BS).items()
    }
    if evaluation.share_interval == "wilson" and len(np.unique(patients_S)) == len(patients_S):
        found |= _wilson_intervals(labels_S, decisions_S, level=level)
    estimates = all_metrics(labels_S, scores_S, decisions_S)
    found = {
        name: widened(interval, estimates[name], inflation=inflation, possible=RANGES.get(name, (0.0, 1.0)))
        for name, interval in found.items()
    }
    if evaluation.area_interval == "delong":
        found["roc_auc"] = delong_interval(labels_S, scores_S, patients_S, level=level, inflation=inflation)
    return found


def _wilson_intervals(labels_S: np.ndarray, decisions_S: np.ndarray, *, level: float) -> dict[str, Interval]:
    tp, fp, fn, tn = (int(count[0]) for count in confusion(labels_S, decisions_S))
    shares = {
        "precision": (tp, tp + fp),
        "npv": (tn, tn + fn),
        "recall": (tp, tp + fn),
        "specificity": (tn, tn + fp),
        "accuracy": (tp + tn, len(labels_S)),
    }
    intervals = {}
    for name, (successes, total) in shares.items():
        low, high = wilson_interval(successes, total, level=level)
        method = "Wilson over patients" if total else "no patient to take a share of: unknown"
        intervals[name] = Interval(low=low, high=high, level=level, method=method)
    if tp + fn and tn + fp:
        recall, specificity = tp / (tp + fn), tn / (tn + fp)
        below = np.hypot(recall - intervals["recall"].low, specificity - intervals["specificity"].low) / 2
        above = np.hypot(intervals["recall"].high - recall, intervals["specificity"].high - specificity) / 2
        mean, method = (recall + specificity) / 2, "Wilson's of recall and specificity, combined"
        intervals["balanced_accuracy"] = Interval(
            low=float(mean - below), high=float(mean + above), level=level, method=method
        )
    return intervals
