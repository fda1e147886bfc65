"""Selected stack → stored integer values and geometry.

Values are the ones the scanner stored (before any rescale), in native byte order, with bits above BitsStored cut off.
A fault of any slice stops the stack and names the file it came from.
"""

from __future__ import annotations

import logging
import warnings
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pydicom
from pydicom import config as pydicom_config

from preprocess.geometry import StackGeometry, canonical_pixels, stack_geometry
from preprocess.pixels.codecs import NATIVE_SYNTAXES, CodecError, decode_pixels
from preprocess.pixels.native import NativeImage, read_native

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from preprocess.headers.index import FileRow
    from preprocess.stacks import Stack

_ImageName: TypeAlias = "tuple[str, int | None]"
"""Path and frame."""


class VolumeError(ValueError):
    """A stack that cannot be converted.

    Parameters
    ----------
    code
        Error code; also the message, so that nothing of the file crosses a process.
    faults
        Path → code of the files at fault; empty when the stack as a whole is.
    """

    def __init__(self, code: str, faults: Mapping[str, str] | None = None) -> None:
        super().__init__(code)
        self.code = code
        self.faults = dict(faults or {})

    def __reduce__(self) -> tuple[type[VolumeError], tuple[str, dict[str, str]]]:
        return VolumeError, (self.code, self.faults)


@dataclass(frozen=True)
class Slice:
    """One decoded image."""

    pixels_HW: np.ndarray
    """Stored values, native byte order, as the file has them."""
    slope: float
    intercept: float
    padding: int | None = None
    """Stored value of pixels outside the scanned region, if the header names one."""


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
    padding: int | None
    """Stored value that marks pixels outside the scanned region; None when no slice, or not every slice, names one."""
    faults: Mapping[str, str]
    """Path → code of slices left out, where gaps are allowed."""


def load_volume(
    root: Path, stack: Stack, *, allow_gaps: bool = False, known_faults: Mapping[str, str] | None = None
) -> Volume:
    """Decode a stack and bring it to canonical orientation.

    Parameters
    ----------
    root
        The tree that the stack's paths are relative to.
    stack
        Rows and duplicates of one stack.
    allow_gaps
        Leave slices out that cannot be decoded, and accept missing ones.
    known_faults
        Path → code of files that must not be touched again, because they killed a process.

    Raises
    ------
    VolumeError
        With one of the codes of `preprocess.accounting.QUARANTINED`.
    GeometryError
        If the slices cannot be ordered.
    """
    if not allow_gaps:
        stack_geometry(stack.rows)  # before the pixels are read for nothing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        images, faults = _decode_all(root, stack.rows, known_faults or {})
        if faults and not (allow_gaps and len(faults) < len(stack.rows)):
            raise VolumeError(min(faults.values()), faults)
        _compare_duplicates(root, stack, images)
    return _assemble([row for row in stack.rows if _name(row) in images], images, faults, allow_gaps=allow_gaps)


def _assemble(
    rows: list[FileRow], images: dict[_ImageName, Slice], faults: dict[str, str], *, allow_gaps: bool
) -> Volume:
    geometry = stack_geometry(rows, allow_gaps=allow_gaps)
    slices = [images[_name(rows[index])] for index in geometry.order]
    flips = {"transpose": geometry.transpose, "flip_rows": geometry.flip_rows, "flip_columns": geometry.flip_columns}
    dtype = common_dtype([item.pixels_HW for item in slices])
    canonical = [canonical_pixels(item.pixels_HW, **flips) for item in slices]
    pixels_SHW = np.empty((len(canonical), *canonical[0].shape), dtype)
    for index, image in enumerate(canonical):
        pixels_SHW[index] = image
    paddings = {item.padding for item in slices}
    return Volume(
        pixels_SHW,
        geometry,
        rescale_slope=tuple(item.slope for item in slices),
        rescale_intercept=tuple(item.intercept for item in slices),
        inverted=any(row.photometric == "MONOCHROME1" for row in rows),
        padding=paddings.pop() if len(paddings) == 1 else None,
        faults=faults,
    )


