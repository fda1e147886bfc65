"""Centres → one fixed box per study → crops of the mid-sagittal slice and its neighbours, with their provenance.

Shape suffixes: N studies, K slice offsets, H rows, W columns, S slices.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import pandas as pd
from tqdm import tqdm

from lbp_ray.roi.box import (
    MAX_SHIFT_MM,
    Box,
    Excluded,
    choose_neighbours,
    original_box,
    place_box,
    resize,
    shift_mm,
    size_in_pixels,
)
from lbp_ray.roi.centres import MANUAL, Flagged
from lbp_ray.roi.contact_sheet import MAX_TILES, chosen_rows, contact_sheet, tile
from lbp_ray.roi.overrides import COLUMNS as OVERRIDE_COLUMNS
from preprocess.commit import committed_directory, content_id
from preprocess.midsagittal.choose import load_midsagittal

if TYPE_CHECKING:
    from pathlib import Path

    from lbp_ray.roi.centres import Centre, Centres
    from preprocess.store.read import SliceStore

CROPS_VERSION = 3
"""Raised by hand when the same inputs give other crops."""

MAX_LISTED = 5
"""Studies that one message names; the rest are counted."""

BOX_OUTSIDE = "box_outside"
"""Reason of a predicted box that would leave the image by more than `lbp_ray.roi.box.MAX_SHIFT_MM`."""

EXCLUDED_COLUMNS = ("study_id", "reason", "detail")
"""Columns of ``excluded.parquet``: every study of the store that has no crop."""

REVIEW_COLUMNS = (*OVERRIDE_COLUMNS, "series_id", "slice_index", "reason", "detail")
"""Columns of ``review.csv``: the excluded studies whose predicted mask a person should look at. With its actions filled
in it is an override file."""


class RoiError(ValueError):
    """Crops that cannot be made or used."""


@dataclass(frozen=True)
class Crops:
    """The crops artefact: memory-mapped pixels and one table row per study."""

    pixels_NKHW: np.ndarray
    """Stored values (memory map)."""
    table: pd.DataFrame
    """Row n describes ``pixels_NKHW[n]``: ids, slice indices, offsets in mm, box, its source and centroid."""
    excluded: pd.DataFrame
    """`EXCLUDED_COLUMNS` of every study of the store that has no crop."""
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


@dataclass(frozen=True)
class CropRequest:
    """What crops are asked for."""

    height_px: int
    width_px: int
    offsets_mm: tuple[float, ...]
    tolerance_mm: float
    size_mm: tuple[float, float] | None = None
    """Height and width of a physical box, which is resampled onto the pixels above; None cuts those very pixels."""

    def address(self, store: SliceStore, midsagittal: Path, centres: Centres) -> str:
        """Return the content id of the crops that these inputs give."""
        return content_id(
            {
                "version": CROPS_VERSION,
                "store": store.content_hash,
                "midsagittal": hashlib.sha256((midsagittal / "midsagittal.parquet").read_bytes()).hexdigest(),
                "centres": centres.inputs,
                "box": [self.height_px, self.width_px],
                "size_mm": self.size_mm,
                "offsets_mm": list(self.offsets_mm),
                "tolerance_mm": self.tolerance_mm,
            }
        )

    def box_size(self, spacing_mm: tuple[float, float]) -> tuple[int, int]:
        """Return height and width, in pixels, of the box on images of this row and column spacing."""
        return (self.height_px, self.width_px) if self.size_mm is None else size_in_pixels(self.size_mm, spacing_mm)

    def crop(self, pixels: np.ndarray, box: Box) -> np.ndarray:
        """Cut a box out of (..., rows, columns) and bring it to the size asked for, resampled if it has another."""
        cut, wanted = box.cut(pixels), (self.height_px, self.width_px)
        return np.ascontiguousarray(cut if cut.shape[-2:] == wanted else resize(cut, wanted))


def build_crops(
    store: SliceStore,
    midsagittal: Path,
    centres: Centres,
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
    centres
        Where the boxes are centred.
    request
        Size, offsets and tolerance.
    folder
        Final folder; an existing one is opened as it is.
    progress
        Show a progress bar.

    Raises
    ------
    RoiError
        If no study yields a crop, or a crop by hand stands beside predicted ones although nothing speaks against what
        was predicted.
    """
    if not folder.is_dir():
        cutting = _Cutting(store, load_midsagittal(midsagittal).set_index("series_id")["slice_index"], centres, request)
        cutting.refuse_unflagged()
        with committed_directory(folder, point="crops") as partial:
            with (partial / "crops.npy").open("wb") as file:
                digest = cutting.cut_all(file, progress=progress)
            cutting.refuse_none()
            cutting.write(partial, digest)
    return Crops.open(folder)


