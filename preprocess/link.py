"""Labels, gradings and annotation names → the store's pseudonyms, with an account of every row.

A row is linked by accession number where it has one, else by patient id if that patient has exactly one exam in the
index. Key columns are dropped; of the others only numbers pass, because text may identify. Rows that cannot be linked
are reported by file, line and reason code, never by content.
"""

from __future__ import annotations

import csv
import io
import re
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from preprocess.accounting import to_csv
from preprocess.commit import commit_point, write_atomic
from preprocess.deidentify import normalise
from preprocess.geometry import canonical_point
from preprocess.pipeline import StorePaths
from preprocess.store import SliceStore
from preprocess.uid_index import ExamEntry, UidIndex

if TYPE_CHECKING:
    from collections.abc import Sequence

KEY_COLUMNS = ("PatientID", "AccessionNumber", "SOPInstanceUID")
"""Columns that identify: they are looked up and dropped."""

REASONS = {
    "linked": "written under pseudonyms",
    "unmatched": "no exam of the index has this patient or accession number",
    "no_key": "neither accession number nor patient id in the row",
    "multi_exam": "the patient has several exams and the row no accession number (or exams share the number)",
    "patient_mismatch": "the exam of this accession number belongs to another patient",
    "not_stored": "the exam was seen, but none of its series is in the store; see stacks.csv of the report",
    "slice_unmatched": "the slice is none of a series in the store, or of another exam than the row",
    "duplicate": "the same key occurs earlier in this file",
    "bad_size": "the annotated image size is not the size of the stored slice",
    "bad_coordinates": "a coordinate is missing or no number",
}
"""Reason code of a row → what it means."""

_NUMERIC = re.compile(r"\s*([-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|-?\d+(;-?\d+)*)?\s*")
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
    """Reason of every row of every file."""

    rows: tuple[tuple[str, int, str], ...]
    """(file name, line or image number, reason), in file order."""
    dropped: dict[str, list[str]] = field(default_factory=dict)
    """File name → columns withheld because they hold text."""

    @property
    def num_unlinked(self) -> int:
        """Rows that were not written."""
        return sum(reason != "linked" for _, _, reason in self.rows)

    def to_text(self) -> str:
        """Render for a terminal: counts by file and reason."""
        lines = []
        for (name, reason), count in sorted(Counter((name, reason) for name, _, reason in self.rows).items()):
            lines.append(f"{name}: {count:6d} {reason}: {REASONS[reason]}")
        for name, columns in sorted(self.dropped.items()):
            lines.append(f"{name}: withheld text column(s) {', '.join(columns)}; --keep-text NAME lets one pass")
        return "\n".join(lines)


def link_files(job: LinkJob) -> LinkReport:
    """Translate every file and write ``link_report.csv`` and the linked files.

    Raises
    ------
    ValueError
        If the store is incomplete, its private index is missing, a file has no key column or is no CVAT XML, or a row
        stays unlinked and ``allow_unlinked`` is not set: then only ``link_report.csv`` is written.
    """
    names = [path.name for path in (*job.tables, *job.annotations)]
    if len(set(names)) < len(names):
        msg = "two files to link have one name, and the linked ones keep their names: rename one"
        raise LinkError(msg)
    for path in (*job.tables, *job.annotations):
        if path.resolve().parent == job.out.resolve():
            msg = f"--out {job.out} is the folder of {path.name}, which would be overwritten; choose another folder"
            raise LinkError(msg)
    book = _Book.of(SliceStore.open(job.store), UidIndex.load(StorePaths(job.store).private))
    linked: dict[str, bytes] = {}
    rows: list[tuple[str, int, str]] = []
    dropped: dict[str, list[str]] = {}
    for path in job.tables:
        linked[path.name], reasons, withheld = link_table(path, book, keep_text=job.keep_text)
        rows += [(path.name, line, reason) for line, reason in reasons]
        dropped |= {path.name: withheld} if withheld else {}
    for path in job.annotations:
        linked[path.name], reasons = link_annotations(path, book)
        rows += [(path.name, number, reason) for number, reason in reasons]
    report = LinkReport(tuple(rows), dropped)
    write_atomic(job.out / "link_report.csv", to_csv(["file", "line", "reason"], ([*row] for row in rows)))
    if report.num_unlinked and not job.allow_unlinked:
        msg = (
            f"{report.num_unlinked} row(s) cannot be linked and nothing was written but {job.out / 'link_report.csv'}, "
            f"which names file, line and reason; mend them, or let them go with --allow-unlinked\n{report.to_text()}"
        )
        raise LinkError(msg)
    for name, content in linked.items():
        write_atomic(job.out / name, content)
        commit_point("link:file")
    return report


