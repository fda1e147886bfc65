"""All figures of a run as a table of text and as one picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    Figure = dict[str, object]


def verdict(figure: Figure) -> str:
    """Say whether a figure meets its goal: its worst round where it has rounds, else its value; '' without a goal."""
    told = (_number(figure, name) for name in ("ratio", "min", "max", "total_s", "tflop_s"))
    measured = [value for value in told if value is not None]
    low, high = _number(figure, "at_least"), _number(figure, "at_most") or _number(figure, "limit")
    if not measured or (low is None and high is None):
        return ""
    middle = _number(figure, "median")
    if low is not None:
        met, mostly = min(measured) >= low, (middle or min(measured)) >= low
    else:
        met, mostly = max(measured) <= float(high or 0), (middle or max(measured)) <= float(high or 0)
    return "met" if met else "met by the median" if mostly else "not met"


def _number(figure: Figure, name: str) -> float | None:
    value = figure.get(name)
    return float(value) if isinstance(value, (int, float)) else None


def table(figures: Sequence[Figure]) -> str:
    """Lay out the figures that have a value: their range over rounds, goal and bound, and whether the goal is met."""
    rows = [("benchmark", "figure", "min", "median", "max", "goal", "bound", "")]
    for figure in figures:
        middle = _number(figure, "median")
        if middle is None:
            middle = _number(figure, "ratio")
        if middle is None and "skipped" not in figure:
            continue
        low, high = (_short(figure.get(name)) for name in ("min", "max"))
        at_least, at_most = figure.get("at_least"), figure.get("at_most", figure.get("limit"))
        goal = f">= {at_least:g}" if isinstance(at_least, (int, float)) else ""
        goal = f"<= {at_most:g}" if not goal and isinstance(at_most, (int, float)) else goal
        shown = "skipped" if middle is None else _short(middle)
        name = str(figure.get("benchmark", ""))
        rows.append((name, str(figure["figure"]), low, shown, high, goal, _short(figure.get("bound")), verdict(figure)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines) + "\n"


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else "" if value is None else str(value)


def plot(figures: Sequence[Figure], path: Path) -> None:
    """Draw every ratio with its spread over rounds, its goal and its bound, on a logarithmic axis."""
    drawn = [figure for figure in figures if all(_number(figure, name) for name in ("min", "median", "max"))][::-1]
    drawn = [figure for figure in drawn if "/" in str(figure["figure"])]
    picture, axis = plt.subplots(figsize=(11, 1.2 + 0.34 * len(drawn)), layout="constrained")
    for row, figure in enumerate(drawn):
        low, middle, high = (float(_number(figure, name) or 0) for name in ("min", "median", "max"))
        axis.plot([low, high], [row, row], color="#1f4e79", linewidth=5, solid_capstyle="butt", alpha=0.4)
        axis.plot(middle, row, "o", color="#1f4e79", label="median, range over rounds" if row == 0 else None)
        for key, marker, colour, words in (("at_least", "|", "#b03a2e", "goal"), ("bound", "x", "#555555", "bound")):
            value = _number(figure, key)
            if value:
                seen = {str(name) for name in axis.get_legend_handles_labels()[1]}
                axis.plot(value, row, marker, color=colour, markersize=11, label=None if words in seen else words)
    axis.axvline(1, color="#999999", linewidth=0.8)
    axis.set_xscale("log")
    axis.set_yticks(range(len(drawn)), [f"{figure['benchmark']}: {figure['figure']}" for figure in drawn], fontsize=7)
    axis.set_xlabel("ratio (logarithmic)")
    if drawn:
        axis.legend(loc="lower right", fontsize=7)
    picture.savefig(path, dpi=130)
    plt.close(picture)
