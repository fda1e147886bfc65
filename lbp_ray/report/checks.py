"""What a result must hold before a word of it is reported."""

from __future__ import annotations

import math
from itertools import combinations
from typing import TYPE_CHECKING, Any

from lbp_ray.cohort import LABELS
from lbp_ray.result import METRIC_NAMES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lbp_ray.result import ExcludedScores, SliceCountResult, StudyResult, Unsealed


def check_reportable(result: StudyResult) -> None:
    """Refuse a result of which a table or figure would be wrong or empty.

    Parameters
    ----------
    result
        The study's result, as aggregated or as loaded.

    Raises
    ------
    ValueError
        If there is no slice count, a slice count appears twice, a number is NaN or infinite, one of the eight metrics
        is missing or doubled, a pair of slice counts is not compared, a class is empty, the points of a curve do not
        pair up, an optimistic result carries an interval or a comparison, or an honest one lacks one. All faults are
        listed.
    """
    faults = [] if result.slice_counts else ["slice_counts: at least one slice count is required, found none"]
    counts = [part.num_slices for part in result.slice_counts]
    faults += [f"slice_counts: {count} slices appear {counts.count(count)} times" for count in _repeated(counts)]
    faults += _comparison_faults(result)
    wrong = _not_finite(result.model_dump())
    faults += [f"{where}: a finite number is required, found {value}" for where, value in wrong]
    for part in result.slice_counts:
        found = [*_slice_count_faults(part), *_interval_faults(result, part)]
        faults += [f"num_slices={part.num_slices}: {fault}" for fault in found]
    faults += _rule_faults(result)
    if faults:
        listing = "\n".join(f"  - {fault}" for fault in faults)
        remedy = "run the aggregation again from the complete out-of-fold table"
        msg = f"result {result.name!r} cannot be reported, {len(faults)} fault(s); {remedy}\n{listing}"
        raise ValueError(msg)


def check_opened(result: StudyResult, unsealed: Sequence[Unsealed], excluded: ExcludedScores | None) -> None:
    """Refuse what was opened or scored for another result.

    Parameters
    ----------
    result
        The study's result.
    unsealed, excluded
        What is to be reported with it.

    Raises
    ------
    ValueError
        If an opening or the excluded groups' scores belong to another result, an opening stands twice, or a group that
        an optimistic result was judged by has an interval.
    """
    told = [(f"opening {opened.opening.line} of the hold-out", opened.opening.result_hash) for opened in unsealed]
    told += [] if excluded is None else [("the file of excluded groups", excluded.result_hash)]
    for what, found in told:
        if found != result.result_hash:
            msg = (
                f"{what} was made for result {found}, this is {result.result_hash}; report it with the result that it"
                " was made for"
            )
            raise ValueError(msg)
    barred = [] if excluded is None or not result.optimistic else _barred_groups(excluded)
    if barred:
        msg = (
            f"the share of {barred[0]!r} has an interval, but this result is optimistic and was judged by that group;"
            " score the excluded groups again"
        )
        raise ValueError(msg)
    lines = [opened.opening.line for opened in unsealed]
    if _repeated(lines):
        msg = f"opening {_repeated(lines)[0]} of the hold-out is given {lines.count(_repeated(lines)[0])} times"
        raise ValueError(f"{msg}; give each opening once")


def _barred_groups(excluded: ExcludedScores) -> list[str]:
    held = [group for part in excluded.slice_counts for group in part.groups]
    return [group.group for group in held if group.group in LABELS and group.interval is not None]


def _comparison_faults(result: StudyResult) -> list[str]:
    pairs = [(pair.first, pair.second) for pair in result.comparisons]
    if result.optimistic:
        return [f"comparisons: an optimistic result has none, found {pairs}"] if pairs else []
    wanted = list(combinations(sorted({part.num_slices for part in result.slice_counts}), 2))
    if sorted(pairs) == wanted:
        return []
    return [f"comparisons: every pair of slice counts is required once, {wanted}, found {pairs}"]


def _interval_faults(result: StudyResult, part: SliceCountResult) -> list[str]:
    headline = [*part.metrics, part.accuracy, part.separation]
    if result.optimistic:
        found = [summary.name for summary in (*headline, *part.other_level) if summary.interval is not None]
        return [f"metric {name!r} has an interval, which an optimistic result must not have" for name in found]
    lacking = [summary.name for summary in headline if summary.interval is None]
    faults = [f"metric {name!r} has no interval, which an honest result must have" for name in lacking]
    chosen = [choice.fold for choice in part.choices if any(summary.interval for summary in choice.metrics)]
    return faults + [f"fold {fold} taken alone has an interval, which one fold must not have" for fold in chosen]


def _rule_faults(result: StudyResult) -> list[str]:
    if not result.optimistic:
        return []
    held = [(rule, [rule.interval, *[at.interval for at in rule.recall_at]]) for rule in result.rules]
    return [
        f"num_slices={rule.num_slices}: rule {rule.rule!r} has an interval, which an optimistic result must not have"
        for rule, intervals in held
        if any(interval is not None for interval in intervals)
    ]


def _slice_count_faults(part: SliceCountResult) -> list[str]:
    names = [metric.name for metric in part.metrics]
    faults = [f"metric {name!r} is missing" for name in METRIC_NAMES if name not in names]
    faults += [f"metric {name!r} is not one of the eight" for name in names if name not in METRIC_NAMES]
    faults += [f"metric {name!r} appears {names.count(name)} times" for name in _repeated(names)]
    table = part.confusion
    for label, scores, decided in (
        ("positive", part.scores_positive, table.tp + table.fn),
        ("negative", part.scores_negative, table.tn + table.fp),
    ):
        if not scores:
            faults.append(f"scores_{label} is empty: both classes are required")
        elif len(scores) != decided:
            faults.append(f"scores_{label} holds {len(scores)} scores, the confusion matrix {decided}")
    for name, curve in (("roc", part.roc), ("precision_recall", part.precision_recall)):
        if len(curve.x) != len(curve.y) or len(curve.x) < 2:
            faults.append(f"{name} needs two or more points with x and y, found {len(curve.x)} x and {len(curve.y)} y")
    lengths = {name: len(values) for name, values in part.learning.model_dump().items()}
    if len(set(lengths.values())) != 1:
        faults.append(f"learning needs one value per epoch in every column, found {lengths}")
    if part.permutation is not None and len(part.permutation.null) != part.permutation.num_permutations:
        found, told = len(part.permutation.null), part.permutation.num_permutations
        faults.append(f"permutation.null holds {found} values, num_permutations says {told}")
    return faults


def _repeated(values: list[Any]) -> list[Any]:
    return sorted({value for value in values if values.count(value) > 1})


def _not_finite(value: Any, where: str = "") -> Iterator[tuple[str, float]]:  # noqa: ANN401  (any dumped value)
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _not_finite(item, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _not_finite(item, f"{where}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield where, value
