"""One synthetic exam: volumes of each contrast, their geometry, and the truth about them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lbp_ray.phantom.acquire import Grain, Receiver, build_receiver, quantise
from lbp_ray.phantom.anatomy import Anatomy, build_anatomy, draw_pose
from lbp_ray.phantom.grid import Grid, enlarge, spread
from lbp_ray.phantom.paint import Painter
from lbp_ray.phantom.surround import Plane, Surround
from lbp_ray.phantom.tissue import T1, T2, TISSUES, Contrast, Palette, signal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

MID_TOLERANCE = 0.25
"""The mid plane counts as midway between two slices within this share of the slice distance from their midpoint."""

_COARSE_MM = 4.5


@dataclass(frozen=True)
class Imaging:
    """Sampling of an exam: square matrix, field of view, slice distance and thickness, sub-slices, noise."""

    matrix: int = 512
    fov_mm: float = 280.0
    spacing_mm: float = 4.0
    thickness_mm: float = 4.0
    slices: tuple[int, int] = (11, 17)
    mid_shift: int = 3
    subslices: int = 4
    noise: float = 0.011

    @property
    def pixel_mm(self) -> float:
        """Pixel size, the same along rows and columns."""
        return self.fov_mm / self.matrix


@dataclass(frozen=True)
class ExamSpec:
    """What makes an exam: grades of L1–L2 … L5–S1 and two seeds, one of the patient's build, one of the exam."""

    pfirrmann: tuple[int, ...] = (2, 2, 2, 2, 2)
    modic: tuple[int, ...] = (0, 0, 0, 0, 0)
    patient_seed: tuple[int, ...] = (0,)
    exam_seed: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class ExamTruth:
    """What is known about an exam.

    Slice numbers count from patient right to left. ``rectangles`` are (5, 4) pixel coordinates, x minimum, y minimum,
    x maximum, y maximum, with pixel centres at +0.5; ``roi_row`` and ``roi_column`` are the centroid of their union, in
    pixel indices.
    """

    mid_index: int
    mid_offset_mm: float
    acceptable_indices: tuple[int, ...]
    rectangles: NDArray[np.float64]
    roi_row: float
    roi_column: float
    tilt_deg: float
    scale: float
    conus_s_mm: float


@dataclass(frozen=True)
class SyntheticExam:
    """Volumes (slices right → left, rows cranial → caudal, columns anterior → posterior), geometry, truth.

    ``volumes`` maps contrast names to (S, H, W) uint16; ``positions_mm`` holds each slice's lateral position (patient
    left positive), 0 in the true mid plane.
    """

    imaging: Imaging
    volumes: dict[str, NDArray[np.uint16]]
    positions_mm: NDArray[np.float64]
    truth: ExamTruth
    scene: Scene

    def label_map(self, index: int) -> NDArray[np.uint8]:
        """Structure numbers of a slice's central plane: vertebra T8 … is 1 …, L1 is 6; disc below it adds 100."""
        return self.scene.structures(float(self.positions_mm[index]))


