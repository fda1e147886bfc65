"""A cohort's way from the register to the analysis: read from a CSV, as a table and drawn."""

from __future__ import annotations

import io
import textwrap
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lbp_ray.cohort.questionnaire import CohortError
from lbp_ray.result import FunnelStep

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

COLUMNS = ("name", "count", "reason")

BOX_CHARACTERS, NOTE_CHARACTERS = 34, 48
"""Where the text of a step, and of what was lost before it, is wrapped."""

HALF_LINE_PT, BOX_PAD_PT = 6.0, 5.0
"""Half the height of a line of a step, and the edge of its box around it: where arrows begin and end."""


def read_funnel(path: Path) -> tuple[FunnelStep, ...]:
    """Read the steps of a funnel.

    Parameters
    ----------
    path
        CSV with the columns `COLUMNS`, one row per step from the most to the fewest: what is counted, how many, and
        why those lost since the row before were lost (empty in the first row).

    Raises
    ------
    CohortError
        If a column or a name is missing, a count is no whole number, or a count rises.
    """
    table = pd.read_csv(path, dtype=str, keep_default_na=False, skipinitialspace=True)
    missing = [name for name in COLUMNS if name not in table]
    if missing or table.empty:
        msg = f"{path} must have the columns {', '.join(COLUMNS)} and a row per step, found {list(table.columns)}"
        raise CohortError(msg)
    counts = pd.to_numeric(table["count"], errors="coerce")
    wrong = ~((counts >= 0) & (counts % 1 == 0)) | (table["name"].str.strip() == "")
    if wrong.any():
        msg = f"{path}, line {int(np.argmax(wrong)) + 2}: a step needs a name and a whole count of 0 or more"
        raise CohortError(msg)
    rises = np.flatnonzero(np.diff(counts) > 0)
    if len(rises):
        above, below = (f"{table['name'][row]!r} ({counts[row]:.0f})" for row in (rises[0], rises[0] + 1))
        msg = f"{path}, line {rises[0] + 3}: a step cannot hold more than the one before, found {below} after {above}"
        raise CohortError(msg)
    rows = zip(table["name"].str.strip(), counts.astype(int), table["reason"].str.strip(), strict=True)
    return tuple(FunnelStep(name=name, count=int(count), reason=reason) for name, count, reason in rows)


def losses(steps: Sequence[FunnelStep]) -> list[int]:
    """Return how many each step lost of the one before; 0 for the first."""
    return [0, *(before.count - step.count for before, step in pairwise(steps))]


def funnel_markdown(steps: Sequence[FunnelStep]) -> str:
    """Write the funnel as a Markdown table."""
    lines = ["| step | N | lost | of the step before | why |", "| --- | --- | --- | --- | --- |"]
    before = steps[0].count
    for step, lost in zip(steps, losses(steps), strict=True):
        share = f"{100 * step.count / before:.0f} %" if before else ""
        name, why = (text.replace("|", "/") for text in (step.name, step.reason))
        lines.append(f"| {name} | {step.count} | {lost or ''} | {share if step is not steps[0] else ''} | {why} |")
        before = step.count
    return "\n".join(lines) + "\n"


def funnel_svg(steps: Sequence[FunnelStep]) -> bytes:
    """Draw the funnel: a box per step, an arrow to the next, and beside it what was lost; the same bytes every time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from lbp_ray.report.theme import COLOURS, drawing

    with drawing():
        figure = Figure(figsize=(7.2, 0.95 * len(steps)))
        FigureCanvasAgg(figure)
        axis = figure.add_axes((0, 0, 1, 1))
        axis.set(xlim=(0, 1), ylim=(len(steps) - 0.5, -0.5))
        axis.set_axis_off()
        box = {"boxstyle": "round,pad=0.5", "facecolor": COLOURS["paper"], "edgecolor": COLOURS["ink"]}
        above = 0.0
        for row, (step, lost) in enumerate(zip(steps, losses(steps), strict=True)):
            name = textwrap.fill(step.name, BOX_CHARACTERS)
            axis.text(
                0.24, row, f"{name}\nN = {_spaced(step.count)}", ha="center", va="center", bbox=box, parse_math=False
            )
            half = HALF_LINE_PT * (name.count("\n") + 2) + BOX_PAD_PT
            if row:
                arrow = {"arrowstyle": "-|>", "color": COLOURS["muted"], "shrinkA": above, "shrinkB": half}
                axis.annotate("", (0.24, row), (0.24, row - 1), arrowprops=arrow)
            if lost:
                note = textwrap.fill(f"{_spaced(lost)} lost: {step.reason}".removesuffix(": "), NOTE_CHARACTERS)
                axis.text(0.47, row - 0.5, note, va="center", color=COLOURS["muted"], parse_math=False)
            above = half
        buffer = io.BytesIO()
        empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata={"Title": "cohort funnel", **empty})
    return buffer.getvalue()


def _spaced(count: int) -> str:
    return f"{count:,}".replace(",", "\u202f")
