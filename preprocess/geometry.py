"""Slice order, spacing, affine and canonical orientation of one stack, from positions and orientations alone.

Millimetres in the patient frame of DICOM (LPS: +x to the patient's left, +y posterior, +z cranial). Instance numbers,
slice locations and file names are never asked. Nothing is resampled: a canonical stack differs from the files by
slice order, one optional transpose and flips.

References
----------
DICOM PS3.3, C.7.6.2 (image plane module).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from preprocess.headers.index import FileRow

UNIT_TOLERANCE = 1e-2
"""How far direction cosines may be from unit length, and from perpendicular, to be orientations at all."""

SPACING_TOLERANCE = 0.01
"""Share of the median pitch by which slice distances may differ without a word."""

SPACING_TOLERANCE_MM = 0.01
"""The same in mm, whichever is larger: rounding of position strings."""

SPACING_LIMIT = 0.10
"""Share of the pitch above which a stack is refused (``gap`` near a multiple of the pitch, else ``uneven_spacing``)."""

SAME_POSITION_MM = 0.01
"""Slices closer than this are at one position."""

CANONICAL_AXES = {0: (0, 2, 1), 1: (1, 2, 0), 2: (2, 1, 0)}
"""Dominant patient axis of the slice normal → patient axes of (slice, row index, column index)."""

CANONICAL_SIGNS = {0: (1, -1, 1), 1: (1, -1, 1), 2: (1, 1, 1)}
"""Signs to `CANONICAL_AXES`. Sagittal: slices right → left, rows cranial → caudal, columns anterior → posterior."""


class GeometryError(ValueError):
    """A stack that cannot be ordered; the message is its error code."""


@dataclass(frozen=True)
class StackGeometry:
    """A stack in canonical orientation."""

    order: tuple[int, ...]
    """Index into the stack's rows for each canonical slice."""
    positions_mm: tuple[float, ...]
    """Position of each slice along the normal, relative to the first, increasing."""
    spacing_slice_mm: float
    """Median distance of neighbouring slices along the normal."""
    spacing_row_mm: float
    """Distance of neighbouring rows of the canonical image."""
    spacing_column_mm: float
    """Distance of neighbouring columns of the canonical image."""
    affine: tuple[float, ...]
    """Row-major 4 x 4: (slice, row, column, 1) → LPS mm relative to the first pixel of the first slice."""
    transpose: bool
    """Rows and columns of the stored image are exchanged first."""
    flip_rows: bool
    """Then the row order is reversed."""
    flip_columns: bool
    """Then the column order is reversed."""
    uneven: bool
    """Distances vary by more than the tolerance, but less than the limit."""
    missing_mm: tuple[float, ...] = ()
    """Positions along the normal, relative to the first slice, at which a slice is missing (gaps must be allowed)."""


def slice_normal(orientation: Sequence[float]) -> np.ndarray:
    """Return the unit normal (3,) of an image plane: row direction x column direction.

    Parameters
    ----------
    orientation
        Image Orientation (Patient), six cosines.

    Raises
    ------
    GeometryError
        ``no_geometry`` if the cosines are no pair of perpendicular unit vectors.
    """
    if len(orientation) != 6:
        raise GeometryError("no_geometry")
    along_row, along_column = np.asarray(orientation[:3]), np.asarray(orientation[3:])
    lengths = np.linalg.norm([along_row, along_column], axis=1)
    if np.any(np.abs(lengths - 1) > UNIT_TOLERANCE) or abs(along_row @ along_column) > UNIT_TOLERANCE:
        raise GeometryError("no_geometry")
    normal = np.cross(along_row, along_column)
    return np.asarray(normal / np.linalg.norm(normal))


def stack_geometry(rows: Sequence[FileRow], *, allow_gaps: bool = False) -> StackGeometry:
    """Order a stack along its true normal and bring it to canonical orientation.

    Parameters
    ----------
    rows
        Headers of parallel, equally large slices, in any order.
    allow_gaps
        Accept a stack in which slices are missing, and say where.

    Returns
    -------
    StackGeometry
        The plan; `canonical_pixels` carries it out.

    Raises
    ------
    GeometryError
        ``no_geometry``, ``duplicate_position``, ``gap`` or ``uneven_spacing``.
    """
    if any(not row.position_mm or not row.spacing_mm or min(row.spacing_mm) <= 0 for row in rows):
        raise GeometryError("no_geometry")
    reference = min(rows, key=lambda row: row.orientation)
    normal = slice_normal(reference.orientation)
    axis = int(np.argmax(np.abs(normal)))
    normal = normal * np.sign(normal[axis]) * CANONICAL_SIGNS[axis][0]
    points = np.array([row.position_mm for row in rows])
    along = points @ normal
    order = np.argsort(along, kind="stable")
    sorted_mm = along[order] - along[order[0]]
    pitch, uneven, multiples = _pitch(sorted_mm, allow_gaps=allow_gaps)
    step = (points[order[-1]] - points[order[0]]) / multiples.sum() if len(rows) > 1 else normal * pitch
    plane = _canonical_plane(reference, axis)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = step, plane.row_step, plane.column_step
    return StackGeometry(
        order=tuple(int(index) for index in order),
        positions_mm=tuple(_rounded(sorted_mm)),
        spacing_slice_mm=_rounded([pitch])[0],
        spacing_row_mm=_rounded([float(np.linalg.norm(plane.row_step))])[0],
        spacing_column_mm=_rounded([float(np.linalg.norm(plane.column_step))])[0],
        affine=tuple(_rounded(affine.ravel())),
        transpose=plane.transpose,
        flip_rows=plane.flip_rows,
        flip_columns=plane.flip_columns,
        uneven=uneven,
        missing_mm=tuple(_rounded(_missing(sorted_mm, multiples))),
    )


