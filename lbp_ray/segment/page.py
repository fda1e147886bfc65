"""The page and the console table of a regions artefact: what was trained, how good it is, what must be looked at."""

from __future__ import annotations

import base64
import io
import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

import lbp_ray.report
from lbp_ray.report.page import STYLE, flattened
from lbp_ray.report.tables import CONSOLE_WIDTH
from lbp_ray.report.theme import COLOURS, STAMP_HEIGHT_IN, drawing, inline_svg, new_figure
from lbp_ray.report.words import HASH_LENGTH, number
from lbp_ray.roi.regions import FLAGS, MODEL, OUT_OF_FOLD
from lbp_ray.segment.review import FLAGGED, LIST, SHEET, WORST, WORST_CASES
from lbp_ray.segment.scores import TAIL_PERCENTILE, summarise
from preprocess.commit import write_atomic

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lbp_ray.roi.regions import Regions, RegionsMeta
    from lbp_ray.segment.scores import ScoreSummary

TEMPLATE = "regions.html.j2"

HISTORY_COLUMNS = ("fold", "epoch", "learning_rate", "train_loss", "validation_loss", "validation_dice")
"""Columns of ``history.parquet``; a negative fold is the final network, which has no validation."""

EASY_DICE = 0.80
"""Mean Dice of the box that never looks, above which a cohort is too easy to say much about a network."""

MAX_LISTED = 200
"""Flagged exams on the page; the list beside it always has all."""

BINS = 32
"""Bars of a histogram."""

ERROR_ROWS = (
    ("Centroid error, median", "median_mm"),
    (f"  {TAIL_PERCENTILE}th percentile", "tail_mm"),
    ("  largest", "largest_mm"),
)
"""Console lines of the centroid error, and the field of `lbp_ray.segment.scores.ErrorSummary` that each shows."""


@dataclass(frozen=True)
class Drawing:
    """A figure with the words around it."""

    title: str
    caption: str
    alt: str
    svg: Markup


def write_page(folder: Path, regions: Regions, history: pd.DataFrame) -> Path:
    """Write the self-contained page of a regions artefact.

    Parameters
    ----------
    folder
        Holds the pictures that `lbp_ray.segment.review.write_review` wrote; receives ``report.html``.
    regions
        The only source of every number on the page.
    history
        Learning curves: `HISTORY_COLUMNS`.

    Returns
    -------
    Path
        ``folder/report.html``.

    Raises
    ------
    ValueError
        If the scores cannot be summarised (see `lbp_ray.segment.scores.summarise`) or a column of the learning curves
        is missing.
    """
    missing = [name for name in HISTORY_COLUMNS if name not in history]
    if missing:
        msg = f"learning curves need the columns {', '.join(HISTORY_COLUMNS)}; missing: {missing}"
        raise ValueError(msg)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    page = folder / "report.html"
    write_atomic(page, environment.get_template(TEMPLATE).render(_context(folder, regions, history)).encode())
    return page


def _context(folder: Path, regions: Regions, history: pd.DataFrame) -> dict[str, Any]:
    summary, apart = summaries(regions)
    flagged = regions.table[regions.table["flags"] != ""]
    return {
        "meta": regions.meta,
        "hash": regions.meta.regions_hash[:HASH_LENGTH],
        "summary": summary,
        "apart": apart,
        "verdict": verdict(regions, summary),
        "folds_told": folds_told(regions.meta),
        "sources": _sources(regions.table),
        "tail": TAIL_PERCENTILE,
        "figures": draw_all(regions, history),
        "num_exams": len(regions.table),
        "flag_counts": [(code, FLAGS[code], count) for code, count in flag_counts(regions.table).items()],
        "flagged": flagged.head(MAX_LISTED).to_dict("records"),
        "num_flagged": len(flagged),
        "plausible": regions.meta.plausible.model_dump(),
        "num_worst": min(WORST_CASES, len(regions.scores)),
        "pictures": {name: _encoded(folder / name) for name in (WORST, SHEET, FLAGGED)},
        "list_name": LIST,
        "recipe": flattened(regions.meta.recipe),
        "style": Markup((Path(lbp_ray.report.__file__).parent / STYLE).read_text()),
    }


def render_console(regions: Regions) -> str:
    """Lay out the scores and the flagged masks for the end of a command.

    Parameters
    ----------
    regions
        The artefact.

    Returns
    -------
    str
        Lines of at most `lbp_ray.report.tables.CONSOLE_WIDTH` columns; no line end at the end.

    Raises
    ------
    ValueError
        If the scores cannot be summarised.
    """
    summary, apart = summaries(regions)
    errors = summary.centroid_error, summary.baseline_error
    header = _console_row("", "network, out of fold", "fixed mean box")
    lines = [
        *_wrapped(f"{_scored(summary)}; {folds_told(regions.meta)}"),
        "",
        header,
        "─" * len(header),
        *_dice_lines(summary),
        *[_console_row(label, *(f"{getattr(part, name):.1f} mm" for part in errors)) for label, name in ERROR_ROWS],
        "",
        *([*_wrapped(_apart_sentence(apart)), ""] if apart else []),
        *_wrapped(" ".join(verdict(regions, summary)[2:])),
        *[f"  {count:>5}  {code}: {FLAGS[code]}" for code, count in flag_counts(regions.table).items()],
        "",
        *[line for statement in regions.meta.statements for line in _wrapped(statement, "- ")],
        f"regions {regions.meta.regions_hash[:HASH_LENGTH]}",
    ]
    return "\n".join(lines)