class Scene:
    """A subject ready to be cut: painter, pixel lookups and surroundings."""

    def __init__(
        self, anatomy: Anatomy, imaging: Imaging, contrasts: Sequence[Contrast], seed: np.random.SeedSequence
    ) -> None:
        look, grain, around, self._stream = (np.random.default_rng(child) for child in seed.spawn(4))
        self.anatomy, self.imaging = anatomy, imaging
        self.plane = Plane.square(imaging.matrix, imaging.fov_mm)
        self.palette = Palette.common()
        self.surround = Surround(anatomy, self.plane, contrasts, around)
        self._map_pixels(np.clip(0.62 * imaging.pixel_mm, 0.3, 0.62))
        self.painter = Painter(anatomy, self.grid, self.palette, (look, grain))
        clear = np.zeros(256, np.float32)
        clear[0] = 1
        self.tables = [clear, *(np.resize(self.palette.signals(c), 256) for c in contrasts)]

    def _map_pixels(self, step_mm: float) -> None:
        plane, coarse = self.plane, np.arange(self.plane.u[0] - 6, self.plane.u[-1] + 11, _COARSE_MM)
        v, u = np.meshgrid(coarse, coarse, indexing="ij")
        s, d = (part.astype(np.float32) for part in self.anatomy.curve.locate(u, v))
        reach = self.surround.fascia[:, None] + 1 > plane.u
        fine_s, fine_d = (self._upsample(f, coarse, 0.0, 0.0) for f in (s, d))
        front = -(self.anatomy.half_depth.max() + 2 * self.anatomy.vessel[1] + 5)
        span = (self.anatomy.curve.s[0] + 2, self.anatomy.curve.s[-1] - 2)
        inside = (fine_d > front) & (fine_d < 100) & (fine_s > span[0]) & (fine_s < span[1]) & reach
        self.band = np.flatnonzero(inside)
        low, high = float(fine_s[inside].min()) - 3, float(fine_s[inside].max()) + 3
        self.grid = Grid((low, high), (front - 2, float(fine_d[inside].max()) + 3), step_mm)
        self.lookups = []
        for j in range(self.imaging.subslices):
            dv, du = ((j % 2) - 0.5) / 2, (((j // 2) % 2) - 0.5) / 2
            rows = (self._upsample(s, coarse, dv, du).ravel()[self.band] - self.grid.s[0]) / step_mm + 0.5
            cols = (self._upsample(d, coarse, dv, du).ravel()[self.band] - self.grid.d[0]) / step_mm + 0.5
            rows, cols = rows.astype(np.int32), cols.astype(np.int32)
            rows, cols = rows.clip(0, self.grid.shape[0] - 1), cols.clip(0, self.grid.shape[1] - 1)
            self.lookups.append(rows * self.grid.shape[1] + cols)

    def _upsample(
        self, field: NDArray[np.float32], coarse: NDArray[np.float64], dv: float, du: float
    ) -> NDArray[np.float32]:
        pixel = self.imaging.pixel_mm
        rows = spread((self.plane.v + dv * pixel - coarse[0]) / _COARSE_MM, len(coarse))
        cols = spread((self.plane.u + du * pixel - coarse[0]) / _COARSE_MM, len(coarse))
        return enlarge(rows, field, cols)

    def signals(self, x_mm: float) -> list[NDArray[np.float32]]:
        """Signal of a slice centred at `x_mm`, averaged over its sub-slices: one (rows, columns) image per contrast."""
        count = self.imaging.subslices
        offset = self._stream.integers(0, self.grid.shape[0] // 2, 2)
        sums = [np.zeros(len(self.band), np.float32) for _ in self.tables]
        for j, lookup in enumerate(self.lookups):
            x = x_mm + ((j + 0.5) / count - 0.5) * self.imaging.thickness_mm
            material = self.painter.plane(x, (int(offset[0]), int(offset[1]))).ravel()[lookup]
            for total, table in zip(sums, self.tables, strict=True):
                total += table[material]
        images = self.surround.slice(x_mm)
        for image, total in zip(images, sums[1:], strict=True):
            flat = image.reshape(-1)
            flat[self.band] = (total + sums[0] * flat[self.band]) / np.float32(count)
        return images

    def structures(self, x_mm: float) -> NDArray[np.uint8]:
        """Structure numbers of the thin plane at `x_mm`, uint8, shape (rows, columns)."""
        table = np.array(self.palette.structure, np.uint8)
        labels = np.zeros(self.imaging.matrix**2, np.uint8)
        labels[self.band] = table[self.painter.plane(x_mm, (0, 0)).ravel()[self.lookups[0]]]
        return labels.reshape(self.imaging.matrix, self.imaging.matrix)


def simulate_exam(
    spec: ExamSpec, imaging: Imaging | None = None, contrasts: Sequence[Contrast] = (T2, T1)
) -> SyntheticExam:
    """Simulate one exam.

    Parameters
    ----------
    spec
        Grades and seeds.
    imaging
        Sampling; the Oulu protocol by default.
    contrasts
        Protocols to simulate; all share one anatomy.

    Returns
    -------
    SyntheticExam
        Volumes, geometry and truth. The same arguments give the same bytes.
    """
    imaging = imaging or Imaging()
    build = np.random.default_rng(np.random.SeedSequence(spec.patient_seed))
    look, pose, stack, scene_seed, coil, noise = np.random.SeedSequence(spec.exam_seed).spawn(6)
    anatomy = build_anatomy(
        build, np.random.default_rng(look), (spec.pfirrmann, spec.modic), draw_pose(np.random.default_rng(pose))
    )
    scene = Scene(anatomy, imaging, contrasts, scene_seed)
    positions, mid, offset = _stack(imaging, np.random.default_rng(stack))
    receiver = build_receiver(anatomy, scene.surround, imaging.noise, np.random.default_rng(coil))
    rng = np.random.Generator(np.random.SFC64(noise))  # most of the numbers drawn are noise: the fastest generator
    volumes = _acquire(scene, receiver, positions, contrasts, rng)
    return SyntheticExam(imaging, volumes, positions, _truth(anatomy, imaging, mid, offset), scene)


def _acquire(
    scene: Scene,
    receiver: Receiver,
    positions: NDArray[np.float64],
    contrasts: Sequence[Contrast],
    rng: np.random.Generator,
) -> dict[str, NDArray[np.uint16]]:
    size = scene.imaging.matrix
    magnitudes = np.empty((len(contrasts), len(positions), size, size), np.float32)
    grain = Grain((size, size), scene.imaging.pixel_mm)
    for k, x in enumerate(positions):
        texture = grain.draw(rng)
        for c, image in enumerate(scene.signals(float(x))):
            image *= texture
            magnitudes[c, k] = receiver.acquire(image, rng)
    bright = np.percentile(receiver.sensitivity[::4, ::4], 90) * np.array(
        [signal(TISSUES["fat"], c) for c in contrasts]
    )
    gains = rng.uniform(1200, 1700, len(contrasts)) / bright
    return {c.name: quantise(m, float(g)) for c, m, g in zip(contrasts, magnitudes, gains, strict=True)}


def _stack(imaging: Imaging, rng: np.random.Generator) -> tuple[NDArray[np.float64], int, float]:
    count = int(rng.integers(imaging.slices[0], imaging.slices[1] + 1))
    mid = count // 2 + int(rng.integers(-imaging.mid_shift, imaging.mid_shift + 1))
    offset = float(rng.uniform(-0.5, 0.5)) * imaging.spacing_mm
    return (np.arange(count, dtype=np.float64) - mid) * imaging.spacing_mm - offset, mid, offset


def _truth(anatomy: Anatomy, imaging: Imaging, mid: int, offset: float) -> ExamTruth:
    boxes = anatomy.rectangles() / imaging.pixel_mm + imaging.matrix / 2
    row, column = union_centroid(boxes, imaging.matrix)
    share = offset / imaging.spacing_mm
    acceptable = {mid} if abs(share) < 0.5 - MID_TOLERANCE else {mid, mid + int(np.sign(share))}
    pose = anatomy.pose
    return ExamTruth(
        mid, offset, tuple(sorted(acceptable)), boxes, row, column, pose.tilt_deg, pose.scale, anatomy.conus_s
    )


def union_centroid(boxes: NDArray[np.float64], matrix: int) -> tuple[float, float]:
    """Centroid (row, column, pixel indices) of the union of rectangles; a pixel belongs when its centre does."""
    centres = np.arange(matrix) + 0.5
    mask = np.zeros((matrix, matrix), bool)
    for left, top, right, bottom in boxes:
        mask |= ((centres > top) & (centres < bottom))[:, None] & ((centres > left) & (centres < right))
    rows, columns = np.nonzero(mask)
    return float(rows.mean()), float(columns.mean())
