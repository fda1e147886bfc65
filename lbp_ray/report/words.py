"""Names, number formats and chance levels: one wording for console, tables, figures and page."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lbp_ray.result import Interval, MetricSummary, SliceCountResult, StudyResult

METRIC_LABELS = {
    "average_precision": "average precision",
    "roc_auc": "ROC-AUC",
    "precision": "precision",
    "npv": "NPV",
    "recall": "recall",
    "specificity": "specificity",
    "balanced_accuracy": "balanced accuracy",
    "mcc": "MCC",
    "accuracy": "accuracy",
}
"""How a metric is written for a reader, in the order of the study's table."""

METRIC_MEANINGS = {
    "average_precision": "area under the precision-recall curve",
    "roc_auc": "probability that a symptomatic study outscores an asymptomatic one",
    "precision": "of those predicted symptomatic, the share that is",
    "npv": "of those predicted asymptomatic, the share that is",
    "recall": "share of the symptomatic that is found (sensitivity)",
    "specificity": "share of the asymptomatic that is recognised",
    "balanced_accuracy": "mean of recall and specificity",
    "mcc": "correlation of prediction and truth, from −1 to 1",
    "accuracy": "share of right predictions; flattered by uneven classes",
}
"""What a metric says, in a few words."""

THRESHOLD_FREE = ("average_precision", "roc_auc")
"""Metrics of the scores themselves; the others judge decisions at the cross-fitted thresholds."""

HASH_LENGTH = 12
"""Characters of the result hash shown on tables and figures."""


def short_hash(result: StudyResult) -> str:
    """Return the part of the result's hash that every table and figure carries."""
    return result.result_hash[:HASH_LENGTH]


def slices(count: int) -> str:
    """Write a slice count: ``1 slice``, ``3 slices``."""
    return f"{count} slice" if count == 1 else f"{count} slices"


def listed(items: Sequence[str]) -> str:
    """Join as prose: ``a``, ``a and b``, ``a, b and c``."""
    return " and ".join(filter(None, (", ".join(items[:-1]), items[-1]))) if items else ""


def number(value: float, decimals: int = 2) -> str:
    """Write a number with a true minus sign; what rounds to zero has none."""
    text = f"{value:.{decimals}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "−")


def percent(share: float) -> str:
    """Write a share as whole percent, with a narrow no-break space."""
    return f"{100 * share:.0f}\u202f%"


def p_value(value: float) -> str:
    """Write a p-value with its relation, unbroken: ``p = 0.005``, ``p < 0.001``."""
    return "p\u00a0<\u00a00.001" if value < 0.001 else f"p\u00a0=\u00a0{value:.3f}"


def bounds(interval: Interval, decimals: int = 2) -> str:
    """Write the two ends of an interval as prose: ``0.62 to 0.79``."""
    return f"{number(interval.low, decimals)} to {number(interval.high, decimals)}"


def interval_level(result: StudyResult) -> str:
    """Return the nominal coverage of the intervals, e.g. ``95 %``; several are listed."""
    levels = {metric.interval.level for part in result.slice_counts for metric in part.metrics}
    return listed([f"{100 * level:g}\u202f%" for level in sorted(levels)])


def by_slices(result: StudyResult) -> list[SliceCountResult]:
    """Return the slice counts, fewest slices first: the only order anything is ever listed in."""
    return sorted(result.slice_counts, key=lambda part: part.num_slices)


def metric(part: SliceCountResult, name: str) -> MetricSummary:
    """Find one metric of a slice count; accuracy, which is kept apart, included."""
    return next(summary for summary in (*part.metrics, part.accuracy) if summary.name == name)


def num_scored(part: SliceCountResult) -> int:
    """Return the number of studies with an out-of-fold score."""
    return len(part.scores_positive) + len(part.scores_negative)


def prevalence(part: SliceCountResult) -> float:
    """Return the share of symptomatic studies among the scored ones."""
    return len(part.scores_positive) / num_scored(part)


def chance_level(name: str, share_positive: float) -> float | None:
    """Return what a guess that ignores the images is expected to score.

    Parameters
    ----------
    name
        One of the eight metrics, or ``accuracy``.
    share_positive
        Prevalence, 0-1.

    Returns
    -------
    float or None
        None where it depends on how often the guess says "symptomatic" (recall, specificity, accuracy).
    """
    return {
        "average_precision": share_positive,
        "roc_auc": 0.5,
        "precision": share_positive,
        "npv": 1 - share_positive,
        "balanced_accuracy": 0.5,
        "mcc": 0.0,
    }.get(name)
