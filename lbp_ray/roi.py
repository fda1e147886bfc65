"""Annotated rectangles → centroid → one fixed box per study → crops of the mid-sagittal slice and its neighbours.

Shape suffixes: N studies, K slice offsets, H rows, W columns, S slices.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from tqdm import tqdm

from lbp_ray.annotations import (
    AnnotatedSlice,
    AnnotationError,
    annotations_sha256,
    mask_centroid,
    read_annotations,
    union_mask,
)
from lbp_ray.contact_sheet import chosen_rows, contact_sheet, tile
from preprocess.commit import committed_directory, content_id
from preprocess.midsagittal.choose import load_midsagittal

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from preprocess.store.read import SliceStore

CROPS_VERSION = 1
"""Raised by hand when the same inputs give other crops."""


class RoiError(ValueError):
    """Crops that cannot be made or used."""


class Excluded(Exception):  # noqa: N818  (a verdict on one study, never an error of the program)
    """A study that yields no crop; ``reason`` is a code, the message a detail without identifiers."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class Box(NamedTuple):
    """A box of fixed size on the pixel grid of the store: first row and column, height and width."""

    row: int
    column: int
    height: int
    width: int

    def cut(self, pixels: np.ndarray) -> np.ndarray:
        """Return the box's part of (..., rows, columns)."""
        return pixels[..., self.row : self.row + self.height, self.column : self.column + self.width]


@dataclass(frozen=True)
class Crops:
    """The crops artefact: memory-mapped pixels and one table row per study."""

    pixels_NKHW: np.ndarray
    """Stored values (memory map)."""
    table: pd.DataFrame
    """Row n describes ``pixels_NKHW[n]``: ids, slice indices, offsets in mm, box, its source and centroid."""
    excluded: pd.DataFrame
    """``study_id``, ``reason``, ``detail`` of every study of the store that has no crop."""
    crops_hash: str
    """SHA-256 of pixels and table."""
    folder: Path

    @classmethod
    def open(cls, folder: Path) -> Crops:
        """Open a committed artefact; its pixels stay on disk until they are touched."""
        if not (folder / "crops.json").is_file():
            msg = f"{folder} is no crops artefact (no crops.json); the folders below crops/ of the runs are"
            raise RoiError(msg)
        meta = json.loads((folder / "crops.json").read_text())
        pixels = np.load(folder / "crops.npy", mmap_mode="r")
        table = pd.read_parquet(folder / "crops.parquet")
        return cls(pixels, table, pd.read_parquet(folder / "excluded.parquet"), meta["crops_hash"], folder)


def place_box(centroid: tuple[float, float], shape: tuple[int, int], *, height: int, width: int) -> Box:
    """Centre a box of fixed size on a centroid and shift it inside the image.

    Parameters
    ----------
    centroid
        Row and column in continuous pixel coordinates.
    shape
        Rows and columns of the image.
    height, width
        Size of the box in pixels.

    Raises
    ------
    Excluded
        If the image is smaller than the box; nothing is ever padded.
    """
    if shape[0] < height or shape[1] < width:
        detail = f"image {shape[0]} x {shape[1]}, box {height} x {width} (rows x columns)"
        raise Excluded("image_smaller_than_box", detail)
    row, column = (round(centre - size / 2) for centre, size in zip(centroid, (height, width), strict=True))
    return Box(
        int(np.clip(row, 0, shape[0] - height)), int(np.clip(column, 0, shape[1] - width)), height=height, width=width
    )


def choose_neighbours(
    positions_mm: np.ndarray, mid_index: int, offsets_mm: Sequence[float], *, tolerance_mm: float
) -> np.ndarray:
    """Choose the slices nearest to signed offsets from the mid-sagittal one.

    Parameters
    ----------
    positions_mm
        (S,) position of each slice along the patient's right-to-left axis.
    mid_index
        The mid-sagittal slice.
    offsets_mm
        Nominal offsets, ascending.
    tolerance_mm
        Largest accepted distance from a nominal offset.

    Returns
    -------
    numpy.ndarray
        (K,) slice indices.

    Raises
    ------
    Excluded
        If an offset has no slice near enough.
    """
    distance_KS = np.abs(positions_mm[None, :] - positions_mm[mid_index] - np.asarray(offsets_mm)[:, None])
    chosen: np.ndarray = distance_KS.argmin(axis=1)
    for offset, distance in zip(offsets_mm, distance_KS.min(axis=1), strict=True):
        if distance > tolerance_mm:
            raise Excluded("neighbour_missing", f"no slice within {tolerance_mm} mm of {offset:+g} mm from the middle")
    if len(set(chosen)) < len(chosen):
        raise Excluded("neighbour_repeated", f"slices lie too far apart for a pitch of {offsets_mm} mm")
    return chosen


@dataclass(frozen=True)
class CropRequest:
    """What crops are asked for."""

    height_px: int
    width_px: int
    offsets_mm: tuple[float, ...]
    tolerance_mm: float

    def address(self, store: SliceStore, midsagittal: Path, annotations: Path) -> str:
        """Return the content id of the crops that these inputs give."""
        return content_id(
            {
                "version": CROPS_VERSION,
                "store": store.content_hash,
                "midsagittal": hashlib.sha256((midsagittal / "midsagittal.parquet").read_bytes()).hexdigest(),
                "annotations": annotations_sha256(annotations),
                "box": [self.height_px, self.width_px],
                "offsets_mm": list(self.offsets_mm),
                "tolerance_mm": self.tolerance_mm,
            }
        )