def _dice_lines(summary: ScoreSummary) -> list[str]:
    both = summary.dice, summary.baseline_dice
    units = (("folds", "se_folds"), ("images", "se_images"), ("patients", "se_patients"))
    return [
        _console_row("Dice, mean", *(f"{part.mean:.3f}" for part in both)),
        *[
            _console_row(f"  SE over {unit}", *(_error_of(getattr(part, name)) for part in both))
            for unit, name in units
        ],
        *[
            _console_row(f"  fold {fold.fold} (n = {fold.num_images})", f"{fold.dice:.3f}", f"{fold.baseline_dice:.3f}")
            for fold in summary.folds
        ],
    ]


# --- words -----------------------------------------------------------------------------------------------------------


def summaries(regions: Regions) -> tuple[ScoreSummary, ScoreSummary | None]:
    """Summarise the folds and, apart from them, annotated patients that no network was trained on (None without)."""
    of_folds = regions.scores["fold"] >= 0
    apart = None if of_folds.all() else summarise(regions.scores[~of_folds])
    return summarise(regions.scores[of_folds]), apart


def verdict(regions: Regions, summary: ScoreSummary) -> list[str]:
    """Say in plain sentences how good the masks are and what must be looked at, the score first."""
    dice, box = summary.dice, summary.baseline_dice
    spread = f" (± {dice.se_folds:.3f} standard error over folds)" if dice.se_folds is not None else ""
    error, box_error = summary.centroid_error, summary.baseline_error
    sentences = [
        f"Out-of-fold Dice {dice.mean:.3f}{spread}, beside {box.mean:.3f} of a fixed mean box.",
        f"The centroid is {error.median_mm:.1f} mm off in the median and {error.tail_mm:.1f} mm at the "
        f"{TAIL_PERCENTILE}th percentile; the box is {box_error.median_mm:.1f} mm and {box_error.tail_mm:.1f} mm off.",
    ]
    if dice.mean <= box.mean:
        sentences.append("The network is no better than a box that never looks: do not cut crops by its masks.")
    elif box.mean > EASY_DICE:
        sentences.append(f"A box that never looks scores above {EASY_DICE:.2f} here: these images say little about it.")
    flagged = int((regions.table["flags"] != "").sum())
    total = len(regions.table)
    told = f"{flagged} of {total} masks are flagged for review" if flagged else f"None of {total} masks is flagged"
    return [*sentences, told + (": they are not cropped unless a person decides so." if flagged else ".")]


def folds_told(meta: RegionsMeta) -> str:
    """Say who trained which network."""
    whose = "the folds of a study" if meta.nested_in else "folds of their own by patient"
    return f"{meta.num_folds} folds ({whose}), {len(meta.trained_patients)} patients trained on"


def flag_counts(table: pd.DataFrame) -> dict[str, int]:
    """Count the masks that raise each flag, in the order of `lbp_ray.roi.regions.FLAGS`; a mask may raise several."""
    raised = Counter(code for flags in table["flags"] for code in filter(None, flags.split("+")))
    return {code: raised[code] for code in FLAGS if raised[code]}


def _scored(summary: ScoreSummary) -> str:
    return f"{summary.num_images} annotated images of {summary.num_patients} patients"


def _apart_sentence(apart: ScoreSummary) -> str:
    return (
        f"{_scored(apart)} that no network was trained on, by the final one: Dice {apart.dice.mean:.3f}, centroid "
        f"{apart.centroid_error.median_mm:.1f} mm off in the median, {apart.centroid_error.tail_mm:.1f} mm at the "
        f"{TAIL_PERCENTILE}th percentile; mean box {apart.baseline_dice.mean:.3f}, "
        f"{apart.baseline_error.median_mm:.1f} mm, {apart.baseline_error.tail_mm:.1f} mm."
    )


def _sources(table: pd.DataFrame) -> list[tuple[str, int]]:
    words = {OUT_OF_FOLD: "by the fold network that never saw the patient", MODEL: "by the final network"}
    return [(words[source], int((table["source"] == source).sum())) for source in words]


def _error_of(value: float | None) -> str:
    return "–" if value is None else f"± {value:.3f}"


def _console_row(label: str, network: str, box: str) -> str:
    return f"{label:<28}{network:>34}{box:>34}"


def _wrapped(text: str, bullet: str = "") -> list[str]:
    plain = "".join(character if character.isprintable() else " " for character in text)
    return textwrap.wrap(plain, CONSOLE_WIDTH, initial_indent=bullet, subsequent_indent=" " * len(bullet))


