"""A DICOM tree → slice store, mid-sagittal artefact and reports, on whatever runs the tasks.

The order of what happens, and what is decided, is here; where tasks run is the mapper's business (`preprocess.job` has
the Ray one), so that the whole conversion also runs in one process.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from preprocess.accounting import CONVERTED, FileOutcome, StackOutcome, Summary, summarise, write_reports
from preprocess.commit import commit_point, content_id, sweep_partials
from preprocess.convert import (
    ConvertTask,
    Identity,
    convert_series,
    converted_codes,
    faulty_codes,
    without_identifiers,
)
from preprocess.deidentify import Pseudonymiser, load_key
from preprocess.geometry import GeometryError, stack_geometry
from preprocess.index import FileRow, WalkedFile, index_files, walk
from preprocess.mapper import Mapper, TaskFailure, map_here
from preprocess.midsagittal import choose_for_store, read_template_list
from preprocess.select import Selection, select
from preprocess.store import committed_series, create_store, sweep_store, write_manifest
from preprocess.uid_index import ExamEntry, exam_entry, write_uid_index

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from preprocess.select import Verdict

FILES_PER_TASK = 512
"""Headers read by one task: long enough to hide its dispatch, short enough to spread a small tree over the cores."""


class PreprocessError(ValueError):
    """A conversion that cannot be done as asked; the message says what to do."""


@dataclass(frozen=True)
class StorePaths:
    """Every path of one store and its siblings."""

    store: Path

    def __post_init__(self) -> None:
        if self.store.suffix != ".zarr":
            msg = f"--out must end in .zarr (its siblings are named after it), found {self.store}"
            raise PreprocessError(msg)

    @property
    def private(self) -> Path:
        """Key, file report and UID index; mode 0700."""
        return self.store.with_suffix(".private")

    @property
    def key(self) -> Path:
        """Default key file."""
        return self.private / "pseudonym.key"

    @property
    def report(self) -> Path:
        """Shareable report."""
        return self.store.with_suffix(".report")

    @property
    def midsagittal(self) -> Path:
        """Parent of the mid-sagittal artefacts."""
        return self.store.with_suffix(".midsagittal")

    def sweep(self) -> None:
        """Delete what killed runs left half-written."""
        sweep_store(self.store)
        for folder in (self.private, self.report, self.midsagittal):
            sweep_partials(folder)


@dataclass(frozen=True)
class ConvertJob:
    """What one run is asked to do."""

    dicom_dir: Path
    out: Path
    templates: Path | None = None
    """CSV with a SOPInstanceUID column of hand-picked mid-sagittal slices; None skips the choice."""
    key_file: Path | None = None
    """None: beside the store, created by the first run."""


@dataclass(frozen=True)
class Outcome:
    """What a run produced."""

    summary: Summary
    midsagittal: Path | None


def convert_tree(job: ConvertJob, mapper: Mapper = map_here) -> Outcome:
    """Convert a tree, or what is missing of it.

    Parameters
    ----------
    job
        Input and output.
    mapper
        Where tasks run.

    Returns
    -------
    Outcome
        Totals over all files, and the mid-sagittal artefact if templates were given.

    Raises
    ------
    ValueError
        If paths, key, store or templates do not fit together; what was committed stays.
    """
    paths = StorePaths(job.out)
    _check_paths(job)
    paths.private.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _only_writer(paths):
        names = Pseudonymiser(load_key(job.key_file or paths.key, create=job.key_file is None))
        template_uids = read_template_list(job.templates) if job.templates else None
        create_store(paths.store, key_id=names.key_id)
        paths.sweep()
        files = walk(job.dicom_dir)
        rows = _index(job.dicom_dir, files, mapper)
        ledger = _Ledger.of(select(rows), {row.path: row.sop_uid for row in rows}, names)
        del rows
        ledger.codes |= _convert(job, ledger, mapper)
        write_manifest(paths.store)
        stored = {row["series_id"]: row["content_hash"] for row in committed_series(paths.store)}
        index = write_uid_index(paths.private, ledger.exam_entries(names), ledger.stored_slices())
        summary = _report(paths, files, ledger, stored)
        artefact = None
        if template_uids is not None and stored:
            artefact = choose_for_store(paths.store, paths.midsagittal, index.locate(template_uids), mapper)
    return Outcome(summary, artefact)


def _check_paths(job: ConvertJob) -> None:
    if not job.dicom_dir.is_dir():
        msg = f"DICOM folder not found: {job.dicom_dir}"
        raise PreprocessError(msg)
    source, target = job.dicom_dir.resolve(), job.out.resolve()
    if target.is_relative_to(source):
        msg = f"--out {job.out} lies inside the DICOM folder, which is never written to; choose a path outside it"
        raise PreprocessError(msg)


@contextmanager
def _only_writer(paths: StorePaths) -> Iterator[None]:
    """Hold the store's lock; the system releases it when the process dies, however it dies."""
    descriptor = os.open(paths.private / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            msg = f"another run is writing {paths.store}; wait for it to end, then run the command again"
            raise PreprocessError(msg) from None
        yield
    finally:
        os.close(descriptor)


def _index(root: Path, files: list[WalkedFile], mapper: Mapper) -> list[FileRow]:
    """Read all headers; a batch that kills its process is read again file by file, so that it costs one file."""
    batches = [files[start : start + FILES_PER_TASK] for start in range(0, len(files), FILES_PER_TASK)]
    rows, lost = _index_batches(root, batches, mapper)
    if lost:
        more, lost = _index_batches(root, [[file] for file in lost], mapper)
        rows += more
    return rows + [FileRow(file.path, file.size_bytes, "unreadable_header:crash") for file in lost]


def _index_batches(
    root: Path, batches: list[list[WalkedFile]], mapper: Mapper
) -> tuple[list[FileRow], list[WalkedFile]]:
    names = [f"index-{number:06d}" for number in range(len(batches))]
    rows: list[FileRow] = []
    lost: list[WalkedFile] = []
    for number, result in mapper(partial(index_files, str(root)), batches, names=names, title="headers"):
        if isinstance(result, TaskFailure):
            lost += batches[number]
        else:
            rows += result
    return rows, lost


@dataclass
class _Ledger:
    """The selection under pseudonyms, and the code of every file as it becomes known."""

    selection: Selection
    uids: dict[str, str]
    """Path → object id, empty where the header gave none."""
    identities: dict[tuple[str, str, str], Identity]
    codes: dict[str, str]

    @classmethod
    def of(cls, selection: Selection, uids: dict[str, str], names: Pseudonymiser) -> _Ledger:
        identities = {
            _stack_name(verdict): Identity.of(names, exam, verdict.stack)
            for exam in selection.exams
            for verdict in exam.verdicts
        }
        codes = dict(selection.settled)
        for exam in selection.exams:
            for verdict in exam.verdicts:
                if verdict.code:
                    codes |= faulty_codes(verdict.stack, verdict.code)
        return cls(selection, uids, identities, codes)

    def identity(self, verdict: Verdict) -> Identity:
        return self.identities[_stack_name(verdict)]

    def chosen(self) -> list[tuple[Verdict, Identity]]:
        """List the selected stacks, sorted by study."""
        verdicts = [exam.selected for exam in self.selection.exams if exam.selected is not None]
        pairs = [(verdict, self.identity(verdict)) for verdict in verdicts]
        return sorted(pairs, key=lambda pair: pair[1].study_id)

    def exam_entries(self, names: Pseudonymiser) -> list[ExamEntry]:
        """Every exam under its identifiers and its pseudonyms."""
        entries = []
        for exam in self.selection.exams:
            verdict = exam.selected
            series_id = self.identity(verdict).series_id if verdict and self._is_stored(verdict) else ""
            patient_id, study_id = names.patient(*exam.patient), names.study(exam.study_uid)
            ids = {"patient_id": patient_id, "study_id": study_id, "series_id": series_id}
            entries.append(exam_entry(exam.patient[1], exam.accession, **ids))
        return entries

    def stored_slices(self) -> dict[str, tuple[str, int]]:
        """Object id → (series, slice) of every stored slice."""
        places = {}
        for verdict, identity in self.chosen():
            if self._is_stored(verdict):
                for slice_index, row in enumerate(stack_geometry(verdict.stack.rows).order):
                    places[verdict.stack.rows[row].sop_uid] = (identity.series_id, slice_index)
        return places

    def _is_stored(self, verdict: Verdict) -> bool:
        return self.codes[verdict.stack.rows[0].path] == CONVERTED


def _stack_name(verdict: Verdict) -> tuple[str, str, str]:
    return verdict.stack.study_uid, verdict.stack.series_uid, verdict.stack.key


def _convert(job: ConvertJob, ledger: _Ledger, mapper: Mapper) -> dict[str, str]:
    """Convert what the store does not hold yet; returns the codes of all files of all selected stacks."""
    held = {str(row["study_id"]): row for row in committed_series(job.out)}
    codes: dict[str, str] = {}
    tasks: list[ConvertTask] = []
    for verdict, identity in ledger.chosen():
        known = held.get(identity.study_id)
        if known is None:
            codes |= _convert_geometry_faults(verdict)
            if verdict.stack.rows[0].path not in codes:
                tasks.append(ConvertTask(str(job.dicom_dir), str(job.out), without_identifiers(verdict), identity))
        elif (known["series_id"], known["source_id"]) == (identity.series_id, identity.source_id):
            codes |= converted_codes(verdict.stack)
        else:
            codes |= faulty_codes(verdict.stack, "changed_after_commit")
    names = [f"convert-{task.identity.series_id}" for task in tasks]
    for index, result in mapper(convert_series, tasks, names=names, title="series"):
        stack = tasks[index].verdict.stack
        codes |= faulty_codes(stack, "decoder_crash") if isinstance(result, TaskFailure) else result
    return codes


def _convert_geometry_faults(verdict: Verdict) -> dict[str, str]:
    """Settle a stack that cannot be ordered without sending it anywhere."""
    try:
        stack_geometry(verdict.stack.rows)
    except GeometryError as error:
        return faulty_codes(verdict.stack, str(error))
    return {}


def _report(paths: StorePaths, files: list[WalkedFile], ledger: _Ledger, stored: dict[str, str]) -> Summary:
    outcomes: list[FileOutcome] = []
    stacks: list[StackOutcome] = []
    sizes = {file.path: file.size_bytes for file in files}
    for exam in ledger.selection.exams:
        for verdict in exam.verdicts:
            identity = ledger.identity(verdict)
            members = (*verdict.stack.rows, *verdict.stack.duplicates)
            stacks.append(_stack_outcome(verdict, identity, ledger.codes))
            for row in members:
                code, ids = ledger.codes[row.path], (identity.study_id, identity.series_id)
                outcomes.append(FileOutcome(row.path, code, sizes[row.path], row.sop_uid, *ids))
    for path, code in ledger.selection.settled.items():
        outcomes.append(FileOutcome(path, code, sizes[path], ledger.uids[path], "", ""))
    commit_point("reports:start")
    summary = summarise(
        outcomes, files_walked=len(files), series_stored=len(stored), store_hash=content_id(sorted(stored.items()))
    )
    write_reports(paths.private, paths.report, outcomes, stacks, summary)
    return summary


def _stack_outcome(verdict: Verdict, identity: Identity, codes: dict[str, str]) -> StackOutcome:
    stack = verdict.stack
    row = stack.rows[0]
    found = {codes[member.path].partition(":")[0] for member in (*stack.rows, *stack.duplicates)}
    return StackOutcome(
        study_id=identity.study_id,
        series_id=identity.series_id,
        # The cause, not its consequence for the other slices.
        code=min(found - {"series_incomplete", "duplicate"} or found),
        confidence="" if verdict.code else verdict.confidence,
        evidence=";".join(verdict.evidence),
        num_files=len(stack.rows) + len(stack.duplicates),
        rows=int(row.rows or 0),
        columns=int(row.columns or 0),
        echo_time_ms=row.echo_time_ms,
        repetition_time_ms=row.repetition_time_ms,
    )
