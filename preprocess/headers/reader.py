"""Read the header of one DICOM file: a minimal reader for the common encodings, pydicom for everything else.

The minimal reader walks the elements in little-endian files with a preamble, keeps the few it is asked for and skips
the rest by their lengths. It gives up at the first byte it is not sure of, and pydicom decides; on every file that it
does read, both give the same values.

References
----------
DICOM PS3.5, chapter 7 (data set encoding); PS3.10, chapter 7 (file format).
"""

from __future__ import annotations

import io
import os
import re
import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pydicom
from pydicom.datadict import dictionary_VR
from pydicom.valuerep import EXPLICIT_VR_LENGTH_16, EXPLICIT_VR_LENGTH_32

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

CHUNK_BYTES = 16_384
"""Bytes read at a time; a classic header without private blocks fits in one."""

MAX_ELEMENTS = 20_000
"""Elements of one data set that the minimal reader walks before it leaves the file to pydicom."""

MAX_DEPTH = 8
"""Nesting of sequences that the minimal reader follows."""

MAX_READS = 1_000_000
"""Read operations that pydicom may spend on one header: seconds. Classic headers need hundreds."""

MAX_INFLATED_BYTES = 2**28
"""Size of the largest deflated file, inflated; a few kilobytes of zeros can claim terabytes."""

MAX_VALUE_BYTES = 65_536
"""A value longer than any short-form element can hold is no identifier, code or number."""

IMPLICIT, EXPLICIT, DEFLATED = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99"
COMPRESSED_SYNTAXES = ("1.2.840.10008.1.2.4.", "1.2.840.10008.1.2.5")
"""Starts of the UIDs of compressed encodings, whose headers are explicit little-endian."""

_TEXT = frozenset(name.encode() for name in ("UI", "CS", "DS", "IS", "DA", "TM", "LO", "SH", "AE"))
"""Value representations whose ASCII bytes are their text."""

_BINARY = {
    name.encode(): struct.Struct(form)
    for name, form in {"US": "<H", "SS": "<h", "UL": "<L", "SL": "<l", "FL": "<f", "FD": "<d"}.items()
}
"""Value representations of one number → its layout."""

_LONG_FORM = {str(vr).encode(): False for vr in EXPLICIT_VR_LENGTH_16 if len(vr) == 2} | {
    str(vr).encode(): True for vr in EXPLICIT_VR_LENGTH_32 if len(vr) == 2
}
"""Value representation → whether its length takes four bytes."""

_CHARSET = re.compile(rb"[A-Z0-9_ \\]*\Z")
UNDEFINED = 0xFFFFFFFF
_ITEM, _ITEM_END, _SEQUENCE_END = (struct.pack("<HH", 0xFFFE, element) for element in (0xE000, 0xE00D, 0xE0DD))
_EXPLICIT_HEAD, _IMPLICIT_HEAD, _LENGTH = struct.Struct("<4s2sH"), struct.Struct("<4sL"), struct.Struct("<L")
HEAD_BYTES = 12
_PREAMBLE_BYTES = 132
_PREAMBLE_READS = 2
"""pydicom's first reads ask for a preamble, which may be absent."""

_VR_LETTERS = range(0x41, 0x5B)

_CHECK, _STOP, _LEAVE = -1, -2, -3
"""What to do with an element: check that it is harmless, stop in front of it, leave the file to pydicom. A positive
action keeps the value under that tag."""

_Found = dict[int, tuple[bytes, bytes]]
"""Tag → value representation (empty if implicit) and value."""

PIXEL_TAGS = (0x7FE00008, 0x7FE00009, 0x7FE00010)
_CHARSET_TAG, _SYNTAX_TAG, _CLASS_TAG, _META_LENGTH_TAG = 0x00080005, 0x00020010, 0x00020002, 0x00020000


