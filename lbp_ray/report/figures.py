"""Estimates with their intervals, score distributions, confusion matrices, folds and the permutation null."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from lbp_ray.report.theme import (
    COLOURS,
    LABEL_BACKING,
    NEGATIVE_COLOUR,
    POSITIVE_COLOUR,
    STAMP_HEIGHT_IN,
    colour_of,
    label_panels,
    marker_of,
    new_figure,
    panels,
)
from lbp_ray.report.verdict import CHANCE_AUC
from lbp_ray.report.words import (
    METRIC_LABELS,
    bounds,
    by_slices,
    chance_level,
    metric,
    named,
    number,
    p_value,
    percent,
    prevalence,
    slices,
    units,
)
from lbp_ray.result import METRIC_NAMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lbp_ray.result import Confusion, MetricSummary, StudyResult

SCORE_BINS = 30
NULL_BINS = 24

REFERENCE_LINE: dict[str, Any] = {"color": COLOURS["muted"], "linestyle": (0, (1, 2)), "linewidth": 1.2}
"""Chance, prevalence: what a guess would reach."""


def draw_overview(result: StudyResult) -> Figure:
    """Draw ROC-AUC with its interval per slice count between chance and, where known, the best possible value."""
    parts = by_slices(result)
    figure = new_figure(0.95 + 0.36 * len(parts) + STAMP_HEIGHT_IN)
    axis = figure.subplots()
    areas = [metric(part, "roc_auc") for part in parts]
    for row, area in enumerate(areas):
        _whisker(axis, area, row, row)
        text = f"{number(area.estimate)}   ({bounds(area.interval)})"
        axis.text(1.015, row, text, transform=axis.get_yaxis_transform(), va="center")
    axis.axvline(CHANCE_AUC, **REFERENCE_LINE)
    top: dict[str, Any] = {"transform": axis.get_xaxis_transform(), "ha": "center", "va": "bottom", "fontsize": 8.5}
    axis.text(CHANCE_AUC, 1.02, f"chance {number(CHANCE_AUC)}", color=COLOURS["muted"], **top)
    if result.bayes is not None:
        ceiling = result.bayes.realised_auc
        axis.axvline(ceiling, color=COLOURS["ink"], linewidth=1.4)
        axis.text(ceiling, 1.02, f"best possible {number(ceiling)}", **top)
    axis.set(xlim=(min(0.4, *(_lowest(area) - 0.03 for area in areas)), 1.005), xlabel="ROC-AUC")
    _rows(axis, [slices(part.num_slices) for part in parts])
    return figure


def draw_metrics(result: StudyResult) -> Figure:
    """Draw the eight metrics as dots with intervals, seeds as small ticks, chance as a bar where it is defined."""
    parts = by_slices(result)
    figure = new_figure(0.7 + len(METRIC_NAMES) * (0.26 + 0.14 * len(parts)) + STAMP_HEIGHT_IN)
    axis = figure.subplots()
    step = 0.7 / max(len(parts), 2)
    share = float(np.mean([prevalence(part) for part in parts]))
    for row, name in enumerate(METRIC_NAMES):
        chance = chance_level(name, share)
        if chance is not None:
            axis.plot([chance, chance], [row - 0.42, row + 0.42], **REFERENCE_LINE)
        for index, part in enumerate(parts):
            summary, y = metric(part, name), row + (index - (len(parts) - 1) / 2) * step
            _whisker(axis, summary, y, index)
            axis.plot(
                summary.per_seed, [y + step * 0.36] * len(summary.per_seed),
                marker="|", markersize=4, linestyle="none", color=colour_of(index), alpha=0.8,
            )  # fmt: skip
            if row == 0:
                _name_beside(axis, part.num_slices, y, index)
    lowest = min(_lowest(metric(part, name)) for part in parts for name in METRIC_NAMES)
    axis.set_xlim(min(-0.02, lowest - 0.03), 1.01)
    _rows(axis, [METRIC_LABELS[name] for name in METRIC_NAMES])
    for boundary in range(1, len(METRIC_NAMES)):
        axis.axhline(boundary - 0.5, color=COLOURS["grid"], linewidth=0.8)
    axis.text(share, -0.47, "chance", ha="center", va="bottom", color=COLOURS["muted"], fontsize=8)
    return figure


def draw_scores(result: StudyResult) -> Figure:
    """Draw out-of-fold scores: symptomatic upward, asymptomatic downward, thresholds as lines."""
    parts = by_slices(result)
    every = [score for part in parts for score in (*part.scores_positive, *part.scores_negative)]
    edges = np.linspace(*_rounded_range(every), SCORE_BINS + 1)
    width = edges[1] - edges[0]
    figure, axes = panels(len(parts), 2.9)
    for part, axis in zip(parts, axes, strict=True):
        style: dict[str, Any] = {"edgecolor": COLOURS["paper"], "linewidth": 0.5, "align": "edge"}
        axis.bar(
            edges[:-1], np.histogram(part.scores_positive, edges)[0], width, color=COLOURS[POSITIVE_COLOUR], **style
        )
        axis.bar(
            edges[:-1], -np.histogram(part.scores_negative, edges)[0], width, color=COLOURS[NEGATIVE_COLOUR], **style
        )
        axis.axhline(0, color=COLOURS["muted"], linewidth=0.8)
        for threshold in part.fold_thresholds:
            axis.axvline(threshold, color=COLOURS["ink"], linewidth=0.9, alpha=0.65)
        axis.set_title(slices(part.num_slices))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{abs(value):.0f}"))
        axis.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axis.margins(y=0.16)
        axis.grid(visible=False, axis="x")
        corner: dict[str, Any] = {"transform": axis.transAxes, "fontsize": 8.5, "bbox": LABEL_BACKING}
        axis.text(0.015, 0.985, f"symptomatic, n = {len(part.scores_positive)}", va="top", **corner)
        axis.text(0.015, 0.015, f"asymptomatic, n = {len(part.scores_negative)}", va="bottom", **corner)
    label_panels(axes, f"{result.level} score", units(result))
    return figure


def draw_confusion(result: StudyResult) -> Figure:
    """Draw counts of predictions by truth; the tint is the share within the row."""
    parts = by_slices(result)
    figure, axes = panels(len(parts), 3.0)
    for index, (part, axis) in enumerate(zip(parts, axes, strict=True)):
        confusion_panel(axis, part.confusion, colour_of(index))
        axis.set_title(slices(part.num_slices))
    label_panels(axes, "", "truth")
    return figure


def draw_folds(result: StudyResult) -> Figure:
    """Draw the AUC within each fold beside the pooled estimate."""
    parts = by_slices(result)
    figure = new_figure(0.75 + 0.42 * len(parts) + STAMP_HEIGHT_IN)
    axis = figure.subplots()
    for row, part in enumerate(parts):
        pooled = metric(part, "roc_auc").estimate
        axis.plot([pooled, pooled], [row - 0.3, row + 0.3], color=COLOURS["ink"], linewidth=2.2)
        axis.plot(
            part.fold_auc, _staggered(part.fold_auc, row), marker=marker_of(row), markersize=6, linestyle="none",
            color=colour_of(row), alpha=0.75, markeredgecolor=COLOURS["paper"], markeredgewidth=0.6,
        )  # fmt: skip
    axis.axvline(CHANCE_AUC, **REFERENCE_LINE)
    axis.set_xlim(min(0.4, min(min(part.fold_auc, default=0.5) for part in parts) - 0.03), 1.01)
    axis.set_xlabel("ROC-AUC within one fold (bar: pooled over folds)")
    _rows(axis, [slices(part.num_slices) for part in parts])
    return figure


def draw_choices(result: StudyResult) -> Figure:
    """Draw the eight metrics of every fold taken as the only validation fold, and of all folds together."""
    parts = by_slices(result)
    figure = new_figure(0.7 + len(METRIC_NAMES) * (0.26 + 0.16 * len(parts)) + STAMP_HEIGHT_IN)
    axis = figure.subplots()
    step = 0.7 / max(len(parts), 2)
    for row, name in enumerate(METRIC_NAMES):
        for index, part in enumerate(parts):
            y = row + (index - (len(parts) - 1) / 2) * step
            values = [named(choice.metrics, name).estimate for choice in part.choices]
            pooled = metric(part, name).estimate
            axis.plot([min(values), max(values)], [y, y], color=colour_of(index), linewidth=1.2, alpha=0.45)
            axis.plot([pooled, pooled], [y - step * 0.4, y + step * 0.4], color=COLOURS["ink"], linewidth=2)
            axis.plot(
                values, [y] * len(values), marker=marker_of(index), markersize=5, linestyle="none",
                color=colour_of(index), alpha=0.7, markeredgecolor=COLOURS["paper"], markeredgewidth=0.5,
            )  # fmt: skip
            if row == 0:
                _name_beside(axis, part.num_slices, y, index)
    axis.set_xlim(min(-0.02, *axis.get_xlim()), 1.02)
    _rows(axis, [METRIC_LABELS[name] for name in METRIC_NAMES])
    for boundary in range(1, len(METRIC_NAMES)):
        axis.axhline(boundary - 0.5, color=COLOURS["grid"], linewidth=0.8)
    return figure


def draw_permutation(result: StudyResult) -> Figure:
    """Draw the AUCs under shuffled labels and under the true ones; slice counts without a test are left out."""
    parts = [(index, part) for index, part in enumerate(by_slices(result)) if part.permutation is not None]
    tests = [part.permutation for _, part in parts if part.permutation is not None]
    every = [value for test in tests for value in (*test.null, test.observed)]
    edges = np.linspace(min(every), max(*every, min(every) + 0.05), NULL_BINS + 1)
    figure, axes = panels(len(parts), 2.6)
    for (index, part), test, axis in zip(parts, tests, axes, strict=True):
        axis.hist(test.null, edges.tolist(), color=COLOURS["line"], edgecolor=COLOURS["paper"], linewidth=0.5)
        axis.axvline(CHANCE_AUC, **REFERENCE_LINE)
        axis.axvline(test.observed, color=colour_of(index), linewidth=2.2)
        axis.margins(x=0.04, y=0.28)
        axis.grid(visible=False, axis="x")
        right = test.observed > (edges[0] + edges[-1]) / 2
        told = f"true labels {number(test.observed)}" + ("" if result.optimistic else f"\n{p_value(test.p_value)}")
        axis.annotate(
            told, (test.observed, 0.985), (-5 if right else 5, 0), xycoords=("data", "axes fraction"),
            textcoords="offset points", ha="right" if right else "left", va="top", linespacing=1.35, weight="bold",
        )  # fmt: skip
        axis.set_title(slices(part.num_slices))
    label_panels(axes, "ROC-AUC, frozen stage", "shuffles")
    return figure


def _whisker(axis: Axes, summary: MetricSummary, y: float, index: int) -> None:
    colour, interval = colour_of(index), summary.interval
    if interval is not None:
        axis.plot([interval.low, interval.high], [y, y], color=colour, linewidth=2.4, alpha=0.55)
    axis.plot([summary.estimate], [y], marker=marker_of(index), markersize=6, color=colour)


def _lowest(summary: MetricSummary) -> float:
    low = summary.estimate if summary.interval is None else summary.interval.low
    return min(low, *summary.per_seed)


def _name_beside(axis: Axes, count: int, y: float, index: int) -> None:
    style: dict[str, Any] = {"transform": axis.get_yaxis_transform(), "va": "center", "weight": "bold"}
    axis.text(1.015, y, slices(count), color=colour_of(index), **style)


def _rows(axis: Axes, labels: list[str]) -> None:
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.45, -0.55)
    axis.tick_params(axis="y", length=0, labelcolor=COLOURS["ink"])
    axis.grid(visible=False, axis="y")
    axis.spines["left"].set_visible(False)


def confusion_panel(axis: Axes, table: Confusion, colour: str) -> None:
    """Draw counts of predictions by truth."""
    rows = (("symptomatic", table.tp, table.fn), ("asymptomatic", table.fp, table.tn))
    for y, (_, called, cleared) in enumerate(rows):
        for x, count in enumerate((called, cleared)):
            share = count / (called + cleared)
            axis.add_patch(Rectangle((x, y), 0.97, 0.97, facecolor=colour, alpha=0.06 + 0.5 * share, linewidth=0))
            axis.text(x + 0.485, y + 0.44, str(count), ha="center", va="center", fontsize=17, weight="bold")
            axis.text(x + 0.485, y + 0.76, f"{percent(share)} of row", ha="center", va="center", fontsize=8)
    axis.set(xlim=(0, 1.97), ylim=(1.97, 0))
    axis.set_xticks((0.485, 1.485), ("predicted\nsymptomatic", "predicted\nasymptomatic"))
    axis.set_yticks((0.485, 1.485), [name for name, *_ in rows], rotation=90, va="center")
    axis.tick_params(length=0, labelcolor=COLOURS["ink"])
    axis.grid(visible=False)
    axis.set_box_aspect(0.78)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _rounded_range(values: list[float]) -> tuple[float, float]:
    low, high = np.floor(min(values) * 20) / 20, np.ceil(max(values) * 20) / 20
    return float(low), float(max(high, low + 0.05))


def _staggered(values: tuple[float, ...], row: int) -> list[float]:
    """Spread near-equal dots to three levels, in order of value, so that each stays visible."""
    rank = {place: level for level, place in enumerate(np.argsort(values, kind="stable").tolist())}
    return [row + 0.14 * (rank[place] % 3 - 1) for place in range(len(values))]
