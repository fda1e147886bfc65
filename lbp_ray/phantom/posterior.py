"""Bone behind the canal: pedicles, laminae, articular and spinous processes, the back of the sacrum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lbp_ray.phantom.anatomy import FIRST_LUMBAR, SACRUM, Anatomy
from lbp_ray.phantom.tissue import Palette, Tissue

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lbp_ray.phantom.grid import Grid


@dataclass(frozen=True)
class Arch:
    """A rounded part: a field of distances (mm, negative inside), its lateral extent, and its materials.

    The part spans |x − x0| between `near` and `far`; towards its ends it shrinks as a rounded bar does.
    """

    rows: slice
    cols: slice
    distance: NDArray[np.float32]
    x0: float
    near: float
    far: float
    radius: float
    rim_mm: float
    shell: np.uint8
    core: np.uint8

    def paint(self, canvas: NDArray[np.uint8], x: float) -> None:
        """Paint shell and core as the plane at `x` cuts them."""
        middle, half = (self.near + self.far) / 2, (self.far - self.near) / 2
        ratio = abs((abs(x - self.x0) - middle) / half)
        if ratio >= 1:
            return
        view = canvas[self.rows, self.cols]
        shrink = np.float32(-self.radius * (1 - (1 - ratio**4) ** 0.25))
        np.copyto(view, self.shell, where=self.distance < shrink)
        if self.core != self.shell:
            np.copyto(view, self.core, where=self.distance < shrink - np.float32(self.rim_mm))


@dataclass(frozen=True)
class _Part:
    """Superellipse in a body's frame: centre (t, d), half-lengths along and across, slant, lateral extent; mm."""

    t: float
    d: float
    along: float
    across: float
    slant_deg: float
    near: float
    far: float
    flare: float = 0.0


def build_arches(anatomy: Anatomy, grid: Grid, palette: Palette) -> list[Arch]:
    """Make every posterior part of a subject, in painting order."""
    marrow = np.uint8(palette.add(Tissue(0.8, 820, 48, 0.48)))
    root = (palette["nerve"], palette["nerve"])
    bone = (palette["cortex"], marrow)
    arches = []
    for k in range(SACRUM):
        size = anatomy.pose.scale * (0.78 + 0.22 * min(k / FIRST_LUMBAR, 1.0))
        depth = anatomy.half_depth[k]
        arches += [_arch(anatomy, grid, k, part, bone) for part in _parts(k, depth, size, anatomy.spinous[k])]
        foot = anatomy.height[k] / 2
        nerve = _Part(foot - 3.0, depth + 5.5, 2.7, 2.3, 20, 10.5 * size, 24 * size)
        arches.append(_arch(anatomy, grid, k, nerve, root))
    arches += [_arch(anatomy, grid, k, part, bone) for k, part in _sacral_parts(anatomy)]
    return arches


def _parts(k: int, depth: float, size: float, vary: NDArray[np.float64]) -> list[_Part]:
    lumbar = np.clip((k - 3) / 2, 0, 1)
    slant = (1 - lumbar) * 48 + lumbar * 14
    back = depth + 17.5 * size
    length = size * (13.0 + 0.8 * lumbar) * (0.72 if k == SACRUM - 1 else 1.0)
    tall = size * (4.2 + 4.6 * lumbar) * vary[0]
    drop = size * ((1 - lumbar) * 17 + lumbar * 10)
    return [
        _Part(-4.0 * size, depth + 6.0, 11 * size, 6.4 * size, 0, 9.8 * size, 19 * size),
        _Part(9 * size, back + 1, 13 * size, 4.9 * size, 72, 9 * size, 21 * size),
        _Part(-11 * size, back - 3.5, 8 * size, 4.2 * size, 70, 12 * size, 21 * size),
        _Part(6.5 * size, back + 2.5, 9.5 * size, 3.5 * size, 62, 1.2 * size, 13 * size),
        _Part(
            drop + vary[1] - 1,
            back + length * 0.98 + vary[2],
            length * vary[3],
            tall,
            slant,
            -3.6 * size,
            3.6 * size,
            0.3,
        ),
    ]


def _sacral_parts(anatomy: Anatomy) -> list[tuple[int, _Part]]:
    parts = []
    for k, (gap, thick, crest) in enumerate([(15, 4.4, 9), (10.5, 4.0, 7), (7.5, 3.4, 5), (5.5, 2.6, 3)], start=SACRUM):
        scale, depth = anatomy.pose.scale, anatomy.half_depth[k]
        half = anatomy.height[k] * (0.42 if k == SACRUM else 0.62)
        low = 5.0 if k == SACRUM else 2.0
        parts.append((k, _Part(low, depth + gap * scale + 3, half, thick * scale, 90, -16 * scale, 16 * scale)))
        middle = depth + gap * scale + 3 + crest * 0.6 * scale
        parts.append((k, _Part(low + 1, middle, half * 0.7, crest * 0.8 * scale, 82, -3.2 * scale, 3.2 * scale)))
    return parts


def _arch(anatomy: Anatomy, grid: Grid, k: int, part: _Part, materials: tuple[np.uint8, np.uint8]) -> Arch:
    reach = max(part.along, part.across) + 3
    bend = 1 - anatomy.kappa[k] * part.d
    middle = anatomy.s_mid[k] + part.t / bend
    span = reach / np.clip(bend, 0.5, 2.0)
    block = grid.block(
        (middle - span, middle + span), (part.d - reach, part.d + reach), (anatomy.s_mid[k], anatomy.kappa[k])
    )
    t, d = block.t - np.float32(part.t), block.d - np.float32(part.d)
    cos, sin = np.cos(np.deg2rad(part.slant_deg)), np.sin(np.deg2rad(part.slant_deg))
    along, across = np.float32(cos) * d + np.float32(sin) * t, np.float32(cos) * t - np.float32(sin) * d
    flare = 1 + part.flare * (along / part.along).clip(-1.2, 1.2)
    bow = 0.05 * np.sin(along * np.float32(0.30) + k) + 0.05 * np.sin(across * np.float32(0.35) + 2 * k)
    ratio = ((along / part.along) ** 4 + np.abs(across / (part.across * flare)) ** 3) ** 0.3 + bow
    radius = min(part.along, part.across)
    distance = ((ratio - 1) * radius).astype(np.float32)
    x0 = float(anatomy.lateral_shift(np.array([anatomy.s_mid[k]]))[0])
    return Arch(block.rows, block.cols, distance, x0, part.near, part.far, radius, 0.8, *materials)