_NESTED = {struct.pack("<HH", 0x0008, 0x0005): _CHECK} | dict.fromkeys((_ITEM, _ITEM_END, _SEQUENCE_END), _LEAVE)
"""Actions within sequences; character sets may make pydicom refuse a file."""


class HeaderLimitError(ValueError):
    """A header beyond every limit of real ones."""


class UnsureError(Exception):
    """The minimal reader leaves the file to pydicom."""


@dataclass(frozen=True, slots=True)
class Header:
    """The elements asked for, and how the file is encoded."""

    values: dict[int, Any]
    """Tag → text with its backslashes, number, pydicom's value, or None if empty or malformed; only tags present."""
    transfer_syntax: str
    """As the meta header has it; empty if it has none."""
    media_class: str
    """SOP class of the meta header."""
    at_pixels: bool
    """Pixel data follow the header."""
    is_whole: bool = True
    """Ends in front of pixel data or with the file, not within an element."""
    dataset: pydicom.Dataset | None = None
    """pydicom's data set if pydicom read the file."""
    end: int = 0
    """Where the minimal reader stopped: offset of the pixel element."""


class Source:
    """Random access to the bytes of an open file through one buffer.

    Parameters
    ----------
    descriptor
        Of a regular file; stays open.
    """

    __slots__ = ("base", "buffer", "descriptor")

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.base = 0
        self.buffer = os.pread(descriptor, CHUNK_BYTES, 0)

    def locate(self, position: int, size: int) -> tuple[bytes, int]:
        """Return a buffer and the index in it where `size` bytes of the file start; fewer only at the file's end."""
        index = position - self.base
        if index < 0 or index + size > len(self.buffer):
            self.buffer = os.pread(self.descriptor, max(size, CHUNK_BYTES), position)
            self.base, index = position, 0
        return self.buffer, index

    def read(self, position: int, size: int) -> bytes:
        """Return exactly `size` bytes, at most `MAX_VALUE_BYTES`."""
        index = position - self.base
        if index < 0 or index + size > len(self.buffer):
            if size > MAX_VALUE_BYTES:
                raise UnsureError
            index = self.locate(position, size)[1]
        value = self.buffer[index : index + size]
        if len(value) != size:
            raise UnsureError
        return value


class Reader:
    """The minimal reader for a fixed set of elements.

    Parameters
    ----------
    wanted
        Tags to keep.
    leave
        Tags in whose presence pydicom reads the file.
    """

    def __init__(self, wanted: Iterable[int], leave: Iterable[int] = ()) -> None:
        actions = {tag: tag for tag in wanted} | dict.fromkeys(leave, _LEAVE) | dict.fromkeys(PIXEL_TAGS, _STOP)
        self._actions = _NESTED | {_key(tag): action for tag, action in actions.items()}

    def read(self, source: Source) -> Header | None:
        """Read a header.

        Parameters
        ----------
        source
            A file that starts with a preamble.

        Returns
        -------
        Header or None
            None if pydicom has to read the file.
        """
        try:
            return self._read(source)
        except UnsureError:
            return None

    def _read(self, source: Source) -> Header:
        meta, position = _read_meta(source)
        syntax, media_class = meta.get(_SYNTAX_TAG, ""), meta.get(_CLASS_TAG, "")
        explicit = syntax == EXPLICIT or syntax.startswith(COMPRESSED_SYNTAXES)
        buffer, index = source.locate(position, HEAD_BYTES)
        if not (explicit or syntax == IMPLICIT) or _looks_explicit(buffer, index) != explicit:
            raise UnsureError
        found: _Found = {}
        walk = _Walk(source, explicit)
        end = walk.elements(position, None, self._actions, found)
        values = {tag: _value(tag, vr, raw) for tag, (vr, raw) in found.items()}
        return Header(values, syntax, media_class, at_pixels=walk.stopped, is_whole=not walk.cut, end=end)


