"""Shapes on pictures → shapes on the slices of the store, under pseudonyms.

A picture is named ``<SOPInstanceUID>`` with any folder and suffix and then holds the image as in the file: its shapes
move with the flips of the stored slice. Or it is an exported picture of this store,
``<study_id>/<series_id>/<slice_index>``, whose shapes stay where they are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

import pyarrow as pa
from tqdm import tqdm

from preprocess.cvat.document import CvatError
from preprocess.cvat.read import read_cvat
from preprocess.cvat.shapes import REGION, CvatImage, Flips, Shape, move
from preprocess.cvat.write import FOOTER, HEADER, image_xml
from preprocess.link import source
from preprocess.link.resolve import CODES, KEYS, Book, resolve, slice_key
from preprocess.link.source import LinkError, in_chunks

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import numpy as np

_IMAGE_SUFFIX = re.compile(r"\.(png|jpe?g|tiff?|dcm)$", flags=re.IGNORECASE)
_ANATOMY = re.compile(rf"([CTLS][0-9]{{1,2}}){{1,2}}|{REGION}")
"""Labels that pass: levels such as L4, L4L5 or L5S1, and the whole region. Any other may be text about the patient."""


class Target(NamedTuple):
    """A slice of the store, and how what is drawn on a picture of it gets there."""

    name: str
    """Of the linked image."""
    size: tuple[int, int]
    """Rows and columns of the stored slice."""
    flips: Flips

    @property
    def drawn_size(self) -> tuple[int, int]:
        """Rows and columns of the picture."""
        return self.size[::-1] if self.flips[0] else self.size

    def place(self, shapes: Iterator[Shape]) -> CvatImage:
        """Return the linked image with shapes that were drawn on the picture."""
        moved = (move(shape, self.size, self.flips) for shape in shapes)
        named = (shape if _ANATOMY.fullmatch(shape.label) else replace(shape, label="unnamed") for shape in moved)
        return CvatImage(self.name, self.size[1], self.size[0], tuple(named))


def target_of(place: Mapping[str, Any], key: str) -> Target:
    """Describe where a picture goes, from the facts of its slice and what it was looked up by."""
    is_ours = "/" in key
    flips = (False, False, False) if is_ours else (place["transpose"], place["flip_rows"], place["flip_columns"])
    name = f"{place['study_id']}/{place['series_id']}/{place['slice_index']}.png"
    return Target(name, (place["rows"], place["columns"]), flips)


@dataclass(frozen=True)
class AnnotationFile:
    """A CVAT export of which the image names are known."""

    path: Path
    keys: Any
    """Table of `KEYS`."""

    @property
    def name(self) -> str:
        """Of the file."""
        return self.path.name

    @property
    def out_name(self) -> str:
        """The same, as XML."""
        return self.path.with_suffix(".xml").name

    @property
    def lines(self) -> range:
        """Image numbers, from 1."""
        return range(1, len(self.keys) + 1)

    def translate(self, book: Book, out: TextIO) -> np.ndarray:
        """Write the linked images; return the number in `CODES` of every image.

        Only images and their boxes, polygons and masks pass, with labels that name anatomy: tasks, owners, dates,
        attributes and free text are left behind.
        """
        resolution = resolve(self.keys, book, by_slice=True)
        codes_R, written = resolution.codes_R, 0
        out.write(HEADER)
        images = tqdm(_images(self.path), desc="link", unit="image", total=len(codes_R), disable=None, delay=1)
        places = places_of(self.keys, book, resolution.matches_R)
        for row, (image, (key, place)) in enumerate(zip(images, places, strict=True)):
            if codes_R[row] not in {CODES["linked"], CODES["duplicate"]}:
                continue
            target = target_of(place, key)
            if target.drawn_size != (image.height, image.width):
                codes_R[row] = CODES["bad_size"]
            elif image.fault:
                codes_R[row] = CODES[image.fault]
            elif codes_R[row] == CODES["linked"]:
                out.write(image_xml(target.place(iter(image.shapes)), written))
                written += 1
                codes_R[row] = CODES["linked_partly" if image.skipped else "linked"]
        out.write(FOOTER)
        return codes_R


def scan_annotations(path: Path) -> AnnotationFile:
    """Read the image names of a CVAT export.

    Raises
    ------
    LinkError
        If it is none, or its images are not named.
    """
    names = (slice_key(_IMAGE_SUFFIX.sub("", image.name)) for image in _images(path))
    return AnnotationFile(path, keys_of_objects(names))


def keys_of_objects(names: Iterator[str]) -> Any:  # noqa: ANN401  (Arrow table)
    """Make a table of `KEYS` of object ids alone."""
    chunks = (pa.table({name: chunk if name == "sop_uid" else [""] * len(chunk) for name in KEYS.names}, KEYS)
              for chunk in in_chunks(names))  # fmt: skip
    return pa.concat_tables([KEYS.empty_table(), *chunks]).combine_chunks()


def places_of(keys: Any, book: Book, matches_R: np.ndarray) -> Iterator[tuple[str, dict[str, Any]]]:  # noqa: ANN401
    """Yield what each row was looked up by and the facts of its slice."""
    for start in range(0, len(matches_R), source.CHUNK_ROWS):
        stop = start + source.CHUNK_ROWS
        places = book.places(matches_R[start:stop], by_slice=True).to_pylist()
        yield from zip(keys["sop_uid"][start:stop].to_pylist(), places, strict=True)


def _images(path: Path) -> Iterator[CvatImage]:
    try:
        yield from read_cvat(path)
    except CvatError as error:
        raise LinkError(str(error)) from None
