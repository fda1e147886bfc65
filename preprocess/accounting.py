"""One terminal state per file: the codes, and what the two reports say about files and stacks.

The private report names paths and lives in the private folder (mode 0600). The shareable one knows pseudonyms, codes
and counts only. Both are sorted by study pseudonym and then by path or series, so equal trees give equal bytes.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal, Self

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

State = Literal["converted", "skipped", "quarantined"]

CONVERTED = "converted"
"""Code of a file whose pixels are in the store."""

SKIPPED = {
    "acquisition_3d": "a 3D acquisition",
    "archive": "an archive; unpack it to have it read",
    "body_part": "the header names another body part",
    "dixon": "a fat or opposed-phase image of a Dixon sequence",
    "dicomdir": "an index of a medium, no image",
    "derived": "computed from other images (map, projection, reformat, subtraction)",
    "diffusion": "diffusion weighted",
    "duplicate": "the same object as another file, pixel for pixel",
    "echo_planar": "an echo-planar sequence",
    "empty_file": "no byte in it",
    "fat_suppressed": "fat is suppressed",
    "gradient_echo": "a gradient-echo sequence",
    "inversion_recovery": "an inversion-recovery (STIR) sequence",
    "localizer": "a localizer or scout",
    "mosaic": "slices tiled in one image",
    "multi_echo": "one of three or more echoes of a relaxation map",
    "no_pixels": "DICOM without an image (report, segmentation, presentation state, ...)",
    "not_best": "of a wanted contrast, but another stack of this exam ranks higher",
    "not_dicom": "no DICOM file",
    "not_magnitude": "phase, real or imaginary part",
    "not_mr": "another modality than MR",
    "not_sagittal": "the slices are not sagittal",
    "overridden": "left out by the override file",
    "proton_density": "proton-density weighted",
    "rgb": "a colour image",
    "secondary_capture": "a screenshot or scan",
    "special_file": "a pipe, socket or device",
    "symlink": "a symbolic link; links are not followed",
    "t1_weighted": "T1 weighted",
    "t2_weighted": "T2 weighted, which was not asked for",
    "too_few_slices": "fewer parallel slices than a stack needs",
    "unknown_contrast": "neither echo and repetition time nor a description tell the contrast",
}
"""Reason code of a skipped file → what it means. Skipping is no error."""

QUARANTINED = {
    "bit_depth": "stored values do not fit 16 bits",
    "burned_in": "marked as showing burned-in annotation: pixels may identify the patient",
    "changed_after_commit": "the store already holds this exam from other files; convert into a new store",
    "conflicting_duplicate": "two files claim one object id and differ",
    "decode_error": "the pixel data cannot be decoded",
    "decoder_crash": "the decoder killed its process, also alone",
    "duplicate_position": "two images at one slice position",
    "gap": "a slice is missing",
    "internal_error": "an unforeseen error; the private report names its type",
    "mixed_pixels": "pixel types within the stack do not fit one 16-bit type",
    "multiframe": "a multi-frame image without functional groups, so without the geometry of its frames",
    "no_exam_id": "study or series instance UID is missing",
    "no_geometry": "position, orientation or pixel spacing is missing or invalid",
    "no_patient_id": "no patient id: the exam cannot be kept apart from others",
    "patient_mismatch": "one study id under two patient ids",
    "series_incomplete": "sound itself, but another slice of its stack is quarantined",
    "transfer_syntax": "no decoder for this compression: pip install 'lbp_ray[codecs]'",
    "truncated": "fewer pixel bytes than the header promises",
    "uneven_spacing": "slice distances differ by more than the tolerance",
    "unreadable_file": "the operating system cannot read it",
    "unreadable_folder": "the operating system cannot list it",
    "unreadable_header": "DICOM by its signature, but the header cannot be parsed",
}
"""Error code of a quarantined file → what it means. Each is counted against ``--max-quarantine``."""


def state_of(code: str) -> State:
    """Return the terminal state that a code belongs to.

    Parameters
    ----------
    code
        `CONVERTED`, or a key of `SKIPPED` or `QUARANTINED`; ``code:detail`` counts as its code.
    """
    head = code.partition(":")[0]
    if head == CONVERTED:
        return "converted"
    if head in SKIPPED:
        return "skipped"
    assert head in QUARANTINED, head
    return "quarantined"


def strongest(codes: Iterable[str]) -> str:
    """Return the terminal code of a file from those of its images: converted before quarantined before skipped."""
    order = ("converted", "quarantined", "skipped")
    return min(codes, key=lambda code: (order.index(state_of(code)), code))


@dataclass(frozen=True, slots=True)
class FileOutcome:
    """What became of one walked file. Private: it names the path."""

    path: str
    """Relative to the tree, surrogate-escaped."""
    code: str
    size_bytes: int
    sop_instance_uid: str
    study_id: str
    """Pseudonym, empty when the file belongs to no exam."""
    series_id: str
    """Pseudonym of the stack, empty when the file belongs to none."""


@dataclass(frozen=True, slots=True)
class StackOutcome:
    """How one stack was judged; shareable, and kept in the store as a candidate."""

    study_id: str
    series_id: str
    contrast: str
    code: str
    confidence: str
    evidence: str
    """What fired, in order, ``;``-joined codes and numbers."""
    num_files: int
    rows: int
    columns: int
    echo_time_ms: float | None
    repetition_time_ms: float | None


FILE_COLUMNS = (*(field.name for field in fields(FileOutcome)), "state")
"""Columns of the private file report."""

COUNT_COLUMNS = ("study_id", "series_id", "state", "code", "num_files")
"""Columns of the shareable file report."""

STACK_COLUMNS = tuple(field.name for field in fields(StackOutcome))
"""Columns of the shareable stack report."""


@dataclass(frozen=True)
class Summary:
    """Totals of one run."""

    files_walked: int
    states: dict[str, int]
    codes: dict[str, int]
    exams_seen: int
    series_stored: int
    store_hash: str

    @classmethod
    def of(
        cls, codes: Counter[str], *, files_walked: int, exams_seen: int, series_stored: int, store_hash: str
    ) -> Self:
        """Add up; every walked file must have exactly one code."""
        heads: Counter[str] = Counter()
        states: Counter[str] = Counter()
        for code, count in codes.items():
            heads[code.partition(":")[0]] += count
            states[state_of(code)] += count
        assert states.total() == files_walked, (states.total(), files_walked)
        return cls(
            files_walked=files_walked,
            states={state: states[state] for state in ("converted", "skipped", "quarantined")},
            codes=dict(sorted(heads.items())),
            exams_seen=exams_seen,
            series_stored=series_stored,
            store_hash=store_hash,
        )

    @property
    def quarantined_share(self) -> float:
        """Quarantined files as a fraction of the files walked."""
        return self.states["quarantined"] / self.files_walked if self.files_walked else 0.0

    def to_text(self) -> str:
        """Render for a terminal."""
        lines = [f"{self.files_walked} files walked, {self.exams_seen} exams, {self.series_stored} series in the store"]
        for code, count in sorted(self.codes.items(), key=lambda item: (-item[1], item[0])):
            meaning = {**SKIPPED, **QUARANTINED}.get(code, "in the store")
            lines.append(f"  {count:8d}  {state_of(code):11s}  {code}: {meaning}")
        return "\n".join(lines)

    def to_json(self) -> bytes:
        """Render for programs."""
        totals = {field.name: getattr(self, field.name) for field in fields(self)}
        return json.dumps(totals, indent=1, sort_keys=True).encode() + b"\n"


def file_lines(files: Iterable[FileOutcome]) -> bytes:
    """Render outcomes as lines of the private file report, sorted by study and path."""
    by_path = sorted(files, key=lambda file: (file.study_id, file.path))
    return csv_lines([*(getattr(file, name) for name in FILE_COLUMNS[:-1]), state_of(file.code)] for file in by_path)


def count_lines(counts: Mapping[tuple[str, str, str], int]) -> bytes:
    """Render (study, series, code) → number of files as lines of the shareable file report."""
    merged: Counter[tuple[str, str, str, str]] = Counter()
    for (study_id, series_id, code), count in counts.items():
        merged[study_id, series_id, state_of(code), code.partition(":")[0]] += count
    return csv_lines([*key, count] for key, count in sorted(merged.items()))


def stack_lines(stacks: Iterable[StackOutcome]) -> bytes:
    """Render outcomes as lines of the shareable stack report."""
    by_id = sorted(stacks, key=lambda stack: (stack.study_id, stack.series_id))
    return csv_lines([getattr(stack, name) for name in STACK_COLUMNS] for stack in by_id)


def csv_lines(rows: Iterable[Sequence[object]]) -> bytes:
    """Render rows as CSV; undecodable file names keep their bytes."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode("utf-8", "surrogateescape")


def to_csv(header: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    """Render a table as CSV."""
    return csv_lines([header]) + csv_lines(rows)
