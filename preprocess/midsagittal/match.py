"""Volume → mid-sagittal slice, by FFT correlation with hand-picked template slices.

Every slice and template is averaged onto one coarse grid in mm (so matrices and pixel sizes may differ), stripped of
its mean, tapered, and correlated circularly through the FFT; the peak within the allowed shift is the similarity, so
the anatomy may lie elsewhere in the image. Slices are judged by their mean similarity over the templates.

Shapes: S slices, T templates, G grid points, K frequencies (G // 2 + 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np
from scipy import fft
from scipy.sparse import csr_array

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

METHOD_VERSION = 1
"""Raised by hand when a choice may come out differently."""

GRID_MM = 2.2
"""Grid spacing: coarse enough to be blind to noise and matrix, fine enough for a disc."""

GRID = 128
"""Grid points per side: 281.6 mm, centred on the image; what lies outside is cut off, what is missing is zero."""

MAX_SHIFT_MM = 44.0
"""Largest displacement between template and slice, in each direction, at which a correlation peak is believed."""


class MidsagittalError(ValueError):
    """Templates or an artefact that cannot be used."""


@dataclass(frozen=True)
class Templates:
    """Hand-picked mid-sagittal slices on the common grid.

    Attributes
    ----------
    ids
        ``<series_id>/<slice_index>`` of each.
    patient_ids
        Pseudonym of the patient each shows; a patient is never judged by their own slices.
    images_TGG
        float32 (T, G, G), averaged onto the grid, not yet normalised.
    """

    ids: tuple[str, ...]
    patient_ids: tuple[str, ...]
    images_TGG: np.ndarray

    @cached_property
    def spectra_TGK(self) -> np.ndarray:  # noqa: N802  (shape suffix)
        """Conjugate spectra (T, G, K) of the normalised templates, complex64."""
        return np.asarray(np.conj(_spectra(self.images_TGG)))

    def without_patient(self, patient_id: str) -> Templates:
        """Drop the templates that show a patient."""
        keep = [index for index, owner in enumerate(self.patient_ids) if owner != patient_id]
        if len(keep) == len(self.ids):
            return self
        ids, owners = (tuple(names[index] for index in keep) for names in (self.ids, self.patient_ids))
        return Templates(ids, owners, self.images_TGG[keep])

    def save(self, path: Path) -> None:
        """Write as an uncompressed npz."""
        np.savez(path, ids=np.array(self.ids), patient_ids=np.array(self.patient_ids), images=self.images_TGG)


def load_templates(path: Path) -> Templates:
    """Read the ``templates.npz`` of a mid-sagittal artefact.

    Raises
    ------
    MidsagittalError
        If the file is missing or was made for another grid.
    """
    if not path.is_file():
        msg = f"templates not found: {path}; `python -m preprocess` with --templates writes them"
        raise MidsagittalError(msg)
    with np.load(path) as content:
        ids, owners, images = content["ids"], content["patient_ids"], content["images"]
    if images.shape[1:] != (GRID, GRID):
        msg = f"{path} holds templates of shape {images.shape[1:]}, this method needs {(GRID, GRID)}: choose again"
        raise MidsagittalError(msg)
    return Templates(tuple(ids.tolist()), tuple(owners.tolist()), images)


def make_templates(slices: Sequence[tuple[str, str, np.ndarray, tuple[float, float]]]) -> Templates:
    """Bring hand-picked slices onto the grid.

    Parameters
    ----------
    slices
        Template id, patient pseudonym, canonical slice (H, W), and (row, column) spacing in mm, for each.
    """
    images = [_on_grid(image_HW[None], spacing_mm)[0] for _, _, image_HW, spacing_mm in slices]
    return Templates(tuple(item[0] for item in slices), tuple(item[1] for item in slices), np.stack(images))


@dataclass(frozen=True)
class MidsagittalChoice:
    """The mid-sagittal slice of one volume."""

    slice_index: int
    score: float
    """Mean correlation of the slice with the templates, -1 to 1."""
    confidence: float
    """Share of templates that, asked alone, name this slice or a neighbour."""
    margin: float
    """`score` minus the best score two or more slices away."""
    template_id: str
    """The template that the slice resembles most."""
    scores: tuple[float, ...]
    """Score of every slice."""


def find_midsagittal(
    volume_SHW: np.ndarray, spacing_mm: tuple[float, float], templates: Templates
) -> MidsagittalChoice:
    """Find the slice that resembles the templates most.

    Parameters
    ----------
    volume_SHW
        Canonical sagittal stack.
    spacing_mm
        Row spacing, then column spacing.
    templates
        At least one, none of this patient.

    Raises
    ------
    MidsagittalError
        If no template is left.
    """
    if not templates.ids:
        msg = "no template of another patient: give templates of at least two patients"
        raise MidsagittalError(msg)
    similarity_ST = slice_similarity(volume_SHW, spacing_mm, templates)
    scores = similarity_ST.mean(axis=1)
    best = int(scores.argmax())
    votes = np.abs(similarity_ST.argmax(axis=0) - best) <= 1
    distant = scores[np.abs(np.arange(len(scores)) - best) > 1]
    return MidsagittalChoice(
        slice_index=best,
        score=float(scores[best]),
        confidence=float(votes.mean()),
        margin=float(scores[best] - distant.max()) if len(distant) else float(scores[best]),
        template_id=templates.ids[int(similarity_ST[best].argmax())],
        scores=tuple(float(value) for value in scores),
    )


def slice_similarity(volume_SHW: np.ndarray, spacing_mm: tuple[float, float], templates: Templates) -> np.ndarray:
    """Peak normalised correlation (S, T) of every slice with every template, within the allowed shift."""
    spectra_SGK = _spectra(_on_grid(volume_SHW, spacing_mm))
    similarity_ST = np.empty((len(spectra_SGK), len(templates.ids)), np.float32)
    reach = round(MAX_SHIFT_MM / GRID_MM)
    near = np.r_[0 : reach + 1, GRID - reach : GRID]
    for index, spectrum_GK in enumerate(spectra_SGK):
        # Shifts beyond the reach are dropped between the two one-dimensional transforms: most rows are never made.
        rows_TNK = fft.ifft(spectrum_GK * templates.spectra_TGK, axis=1)[:, near]
        similarity_ST[index] = fft.irfft(rows_TNK, n=GRID, axis=2)[:, :, near].max(axis=(1, 2))
    return similarity_ST


def _spectra(images_NGG: np.ndarray) -> np.ndarray:
    """Spectra (N, G, K), complex64, of images brought to zero mean and unit norm under the taper."""
    taper_GG = _taper()
    mean_N = (images_NGG * taper_GG).sum(axis=(1, 2)) / taper_GG.sum()
    tapered = (images_NGG - mean_N[:, None, None]) * taper_GG
    norm_N = np.sqrt(np.square(tapered).sum(axis=(1, 2)))
    return np.asarray(fft.rfft2(tapered / np.maximum(norm_N, np.float32(1e-6))[:, None, None]))


@lru_cache(maxsize=1)
def _taper() -> np.ndarray:
    """Raised-cosine window (G, G): what lies at the border of the field of view should not decide."""
    window = np.sin(np.pi * (np.arange(GRID) + 0.5) / GRID).astype(np.float32)
    return np.outer(window, window)


def _on_grid(images_SHW: np.ndarray, spacing_mm: tuple[float, float]) -> np.ndarray:
    """Average images onto the grid: (S, G, G) float32.

    Sparse products rather than matrix products: no threads, so the sums are the same on every machine.
    """
    count, height, width = images_SHW.shape
    images_HSW = images_SHW.transpose(1, 0, 2).astype(np.float32)
    rows_GSW = (_averager(height, spacing_mm[0]) @ images_HSW.reshape(height, -1)).reshape(GRID, count, width)
    columns_WSG = np.ascontiguousarray(rows_GSW.transpose(2, 1, 0))
    grid_GSG = (_averager(width, spacing_mm[1]) @ columns_WSG.reshape(width, -1)).reshape(GRID, count, GRID)
    return np.ascontiguousarray(grid_GSG.transpose(1, 2, 0))


@lru_cache(maxsize=64)
def _averager(count: int, spacing_mm: float) -> csr_array:
    """Sparse matrix (G, count) that averages samples onto the grid, by the share of each grid cell they cover."""
    edges = (np.arange(count + 1) - count / 2) * spacing_mm
    cells = (np.arange(GRID + 1) - GRID / 2) * GRID_MM
    low, high = np.maximum(cells[:-1, None], edges[None, :-1]), np.minimum(cells[1:, None], edges[None, 1:])
    return csr_array((np.clip(high - low, 0, None) / GRID_MM).astype(np.float32))
