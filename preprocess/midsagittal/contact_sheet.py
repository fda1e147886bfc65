"""Contact sheet of mid-sagittal choices: each chosen slice between its neighbours, what needs a look first.

Self-contained HTML pages (pictures inlined as PNG) and one PNG overview. They hold pseudonyms and pixels only, no
script, no time: equal choices give equal bytes.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass, fields
from heapq import nsmallest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from preprocess.store.png import encode_png

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MAX_STUDIES = 1000
"""Studies on all pages: the flagged, the corrected, then a sample of the others. Smaller cohorts are shown whole."""

PAGE_STUDIES = 100
"""Studies on one page, about 5 MB of pictures."""

SAMPLE_SEED = 0
"""Seed of the sample: it is the studies whose hash with the seed is smallest, whatever else is in the store."""

TILE_PX = 160
"""Edge of one picture."""

GREY_LEVELS = 64
"""Grey levels of a picture: fewer than a screen shows, and half the bytes."""

OVERVIEW_COLUMNS, OVERVIEW_STUDIES = 12, 120
"""Chosen slices per row of the overview, and in all of it."""

FLAG_COLOUR = (230, 159, 0)
"""Frame of flagged studies in the overview."""

TEMPLATE = "contact_sheet.html.j2"


@dataclass(frozen=True)
class Card:
    """One study of the sheet."""

    study_id: str
    series_id: str
    slice_index: int
    found_index: int
    num_slices: int
    source: str
    flagged: bool
    score: float
    confidence: float
    margin: float


def choose_cards(choices: Any) -> list[Card]:  # noqa: ANN401  (pyarrow has no types)
    """Choose which studies a sheet shows, in its order.

    Parameters
    ----------
    choices
        Arrow table with the fields of `Card`.

    Returns
    -------
    list of Card
        At most `MAX_STUDIES`: the flagged by ascending margin, the corrected, then a seeded sample of the others.
    """
    table = choices.select([field.name for field in fields(Card)])
    is_corrected = pc.field("source") == "correction"
    flagged = table.filter(pc.field("flagged")).sort_by([("margin", "ascending"), ("study_id", "ascending")])
    corrected = table.filter(is_corrected).sort_by("study_id")
    others = table.filter(~pc.field("flagged") & ~is_corrected)
    first = _cards(pa.concat_tables([flagged, corrected]).slice(0, MAX_STUDIES))
    drawn = nsmallest(MAX_STUDIES - len(first), range(others.num_rows), key=_draw_key(others["study_id"].to_pylist()))
    return first + _cards(others.take(pa.array(drawn, pa.int64())).sort_by("study_id"))


def _cards(table: Any) -> list[Card]:  # noqa: ANN401  (pyarrow has no types)
    return [Card(**row) for row in table.to_pylist()]


def _draw_key(study_ids: Sequence[str]) -> Any:  # noqa: ANN401  (a sort key)
    return lambda row: hashlib.sha256(f"{SAMPLE_SEED}/{study_ids[row]}".encode()).digest()


# --- pictures --------------------------------------------------------------------------------------------------------


def make_strip(volume_SHW: np.ndarray, index: int, spacing_mm: tuple[float, float]) -> np.ndarray:
    """Draw a slice between its neighbours.

    Parameters
    ----------
    volume_SHW
        Canonical stack.
    index
        The slice in the middle.
    spacing_mm
        Row spacing, then column spacing: pictures have the proportions of the body.

    Returns
    -------
    numpy.ndarray
        (TILE_PX, 3 * TILE_PX) uint8; one grey window for the three; black where there is no neighbour.
    """
    low, high = np.percentile(volume_SHW[index], [1, 99])
    strip = np.zeros((TILE_PX, 3 * TILE_PX), np.uint8)
    for place, number in enumerate((index - 1, index, index + 1)):
        if 0 <= number < len(volume_SHW):
            grey = (_fit(volume_SHW[number], spacing_mm) - low) / max(high - low, 1e-9)
            levels = (np.clip(grey, 0, 1) * (GREY_LEVELS - 1)).round() * (255 / (GREY_LEVELS - 1))
            top, left = (TILE_PX - levels.shape[0]) // 2, (TILE_PX - levels.shape[1]) // 2
            tile = strip[:, place * TILE_PX : (place + 1) * TILE_PX]
            tile[top : top + levels.shape[0], left : left + levels.shape[1]] = levels.astype(np.uint8)
    return strip


def _fit(image_HW: np.ndarray, spacing_mm: tuple[float, float]) -> np.ndarray:
    """Average an image onto at most TILE_PX x TILE_PX square pixels."""
    size_mm = np.multiply(image_HW.shape, spacing_mm)
    height, width = np.maximum(1, np.round(size_mm * TILE_PX / size_mm.max()).astype(int))
    return _average(_average(image_HW.astype(np.float64), height).T, width).T


def _average(values: np.ndarray, size: int) -> np.ndarray:
    """Average along the first axis onto `size` equal parts."""
    edges = np.linspace(0, len(values), size + 1)
    whole = np.minimum(edges.astype(int), len(values) - 1)
    sums = np.concatenate([np.zeros_like(values[:1]), values.cumsum(axis=0)])
    at_edges = sums[whole] + (edges - whole)[:, None] * values[whole]
    return np.asarray(np.diff(at_edges, axis=0) / np.diff(edges)[:, None])


# --- pages -----------------------------------------------------------------------------------------------------------


def draw_sheet(cards: Sequence[Card], strips: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> dict[str, bytes]:
    """Draw all pages and the overview.

    Parameters
    ----------
    cards
        What is shown, in order; at least one.
    strips
        Series → `make_strip`.
    facts
        ``artefact_id``, ``store`` (hash), ``studies``, ``flagged``, ``corrections``, ``templates`` and ``thresholds``.

    Returns
    -------
    dict
        File name → content: ``contact_sheet.html``, ``contact_sheet_2.html``, …, and ``contact_sheet.png``.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template(TEMPLATE)
    starts = range(0, len(cards), PAGE_STUDIES)
    names = [f"contact_sheet{f'_{number}' if number > 1 else ''}.html" for number in range(1, len(starts) + 1)]
    files = {"contact_sheet.png": encode_png(_overview(cards, strips))}
    for name, start in zip(names, starts, strict=True):
        members = cards[start : start + PAGE_STUDIES]
        images = [base64.b64encode(encode_png(strips[card.series_id])).decode() for card in members]
        page = template.render(
            shown=list(zip(members, images, strict=True)), facts=facts, names=names, name=name, total=len(cards)
        )
        files[name] = page.encode()
    return files


def _overview(cards: Sequence[Card], strips: Mapping[str, np.ndarray]) -> np.ndarray:
    """Arrange chosen slices in rows: (rows, columns, 3) uint8, flagged ones in an amber frame."""
    shown = cards[:OVERVIEW_STUDIES]
    columns = min(OVERVIEW_COLUMNS, len(shown))
    picture = np.zeros((-(-len(shown) // columns) * TILE_PX, columns * TILE_PX, 3), np.uint8)
    for number, card in enumerate(shown):
        row, column = (TILE_PX * place for place in divmod(number, columns))
        tile = picture[row : row + TILE_PX, column : column + TILE_PX]
        tile[:] = strips[card.series_id][:, TILE_PX : 2 * TILE_PX, None]
        if card.flagged:
            for edge in (tile[:3], tile[-3:], tile[:, :3], tile[:, -3:]):
                edge[:] = FLAG_COLOUR
    return picture
