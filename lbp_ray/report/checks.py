"""What a result must hold before a word of it is reported."""

from __future__ import annotations

import math
from itertools import combinations
from typing import TYPE_CHECKING, Any

from lbp_ray.result import METRIC_NAMES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lbp_ray.result import SliceCountResult, StudyResult


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
        is missing or doubled, a pair of slice counts is not compared, a class is empty, or the points of a curve do not
        pair up. All faults are listed.
    """
    faults = [] if result.slice_counts else ["slice_counts: at least one slice count is required, found none"]
    counts = [part.num_slices for part in result.slice_counts]
    faults += [f"slice_counts: {count} slices appear {counts.count(count)} times" for count in _repeated(counts)]
    pairs = [(pair.first, pair.second) for pair in result.comparisons]
    wanted = list(combinations(sorted(set(counts)), 2))
    if sorted(pairs) != wanted:
        faults.append(f"comparisons: every pair of slice counts is required once, {wanted}, found {pairs}")
    wrong = _not_finite(result.model_dump())
    faults += [f"{where}: a finite number is required, found {value}" for where, value in wrong]
    for part in result.slice_counts:
        faults += [f"num_slices={part.num_slices}: {fault}" for fault in _slice_count_faults(part)]
    if faults:
        listing = "\n".join(f"  - {fault}" for fault in faults)
        remedy = "run the aggregation again from the complete out-of-fold table"
        msg = f"result {result.name!r} cannot be reported, {len(faults)} fault(s); {remedy}\n{listing}"
        raise ValueError(msg)


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
            faults.append(f"scores_{label} holds {len(scores)} studies, the confusion matrix {decided}")
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
