"""One model of what is drawn on an image: boxes, polygons and masks, moved by flips and rasterised.

Coordinates are CVAT's: x to the right, y down, continuous; the image spans 0 to its width and height, so that pixel
centres lie at halves. A pixel belongs to a shape when its centre lies in it or on its edge: a rule that has no
preferred side, so that flipping a shape flips its pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from preprocess.geometry import canonical_pixels, canonical_point

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

LEVELS = ("L1L2", "L2L3", "L3L4", "L4L5", "L5S1")
"""Labels of the five shapes of an image, one per disc, each from mid-body to mid-body; 1 to 5 in a mask file."""

REGION = "lumbar"
"""Label of a shape that is the whole lumbar region."""

EDGE_PX = 1e-9
"""Pixel centres this near to an edge lie on it: rounding of coordinates decides nothing."""

DECIMALS = 6
"""Coordinates are rounded to as many after a flip, which is far below what anybody draws."""

Flips: TypeAlias = tuple[bool, bool, bool]
"""Transpose, flip rows, flip columns, as in `preprocess.geometry.StackGeometry`."""


@dataclass(frozen=True)
class Box:
    """A rectangle, turned by `rotation` about its centre."""

    label: str
    left: float
    top: float
    right: float
    bottom: float
    rotation: float = 0.0
    """Degrees, clockwise as seen (y points down)."""

    def corners(self) -> tuple[tuple[float, float], ...]:
        """Four (x, y), in order around the box."""
        x, y = (self.left + self.right) / 2, (self.top + self.bottom) / 2
        cos, sin = math.cos(math.radians(self.rotation)), math.sin(math.radians(self.rotation))
        edges = [(self.left, self.top), (self.right, self.top), (self.right, self.bottom), (self.left, self.bottom)]
        return tuple((x + (a - x) * cos - (b - y) * sin, y + (a - x) * sin + (b - y) * cos) for a, b in edges)


@dataclass(frozen=True)
class Polygon:
    """A closed polygon; where it overlaps itself, inside and outside alternate."""

    label: str
    points: tuple[tuple[float, float], ...]
    """(x, y) of the corners, in order."""


@dataclass(frozen=True)
class Mask:
    """Pixels inside a rectangle of whole pixels."""

    label: str
    left: int
    top: int
    width: int
    height: int
    runs: tuple[int, ...]
    """Run lengths row by row inside the rectangle, background first; they sum to its area."""

    @classmethod
    def from_pixels(cls, label: str, mask: np.ndarray) -> Mask:
        """Describe the pixels of a (rows, columns) bool array that holds at least one, by their bounding rectangle."""
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        inside = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        runs = tuple(rle_from_mask(inside))
        return cls(label, int(columns[0]), int(rows[0]), inside.shape[1], inside.shape[0], runs)


Shape: TypeAlias = Box | Polygon | Mask
"""What can be drawn."""


@dataclass(frozen=True)
class CvatImage:
    """One image and what is drawn on it."""

    name: str
    width: int
    """Pixels; 0 where the file does not say."""
    height: int
    shapes: tuple[Shape, ...]
    skipped: tuple[str, ...] = ()
    """Kinds of the shapes that this model has no place for (points, tags, cuboids, ...), once each."""
    fault: str = ""
    """Empty, or ``bad_coordinates``: a number of a shape is missing, not finite or outside what it may be."""


# --- run lengths -----------------------------------------------------------------------------------------------------


def mask_from_rle(runs: Sequence[int], shape: tuple[int, int]) -> np.ndarray:
    """Expand run lengths.

    Parameters
    ----------
    runs
        Lengths row by row, background first.
    shape
        Rows and columns.

    Returns
    -------
    numpy.ndarray
        (rows, columns) bool.

    Raises
    ------
    ValueError
        If a length is negative or they do not sum to rows x columns.
    """
    lengths = np.asarray(runs, dtype=np.int64)
    if lengths.ndim != 1 or (lengths < 0).any() or sum(map(int, lengths)) != shape[0] * shape[1]:
        msg = f"run lengths must be natural and sum to {shape[0]} x {shape[1]}, found {len(lengths)} of another sum"
        raise ValueError(msg)
    return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(shape)


def rle_from_mask(mask: np.ndarray) -> list[int]:
    """Run lengths of a (rows, columns) bool array, row by row, background first; `mask_from_rle` is the way back."""
    flat = np.asarray(mask, dtype=bool).ravel()
    edges = np.flatnonzero(np.diff(flat, prepend=False)) if len(flat) else np.zeros(0, np.int64)
    return [int(run) for run in np.diff(edges, prepend=0, append=len(flat))]


# --- pixels ----------------------------------------------------------------------------------------------------------


def rasterise(shape: Shape, size: tuple[int, int]) -> np.ndarray:
    """Find the pixels of a shape; those outside the image are left out.

    Parameters
    ----------
    shape
        Box, polygon or mask.
    size
        Rows and columns of the image.

    Returns
    -------
    numpy.ndarray
        (rows, columns) bool; empty for a shape without an area.

    Raises
    ------
    ValueError
        If the run lengths of a mask do not fit its rectangle.
    """
    if isinstance(shape, Mask):
        return _paste(shape, size)
    if isinstance(shape, Box) and not shape.rotation:
        return _fill_box(shape, size)
    if isinstance(shape, Box):
        return _fill(np.array(shape.corners()) if _has_area(shape) else np.zeros((0, 2)), size)
    return _fill(np.array(shape.points, dtype=np.float64).reshape(-1, 2), size)


def _has_area(box: Box) -> bool:
    return box.right > box.left and box.bottom > box.top


def _paste(mask: Mask, size: tuple[int, int]) -> np.ndarray:
    pixels = np.zeros(size, dtype=bool)
    inside = mask_from_rle(mask.runs, (mask.height, mask.width))
    top, left = max(mask.top, 0), max(mask.left, 0)
    bottom, right = min(mask.top + mask.height, size[0]), min(mask.left + mask.width, size[1])
    if bottom > top and right > left:
        pixels[top:bottom, left:right] = inside[
            top - mask.top : bottom - mask.top, left - mask.left : right - mask.left
        ]
    return pixels


def _fill_box(box: Box, size: tuple[int, int]) -> np.ndarray:
    rows, columns = np.arange(size[0])[:, None] + 0.5, np.arange(size[1])[None, :] + 0.5
    inside: np.ndarray = (rows >= box.top - EDGE_PX) & (rows <= box.bottom + EDGE_PX)
    inside = inside & (columns >= box.left - EDGE_PX) & (columns <= box.right + EDGE_PX)
    return inside & _has_area(box)


def _fill(points_P2: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Fill a polygon of P corners (x, y) by the even-odd rule, its edges included."""
    pixels = np.zeros(size, dtype=bool)
    if not _spans_area(points_P2):
        return pixels
    on_edge = np.zeros(size, dtype=bool)
    for (x0, y0), (x1, y1) in zip(points_P2, np.roll(points_P2, -1, axis=0), strict=True):
        rows = _centres(min(y0, y1), max(y0, y1), size[0])
        y = np.arange(rows.start, rows.stop) + 0.5
        if y0 != y1:
            crossing = x0 + (y - y0) * (x1 - x0) / (y1 - y0)
            upward = (y >= min(y0, y1)) & (y < max(y0, y1))  # a corner belongs to one of its two edges
            pixels[rows] ^= upward[:, None] & (np.arange(size[1])[None, :] + 0.5 > crossing[:, None])
        columns = _centres(min(x0, x1), max(x0, x1), size[1])
        x = np.arange(columns.start, columns.stop) + 0.5
        area = (x1 - x0) * (y[:, None] - y0) - (y1 - y0) * (x[None, :] - x0)
        on_edge[rows, columns] |= np.abs(area) <= EDGE_PX * math.hypot(x1 - x0, y1 - y0)
    return pixels | on_edge


