"""A subject's spine: the chain of bodies and discs, its pose, and spine-following coordinates.

Frames, all in mm. Image plane: ``u`` along +y (anterior → posterior), ``v`` along −z (cranial → caudal), origin in
the middle of the field of view. Spine: ``s`` is arc length along the curve through the vertebral centres (caudal
positive), ``d`` the distance from that curve (posterior positive), ``x`` runs patient right → left with 0 in the
mid-sagittal plane.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.ndimage import gaussian_filter1d
from scipy.spatial import cKDTree

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Array = NDArray[np.float64]

SEGMENTS = (
    "T8",
    "T9",
    "T10",
    "T11",
    "T12",
    "L1",
    "L2",
    "L3",
    "L4",
    "L5",
    "S1",
    "S2",
    "S3",
    "S4",
    "S5",
    "Co1",
    "Co2",
    "Co3",
)
"""Segments of the chain, top to bottom."""

FIRST_LUMBAR, SACRUM, COCCYX = SEGMENTS.index("L1"), SEGMENTS.index("S1"), SEGMENTS.index("Co1")

DISC_LEVELS = ("L1L2", "L2L3", "L3L4", "L4L5", "L5S1")
"""Graded discs; disc ``k`` lies below segment ``FIRST_LUMBAR + k``."""

_HEIGHT_MM = np.array([20, 21, 22, 23, 24.5, 26, 26.8, 27.3, 27.4, 27.2, 28, 23, 19, 16, 13, 10, 7, 5.0])
_HALF_DEPTH_MM = np.array([13.5, 14, 14.5, 15, 15.5, 16, 16.6, 17, 17.4, 17.6, 15.5, 10.5, 8, 6.3, 5.2, 4.4, 3.4, 2.4])
_HALF_WIDTH_MM = np.array([15, 15.5, 16, 17.5, 19, 20.5, 21.5, 22.5, 24, 25.5, 26, 24, 22, 18, 14, 8, 5, 3.0])
_DISC_MM = np.array([4.6, 5, 5.5, 6.3, 7.4, 8.8, 10, 11, 11.6, 10.8, 2.6, 1.3, 1.1, 1.1, 1.8, 1.2, 1, 1.0])
_ANGLE_DEG = np.array([-2, -4, -7, -10, -12.5, -13, -10.5, -4.5, 5, 19, 38, 45, 38, 20, -4, -26, -40, -46.0])
_FASCIA_MM = np.array([38, 40, 43, 47, 51, 55, 57.5, 59, 59, 55, 45, 34, 27, 22, 19, 17, 15, 14.0])
_FAT_MM = np.array([8, 8, 8.5, 9, 10, 11.5, 14, 17, 21, 25, 27, 25, 22, 20, 18, 17, 16, 16.0])

DISC_HEIGHT_FACTOR = np.array([1.0, 1.04, 1.0, 0.90, 0.70, 0.42])
"""Disc height relative to the level's healthy height, by Pfirrmann grade (0: not graded, drawn as healthy)."""


@dataclass(frozen=True)
class Disc:
    """What one disc and the endplates beside it look like; lengths in mm, lateral positions along ``x``."""

    grade: int
    modic: int
    nucleus_t2_ms: float
    texture: float
    anterior_bulge_mm: float
    posterior_bulge_mm: float
    protrusion_mm: float
    protrusion_x_mm: float
    high_intensity_zone: bool
    osteophyte_mm: float
    modic_depth_mm: tuple[float, float]
    modic_centre: float


@dataclass(frozen=True)
class Node:
    """A Schmorl node or a round fat island in a body: position in the body's own frame, mm."""

    segment: int
    t_mm: float
    d_mm: float
    x_mm: float
    radius_mm: float


@dataclass(frozen=True)
class Pose:
    """How the spine lies in the field of view: tilt (degrees), scale, and where the lumbar centroid falls (mm)."""

    tilt_deg: float
    scale: float
    u_mm: float
    v_mm: float


@dataclass(frozen=True)
class Anatomy:
    """One subject in one position; arrays have one entry per segment of `SEGMENTS`."""

    pose: Pose
    s_mid: Array
    height: Array
    half_depth: Array
    half_width: Array
    disc_height: Array
    kappa: Array
    fascia: Array
    fat: Array
    concavity: Array
    curve: Curve
    lateral: tuple[float, float]
    conus_s: float
    canal_mm: float
    vessel: tuple[float, float, float]
    spinous: Array
    discs: tuple[Disc, ...]
    schmorl: tuple[Node, ...]
    islands: tuple[Node, ...]

    def lateral_shift(self, s: Array) -> Array:
        """Scoliosis: lateral position (mm) of the spine at arc length `s`; averages 0 over L1 to S1."""
        amplitude, phase = self.lateral
        top, bottom = self.s_mid[FIRST_LUMBAR], self.s_mid[SACRUM]
        ramp = np.linspace(top, bottom, 64)
        wave = np.pi / (bottom - top)
        mean = np.mean(np.sin((ramp - top) * wave + phase))
        return np.asarray(amplitude * (np.sin((s - top) * wave + phase) - mean))

    def rectangles(self) -> Array:
        """Return the five rectangles from mid-body to mid-body, L1–L2 to L5–S1.

        Returns
        -------
        numpy.ndarray
            Shape (5, 4): u minimum, v minimum, u maximum, v maximum in mm, the smallest axis-aligned rectangles that
            hold both half bodies and the disc between them.
        """
        boxes = []
        for level in range(FIRST_LUMBAR, SACRUM):
            s = np.linspace(self.s_mid[level], self.s_mid[level + 1], 25)
            half = np.interp(s, self.s_mid, self.half_depth)
            u, v = self.curve.place(np.concatenate([s, s]), np.concatenate([-half, half]))
            boxes.append((u.min(), v.min(), u.max(), v.max()))
        return np.array(boxes)


