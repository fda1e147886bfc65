"""A table as the page shows it and as its two files hold it: rounded cells to read, full precision for software."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lbp_ray.report.optimism import mark
from lbp_ray.report.words import short_hash

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lbp_ray.result import StudyResult


@dataclass(frozen=True)
class Sheet:
    """One table."""

    name: str
    """File name without suffix, and the name the page's template asks for."""
    title: str
    note: str
    """What it shows, and how to read it."""
    head: tuple[str, ...]
    align: str
    """``l`` or ``r`` for each column."""
    rows: tuple[tuple[str, ...], ...]
    """Cells to read."""
    records: tuple[Mapping[str, object], ...]
    """The same for software, by column; None becomes an empty cell."""
    judged: bool = True
    """Whether it holds what the networks scored: it then says how epochs and thresholds were chosen."""


def sheet_csv(sheet: Sheet, result: StudyResult) -> str:
    """Write the records at full precision, each with the result's hash and how the result was judged."""
    how = {"selection": result.selection, "threshold_source": result.threshold_source, "level": result.level}
    common = {"result_hash": short_hash(result)} | (how if sheet.judged else {})
    buffer = io.StringIO()
    columns = [*common, *(sheet.records[0] if sheet.records else ())]
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({**common, **record} for record in sheet.records)
    return buffer.getvalue()


def sheet_markdown(sheet: Sheet, result: StudyResult) -> str:
    """Write the cells for a manuscript, with title, note and the result's hash."""
    rule = [{"l": "---", "r": "---:"}[side] for side in sheet.align]
    lines = ["| " + " | ".join(map(_escaped, row)) + " |" for row in (sheet.head, rule, *sheet.rows)]
    foot = ". ".join(filter(None, (sheet.note.rstrip("."), sheet_mark(sheet, result), f"Result {short_hash(result)}")))
    return "\n".join([f"**{_escaped(sheet.title)}**", "", *lines, "", f"{_escaped(foot)}.", ""])


def sheet_mark(sheet: Sheet, result: StudyResult) -> str:
    """Return the mark of an optimistic result on tables of what networks scored, with a capital."""
    told = mark(result) if sheet.judged else ""
    return told[:1].upper() + told[1:]


def _escaped(cell: str) -> str:
    return " ".join(cell.split()).replace("|", "/").replace("<", "&lt;")
