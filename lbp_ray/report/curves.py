"""ROC, precision-recall and learning curves, one panel per slice count."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from lbp_ray.report.theme import (
    COLOURS,
    LABEL_BACKING,
    MAX_COLUMNS,
    STAMP_HEIGHT_IN,
    colour_of,
    label_panels,
    new_figure,
    panels,
)
from lbp_ray.report.words import bounds, by_slices, metric, number, slices

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    from lbp_ray.result import Confusion, Curve, LearningCurve, MetricSummary, SliceCountResult, StudyResult

UNIT_TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)

LABEL_GAP = 0.09
"""Least distance of two line-end labels, as a share of the axis."""


def draw_roc(result: StudyResult) -> Figure:
    """Draw the ROC curve of each slice count, the chance diagonal and the operating point."""
    parts = by_slices(result)
    figure, axes = panels(len(parts), 3.25)
    for index, (part, axis) in enumerate(zip(parts, axes, strict=True)):
        axis.set_title(slices(part.num_slices))
        roc_panel(axis, part.roc, part.confusion, metric(part, "roc_auc"), colour=colour_of(index))
    label_panels(axes, "1 − specificity", "recall")
    return figure


def draw_precision_recall(result: StudyResult) -> Figure:
    """Draw the precision-recall curve of each slice count, its prevalence line and the operating point."""
    parts = by_slices(result)
    figure, axes = panels(len(parts), 3.25)
    for index, (part, axis) in enumerate(zip(parts, axes, strict=True)):
        axis.set_title(slices(part.num_slices))
        colour, told = colour_of(index), metric(part, "average_precision")
        line = precision_recall_panel(axis, part.precision_recall, part.confusion, told, colour=colour)
        line.set_gid(f"prevalence-{part.num_slices}")
    label_panels(axes, "recall", "precision")
    return figure


def roc_panel(axis: Axes, curve: Curve, counts: Confusion, area: MetricSummary, *, colour: str) -> None:
    """Draw one ROC curve with the chance diagonal, its area and the decisions made."""
    _square(axis)
    axis.plot([0, 1], [0, 1], linestyle=(0, (1, 2)), color=COLOURS["muted"], linewidth=1.2)
    axis.text(0.47, 0.395, "chance", rotation=45, rotation_mode="anchor", color=COLOURS["muted"], fontsize=8)
    axis.plot(curve.x, curve.y, color=colour)
    _operating_point(axis, counts.fp / (counts.fp + counts.tn), counts.tp / (counts.tp + counts.fn), colour)
    _summary(axis, area, "AUC")


def precision_recall_panel(axis: Axes, curve: Curve, counts: Confusion, area: MetricSummary, *, colour: str) -> Line2D:
    """Draw one precision-recall curve with its area and the decisions made; return the dotted prevalence line."""
    _square(axis)
    share = (counts.tp + counts.fn) / sum(counts.model_dump().values())
    line = axis.axhline(share, linestyle=(0, (1, 2)), color=COLOURS["muted"], linewidth=1.2)
    told: dict[str, Any] = {"va": "top", "color": COLOURS["muted"], "fontsize": 8, "bbox": LABEL_BACKING}
    axis.text(0.02, share - 0.03, f"prevalence {number(share)}", **told)
    recall, precision = _rising(curve)
    axis.plot(recall, precision, color=colour, drawstyle="steps-pre")
    if counts.tp + counts.fp:
        _operating_point(axis, counts.tp / (counts.tp + counts.fn), counts.tp / (counts.tp + counts.fp), colour)
    _summary(axis, area, "AP")
    return line


def draw_learning(result: StudyResult) -> Figure:
    """Draw losses and validation AUC by epoch, mean and one standard deviation over fold × seed trials."""
    parts = by_slices(result)
    figure = new_figure(4.6 + STAMP_HEIGHT_IN)
    grid = figure.subplots(2, len(parts), sharex="col", sharey="row", squeeze=False, height_ratios=[1.15, 1])
    for index, part in enumerate(parts):
        loss, auc = grid[0, index], grid[1, index]
        learning, colour = part.learning, colour_of(index)
        for axis in (loss, auc):
            _shade_unfrozen(axis, learning)
            axis.grid(visible=False, axis="x")
        _band(loss, learning.epoch, learning.train_loss, learning.train_loss_sd, COLOURS["muted"])
        _band(loss, learning.epoch, learning.validation_loss, learning.validation_loss_sd, colour)
        _band(auc, learning.epoch, learning.validation_auc, learning.validation_auc_sd, colour)
        _mark_scoring(auc, part, colour)
        auc.axhline(0.5, linestyle=(0, (1, 2)), color=COLOURS["muted"], linewidth=1.2)
        auc.xaxis.set_major_locator(MaxNLocator(nbins=6 if len(parts) <= MAX_COLUMNS else 3, integer=True))
        loss.set_title(slices(part.num_slices))
        auc.set_xlabel("epoch")
    grid[0, 0].set_ylabel("loss")
    grid[1, 0].set_ylabel("validation AUC")
    for index, part in enumerate(parts):
        _label_ends(grid[0, index], part.learning, colour_of(index))
        grid[1, index].text(part.learning.epoch[0], 0.5, "chance", va="bottom", color=COLOURS["muted"], fontsize=8)
    return figure


def _square(axis: Axes) -> None:
    axis.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.03), xticks=UNIT_TICKS, yticks=UNIT_TICKS)
    axis.set_box_aspect(1)


def _operating_point(axis: Axes, x: float, y: float, colour: str) -> None:
    axis.plot(
        [x], [y], marker="o", markersize=7, linestyle="none", zorder=5, clip_on=False,
        markerfacecolor=COLOURS["paper"], markeredgecolor=colour, markeredgewidth=1.8,
    )  # fmt: skip


def _summary(axis: Axes, summary: MetricSummary, label: str) -> None:
    corner: dict[str, Any] = {"transform": axis.transAxes, "ha": "right", "linespacing": 1.4}
    axis.text(0.98, 0.12, f"{label} {number(summary.estimate)}", fontsize=11, weight="bold", **corner)
    axis.text(0.98, 0.045, bounds(summary.interval), color=COLOURS["muted"], fontsize=8.5, **corner)


def _rising(curve: Curve) -> tuple[Sequence[float], Sequence[float]]:
    if curve.x[0] > curve.x[-1]:
        return curve.x[::-1], curve.y[::-1]
    return curve.x, curve.y


def _band(axis: Axes, epochs: Sequence[int], mean: Sequence[float], sd: Sequence[float], colour: str) -> None:
    middle, half = np.asarray(mean), np.asarray(sd)
    axis.fill_between(epochs, middle - half, middle + half, color=colour, alpha=0.18, linewidth=0)
    axis.plot(epochs, middle, color=colour, marker="o" if len(epochs) == 1 else "", markersize=4)


def _mark_scoring(axis: Axes, part: SliceCountResult, colour: str) -> None:
    """Put a triangle under every epoch that scores, its area by the trials that chose it."""
    trials = sum(row.trials for row in part.epochs)
    for row in part.epochs:
        size = 4 + 5 * (row.trials / trials) ** 0.5
        axis.plot(
            [row.epoch], [0.0], transform=axis.get_xaxis_transform(), marker="^", markersize=size, color=colour,
            linestyle="none", clip_on=False, zorder=5, markeredgewidth=0,
        )  # fmt: skip


def _shade_unfrozen(axis: Axes, learning: LearningCurve) -> None:
    unfrozen = [epoch for epoch, stage in zip(learning.epoch, learning.stage, strict=True) if stage == "unfrozen"]
    if not unfrozen:
        return
    axis.axvspan(min(unfrozen) - 0.5, max(unfrozen) + 0.5, color=COLOURS["grid"], linewidth=0, zorder=0)


def _label_ends(axis: Axes, learning: LearningCurve, colour: str) -> None:
    low, high = axis.get_ylim()
    gap = LABEL_GAP * (high - low)
    train, validation = learning.train_loss[-1], learning.validation_loss[-1]
    push = max(0.0, gap - abs(train - validation)) / 2 * (1 if validation >= train else -1)
    x = axis.get_xlim()[1]
    for text, y, ink in (("train", train - push, COLOURS["muted"]), ("validation", validation + push, colour)):
        axis.text(x, y, f" {text}", va="center", color=ink, fontsize=8)
    if "unfrozen" in learning.stage:
        start = learning.epoch[learning.stage.index("unfrozen")] - 0.5
        axis.text(start, high, "unfrozen ", ha="right", va="top", color=COLOURS["muted"], fontsize=8)
