"""Series of a store, or any stack with its geometry, as files that others read: NIfTI-1 and PNG.

Names hold pseudonyms only: ``<study_id>/<series_id>.nii.gz``, and ``<study_id>/<series_id>/<slice_index>.png`` as
linked annotations name their images. Pixels are never resampled, turned or flipped: a NIfTI file says by its affine
where they lie. Equal input gives equal bytes.

References
----------
NIfTI-1: https://nifti.nimh.nih.gov/nifti-1. DICOM PS3.3, C.7.6.2.1.1 (patient coordinates, LPS).
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import nibabel as nib
import numpy as np

from preprocess.commit import write_atomic
from preprocess.mapper import TaskFailure, map_here
from preprocess.store.png import encode_png
from preprocess.store.read import SliceStore
from preprocess.store.scan import scan_manifest
from preprocess.store.write import use_one_thread

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from preprocess.mapper import Mapper

Format = Literal["nifti", "png", "png16"]
"""NIfTI; PNG of 8 bits, one grey window per series; PNG of 16 bits with the stored values."""

FORMATS: tuple[Format, ...] = ("nifti", "png", "png16")

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""NIfTI's x and y point to the patient's right-to-left and back-to-front, DICOM's the other way."""

WINDOW_PERCENTILES = (1, 99)
"""Values shown black and white in a PNG of 8 bits, over the whole stack after the rescale."""

NIFTI_ALIGNED = 2
"""Transform code of the affine: directions are the patient's, but the origin is the first pixel, not the scanner's."""

GZIP_LEVEL = 6

_NIFTI_IMAGE: Any = nib.Nifti1Image  # nibabel has no types


class ExportError(ValueError):
    """A stack that cannot be written as asked."""


@dataclass(frozen=True)
class Stack:
    """A stack of slices with all that an exported file can say of it."""

    pixels_SHW: np.ndarray
    """Stored values, int16 or uint16."""
    affine: np.ndarray
    """(4, 4): (slice, row, column, 1) → patient LPS, mm, relative to an origin that is not the scanner's."""
    slope: tuple[float, ...] = (1.0,)
    """Rescale slope of each slice, or one for all."""
    intercept: tuple[float, ...] = (0.0,)
    """Rescale intercept of each slice, or one for all."""
    slice_names: tuple[str, ...] = ()
    """File name of each slice without its suffix; empty counts from 0."""
    has_gaps: bool = False
    """Whether slices are missing in between, so that no affine describes the stack."""
    note: str = ""
    """At most 79 characters for the NIfTI header, without identifiers."""

    @property
    def is_evenly_scaled(self) -> bool:
        """Whether one slope and one intercept hold for all slices."""
        return len(set(self.slope)) == 1 and len(set(self.intercept)) == 1

    def rescaled(self) -> np.ndarray:
        """Real values, float32: slope times stored value plus intercept, per slice."""
        slope, intercept = (np.asarray(values, np.float64)[:, None, None] for values in (self.slope, self.intercept))
        return np.asarray(self.pixels_SHW * slope + intercept, np.float32)


def series_stack(store: SliceStore, series_id: str) -> Stack:
    """Read a series with its geometry and scaling.

    Parameters
    ----------
    store
        The store, or the part of it that holds the series.
    series_id
        Pseudonym.
    """
    record = store.record(series_id)
    note = "uneven slice spacing: the affine has its mean" if record.uneven_spacing else ""
    return Stack(
        pixels_SHW=store.read(series_id),
        affine=np.reshape(record.affine, (4, 4)),
        slope=record.rescale_slope or (1.0,),
        intercept=record.rescale_intercept or (0.0,),
        has_gaps=bool(record.missing_mm),
        note=note,
    )


def export_series(store: SliceStore, series_id: str, out: Path, format: Format) -> list[Path]:
    """Write one series below a folder.

    Parameters
    ----------
    store
        The store, or the part of it that holds the series.
    series_id
        Pseudonym.
    out
        Folder of all exports; files of the same names are replaced.
    format
        One of `FORMATS`.

    Returns
    -------
    list of pathlib.Path
        What was written.

    Raises
    ------
    ExportError
        If stored values do not fit the format.
    """
    return export_stack(series_stack(store, series_id), out / store.record(series_id).study_id / series_id, format)


def export_stack(stack: Stack, base: Path, format: Format) -> list[Path]:
    """Write any stack: ``<base>.nii.gz``, or one PNG per slice in the folder `base`."""
    if format == "nifti":
        path = base.with_name(base.name + ".nii.gz")
        write_atomic(path, encode_nifti(stack))
        return [path]
    images_SHW = _windowed(stack) if format == "png" else _unsigned(stack)
    names = stack.slice_names or tuple(str(index) for index in range(len(images_SHW)))
    paths = [base / f"{name}.png" for name in names]
    for path, image_HW in zip(paths, images_SHW, strict=True):
        write_atomic(path, encode_png(image_HW))
    return paths


