"""Labels, gradings and annotation names → the store's pseudonyms, with an account of every row.

A row is linked by accession number where it has one, else by patient id if that patient has exactly one exam in the
index. Key columns are dropped; of the others only numbers pass, because text may identify. Rows that cannot be linked
are reported by file, line and reason code, never by content.

Each file is read twice, in chunks: once for its keys, which are looked up together, once to be translated. What is
held of a row between the two is its keys.
"""

from __future__ import annotations

import csv
import math
import re
import xml.etree.ElementTree as ET
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO, TypeVar

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from preprocess.commit import commit_point, stream_atomic
from preprocess.deidentify import normalise
from preprocess.geometry import canonical_point
from preprocess.link.resolve import CODES, KEYS, REASONS, Book, resolve
from preprocess.store.paths import StorePaths

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

Item = TypeVar("Item")

KEY_COLUMNS = {
    "PatientID": "patient",
    "AccessionNumber": "accession",
    "SOPInstanceUID": "sop_uid",
    "IssuerOfPatientID": "issuer",
}
"""Columns that identify → the key they are. They are looked up and dropped; the issuer only helps another."""

CHUNK_ROWS = 65_536
"""Rows of a table in memory at a time."""

MAX_DIGITS = 7
"""Longest whole number that passes as an answer or a measurement: dates, telephone and record numbers are longer."""

_WHOLE = rf"\d{{1,{MAX_DIGITS}}}"
_NUMERIC = re.compile(rf"\s*([-+]?({_WHOLE}(\.\d*)?|\.\d+)([eE][-+]?\d{{1,3}})?|-?{_WHOLE}(;-?{_WHOLE})*)?\s*")
_IMAGE_SUFFIX = re.compile(r"\.(png|jpe?g|tiff?|dcm)$", flags=re.IGNORECASE)
_LEVEL_LABEL = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,15}")
_POINT_EDGES = (("xtl", "ytl"), ("xbr", "ybr"))


class LinkError(ValueError):
    """A file that cannot be linked at all."""


@dataclass(frozen=True)
class LinkJob:
    """What to link."""

    store: Path
    out: Path
    """Folder for the linked files; each keeps its name."""
    tables: tuple[Path, ...] = ()
    annotations: tuple[Path, ...] = ()
    keep_text: frozenset[str] = frozenset()
    """Text columns that may pass, by the user's word."""
    allow_unlinked: bool = False
    """Write the linked rows even when others match no exam or are ambiguous."""


@dataclass(frozen=True)
class LinkReport:
    """How many rows of each file ended with which reason; the reason of each row is in ``link_report.csv``."""

    counts: dict[tuple[str, str], int]
    """(file name, reason) → rows or images."""
    dropped: dict[str, list[str]] = field(default_factory=dict)
    """File name → columns withheld because they hold text."""

    @property
    def num_unlinked(self) -> int:
        """Rows that were not written, or not whole."""
        return sum(count for (_, reason), count in self.counts.items() if reason != "linked")

    def to_text(self) -> str:
        """Render for a terminal: counts by file and reason."""
        lines = [
            f"{name}: {count:6d} {reason}: {REASONS[reason]}" for (name, reason), count in sorted(self.counts.items())
        ]
        for name, columns in sorted(self.dropped.items()):
            lines.append(f"{name}: withheld text column(s) {', '.join(columns)}; --keep-text NAME lets one pass")
        return "\n".join(lines)


class _Source(Protocol):
    """A file that was read once."""

    @property
    def path(self) -> Path:
        """Where it is."""

    @property
    def keys(self) -> Any:  # noqa: ANN401  (Arrow table)
        """Table of `KEYS`."""

    @property
    def lines(self) -> Iterable[int]:
        """Line or image number of every row."""

    def translate(self, book: Book, out: TextIO) -> np.ndarray:
        """Write what links; return the number in `CODES` of every row."""


