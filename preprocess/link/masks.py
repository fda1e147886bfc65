"""Mask files → masks on the slices of the store, under pseudonyms.

- PNG: one slice, named as `drawn` says;
- NIfTI: one series, named by its Series Instance UID, or by its pseudonym as ``export`` names it.

0 is background. Values 1 to 5 are the five levels in order; a file with one single value has the whole region.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

import nibabel as nib
import numpy as np
from PIL import Image
from tqdm import tqdm

from preprocess.cvat.shapes import LEVELS, REGION, CvatImage, Mask
from preprocess.cvat.write import FOOTER, HEADER, image_xml
from preprocess.link.drawn import Target, keys_of_objects, places_of, target_of
from preprocess.link.resolve import CODES, Book, resolve, series_key, slice_key
from preprocess.link.source import LinkError
from preprocess.store.export import LPS_TO_RAS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

GRID_TOLERANCE_PX = 0.1
"""How far, in voxels of the series, any corner of a NIfTI mask may lie from where it should: rounding of headers."""

_PNG_HEAD = struct.Struct(">8s4x4sIIBB")
_GREY, _PALETTE = 0, 3
_PNG_KINDS = {(_GREY, 1), (_GREY, 8), (_GREY, 16), *((_PALETTE, depth) for depth in (1, 2, 4, 8))}
"""(colour type, bits) whose values are read as they are; grey of 2 or 4 bits is not, because readers stretch it."""

_NIFTI = re.compile(r"\.nii(\.gz)?$", flags=re.IGNORECASE)
_PNG = re.compile(r"\.png$", flags=re.IGNORECASE)


class _Unusable(Exception):  # noqa: N818  (a verdict on one file)
    """A mask file that is not linked; ``code`` is the reason."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


@dataclass(frozen=True)
class MaskFolder:
    """A folder of mask files of which the names are known."""

    path: Path
    files: tuple[Path, ...]
    """Sorted by their path below the folder; hidden files are none of them."""
    keys: Any
    """Table of `preprocess.link.resolve.KEYS`."""

    @property
    def name(self) -> str:
        """Of the folder."""
        return self.path.name

    @property
    def out_name(self) -> str:
        """The same, as XML."""
        return f"{self.path.name}.xml"

    @property
    def lines(self) -> range:
        """File numbers, from 1."""
        return range(1, len(self.files) + 1)

    def translate(self, book: Book, out: TextIO) -> np.ndarray:
        """Write the linked slices, each once; return the number in `CODES` of every file."""
        resolution = resolve(self.keys, book, by_slice=True)
        codes_R = resolution.codes_R
        written: set[str] = set()
        out.write(HEADER)
        files = tqdm(self.files, desc="link", unit="mask", disable=None, delay=1)
        for row, (path, (key, place)) in enumerate(
            zip(files, places_of(self.keys, book, resolution.matches_R), strict=True)
        ):
            try:
                for image in _linked(path, key, place, codes_R[row], book):
                    if image.name in written:
                        raise _Unusable("duplicate")
                    out.write(image_xml(image, len(written)))
                    written.add(image.name)
            except _Unusable as verdict:
                codes_R[row] = CODES[verdict.code]
        out.write(FOOTER)
        return codes_R