def encode_nifti(stack: Stack) -> bytes:
    """Encode a stack as compressed NIfTI-1.

    The voxel axes are column, row, slice, the first running fastest as in the store. With one slope and intercept for
    all slices the file holds the stored integers and the header both numbers; NIfTI has no place for more, so a stack
    that is scaled slice by slice is written as float32 with the scaling applied.

    Returns
    -------
    bytes
        A whole ``.nii.gz`` file; the affine is in RAS mm, its origin the stack's.

    Raises
    ------
    ExportError
        If slices are missing in between: NIfTI could only move the others.
    """
    if stack.has_gaps:
        msg = "slices are missing in between, which NIfTI cannot express; export this series as png"
        raise ExportError(msg)
    values_SHW = stack.pixels_SHW if stack.is_evenly_scaled else stack.rescaled()
    affine = LPS_TO_RAS @ stack.affine[:, [2, 1, 0, 3]]
    image: Any = _NIFTI_IMAGE(values_SHW.transpose(2, 1, 0), affine)
    image.set_qform(affine, code=NIFTI_ALIGNED)
    image.set_sform(affine, code=NIFTI_ALIGNED)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = stack.note.encode("ascii")
    if stack.is_evenly_scaled:
        image.header.set_slope_inter(stack.slope[0], stack.intercept[0])
    return gzip.compress(image.to_bytes(), GZIP_LEVEL, mtime=0)


def _windowed(stack: Stack) -> np.ndarray:
    """Real values in one grey window, (S, H, W) uint8."""
    values_SHW = stack.rescaled()
    low, high = np.percentile(values_SHW, WINDOW_PERCENTILES)
    grey = np.clip((values_SHW - low) / max(high - low, 1e-9), 0, 1) * 255
    return np.asarray(grey.round().astype(np.uint8))


def _unsigned(stack: Stack) -> np.ndarray:
    """Return stored values as uint16; negative ones are refused, because PNG has none."""
    if stack.pixels_SHW.min() < 0:
        msg = (
            f"stored values from {stack.pixels_SHW.min()} do not fit a 16-bit PNG, which has no negative ones; "
            "export this series as nifti, or as 8-bit png"
        )
        raise ExportError(msg)
    return stack.pixels_SHW.astype(np.uint16)


def export_store(
    store_path: Path,
    out: Path,
    format: Format,
    *,
    series_ids: Sequence[str] | None = None,
    mapper: Mapper = map_here,
) -> int:
    """Write the series of a store, one task per part of its manifest.

    Parameters
    ----------
    store_path
        A complete store.
    out
        Folder of all exports, outside the store.
    format
        One of `FORMATS`.
    series_ids
        Only these; None writes all.
    mapper
        Where tasks run.

    Returns
    -------
    int
        Number of series written.

    Raises
    ------
    ExportError
        If a series is not in the store, before anything is written, or its values do not fit the format.
    """
    if out.resolve().is_relative_to(store_path.resolve()):
        msg = f"{out} lies inside the store, which holds nothing but its series; choose a folder outside {store_path}"
        raise ExportError(msg)
    wanted = None if series_ids is None else frozenset(series_ids)
    parts = dict(_parts(store_path, wanted))
    found = sum(parts.values())
    if wanted is not None and found < len(wanted):
        msg = f"{len(wanted) - found} of {len(wanted)} series are not in {store_path}; the manifest lists what it holds"
        raise ExportError(msg)
    items = ((f"export-{name}", name) for name in parts)
    results = mapper(
        partial(_export_part, store_path, out, format, wanted), items, title="export", total=len(parts), unit="part"
    )
    return sum(_counted(results))


def _parts(store_path: Path, wanted: frozenset[str] | None) -> Iterator[tuple[str, int]]:
    """Parts of the manifest and how many of the wanted series each has; parts without one are left out."""
    for name, table in scan_manifest(store_path, ["series_id"]):
        count = table.num_rows if wanted is None else len(wanted.intersection(table["series_id"].to_pylist()))
        if count:
            yield name, count


def _export_part(store_path: Path, out: Path, format: Format, wanted: frozenset[str] | None, partition: str) -> int:
    use_one_thread()
    store = SliceStore.open(store_path, partition=partition)
    chosen = [series_id for series_id in store.manifest["series_id"] if wanted is None or series_id in wanted]
    for series_id in chosen:
        try:
            export_series(store, series_id, out, format)
        except ExportError as error:
            msg = f"series {series_id}: {error}"
            raise ExportError(msg) from None
    return len(chosen)


def _counted(results: Iterator[tuple[Any, int | TaskFailure]]) -> Iterator[int]:
    for _, count in results:
        if isinstance(count, TaskFailure):
            msg = "export failed: a task died on every attempt; check memory and disk, then run the command again"
            raise ExportError(msg)
        yield count
