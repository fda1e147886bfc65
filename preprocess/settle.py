"""One part of the exams, from header rows to committed series and the code of every file: a worker's unit of work.

All that is written of a part (series, manifest, candidates, private index, report lines) is written by the one task
that has it, so nothing is shared and nothing is gathered by the driver but totals.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from preprocess.accounting import (
    QUARANTINED,
    FileOutcome,
    StackOutcome,
    count_lines,
    file_lines,
    stack_lines,
    strongest,
)
from preprocess.commit import canonical_json, commit_point, content_id, stream_atomic, write_atomic
from preprocess.convert import (
    Conversion,
    Identity,
    compare_stack,
    convert_stack,
    converted_codes,
    faulty_codes,
    image_name,
)
from preprocess.deidentify import Pseudonymiser
from preprocess.geometry import stack_geometry
from preprocess.link.uid_index import ExamEntry, SliceEntry, write_index_part
from preprocess.partitions import part_rows
from preprocess.pixels.volume import VolumeError, decode_file
from preprocess.select import Policy, Selection, select
from preprocess.store.write import committed_series, use_one_thread, write_candidates_part, write_manifest_part

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from preprocess.headers.index import FileRow
    from preprocess.select import Exam, Verdict
    from preprocess.stacks import Stack


@dataclass(frozen=True)
class SettleJob:
    """What every part needs to know."""

    root: Path
    store: Path
    private: Path
    key: bytes = field(repr=False)
    policy: Policy = field(repr=False)
    batches: frozenset[str] = field(repr=False)
    """Batches of header rows of this run."""
    shift_dates: bool = False

    @cached_property
    def names(self) -> Pseudonymiser:
        """Pseudonyms under the key."""
        return Pseudonymiser(self.key)

    def stack_id(self, stack: Stack) -> str:
        """Pseudonym of a stack."""
        return self.names.series(stack.study_uid, stack.series_uid, stack.key)

    def selections(self, part: str) -> Iterator[Selection]:
        """Decide on the exams of a part, block by block."""
        for rows in part_rows(self.private / "index", part, self.batches):
            yield select(rows, self.policy, self.stack_id)


class Part(NamedTuple):
    """One part to settle."""

    name: str
    num_rows: int
    """Header rows in it."""
    known_faults: tuple[tuple[str, str], ...] = ()
    """(path, code) of files that killed a process: not to be touched again."""


class Suspect(NamedTuple):
    """One stack of a part that may have killed its process, or one file of it."""

    part: str
    series_id: str
    path: str = ""


@dataclass(frozen=True)
class PartOutcome:
    """Totals of one part."""

    part: str
    codes: Counter[str]
    exams_seen: int
    overrides: frozenset[str]
    """Names in the override file that a stack of the part answers to."""


class _FileCode(NamedTuple):
    code: str
    series_id: str
    row: FileRow


def settle_part(job: SettleJob, part: Part) -> PartOutcome:
    """Convert what the store does not hold yet of a part, and write everything that is known about it.

    Returns
    -------
    PartOutcome
        Totals; no identifier but those of the override file.
    """
    use_one_thread()
    settlement = _Settlement(job, part)
    with stream_atomic(settlement.path("files", "csv"), mode=0o600) as report:
        for selection in job.selections(part.name):
            report.buffer.write(file_lines(settlement.add(selection)))
    settlement.write()
    return PartOutcome(part.name, settlement.codes, len(settlement.exams), frozenset(settlement.overrides))


class _Settlement:
    """What is known of a part so far."""

    def __init__(self, job: SettleJob, part: Part) -> None:
        self.job, self.part, self.names = job, part.name, job.names
        self.known_faults = dict(part.known_faults)
        self.held = {(row["study_id"], row["contrast"]): row for row in committed_series(job.store, part.name)}
        self.sources: dict[str, dict[str, Any]] = _read_json(self.path("sources", "json"))
        self.counts: Counter[tuple[str, str, str]] = Counter()
        self.stacks: list[StackOutcome] = []
        self.exams: list[ExamEntry] = []
        self.slices: list[SliceEntry] = []
        self.overrides: set[str] = set()

    def path(self, kind: str, suffix: str) -> Path:
        """Where a kind of the part's reports is written."""
        return self.job.private / "parts" / f"{self.part}.{kind}.{suffix}"

    @property
    def codes(self) -> Counter[str]:
        """Files by code."""
        totals: Counter[str] = Counter()
        for (_, _, code), count in self.counts.items():
            totals[code] += count
        return totals

    def add(self, selection: Selection) -> list[FileOutcome]:
        """Settle whole studies; returns their files, which are not kept."""
        found: dict[str, list[_FileCode]] = defaultdict(list)
        seen = {row.study_uid for row, code in selection.settled if code.partition(":")[0] in QUARANTINED}
        for row, code in selection.settled:
            found[row.path].append(_FileCode(code, "", row))
        for exam in selection.exams:
            if exam.verdicts or exam.study_uid in seen:
                self.exams.append(self._exam_entry(exam))
            for verdict in exam.verdicts:
                self._add_stack(exam, verdict, found)
        files = [self._file(path, codes) for path, codes in found.items()]
        self.counts.update((file.study_id, file.series_id, file.code) for file in files)
        return files

    def _add_stack(self, exam: Exam, verdict: Verdict, found: dict[str, list[_FileCode]]) -> None:
        stack = verdict.stack
        identity = Identity.of(self.names, exam, stack, shift_dates=self.job.shift_dates)
        self.overrides |= {stack.series_uid, identity.series_id} & set(self.job.policy.overrides)
        result = Conversion(faulty_codes(stack, verdict.code)) if verdict.code else self._convert(verdict, identity)
        for row in (*stack.rows, *stack.duplicates):
            found[row.path].append(_FileCode(result.codes[row.path], identity.series_id, row))
        self.stacks.append(_stack_outcome(verdict, identity, result.codes))
        if result.stored:
            kept = [row for row in stack.rows if row.path not in result.faults]
            geometry = stack_geometry(kept, allow_gaps=self.job.policy.allow_gaps)
            for index, place in enumerate(geometry.order):
                name = image_name(kept[place])
                self.slices.append(SliceEntry(name, identity.study_id, identity.series_id, index))
            faults = {row.sop_uid: result.faults[row.path] for row in stack.rows if row.path in result.faults}
            self.sources[identity.series_id] = {"signature": _signature(stack), "faults": faults}

    def _convert(self, verdict: Verdict, identity: Identity) -> Conversion:
        """Convert a selected stack, or show that the store holds it."""
        job, stack = self.job, verdict.stack
        known = self.held.get((identity.study_id, verdict.contrast))
        if known is None:
            return convert_stack(
                job.root,
                job.store,
                verdict,
                identity,
                allow_gaps=job.policy.allow_gaps,
                known_faults={row.path: code for row in stack.rows if (code := self.known_faults.get(row.path))},
            )
        if (known["series_id"], known["source_id"]) != (identity.series_id, identity.source_id):
            return Conversion(faulty_codes(stack, "changed_after_commit"))
        source = self.sources.get(identity.series_id)
        if source is None or source["signature"] != _signature(stack):
            return compare_stack(job.root, known, verdict, identity, allow_gaps=job.policy.allow_gaps)
        faults = {row.path: code for row in stack.rows if (code := source["faults"].get(row.sop_uid))}
        return Conversion(converted_codes(stack, faults), faults, stored=True)

    def _exam_entry(self, exam: Exam) -> ExamEntry:
        patient_id, study_id = self.names.patient(*exam.patient), self.names.study(exam.study_uid)
        return ExamEntry(*exam.patient, exam.accession, exam.study_uid, patient_id, study_id)

    def _file(self, path: str, codes: list[_FileCode]) -> FileOutcome:
        """Give a file its one code: that of its strongest image."""
        code = strongest(item.code for item in codes)
        best = min((item for item in codes if item.code == code), key=lambda item: item.series_id)
        study_id = self.names.study(best.row.study_uid)
        return FileOutcome(path, code, best.row.size_bytes, best.row.sop_uid, study_id, best.series_id)

    def write(self) -> None:
        """Write the part's share of the manifest, the candidates, the private index and the reports."""
        job = self.job
        write_manifest_part(job.store, self.part)
        write_candidates_part(job.store, self.part, [_candidate(stack) for stack in self.stacks])
        write_index_part(job.private, self.part, self.exams, self.slices)
        commit_point("reports:before")
        for kind, lines in (("counts", count_lines(self.counts)), ("stacks", stack_lines(self.stacks))):
            write_atomic(self.path(kind, "csv"), lines, mode=0o600)
        write_atomic(self.path("sources", "json"), canonical_json(self.sources).encode(), mode=0o600)
        commit_point("reports:part")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content