def _name(row: FileRow) -> _ImageName:
    return row.path, row.frame


def _decode_all(
    root: Path, rows: Sequence[FileRow], known_faults: Mapping[str, str]
) -> tuple[dict[_ImageName, Slice], dict[str, str]]:
    """Decode every image, one file at a time; files that cannot be are named with their code."""
    frames: dict[str, list[FileRow]] = defaultdict(list)
    for row in rows:
        frames[row.path].append(row)
    images: dict[_ImageName, Slice] = {}
    faults: dict[str, str] = {}
    for path, members in frames.items():
        try:
            if path in known_faults:
                raise VolumeError(known_faults[path])
            images |= dict(zip(map(_name, members), decode_file(root, members), strict=True))
        except VolumeError as error:
            faults[path] = error.code
    return images, faults


def decode(root: Path, row: FileRow) -> Slice:
    """Decode one image; see `decode_file`."""
    return decode_file(root, [row])[0]


def decode_file(root: Path, rows: Sequence[FileRow]) -> list[Slice]:
    """Decode the images of one file to stored values.

    Parameters
    ----------
    root
        The tree.
    rows
        The file's row, or the rows of some frames of a multi-frame file.

    Raises
    ------
    VolumeError
        Saying why: ``truncated``, ``transfer_syntax``, ``decode_error``, ``bit_depth``, ...
    """
    path = Path(root, rows[0].path)
    try:
        native = read_native(str(path)) if rows[0].frame is None else None
        slices = [_from_native(*native)] if native else _from_pydicom(path, rows)
        if any(image.pixels_HW.shape != (row.rows, row.columns) for image, row in zip(slices, rows, strict=True)):
            raise VolumeError("decode_error")
    except (VolumeError, CodecError) as error:
        raise VolumeError(str(error), {rows[0].path: str(error)}) from None
    except OSError as error:  # pydicom raises it too, for a broken sequence, but the system's has a number
        code = "decode_error" if error.errno is None else "unreadable_file"
        raise VolumeError(code, {rows[0].path: code}) from None
    except Exception:  # decoders raise anything; their text may quote the header
        raise VolumeError("decode_error", {rows[0].path: "decode_error"}) from None
    return slices


@dataclass(frozen=True)
class _Encoding:
    """How the pixels of an image are to be understood."""

    bits_allocated: int
    bits_stored: int
    signed: bool
    inverted: bool
    padding: int | None
    slope: float
    intercept: float


def _from_native(image: NativeImage, pixels_HW: np.ndarray) -> Slice:
    encoding = _Encoding(
        bits_allocated=image.bits_allocated,
        bits_stored=image.bits_stored,
        signed=image.pixel_representation == 1,
        inverted=image.photometric == "MONOCHROME1",
        padding=image.padding_value,
        slope=image.rescale_slope,
        intercept=image.rescale_intercept,
    )
    return _slice(pixels_HW, encoding)


def _from_pydicom(path: Path, rows: Sequence[FileRow]) -> list[Slice]:
    pydicom_config.settings.reading_validation_mode = pydicom_config.IGNORE
    logging.getLogger("pydicom").disabled = True  # its messages quote headers
    dataset = pydicom.dcmread(path, force=True)
    _check_length(dataset)
    return [_slice(decode_pixels(dataset, row.frame), _encoding(dataset, row)) for row in rows]