def link_files(job: LinkJob) -> LinkReport:
    """Translate every file and write ``link_report.csv`` and the linked files.

    Raises
    ------
    ValueError
        If the store is incomplete, its private index is missing, a file has no key column or is no CVAT XML, or a row
        stays unlinked and ``allow_unlinked`` is not set: then only ``link_report.csv`` is written.
    """
    _check_names(job)
    tables = [scan_table(path, job.keep_text) for path in job.tables]
    sources: list[_Source] = [*tables, *map(scan_annotations, job.annotations)]
    book = Book.open(job.store, StorePaths(job.store).private, [source.keys for source in sources])
    with ExitStack() as linked:  # an error leaves none of them
        codes = []
        for source in sources:
            linked.callback(commit_point, "link:file")
            codes.append(source.translate(book, linked.enter_context(stream_atomic(job.out / source.path.name))))
        counts = _write_report(job.out / "link_report.csv", sources, codes)
        report = LinkReport(counts, {table.path.name: list(table.withheld) for table in tables if table.withheld})
        if report.num_unlinked and not job.allow_unlinked:
            msg = (
                f"{report.num_unlinked} row(s) cannot be linked and nothing was written but "
                f"{job.out / 'link_report.csv'}, which names file, line and reason; mend them, or let them go with "
                f"--allow-unlinked\n{report.to_text()}"
            )
            raise LinkError(msg)
    return report


def _check_names(job: LinkJob) -> None:
    names = [path.name for path in (*job.tables, *job.annotations)]
    if len({*names, "link_report.csv"}) <= len(names):
        msg = (
            "two files to link have one name (or that of link_report.csv), and the linked ones keep theirs: rename one"
        )
        raise LinkError(msg)
    for path in (*job.tables, *job.annotations):
        if path.resolve().parent == job.out.resolve():
            msg = f"--out {job.out} is the folder of {path.name}, which would be overwritten; choose another folder"
            raise LinkError(msg)


def _write_report(path: Path, sources: Sequence[_Source], codes: Sequence[np.ndarray]) -> dict[tuple[str, str], int]:
    reasons = list(REASONS)
    counts: Counter[tuple[str, str]] = Counter()
    with stream_atomic(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["file", "line", "reason"])
        for source, codes_R in zip(sources, codes, strict=True):
            name = source.path.name
            writer.writerows((name, line, reasons[code]) for line, code in zip(source.lines, codes_R, strict=True))
            numbers, found = np.unique(codes_R, return_counts=True)
            counts.update({(name, reasons[number]): int(count) for number, count in zip(numbers, found, strict=True)})
    return dict(counts)


# --- tables ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelTable:
    """A CSV of which keys and column types are known."""

    path: Path
    header: tuple[str, ...]
    passing: tuple[str, ...]
    """Columns that may be written."""
    keys: Any
    """Table of `KEYS`."""
    lines: np.ndarray
    """Line on which each row begins."""

    @property
    def by_slice(self) -> bool:
        """Whether rows name slices."""
        return "SOPInstanceUID" in self.header

    @property
    def withheld(self) -> tuple[str, ...]:
        """Columns that hold text."""
        return tuple(name for name in self.header if name not in self.passing and name not in KEY_COLUMNS)

    def translate(self, book: Book, out: TextIO) -> np.ndarray:
        """Write the linked rows; return the number in `CODES` of every row."""
        resolution = resolve(self.keys, book, by_slice=self.by_slice)
        ids = ["patient_id", "study_id", *(("series_id", "slice_index") if self.by_slice else ())]
        kept = [self.header.index(name) for name in self.passing]
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([*ids, *self.passing])
        start = 0
        for rows in self._chunks():
            here = np.flatnonzero(resolution.codes_R[start : start + len(rows)] == CODES["linked"])
            places = book.places(resolution.matches_R[start + here], by_slice=self.by_slice).select(ids)
            for row, names in zip(here, zip(*(column.to_pylist() for column in places), strict=True), strict=True):
                writer.writerow([*names, *(rows[row][column] for column in kept)])
            start += len(rows)
        return resolution.codes_R

    def _chunks(self) -> Iterator[list[list[str]]]:
        """Yield the rows again, as long as the first time."""
        rows = (cells for _, cells in islice(_read_table(self.path), 1, None))
        bar = tqdm(rows, desc="link", unit="row", total=len(self.lines), disable=None, delay=1)
        chunks = _in_chunks(bar)
        for start in range(0, len(self.lines), CHUNK_ROWS):
            chunk = next(chunks, [])
            if len(chunk) != min(CHUNK_ROWS, len(self.lines) - start):
                msg = f"{self.path} changed while it was read; link it again"
                raise LinkError(msg)
            yield chunk