def scan_masks(path: Path) -> MaskFolder:
    """List the files of a mask folder.

    Raises
    ------
    LinkError
        If it is no folder, or empty.
    """
    found = (file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    files = tuple(sorted(found, key=lambda file: file.relative_to(path).as_posix()))
    if not files:
        msg = f"{path} is no folder of masks: it must hold <SOPInstanceUID>.png or <SeriesInstanceUID>.nii.gz files"
        raise LinkError(msg)
    return MaskFolder(path, files, keys_of_objects(_key(file.relative_to(path).as_posix()) for file in files))


def _key(name: str) -> str:
    if _NIFTI.search(name):
        return series_key(_NIFTI.sub("", name).rpartition("/")[2])
    return slice_key(_PNG.sub("", name))


def _linked(path: Path, key: str, place: Mapping[str, Any], code: int, book: Book) -> list[CvatImage]:
    """Read one file, whose name resolved as `code` says."""
    is_volume = bool(_NIFTI.search(path.name))
    if not is_volume and not _PNG.search(path.name):
        raise _Unusable("bad_mask")
    if is_volume and code == CODES["slice_unmatched"]:
        raise _Unusable("series_unmatched")
    if code != CODES["linked"]:
        return []
    if is_volume:
        begin_mm = book.origins.get(place["series_id"]) if key.startswith("//") else None
        return _volume_images(_read_nifti(path, place, begin_mm), place, key)
    target = target_of(place, key)
    pixels_HW = _read_png(path, target.drawn_size)
    return [_image(pixels_HW, _labels(pixels_HW), target)]


def _volume_images(labels_SHW: np.ndarray, place: Mapping[str, Any], key: str) -> list[CvatImage]:
    labels = _labels(labels_SHW)
    marked = np.flatnonzero(labels_SHW.any(axis=(1, 2)))
    return [_image(labels_SHW[k], labels, target_of({**place, "slice_index": int(k)}, key)) for k in marked]


def _labels(values: np.ndarray) -> dict[int, str]:
    """Value → label of a file."""
    found = [int(value) for value in np.unique(values) if value]
    if not found:
        raise _Unusable("empty_mask")
    if len(found) == 1:
        return {found[0]: REGION}
    if min(found) < 1 or max(found) > len(LEVELS):
        raise _Unusable("bad_mask")
    return {value: LEVELS[value - 1] for value in found}


def _image(values_HW: np.ndarray, labels: Mapping[int, str], target: Target) -> CvatImage:
    marked = {label: values_HW == value for value, label in labels.items()}
    return target.place(Mask.from_pixels(label, pixels) for label, pixels in marked.items() if pixels.any())


def _read_png(path: Path, size: tuple[int, int]) -> np.ndarray:
    """Read the values (H, W) of a PNG; its header decides before anything is unpacked."""
    with path.open("rb") as file:
        head = file.read(_PNG_HEAD.size)
    if len(head) < _PNG_HEAD.size:
        raise _Unusable("bad_mask")
    signature, chunk, width, height, depth, colour = _PNG_HEAD.unpack(head)
    if (signature, chunk) != (b"\x89PNG\r\n\x1a\n", b"IHDR") or (colour, depth) not in _PNG_KINDS:
        raise _Unusable("bad_mask")
    if (height, width) != size:
        raise _Unusable("bad_size")
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            return np.asarray(picture)
    except Exception:  # a damaged file fails in whatever its reader calls
        raise _Unusable("bad_mask") from None


# --- NIfTI -----------------------------------------------------------------------------------------------------------


def _read_nifti(path: Path, place: Mapping[str, Any], position_mm: tuple[float, ...] | None) -> np.ndarray:
    """Read the values (S, H, W) of a NIfTI mask, in the order of the store."""
    try:
        image: Any = nib.load(path)
        affine, shape = np.asarray(image.affine, np.float64), image.shape
        has_grid = bool(image.header["sform_code"] or image.header["qform_code"])
    except Exception:  # a damaged file fails in whatever its reader calls
        raise _Unusable("bad_mask") from None
    order = _axes_on(place, shape, affine, position_mm) if has_grid else None
    if order is None:
        raise _Unusable("bad_grid")
    try:
        values: np.ndarray = np.asanyarray(image.dataobj).reshape(shape[:3])
        with np.errstate(invalid="ignore"):
            whole = values.astype(np.int64)
    except Exception:
        raise _Unusable("bad_mask") from None
    if not np.array_equal(whole, values):
        raise _Unusable("bad_mask")
    axes, flips = order
    stored: np.ndarray = whole.transpose(axes)[tuple(slice(None, None, -1 if flip else 1) for flip in flips)]
    return stored


def _axes_on(
    place: Mapping[str, Any], shape: tuple[int, ...], affine: np.ndarray, position_mm: tuple[float, ...] | None
) -> tuple[list[int], list[bool]] | None:
    """Find how the axes of a mask become slice, row and column of the stored series.

    Parameters
    ----------
    place
        Facts of the series.
    shape, affine
        Of the mask; the affine in RAS mm.
    position_mm
        Where the file of the first slice begins, patient LPS; None for a mask on an exported volume, which begins at
        its first pixel.

    Returns
    -------
    tuple or None
        Axis of the mask for each axis of the store, and whether it is reversed; None if the grids differ.
    """
    size = (place["num_slices"], place["rows"], place["columns"])
    if len(shape) < 3 or any(length != 1 for length in shape[3:]) or len(place["missing_mm"]):
        return None
    series = np.reshape(place["affine"], (4, 4)).astype(np.float64)
    if position_mm is not None:
        first = (0, (size[1] - 1) * place["flip_rows"], (size[2] - 1) * place["flip_columns"])
        series[:3, 3] = np.asarray(position_mm) - series[:3, :3] @ first
    with np.errstate(all="ignore"):
        try:
            to_store = np.linalg.inv(LPS_TO_RAS @ series) @ affine
        except np.linalg.LinAlgError:
            return None
    turned = np.round(to_store[:3, :3])
    if not np.isfinite(to_store).all() or not np.array_equal(np.abs(turned) @ np.abs(turned).T, np.eye(3)):
        return None
    axes = [int(axis) for axis in np.abs(turned).argmax(axis=1)]
    flips = [bool(row.sum() < 0) for row in turned]
    if tuple(shape[axis] for axis in axes) != size:
        return None
    expected = np.eye(4)
    expected[:3, :3] = turned
    expected[:3, 3] = [(length - 1) * flip for length, flip in zip(size, flips, strict=True)]
    corners = np.array([[i, j, k, 1] for i in (0, shape[0] - 1) for j in (0, shape[1] - 1) for k in (0, shape[2] - 1)])
    off = np.abs((to_store - expected) @ corners.T).max()
    return (axes, flips) if off <= GRID_TOLERANCE_PX else None