class _Cutting:
    """What is gathered while the studies of a store are cut one by one."""

    def __init__(self, store: SliceStore, middle: pd.Series[int], centres: Centres, request: CropRequest) -> None:
        self.store, self.middle, self.centres, self.request = store, middle, centres, request
        self.dtype = np.result_type(*store.manifest["dtype"].unique())
        """Holds every stored value of the store: uint16, int16, or int32 where series differ."""
        self.table: list[dict[str, Any]] = []
        self.excluded: list[dict[str, str]] = []
        self.review: list[dict[str, Any]] = []
        self.review_masks: list[np.ndarray] = []

    def refuse_unflagged(self) -> None:
        """Refuse centres by hand that replace predicted ones which are not flagged."""
        rows = self.store.manifest.sort_values("study_id").to_dict("records")
        studies = [str(row["study_id"]) for row in rows if self._replaces_unflagged(row)]
        if studies:
            more = len(studies) - MAX_LISTED
            listed = ", ".join(studies[:MAX_LISTED]) + (f" and {more} more" if more > 0 else "")
            msg = (
                f"{len(studies)} exam(s) whose predicted mask is not flagged have a crop by hand: study {listed}; "
                "hand-placed crops beside predicted ones go with who was reviewed, and may go with the label. Take "
                "these exams out of paths.roi_corrections, and their centres out of paths.roi_overrides (`exclude` "
                "stays possible); only flagged masks, which review.csv lists, are corrected"
            )
            raise RoiError(msg)

    def _replaces_unflagged(self, row: dict[Any, Any]) -> bool:
        series_id = str(row["series_id"])
        if series_id not in self.middle.index:
            return False
        try:
            replaced = self.centres.of(row, int(self.middle[series_id])).replaces
            if replaced is not None:
                place_crop(replaced, self.request, *_grid(row))
        except Excluded:
            return False
        return replaced is not None

    def cut_all(self, file: BinaryIO, *, progress: bool) -> hashlib._Hash:
        """Write the crops one by one as ``numpy.save`` would write all of them, and return the hash of their pixels."""
        self._write_header(file)
        digest = hashlib.sha256()
        series = self.store.manifest.sort_values("study_id").to_dict("records")
        for row in tqdm(series, desc="crops", unit="study", disable=not progress):
            try:
                pixels = self._cut({str(name): value for name, value in row.items()}).astype(self.dtype).tobytes()
                digest.update(pixels)
                file.write(pixels)
            except Excluded as verdict:
                told = {"study_id": row["study_id"], "reason": verdict.reason, "detail": str(verdict)}
                self.excluded.append(told)
                if isinstance(verdict, Flagged):
                    self.review.append({**told, "series_id": row["series_id"], "slice_index": verdict.slice_index})
                    self.review_masks += [verdict.mask_HW] if len(self.review_masks) < MAX_TILES else []
        file.seek(0)
        self._write_header(file)
        return digest

    def _write_header(self, file: BinaryIO) -> None:
        """Write numpy's header, which keeps room for any number of studies."""
        request = self.request
        shape = (len(self.table), len(request.offsets_mm), request.height_px, request.width_px)
        descr = np.lib.format.dtype_to_descr(self.dtype)
        np.lib.format.write_array_header_1_0(file, {"shape": shape, "fortran_order": False, "descr": descr})

    def refuse_none(self) -> None:
        """Refuse an artefact without crops."""
        if not self.table:
            reasons = pd.Series([row["reason"] for row in self.excluded]).value_counts().to_dict()
            msg = (
                f"no study of the store yields a crop: {reasons}; check annotations or regions, and the mid-sagittal "
                "artefact"
            )
            raise RoiError(msg)

    def _cut(self, row: dict[str, Any]) -> np.ndarray:
        """Return the crops of one study, (K, H, W), after adding its row to the table."""
        series_id = str(row["series_id"])
        if series_id not in self.middle.index:
            raise Excluded("no_midsagittal", "the mid-sagittal artefact does not name this series")
        mid_index = int(self.middle[series_id])
        centre = self.centres.of(row, mid_index)
        positions_mm = self.store.positions_mm(series_id)
        request = self.request
        indices = choose_neighbours(positions_mm, mid_index, request.offsets_mm, tolerance_mm=request.tolerance_mm)
        volume_SHW = self.store.read(series_id)
        shape, spacing_mm = _grid(row)
        box, accepted_flags = place_crop(centre, request, shape, spacing_mm)
        cut_KHW = box.cut(volume_SHW[indices])
        if (cut_KHW == cut_KHW[:, :1, :1]).all(axis=(1, 2)).any():
            raise Excluded("blank_crop", "a slice is constant inside the box")
        pixels_KHW = request.crop(volume_SHW[indices], box)
        offsets = [float(positions_mm[index] - positions_mm[mid_index]) for index in indices]
        is_resampled = (box.height, box.width) != (request.height_px, request.width_px)
        self.table.append(
            {
                **{name: row[name] for name in ("study_id", "patient_id", "series_id")},
                "slice_index": [int(index) for index in indices],
                "slice_offset_mm": offsets,
                **_box_columns(box, row),
                "resampled": is_resampled,
                "centroid_row": centre.row,
                "centroid_column": centre.column,
                "crop_source": centre.source,
                "region_slice": centre.region_slice,
                "accepted_flags": accepted_flags,
                "image_rows": shape[0],
                "image_columns": shape[1],
                "row_spacing_mm": spacing_mm[0],
                "column_spacing_mm": spacing_mm[1],
            }
        )
        return pixels_KHW

    def write(self, folder: Path, digest: hashlib._Hash) -> None:
        """Write what stands beside the pixels, whose hash goes on over the table."""
        table = pd.DataFrame(self.table)
        digest.update(table.to_json(orient="records", double_precision=15).encode())
        table.to_parquet(folder / "crops.parquet", index=False)
        excluded = pd.DataFrame(self.excluded, columns=list(EXCLUDED_COLUMNS), dtype=str)
        excluded.to_parquet(folder / "excluded.parquet", index=False)
        pd.DataFrame(self.review, columns=list(REVIEW_COLUMNS)).to_csv(folder / "review.csv", index=False)
        (folder / "contact_sheet.png").write_bytes(self._contact_sheet())
        if self.review:
            (folder / "review.png").write_bytes(self._review_sheet())
        (folder / "crops.json").write_text(json.dumps({"crops_hash": digest.hexdigest()}))

    def _contact_sheet(self) -> bytes:
        tiles = []
        for row in (self.table[index] for index in chosen_rows(len(self.table))):
            middle = row["slice_index"][len(row["slice_index"]) // 2]
            box = Box(*(row[f"box_{name}"] for name in Box._fields))
            size = {"rows": row["image_rows"], "columns": row["image_columns"]}
            centre = self.centres.of({**row, **size}, int(self.middle[row["series_id"]]))
            tiles.append(tile(self.store.read(row["series_id"])[middle], box, centre.mask_HW))
        return contact_sheet(tiles)

    def _review_sheet(self) -> bytes:
        shown = zip(self.review, self.review_masks, strict=False)
        return contact_sheet(
            [tile(self.store.read(row["series_id"])[row["slice_index"]], None, mask_HW) for row, mask_HW in shown]
        )


def place_crop(
    centre: Centre, request: CropRequest, shape: tuple[int, int], spacing_mm: tuple[float, float]
) -> tuple[Box, str]:
    """Place the box of one study.

    Parameters
    ----------
    centre
        Where it should be centred.
    request
        Its size.
    shape
        Rows and columns of the image.
    spacing_mm
        Row spacing, column spacing.

    Returns
    -------
    box
        Inside the image.
    accepted_flags
        Codes that speak against it and that a person accepted, joined by ``+``.

    Raises
    ------
    Excluded
        If the image is smaller than the box; `Flagged` if it ends too far before the box that a predicted mask wants.
    """
    place = (centre.row, centre.column)
    height, width = request.box_size(spacing_mm)
    box = place_box(place, shape, height=height, width=width)
    shift = shift_mm(box, place, spacing_mm)
    if shift <= MAX_SHIFT_MM or centre.mask_HW is None or centre.source == MANUAL:
        return box, centre.flags
    if centre.is_accepted:
        return box, "+".join(filter(None, (centre.flags, BOX_OUTSIDE)))
    detail = f"the image ends {shift:.0f} mm before the box that the mask asks for, {MAX_SHIFT_MM:g} mm are accepted"
    raise Flagged(BOX_OUTSIDE, detail, centre.region_slice, centre.mask_HW)


def _grid(row: dict[Any, Any]) -> tuple[tuple[int, int], tuple[float, float]]:
    """Return rows and columns, and row and column spacing in mm, of a manifest row."""
    shape = int(row["rows"]), int(row["columns"])
    return shape, (float(row["spacing_row_mm"]), float(row["spacing_column_mm"]))


def _box_columns(box: Box, row: dict[str, Any]) -> dict[str, int]:
    """Describe a box on the pixel grids of the store and of the DICOM files."""
    flips = bool(row["transpose"]), bool(row["flip_rows"]), bool(row["flip_columns"])
    original = original_box(box, (int(row["rows"]), int(row["columns"])), flips)
    held = {f"box_{name}": value for name, value in box._asdict().items()}
    return held | {f"original_{name}": value for name, value in original._asdict().items()}