def build_crops(
    store: SliceStore,
    midsagittal: Path,
    annotations: Path,
    request: CropRequest,
    *,
    folder: Path,
    progress: bool = True,
) -> Crops:
    """Cut every study of a store and commit the crops artefact.

    Parameters
    ----------
    store
        Complete slice store.
    midsagittal
        Mid-sagittal artefact made from this store.
    annotations
        Linked CVAT XML.
    request
        Size, offsets and tolerance.
    folder
        Final folder; an existing one is opened as it is.
    progress
        Show a progress bar.

    Raises
    ------
    RoiError
        If no study yields a crop.
    """
    if not folder.is_dir():
        table, pixels, excluded = _cut_all(store, midsagittal, annotations, request, progress=progress)
        if not pixels:
            reasons = pd.Series([row["reason"] for row in excluded]).value_counts().to_dict()
            msg = f"no study of the store yields a crop: {reasons}; check annotations and the mid-sagittal artefact"
            raise RoiError(msg)
        sheet = _contact_sheet(store, table)
        _commit(folder, pd.DataFrame(table), np.stack(pixels), excluded, sheet)
    return Crops.open(folder)


def _cut_all(
    store: SliceStore, midsagittal: Path, annotations: Path, request: CropRequest, *, progress: bool
) -> tuple[list[dict[str, Any]], list[np.ndarray], list[dict[str, str]]]:
    middle = load_midsagittal(midsagittal).set_index("series_id")["slice_index"]
    annotated = {item.series_id: item for item in read_annotations(annotations)}
    table: list[dict[str, Any]] = []
    pixels: list[np.ndarray] = []
    excluded: list[dict[str, str]] = []
    series = store.manifest.sort_values("study_id")
    for row in tqdm(series.to_dict("records"), desc="crops", unit="study", disable=not progress):
        try:
            if row["series_id"] not in middle.index:
                raise Excluded("no_midsagittal", "the mid-sagittal artefact does not name this series")
            description, crop_KHW = _cut(store, row, int(middle[row["series_id"]]), annotated, request)
        except Excluded as verdict:
            excluded.append({"study_id": row["study_id"], "reason": verdict.reason, "detail": str(verdict)})
        else:
            table.append(description)
            pixels.append(crop_KHW)
    return table, pixels, excluded


def _cut(
    store: SliceStore,
    row: dict[Any, Any],
    mid_index: int,
    annotated: dict[str, AnnotatedSlice],
    request: CropRequest,
) -> tuple[dict[str, Any], np.ndarray]:
    series_id = str(row["series_id"])
    annotation = annotated.get(series_id)
    if annotation is None:
        raise Excluded("no_annotation", "no annotated slice of this series")
    if annotation.fault:
        raise Excluded("faulty_annotation", annotation.fault)
    positions_mm = store.positions_mm(series_id)
    indices = choose_neighbours(positions_mm, mid_index, request.offsets_mm, tolerance_mm=request.tolerance_mm)
    volume_SHW = store.read(series_id)
    shape = (volume_SHW.shape[1], volume_SHW.shape[2])
    try:
        centroid = mask_centroid(union_mask(annotation.rectangles, shape))
    except AnnotationError as error:
        raise Excluded("faulty_annotation", str(error)) from error
    box = place_box(centroid, shape, height=request.height_px, width=request.width_px)
    crop_KHW = np.ascontiguousarray(box.cut(volume_SHW[indices]))
    if (crop_KHW == crop_KHW[:, :1, :1]).all(axis=(1, 2)).any():
        raise Excluded("blank_crop", "a slice is constant inside the box")
    description = {
        "study_id": row["study_id"],
        "patient_id": row["patient_id"],
        "series_id": series_id,
        "slice_index": [int(index) for index in indices],
        "slice_offset_mm": [float(positions_mm[index] - positions_mm[mid_index]) for index in indices],
        "box_row": box.row,
        "box_column": box.column,
        "box_height": box.height,
        "box_width": box.width,
        "centroid_row": centroid[0],
        "centroid_column": centroid[1],
        "crop_source": "annotation",
        "annotated_slice": annotation.slice_index,
        "image_rows": shape[0],
        "image_columns": shape[1],
        "row_spacing_mm": row["spacing_row_mm"],
        "column_spacing_mm": row["spacing_column_mm"],
    }
    return description, crop_KHW


def _contact_sheet(store: SliceStore, table: list[dict[str, Any]]) -> bytes:
    tiles = []
    for row in (table[index] for index in chosen_rows(len(table))):
        middle = row["slice_index"][len(row["slice_index"]) // 2]
        box = (row["box_row"], row["box_column"], row["box_height"], row["box_width"])
        tiles.append(tile(store.read(row["series_id"])[middle], box))
    return contact_sheet(tiles)


def _commit(
    folder: Path, table: pd.DataFrame, pixels_NKHW: np.ndarray, excluded: list[dict[str, str]], sheet: bytes
) -> None:
    digest = hashlib.sha256(np.ascontiguousarray(pixels_NKHW).tobytes())
    digest.update(table.to_json(orient="records", double_precision=15).encode())
    with committed_directory(folder, point="crops") as partial:
        np.save(partial / "crops.npy", pixels_NKHW)
        table.to_parquet(partial / "crops.parquet", index=False)
        columns = ["study_id", "reason", "detail"]
        pd.DataFrame(excluded, columns=columns, dtype=str).to_parquet(partial / "excluded.parquet", index=False)
        (partial / "contact_sheet.png").write_bytes(sheet)
        (partial / "crops.json").write_text(json.dumps({"crops_hash": digest.hexdigest()}))
