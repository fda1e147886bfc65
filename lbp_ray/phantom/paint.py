"""Materials of one thin sagittal plane, painted in spine coordinates.

In those coordinates a body is nearly a rectangle and the canal a straight band, so each structure is a few comparisons
between a field that is computed once per subject and a number that depends on the plane's lateral position ``x``.
Fields have the shape (rows along ``s``, columns along ``d``); later paint covers earlier paint.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import expit

from lbp_ray.phantom.anatomy import FIRST_LUMBAR, SACRUM, SEGMENTS, Anatomy
from lbp_ray.phantom.column import Body, DiscShape
from lbp_ray.phantom.grid import Grid, blotches, fibres
from lbp_ray.phantom.posterior import Arch, build_arches
from lbp_ray.phantom.tissue import TISSUES, Palette, Tissue

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]
    Field = NDArray[np.float32]
    Labels = NDArray[np.uint8]

_MUSCLE = [("muscle", 0.02), ("muscle", 0.06), ("muscle", 0.13), ("muscle", 0.28), ("fat", 0.55)]
_MIDLINE = [("loose", 0.22), ("loose", 0.36), ("loose", 0.46), ("loose", 0.56), ("fat", 0.70)]
"""Tissue between muscle fibres, and between spinous processes: base and fat fraction, from frequent to rare."""


@dataclass(frozen=True)
class Vessel:
    """A great vessel: lateral position, radius (mm), arc length at which it forks."""

    x_mm: float
    radius_mm: float
    fork_s: float


class Painter:
    """Paints any sagittal plane of one subject.

    Parameters
    ----------
    anatomy
        The subject.
    grid
        The canvas in spine coordinates.
    palette
        Materials; the subject's own are added to it.
    streams
        Two random streams: the look of this subject's marrow, and the grain of soft tissue.
    """

    def __init__(
        self, anatomy: Anatomy, grid: Grid, palette: Palette, streams: tuple[np.random.Generator, np.random.Generator]
    ) -> None:
        look, grain = streams
        self.anatomy, self.grid, self.palette = anatomy, grid, palette
        self.bodies = [Body(anatomy, k, grid, palette, look) for k in range(len(SEGMENTS))]
        self.discs = [DiscShape(anatomy, k, grid, palette, grain) for k in range(SACRUM)]
        self.arches: list[Arch] = build_arches(anatomy, grid, palette)
        self._lay_out_rows(grain)
        self._lay_out_textures(grain)

    def _lay_out_rows(self, grain: np.random.Generator) -> None:
        """Compute what varies along the spine only: depths, canal, sac, cord, vessels."""
        a, s = self.anatomy, self.grid.s

        def interp(values: Array) -> Field:
            return np.interp(s, a.s_mid, values).astype(np.float32)

        self.half_depth, self.half_width = interp(a.half_depth), interp(a.half_width)
        self.x0 = a.lateral_shift(s.astype(np.float64)).astype(np.float32)
        taper = np.ones(len(SEGMENTS))
        taper[SACRUM:] = np.array([0.9, 0.62, 0.42, 0.3, 0.2, 0.1, 0.1, 0.1])
        self.canal = interp(a.canal_mm * taper)
        sac = np.ones(len(SEGMENTS))
        sac[SACRUM:] = np.array([0.80, 0.42, 0, 0, 0, 0, 0, 0])
        self.sac = interp(0.47 * a.canal_mm * sac)
        gap = 1.0 + 0.8 * np.linspace(0, 1, len(SEGMENTS)) ** 2
        gap[SACRUM:] += np.array([2.0, 2.5, 1, 0, 0, 0, 0, 0])
        self.gap = interp(gap)
        discs_s = a.s_mid[:-1] + a.height[:-1] / 2 + a.disc_height[:-1] / 2
        bumps = np.exp(-(((s[:, None] - discs_s[None, :SACRUM]) / 7.0) ** 2)).sum(1)
        self.pad = (1.0 + 4.2 * bumps).astype(np.float32)
        self.cord = self._cord_radius()
        self.apron = (3.2 + blotches(grain, s.shape, 14 / self.grid.step, 1.0)[: len(s)]).clip(0.8).astype(np.float32)
        aorta_x, radius, vein_x = a.vessel
        self.vessels = (
            Vessel(aorta_x, radius, float(a.s_mid[FIRST_LUMBAR + 3])),
            Vessel(vein_x, radius * 1.05, float(a.s_mid[FIRST_LUMBAR + 4])),
        )

    def _lay_out_textures(self, grain: np.random.Generator) -> None:
        """Draw the textures that every slice takes another part of, and the materials they stand for."""
        palette, step = self.palette, self.grid.step
        shape = (2 * self.grid.shape[0], self.grid.shape[1])
        self.fibres = fibres(grain, shape, 9.0 / step, 1.0 / step)
        self.strands = fibres(grain, shape, 16.0 / step, 0.6 / step)
        self.weave = fibres(grain, shape, 2.6 / step, 4.0 / step)
        self.muscle = _ramp(palette, _MUSCLE, (0.5, 0.75, 0.86, 0.94))
        self.midline = _ramp(palette, _MIDLINE, (0.15, 0.35, 0.6, 0.85))
        self.scar = np.uint8(palette.add(Tissue(0.45, 800, 38, 0.12)))
        self.roots = np.where(np.arange(256) < 92, palette["nerve"], palette["csf"]).astype(np.uint8)

    def _cord_radius(self) -> Field:
        below = (self.grid.s - np.float32(self.anatomy.conus_s)) / 26.0
        swell = 4.1 + 0.5 * np.exp(-(((below + 0.9) / 0.5) ** 2))
        taper = expit(-(below + 0.25) * 7)
        return np.asarray(swell * taper * self.anatomy.pose.scale, np.float32)

    def plane(self, x_mm: float, offset: tuple[int, int]) -> Labels:
        """Paint the plane at lateral position `x_mm`.

        Parameters
        ----------
        x_mm
            Lateral position, patient left positive, 0 in the mid-sagittal plane.
        offset
            Row offsets into the two fibre textures: another pair, another texture.

        Returns
        -------
        numpy.ndarray
            Material numbers on the grid, uint8.
        """
        canvas = np.zeros(self.grid.shape, np.uint8)
        lateral = np.float32(x_mm) - self.x0
        off = np.abs(lateral)
        self._paint_front(canvas, lateral)
        self._paint_back(canvas, off, offset)
        self._paint_canal(canvas, off, offset)
        for arch in self.arches:
            arch.paint(canvas, x_mm)
        self._paint_sacrum(canvas, off)
        for disc in self.discs:
            disc.paint(canvas, x_mm)
        for body in self.bodies:
            body.paint(canvas, x_mm)
        return canvas

    def _paint_sacrum(self, canvas: Labels, off: Field) -> None:
        """Fill what lies between the fused segments; their marrow is painted over it."""
        a = self.anatomy
        rows = slice(*np.searchsorted(self.grid.s, (a.s_mid[SACRUM], a.s_mid[-1])))
        half = self.half_depth[rows] * (1 - (off[rows] / self.half_width[rows]).clip(0, 1) ** 3)
        cols = slice(*np.searchsorted(self.grid.d, (-20.0, 20.0)))
        inside = np.abs(self.grid.d[cols]) < (half - 0.3)[:, None]
        np.copyto(canvas[rows, cols], self.scar, where=inside)

    def _paint_front(self, canvas: Labels, lateral: Field) -> None:
        a, d, off = self.anatomy, self.grid.d, np.abs(lateral)
        stop = int(np.searchsorted(d, 2.0))
        view, d = canvas[:, :stop], d[:stop]
        profile = (1 - (off / (self.half_width + 3)) ** 2).clip(0) ** 0.5
        front = -(self.half_depth * profile)
        np.copyto(view, self.palette["fat"], where=(d > (front - self.apron)[:, None]) & (profile > 0)[:, None])
        np.copyto(view, self.palette["ligament"], where=(d > (front - 0.9)[:, None]) & (profile > 0.25)[:, None])
        side = off > self.half_width * 0.93
        if side.any():
            psoas = ((self.grid.s - a.s_mid[FIRST_LUMBAR]) / 60).clip(0, 1) * 20
            np.copyto(view, self.palette["muscle"], where=side[:, None] & (d > -psoas[:, None]))
        for vessel in self.vessels:
            self._paint_vessel(view, d, lateral, vessel)

    def _paint_vessel(self, view: Labels, d: Field, lateral: Field, vessel: Vessel) -> None:
        """Paint a vertical tube in front of the bodies that veers sideways below where it forks."""
        below = (self.grid.s - np.float32(vessel.fork_s)).clip(0)
        off = lateral - np.float32(vessel.x_mm) - np.float32(np.sign(vessel.x_mm) * 0.55) * below
        radius = np.where(below > 0, 0.62, 1.0) * vessel.radius_mm
        half = ((radius**2 - off**2).clip(0) ** 0.5).astype(np.float32)
        away = np.abs(d + (self.half_depth + np.float32(vessel.radius_mm + 2.5))[:, None])
        np.copyto(view, self.palette["vessel_wall"], where=away < half[:, None])
        np.copyto(view, self.palette["vessel"], where=away < (half - 1)[:, None])

    def _paint_back(self, canvas: Labels, off: Field, offset: tuple[int, int]) -> None:
        start = int(np.searchsorted(self.grid.d, 2.0))
        view = canvas[:, start:]
        grain = self.fibres[offset[0] : offset[0] + canvas.shape[0], start:]
        middle = off < 2.9
        view[:] = self.muscle[grain]
        if middle.any():
            weave = self.weave[offset[1] : offset[1] + canvas.shape[0], start:]
            view[middle] = self.midline[weave[middle]]

    def _paint_canal(self, canvas: Labels, off: Field, offset: tuple[int, int]) -> None:
        p = self.palette
        start, stop = np.searchsorted(self.grid.d, (0.0, float((self.half_depth + self.canal).max()) + 10))
        view, d = canvas[:, start:stop], self.grid.d[start:stop]
        wall = self.half_depth + self.gap + self.canal
        narrow = (off < 19).astype(np.float32)
        pad = self.pad * (1 - (off / 9).clip(0, 1) ** 2)
        behind = wall + pad
        np.copyto(view, p["ligament"], where=(d < (behind + 1.3 * narrow)[:, None]) & (narrow > 0)[:, None])
        np.copyto(view, p["fat"], where=(d < behind[:, None]) & (narrow > 0)[:, None])
        width = 9.6 * self.anatomy.pose.scale
        half = self.sac * (1 - (off / width) ** 2).clip(0) ** 0.5
        centre = self.half_depth + self.gap + self.sac
        away = np.abs(d - centre[:, None])
        np.copyto(view, p["dura"], where=away < (half + 0.35 * (half > 0))[:, None])
        inside = away < (half - 0.25)[:, None]
        strands = self.strands[offset[1] : offset[1] + canvas.shape[0], start:stop]
        np.copyto(view, p["csf"], where=inside)
        fall = ((self.grid.s - self.anatomy.conus_s) / 110).clip(0, 1)
        sunk = centre + (0.42 - 0.25 * fall) * half
        below = (self.grid.s > self.anatomy.conus_s - 22) & (self.sac > 3)
        bundle = (np.abs(d - sunk[:, None]) < ((0.52 + 0.12 * fall) * half)[:, None]) & below[:, None] & inside
        np.copyto(view, self.roots[strands], where=bundle)
        cord = self.cord * (1 - (off / (1.35 * self.cord + 1e-3)) ** 2).clip(0) ** 0.5
        np.copyto(view, p["cord"], where=np.abs(d - (centre + 0.12 * self.sac)[:, None]) < cord[:, None])


def _ramp(palette: Palette, steps: list[tuple[str, float]], cuts: tuple[float, ...]) -> Labels:
    bases = [(TISSUES[name], fat) for name, fat in steps]
    ids = [palette.add(Tissue(base.density, base.t1_ms, base.t2_ms, fat)) for base, fat in bases]
    return np.array(ids, np.uint8)[np.searchsorted(np.array(cuts) * 256, np.arange(256))]
