"""Names, number formats and chance levels: one wording for console, tables, figures and page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lbp_ray.study import EvaluationConfig

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
    "separation": "separation",
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
    "separation": "mean probability of the symptomatic minus that of the asymptomatic",
}
"""What a metric says, in a few words."""

THRESHOLD_FREE = ("average_precision", "roc_auc", "separation")
"""Metrics of the scores themselves; the others judge decisions at thresholds."""

APART = ("accuracy", "separation")
"""Shown, but none of the eight."""

RULE_LABELS = {"any": "any slice (largest)", "mean": "mean", "top_k": "mean of the largest", "noisy_or": "noisy OR"}
"""How a study rule is written for a reader."""

SELECTIONS = {
    "fixed_epochs": "fixed beforehand",
    "inner_validation": "chosen on held-out training patients",
    "same_fold": "chosen on the evaluated fold",
}
"""How a selection of epochs is written for a reader."""

THRESHOLD_SOURCES = {"cross_fitted": "fitted on the other folds", "same_fold": "fitted on the evaluated fold"}
"""How the source of thresholds is written for a reader."""

NO_SPREAD = "–"
"""Stands where there is no figure."""

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
    """Write a share as whole percent, with a narrow no-break space; less than half of one is ``< 1 %``."""
    if 0 < share < 0.005:
        return "<\u202f1\u202f%"
    return f"{100 * share:.0f}\u202f%"


def p_value(value: float) -> str:
    """Write a p-value with its relation, unbroken: ``p = 0.005``, ``p < 0.001``."""
    return "p\u00a0<\u00a00.001" if value < 0.001 else f"p\u00a0=\u00a0{value:.3f}"


def bounds(interval: Interval | None, decimals: int = 2) -> str:
    """Write the two ends of an interval as prose: ``0.62 to 0.79``; ``no interval`` where there is none."""
    if interval is None:
        return "no interval"
    return f"{number(interval.low, decimals)} to {number(interval.high, decimals)}"


def estimate_with_bounds(summary: MetricSummary, decimals: int = 3) -> str:
    """Write an estimate and, where there is one, its interval: ``0.74 [0.62, 0.79]``."""
    told, interval = number(summary.estimate, decimals), summary.interval
    if interval is None:
        return told
    return f"{told} [{number(interval.low, decimals)}, {number(interval.high, decimals)}]"


def mean_with_spread(result: StudyResult, summary: MetricSummary, decimals: int = 3) -> str:
    """Write the mean over models and, where there are several, what stands after ±: ``0.740 ± 0.008``."""
    spread = spread_of(result, summary)
    told = number(summary.mean, decimals)
    return told if spread is None else f"{told} ± {number(spread, decimals)}"


def interval_level(result: StudyResult) -> str:
    """Return the nominal coverage of the intervals, e.g. ``95 %``; several are listed."""
    held = [metric.interval for part in result.slice_counts for metric in part.metrics]
    levels = {interval.level for interval in held if interval is not None}
    return listed([f"{100 * level:g}\u202f%" for level in sorted(levels)])


def by_slices(result: StudyResult) -> list[SliceCountResult]:
    """Return the slice counts, fewest slices first: the only order anything is ever listed in."""
    return sorted(result.slice_counts, key=lambda part: part.num_slices)


def metric(part: SliceCountResult, name: str) -> MetricSummary:
    """Find one metric of a slice count, those of `APART` included."""
    return named((*part.metrics, part.accuracy, part.separation), name)


def named(summaries: Sequence[MetricSummary], name: str) -> MetricSummary:
    """Find a metric among summaries."""
    return next(summary for summary in summaries if summary.name == name)


def spread_of(result: StudyResult, summary: MetricSummary) -> float | None:
    """Return what stands after ± in tables: SD or SE over seeds, as the study was told."""
    return summary.se if spread_name(result) == "SE" else summary.sd


def spread_name(result: StudyResult) -> str:
    """Return ``SD`` or ``SE``."""
    return str(result.config.get("evaluation", {}).get("spread", EvaluationConfig().spread)).upper()


def units(result: StudyResult) -> str:
    """Return what the headline figures score: ``studies`` or ``slices``."""
    return "slices" if result.level == "slice" else "studies"


def num_scored(part: SliceCountResult) -> int:
    """Return the number of studies (slices, at that level) with an out-of-fold score and decision."""
    return sum(part.confusion.model_dump().values())


def num_positive(part: SliceCountResult) -> int:
    """Return how many of them are symptomatic."""
    return part.confusion.tp + part.confusion.fn


def prevalence(part: SliceCountResult) -> float:
    """Return the share of the symptomatic among them."""
    return num_positive(part) / num_scored(part)


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
