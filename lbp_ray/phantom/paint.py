"""Materials of one thin sagittal plane, painted in spine coordinates.

In those coordinates a body is nearly a rectangle and the canal a straight band, so each structure is a few comparisons
between a field that is computed once per subject and a number that depends on the plane's lateral position ``x``. Fields
have the shape (rows along ``s``, columns along ``d``); later paint covers earlier paint.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.ndimage import gaussian_filter

from lbp_ray.phantom.anatomy import COCCYX, FIRST_LUMBAR, SACRUM, SEGMENTS, Anatomy, Disc, Node
from lbp_ray.phantom.posterior import Arch, build_arches
from lbp_ray.phantom.tissue import Palette, Tissue

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Field = NDArray[np.float32]
    Labels = NDArray[np.uint8]

DISC_SHADES = 12
"""Materials from a disc's outermost annulus to its nucleus."""

CORTEX_MM = 0.75
"""Thickness of the dark rim of a vertebral body (endplate and cortical bone)."""

DISC_CODE = 100
"""Structure number of the disc below segment ``k`` is ``DISC_CODE + k + 1``; of the vertebra ``k``, ``k + 1``."""


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


def lateral_profile(ratio: float, power: float) -> float:
    """Half-depth at a lateral position, relative to the middle, of a superelliptic outline."""
    return float(max(1 - abs(ratio) ** power, 0.0) ** (1 / power))


class Body:
    """One vertebral body, sacral or coccygeal segment."""

    def __init__(self, anatomy: Anatomy, segment: int, grid: Grid, palette: Palette, look: np.random.Generator) -> None:
        a, k = anatomy, segment
        half, self.x0 = a.height[k] / 2, float(a.lateral_shift(a.s_mid[k : k + 1])[0])
        self.half_width, self.half_depth = a.half_width[k], a.half_depth[k]
        reach = self.half_depth + 9
        self.block = block = grid.block(
            (a.s_mid[k] - 1.35 * half - 2, a.s_mid[k] + 1.35 * half + 2), (-reach, reach), (a.s_mid[k], a.kappa[k])
        )
        spine = np.interp(block.s, a.s_mid, a.half_depth) if k >= SACRUM else np.full(len(block.s), self.half_depth)
        lip = np.zeros_like(block.t)
        for disc, edge in ((k - 1, half + block.t), (k, half - block.t)):
            if 0 <= disc < len(a.discs):
                lip += a.discs[disc].osteophyte_mm * np.exp(-((edge / 2.6) ** 2))
        waist = 1.1 * (1 - (block.t / half) ** 2).clip(0) * (k < SACRUM)
        front = spine[:, None] - waist + lip
        back = spine[:, None] - 0.8 * waist + 0.25 * lip
        self.depth = (np.abs(block.d) / np.where(block.d < 0, front, back)).astype(np.float32)
        corner = ((self.depth - 0.80) / 0.2).clip(0) ** 2
        self.inside = (half - np.abs(block.t) - 1.3 * corner).astype(np.float32)
        self.arch = (a.concavity[k] * (1 - (block.d / self.half_depth) ** 2).clip(0) * (k < SACRUM)).astype(np.float32)
        fat = np.clip(look.normal(0.42 + 0.05 * (k >= SACRUM), 0.05), 0.2, 0.65)
        code = k + 1
        self.cortex = np.uint8(palette.add(Tissue(0.16, 600, 26, 0.1), code))
        self.marrow = np.uint8(palette.add(Tissue(0.80, 820, 50, fat), code))
        self.vein = np.uint8(palette.add(Tissue(0.9, 1100, 120, 0.35), code))
        self.zones = self._zones(anatomy, segment, palette, look)
        self.nodes = [(node, palette) for node in (*a.schmorl, *a.islands) if node.segment == segment]
        self.island = np.uint8(palette.add(Tissue(0.85, 900, 70, 0.85), code))
        self.has_vein = k < SACRUM
        self.sacral = k >= SACRUM
        self.half = half
        self.schmorl = a.schmorl

    def _zones(
        self, a: Anatomy, k: int, palette: Palette, look: np.random.Generator
    ) -> list[tuple[Field, float, np.uint8]]:
        zones = []
        for side, disc_index in ((1.0, k), (-1.0, k - 1)):
            if not (0 <= disc_index < len(a.discs)) or a.discs[disc_index].modic == 0:
                continue
            disc = a.discs[disc_index]
            tissue = _modic_tissue(disc.modic, look)
            reach = 1 - ((self.block.d - disc.modic_centre * self.half_depth) / (1.35 * self.half_depth)) ** 2
            field = ((a.height[k] / 2 - side * self.block.t) / reach.clip(0.05)).astype(np.float32)
            depth = disc.modic_depth_mm[int(side < 0)] * a.pose.scale
            zones.append((field, depth, np.uint8(palette.add(tissue, k + 1))))
        return zones

    def paint(self, canvas: Labels, x: float, ripple: Field) -> None:
        """Paint cortex, marrow, Modic zones, basivertebral vein and nodes as the plane at `x` cuts them."""
        ratio = (x - self.x0) / self.half_width
        front, back = lateral_profile(ratio, 2.6), lateral_profile(ratio, 5.0)
        if back <= 0.05:
            return
        block, view = self.block, canvas[self.block.rows, self.block.cols]
        limit = np.where(block.d < 0, np.float32(front), np.float32(back))
        arch = self.arch * np.float32(max(1 - ratio**2, 0))
        np.copyto(view, self.cortex, where=(self.inside > arch) & (self.depth < limit))
        rim = np.float32(CORTEX_MM if not self.sacral else 0.9)
        marrow = (self.inside > arch + rim) & (self.depth < limit - rim / np.float32(self.half_depth))
        np.copyto(view, self.marrow, where=marrow)
        for field, depth, zone in self.zones:
            wave = ripple[: view.shape[0], : view.shape[1]]
            np.copyto(view, zone, where=marrow & (field + wave < np.float32(depth * max(1 - ratio**2, 0) ** 0.5)))
        if self.has_vein and abs(x - self.x0) < 6:
            self._paint_vein(view, abs(x - self.x0))
        for node, _ in self.nodes:
            self._paint_node(view, node, x - self.x0)

    def _paint_vein(self, view: Labels, off: float) -> None:
        block = self.block
        width = 1.9 * (1 - off / 6) * ((block.d / self.half_depth - 0.05) / 0.95).clip(0)
        np.copyto(view, self.vein, where=(np.abs(block.t) < width.astype(np.float32)) & (self.depth < 1.0))

    def _paint_node(self, view: Labels, node: Node, x: float) -> None:
        radius = node.radius_mm**2 - (x - node.x_mm) ** 2
        if radius <= 0:
            return
        schmorl = node in self.schmorl
        t0 = node.t_mm * (self.half - 0.6) if schmorl else node.t_mm
        flat = 1.6 if schmorl else 1.0
        distance = (flat * (self.block.t - np.float32(t0))) ** 2 + (self.block.d - np.float32(node.d_mm)) ** 2
        if schmorl:
            np.copyto(view, self.cortex, where=(distance < radius * 1.3) & (self.depth < 0.9))
        np.copyto(view, self.vein if schmorl else self.island, where=(distance < radius * 0.75) & (self.depth < 0.9))


