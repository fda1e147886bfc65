"""What a person looks at after training: the worst masks beside the annotations, a sample of all, the flagged ones."""

from __future__ import annotations

import io
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import ndimage

from lbp_ray.roi.contact_sheet import MASK_COLOUR, MAX_TILES, TILE_PX, chosen_rows
from lbp_ray.roi.overrides import COLUMNS as OVERRIDE_COLUMNS
from lbp_ray.roi.regions import FLAGS, mask_of
from preprocess.commit import write_atomic
from preprocess.store.png import encode_png

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import pandas as pd

WORST_CASES = 12
"""Annotated slices on the sheet of the worst."""

WORST_TILE_PX, WORST_COLUMNS = 384, 4
"""Edge of a tile, and tiles per row, on the sheet of the worst: large, because two outlines are compared on it."""

SHEET_COLUMNS = 6
"""Tiles per row on the other sheets."""

TRUE_COLOUR = (213, 94, 0)
"""Orange, around the annotated mask; the predicted one is drawn on its own pixels: masks that are equal show both."""

CAPTION_SHARE = 0.058
"""Height of a caption's letters, as a share of the tile's edge."""

CAPTION_LETTERS = 30
"""Letters that fit below a tile."""

WORST, SHEET, FLAGGED, LIST = "worst.png", "contact_sheet.png", "flagged.png", "review.csv"
"""File names in the regions artefact."""

REVIEW_COLUMNS = (
    *OVERRIDE_COLUMNS, "flags", "reasons", "series_id", "slice_index", "source", "fold", "area_mm2", "height_mm",
    "width_mm", "components", "centroid_row", "centroid_column",
)  # fmt: skip
"""Columns of the review list, one row per flagged exam: those of an override file come first, so that the list, with
its actions filled in, is one."""


@dataclass(frozen=True)
class SliceViews:
    """How a picture gets at a slice; each takes its series and its index and returns a (rows, columns) array."""

    image: Callable[[str, int], np.ndarray]
    """Stored pixel values."""
    truth: Callable[[str, int], np.ndarray]
    """Annotated mask, bool; asked for annotated slices only."""
    predicted: Callable[[str, int], np.ndarray]
    """Mask by the network that never saw the patient, bool; asked for annotated slices only."""


def write_review(folder: Path, table: pd.DataFrame, scores: pd.DataFrame, views: SliceViews) -> None:
    """Write the pictures and the review list of a regions artefact.

    Parameters
    ----------
    folder
        Receives ``worst.png``, ``contact_sheet.png``, ``review.csv`` and, where a mask is flagged, ``flagged.png``.
    table
        `lbp_ray.roi.regions.COLUMNS`.
    scores
        `lbp_ray.roi.regions.SCORE_COLUMNS`.
    views
        Images, and the two masks of the worst slices.
    """
    flagged = table[table["flags"] != ""]
    write_atomic(folder / WORST, worst_sheet(scores, views))
    write_atomic(folder / SHEET, mask_sheet(table.iloc[chosen_rows(len(table))], views.image))
    if len(flagged):
        write_atomic(folder / FLAGGED, mask_sheet(flagged.head(MAX_TILES), views.image))
    write_atomic(folder / LIST, review_rows(table).to_csv(index=False).encode())


def worst_cases(scores: pd.DataFrame) -> pd.DataFrame:
    """Return the annotated slices of the lowest Dice, the lowest first."""
    return scores.sort_values(["dice", "study_id", "slice_index"], ignore_index=True).head(WORST_CASES)


def review_rows(table: pd.DataFrame) -> pd.DataFrame:
    """Return one row per flagged exam, its reasons in words and its action left open: `REVIEW_COLUMNS`."""
    flagged = table[table["flags"] != ""]
    reasons = ["; ".join(FLAGS[code] for code in flags.split("+")) for flags in flagged["flags"]]
    return flagged.assign(reasons=reasons, **dict.fromkeys(OVERRIDE_COLUMNS[1:], ""))[list(REVIEW_COLUMNS)]


# --- pictures --------------------------------------------------------------------------------------------------------


