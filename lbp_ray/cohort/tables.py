"""Tables 3 and 4 of the Oulu thesis, and the readers' agreement, as CSV for software and Markdown for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from preprocess.cvat.shapes import LEVELS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lbp_ray.result import Agreement, CohortSummary

AGREEMENT_COLUMNS = (
    "scale", "level", "weights", "num_pairs", "kappa", "low", "high", "interval_level", "interval_method",
    "num_adjudicated",
)  # fmt: skip


def group_table(summary: CohortSummary) -> pd.DataFrame:
    """Return Table 3: ``group``, ``count``, ``share`` of all asked and ``share_complete`` of complete answers."""
    return pd.DataFrame([row.model_dump() for row in summary.groups])


def grade_table(summary: CohortSummary) -> pd.DataFrame:
    """Return Table 4: ``scale``, ``grade``, a count per disc level, and a share per level (``share_L1L2`` …)."""
    rows = [
        {
            "scale": row.scale,
            "grade": row.grade,
            **dict(zip(LEVELS, row.counts, strict=True)),
            **dict(zip((f"share_{level}" for level in LEVELS), row.shares, strict=True)),
        }
        for row in summary.grades
    ]
    return pd.DataFrame(rows, columns=["scale", "grade", *LEVELS, *(f"share_{level}" for level in LEVELS)])


def agreement_table(agreement: Sequence[Agreement]) -> pd.DataFrame:
    """Return one row per scale and level with the columns of `AGREEMENT_COLUMNS`."""
    rows = []
    for row in agreement:
        interval = {} if row.interval is None else row.interval.model_dump()
        renamed = {"interval_level": interval.pop("level", None), "interval_method": interval.pop("method", None)}
        rows.append({**row.model_dump(exclude={"interval"}), **interval, **renamed})
    return pd.DataFrame(rows, columns=list(AGREEMENT_COLUMNS))


def group_markdown(summary: CohortSummary) -> str:
    """Write Table 3 for people: whole percent of all asked, as the thesis prints them, and of complete answers."""
    rows = [
        (row.group.replace("_", " "), row.count, percent(row.share), percent(row.share_complete))
        for row in summary.groups
    ]
    total = ("all", summary.num_subjects, "100 %", f"{summary.num_complete} complete")
    return _markdown(("group", "N", "of all asked", "of complete answers"), [*rows, total])


def grade_markdown(summary: CohortSummary) -> str:
    """Write Table 4 for people: counts, and whole percent of the exams graded at that level where they reach one."""
    table = []
    for scale in dict.fromkeys(row.scale for row in summary.grades):
        rows = [row for row in summary.grades if row.scale == scale]
        for row in rows:
            cells = (f"{count}{_printed(share)}" for count, share in zip(row.counts, row.shares, strict=True))
            table.append((f"{scale} {row.grade}", *cells))
        table.append((f"{scale}, all", *(sum(counts) for counts in zip(*(row.counts for row in rows), strict=True))))
    return _markdown(("grade", *(f"{level[:2]}-{level[2:]}" for level in LEVELS)), table)


def _printed(share: float) -> str:
    return f" ({percent(share)})" if share >= 0.005 else ""


def percent(share: float | None) -> str:
    """Write a share as whole percent; nothing for None."""
    return "" if share is None else f"{100 * share:.0f} %"


def _markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"