def _centres(low: float, high: float, count: int) -> slice:
    """Pixels whose centres lie between two coordinates, edges included."""
    first = math.ceil(max(low - 0.5 - EDGE_PX, 0.0))
    last = math.floor(min(high - 0.5 + EDGE_PX, count - 1.0))
    return slice(first, max(last + 1, first))


def _spans_area(points_P2: np.ndarray) -> bool:
    """Whether the corners do not all lie on one line."""
    if len(points_P2) < 3:
        return False
    from_first = points_P2 - points_P2[0]
    along = from_first[np.hypot(from_first[:, 0], from_first[:, 1]).argmax()]
    across = from_first[:, 0] * along[1] - from_first[:, 1] * along[0]
    return bool((np.abs(across) > EDGE_PX * math.hypot(*along)).any())


# --- flips -----------------------------------------------------------------------------------------------------------


def move(shape: Shape, size: tuple[int, int], flips: Flips) -> Shape:
    """Move a shape as the pixels under it were moved on their way into the store.

    Parameters
    ----------
    shape
        Drawn on the image of the file.
    size
        Rows and columns of the stored image.
    flips
        Transpose, flip rows, flip columns, in this order.

    Returns
    -------
    Shape
        Of the same kind; edges of boxes in ascending order.
    """
    if isinstance(shape, Mask):
        return _move_mask(shape, size, flips)
    if isinstance(shape, Polygon):
        return Polygon(shape.label, tuple(_move_points(shape.points, size, flips)))
    (x0, y0), (x1, y1) = _move_points([(shape.left, shape.top), (shape.right, shape.bottom)], size, flips)
    # Every mirror image turns the other way.
    rotation = -shape.rotation if shape.rotation and sum(flips) % 2 else shape.rotation
    return Box(shape.label, min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1), rotation)


def _move_points(
    points: Iterable[tuple[float, float]], size: tuple[int, int], flips: Flips
) -> list[tuple[float, float]]:
    moved = (canonical_point(y, x, size, flips) for x, y in points)
    return [(round(column, DECIMALS) + 0.0, round(row, DECIMALS) + 0.0) for row, column in moved]


def _move_mask(mask: Mask, size: tuple[int, int], flips: Flips) -> Mask:
    transpose, flip_rows, flip_columns = flips
    pixels = canonical_pixels(
        mask_from_rle(mask.runs, (mask.height, mask.width)),
        transpose=transpose,
        flip_rows=flip_rows,
        flip_columns=flip_columns,
    )
    height, width = pixels.shape
    top, left = (mask.left, mask.top) if transpose else (mask.top, mask.left)
    top = size[0] - top - height if flip_rows else top
    left = size[1] - left - width if flip_columns else left
    return Mask(mask.label, left, top, width, height, tuple(rle_from_mask(pixels)))
