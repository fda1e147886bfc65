"""The sealed hold-out once it was opened: who opened it and when, and what the networks scored on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lbp_ray.report.curves import precision_recall_panel, roc_panel
from lbp_ray.report.details import metric_range
from lbp_ray.report.figures import confusion_panel
from lbp_ray.report.sheets import Sheet
from lbp_ray.report.theme import STAMP_HEIGHT_IN, Picture, colour_of, drawing, new_figure, svg_bytes
from lbp_ray.report.thesis_tables import summary_record
from lbp_ray.report.words import (
    METRIC_LABELS,
    bounds,
    estimate_with_bounds,
    listed,
    mean_with_spread,
    named,
    number,
    slices,
    spread_name,
)
from lbp_ray.result import METRIC_NAMES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

    from lbp_ray.result import HoldoutResult, StudyResult, Unsealed

THRESHOLDS = {
    "out_of_fold": "fitted on the seed-averaged out-of-fold scores",
    "mean_of_models": "the mean of all models' thresholds",
}
"""How the source of a hold-out threshold is written for a reader."""


def opening_sentences(result: StudyResult, told: Unsealed) -> list[str]:
    """Say who opened the hold-out when and for which result, and how it was judged; a second opening is warned of."""
    opening = told.opening
    first = told.slice_counts[0]
    sentences = [
        f"Opened by {opening.user} at {opening.time} for result {opening.result_hash[:12]}, line {opening.line} of the"
        " ledger of all studies.",
        f"{first.num_studies} studies, {first.num_positive} symptomatic, scored by the mean of {result.num_folds} folds"
        f" × {len(result.seeds)} seeds; threshold {THRESHOLDS.get(first.threshold_source, first.threshold_source)}."
        " Intervals are over the hold-out's patients, conditional on the trained models.",
    ]
    if told.num_lost:
        sentences.append(f"{told.num_lost} sealed studies have no crop and were not predicted.")
    if opening.number > 1:
        sentences.append(
            f"Warning: this is opening number {opening.number}. The hold-out was no longer untouched: whoever had seen"
            " the earlier figures may have chosen by them."
        )
    return sentences


def holdout_tables(result: StudyResult, told: Unsealed) -> list[Sheet]:
    """Make the tables of one opening: metrics, and the range over folds taken alone."""
    return [
        _metrics(result, told),
        *([_folds(result, told)] if all(part.choices for part in told.slice_counts) else []),
    ]


def holdout_picture(result: StudyResult, told: Unsealed) -> Picture:
    """Draw confusion matrix, ROC and precision-recall curve of every slice count of one opening."""
    parts = _by_slices(told)
    name = f"{_stem(told)}_curves"
    title = "The hold-out: decisions, ROC and precision-recall"
    with drawing():
        svg = svg_bytes(_draw(parts), title, result, judged=False)
    caption = (
        "Confusion matrix, ROC and precision-recall curve of every slice count, as Figures 20 to 22 of the Oulu thesis"
        " show them of its test set. Ring: the decisions. Dotted: chance, and the prevalence."
        f" n\u00a0=\u00a0{parts[0].num_studies} studies, {parts[0].num_positive} symptomatic."
    )
    findings = listed([_finding(part) for part in parts])
    return Picture(name, title, caption, f"{title}. {findings}.", svg)


def _draw(parts: Sequence[HoldoutResult]) -> Figure:
    figure = new_figure(3.1 * len(parts) + STAMP_HEIGHT_IN)
    grid = figure.subplots(len(parts), 3, squeeze=False)
    for index, (row, part) in enumerate(zip(grid, parts, strict=True)):
        colour = colour_of(index)
        confusion_panel(row[0], part.confusion, colour)
        roc_panel(row[1], part.roc, part.confusion, named(part.metrics, "roc_auc"), colour=colour)
        area = named(part.metrics, "average_precision")
        precision_recall_panel(row[2], part.precision_recall, part.confusion, area, colour=colour)
        row[0].set_title(slices(part.num_slices))
        row[1].set(xlabel="1 − specificity", ylabel="recall")
        row[2].set(xlabel="recall", ylabel="precision")
    return figure


def _finding(part: HoldoutResult) -> str:
    area = named(part.metrics, "roc_auc")
    table = part.confusion
    return (
        f"{slices(part.num_slices)}: ROC-AUC {number(area.estimate)}, interval {bounds(area.interval)}, {table.tp} true"
        f" and {table.fp} false positives, {table.fn} false and {table.tn} true negatives"
    )


def _metrics(result: StudyResult, told: Unsealed) -> Sheet:
    parts = _by_slices(told)
    rows = tuple(
        (
            METRIC_LABELS[name],
            *[
                cell
                for part in parts
                for cell in (
                    estimate_with_bounds(named((*part.metrics, part.accuracy), name)),
                    mean_with_spread(result, named((*part.metrics, part.accuracy), name)),
                )
            ],
        )
        for name in (*METRIC_NAMES, "accuracy")
    )
    records = tuple(
        {
            "opening": told.opening.number,
            **_how(result),
            "num_slices": part.num_slices,
            "num_studies": part.num_studies,
            "num_positive": part.num_positive,
            "threshold": part.threshold,
            "hold_out_threshold_source": part.threshold_source,
            **part.confusion.model_dump(),
            **summary_record(summary),
        }
        for part in parts
        for summary in (*part.metrics, part.accuracy)
    )
    note = (
        "Estimate of the scores averaged over all models with its interval over patients, and mean"
        f" ± {spread_name(result)} over the models by their own thresholds."
    )
    head = [f"{slices(part.num_slices)}{kind}" for part in parts for kind in ("", f", models ± {spread_name(result)}")]
    name = _stem(told)
    return Sheet(name, "Hold-out", note, ("metric", *head), "l" + "rr" * len(parts), rows, records, judged=False)


def _folds(result: StudyResult, told: Unsealed) -> Sheet:
    parts = _by_slices(told)
    rows = tuple((METRIC_LABELS[name], *[metric_range(part.choices, name) for part in parts]) for name in METRIC_NAMES)
    records = tuple(
        {
            "opening": told.opening.number,
            **_how(result),
            "num_slices": part.num_slices,
            "fold": choice.fold,
            "threshold": choice.threshold,
            **choice.confusion.model_dump(),
            **summary_record(summary),
        }
        for part in parts
        for choice in part.choices
        for summary in choice.metrics
    )
    note = (
        "The hold-out judged by one validation fold's networks and threshold alone, as the Oulu thesis judged its test"
        " set: lowest and highest value over the folds. The thesis does not say which fold it was."
    )
    head = ("metric", *[slices(part.num_slices) for part in parts])
    title, align = "Hold-out by one fold's networks", "l" + "r" * len(parts)
    return Sheet(f"{_stem(told)}_folds", title, note, head, align, rows, records, judged=False)


def _how(result: StudyResult) -> dict[str, str]:
    """How each network's epoch and threshold were chosen, and what is judged."""
    chosen = {"selection": result.selection, "network_threshold_source": result.threshold_source}
    return {**chosen, "level": result.level}


def _stem(told: Unsealed) -> str:
    return f"holdout{told.opening.line}"


def _by_slices(told: Unsealed) -> list[HoldoutResult]:
    return sorted(told.slice_counts, key=lambda part: part.num_slices)
