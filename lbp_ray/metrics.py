"""The eight metrics, study rules, thresholds and patient-level intervals.

Plain arrays in, plain numbers out. Suffixes: S studies, B bootstrap resamples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

if TYPE_CHECKING:
    from collections.abc import Mapping

StudyRule = Literal["max", "mean"]


class MetricError(ValueError):
    """Scores or labels that no metric can be computed from."""


class Counts(NamedTuple):
    """Confusion counts; arrays of them for resampled cohorts."""

    tp: np.ndarray
    fp: np.ndarray
    fn: np.ndarray
    tn: np.ndarray


def roc_auc(labels_S: np.ndarray, scores_S: np.ndarray) -> float:
    """Return the area under the ROC curve (ties count one half)."""
    check_scores(labels_S, scores_S)
    return float(roc_auc_score(labels_S, scores_S))


def average_precision(labels_S: np.ndarray, scores_S: np.ndarray) -> float:
    """Return the average precision: precision at each threshold weighted by the step in recall."""
    check_scores(labels_S, scores_S)
    return float(average_precision_score(labels_S, scores_S))


def check_scores(labels_S: np.ndarray, scores_S: np.ndarray) -> None:
    """Refuse scores or labels that no metric can be computed from.

    Raises
    ------
    MetricError
        If a score is not finite, a label is neither 0 nor 1, or a class is missing.
    """
    if not np.isfinite(scores_S).all() or not np.isin(labels_S, (0, 1)).all():
        msg = "scores must be finite and labels 0 or 1; a missing value would spoil the result, so none is computed"
        raise MetricError(msg)
    if len(np.unique(labels_S)) != 2:
        msg = f"both classes are required, found labels {np.unique(labels_S).tolist()}"
        raise MetricError(msg)


def study_scores(study_M: np.ndarray, scores_M: np.ndarray, *, rule: StudyRule) -> tuple[np.ndarray, np.ndarray]:
    """Aggregate slice scores to study scores.

    Parameters
    ----------
    study_M
        Study of each slice (numbers or names).
    scores_M
        Score of each slice.
    rule
        ``max``: the study is positive if any slice is (the Oulu rule, as a score); ``mean``: slices vote.

    Returns
    -------
    studies, scores
        Distinct studies, ascending, and their scores.
    """
    studies, inverse = np.unique(study_M, return_inverse=True)
    if rule == "mean":
        return studies, np.bincount(inverse, scores_M) / np.bincount(inverse)
    scores = np.full(len(studies), -np.inf)
    np.maximum.at(scores, inverse, scores_M)
    return studies, scores


def youden_threshold(labels_S: np.ndarray, scores_S: np.ndarray) -> float:
    """Return the score threshold (positive: score ≥ threshold) with the largest recall + specificity − 1.

    Ties go to the higher specificity.

    References
    ----------
    W. J. Youden, Index for rating diagnostic tests, Cancer 3 (1950).
    """
    check_scores(labels_S, scores_S)
    false_positive_rate, recall, thresholds = roc_curve(labels_S, scores_S, drop_intermediate=False)
    best = int(np.argmax(np.round(recall - false_positive_rate, 12)))
    if not np.isfinite(thresholds[best]):
        return float(np.max(scores_S)) + 1.0
    return float(thresholds[best])


def cross_fitted_thresholds(labels_S: np.ndarray, scores_S: np.ndarray, folds_S: np.ndarray) -> dict[int, float]:
    """Return for each fold the Youden threshold of all *other* folds' out-of-fold scores.

    Parameters
    ----------
    labels_S, scores_S
        Study labels and out-of-fold study scores of one seed.
    folds_S
        Fold that each study was held out in.
    """
    return {
        int(fold): youden_threshold(labels_S[folds_S != fold], scores_S[folds_S != fold]) for fold in np.unique(folds_S)
    }


def confusion(labels_S: np.ndarray, decisions_S: np.ndarray, weights_BS: np.ndarray | None = None) -> Counts:
    """Count decisions, optionally for many resamples at once.

    Parameters
    ----------
    labels_S, decisions_S
        0 or 1.
    weights_BS
        How often each study stands in each resample; None counts every study once (B = 1).
    """
    weights = np.ones((1, len(labels_S))) if weights_BS is None else weights_BS
    positive, called = labels_S == 1, decisions_S == 1
    return Counts(
        tp=weights @ (positive & called),
        fp=weights @ (~positive & called),
        fn=weights @ (positive & ~called),
        tn=weights @ (~positive & ~called),
    )


def threshold_metrics(counts: Counts) -> dict[str, np.ndarray]:
    """Compute precision, NPV, recall, specificity, balanced accuracy, MCC and accuracy from counts.

    A ratio without a denominator (e.g. precision when nothing is called positive) is 0, as is MCC.

    References
    ----------
    Oulu thesis, Table 2.
    """
    tp, fp, fn, tn = (np.asarray(value, dtype=np.float64) for value in counts)
    recall, specificity = _ratio(tp, tp + fn), _ratio(tn, tn + fp)
    return {
        "precision": _ratio(tp, tp + fp),
        "npv": _ratio(tn, tn + fn),
        "recall": recall,
        "specificity": specificity,
        "balanced_accuracy": (recall + specificity) / 2,
        "mcc": _ratio(tp * tn - fp * fn, np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))),
        "accuracy": _ratio(tp + tn, tp + fp + fn + tn),
    }


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    quotient: np.ndarray = np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)
    return quotient


def all_metrics(labels_S: np.ndarray, scores_S: np.ndarray, decisions_S: np.ndarray) -> dict[str, float]:
    """Compute the eight metrics and accuracy of one complete set of studies."""
    fixed = {name: float(value[0]) for name, value in threshold_metrics(confusion(labels_S, decisions_S)).items()}
    return {
        "average_precision": average_precision(labels_S, scores_S),
        "roc_auc": roc_auc(labels_S, scores_S),
        **fixed,
    }


def patient_resamples(patient_S: np.ndarray, labels_S: np.ndarray, *, resamples: int, seed: int) -> np.ndarray:
    """Resample whole patients with replacement.

    Parameters
    ----------
    patient_S
        Patient of each study.
    labels_S
        Study labels; a resample without both classes is drawn again.
    resamples
        Number of resamples.
    seed
        Seed of the draw.

    Returns
    -------
    numpy.ndarray
        (B, S) float64: how often each study stands in each resample.
    """
    patients, inverse = np.unique(patient_S, return_inverse=True)
    generator = np.random.default_rng(seed)
    share = np.full(len(patients), 1 / len(patients))
    counts = generator.multinomial(len(patients), share, size=resamples)
    weights_BS: np.ndarray = counts[:, inverse].astype(np.float64)
    for row in np.flatnonzero([len(set(labels_S[weights > 0])) < 2 for weights in weights_BS]):
        while len(set(labels_S[weights_BS[row] > 0])) < 2:
            weights_BS[row] = generator.multinomial(len(patients), share)[inverse]
    return weights_BS


def resampled_metrics(
    labels_S: np.ndarray, scores_S: np.ndarray, decisions_S: np.ndarray, weights_BS: np.ndarray
) -> Mapping[str, np.ndarray]:
    """Compute every metric of `all_metrics` in every resample, (B,) each."""
    return {
        "average_precision": _weighted_average_precision(labels_S, scores_S, weights_BS),
        "roc_auc": _weighted_roc_auc(labels_S, scores_S, weights_BS),
        **threshold_metrics(confusion(labels_S, decisions_S, weights_BS)),
    }


def _weighted_roc_auc(labels_S: np.ndarray, scores_S: np.ndarray, weights_BS: np.ndarray) -> np.ndarray:
    positive = labels_S == 1
    difference = scores_S[positive][:, None] - scores_S[~positive][None, :]
    wins = (difference > 0) + 0.5 * (difference == 0)
    weights_positive, weights_negative = weights_BS[:, positive], weights_BS[:, ~positive]
    pairs = weights_positive.sum(1) * weights_negative.sum(1)
    area: np.ndarray = ((weights_positive @ wins) * weights_negative).sum(1) / pairs
    return area


def _weighted_average_precision(labels_S: np.ndarray, scores_S: np.ndarray, weights_BS: np.ndarray) -> np.ndarray:
    order = np.argsort(-scores_S, kind="stable")
    last_of_tie = np.append(np.diff(scores_S[order]) != 0, True)
    weights = weights_BS[:, order]
    true_positives = np.cumsum(weights * (labels_S[order] == 1), axis=1)[:, last_of_tie]
    called = np.cumsum(weights, axis=1)[:, last_of_tie]
    recall_steps = np.diff(true_positives, axis=1, prepend=0) / true_positives[:, -1:]
    area: np.ndarray = (recall_steps * _ratio(true_positives, called)).sum(1)
    return area


def percentile_interval(values_B: np.ndarray, level: float) -> tuple[float, float]:
    """Return the central percentile interval of resampled values."""
    low, high = np.quantile(values_B, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
