"""What stands wherever a fold is judged by what was chosen on it: the mark, and the sentences that say why."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lbp_ray.report.words import by_slices, listed, number, slices

if TYPE_CHECKING:
    from lbp_ray.result import ProtocolNull, SliceCountResult, StudyResult

MARK = "optimistic: chosen on the evaluated fold, no interval or verdict"
"""Stands on every figure and table of such a result."""

NOISE_BALANCED_ACCURACY = {("same_fold", "same_fold"): 0.62}
"""What selection and threshold make of labels that know nothing, in balanced accuracy (docs/statistics.md); told where
a study did not measure its own."""

NOISE_BY_THRESHOLD = 0.60
"""The same of a threshold of the same fold alone."""

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


def protocol_null(result: StudyResult, part: SliceCountResult) -> ProtocolNull | None:
    """Find what the result's own way of judging gives on shuffled labels; None where that was not measured."""
    held = () if part.permutation is None else part.permutation.balanced_accuracy
    wanted = (result.selection, result.threshold_source)
    return next((null for null in held if (null.selection, null.threshold_source) == wanted), None)


def _why(result: StudyResult) -> str:
    measured = [(part, protocol_null(result, part)) for part in by_slices(result)]
    told = [(number(null.mean), slices(part.num_slices)) for part, null in measured if null is not None]
    if not told:
        noise = NOISE_BALANCED_ACCURACY.get((result.selection, result.threshold_source), NOISE_BY_THRESHOLD)
        return (
            "Judged this way, labels that know nothing reach a balanced accuracy of about"
            f" {number(noise)}, where an honest judgement gives {number(HONEST_NULL)}."
        )
    same = len({value for value, _ in told}) == 1
    reached = told[0][0] if same else listed([f"{value} with {count}" for value, count in told])
    return (
        "Judged this way, labels shuffled among patients, which know nothing, reach a balanced accuracy of"
        f" {reached} on average, where an honest judgement gives {number(HONEST_NULL)}."
    )