def _modic_tissue(modic: int, look: np.random.Generator) -> Tissue:
    t2 = np.exp(look.normal(0, 0.08))
    return {
        1: Tissue(0.95, 1300, 125 * t2, 0.06),
        2: Tissue(0.85, 700, 70 * t2, 0.92),
        3: Tissue(0.32, 800, 34 * t2, 0.05),
    }[modic]


class DiscShape:
    """One disc between two bodies: nucleus, annulus, bulge, protrusion, high-intensity zone."""

    def __init__(self, anatomy: Anatomy, index: int, grid: Grid, palette: Palette, noise: np.random.Generator) -> None:
        a, k = anatomy, index
        self.disc: Disc = a.discs[k]
        self.step = grid.step
        height = a.disc_height[k]
        middle = a.s_mid[k] + a.height[k] / 2 + height / 2
        kappa = float(np.interp(middle, a.curve.s, a.curve.kappa))
        self.x0 = float(a.lateral_shift(np.array([middle]))[0])
        self.half_width = (a.half_width[k] + a.half_width[k + 1]) / 2
        self.half_depth = (a.half_depth[k] + a.half_depth[k + 1]) / 2
        reach = 0.75 * height + 4.5
        self.block = block = grid.block(
            (middle - reach, middle + reach), (-self.half_depth - 6, self.half_depth + 12), (middle, kappa)
        )
        tau = block.t / (height / 2 + 1.0)
        waist = 1 - 0.25 * tau**2
        self.front = (self.half_depth + self.disc.anterior_bulge_mm * waist).astype(np.float32)
        self.back = (self.disc.posterior_bulge_mm * waist).astype(np.float32)
        self.bump = np.exp(-((block.t / (0.35 * height + 1.8)) ** 2)).astype(np.float32)
        self.base = self._shade(tau, noise)
        first = [palette.add(tissue, DISC_CODE + k + 1) for tissue in _disc_tissues(self.disc)]
        self.shades = np.array(first, np.uint8)
        self.zone = palette["zone"]
        self.ligament = palette["ligament"]

    def _shade(self, tau: Field, noise: np.random.Generator) -> Field:
        disc, across = self.disc, (self.block.d + 1.0) / (0.76 * self.half_depth)
        core = 1.25 - (np.abs(across) ** 3 + 0.55 * np.abs(tau) ** 3)
        cleft = {0: 0.2, 1: 0.08, 2: 0.28, 3: 0.12}.get(disc.grade, 0.0)
        core -= cleft * np.exp(-((tau / 0.16) ** 2)) * (np.abs(across) < 0.8)
        grain = gaussian_filter(noise.standard_normal(tau.shape), (1.3 / self.step, 2.2 / self.step))
        grain /= max(float(grain.std()), 1e-6) if grain.size else 1.0
        return (core + disc.texture * grain).astype(np.float32)

    def paint(self, canvas: Labels, x: float) -> None:
        """Paint the disc as the plane at `x` cuts it."""
        off = x - self.x0
        ratio = off / (self.half_width + 1)
        front, back = lateral_profile(ratio, 2.6), lateral_profile(ratio, 5.0)
        if back <= 0.05:
            return
        block, view, disc = self.block, canvas[self.block.rows, self.block.cols], self.disc
        push = disc.protrusion_mm * np.exp(-(((off - disc.protrusion_x_mm) / 6.5) ** 2))
        edge = np.float32(self.half_depth * back) + self.back + np.float32(push) * self.bump
        ahead = block.d > -self.front * np.float32(front)
        if push > 0.5:
            np.copyto(view, self.ligament, where=ahead & (block.d < edge + np.float32(0.8)) & (self.bump > 0.3))
        shade = self.base - np.float32(1.15 * abs(off / (0.80 * self.half_width)) ** 3)
        index = (shade * DISC_SHADES).clip(0, DISC_SHADES - 1).astype(np.uint8)
        np.copyto(view, self.shades[index], where=ahead & (block.d < edge))
        if disc.high_intensity_zone and abs(off - 1) < 4:
            centre = np.float32(self.half_depth + disc.posterior_bulge_mm - 1.8)
            np.copyto(view, self.zone, where=(block.d - centre) ** 2 + (block.t - 1) ** 2 < 1.7)