@dataclass(slots=True)
class _Walk:
    """One pass over the elements of a data set."""

    source: Source
    explicit: bool
    stopped: bool = False
    """Ended in front of an element to stop at."""
    cut: bool = False
    """The file ends within an element."""

    def elements(
        self, position: int, end: int | None, actions: Mapping[bytes, int], found: _Found, depth: int = 0
    ) -> int:
        """Walk to `end`, to an item's delimiter, or (top level) to pixel data or the file's end; return where.

        The one long loop of the package: every file of every tree goes through it, element by element.
        """
        source, explicit = self.source, self.explicit
        for _ in range(MAX_ELEMENTS):
            if end is not None and position >= end:
                return position
            buffer, index = source.buffer, position - source.base
            if index < 0 or index + HEAD_BYTES > len(buffer):
                buffer, index = source.locate(position, HEAD_BYTES)
                if len(buffer) < HEAD_BYTES:
                    return self._at_end(buffer, position, depth)
            if explicit:
                key, vr, length = _EXPLICIT_HEAD.unpack_from(buffer, index)
                long_form = _LONG_FORM.get(vr)
                if long_form:
                    (length,) = _LENGTH.unpack_from(buffer, index + 8)
                    start = position + 12
                elif long_form is None:
                    return self._delimiter(key, position, depth)
                else:
                    start = position + 8
            else:
                key, length = _IMPLICIT_HEAD.unpack_from(buffer, index)
                vr, start = b"", position + 8
                if key[:2] == b"\xfe\xff":
                    return self._delimiter(key, position, depth)
            action = actions.get(key)
            if action is not None:
                if action >= 0:
                    found[action] = vr, source.read(start, length)
                elif action == _STOP:
                    self.stopped = True
                    return position
                else:
                    self._check(action, vr, start, length)
            position = start + length if length != UNDEFINED else self._sequence(key, vr, start, depth)
        raise UnsureError

    def _at_end(self, rest: bytes, position: int, depth: int) -> int:
        if depth or len(rest) >= 8:
            raise UnsureError
        # Zeros that fill up a block are no element.
        self.cut = bool(rest.strip(b"\0")) or position > os.fstat(self.source.descriptor).st_size
        return position

    def _delimiter(self, key: bytes, position: int, depth: int) -> int:
        """Accept the end of an item of undefined length; anything else without a known representation is unsure."""
        if key != _ITEM_END or not depth:
            raise UnsureError
        return position

    def _check(self, action: int, vr: bytes, start: int, length: int) -> None:
        """Accept the character set if pydicom surely does."""
        if action == _LEAVE or not (vr in {b"CS", b""} and _CHARSET.match(self.source.read(start, length))):
            raise UnsureError

    def _sequence(self, key: bytes, vr: bytes, position: int, depth: int) -> int:
        """Skip a sequence of undefined length, and see that it is sound."""
        if depth >= MAX_DEPTH or not (vr == b"SQ" if self.explicit else _may_be_sequence(key)):
            raise UnsureError
        for number in range(MAX_ELEMENTS):
            head, length = _IMPLICIT_HEAD.unpack(self.source.read(position, 8))
            position += 8
            if head == _SEQUENCE_END and (number or self.explicit):
                return position
            if head != _ITEM:
                raise UnsureError
            if length:
                position = self._item(position, length, depth + 1)
        raise UnsureError

    def _item(self, position: int, length: int, depth: int) -> int:
        buffer, index = self.source.locate(position, HEAD_BYTES)
        if buffer[index : index + 4] != _ITEM_END and _looks_explicit(buffer, index) != self.explicit:
            raise UnsureError
        if length != UNDEFINED:
            end = self.elements(position, position + length, _NESTED, {}, depth)
            if end != position + length:
                raise UnsureError
            return end
        return self.elements(position, None, _NESTED, {}, depth) + 8