def _signature(stack: Stack) -> str:
    """Hash of sizes and times of a stack's files: what tells that one was changed in place."""
    rows = (*stack.rows, *stack.duplicates)
    return content_id(sorted([image_name(row), row.size_bytes, row.mtime_ns] for row in rows))


def _stack_outcome(verdict: Verdict, identity: Identity, codes: Mapping[str, str]) -> StackOutcome:
    stack = verdict.stack
    row = stack.rows[0]
    found = {codes[member.path].partition(":")[0] for member in (*stack.rows, *stack.duplicates)}
    # The cause, not its consequence for the other slices.
    causes = found - {"series_incomplete", "duplicate"} or found
    return StackOutcome(
        study_id=identity.study_id,
        series_id=identity.series_id,
        contrast=verdict.contrast,
        code="converted" if "converted" in causes else min(causes),
        confidence="" if verdict.code else verdict.confidence,
        evidence=";".join(verdict.evidence),
        num_files=len({member.path for member in (*stack.rows, *stack.duplicates)}),
        rows=int(row.rows or 0),
        columns=int(row.columns or 0),
        echo_time_ms=row.echo_time_ms,
        repetition_time_ms=row.repetition_time_ms,
    )


def _candidate(stack: StackOutcome) -> dict[str, Any]:
    return {name: getattr(stack, name) for name in StackOutcome.__dataclass_fields__}