def _disc_tissues(disc: Disc) -> list[Tissue]:
    mix = (np.arange(DISC_SHADES) / (DISC_SHADES - 1)) ** 1.1
    outer_t2 = 32.0
    return [
        Tissue(0.55 + 0.35 * m, 900 + 450 * m, outer_t2 * (disc.nucleus_t2_ms / outer_t2) ** m)
        for m in mix.tolist()
    ]


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
        a, s = anatomy, grid.s
        interp = lambda values: np.interp(s, a.s_mid, values).astype(np.float32)  # noqa: E731
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
        aorta_x, radius, vein_x = a.vessel
        self.vessels = (
            Vessel(aorta_x, radius, float(a.s_mid[FIRST_LUMBAR + 3])),
            Vessel(vein_x, radius * 1.05, float(a.s_mid[FIRST_LUMBAR + 4])),
        )
        rows = int(2.0 * len(s))
        self.fibres = _fibres(grain, (rows, grid.shape[1]), 5.0 / grid.step, 0.9 / grid.step)
        self.strands = _fibres(grain, (rows, grid.shape[1]), 14.0 / grid.step, 0.55 / grid.step)
        self.muscle = _ramp(palette, [("muscle", 0.02), ("muscle", 0.06), ("muscle", 0.14), ("fat", 0.55)], (0.55, 0.8, 0.92))
        self.midline = _ramp(palette, [("ligament", 0.15), ("loose", 0.45), ("fat", 0.8), ("fat", 0.95)], (0.3, 0.55, 0.8))
        self.roots = np.where(np.arange(256) < 100, palette["nerve"], palette["csf"]).astype(np.uint8)

    def _cord_radius(self) -> Field:
        below = (self.grid.s - np.float32(self.anatomy.conus_s)) / 26.0
        swell = 4.1 + 0.5 * np.exp(-(((below + 0.9) / 0.5) ** 2))
        taper = 1 / (1 + np.exp((below + 0.25) * 7))
        return np.maximum(swell * taper * self.anatomy.pose.scale, 0.0).astype(np.float32)

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
        for disc in self.discs:
            disc.paint(canvas, x_mm)
        ripple = 3e-2 * (self.fibres[offset[0] : offset[0] + 400].astype(np.float32) - 128)
        for body in self.bodies:
            body.paint(canvas, x_mm, ripple)
        return canvas

    def _paint_front(self, canvas: Labels, lateral: Field) -> None:
        a, d, off = self.anatomy, self.grid.d, np.abs(lateral)
        stop = int(np.searchsorted(d, 2.0))
        view, d = canvas[:, :stop], d[:stop]
        profile = (1 - (off / (self.half_width + 3)) ** 2).clip(0) ** 0.5
        front = -(self.half_depth * profile)
        np.copyto(view, self.palette["fat"], where=(d > (front - 5.5)[:, None]) & (profile > 0)[:, None])
        np.copyto(view, self.palette["ligament"], where=(d > (front - 0.9)[:, None]) & (profile > 0.25)[:, None])
        side = off > self.half_width * 0.93
        if side.any():
            psoas = ((self.grid.s - a.s_mid[FIRST_LUMBAR]) / 60).clip(0, 1) * 20
            np.copyto(view, self.palette["muscle"], where=side[:, None] & (d > -psoas[:, None]))
        for vessel in self.vessels:
            self._paint_vessel(view, d, lateral, vessel)

    def _paint_vessel(self, view: Labels, d: Field, lateral: Field, vessel: Vessel) -> None:
        """A vertical tube in front of the bodies that veers sideways below where it forks."""
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
        fibres = self.fibres[offset[0] : offset[0] + canvas.shape[0], start:]
        middle = off < 2.9
        view[:] = self.muscle[fibres]
        if middle.any():
            view[middle] = self.midline[fibres[middle]]

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
        sunk = centre + 0.30 * self.sac - 0.9 * self.sac * ((self.grid.s - self.anatomy.conus_s) / 120).clip(0, 1)
        below = (self.grid.s > self.anatomy.conus_s - 22) & (self.sac > 3)
        bundle = (np.abs(d - (sunk + 0.1 * self.sac)[:, None]) < (0.62 * half)[:, None]) & below[:, None] & inside
        np.copyto(view, self.roots[strands], where=bundle)
        cord = self.cord * (1 - (off / (1.35 * self.cord + 1e-3)) ** 2).clip(0) ** 0.5
        np.copyto(view, p["cord"], where=np.abs(d - (centre + 0.12 * self.sac)[:, None]) < cord[:, None])


