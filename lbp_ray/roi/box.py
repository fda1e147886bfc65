"""One box per study: its size and place, its slices, its way back to the DICOM pixel grid, and what is cut out.

Shape suffixes: K slice offsets, S slices, H rows, W columns.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_SHIFT_MM = 20.0
"""A box that lies farther than this from where a predicted mask wants it, because the image ends, is not believed: the
lumbar region would be cut off by the image, or the mask is something else. Annotated boxes move less than 6 mm."""


class Excluded(Exception):  # noqa: N818  (a verdict on one study, never an error of the program)
    """A study that yields no crop; ``reason`` is a code, the message a detail without identifiers."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class Box(NamedTuple):
    """A box on a pixel grid: first row and column, height and width."""

    row: int
    column: int
    height: int
    width: int

    def cut(self, pixels: np.ndarray) -> np.ndarray:
        """Return the box's part of (..., rows, columns)."""
        return pixels[..., self.row : self.row + self.height, self.column : self.column + self.width]


def place_box(centroid: tuple[float, float], shape: tuple[int, int], *, height: int, width: int) -> Box:
    """Centre a box of fixed size on a centroid and shift it inside the image.

    Parameters
    ----------
    centroid
        Row and column in continuous pixel coordinates.
    shape
        Rows and columns of the image.
    height, width
        Size of the box in pixels.

    Raises
    ------
    Excluded
        If the image is smaller than the box; nothing is ever padded.
    """
    if shape[0] < height or shape[1] < width:
        detail = f"image {shape[0]} x {shape[1]}, box {height} x {width} (rows x columns)"
        raise Excluded("image_smaller_than_box", detail)
    row, column = (round(centre - size / 2) for centre, size in zip(centroid, (height, width), strict=True))
    return Box(
        int(np.clip(row, 0, shape[0] - height)), int(np.clip(column, 0, shape[1] - width)), height=height, width=width
    )


def shift_mm(box: Box, centroid: tuple[float, float], spacing_mm: tuple[float, float]) -> float:
    """Return how far a placed box's centre lies from the centroid that it was meant for.

    Parameters
    ----------
    box
        As `place_box` placed it.
    centroid
        Row and column in continuous pixel coordinates.
    spacing_mm
        Row spacing, column spacing.
    """
    return math.hypot(
        (box.row + box.height / 2 - centroid[0]) * spacing_mm[0],
        (box.column + box.width / 2 - centroid[1]) * spacing_mm[1],
    )


def size_in_pixels(size_mm: tuple[float, float], spacing_mm: tuple[float, float]) -> tuple[int, int]:
    """Return height and width, to the nearest pixel, of a box given in mm (height, width)."""
    return max(1, round(size_mm[0] / spacing_mm[0])), max(1, round(size_mm[1] / spacing_mm[1]))


def original_box(box: Box, shape: tuple[int, int], flips: tuple[bool, bool, bool]) -> Box:
    """Move a box from the pixel grid of the store back to that of the DICOM file.

    Parameters
    ----------
    box
        On the canonical image.
    shape
        Rows and columns of the canonical image.
    flips
        Transpose, flip rows, flip columns, from file to store, as the manifest has them.

    Returns
    -------
    Box
        Of the same pixels in the file; height and width are exchanged where the store is transposed.
    """
    transpose, flip_rows, flip_columns = flips
    row = shape[0] - box.row - box.height if flip_rows else box.row
    column = shape[1] - box.column - box.width if flip_columns else box.column
    return Box(column, row, box.width, box.height) if transpose else Box(row, column, box.height, box.width)


def resize(pixels: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Resample images linearly onto another number of pixels; shrinking averages over the pixels that it merges.

    Parameters
    ----------
    pixels
        (..., rows, columns) of an integer type.
    shape
        Rows and columns of the result, which spans the same field.

    Returns
    -------
    numpy.ndarray
        (..., *shape) of the same type, rounded to nearest.

    Notes
    -----
    Equal to ``torch.nn.functional.interpolate(mode="bilinear", antialias=True, align_corners=False)`` before rounding.
    """
    rows_OH, columns_OW = (_linear_weights(old, new) for old, new in zip(pixels.shape[-2:], shape, strict=True))
    resampled = np.rint(rows_OH @ pixels.astype(np.float64) @ columns_OW.T)
    return np.asarray(resampled.astype(pixels.dtype))


def _linear_weights(old: int, new: int) -> np.ndarray:
    """Share of each old pixel in each new one, (new, old): a triangle as wide as two of the coarser pixels."""
    scale = old / new
    centres = (np.arange(new) + 0.5) * scale
    distance = np.abs(np.arange(old)[None, :] + 0.5 - centres[:, None])
    weights = np.clip(1 - distance / max(scale, 1.0), 0, None)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def choose_neighbours(
    positions_mm: np.ndarray, mid_index: int, offsets_mm: Sequence[float], *, tolerance_mm: float
) -> np.ndarray:
    """Choose the slices nearest to signed offsets from the mid-sagittal one.

    Parameters
    ----------
    positions_mm
        (S,) position of each slice along the patient's right-to-left axis.
    mid_index
        The mid-sagittal slice.
    offsets_mm
        Nominal offsets, ascending.
    tolerance_mm
        Largest accepted distance from a nominal offset.

    Returns
    -------
    numpy.ndarray
        (K,) slice indices.

    Raises
    ------
    Excluded
        If an offset has no slice near enough.
    """
    distance_KS = np.abs(positions_mm[None, :] - positions_mm[mid_index] - np.asarray(offsets_mm)[:, None])
    chosen: np.ndarray = distance_KS.argmin(axis=1)
    for offset, distance in zip(offsets_mm, distance_KS.min(axis=1), strict=True):
        if distance > tolerance_mm:
            raise Excluded("neighbour_missing", f"no slice within {tolerance_mm} mm of {offset:+g} mm from the middle")
    if len(set(chosen)) < len(chosen):
        raise Excluded("neighbour_repeated", f"slices lie too far apart for a pitch of {offsets_mm} mm")
    return chosen
