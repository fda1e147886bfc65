"""A picture of what was cropped: mid-sagittal slices with their boxes, one tile per study."""

from __future__ import annotations

import numpy as np

from preprocess.store.png import encode_png

MAX_TILES = 24
"""Studies on one sheet, spread evenly over the cohort."""

TILE_PX = 192
"""Edge of a tile, in pixels of the sheet."""

COLUMNS = 8
"""Tiles per row of the sheet."""

BOX_COLOUR = (230, 159, 0)
"""Amber."""

MASK_COLOUR = (86, 180, 233)
"""Sky blue: outline of a predicted or corrected mask."""


def chosen_rows(num_studies: int) -> list[int]:
    """Return the rows of the studies that a sheet shows."""
    return sorted({round(row) for row in np.linspace(0, num_studies - 1, min(MAX_TILES, num_studies))})


def tile(
    image_HW: np.ndarray, box: tuple[int, int, int, int] | None = None, mask_HW: np.ndarray | None = None
) -> np.ndarray:
    """Draw one image with its box and the outline of its mask, in its own proportions.

    Parameters
    ----------
    image_HW
        Stored pixel values.
    box
        First row, first column, height and width in pixels of the image; None draws no box.
    mask_HW
        Bool, of the image's shape; None draws no outline.

    Returns
    -------
    numpy.ndarray
        (TILE_PX, TILE_PX, 3) uint8; grey scaled between the 1st and 99th percentile, black beside images that are not
        square, the box in `BOX_COLOUR`, the outline in `MASK_COLOUR`.
    """
    low, high = np.percentile(image_HW, [1, 99])
    scale = TILE_PX / max(image_HW.shape)
    rows, columns = ((np.arange(round(size * scale)) / scale).astype(int) for size in image_HW.shape)
    grey = np.clip((image_HW[np.ix_(rows, columns)] - low) / max(high - low, 1e-9), 0, 1)
    picture = np.zeros((TILE_PX, TILE_PX, 3), dtype=np.uint8)
    picture[: len(rows), : len(columns)] = (grey * 255).astype(np.uint8)[..., None]
    if mask_HW is not None:
        picture[: len(rows), : len(columns)][_outline(mask_HW[np.ix_(rows, columns)])] = MASK_COLOUR
    if box is None:
        return picture
    top, left = np.clip(np.round(scale * np.array(box[:2])).astype(int), 0, TILE_PX - 1)
    bottom, right = np.clip(np.round(scale * np.add(box[:2], box[2:])).astype(int), 0, TILE_PX - 1)
    picture[[top, bottom], left : right + 1] = picture[top : bottom + 1, [left, right]] = BOX_COLOUR
    return picture


def _outline(mask_HW: np.ndarray) -> np.ndarray:
    """Pixels of a mask that have a neighbour outside it; the image's edge is outside."""
    padded = np.pad(mask_HW, 1)
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return np.asarray(mask_HW & ~inside)


def contact_sheet(tiles: list[np.ndarray]) -> bytes:
    """Arrange tiles in rows and encode them as PNG."""
    blank = np.zeros_like(tiles[0])
    padded = tiles + [blank] * (-len(tiles) % COLUMNS if len(tiles) > COLUMNS else 0)
    width = min(COLUMNS, len(padded))
    rows = [np.concatenate(padded[start : start + width], axis=1) for start in range(0, len(padded), width)]
    return encode_png(np.concatenate(rows, axis=0))
