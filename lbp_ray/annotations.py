"""CVAT 1.1 XML: five rectangles per annotated mid-sagittal slice → one centroid."""

from __future__ import annotations

import hashlib
import re
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

LEVELS = ("L1L2", "L2L3", "L3L4", "L4L5", "L5S1")
"""Labels of the five rectangles, one per disc, each from mid-body to mid-body."""

_NAME = re.compile(r"(?P<study>[a-z2-7]+)/(?P<series>[a-z2-7]+)/(?P<slice>\d+)\.\w+$")


class AnnotationError(ValueError):
    """An annotation file that cannot be read."""


class Rectangle(NamedTuple):
    """An axis-aligned rectangle in continuous pixel coordinates (0 is the outer edge of the first pixel)."""

    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True)
class AnnotatedSlice:
    """The rectangles of one slice, or what is wrong with them."""

    study_id: str
    series_id: str
    slice_index: int
    rectangles: tuple[Rectangle, ...]
    fault: str = ""
    """Empty, or why the slice cannot be used."""


def read_annotations(path: Path) -> list[AnnotatedSlice]:
    """Read a linked CVAT 1.1 file ("for images").

    Parameters
    ----------
    path
        Image names are ``<study>/<series>/<slice>.png``, as ``python -m preprocess link`` writes them.

    Returns
    -------
    list of AnnotatedSlice
        In file order; faulty ones carry their fault and no rectangle.

    Raises
    ------
    AnnotationError
        If the file is absent, not CVAT XML or not linked.
    """
    annotations_sha256(path)  # an absent file is refused in one place
    try:
        root = ET.parse(path).getroot()
    except ET.ParseError as error:
        msg = f"{path} is not XML: {error}"
        raise AnnotationError(msg) from error
    if root.tag != "annotations":
        msg = f"{path}: the root must be <annotations>, found <{root.tag}>; export 'CVAT for images 1.1'"
        raise AnnotationError(msg)
    return [_slice(image, path) for image in root.iter("image")]


def annotations_sha256(path: Path) -> str:
    """Return the SHA-256 of an annotation file.

    Raises
    ------
    AnnotationError
        If the file is absent.
    """
    if not path.is_file():
        msg = f"annotation file not found: {path}; `python -m preprocess link` writes it"
        raise AnnotationError(msg)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _slice(image: ET.Element, path: Path) -> AnnotatedSlice:
    match = _NAME.fullmatch(image.get("name", ""))
    if match is None:
        msg = (
            f"{path}: image {image.get('id', '?')} is not named <study>/<series>/<slice>.png by pseudonyms; "
            "run `python -m preprocess link` on the export"
        )
        raise AnnotationError(msg)
    boxes = {box.get("label", ""): box for box in image.iter("box")}
    counts = Counter(box.get("label", "") for box in image.iter("box"))
    faults = [f"missing_{level}" for level in LEVELS if not counts[level]]
    faults += [f"repeated_{level}" for level in LEVELS if counts[level] > 1]
    faults += ["unknown_label" for label in counts if label not in LEVELS][:1]
    rectangles = tuple(_rectangle(boxes[level]) for level in LEVELS) if not faults else ()
    if any(box.right <= box.left or box.bottom <= box.top for box in rectangles):
        faults, rectangles = ["empty_rectangle"], ()
    place = (match["study"], match["series"], int(match["slice"]))
    return AnnotatedSlice(*place, rectangles, fault="+".join(faults))


def _rectangle(box: ET.Element) -> Rectangle:
    return Rectangle(*(float(box.get(edge, "nan")) for edge in ("xtl", "ytl", "xbr", "ybr")))


def union_mask(rectangles: tuple[Rectangle, ...], shape: tuple[int, int]) -> np.ndarray:
    """Rasterise the union of rectangles: a pixel belongs when its centre does.

    Parameters
    ----------
    rectangles
        In continuous pixel coordinates.
    shape
        Rows and columns of the image.

    Returns
    -------
    numpy.ndarray
        (rows, columns) bool.
    """
    rows, columns = np.arange(shape[0])[:, None] + 0.5, np.arange(shape[1])[None, :] + 0.5
    mask = np.zeros(shape, dtype=bool)
    for box in rectangles:
        mask |= (rows >= box.top) & (rows < box.bottom) & (columns >= box.left) & (columns < box.right)
    return mask


def mask_centroid(mask: np.ndarray) -> tuple[float, float]:
    """Return the centroid (row, column) of a mask in continuous pixel coordinates.

    Raises
    ------
    AnnotationError
        If the mask is empty.
    """
    rows, columns = np.nonzero(mask)
    if not len(rows):
        msg = "the union of the rectangles covers no pixel of the image; check that they belong to this image"
        raise AnnotationError(msg)
    return float(rows.mean() + 0.5), float(columns.mean() + 0.5)
