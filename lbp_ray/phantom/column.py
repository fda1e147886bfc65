"""The spinal column: vertebral bodies and discs as any sagittal plane cuts them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lbp_ray.phantom.anatomy import SACRUM, Anatomy, Disc, Node
from lbp_ray.phantom.grid import Grid, blotches
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


def lateral_profile(ratio: float, power: float) -> float:
    """Half-depth at a lateral position, relative to the middle, of a superelliptic outline."""
    return float(max(1 - abs(ratio) ** power, 0.0) ** (1 / power))


class Body:
    """One vertebral body, sacral or coccygeal segment."""

    def __init__(self, anatomy: Anatomy, segment: int, grid: Grid, palette: Palette, look: np.random.Generator) -> None:
        a, k = anatomy, segment
        self.step = grid.step
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
            wave = blotches(look, self.block.t.shape, 3.0 / self.step, 1.7) + look.normal(0, 0.6, self.block.t.shape)
            field = ((a.height[k] / 2 - side * self.block.t) / reach.clip(0.05) + wave).astype(np.float32)
            depth = disc.modic_depth_mm[int(side < 0)] * a.pose.scale
            zones.append((field, depth, np.uint8(palette.add(tissue, k + 1))))
        return zones

    def paint(self, canvas: Labels, x: float) -> None:
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
            np.copyto(view, zone, where=marrow & (field < np.float32(depth * max(1 - ratio**2, 0) ** 0.5)))
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
        grain = blotches(noise, tau.shape, 1.8 / self.step, 1.0)
        return np.asarray(core + disc.texture * grain, np.float32)

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
        Tissue(0.55 + 0.35 * m, 900 + 450 * m, outer_t2 * (disc.nucleus_t2_ms / outer_t2) ** m) for m in mix.tolist()
    ]