@dataclass(frozen=True)
class Curve:
    """The spine curve sampled at arc lengths `s`: position, tangent angle and curvature."""

    s: Array
    u: Array
    v: Array
    theta: Array
    kappa: Array

    @classmethod
    def through(cls, s_mid: Array, angle_deg: Array, tilt_deg: float) -> Curve:
        """Integrate the curve whose tangent has the given angle (degrees from vertical) at each segment."""
        s = np.arange(s_mid[0] - 40, s_mid[-1] + 30, 1.0)
        angle = PchipInterpolator(s_mid, np.deg2rad(angle_deg + tilt_deg))(np.clip(s, s_mid[0], s_mid[-1]))
        theta = gaussian_filter1d(angle, 9.0)
        u = np.concatenate([[0.0], np.cumsum(np.sin((theta[1:] + theta[:-1]) / 2))])
        v = np.concatenate([[0.0], np.cumsum(np.cos((theta[1:] + theta[:-1]) / 2))])
        return cls(s, u, v, theta, np.gradient(theta, s))

    def moved(self, du: float, dv: float) -> Curve:
        """Return the curve shifted by (du, dv) mm."""
        return Curve(self.s, self.u + du, self.v + dv, self.theta, self.kappa)

    def place(self, s: Array, d: Array) -> tuple[Array, Array]:
        """Spine coordinates → image plane (u, v), mm."""
        theta = np.interp(s, self.s, self.theta)
        u, v = np.interp(s, self.s, self.u), np.interp(s, self.s, self.v)
        return u + d * np.cos(theta), v - d * np.sin(theta)

    def locate(self, u: Array, v: Array) -> tuple[Array, Array]:
        """Image plane (u, v) → spine coordinates (s, d) of the nearest point of the curve, mm."""
        _, nearest = cKDTree(np.column_stack([self.u, self.v])).query(np.column_stack([u.ravel(), v.ravel()]))
        s = self.s[nearest].reshape(u.shape)
        for _ in range(3):
            theta = np.interp(s, self.s, self.theta)
            du, dv = u - np.interp(s, self.s, self.u), v - np.interp(s, self.s, self.v)
            along, d = du * np.sin(theta) + dv * np.cos(theta), du * np.cos(theta) - dv * np.sin(theta)
            s = s + along / np.clip(1 - np.interp(s, self.s, self.kappa) * d, 0.3, 3.0)
        return s, d


def draw_pose(rng: np.random.Generator) -> Pose:
    """Draw a pose: tilt within ±10°, scale within ±10 %, lumbar centroid with a spread of about 11 mm each way."""
    tilt, scale = rng.uniform(-10, 10), rng.uniform(0.9, 1.1)
    u, v = np.clip(rng.normal(0, 12.5, 2), -27, 27)
    return Pose(tilt, scale, -6 + u, v)


