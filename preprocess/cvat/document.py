"""CVAT XML, image by image: only elements and their attributes are looked at, and no image outlives its turn.

A document type (DTD) is refused as soon as it begins, so that no entity, external or expanding, is ever defined.

References
----------
https://docs.cvat.ai/docs/other/xml_format
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, NamedTuple, NoReturn
from xml.parsers import expat

from preprocess.cvat.shapes import Box, CvatImage, Mask, Polygon, Shape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

CHUNK_BYTES = 1 << 16
"""Bytes parsed at a time."""

MAX_NUMBER = 2.0**31
"""No coordinate or run length is larger."""

MAX_PIXELS = 1 << 26
"""Images and masks with more are refused before anything of their size is allocated."""

SHAPES = frozenset({"box", "polygon", "mask"})
"""Elements that are read."""

OTHERS = frozenset({"points", "polyline", "ellipse", "cuboid", "skeleton", "tag"})
"""Elements that are only counted."""

_META = frozenset({"size", "start_frame", "frame_filter"})


class CvatError(ValueError):
    """A file that is no CVAT export, or of a kind that names no images."""


class Frame(NamedTuple):
    """An image of a task that is known by its number."""

    name: str
    width: int
    height: int


@dataclass
class Drawing:
    """What has been found on one image so far."""

    shapes: list[Shape] = field(default_factory=list)
    skipped: dict[str, None] = field(default_factory=dict)
    fault: str = ""

    def add(self, build: Callable[[], Shape]) -> None:
        """Add a shape, or the fault that it cannot be one."""
        try:
            self.shapes.append(build())
        except (ValueError, TypeError, KeyError, IndexError, OverflowError):
            self.fault = "bad_coordinates"

    def image(self, name: str, width: int, height: int) -> CvatImage:
        """Close the image; a mask that reaches out of it is a fault."""
        if min(width, height) < 1 or width * height > MAX_PIXELS:
            width = height = 0
        masks = [shape for shape in self.shapes if isinstance(shape, Mask)]
        if width and any(mask.left + mask.width > width or mask.top + mask.height > height for mask in masks):
            self.fault = "bad_coordinates"
        return CvatImage(name, width, height, tuple(self.shapes), tuple(self.skipped), self.fault)


# --- numbers ---------------------------------------------------------------------------------------------------------


def decimal(value: str | float) -> float:
    """Read a finite number of sane size; raise ValueError for another."""
    number = float(value)
    if not math.isfinite(number) or abs(number) > MAX_NUMBER:
        msg = "no coordinate"
        raise ValueError(msg)
    return number


def whole(value: str | float) -> int:
    """Read a whole number; raise ValueError for another."""
    number = decimal(value)
    if not number.is_integer():
        msg = "no whole number"
        raise ValueError(msg)
    return int(number)


def natural(value: str | None) -> int:
    """Read a size in pixels, 0 for what is none."""
    text = value or ""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 7 else 0


def polygon_of(label: str, numbers: Sequence[str | float]) -> Polygon:
    """Make a polygon of x, y, x, y, ..., at least three pairs."""
    values = [decimal(number) for number in numbers]
    if len(values) < 6 or len(values) % 2:
        msg = "no polygon"
        raise ValueError(msg)
    return Polygon(label, tuple(zip(values[::2], values[1::2], strict=True)))


def mask_of(label: str, runs: Sequence[str | float], edges: Sequence[str | float]) -> Mask:
    """Make a mask of run lengths and left, top, width, height; the last background may be left out."""
    left, top, width, height = map(whole, edges)
    lengths = list(map(whole, runs))
    missing = width * height - sum(lengths)
    if min(left, top) < 0 or min(width, height) < 1 or width * height > MAX_PIXELS or min(lengths, default=0) < 0:
        msg = "no mask"
        raise ValueError(msg)
    if missing < 0 or (missing and len(lengths) % 2):
        msg = "run lengths do not fit the rectangle"
        raise ValueError(msg)
    return Mask(label, left, top, width, height, (*lengths, missing) if missing else tuple(lengths))


def _shape_of(kind: str, label: str, attributes: Mapping[str, str]) -> Shape:
    if kind == "box":
        left, top, right, bottom = (decimal(attributes[name]) for name in ("xtl", "ytl", "xbr", "ybr"))
        return Box(label, left, top, right, bottom, decimal(attributes.get("rotation", "0")))
    if kind == "polygon":
        return polygon_of(label, attributes["points"].replace(";", ",").split(","))
    edge_names = ("left", "top", "width", "height")
    return mask_of(label, attributes["rle"].split(","), [attributes[name] for name in edge_names])


# --- the document ----------------------------------------------------------------------------------------------------


class _Handler:
    """What the parser meets, kept until it is asked for."""

    def __init__(self, *, may_be_video: bool) -> None:
        self.finished: list[CvatImage] = []
        self.tracked: dict[int, Drawing] = defaultdict(Drawing)
        self.is_video = False
        self.meta: dict[str, str] = {}
        self._may_be_video = may_be_video
        self._path: list[str] = []
        self._top: dict[str, str] = {}
        self._drawing = Drawing()

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        self._path.append(tag)
        depth = len(self._path)
        if depth == 1 and tag != "annotations":
            msg = "the root must be <annotations>; export 'CVAT for images 1.1'"
            raise CvatError(msg)
        if depth == 2:
            self._top, self._drawing = attributes, Drawing()
            self.is_video = self.is_video or tag == "track"
            if self.is_video and not self._may_be_video:
                msg = "it holds tracks of a video, which name no image; export 'CVAT for images 1.1'"
                raise CvatError(msg)
        if depth == 3 and self._path[1] == "image":
            self._add(self._drawing, tag, attributes.get("label", ""), attributes)
        if depth == 3 and self._path[1] == "track" and attributes.get("outside") != "1":
            try:
                frame = whole(attributes["frame"])
            except (KeyError, ValueError):
                msg = "a shape of a track has no frame number; export 'CVAT for images 1.1'"
                raise CvatError(msg) from None
            self._add(self.tracked[frame], tag, self._top.get("label", ""), attributes)

    def _add(self, drawing: Drawing, tag: str, label: str, attributes: dict[str, str]) -> None:
        if tag in SHAPES:
            drawing.add(lambda: _shape_of(tag, label, attributes))
        else:
            drawing.skipped[tag if tag in OTHERS else "other"] = None

    def text(self, text: str) -> None:
        if len(self._path) == 4 and self._path[1] == "meta" and self._path[3] in _META:
            self.meta[self._path[3]] = (self.meta.get(self._path[3], "") + text)[:32]

    def end(self, tag: str) -> None:
        if len(self._path) == 2 and tag == "image":
            size = natural(self._top.get("width")), natural(self._top.get("height"))
            self.finished.append(self._drawing.image(self._top.get("name", ""), *size))
        self._path.pop()

    def doctype(self, *_: object) -> NoReturn:
        msg = "it declares a document type, which CVAT never writes; export it from CVAT again"
        raise CvatError(msg)


def read_document(
    file: IO[bytes], frames_of: Callable[[Mapping[str, str]], Sequence[Frame]] | None = None
) -> Iterator[CvatImage]:
    """Yield the images of a CVAT 1.1 document.

    Parameters
    ----------
    file
        The XML.
    frames_of
        Finds the images of a video's frames, given ``size``, ``start_frame`` and ``frame_filter`` of its task; None
        where there is nothing to find them in.

    Raises
    ------
    CvatError
        If it is no such document, or a video whose frames have no names. The message does not name the file.
    """
    handler = _Handler(may_be_video=frames_of is not None)
    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = handler.start, handler.end
    parser.CharacterDataHandler, parser.StartDoctypeDeclHandler = handler.text, handler.doctype
    is_last = False
    while not is_last:
        chunk = file.read(CHUNK_BYTES)
        is_last = not chunk
        try:
            parser.Parse(chunk, is_last)
        except CvatError:
            raise
        except (expat.ExpatError, LookupError, ValueError) as error:  # the latter two: an encoding that is none
            why = str(error) if isinstance(error, expat.ExpatError) else "unknown encoding"
            msg = f"it cannot be read: it is not XML ({why}); export 'CVAT for images 1.1'"
            raise CvatError(msg) from None
        yield from handler.finished
        handler.finished.clear()
    if handler.is_video and frames_of is not None:
        yield from images_of(handler.tracked, frames_of(handler.meta))


def images_of(drawn: Mapping[int, Drawing], frames: Sequence[Frame]) -> Iterator[CvatImage]:
    """Yield an image for every frame.

    Raises
    ------
    CvatError
        If something is drawn on a frame that there is not.
    """
    beyond = [frame for frame in drawn if not 0 <= frame < len(frames)]
    if beyond:
        msg = f"something is drawn on frame {beyond[0]}, but {len(frames)} frames have names; export it again"
        raise CvatError(msg)
    for number, frame in enumerate(frames):
        yield drawn.get(number, Drawing()).image(*frame)