def scan_table(path: Path, keep_text: frozenset[str] = frozenset()) -> LabelTable:
    """Read the keys of a CSV, and find the columns that may pass.

    Parameters
    ----------
    path
        Has at least one of `KEY_COLUMNS` but the issuer.
    keep_text
        Names of text columns that may pass.

    Raises
    ------
    LinkError
        If it is no such table.
    """
    rows = _read_table(path)
    header = _checked_header(path, next(rows, (1, []))[1])
    places = {KEY_COLUMNS.get(name, name): column for column, name in enumerate(header)}
    others = [name for name in header if name not in KEY_COLUMNS]
    numeric = set(others)
    keys, lines = [], []
    for chunk in _in_chunks(rows):
        lines.append(np.array([line for line, _ in chunk], np.int64))
        keys.append(_keys_of([cells for _, cells in chunk], places))
        for name in sorted(numeric):
            if not all(_NUMERIC.fullmatch(cells[places[name]]) for _, cells in chunk):
                numeric.remove(name)
    passing = tuple(name for name in others if name in numeric or name in keep_text)
    table = pa.concat_tables([KEYS.empty_table(), *keys]).combine_chunks()
    return LabelTable(path, header, passing, table, np.concatenate([np.zeros(0, np.int64), *lines]))


def _checked_header(path: Path, header: Sequence[str]) -> tuple[str, ...]:
    wanted = [name for name in KEY_COLUMNS if name != "IssuerOfPatientID"]
    if not set(wanted) & set(header):
        msg = f"{path} has none of the columns {', '.join(wanted)}; name the key column so"
        raise LinkError(msg)
    if len(set(header)) < len(header):
        msg = f"{path}: column names must differ and no row may have more cells than the header"
        raise LinkError(msg)
    return tuple(header)


def _keys_of(rows: list[list[str]], places: dict[str, int]) -> Any:  # noqa: ANN401  (Arrow table)
    columns = {}
    for name in KEYS.names:
        texts = [cells[places[name]] for cells in rows] if name in places else [""] * len(rows)
        columns[name] = texts if name == "reader" else list(map(str.strip if name == "sop_uid" else normalise, texts))
    return pa.table(columns, KEYS)