@dataclass(frozen=True)
class _Book:
    """What identifiers stand for, ready to be asked."""

    by_accession: dict[str, list[ExamEntry]]
    by_patient: dict[str, list[ExamEntry]]
    by_series: dict[str, ExamEntry]
    slices: dict[str, tuple[str, int]]
    study_of: dict[str, str]
    flips: dict[str, tuple[tuple[int, int], tuple[bool, bool, bool]]]
    """Series → canonical (rows, columns), and (transpose, flip rows, flip columns)."""

    @classmethod
    def of(cls, store: SliceStore, index: UidIndex) -> _Book:
        by_accession: dict[str, list[ExamEntry]] = defaultdict(list)
        by_patient: dict[str, list[ExamEntry]] = defaultdict(list)
        for exam in index.exams:
            by_patient[exam.patient_key].append(exam)
            if exam.accession_key:
                by_accession[exam.accession_key].append(exam)
        rows = store.manifest.to_dict("records")
        flips = {
            str(row["series_id"]): (
                (int(row["rows"]), int(row["columns"])),
                (bool(row["transpose"]), bool(row["flip_rows"]), bool(row["flip_columns"])),
            )
            for row in rows
        }
        study_of = {str(row["series_id"]): str(row["study_id"]) for row in rows}
        by_series = {exam.series_id: exam for exam in index.exams if exam.series_id}
        return cls(by_accession, by_patient, by_series, index.slices, study_of, flips)

    def exam(self, row: dict[str, str]) -> ExamEntry | str:
        """Find the exam of a row, or the reason why there is none."""
        accession, patient = (normalise(row.get(name) or "") for name in ("AccessionNumber", "PatientID"))
        if not accession and not patient:
            return self._exam_of_slice(row)
        found = self.by_accession.get(accession, []) if accession else self.by_patient.get(patient, [])
        if not found:
            return "unmatched"
        if len(found) > 1 and accession and patient:
            found = [exam for exam in found if exam.patient_key == patient] or found
        if len(found) > 1:
            return "multi_exam"
        if accession and patient and found[0].patient_key != patient:
            return "patient_mismatch"
        return found[0] if found[0].series_id in self.study_of else "not_stored"

    def _exam_of_slice(self, row: dict[str, str]) -> ExamEntry | str:
        place = self.slices.get((row.get("SOPInstanceUID") or "").strip())
        if place is None:
            return "slice_unmatched" if row.get("SOPInstanceUID") else "no_key"
        exam = self.by_series.get(place[0])
        return exam if exam is not None and exam.series_id in self.study_of else "slice_unmatched"


def link_table(
    path: Path, book: _Book, *, keep_text: frozenset[str] = frozenset()
) -> tuple[bytes, list[tuple[int, str]], list[str]]:
    """Translate one CSV.

    Parameters
    ----------
    path
        Has at least one of `KEY_COLUMNS`.
    book
        The identifiers.
    keep_text
        Names of text columns that may pass.

    Returns
    -------
    tuple
        The linked CSV; (line, reason) of every row; names of withheld columns.
    """
    header, rows = _read_table(path)
    others = [name for name in header if name not in KEY_COLUMNS]
    passing = [name for name in others if name in keep_text or all(_NUMERIC.fullmatch(row[name] or "") for row in rows)]
    has_slices = "SOPInstanceUID" in header
    columns = ["patient_id", "study_id", *(("series_id", "slice_index") if has_slices else ())]
    linked: list[list[object]] = []
    reasons: list[tuple[int, str]] = []
    seen: set[tuple[object, ...]] = set()
    for line, row in enumerate(rows, start=2):
        exam = book.exam(row)
        ids: list[object] = []
        reason = exam if isinstance(exam, str) else "linked"
        if isinstance(exam, ExamEntry):
            ids = [exam.patient_id, exam.study_id]
            if has_slices:
                place = book.slices.get((row["SOPInstanceUID"] or "").strip())
                known = place is not None and place[0] == exam.series_id
                reason, ids = ("linked", [*ids, *(place or ())]) if known else ("slice_unmatched", ids)
            key = (*ids, row.get("reader"))
            reason = "duplicate" if reason == "linked" and key in seen else reason
            seen.add(key)
        reasons.append((line, reason))
        if reason == "linked":
            linked.append([*ids, *(row[name] for name in passing)])
    withheld = [name for name in others if name not in passing]
    return to_csv([*columns, *passing], linked), reasons, withheld