def _pitch(sorted_mm: np.ndarray, *, allow_gaps: bool) -> tuple[float, bool, np.ndarray]:
    """Median distance of sorted positions, whether they are merely nearly even, and each distance in pitches."""
    if len(sorted_mm) == 1:
        return 0.0, False, np.empty(0)
    distances = np.diff(sorted_mm)
    if distances.min() < SAME_POSITION_MM:
        raise GeometryError("duplicate_position")
    pitch = float(np.median(distances))
    multiples = (distances / pitch).round()
    if np.any(multiples < 1) or np.any(np.abs(distances - multiples * pitch) > SPACING_LIMIT * pitch):
        raise GeometryError("uneven_spacing")
    if multiples.max() > 1 and not allow_gaps:
        raise GeometryError("gap")
    deviation = np.abs(distances - multiples * pitch)
    return pitch, bool(deviation.max() > max(SPACING_TOLERANCE * pitch, SPACING_TOLERANCE_MM)), multiples


def _missing(sorted_mm: np.ndarray, multiples: np.ndarray) -> list[float]:
    """Positions of missing slices, spread evenly over the distances that are several pitches long."""
    spans = zip(sorted_mm[:-1], sorted_mm[1:], multiples.astype(int), strict=True)
    return [float(low + (high - low) * number / count) for low, high, count in spans for number in range(1, int(count))]


@dataclass(frozen=True)
class _Plane:
    row_step: np.ndarray
    """LPS mm from one canonical row to the next."""
    column_step: np.ndarray
    transpose: bool
    flip_rows: bool
    flip_columns: bool


def _canonical_plane(row: FileRow, normal_axis: int) -> _Plane:
    # DICOM's pair: the first three cosines run along increasing column index, the first spacing is between rows.
    column_step = np.asarray(row.orientation[:3]) * row.spacing_mm[1]
    row_step = np.asarray(row.orientation[3:]) * row.spacing_mm[0]
    _, row_axis, column_axis = CANONICAL_AXES[normal_axis]
    _, row_sign, column_sign = CANONICAL_SIGNS[normal_axis]
    unit_row, unit_column = np.abs(row.orientation[3:]), np.abs(row.orientation[:3])
    straight, crossed = unit_row[row_axis] + unit_column[column_axis], unit_row[column_axis] + unit_column[row_axis]
    transpose = bool(crossed > straight)
    if transpose:
        row_step, column_step = column_step, row_step
    flip_rows = bool(np.sign(row_step[row_axis]) == -row_sign)
    flip_columns = bool(np.sign(column_step[column_axis]) == -column_sign)
    row_step = -row_step if flip_rows else row_step
    column_step = -column_step if flip_columns else column_step
    return _Plane(row_step, column_step, transpose, flip_rows, flip_columns)


def canonical_pixels(image_HW: np.ndarray, *, transpose: bool, flip_rows: bool, flip_columns: bool) -> np.ndarray:
    """Bring one image from DICOM's rows and columns to canonical ones (a view).

    Parameters
    ----------
    image_HW
        Stored pixels as in the file; more axes may follow.
    transpose, flip_rows, flip_columns
        As in `StackGeometry`, applied in this order.
    """
    image = np.swapaxes(image_HW, 0, 1) if transpose else image_HW
    return image[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]


def canonical_point(
    row: float, column: float, shape: tuple[int, int], flips: tuple[bool, bool, bool]
) -> tuple[float, float]:
    """Move a point from continuous pixel coordinates of the file to those of the canonical image.

    Parameters
    ----------
    row, column
        Continuous coordinates: the image spans 0 to its number of rows or columns, pixel centres lie at halves.
    shape
        Rows and columns of the canonical image.
    flips
        Transpose, flip rows, flip columns, as in `StackGeometry`.
    """
    transpose, flip_rows, flip_columns = flips
    row, column = (column, row) if transpose else (row, column)
    return (shape[0] - row if flip_rows else row), (shape[1] - column if flip_columns else column)


def _rounded(values: Sequence[float] | np.ndarray) -> list[float]:
    """Round to a micrometre: positions are printed with no more, and sums stop depending on slice order. No -0.0."""
    return [float(value) + 0.0 for value in np.round(values, 6)]