# --- a part whose process died ---------------------------------------------------------------------------------------


def list_suspects(job: SettleJob, part: Part) -> list[Suspect]:
    """List the stacks of a part that are still to be decoded; decodes nothing."""
    held = {row["series_id"] for row in committed_series(job.store, part.name)}
    chosen = (
        verdict for selection in job.selections(part.name) for exam in selection.exams for verdict in exam.selected
    )
    return [Suspect(part.name, name) for verdict in chosen if (name := job.stack_id(verdict.stack)) not in held]


def convert_suspect(job: SettleJob, suspect: Suspect) -> None:
    """Convert one stack alone, so that it alone dies."""
    use_one_thread()
    exam, verdict = _find(job, suspect)
    identity = Identity.of(job.names, exam, verdict.stack, shift_dates=job.shift_dates)
    convert_stack(job.root, job.store, verdict, identity, allow_gaps=False, known_faults={})


def list_files(job: SettleJob, suspect: Suspect) -> list[Suspect]:
    """List the files of a stack."""
    _, verdict = _find(job, suspect)
    paths = sorted({row.path for row in (*verdict.stack.rows, *verdict.stack.duplicates)})
    return [suspect._replace(path=path) for path in paths]


def decode_suspect(job: SettleJob, suspect: Suspect) -> None:
    """Decode one file alone."""
    _, verdict = _find(job, suspect)
    members = (*verdict.stack.rows, *verdict.stack.duplicates)
    try:
        decode_file(job.root, [row for row in members if row.path == suspect.path])
    except VolumeError:
        return  # an error is no crash; the conversion gives it its code


def _find(job: SettleJob, suspect: Suspect) -> tuple[Exam, Verdict]:
    for selection in job.selections(suspect.part):
        for exam in selection.exams:
            for verdict in exam.selected:
                if job.stack_id(verdict.stack) == suspect.series_id:
                    return exam, verdict
    raise AssertionError(suspect.series_id)