def worst_sheet(scores: pd.DataFrame, views: SliceViews) -> bytes:
    """Draw the worst annotated slices with both outlines, Dice and centroid error, as PNG."""
    tiles = []
    for case in worst_cases(scores).itertuples():
        place = str(case.series_id), int(str(case.slice_index))
        picture = outlined(
            views.image(*place), truth=views.truth(*place), mask=views.predicted(*place), edge_px=WORST_TILE_PX
        )
        tiles.append((picture, (f"Dice {case.dice:.3f} · {case.centroid_error_mm:.1f} mm off", str(case.study_id))))
    return _sheet(tiles, WORST_COLUMNS)


def mask_sheet(table: pd.DataFrame, image: Callable[[str, int], np.ndarray]) -> bytes:
    """Draw exams with their predicted masks and flags as PNG.

    Parameters
    ----------
    table
        Rows of `lbp_ray.roi.regions.COLUMNS`.
    image
        (series, slice index) → stored pixel values.
    """
    tiles = []
    for row in table.to_dict("records"):
        picture = outlined(image(row["series_id"], row["slice_index"]), mask=mask_of(row), edge_px=TILE_PX)
        told = textwrap.wrap(row["flags"].replace("+", " + "), CAPTION_LETTERS)
        tiles.append((picture, (*told, row["study_id"])))
    return _sheet(tiles, SHEET_COLUMNS)


def outlined(
    image_HW: np.ndarray, *, mask: np.ndarray, truth: np.ndarray | None = None, edge_px: int = TILE_PX
) -> np.ndarray:
    """Draw a slice in its own proportions, with the thin outlines of its masks: a pixel per `TILE_PX` of the edge.

    Parameters
    ----------
    image_HW
        Stored pixel values.
    mask
        (H, W) bool, the predicted mask: its outermost pixels are sky blue.
    truth
        (H, W) bool, the annotated mask: the pixels around it are orange; None draws none.
    edge_px
        Edge of the square picture.

    Returns
    -------
    numpy.ndarray
        (edge_px, edge_px, 3) uint8; grey between the 1st and 99th percentile, black beside images that are not square.
    """
    scale = edge_px / max(image_HW.shape)
    grid = np.ix_(*((np.arange(round(size * scale)) / scale).astype(int) for size in image_HW.shape))
    low, high = np.percentile(image_HW, [1, 99])
    grey = np.clip((image_HW[grid] - low) / max(high - low, 1e-9), 0, 1)
    picture = np.zeros((edge_px, edge_px, 3), dtype=np.uint8)
    inside = picture[: grey.shape[0], : grey.shape[1]]
    inside[...] = (grey * 255).astype(np.uint8)[..., None]
    line_px = max(edge_px // TILE_PX, 1)
    if truth is not None:
        inside[ndimage.binary_dilation(truth[grid], iterations=line_px) & ~truth[grid]] = TRUE_COLOUR
    inside[mask[grid] & ~ndimage.binary_erosion(mask[grid], iterations=line_px)] = MASK_COLOUR
    return picture


def _sheet(tiles: Sequence[tuple[np.ndarray, tuple[str, ...]]], columns: int) -> bytes:
    """Arrange pictures with the lines below them in rows and encode them."""
    num_lines = max(len(lines) for _, lines in tiles)
    done = [np.concatenate([picture, _caption(lines, num_lines, picture.shape[1])]) for picture, lines in tiles]
    columns = min(columns, len(done))
    done += [np.zeros_like(done[0])] * (-len(done) % columns)
    rows = [np.concatenate(done[start : start + columns], axis=1) for start in range(0, len(done), columns)]
    return encode_png(np.concatenate(rows))


def _caption(lines: tuple[str, ...], num_lines: int, width_px: int) -> np.ndarray:
    """Write lines in white on black: (height, width_px, 3) uint8."""
    letter_px = round(CAPTION_SHARE * width_px)
    height_px = round(1.5 * letter_px * num_lines + 0.7 * letter_px)
    figure = Figure(figsize=(width_px / 100, height_px / 100), dpi=100, facecolor="black")
    FigureCanvasAgg(figure)
    for number, line in enumerate(lines):
        y = 1 - (number + 0.9) * 1.5 * letter_px / height_px
        figure.text(0.02, y, line, color="white", fontsize=letter_px * 0.72, family="DejaVu Sans")
    pixels = io.BytesIO()
    figure.savefig(pixels, format="raw", dpi=100, facecolor="black")
    return np.frombuffer(pixels.getvalue(), np.uint8).reshape(height_px, width_px, 4)[..., :3]
