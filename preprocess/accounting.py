"""One terminal state per file: the codes, and the two reports that add them up.

The private report names paths and lives in the private folder (mode 0600). The shareable one knows pseudonyms, codes
and counts only. Both are sorted, so equal trees give equal bytes.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

from preprocess.commit import commit_point, write_atomic

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

State = Literal["converted", "skipped", "quarantined"]

CONVERTED = "converted"
"""Code of a file whose pixels are in the store."""

SKIPPED = {
    "acquisition_3d": "a 3D acquisition",
    "archive": "an archive; unpack it to have it read",
    "body_part": "the header names another body part",
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
    "not_best": "a sagittal T2 stack, but another of this exam ranks higher",
    "not_dicom": "no DICOM file",
    "not_magnitude": "phase, real or imaginary part",
    "not_mr": "another modality than MR",
    "not_sagittal": "the slices are not sagittal",
    "proton_density": "proton-density weighted",
    "rgb": "a colour image",
    "secondary_capture": "a screenshot or scan",
    "special_file": "a pipe, socket or device",
    "symlink": "a symbolic link; links are not followed",
    "t1_weighted": "T1 weighted",
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
    "decoder_crash": "the decoder killed its process, twice",
    "duplicate_position": "two images at one slice position",
    "gap": "a slice is missing",
    "internal_error": "an unforeseen error; the private report names its type",
    "mixed_pixels": "pixel types within the stack do not fit one 16-bit type",
    "multiframe": "an enhanced multi-frame image: not yet converted",
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

    @property
    def state(self) -> State:
        """Terminal state."""
        return state_of(self.code)


@dataclass(frozen=True, slots=True)
class StackOutcome:
    """How one stack was judged; shareable."""

    study_id: str
    series_id: str
    code: str
    confidence: str
    evidence: str
    """What fired, in order, ``;``-joined codes and numbers."""
    num_files: int
    rows: int
    columns: int
    echo_time_ms: float | None
    repetition_time_ms: float | None


@dataclass(frozen=True)
class Summary:
    """Totals of one run."""

    files_walked: int
    states: dict[str, int]
    codes: dict[str, int]
    exams_seen: int
    series_stored: int
    store_hash: str

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


def summarise(files: list[FileOutcome], *, files_walked: int, series_stored: int, store_hash: str) -> Summary:
    """Add up the outcomes; every walked file must have exactly one."""
    assert len({file.path for file in files}) == len(files) == files_walked
    states = Counter(file.state for file in files)
    return Summary(
        files_walked=files_walked,
        states={state: states[state] for state in ("converted", "skipped", "quarantined")},
        codes=dict(sorted(Counter(file.code.partition(":")[0] for file in files).items())),
        exams_seen=len({file.study_id for file in files if file.study_id}),
        series_stored=series_stored,
        store_hash=store_hash,
    )


def write_reports(
    private: Path, shareable: Path, files: list[FileOutcome], stacks: list[StackOutcome], summary: Summary
) -> None:
    """Write the private file list, and the shareable counts, candidates and totals.

    Parameters
    ----------
    private
        Private folder; gets ``files.csv`` (0600).
    shareable
        Shareable folder; gets ``files.csv`` (state, code and count per stack), ``stacks.csv`` and ``summary.json``.
    files, stacks
        Outcomes, in any order.
    summary
        Their totals.
    """
    commit_point("reports:before")
    by_path = sorted(files, key=lambda file: file.path)
    names = [field.name for field in fields(FileOutcome)]
    private_rows = ([*(getattr(file, name) for name in names), file.state] for file in by_path)
    write_atomic(private / "files.csv", to_csv([*names, "state"], private_rows), mode=0o600)
    counts = Counter((file.study_id, file.series_id, file.state, file.code.partition(":")[0]) for file in files)
    counted = ([*key, count] for key, count in sorted(counts.items()))
    write_atomic(shareable / "files.csv", to_csv(["study_id", "series_id", "state", "code", "num_files"], counted))
    names = [field.name for field in fields(StackOutcome)]
    by_id = sorted(stacks, key=lambda stack: (stack.study_id, stack.series_id))
    judged = ([getattr(stack, name) for name in names] for stack in by_id)
    write_atomic(shareable / "stacks.csv", to_csv(names, judged))
    totals = {field.name: getattr(summary, field.name) for field in fields(Summary)}
    write_atomic(shareable / "summary.json", json.dumps(totals, indent=1, sort_keys=True).encode() + b"\n")
    commit_point("reports:after")


def to_csv(header: list[str], rows: Iterable[list[object]]) -> bytes:
    """Render a table as CSV; undecodable file names keep their bytes."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", "surrogateescape")
