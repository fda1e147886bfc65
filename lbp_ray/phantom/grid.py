"""Grids: the canvas in spine coordinates, interpolation between grids, and textures drawn on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.sparse import csr_array
from scipy.special import expit

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Field = NDArray[np.float32]
    Labels = NDArray[np.uint8]


@dataclass(frozen=True)
class Block:
    """A window of the canvas: rows, columns, and the coordinates in it (``d`` and the body's own ``t``, mm)."""

    rows: slice
    cols: slice
    s: Field
    d: Field
    t: Field


class Grid:
    """The canvas: a regular grid in spine coordinates that covers the field of view."""

    def __init__(self, s_range: tuple[float, float], d_range: tuple[float, float], step_mm: float) -> None:
        self.step = step_mm
        self.s = np.arange(s_range[0], s_range[1], step_mm).astype(np.float32)
        self.d = np.arange(d_range[0], d_range[1], step_mm).astype(np.float32)
        self.shape = (len(self.s), len(self.d))

    def block(self, s_range: tuple[float, float], d_range: tuple[float, float], pivot: tuple[float, float]) -> Block:
        """Cut a window; `pivot` is the arc length and curvature that ``t`` is measured from and straightened with."""
        rows = slice(*np.searchsorted(self.s, s_range))
        cols = slice(*np.searchsorted(self.d, d_range))
        s, d = self.s[rows], self.d[cols]
        t = (s[:, None] - np.float32(pivot[0])) * (1 - np.float32(pivot[1]) * d)
        return Block(rows, cols, s, d, t)


def spread(position: NDArray[np.floating[Any]], count: int) -> csr_array:
    """Weights of linear interpolation at `position` (in nodes, 0 to `count` − 1) as a sparse (positions, count) matrix.

    Sparse on purpose: two weights per row are all there is, and no threaded library is woken for them.
    """
    left = np.floor(position).astype(np.int32).clip(0, count - 2)
    weight = (position - left).astype(np.float32)
    weights = np.column_stack([1 - weight, weight]).ravel()
    columns = np.column_stack([left, left + 1]).ravel()
    return csr_array((weights, columns, np.arange(0, 2 * len(left) + 1, 2)), shape=(len(left), count))


def enlarge(rows: csr_array, field: Field, columns: csr_array) -> Field:
    """Interpolate a coarse field with the weights of `spread` along rows and columns; float32."""
    return np.asarray(rows @ np.ascontiguousarray((columns @ np.ascontiguousarray(field.T)).T))


def blotches(rng: np.random.Generator, shape: tuple[int, ...], sigma: float, strength: float) -> NDArray[np.float64]:
    """Smooth noise of standard deviation `strength`; `sigma` in grid steps."""
    field = gaussian_filter(rng.standard_normal(shape), sigma)
    return np.asarray(field * (strength * (2 * np.sqrt(np.pi) * sigma) ** (field.ndim / 2)))


def fibres(rng: np.random.Generator, shape: tuple[int, int], along: float, across: float) -> Labels:
    """Noise that is long in ``s`` and fine in ``d``, as uniform bytes."""
    rows = int(shape[0] / along) + 3
    cols = int(shape[1] / across) + 3
    coarse = rng.standard_normal((rows, cols), np.float32)
    field = enlarge(spread(np.arange(shape[0]) / along, rows), coarse, spread(np.arange(shape[1]) / across, cols))
    scaled = field * np.float32(1.25 / field.std())
    return (np.float32(255.99) * expit(np.float32(1.7) * scaled)).astype(np.uint8)