def _read_meta(source: Source, first: int = _PREAMBLE_BYTES) -> tuple[dict[int, str], int]:
    """Read the meta header; return its texts and where the data set starts."""
    position, meta = first, dict[int, str]()
    while True:
        buffer, index = source.locate(position, HEAD_BYTES)
        if len(buffer) - index < HEAD_BYTES:
            raise UnsureError
        key, vr, length = _EXPLICIT_HEAD.unpack_from(buffer, index)
        if key[:2] != b"\x02\x00":
            if key[:2] == b"\x00\x00" or not meta:
                raise UnsureError
            return meta, position
        long_form, tag, start = _LONG_FORM.get(vr), _tag(key), position + 8
        if long_form:
            (length,), start = _LENGTH.unpack_from(buffer, index + 8), position + 12
        if long_form is None or (position == first and tag != _META_LENGTH_TAG):
            raise UnsureError
        value = source.read(start, length)
        if tag == _META_LENGTH_TAG:
            if (vr, length) != (b"UL", 4):
                raise UnsureError
            meta[tag] = ""
        elif tag in {_SYNTAX_TAG, _CLASS_TAG}:
            if vr != b"UI" or not value.isascii() or b"\\" in value:
                raise UnsureError
            meta[tag] = value.decode("ascii").rstrip("\0 ")
        position = start + length


def _key(tag: int) -> bytes:
    return struct.pack("<HH", tag >> 16, tag & 0xFFFF)


def _tag(key: bytes) -> int:
    group, element = struct.unpack("<HH", key)
    return int(group) << 16 | int(element)


def _looks_explicit(buffer: bytes, index: int) -> bool:
    """Whether the element at an index names its value representation; pydicom's test."""
    vr = buffer[index + 4 : index + 6]
    return len(vr) == 2 and vr[0] in _VR_LETTERS and vr[1] in _VR_LETTERS


def _may_be_sequence(key: bytes) -> bool:
    """Whether an element of undefined length in implicit encoding is a sequence: known as one, or unknown."""
    try:
        return dictionary_VR(_tag(key)) == "SQ"
    except KeyError:
        return True


_DICTIONARY: dict[int, bytes] = {}


def _representation(tag: int, vr: bytes) -> bytes:
    """Complete a missing value representation from the dictionary."""
    if vr and vr != b"UN":
        return vr
    if tag not in _DICTIONARY:
        try:
            _DICTIONARY[tag] = dictionary_VR(tag).encode()
        except KeyError:
            _DICTIONARY[tag] = b"UN"
    return _DICTIONARY[tag]


def _value(tag: int, vr: bytes, raw: bytes) -> Any:  # noqa: ANN401  (text, number or None)
    vr = _representation(tag, vr)
    if vr in _TEXT and raw.isascii() and b"\x1b" not in raw:
        return raw.decode("ascii")
    layout = _BINARY.get(vr)
    if layout is None or len(raw) not in {0, layout.size}:
        raise UnsureError
    return layout.unpack(raw)[0] if raw else None