def build_anatomy(
    build: np.random.Generator, exam: np.random.Generator, grades: tuple[Sequence[int], Sequence[int]], pose: Pose
) -> Anatomy:
    """Make a subject.

    Parameters
    ----------
    build
        Random stream of the patient: proportions, lordosis, canal, processes. The same in each of a patient's exams.
    exam
        Random stream of the exam: the look of each disc given its grade.
    grades
        Pfirrmann and Modic grades of the five levels of `DISC_LEVELS`.
    pose
        Where and how the spine lies.

    Returns
    -------
    Anatomy
        Everything that `lbp_ray.phantom.paint` needs.
    """
    count, scale = len(SEGMENTS), pose.scale
    height = _HEIGHT_MM * scale * build.normal(1, 0.025, count)
    half_depth = (
        gaussian_filter1d(_HALF_DEPTH_MM * build.normal(1, 0.02, count), 0.3) * scale * build.uniform(0.95, 1.06)
    )
    lordosis, shift = build.uniform(0.78, 1.2), build.uniform(-4, 4)
    discs = _draw_discs(exam, *grades)
    disc_height = _DISC_MM * scale * build.normal(1, 0.05, count)
    factors = DISC_HEIGHT_FACTOR[[disc.grade for disc in discs]] * exam.normal(1, 0.04, len(discs))
    disc_height[: len(discs)] *= factors
    tops = np.concatenate([[0.0], np.cumsum(height + disc_height)[:-1]])
    s_mid = tops + height / 2
    s_mid -= s_mid[FIRST_LUMBAR + 2]
    curve = Curve.through(s_mid, _ANGLE_DEG * lordosis + shift, pose.tilt_deg)
    anatomy = Anatomy(
        pose=pose,
        s_mid=s_mid,
        height=height,
        half_depth=half_depth,
        half_width=_HALF_WIDTH_MM * scale,
        disc_height=disc_height,
        kappa=np.interp(s_mid, curve.s, curve.kappa),
        fascia=_FASCIA_MM * scale * build.uniform(0.92, 1.1),
        fat=_FAT_MM * np.exp(build.normal(0, 0.3)) * np.exp(gaussian_filter1d(build.normal(0, 0.25, count), 2)),
        concavity=np.abs(build.normal(1.5, 0.5, count)) * scale,
        curve=curve,
        lateral=(build.normal(0, 1.0), build.uniform(0, 2 * np.pi)),
        conus_s=float(np.interp(build.normal(FIRST_LUMBAR + 0.1, 0.45), np.arange(count), s_mid)),
        canal_mm=build.normal(15.5, 0.9) * scale,
        vessel=(build.uniform(4, 11), build.uniform(8.0, 10.5), build.uniform(-22, -15)),
        spinous=build.normal(1, 0.12, (count, 4)),
        discs=discs,
        schmorl=tuple(_draw_nodes(build, 0.10, schmorl=True)),
        islands=tuple(_draw_nodes(build, 0.10, schmorl=False)),
    )
    boxes = anatomy.rectangles()
    du = pose.u_mm - (boxes[:, 0].min() + boxes[:, 2].max()) / 2
    dv = pose.v_mm - (boxes[:, 1].min() + boxes[:, 3].max()) / 2
    return _moved(anatomy, du, dv)


def _moved(anatomy: Anatomy, du: float, dv: float) -> Anatomy:
    return Anatomy(**{**anatomy.__dict__, "curve": anatomy.curve.moved(du, dv)})


_NUCLEUS_T2_MS = np.array([150.0, 190.0, 150.0, 92.0, 58.0, 42.0])
_TEXTURE = np.array([0.10, 0.05, 0.10, 0.22, 0.20, 0.12])
_BULGE_MM = np.array([0.0, 0.0, 0.2, 1.0, 2.0, 2.6])


def _draw_discs(rng: np.random.Generator, pfirrmann: Sequence[int], modic: Sequence[int]) -> tuple[Disc, ...]:
    above = np.clip(np.rint(np.mean(pfirrmann) - 0.9 + rng.normal(0, 0.55, FIRST_LUMBAR)), 1, 4).astype(int)
    grades = [*above, *pfirrmann]
    changes = [*[0] * FIRST_LUMBAR, *modic]
    return tuple(_draw_disc(rng, int(grade), int(change)) for grade, change in zip(grades, changes, strict=True))


def _draw_disc(rng: np.random.Generator, grade: int, modic: int) -> Disc:
    worn = max(grade - 2, 0)
    protrusion = rng.gamma(2.0, 1.4) if rng.random() < (0.03, 0.25, 0.5, 0.6)[worn] else 0.0
    return Disc(
        grade=grade,
        modic=modic,
        nucleus_t2_ms=_NUCLEUS_T2_MS[grade] * np.exp(rng.normal(0, 0.08)),
        texture=_TEXTURE[grade],
        anterior_bulge_mm=_BULGE_MM[grade] * rng.uniform(0.6, 1.4),
        posterior_bulge_mm=0.8 * _BULGE_MM[grade] * rng.uniform(0.6, 1.4),
        protrusion_mm=min(protrusion, 6.5),
        protrusion_x_mm=rng.normal(0, 4),
        high_intensity_zone=bool(rng.random() < (0.0, 0.12, 0.25, 0.15)[worn]),
        osteophyte_mm=rng.gamma(2.0, 0.25 + 0.65 * worn),
        modic_depth_mm=(rng.uniform(6, 12), rng.uniform(6, 12)),
        modic_centre=rng.uniform(-0.35, 0.35),
    )


def _draw_nodes(rng: np.random.Generator, chance: float, *, schmorl: bool) -> list[Node]:
    nodes = []
    for segment in range(1, SACRUM):
        happens, side = rng.random() < chance, rng.choice([-1.0, 1.0])
        t, d, x, radius = rng.uniform(-6, 6), rng.uniform(-8, 8), rng.uniform(-8, 8), rng.uniform(2, 4.5)
        if happens:
            nodes.append(Node(segment, float(side) if schmorl else t, d, x, radius))
    return nodes
