"""Colours, type and SVG output of the figures: the same bytes every time, for print and for a light or dark page."""

from __future__ import annotations

import io
import math
import re
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lbp_ray.report.optimism import mark
from lbp_ray.report.words import short_hash

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes

    from lbp_ray.result import StudyResult

COLOURS = {
    "ink": "#1c2430",
    "muted": "#5a6573",
    "line": "#aab3bd",
    "grid": "#e4e8ec",
    "paper": "#fefefe",
    "blue": "#0072b2",
    "vermillion": "#d55e00",
    "green": "#009e73",
    "purple": "#cc79a7",
    "orange": "#e69f00",
    "sky": "#56b4e9",
}
"""Every colour a figure may use: Okabe and Ito's set, safe for colour-blind readers, and greys.

On the page each becomes the CSS variable of its name, which the dark style sheet redefines; none is pure black, which
matplotlib leaves unwritten.

References
----------
.. [1] Okabe M, Ito K. Color Universal Design. 2008.
"""

SLICE_COLOURS = ("blue", "vermillion", "green", "purple", "ink")
"""Colour of a slice count, by its place in ascending order; the markers below tell them apart without colour."""

SLICE_MARKERS = ("o", "s", "^", "D", "v")

POSITIVE_COLOUR, NEGATIVE_COLOUR = "orange", "sky"
"""Symptomatic and asymptomatic studies."""

FIGURE_WIDTH_IN = 9.6
"""Width of every figure, inches: type is then the same size in all of them, on the page and in print."""

MAX_COLUMNS = 3
"""Panels in a row."""

LABEL_BACKING: dict[str, Any] = {"facecolor": COLOURS["paper"], "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
"""Box behind a label that a line may cross."""

STAMP_HEIGHT_IN = 0.2
"""Strip left free at the foot of a figure for the result's hash, inches."""

_RC: dict[str, Any] = {
    "svg.hashsalt": "lbp_ray.report",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": COLOURS["line"],
    "axes.labelcolor": COLOURS["ink"],
    "axes.titlecolor": COLOURS["ink"],
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": COLOURS["grid"],
    "grid.linewidth": 0.8,
    "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["line"],
    "ytick.color": COLOURS["line"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["muted"],
    "figure.facecolor": COLOURS["paper"],
    "axes.facecolor": COLOURS["paper"],
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Picture:
    """A figure drawn from one result."""

    name: str
    """File name without suffix, and the name the page's template asks for."""
    title: str
    caption: str
    alt: str
    svg: bytes


@contextmanager
def drawing() -> Iterator[None]:
    """Apply the house style for the time of a drawing, whatever the user's matplotlib settings are."""
    with mpl.rc_context():
        mpl.rcdefaults()
        for name, value in _RC.items():
            mpl.rcParams[name] = value  # type: ignore[index, unused-ignore]
        yield


def colour_of(index: int) -> str:
    """Return the colour of the slice count at a place in ascending order."""
    return COLOURS[SLICE_COLOURS[index % len(SLICE_COLOURS)]]


def marker_of(index: int) -> str:
    """Return the marker of the slice count at a place in ascending order."""
    return SLICE_MARKERS[index % len(SLICE_MARKERS)]


def new_figure(height_in: float) -> Figure:
    """Make an empty figure of the house width that keeps room for its stamp."""
    figure = Figure(figsize=(FIGURE_WIDTH_IN, height_in), layout="constrained")
    FigureCanvasAgg(figure)
    foot = STAMP_HEIGHT_IN / height_in
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.set(rect=(0, foot, 1, 1 - foot), w_pad=0.08, h_pad=0.06)  # type: ignore[call-arg]
    return figure


def _columns(num: int) -> int:
    """Panels in a row; four stand two by two."""
    return 2 if num == 4 else min(num, MAX_COLUMNS)


def panels(num: int, row_height_in: float) -> tuple[Figure, list[Axes]]:
    """Make small multiples, at most `MAX_COLUMNS` in a row, that share both axes; see `label_panels`.

    Parameters
    ----------
    num
        Number of panels.
    row_height_in
        Height of one row of panels, inches.
    """
    columns = _columns(num)
    rows = math.ceil(num / columns)
    figure = new_figure(rows * row_height_in + STAMP_HEIGHT_IN)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    axes = list(grid.flat)
    for spare in axes[num:]:
        spare.remove()
    return figure, axes[:num]


def label_panels(axes: list[Axes], x_label: str, y_label: str) -> None:
    """Name the axes of small multiples: x where no panel stands below, y in the first column."""
    columns = _columns(len(axes))
    for index, axis in enumerate(axes):
        lowest = index + columns >= len(axes)
        axis.tick_params(labelbottom=lowest)
        axis.set_xlabel(x_label if lowest else "")
        axis.set_ylabel("" if index % columns else y_label)


def svg_bytes(figure: Figure, title: str, result: StudyResult, *, judged: bool = True) -> bytes:
    """Stamp a figure with the result's hash, and with the mark of an optimistic one, and write it as SVG, undated.

    Parameters
    ----------
    figure
        What to write.
    title
        Title for the file's metadata.
    result
        The result it was drawn from.
    judged
        Whether it shows how the result judges its folds: an optimistic one then marks it.
    """
    stamp = f"result {short_hash(result)}"
    foot: dict[str, Any] = {"va": "bottom", "fontsize": 7}
    figure.text(0.996, 0.012, stamp, ha="right", color=COLOURS["muted"], **foot)
    warning = mark(result) if judged else ""
    if warning:
        figure.text(
            0.004, 0.012, warning, ha="left", va="bottom", fontsize=7, weight="bold", color=COLOURS["vermillion"]
        )
    buffer = io.BytesIO()
    told = "; ".join(filter(None, (stamp, warning)))
    metadata = {"Title": f"{title} ({told})", "Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(buffer, format="svg", metadata=metadata)
    return buffer.getvalue()


def inline_svg(svg: bytes, name: str) -> str:
    """Turn an SVG file into an element of an HTML page.

    Parameters
    ----------
    svg
        What `svg_bytes` wrote.
    name
        Figure name; it prefixes every id, which must be unique on the page.

    Returns
    -------
    str
        An ``<svg>`` element without namespaces, metadata or addresses, whose colours are CSS variables.
    """
    text = svg.decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'\s+id="(?:figure|axes|patch|text|line2d|xtick|ytick|matplotlib\.axis)_[^"]*"', "", text)
    text = text.replace("xlink:href", "href")
    text = re.sub(r'(\bid="|\bhref="#|url\(#)', rf"\g<1>{name}-", text)
    for colour, value in COLOURS.items():
        text = text.replace(value, f"var(--{colour})")
    return text.replace("<svg", '<svg aria-hidden="true" focusable="false"', 1).strip()
