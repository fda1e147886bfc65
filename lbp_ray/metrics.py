"""The eight metrics, study rules, thresholds and resamples of patients.

Plain arrays in, plain numbers out. Suffixes: S studies, B bootstrap resamples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lbp_ray.study import Criterion, StudyRule


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


def study_scores(
    study_M: np.ndarray, probability_M: np.ndarray, *, rule: StudyRule, k: int = 2
) -> tuple[np.ndarray, np.ndarray]:
    """Aggregate slice probabilities to study scores.

    Parameters
    ----------
    study_M
        Study of each slice (numbers or names).
    probability_M
        Probability of each slice.
    rule
        ``any``: their maximum, so that the study is positive if any slice is (the Oulu rule, as a score); ``mean``;
        ``top_k``: mean of the `k` largest; ``noisy_or``: 1 - product of (1 - p), as if slices erred independently.
    k
        Read by ``top_k``; a study with fewer slices averages all of them.

    Returns
    -------
    studies, scores
        Distinct studies, ascending, and their scores.
    """
    studies, inverse, counts = np.unique(study_M, return_inverse=True, return_counts=True)
    if rule == "mean":
        return studies, np.bincount(inverse, probability_M) / counts
    if rule == "noisy_or":
        with np.errstate(divide="ignore"):
            return studies, -np.expm1(np.bincount(inverse, np.log1p(-probability_M)))
    order = np.lexsort((-probability_M, inverse))
    first = np.cumsum(counts) - counts
    if rule == "any":
        return studies, probability_M[order][first]
    assert rule == "top_k", rule
    among_largest = np.arange(len(order)) - np.repeat(first, counts) < k
    kept = order[among_largest]
    return studies, np.bincount(inverse[kept], probability_M[kept]) / np.minimum(counts, k)


def fit_threshold(
    labels_S: np.ndarray, scores_S: np.ndarray, *, criterion: Criterion = "youden", target: float | None = None
) -> float:
    """Return the score threshold (positive: score ≥ threshold) that a criterion takes on the ROC curve.

    Parameters
    ----------
    labels_S, scores_S
        0 or 1, both present, and scores.
    criterion
        ``youden``: largest recall + specificity - 1; ``closest`` to recall 1 and specificity 1; largest ``g_mean``,
        the root of recall times specificity; ``max_mcc``; or the highest threshold whose ``sensitivity`` or ``npv``
        reaches `target`. Ties go to the higher specificity.
    target
        Of the last two criteria.

    Raises
    ------
    MetricError
        If no threshold reaches the target.

    References
    ----------
    W. J. Youden, Index for rating diagnostic tests, Cancer 3 (1950).
    """
    check_scores(labels_S, scores_S)
    false_positive_rate, recall, thresholds = roc_curve(labels_S, scores_S, drop_intermediate=False)
    merit = _merit(recall, false_positive_rate, labels_S, criterion, target)
    best = int(np.argmax(np.round(merit, 12)))
    if not np.isfinite(thresholds[best]):
        return float(np.nextafter(np.max(scores_S), np.inf))
    return float(thresholds[best])


def _merit(
    recall: np.ndarray,
    false_positive_rate: np.ndarray,
    labels_S: np.ndarray,
    criterion: Criterion,
    target: float | None,
) -> np.ndarray:
    """Value of each point of a ROC curve, in falling order of thresholds: the first of the largest is taken."""
    specificity = 1 - false_positive_rate
    if criterion == "youden":
        return np.asarray(recall - false_positive_rate)
    if criterion == "closest":
        return np.asarray(-np.hypot(1 - recall, false_positive_rate))
    if criterion == "g_mean":
        return np.asarray(np.sqrt(recall * specificity))
    positives, negatives = np.sum(labels_S == 1), np.sum(labels_S == 0)
    counts = Counts(
        recall * positives, false_positive_rate * negatives, (1 - recall) * positives, specificity * negatives
    )
    if criterion == "max_mcc":
        return threshold_metrics(counts)["mcc"]
    reached = recall if criterion == "sensitivity" else threshold_metrics(counts)["npv"]
    assert target is not None
    enough = np.round(reached, 12) >= target
    if criterion == "npv":
        enough &= counts.fn + counts.tn > 0.5
    if not enough.any():
        msg = f"no threshold reaches {criterion} {target:g}, the best has {reached.max():.3f}; lower the target"
        raise MetricError(msg)
    return enough.astype(float)


def thresholds_by_fold(
    labels_S: np.ndarray,
    scores_S: np.ndarray,
    folds_S: np.ndarray,
    *,
    source: Literal["cross_fitted", "same_fold"] = "cross_fitted",
    criterion: Criterion = "youden",
    target: float | None = None,
) -> dict[int, float]:
    """Return the threshold that each fold is judged by.

    Parameters
    ----------
    labels_S, scores_S
        Labels and out-of-fold scores of one seed, or averaged over seeds.
    folds_S
        Fold that each was held out in.
    source
        ``cross_fitted``: from all *other* folds' scores; ``same_fold``: from its *own*, which makes its decisions
        optimistic.
    criterion, target
        As `fit_threshold` takes them.

    Raises
    ------
    MetricError
        If no threshold of a fold reaches the target; the fold is named.
    """
    fitted = {int(fold): (folds_S == fold) == (source == "same_fold") for fold in np.unique(folds_S)}
    found = {}
    for fold, chosen_S in fitted.items():
        try:
            found[fold] = fit_threshold(labels_S[chosen_S], scores_S[chosen_S], criterion=criterion, target=target)
        except MetricError as error:
            whose = "its own scores" if source == "same_fold" else "the other folds' scores"
            msg = f"fold {fold}, by {whose}: {error}"
            raise MetricError(msg) from error
    return found


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
    """Compute the eight metrics, accuracy and separation of one complete set of studies (or slices)."""
    fixed = {name: float(value[0]) for name, value in threshold_metrics(confusion(labels_S, decisions_S)).items()}
    return {
        "average_precision": average_precision(labels_S, scores_S),
        "roc_auc": roc_auc(labels_S, scores_S),
        **fixed,
        "separation": separation(labels_S, scores_S),
    }


def separation(labels_S: np.ndarray, scores_S: np.ndarray) -> float:
    """Return the mean score of the positives minus that of the negatives (Oulu thesis, section 3.5)."""
    return float(scores_S[labels_S == 1].mean() - scores_S[labels_S == 0].mean())


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


BLOCK_VALUES = 2**24
"""Weights that resampled metrics hold several copies of at a time, 128 MiB each."""


def resampled_metrics(
    labels_S: np.ndarray, scores_S: np.ndarray, decisions_S: np.ndarray, weights_BS: np.ndarray
) -> Mapping[str, np.ndarray]:
    """Compute every metric of `all_metrics` in every resample, (B,) each; memory is that of some resamples."""
    rows = max(1, BLOCK_VALUES // len(scores_S))
    starts = range(0, len(weights_BS), rows)
    blocks = [_resampled_block(labels_S, scores_S, decisions_S, weights_BS[start : start + rows]) for start in starts]
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def _resampled_block(
    labels_S: np.ndarray, scores_S: np.ndarray, decisions_S: np.ndarray, weights_BS: np.ndarray
) -> dict[str, np.ndarray]:
    return {
        "average_precision": _weighted_average_precision(labels_S, scores_S, weights_BS),
        "roc_auc": _weighted_roc_auc(labels_S, scores_S, weights_BS),
        **threshold_metrics(confusion(labels_S, decisions_S, weights_BS)),
        "separation": _weighted_mean(scores_S, weights_BS * (labels_S == 1))
        - _weighted_mean(scores_S, weights_BS * (labels_S == 0)),
    }


def _weighted_mean(values_S: np.ndarray, weights_BS: np.ndarray) -> np.ndarray:
    mean: np.ndarray = weights_BS @ values_S / weights_BS.sum(1)
    return mean


def _weighted_roc_auc(labels_S: np.ndarray, scores_S: np.ndarray, weights_BS: np.ndarray) -> np.ndarray:
    """Share of pairs that the positive wins, ties by half: a running count of the negatives below, in score order."""
    order = np.argsort(scores_S, kind="stable")
    starts = np.flatnonzero(np.append(True, np.diff(scores_S[order]) != 0))
    weights, positive = weights_BS[:, order], labels_S[order] == 1
    positives = np.add.reduceat(weights * positive, starts, axis=1)
    negatives = np.add.reduceat(weights * ~positive, starts, axis=1)
    below = np.cumsum(negatives, axis=1) - 0.5 * negatives
    area: np.ndarray = (positives * below).sum(1) / (positives.sum(1) * negatives.sum(1))
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
