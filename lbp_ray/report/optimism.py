"""What stands wherever a fold is judged by what was chosen on it: the mark, and the sentences that say why."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lbp_ray.choices import value_in
from lbp_ray.cohort import LABELS
from lbp_ray.report.words import by_slices, listed, number, slices

if TYPE_CHECKING:
    from lbp_ray.result import ExcludedScores, ProtocolNull, SliceCountResult, StudyResult

MARK = "optimistic: chosen on the evaluated fold, no interval or verdict"
"""Stands on every figure and table of such a result."""

NOISE_BALANCED_ACCURACY = {
    ("fixed_epochs", "same_fold"): 0.60,
    ("same_fold", "cross_fitted"): 0.52,
    ("same_fold", "same_fold"): 0.62,
}
"""What selection and threshold make of labels that know nothing, in balanced accuracy (docs/statistics.md); told where
a study did not measure its own."""

SHUFFLED_AS = {
    "evaluation.threshold_criterion": "youden",
    "evaluation.threshold_level": "study",
    "evaluation.level": "study",
    "recipe.checkpoint": "best_mcc",
    "recipe.checkpoint_top_k": 1,
}
"""How `lbp_ray.permutation` judges shuffled labels, whatever the study was told."""

HONEST_NULL = 0.5
"""Balanced accuracy of decisions that know nothing."""


def mark(result: StudyResult) -> str:
    """Return `MARK`, or nothing for an honest result."""
    return MARK if result.optimistic else ""


def notice(result: StudyResult) -> list[str]:
    """Say what was chosen on the evaluated fold, what is therefore not made, and why; nothing for an honest result.

    Parameters
    ----------
    result
        A result that `check_reportable` accepted.
    """
    if not result.optimistic:
        return []
    chosen = [
        name
        for name, how in (("epoch", result.selection), ("threshold", result.threshold_source))
        if how == "same_fold"
    ]
    return [
        "Optimistic: these figures are no evidence.",
        f"The {listed(chosen)} of every fold {'was' if len(chosen) == 1 else 'were'} chosen on that very fold, which"
        " then judged the networks.",
        "No interval, no verdict and no comparison of slice counts is made from such figures.",
        _why(result),
    ]


def own_groups_notice(excluded: ExcludedScores) -> list[str]:
    """Say why the task's own groups, beside those that an optimistic study left out, have no interval; else nothing."""
    own = [group for part in excluded.slice_counts for group in part.groups if group.group in LABELS]
    if all(group.interval is not None for group in own):
        return []
    return [
        "Optimistic: the shares of the symptomatic and the asymptomatic are recall and 1 − specificity, judged by what"
        " was chosen on the very same fold, and have no interval; nothing was chosen on the other groups."
    ]


def protocol_null(result: StudyResult, part: SliceCountResult) -> ProtocolNull | None:
    """Find what the result's own way of judging gives on shuffled labels; None where that was not measured."""
    held = () if part.permutation is None else part.permutation.balanced_accuracy
    wanted = (result.selection, result.threshold_source)
    return next((null for null in held if (null.selection, null.threshold_source) == wanted), None)


def unlike_shuffles(result: StudyResult) -> list[str]:
    """List the settings by which the study was judged otherwise than its shuffled labels are, as ``key: value``."""
    told = {key: _setting(result, key) for key in SHUFFLED_AS}
    unlike = {key: value for key, value in told.items() if value not in (SHUFFLED_AS[key], None)}
    if result.selection == "inner_validation":
        unlike["recipe.selection"] = result.selection
    if _setting(result, "recipe.frozen_epochs") == 0:
        unlike["recipe.frozen_epochs"] = 0
    return [f"{key}: {value}" for key, value in unlike.items()]


def _setting(result: StudyResult, key: str) -> object:
    """Look a key of the configuration up; None where a result of an older version does not hold it."""
    try:
        return value_in(result.config, key)
    except (KeyError, TypeError):
        return None


def _why(result: StudyResult) -> str:
    unlike = unlike_shuffles(result)
    if unlike:
        return (
            "What labels that know nothing reach when judged this way was not measured for this recipe"
            f" ({listed(unlike)}): shuffled labels are scored by the frozen stage, at the epoch of the largest MCC up"
            " to the lowest loss where the fold chooses one, and judged at Youden's threshold of study scores."
        )
    measured = [(part, protocol_null(result, part)) for part in by_slices(result)]
    told = [(number(null.mean), slices(part.num_slices)) for part, null in measured if null is not None]
    if not told:
        noise = NOISE_BALANCED_ACCURACY[result.selection, result.threshold_source]
        return (
            "Judged this way, labels that know nothing reach a balanced accuracy of about"
            f" {number(noise)}, where an honest judgement gives {number(HONEST_NULL)}."
        )
    same = len({value for value, _ in told}) == 1
    reached = told[0][0] if same else listed([f"{value} with {count}" for value, count in told])
    return (
        "Judged this way, labels shuffled among patients, which know nothing, reach a balanced accuracy of"
        f" {reached} on average in the frozen stage, where an honest judgement gives {number(HONEST_NULL)}."
    )
