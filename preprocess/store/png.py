"""Pixels to PNG: 8 or 16 bits of grey, or 8-bit colour; equal pixels give equal bytes.

References
----------
ISO/IEC 15948, Portable Network Graphics.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np

_GREY, _COLOUR = 0, 2
_UP = 2
"""Row filter: the difference to the row above, which neighbouring tissue keeps small."""


def encode_png(image: np.ndarray) -> bytes:
    """Encode one image.

    Parameters
    ----------
    image
        (H, W) uint8 or uint16, or (H, W, 3) uint8.

    Returns
    -------
    bytes
        A whole PNG file, without a time or any text.
    """
    assert image.dtype in (np.uint8, np.uint16)
    height, width = image.shape[:2]
    depth = image.dtype.itemsize * 8
    colour = _GREY if image.ndim == 2 else _COLOUR
    rows = np.ascontiguousarray(image.astype(image.dtype.newbyteorder(">"))).view(np.uint8).reshape(height, -1)
    filtered = np.empty((height, rows.shape[1] + 1), np.uint8)
    filtered[:, 0] = _UP
    filtered[:, 1:] = np.diff(rows, axis=0, prepend=np.zeros_like(rows[:1]))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(filtered.tobytes(), 6)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, content) for kind, content in chunks)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