def _encoded(path: Path) -> str | None:
    return base64.b64encode(path.read_bytes()).decode() if path.is_file() else None


# --- figures ---------------------------------------------------------------------------------------------------------


def draw_all(regions: Regions, history: pd.DataFrame) -> dict[str, Drawing]:
    """Draw the histograms and the learning curves.

    Parameters
    ----------
    regions
        The artefact.
    history
        `HISTORY_COLUMNS`.
    """
    scores = regions.scores[regions.scores["fold"] >= 0]
    last = history[history["fold"] >= 0].sort_values("epoch").groupby("fold").tail(1)
    stamp = f"regions {regions.meta.regions_hash[:HASH_LENGTH]}"
    with drawing():
        histograms = _svg(draw_histograms(scores), "histograms", stamp)
        learning = _svg(draw_learning(history), "learning", stamp)
    return {
        "histograms": Drawing(
            "Dice and centroid error of every annotated image",
            "Blue: the network that never saw the patient. Grey: the mean box of its training masks. Lines: medians of "
            f"the network. n = {len(scores)} images.",
            f"Dice from {scores['dice'].min():.2f} to {scores['dice'].max():.2f}, centroid errors up to "
            f"{scores['centroid_error_mm'].max():.1f} mm.",
            histograms,
        ),
        "learning": Drawing(
            "Learning curves",
            "One line per fold; green: the final network, which has nothing left to validate on. Dotted: the learning "
            "rate drops. Shown to judge how training went: no epoch was chosen by it.",
            f"After the last epoch the folds' validation Dice is {last['validation_dice'].min():.2f} to "
            f"{last['validation_dice'].max():.2f}.",
            learning,
        ),
    }


def draw_histograms(scores: pd.DataFrame) -> Figure:
    """Draw how many images have which Dice and which centroid error, network above mean box."""
    figure = new_figure(2.7 + STAMP_HEIGHT_IN)
    left, right = figure.subplots(1, 2)
    lowest = float(scores[["dice", "baseline_dice"]].min().min())
    highest_mm = float(scores[["centroid_error_mm", "baseline_error_mm"]].max().max())
    _bars(left, scores["dice"], scores["baseline_dice"], np.linspace(np.floor(lowest * 20) / 20 - 1e-9, 1, BINS))
    _bars(right, scores["centroid_error_mm"], scores["baseline_error_mm"], np.linspace(0, max(highest_mm, 1.0), BINS))
    left.set(xlabel="Dice", ylabel="images")
    right.set(xlabel="centroid error (mm)")
    right.legend(frameon=False, loc="upper right")
    return figure


def _bars(axis: Axes, network: pd.Series[float], box: pd.Series[float], edges: np.ndarray) -> None:
    axis.hist(box, edges.tolist(), color=COLOURS["line"], label="fixed mean box", alpha=0.75)
    axis.hist(network, edges.tolist(), color=COLOURS["blue"], label="network", alpha=0.75)
    axis.axvline(float(np.median(network)), color=COLOURS["ink"], linewidth=1.2)
    axis.grid(visible=False, axis="x")
    axis.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def draw_learning(history: pd.DataFrame) -> Figure:
    """Draw losses and validation Dice by epoch, one line per fold, and the epochs at which the learning rate drops."""
    figure = new_figure(2.9 + STAMP_HEIGHT_IN)
    loss, dice = figure.subplots(1, 2)
    for fold, part in history.sort_values("epoch").groupby("fold"):
        final = int(str(fold)) < 0
        marker: dict[str, Any] = {"marker": "o" if len(part) == 1 else "", "markersize": 4, "linewidth": 1.2}
        loss.plot(part["epoch"], part["train_loss"], color=COLOURS["green" if final else "line"], **marker)
        if not final:
            loss.plot(part["epoch"], part["validation_loss"], color=COLOURS["blue"], alpha=0.8, **marker)
            dice.plot(part["epoch"], part["validation_dice"], color=COLOURS["blue"], alpha=0.8, **marker)
    rates = history.groupby("epoch")["learning_rate"].first()
    for axis in (loss, dice):
        for epoch in rates.index[rates.diff() < 0]:
            axis.axvline(float(epoch) - 0.5, linestyle=(0, (1, 2)), color=COLOURS["muted"], linewidth=1.2)
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
        axis.grid(visible=False, axis="x")
    loss.set(ylabel="loss")
    dice.set(ylabel="validation Dice")
    for row, (text, colour) in enumerate((("validation", "blue"), ("training", "muted"), ("final network", "green"))):
        loss.text(0.98, 0.96 - 0.085 * row, text, transform=loss.transAxes, ha="right", va="top", color=COLOURS[colour])
    return figure


def _svg(figure: Figure, name: str, stamp: str) -> Markup:
    figure.text(0.996, 0.012, stamp, ha="right", va="bottom", fontsize=7, color=COLOURS["muted"])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")  # `inline_svg` drops the metadata, and with it the date
    return Markup(inline_svg(buffer.getvalue(), name))