class BoundedReader(io.BufferedReader):
    """A file that gives no more than it has, and not for ever: what pydicom reads broken headers from.

    Parameters
    ----------
    descriptor
        Of a regular file; stays open.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__(io.FileIO(descriptor, closefd=False))
        self.size = os.fstat(descriptor).st_size
        self.ran_short = False
        """A value was shorter than its length; zeros that fill up a block are none."""
        self._met_end = False
        self._reads = 0

    def read(self, size: int | None = -1) -> bytes:
        """Read up to `size` bytes; a length blown up to gigabytes allocates no more than the file has left."""
        self._reads += 1
        if self._reads > MAX_READS:
            msg = f"a header of more than {MAX_READS} parts"
            raise HeaderLimitError(msg)
        asked = self.size if size is None or size < 0 else size
        found = super().read(asked if asked <= CHUNK_BYTES else min(asked, max(self.size - self.tell(), 0)))
        if len(found) < asked and self._reads > _PREAMBLE_READS:
            # pydicom finds the end by one read of a head that gives nothing.
            self.ran_short |= self._met_end or asked > HEAD_BYTES or bool(found.strip(b"\0"))
            self._met_end = True
        return found


def read_with_pydicom(stream: BoundedReader, wanted: Iterable[int], also: Iterable[int], *, force: bool) -> Header:
    """Read a header with pydicom.

    Parameters
    ----------
    stream
        The file, at its start.
    wanted
        Tags to keep the values of.
    also
        Further tags that the data set has to hold.
    force
        Read without a preamble.

    Raises
    ------
    Exception
        Whatever pydicom raises on a broken header.
    """
    wanted = list(wanted)
    _check_inflated(stream, preamble=not force)
    dataset = pydicom.dcmread(stream, stop_before_pixels=True, specific_tags=[*wanted, *also], force=force)
    syntax = str(dataset.file_meta.get("TransferSyntaxUID", ""))
    deflated = syntax == DEFLATED  # pydicom has read another stream, whose place is unknown
    is_whole = deflated or (stream.tell() == stream.size and not stream.ran_short)
    at_pixels = "Rows" in dataset if deflated else _at_pixels(stream, dataset)
    values = {tag: element_value(dataset, tag) for tag in wanted if tag in dataset}
    return Header(
        values,
        syntax,
        str(dataset.file_meta.get("MediaStorageSOPClassUID", "")),
        at_pixels=at_pixels,
        is_whole=at_pixels or is_whole,
        dataset=dataset,
    )


def _check_inflated(stream: BoundedReader, *, preamble: bool) -> None:
    """Refuse a deflated file that would fill the memory, without keeping what it inflates to."""
    source = Source(stream.fileno())
    if DEFLATED.encode() not in source.buffer:
        return
    try:
        meta, position = _read_meta(source, _PREAMBLE_BYTES if preamble else 0)
    except UnsureError:
        msg = "a deflated file with an irregular meta header"
        raise HeaderLimitError(msg) from None
    if meta.get(_SYNTAX_TAG) == DEFLATED and _inflated_size(source, position) > MAX_INFLATED_BYTES:
        msg = f"inflates to more than {MAX_INFLATED_BYTES} bytes"
        raise HeaderLimitError(msg)


def _inflated_size(source: Source, position: int) -> int:
    """Size of a raw deflate stream in bytes, counted no further than just beyond `MAX_INFLATED_BYTES`."""
    inflater, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
    while size <= MAX_INFLATED_BYTES and not inflater.eof:
        chunk = os.pread(source.descriptor, CHUNK_BYTES, position)
        if not chunk:
            break
        position += len(chunk)
        size += len(inflater.decompress(chunk))
    return size


def _at_pixels(stream: BoundedReader, dataset: pydicom.Dataset) -> bool:
    """Whether pydicom stopped in front of pixel data."""
    tag = stream.read(4)
    order = "<HH" if dataset.original_encoding[1] is not False else ">HH"
    if len(tag) < 4:
        return False
    group, element = struct.unpack(order, tag)
    return group << 16 | element in PIXEL_TAGS


def element_value(dataset: pydicom.Dataset, tag: int) -> Any:  # noqa: ANN401  (text, or pydicom's value)
    """Value of an element; plain ASCII text without pydicom's conversion, which costs half of an index's time.

    Returns
    -------
    Any
        Text with its backslashes, pydicom's value, or None if the element is absent or malformed.
    """
    try:
        element = dataset.get_item(tag)
        if element is None:
            return None
        raw = element.value
        if isinstance(raw, bytes) and raw.isascii() and b"\x1b" not in raw and _is_text(tag, element.VR):
            return raw.decode("ascii") if len(raw) <= MAX_VALUE_BYTES else None
        return dataset[tag].value
    except Exception:  # one malformed element must not lose the others
        return None


def _is_text(tag: int, vr: str | None) -> bool:
    return _representation(tag, (vr or "").encode()) in _TEXT
