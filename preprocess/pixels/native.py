"""Pixels of uncompressed images straight from the file: one read of the header, one of the pixels, no pydicom."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydicom.tag import Tag

from preprocess.headers.reader import EXPLICIT, HEAD_BYTES, IMPLICIT, UNDEFINED, Header, Reader, Source, UnsureError


@dataclass(frozen=True, slots=True)
class NativeImage:
    """Where the pixels of an uncompressed little-endian single-frame image lie, and what they mean."""

    offset: int
    """Of the first pixel in the file, bytes."""
    length: int
    """Bytes of pixel data that the header promises; the file may end earlier."""
    rows: int
    columns: int
    bits_allocated: int
    """8, 16 or 32."""
    bits_stored: int
    pixel_representation: int
    """1: two's complement, 0: unsigned."""
    photometric: str
    rescale_slope: float
    rescale_intercept: float
    padding_value: int | None
    """Stored value outside the image, if the header names one."""

    @property
    def dtype(self) -> np.dtype:
        """Type of the stored values, little-endian."""
        return np.dtype(f"<{'i' if self.pixel_representation else 'u'}{self.bits_allocated // 8}")


_TAGS = {
    name: int(Tag(name))
    for name in (
        "Rows",
        "Columns",
        "BitsAllocated",
        "BitsStored",
        "PixelRepresentation",
        "SamplesPerPixel",
        "NumberOfFrames",
        "PhotometricInterpretation",
        "RescaleSlope",
        "RescaleIntercept",
        "PixelPaddingValue",
    )
}
_FUNCTIONAL_GROUPS = (0x52009229, 0x52009230)
_PIXEL_DATA = struct.pack("<HH", 0x7FE0, 0x0010)
_reader = Reader(_TAGS.values(), leave=_FUNCTIONAL_GROUPS)


def read_native(path: str) -> tuple[NativeImage, np.ndarray] | None:
    """Read an uncompressed little-endian single-frame monochrome image without pydicom.

    Parameters
    ----------
    path
        The file.

    Returns
    -------
    tuple of NativeImage and numpy.ndarray, or None
        Header and (H, W) stored values, little-endian, 8, 16 or 32 bits as allocated. Bits above BitsStored are as the
        file has them; the others equal pydicom's raw pixels.
        None if pydicom has to read the file, also when it holds fewer pixels than promised, or twice as many.

    Raises
    ------
    OSError
        If the system cannot read the file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        image = native_image(Source(descriptor))
        if image is None:
            return None
        size = image.rows * image.columns * image.dtype.itemsize
        raw = os.pread(descriptor, size, image.offset) if size <= os.fstat(descriptor).st_size else b""
    finally:
        os.close(descriptor)
    if not size or len(raw) != size or not size <= image.length < 2 * size:  # twice: frames that nothing promises
        return None
    return image, np.frombuffer(raw, image.dtype).reshape(image.rows, image.columns)


def native_image(source: Source) -> NativeImage | None:
    """Find the pixels of an image; see `read_native`.

    Returns
    -------
    NativeImage or None
        None if the file is not known to be an uncompressed little-endian single-frame monochrome image.
    """
    try:
        header = _reader.read(source) if source.buffer[128:132] == b"DICM" else None
        return _native(source, header) if header else None
    except (UnsureError, TypeError, ValueError):  # an element that is no number
        return None


def _native(source: Source, header: Header) -> NativeImage | None:
    values: dict[str, Any] = {name: header.values.get(tag) for name, tag in _TAGS.items()}
    explicit = header.transfer_syntax == EXPLICIT
    if not header.at_pixels or not (explicit or header.transfer_syntax == IMPLICIT):
        return None
    if values["SamplesPerPixel"] != 1 or int(values["NumberOfFrames"] or 1) != 1:
        return None
    head = source.read(header.end, HEAD_BYTES)
    (length,) = struct.unpack_from("<L", head, 8 if explicit else 4)
    if head[:4] != _PIXEL_DATA or length == UNDEFINED or (explicit and head[4:6] not in {b"OB", b"OW"}):
        return None
    allocated, stored = values["BitsAllocated"], values["BitsStored"]
    if allocated not in {8, 16, 32} or not 1 <= stored <= allocated or values["PixelRepresentation"] not in {0, 1}:
        return None
    padding = values["PixelPaddingValue"]
    return NativeImage(
        header.end + (12 if explicit else 8),
        length,
        int(values["Rows"]),
        int(values["Columns"]),
        allocated,
        stored,
        values["PixelRepresentation"],
        str(values["PhotometricInterpretation"] or "").strip(" \0"),
        float(values["RescaleSlope"] or 1),
        float(values["RescaleIntercept"] or 0),
        padding if padding is None else int(padding),
    )