def _fibres(rng: np.random.Generator, shape: tuple[int, int], along: float, across: float) -> Labels:
    """Noise that is long in ``s`` and fine in ``d``, as uniform bytes."""
    rows = int(shape[0] / along) + 3
    cols = int(shape[1] / across) + 3
    coarse = rng.standard_normal((rows, cols), np.float32)
    field = spread(np.arange(shape[0]) / along, rows) @ coarse @ spread(np.arange(shape[1]) / across, cols).T
    scaled = field * np.float32(1.25 / field.std())
    return (255.99 / (1 + np.exp(-1.7 * scaled))).astype(np.uint8)


def spread(position: NDArray[np.float64], count: int) -> Field:
    """Weights of linear interpolation at `position` (in nodes, 0 to `count` − 1) as a matrix (positions, count)."""
    left = np.floor(position).astype(int).clip(0, count - 2)
    weight = (position - left).astype(np.float32)
    matrix = np.zeros((len(position), count), np.float32)
    rows = np.arange(len(position))
    matrix[rows, left], matrix[rows, left + 1] = 1 - weight, weight
    return matrix


def _ramp(palette: Palette, steps: list[tuple[str, float]], cuts: tuple[float, ...]) -> Labels:
    from lbp_ray.phantom.tissue import TISSUES

    bases = [(TISSUES[name], fat) for name, fat in steps]
    ids = [palette.add(Tissue(base.density, base.t1_ms, base.t2_ms, fat)) for base, fat in bases]
    return np.array(ids, np.uint8)[np.searchsorted(np.array(cuts) * 256, np.arange(256))]


__all__ = ["COCCYX", "DISC_CODE", "Grid", "Painter", "spread"]
