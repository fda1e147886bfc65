"""Selected stack → stored integer values and geometry.

Values are the ones the scanner stored (before any rescale), in native byte order, with bits above BitsStored cut off.
A fault of any slice stops the stack and names the file it came from.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pydicom
from pydicom import config as pydicom_config
from pydicom.pixels.utils import pixel_array

from preprocess.geometry import StackGeometry, canonical_pixels, stack_geometry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from preprocess.index import FileRow
    from preprocess.stacks import Stack

_NATIVE_SYNTAXES = {"1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"}


class VolumeError(ValueError):
    """A stack that cannot be converted.

    Parameters
    ----------
    code
        Error code; also the message, so that nothing of the file crosses a process.
    paths
        Files at fault; empty when the stack as a whole is.
    """

    def __init__(self, code: str, paths: Sequence[str] = ()) -> None:
        super().__init__(code)
        self.code = code
        self.paths = tuple(paths)

    def __reduce__(self) -> tuple[type[VolumeError], tuple[str, tuple[str, ...]]]:
        return VolumeError, (self.code, self.paths)


@dataclass(frozen=True)
class Slice:
    """One decoded image."""

    pixels_HW: np.ndarray
    """Stored values, native byte order, as the file has them."""
    slope: float
    intercept: float


@dataclass(frozen=True)
class Volume:
    """A stack in canonical orientation."""

    pixels_SHW: np.ndarray
    """int16 or uint16 stored values: slices right → left, rows cranial → caudal, columns anterior → posterior."""
    geometry: StackGeometry
    rescale_slope: tuple[float, ...]
    """Per slice: value = slope x stored + intercept."""
    rescale_intercept: tuple[float, ...]
    inverted: bool
    """MONOCHROME1 was turned over so that large is bright."""


def load_volume(root: Path, stack: Stack) -> Volume:
    """Decode a stack and bring it to canonical orientation.

    Parameters
    ----------
    root
        The tree that the stack's paths are relative to.
    stack
        Rows and duplicates of one stack.

    Raises
    ------
    VolumeError
        With one of the codes of `preprocess.accounting.QUARANTINED`.
    GeometryError
        If the slices cannot be ordered.
    """
    geometry = stack_geometry(stack.rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        by_path = {row.path: decode(root, row) for row in stack.rows}
        _compare_duplicates(root, stack, by_path)
    slices = [by_path[stack.rows[index].path] for index in geometry.order]
    flips = {"transpose": geometry.transpose, "flip_rows": geometry.flip_rows, "flip_columns": geometry.flip_columns}
    dtype = common_dtype([item.pixels_HW for item in slices])
    canonical = [canonical_pixels(item.pixels_HW, **flips) for item in slices]
    pixels_SHW = np.empty((len(canonical), *canonical[0].shape), dtype)
    for index, image in enumerate(canonical):
        pixels_SHW[index] = image
    return Volume(
        pixels_SHW,
        geometry,
        rescale_slope=tuple(item.slope for item in slices),
        rescale_intercept=tuple(item.intercept for item in slices),
        inverted=any(row.photometric == "MONOCHROME1" for row in stack.rows),
    )


def decode(root: Path, row: FileRow) -> Slice:
    """Decode one single-frame image to stored values.

    Raises
    ------
    VolumeError
        Naming the file and why: ``truncated``, ``transfer_syntax``, ``decode_error``, ``bit_depth``, ...
    """
    pydicom_config.settings.reading_validation_mode = pydicom_config.IGNORE
    try:
        dataset = pydicom.dcmread(Path(root, row.path), force=True)
        pixels = _decoded(dataset)
        slope, intercept = float(dataset.get("RescaleSlope", 1) or 1), float(dataset.get("RescaleIntercept", 0) or 0)
    except VolumeError as error:
        raise VolumeError(error.code, (row.path,)) from None
    except OSError:
        raise VolumeError("unreadable_file", (row.path,)) from None
    except Exception:  # decoders raise anything; their text may quote the header
        raise VolumeError("decode_error", (row.path,)) from None
    if pixels.shape != (row.rows, row.columns):
        raise VolumeError("decode_error", (row.path,))
    return Slice(pixels, slope, intercept)


def _decoded(dataset: pydicom.FileDataset) -> np.ndarray:
    meta = dataset.file_meta
    if "TransferSyntaxUID" not in meta:
        implicit, little = dataset.original_encoding
        native = "1.2.840.10008.1.2" if implicit else "1.2.840.10008.1.2.1" if little else "1.2.840.10008.1.2.2"
        meta.TransferSyntaxUID = pydicom.uid.UID(native)
    if str(meta.TransferSyntaxUID) in _NATIVE_SYNTAXES:
        promised = int(dataset.Rows) * int(dataset.Columns) * ((int(dataset.BitsAllocated) + 7) // 8)
        if len(dataset.get("PixelData") or b"") < promised:
            raise VolumeError("truncated")
    try:
        pixels = pixel_array(dataset, raw=True)
    except (NotImplementedError, RuntimeError) as error:
        missing = isinstance(error, NotImplementedError) or "missing dependencies" in str(error)
        raise VolumeError("transfer_syntax" if missing else "decode_error") from None
    if pixels.dtype.kind not in "iu":
        raise VolumeError("bit_depth")
    return _clean_bits(pixels, dataset)


def _clean_bits(pixels: np.ndarray, dataset: pydicom.Dataset) -> np.ndarray:
    """Keep BitsStored bits, extend the sign, turn MONOCHROME1 over."""
    stored, allocated = int(dataset.get("BitsStored") or dataset.BitsAllocated), int(dataset.BitsAllocated)
    signed = bool(dataset.get("PixelRepresentation", 0))
    pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    if stored < allocated:
        # Shifting up and back drops junk above BitsStored (old overlays) and extends the sign in one go.
        shift = pixels.dtype.itemsize * 8 - stored
        typed = pixels.astype(f"{'i' if signed else 'u'}{pixels.dtype.itemsize}", copy=False)
        pixels = np.right_shift(np.left_shift(typed, shift), shift)
    if dataset.get("PhotometricInterpretation") == "MONOCHROME1":
        pixels = np.bitwise_not(pixels) if signed else ((1 << stored) - 1) - pixels
    return pixels


def common_dtype(images: Sequence[np.ndarray]) -> np.dtype:
    """Choose the 16-bit type that holds every value of a stack.

    Parameters
    ----------
    images
        Integer arrays of any width and sign.

    Returns
    -------
    numpy.dtype
        The images' own type if they share a 16-bit one; else uint16 for unsigned images, int16 for mixed or narrow
        signed ones.

    Raises
    ------
    VolumeError
        ``mixed_pixels`` or ``bit_depth`` if values do not fit.
    """
    dtypes = {image.dtype for image in images}
    if len(dtypes) == 1 and next(iter(dtypes)) in {np.dtype(np.int16), np.dtype(np.uint16)}:
        return next(iter(dtypes))
    dtype = np.dtype(np.uint16 if all(kind.kind == "u" for kind in dtypes) else np.int16)
    limits = np.iinfo(dtype)
    if min(int(image.min()) for image in images) < limits.min or max(int(image.max()) for image in images) > limits.max:
        raise VolumeError("bit_depth" if len(dtypes) == 1 else "mixed_pixels")
    return dtype


def _compare_duplicates(root: Path, stack: Stack, by_path: dict[str, Slice]) -> None:
    """Refuse files that claim one object id with other pixels."""
    first = {row.sop_uid: row for row in stack.rows}
    for row in stack.duplicates:
        original = first[row.sop_uid]
        twin, known = decode(root, row), by_path[original.path]
        same_scale = (twin.slope, twin.intercept) == (known.slope, known.intercept)
        if not (same_scale and np.array_equal(twin.pixels_HW, known.pixels_HW)):
            raise VolumeError("conflicting_duplicate", (original.path, row.path))