def _check_length(dataset: pydicom.FileDataset) -> None:
    """Fill in an absent transfer syntax, and refuse uncompressed pixels that are shorter than promised."""
    if "PixelData" not in dataset and ("FloatPixelData" in dataset or "DoubleFloatPixelData" in dataset):
        raise VolumeError("bit_depth")
    meta = dataset.file_meta
    if "TransferSyntaxUID" not in meta:
        implicit, little = dataset.original_encoding
        native = "1.2.840.10008.1.2" if implicit else "1.2.840.10008.1.2.1" if little else "1.2.840.10008.1.2.2"
        meta.TransferSyntaxUID = pydicom.uid.UID(native)
    if meta.TransferSyntaxUID in NATIVE_SYNTAXES:
        pixels = int(dataset.Rows) * int(dataset.Columns) * int(dataset.get("NumberOfFrames") or 1)
        if len(dataset.get("PixelData") or b"") < pixels * ((int(dataset.BitsAllocated) + 7) // 8):
            raise VolumeError("truncated")


def _encoding(dataset: pydicom.FileDataset, row: FileRow) -> _Encoding:
    padding = dataset.get("PixelPaddingValue")
    slope, intercept = row.rescale_slope, row.rescale_intercept  # of a frame, from its functional groups
    if row.frame is None:
        slope, intercept = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")
    return _Encoding(
        bits_allocated=int(dataset.BitsAllocated),
        bits_stored=int(dataset.get("BitsStored") or dataset.BitsAllocated),
        signed=bool(dataset.get("PixelRepresentation", 0)),
        inverted=dataset.get("PhotometricInterpretation") == "MONOCHROME1",
        padding=padding if isinstance(padding, int) else None,
        slope=float(slope or 1),
        intercept=float(intercept or 0),
    )


def _slice(pixels_HW: np.ndarray, encoding: _Encoding) -> Slice:
    if pixels_HW.dtype.kind not in "iu":
        raise VolumeError("bit_depth")
    if not (np.isfinite(encoding.slope) and np.isfinite(encoding.intercept)):
        raise VolumeError("decode_error")
    pixels_HW = _clean_bits(pixels_HW, encoding)
    return Slice(pixels_HW, encoding.slope, encoding.intercept, _padding(encoding, np.iinfo(pixels_HW.dtype)))


def _clean_bits(pixels_HW: np.ndarray, encoding: _Encoding) -> np.ndarray:
    """Keep BitsStored bits, extend the sign, turn MONOCHROME1 over."""
    stored, signed = encoding.bits_stored, encoding.signed
    pixels_HW = pixels_HW.astype(pixels_HW.dtype.newbyteorder("="), copy=False)
    if stored < encoding.bits_allocated and not signed:
        pixels_HW = pixels_HW & ((1 << stored) - 1)  # junk above BitsStored: old overlays
    elif stored < encoding.bits_allocated:
        # Shifting up and back drops the junk and extends the sign in one go.
        shift = pixels_HW.dtype.itemsize * 8 - stored
        typed = pixels_HW.astype(f"i{pixels_HW.dtype.itemsize}", copy=False)
        pixels_HW = np.right_shift(np.left_shift(typed, shift), shift)
    if encoding.inverted:
        pixels_HW = np.bitwise_not(pixels_HW) if signed else ((1 << stored) - 1) - pixels_HW
    return pixels_HW


def _padding(encoding: _Encoding, limits: np.iinfo[Any]) -> int | None:
    """Return the stored value that marks padding as it stands after `_clean_bits`; None where there is none."""
    if encoding.padding is None:
        return None
    bits = encoding.bits_stored
    value = encoding.padding & ((1 << bits) - 1)  # the header may spell a negative value as an unsigned one
    if encoding.signed and value >> (bits - 1):
        value -= 1 << bits
    if encoding.inverted:
        value = ~value if encoding.signed else ((1 << bits) - 1) - value
    return value if limits.min <= value <= limits.max else None


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


def _compare_duplicates(root: Path, stack: Stack, images: dict[_ImageName, Slice]) -> None:
    """Refuse files that claim one image and show other pixels."""
    first = {(row.sop_uid, row.frame): row for row in stack.rows}
    for row in stack.duplicates:
        original = first[row.sop_uid, row.frame]
        known = images.get(_name(original))
        if known is None:
            continue  # left out as faulty; its twin goes with it
        twin = decode(root, row)
        same_scale = (twin.slope, twin.intercept) == (known.slope, known.intercept)
        if not (same_scale and np.array_equal(twin.pixels_HW, known.pixels_HW)):
            raise VolumeError(
                "conflicting_duplicate", dict.fromkeys((original.path, row.path), "conflicting_duplicate")
            )