def _read_table(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (line, cells) of the header and every row, filled up to the header's length."""
    if not path.is_file():
        msg = f"table not found: {path}"
        raise LinkError(msg)
    width, line = 0, 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            for cells in reader:
                width = width or len(cells)
                if len(cells) > width:
                    msg = f"{path}: column names must differ and no row may have more cells than the header"
                    raise LinkError(msg)
                if cells:
                    yield line, cells + [""] * (width - len(cells))
                line = reader.line_num + 1
    except (UnicodeDecodeError, csv.Error) as error:
        msg = f"{path} is not a UTF-8 CSV file ({type(error).__name__}); export it as one"
        raise LinkError(msg) from None


def _in_chunks(items: Iterable[Item]) -> Iterator[list[Item]]:
    remaining = iter(items)
    while chunk := list(islice(remaining, CHUNK_ROWS)):
        yield chunk


# --- annotations -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AnnotationFile:
    """A CVAT 1.1 file ("for images") of which the image names are known."""

    path: Path
    keys: Any
    """Table of `KEYS`."""

    @property
    def lines(self) -> range:
        """Image numbers, from 1."""
        return range(1, len(self.keys) + 1)

    def translate(self, book: Book, out: TextIO) -> np.ndarray:
        """Write the linked images; return the number in `CODES` of every image.

        Image names become ``<study_id>/<series_id>/<slice_index>.png`` and boxes move with the flips of the stored
        slice. Only images and their boxes pass: tasks, owners, dates, attributes and free text are left behind.
        """
        resolution = resolve(self.keys, book, by_slice=True)
        codes_R, written = resolution.codes_R, 0
        out.write("<?xml version='1.0' encoding='utf-8'?>\n<annotations>\n  <version>1.1</version>\n")
        images = tqdm(_images(self.path), desc="link", unit="image", total=len(codes_R), disable=None, delay=1)
        for row, (image, place) in enumerate(zip(images, _places(book, resolution.matches_R), strict=True)):
            if codes_R[row] not in {CODES["linked"], CODES["duplicate"]}:
                continue
            moved = _move_image(image, place)
            if isinstance(moved, str):
                codes_R[row] = CODES[moved]
            elif codes_R[row] == CODES["linked"]:
                moved.set("id", str(written))
                written += 1
                ET.indent(moved, level=1)
                out.write(f"  {ET.tostring(moved, encoding='unicode')}\n")
                codes_R[row] = CODES["linked_partly" if any(shape.tag != "box" for shape in image) else "linked"]
        out.write("</annotations>\n")
        return codes_R


def scan_annotations(path: Path) -> AnnotationFile:
    """Read the image names of a CVAT file: ``<SOPInstanceUID>`` with any folder and suffix.

    Raises
    ------
    LinkError
        If it is no CVAT XML for images.
    """
    names = ([_IMAGE_SUFFIX.sub("", Path(image.get("name", "")).name)] for image in _images(path))
    keys = (_keys_of(chunk, {"sop_uid": 0}) for chunk in _in_chunks(names))
    return AnnotationFile(path, pa.concat_tables([KEYS.empty_table(), *keys]).combine_chunks())


def _places(book: Book, matches_R: np.ndarray) -> Iterator[dict[str, Any]]:
    for start in range(0, len(matches_R), CHUNK_ROWS):
        yield from book.places(matches_R[start : start + CHUNK_ROWS], by_slice=True).to_pylist()


def _images(path: Path) -> Iterator[ET.Element]:
    """Yield the images one by one; each is emptied when the next is asked for."""
    try:
        with path.open("rb") as file:
            events = ET.iterparse(file, events=("start", "end"))
            _, root = next(events)
            if root.tag != "annotations":
                msg = f"{path}: the root must be <annotations>; export 'CVAT for images 1.1'"
                raise LinkError(msg)
            for event, element in events:
                if element.tag == "track":
                    msg = f"{path} holds tracks of a video; export 'CVAT for images 1.1'"
                    raise LinkError(msg)
                if event == "end" and element.tag == "image":
                    yield element
                    root.clear()
    except (OSError, ET.ParseError) as error:
        msg = f"{path} cannot be read as CVAT XML ({type(error).__name__}); export 'CVAT for images 1.1'"
        raise LinkError(msg) from None


def _move_image(image: ET.Element, place: dict[str, Any]) -> ET.Element | str:
    """Rename an image and move its boxes; or say why not."""
    rows, columns = place["rows"], place["columns"]
    flips = place["transpose"], place["flip_rows"], place["flip_columns"]
    width, height = (rows, columns) if flips[0] else (columns, rows)
    if (image.get("width"), image.get("height")) != (str(width), str(height)):
        return "bad_size"
    name = f"{place['study_id']}/{place['series_id']}/{place['slice_index']}.png"
    moved = ET.Element("image", name=name, width=str(columns), height=str(rows))
    for box in image.iter("box"):
        try:
            corners = [
                canonical_point(float(box.get(y, "")), float(box.get(x, "")), (rows, columns), flips)
                for x, y in _POINT_EDGES
            ]
        except ValueError:
            return "bad_coordinates"
        if not all(math.isfinite(value) for corner in corners for value in corner):
            return "bad_coordinates"
        (top, bottom), (left, right) = sorted(corner[0] for corner in corners), sorted(corner[1] for corner in corners)
        # A label is an enumeration of the task; anything longer or with spaces may be text about the patient.
        label = box.get("label", "")
        edges = {"xtl": left, "ytl": top, "xbr": right, "ybr": bottom}
        attributes = {"label": label if _LEVEL_LABEL.fullmatch(label) else "unnamed", "occluded": "0"}
        ET.SubElement(moved, "box", attributes | {edge: f"{value:.2f}" for edge, value in edges.items()})
    return moved
