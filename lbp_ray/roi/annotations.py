"""Linked annotations: the shapes of one slice → its lumbar mask and where that is centred.

A slice is annotated by five shapes, one per disc, each from mid-body to mid-body, or by the whole lumbar region. What
is drawn may be boxes, polygons or masks; anything else is a fault of that slice, named by code.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from preprocess.cvat.document import CvatError
from preprocess.cvat.read import read_cvat
from preprocess.cvat.shapes import LEVELS, REGION, CvatImage, Shape, rasterise

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

__all__ = [
    "LEVELS",
    "REGION",
    "AnnotatedSlice",
    "AnnotationError",
    "CentreRule",
    "annotations_sha256",
    "faults_by_image",
    "mask_centroid",
    "read_annotations",
]

CentreRule: TypeAlias = Literal["union", "mean_of_five"]
"""Centroid of all pixels together, where overlaps count once; or the mean of the centroids of the five levels."""

_NAME = re.compile(r"(?:.*/)?(?P<study>[a-z2-7]+)/(?P<series>[a-z2-7]+)/(?P<slice>[0-9]{1,6})\.\w+")


class AnnotationError(ValueError):
    """Annotations that cannot be read, or not be used as asked."""


@dataclass(frozen=True)
class AnnotatedSlice:
    """The shapes of one slice, or what is wrong with them."""

    study_id: str
    series_id: str
    slice_index: int
    shapes: tuple[Shape, ...]
    """The five levels in the order of `LEVELS`, or shapes of the whole region; none in a faulty slice."""
    rows: int
    """Of the image, as are the columns; 0 where the file does not say."""
    columns: int
    fault: str = ""
    """Empty, or why the slice cannot be used: codes joined by ``+``."""

    @property
    def name(self) -> str:
        """``<study>/<series>/<slice>``."""
        return f"{self.study_id}/{self.series_id}/{self.slice_index}"

    def mask(self) -> np.ndarray:
        """Return the union of all shapes, (rows, columns) bool: a pixel belongs when its centre does.

        Raises
        ------
        AnnotationError
            If the slice is faulty.
        """
        if self.fault:
            msg = f"annotated slice {self.name} cannot be used: {self.fault}; correct it in CVAT and link it again"
            raise AnnotationError(msg)
        pixels = np.zeros((self.rows, self.columns), dtype=bool)
        for shape in self.shapes:
            pixels |= rasterise(shape, pixels.shape)
        return pixels

    def centre(self, rule: CentreRule = "union") -> tuple[float, float]:
        """Return the centre (row, column) in continuous pixel coordinates.

        Parameters
        ----------
        rule
            See `CentreRule`.

        Raises
        ------
        AnnotationError
            If the slice is faulty, or has no five levels to take the mean of.
        """
        if rule == "union" or self.fault:
            return mask_centroid(self.mask())
        if tuple(shape.label for shape in self.shapes) != LEVELS:
            msg = (
                f"annotated slice {self.name} has no five levels, which 'mean_of_five' needs; found "
                f"{len(self.shapes)} shape(s) {REGION!r}: use the rule 'union'"
            )
            raise AnnotationError(msg)
        centres = [mask_centroid(rasterise(shape, (self.rows, self.columns))) for shape in self.shapes]
        row, column = np.mean(centres, axis=0)
        return float(row), float(column)


def read_annotations(path: Path, *, keep_empty: bool = False) -> list[AnnotatedSlice]:
    """Read linked annotations, or what CVAT gave back after correcting them.

    Parameters
    ----------
    path
        CVAT XML, archive or task backup. Image names end in ``<study>/<series>/<slice>.png``, as ``python -m
        preprocess link`` writes them and ``python -m preprocess export`` names its pictures.
    keep_empty
        Also return images on which nothing is drawn, as faulty: where an image stands for a decision. CVAT lists every
        image of a task, drawn on or not.

    Returns
    -------
    list of AnnotatedSlice
        In file order; faulty ones carry their fault and no shape.

    Raises
    ------
    AnnotationError
        If the file is absent, no CVAT export or not linked.
    """
    annotations_sha256(path)  # an absent file is refused in one place
    try:
        # Names are checked of empty images too: none may hold an identifier.
        read = [(_slice(image, number, path), image) for number, image in enumerate(read_cvat(path))]
    except CvatError as error:
        raise AnnotationError(str(error)) from error
    found = [annotated for annotated, image in read if keep_empty or not _is_empty(image)]
    first = {annotated.name: number for number, annotated in reversed(list(enumerate(found)))}
    return [
        annotated
        if first[annotated.name] == number
        else replace(annotated, shapes=(), fault=_joined(annotated.fault, "repeated_image"))
        for number, annotated in enumerate(found)
    ]


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


def faults_by_image(slices: Iterable[AnnotatedSlice]) -> dict[str, str]:
    """List the faulty slices, ``<study>/<series>/<slice>`` → codes joined by ``+``, in file order."""
    faults: dict[str, str] = {}
    for annotated in slices:
        if annotated.fault:
            faults[annotated.name] = _joined(faults.get(annotated.name, ""), annotated.fault)
    return faults


def _joined(*faults: str) -> str:
    return "+".join(filter(None, faults))


def _slice(image: CvatImage, number: int, path: Path) -> AnnotatedSlice:
    match = _NAME.fullmatch(image.name)
    if match is None:
        msg = (
            f"{path}: image {number} is not named <study>/<series>/<slice>.png by pseudonyms; "
            "run `python -m preprocess link` on the export"
        )
        raise AnnotationError(msg)
    place = (match["study"], match["series"], int(match["slice"]))
    fault = _fault(image)
    shapes = () if fault else tuple(sorted(image.shapes, key=lambda shape: (*LEVELS, REGION).index(shape.label)))
    return AnnotatedSlice(*place, shapes, image.height, image.width, fault)


def _is_empty(image: CvatImage) -> bool:
    """Whether nothing is drawn on an image, soundly or not; a tag is no drawing."""
    return not (image.shapes or image.fault or set(image.skipped) - {"tag"})


def _fault(image: CvatImage) -> str:
    """Say what is wrong with the shapes of an image, or nothing."""
    size = (image.height, image.width)
    counts = Counter(shape.label for shape in image.shapes)
    faults = [image.fault] if image.fault else []
    faults += [] if all(size) else ["bad_size"]
    if not counts[REGION]:
        faults += [f"missing_{level}" for level in LEVELS if not counts[level]]
    elif any(counts[level] for level in LEVELS):
        faults.append("levels_and_lumbar")
    faults += [f"repeated_{level}" for level in LEVELS if counts[level] > 1]
    faults += ["unknown_label"] if set(counts) - {*LEVELS, REGION} else []
    if not faults and not all(rasterise(shape, size).any() for shape in image.shapes):
        faults = ["empty_shape"]
    return "+".join(faults)


def mask_centroid(mask: np.ndarray) -> tuple[float, float]:
    """Return the centroid (row, column) of a mask in continuous pixel coordinates.

    Raises
    ------
    AnnotationError
        If the mask is empty.
    """
    rows, columns = np.nonzero(mask)
    if not len(rows):
        msg = "the mask holds no pixel of the image, so that it has no centre; check that it belongs to this image"
        raise AnnotationError(msg)
    return float(rows.mean() + 0.5), float(columns.mean() + 0.5)