def _read_table(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    if not path.is_file():
        msg = f"table not found: {path}"
        raise LinkError(msg)
    try:
        reader = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig")), strict=True)
        header, rows = list(reader.fieldnames or ()), list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        msg = f"{path} is not a UTF-8 CSV file ({type(error).__name__}); export it as one"
        raise LinkError(msg) from None
    if not set(KEY_COLUMNS) & set(header):
        msg = f"{path} has none of the columns {', '.join(KEY_COLUMNS)}; name the key column so"
        raise LinkError(msg)
    if len(set(header)) < len(header) or any(None in row for row in rows):
        msg = f"{path}: column names must differ and no row may have more cells than the header"
        raise LinkError(msg)
    return header, rows


def link_annotations(path: Path, book: _Book) -> tuple[bytes, list[tuple[int, str]]]:
    """Translate a CVAT 1.1 file ("for images").

    Image names become ``<study_id>/<series_id>/<slice_index>.png`` and boxes move with the flips of the stored slice.
    Only images and their boxes pass: tasks, owners, dates, attributes and free text are left behind.

    Parameters
    ----------
    path
        Image names are ``<SOPInstanceUID>`` with any folder and suffix.
    book
        The identifiers.

    Returns
    -------
    tuple
        The linked XML; (image number, reason) of every image, counted from 1.
    """
    linked = ET.Element("annotations")
    ET.SubElement(linked, "version").text = "1.1"
    reasons: list[tuple[int, str]] = []
    seen: set[tuple[str, int]] = set()
    for number, image in enumerate(_images(path), start=1):
        place = book.slices.get(re.sub(r"\.(png|jpe?g|tiff?|dcm)$", "", Path(image.get("name", "")).name, flags=re.I))
        if place is None or place[0] not in book.study_of:
            reasons.append((number, "slice_unmatched"))
            continue
        moved = _move_image(image, place, book)
        reason = moved if isinstance(moved, str) else "duplicate" if place in seen else "linked"
        seen.add(place)
        reasons.append((number, reason))
        if not isinstance(moved, str) and reason == "linked":
            moved.set("id", str(len(linked) - 1))
            linked.append(moved)
    ET.indent(linked)
    return ET.tostring(linked, encoding="utf-8", xml_declaration=True) + b"\n", reasons


def _images(path: Path) -> Sequence[ET.Element]:
    try:
        root = ET.parse(path).getroot()
    except (OSError, ET.ParseError) as error:
        msg = f"{path} cannot be read as CVAT XML ({type(error).__name__}); export 'CVAT for images 1.1'"
        raise LinkError(msg) from None
    if root.tag != "annotations":
        msg = f"{path}: the root must be <annotations>; export 'CVAT for images 1.1'"
        raise LinkError(msg)
    return list(root.iter("image"))


def _move_image(image: ET.Element, place: tuple[str, int], book: _Book) -> ET.Element | str:
    """Rename an image and move its boxes; or say why not."""
    series_id, slice_index = place
    (rows, columns), flips = book.flips[series_id]
    width, height = (rows, columns) if flips[0] else (columns, rows)
    if (image.get("width"), image.get("height")) != (str(width), str(height)):
        return "bad_size"
    name = f"{book.study_of[series_id]}/{series_id}/{slice_index}.png"
    moved = ET.Element("image", name=name, width=str(columns), height=str(rows))
    for box in image.iter("box"):
        try:
            corners = [
                canonical_point(float(box.get(y, "")), float(box.get(x, "")), (rows, columns), flips)
                for x, y in _POINT_EDGES
            ]
        except ValueError:
            return "bad_coordinates"
        (top, bottom), (left, right) = sorted(corner[0] for corner in corners), sorted(corner[1] for corner in corners)
        # A label is an enumeration of the task; anything longer or with spaces may be text about the patient.
        label = box.get("label", "")
        edges = {"xtl": left, "ytl": top, "xbr": right, "ybr": bottom}
        attributes = {"label": label if _LEVEL_LABEL.fullmatch(label) else "unnamed", "occluded": "0"}
        ET.SubElement(moved, "box", attributes | {edge: f"{value:.2f}" for edge, value in edges.items()})
    return moved
