"""Pixel data → stored values: which decoder, in which order, and whether the stream is what the header says.

Native decoders trust their caller: given a stream of another size than the header promises, some end their process and
some return wrong pixels. So the size that a stream states of itself is compared before any of them sees it.

References
----------
DICOM PS3.5, Annex A.4 (encapsulated pixel data), Annex G (RLE); ITU-T T.81, T.87, T.800 (frame headers).
"""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import TYPE_CHECKING

from pydicom.encaps import get_frame
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.utils import pixel_array
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000TransferSyntaxes,
    JPEGLSTransferSyntaxes,
    JPEGTransferSyntaxes,
    RLETransferSyntaxes,
)

if TYPE_CHECKING:
    import numpy as np
    from pydicom import FileDataset
    from pydicom.uid import UID

NATIVE_SYNTAXES = (
    ImplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    DeflatedExplicitVRLittleEndian,
)
"""Encodings whose pixels are not compressed one by one."""

PLUGINS = ("pyjpegls", "pylibjpeg", "gdcm", "pillow", "pydicom")
"""Decoders in the order in which they are tried: the first for JPEG-LS refuses what the third dies of."""

RLE_HEADER_BYTES = 64
"""Of every RLE frame: number and offsets of its segments."""

_FRAME_HEADERS = frozenset({*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC})
"""Second byte of the markers that start a JPEG or JPEG-LS frame header."""

_STANDALONE = frozenset({0x01, *range(0xD0, 0xDA)})
"""Second byte of the markers without a length."""


class CodecError(ValueError):
    """Pixel data that cannot be decoded; the message is the code."""


def decode_pixels(dataset: FileDataset, frame: int | None) -> np.ndarray:
    """Decode one image.

    Parameters
    ----------
    dataset
        A whole data set with a transfer syntax.
    frame
        Index of the frame; None for the only one.

    Returns
    -------
    numpy.ndarray
        Stored values as pydicom gives them, raw.

    Raises
    ------
    CodecError
        ``transfer_syntax`` if there is no decoder, ``decode_error`` if all of them fail or the stream is of another
        size than the header says.
    """
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax in NATIVE_SYNTAXES:
        return pixel_array(dataset, raw=True, index=frame)
    plugins = available_plugins(syntax)
    if not plugins:
        raise CodecError("transfer_syntax")
    count = int(dataset.get("NumberOfFrames") or 1)
    stream = get_frame(dataset.PixelData, frame or 0, number_of_frames=count)
    _check_stream(stream, syntax, (int(dataset.Rows), int(dataset.Columns)))
    for plugin in plugins:
        pixels = _attempt(dataset, frame, plugin)
        if pixels is not None:
            return pixels
    raise CodecError("decode_error")


def available_plugins(syntax: UID) -> tuple[str, ...]:
    """Installed decoders of a transfer syntax, in the order in which they are tried."""
    try:
        installed = get_decoder(syntax).available_plugins
    except NotImplementedError:
        return ()
    return tuple(sorted(installed, key=lambda name: PLUGINS.index(name) if name in PLUGINS else len(PLUGINS)))


def _attempt(dataset: FileDataset, frame: int | None, plugin: str) -> np.ndarray | None:
    """Pixels by one decoder; None if it fails."""
    try:
        return pixel_array(dataset, raw=True, index=frame, decoding_plugin=plugin)
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException:  # a panic in native code derives from it
        return None


def _check_stream(stream: bytes, syntax: UID, size: tuple[int, int]) -> None:
    """Refuse a compressed image that is cut off, or of another size than the header says."""
    if syntax in RLETransferSyntaxes:
        _check_runs(stream, size[0] * size[1])
    elif syntax in JPEG2000TransferSyntaxes:
        if _jpeg2000_size(stream) != size:
            raise CodecError("decode_error")
    elif syntax in JPEGTransferSyntaxes or syntax in JPEGLSTransferSyntaxes:
        whole = stream.rstrip(b"\0").endswith(b"\xff\xd9")  # one decoder spends seconds on a stream that is cut
        if not whole or _jpeg_size(stream) != size:
            raise CodecError("decode_error")


def _jpeg2000_size(stream: bytes) -> tuple[int, int]:
    start = stream.find(b"\xff\x4f\xff\x51")  # start of codestream, then its SIZ marker; boxes may precede
    if start < 0 or len(stream) < start + 24:
        raise CodecError("decode_error")
    right, bottom, left, top = struct.unpack_from(">4L", stream, start + 8)
    return bottom - top, right - left


def _jpeg_size(stream: bytes) -> tuple[int, int]:
    place = 2
    while place + 9 <= len(stream) and stream[place] == 0xFF:
        marker = stream[place + 1]
        if marker in _FRAME_HEADERS:
            rows, columns = struct.unpack_from(">2H", stream, place + 5)
            return rows, columns
        filler = marker == 0xFF  # any number of fill bytes may precede a marker
        (length,) = struct.unpack_from(">H", stream, place + 2)
        place += 1 if filler else 2 if marker in _STANDALONE else 2 + length
    raise CodecError("decode_error")


def _check_runs(stream: bytes, pixels: int) -> None:
    """Refuse run lengths that do not add up to the image: decoders cut or shift them silently."""
    if len(stream) < RLE_HEADER_BYTES:
        raise CodecError("decode_error")
    header = struct.unpack_from("<16L", stream)
    starts = [*header[1 : 1 + min(header[0], 15)], len(stream)]
    for begin, end in pairwise(starts):
        # The last run of a segment may be padded to an even number of bytes.
        if not pixels <= _run_length(stream[begin:end], limit=pixels + 2) <= pixels + 1:
            raise CodecError("decode_error")


def _run_length(segment: bytes, limit: int) -> int:
    """Bytes that a PackBits segment expands to, counted up to a limit."""
    total, place = 0, 0
    while place < len(segment) and total < limit:
        head = segment[place]
        if head < 128:
            total, place = total + head + 1, place + head + 2
        else:
            total, place = total + (257 - head if head > 128 else 0), place + (2 if head > 128 else 1)
    return total
