"""What lies around the spine: abdomen with bowel, muscle, back fat, skin and air, in the image plane."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.ndimage import gaussian_filter1d

from lbp_ray.phantom.grid import enlarge, spread
from lbp_ray.phantom.tissue import TISSUES, Contrast, signal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from lbp_ray.phantom.anatomy import Anatomy

    Field = NDArray[np.float32]

COARSE_MM = 5.0
"""Grid on which the bowel is laid out before it is interpolated to pixels."""

_SOFT_MM2 = 85.0
"""How softly neighbouring bowel loops give way to each other: the squared distance of one step in log weight."""

_LOOPS = ("bowel", "fluid", "gas", "stool", "fat", "organ")
_SHARE = (0.30, 0.10, 0.14, 0.16, 0.20, 0.10)


@dataclass(frozen=True)
class Plane:
    """Pixel centres of the image plane, mm: ``u`` of every column and ``v`` of every row."""

    u: NDArray[np.float64]
    v: NDArray[np.float64]

    @classmethod
    def square(cls, matrix: int, fov_mm: float) -> Plane:
        """Return the plane of a square image with its middle at (0, 0)."""
        axis = (np.arange(matrix, dtype=np.float64) - (matrix - 1) / 2) * (fov_mm / matrix)
        return cls(axis, axis)

    @property
    def pixel_mm(self) -> float:
        """Distance between pixel centres."""
        return float(self.u[1] - self.u[0])


class Surround:
    """The signal around the spine, per slice and contrast."""

    def __init__(self, anatomy: Anatomy, plane: Plane, contrasts: Sequence[Contrast], rng: np.random.Generator) -> None:
        self.plane, self.rng = plane, rng
        fascia, skin = back_contours(anatomy, plane.v)
        self.skin = skin
        self.fascia = fascia
        self.table = np.array([[signal(TISSUES[name], c) for c in contrasts] for name in _LOOPS], np.float32)
        tissue = {name: np.array([signal(TISSUES[name], c) for c in contrasts]) for name in TISSUES}
        self.fat, self.wall = tissue["fat"], tissue["bowel"]
        pixel = plane.pixel_mm

        def beyond(edge: NDArray[np.float64]) -> Field:
            return ((plane.u - edge[:, None]) / pixel + 0.5).clip(0, 1).astype(np.float32)

        in_fat, in_skin, in_air = beyond(fascia), beyond(skin - 1.6), beyond(skin)
        band = beyond(fascia - 1.0) * (1 - in_fat)
        self.behind = in_fat + band
        self.back = [
            (in_fat - in_skin) * np.float32(f) + (in_skin - in_air) * np.float32(k)
            for f, k in zip(tissue["fat"], tissue["skin"], strict=True)
        ]
        self.muscle = tissue["muscle"] * 1.2
        spine_u = np.interp(plane.v, anatomy.curve.v, anatomy.curve.u)
        self.front = 1 - ((plane.u - spine_u[:, None] - 10) / 8 + 0.5).clip(0, 1).astype(np.float32)
        self.columns = int(np.searchsorted(plane.u, spine_u.max() + 16))
        self._lay_out_loops()

    def _lay_out_loops(self) -> None:
        rng = self.rng
        grid = np.stack(
            np.meshgrid(np.arange(-50, 51, 33.0), np.arange(-150, 151, 27.0), np.arange(-150, 90, 27.0), indexing="ij"),
            -1,
        ).reshape(-1, 3)
        self.seeds = (grid + rng.uniform(-11, 11, grid.shape)).astype(np.float32)
        u, v = self.plane.u[: self.columns], self.plane.v
        seen = (
            (self.seeds[:, 2] < u[-1] + 20) & (self.seeds[:, 2] > u[0] - 20) & (np.abs(self.seeds[:, 1]) < v[-1] + 20)
        )
        self.seeds = self.seeds[seen]
        kind = rng.choice(len(_LOOPS), len(self.seeds), p=_SHARE)
        self.contents = self.table[kind] * rng.uniform(0.75, 1.3, (len(kind), 1)).astype(np.float32)
        self.soft = rng.uniform(0.6, 1.5, (len(kind), 2)).astype(np.float32) * np.float32(_SOFT_MM2)
        coarse_u = np.arange(u[0] - COARSE_MM, u[-1] + 2 * COARSE_MM, COARSE_MM)
        coarse_v = np.arange(v[0] - COARSE_MM, v[-1] + 2 * COARSE_MM, COARSE_MM)
        self.to_rows = spread((v - coarse_v[0]) / COARSE_MM, len(coarse_v))
        self.to_cols = spread((u - coarse_u[0]) / COARSE_MM, len(coarse_u))
        self.along = _bells(coarse_v, self.seeds[:, 1], self.soft[:, 0])
        self.across = _bells(coarse_u, self.seeds[:, 2], self.soft[:, 1])

    def slice(self, x_mm: float) -> list[Field]:
        """Signal around the spine at lateral position `x_mm`, one (rows, columns) image per contrast."""
        purity, contents = self._loops(x_mm)
        in_loop, in_lumen = _step(purity, 0.42, 0.08), _step(purity, 0.62, 0.08)
        images = []
        for contrast, content in enumerate(contents):
            image = np.empty(self.front.shape, np.float32)
            image[:, self.columns :] = self.muscle[contrast]
            fat, wall, muscle = (np.float32(part[contrast]) for part in (self.fat, self.wall, self.muscle))
            abdomen = (fat + (wall - fat) * in_loop) + (content - wall) * in_lumen
            image[:, : self.columns] = muscle + (abdomen - muscle) * self.front[:, : self.columns]
            image *= 1 - self.behind
            image += self.back[contrast]
            images.append(image)
        return images

    def _loops(self, x_mm: float) -> tuple[Field, list[Field]]:
        near = np.abs(self.seeds[:, 0] - x_mm) < 30
        here = _bells(np.array([x_mm]), self.seeds[near, 0], self.soft[near, 0])[0]
        along, across = self.along[:, near] * here, self.across[:, near].T
        total = along @ across + np.float32(1e-30)
        purity = (along**2 @ across**2) / total**2
        contents = [(along * content) @ across / total for content in self.contents[near].T]
        fine = [enlarge(self.to_rows, part, self.to_cols) for part in (purity, *contents)]
        return fine[0], fine[1:]


def _bells(axis: NDArray[np.float64], centres: Field, soft: Field) -> Field:
    """Weights of every seed along one axis, (positions, seeds); products of three make a loop."""
    exponent = -((axis[:, None].astype(np.float32) - centres) ** 2) / soft
    return np.asarray(np.exp(np.maximum(exponent, np.float32(-25))))


def _step(field: Field, at: float, width: float) -> Field:
    return ((field - np.float32(at)) * np.float32(1 / width) + np.float32(0.5)).clip(0, 1)


def back_contours(anatomy: Anatomy, v: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Where muscle ends and where skin ends behind the spine.

    Parameters
    ----------
    anatomy
        The subject.
    v
        Row positions, mm, shape (rows,).

    Returns
    -------
    tuple of numpy.ndarray
        ``u`` of the thoracolumbar fascia and of the skin at each row, mm, shape (rows,).
    """
    a = anatomy
    s = np.arange(a.s_mid[0] - 30, a.s_mid[-1] + 20, 2.0)
    contours = []
    for depth in (a.half_depth + a.fascia, a.half_depth + a.fascia + a.fat):
        u, w = a.curve.place(s, np.interp(s, a.s_mid, depth))
        order = np.argsort(w)
        dense = np.arange(-220.0, 221.0, 2.0)
        smooth = gaussian_filter1d(np.interp(dense, w[order], u[order]), 6.0)
        contours.append(np.interp(v, dense, smooth))
    return contours[0], np.maximum(contours[1], contours[0] + 3)
