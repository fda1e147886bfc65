"""A DICOM tree → slice store, mid-sagittal artefact and reports, on whatever runs the tasks.

The order of what happens is here; where tasks run is the mapper's business (`preprocess.job` has the Ray one), so that
the whole conversion also runs in one process. The process that runs this holds totals and the names of batches and
parts, never paths or header rows.
"""

from __future__ import annotations

import fcntl
import os
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from preprocess.accounting import (
    COUNT_COLUMNS,
    FILE_COLUMNS,
    STACK_COLUMNS,
    Summary,
    count_lines,
    csv_lines,
    file_lines,
)
from preprocess.commit import commit_point, write_atomic, write_pieces
from preprocess.deidentify import Pseudonymiser, load_key
from preprocess.headers.index import FileRow, walk
from preprocess.link.uid_index import UidIndex, check_mapping_path, write_mapping_table
from preprocess.mapper import Mapper, TaskFailure, map_here
from preprocess.midsagittal.choose import choose_for_store, locate_templates, read_template_list
from preprocess.partitions import (
    IndexTask,
    batch_name,
    batches,
    index_batch,
    part_characters_for,
    settled_files,
    sweep_index,
    write_batch,
)
from preprocess.select import Policy
from preprocess.settle import (
    Part,
    PartOutcome,
    SettleJob,
    Suspect,
    convert_suspect,
    decode_suspect,
    list_files,
    list_suspects,
    settle_part,
)
from preprocess.store.paths import StorePaths
from preprocess.store.read import stored_series
from preprocess.store.write import create_store

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from preprocess.headers.index import WalkedFile


class PreprocessError(ValueError):
    """A conversion that cannot be done as asked; the message says what to do."""


@dataclass(frozen=True)
class ConvertJob:
    """What one run is asked to do."""

    dicom_dir: Path
    out: Path
    templates: Path | None = None
    """CSV that names hand-picked mid-sagittal slices; None skips the choice."""
    corrections: Path | None = None
    """CSV of mid-sagittal slices corrected by hand."""
    key_file: Path | None = None
    """None: beside the store, created by the first run."""
    mapping_table: Path | None = None
    """Where to write the private table from identifiers to pseudonyms; None writes none."""
    policy: Policy = field(default_factory=Policy)
    shift_dates: bool = False
    """Keep the date of the exam, shifted by the patient's own offset; else no date is kept."""


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
        If paths, key, store, templates or overrides do not fit together; what was committed stays.
    """
    paths = StorePaths(job.out)
    _check_paths(job)
    paths.private.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _only_writer(paths):
        key = load_key(job.key_file or paths.key, create=job.key_file is None)
        templates = read_template_list(job.templates) if job.templates else None
        num_files = sum(1 for _ in walk(job.dicom_dir))
        dates = "shift" if job.shift_dates else "drop"
        key_id, length = Pseudonymiser(key).key_id, part_characters_for(num_files)
        length = create_store(paths.store, key_id=key_id, part_characters=length, dates=dates)
        paths.sweep()
        task = IndexTask(str(job.dicom_dir), str(paths.private / "index"), key, length)
        names, parts, walked = _index(task, job.dicom_dir, num_files, mapper)
        settle = SettleJob(
            root=job.dicom_dir,
            store=paths.store,
            private=paths.private,
            key=key,
            policy=job.policy,
            batches=frozenset(names),
            shift_dates=job.shift_dates,
        )
        outcomes = _settle(settle, parts, mapper)
        summary = _report(paths, names, sorted(parts), outcomes, walked)
        if job.mapping_table is not None:
            write_mapping_table(paths.private, job.mapping_table)
        _check_overrides(job.policy, outcomes)
        artefact = None
        if templates is not None and summary.series_stored:
            places = locate_templates(templates, UidIndex(paths.private).locate)
            artefact = choose_for_store(paths.store, paths.midsagittal, places, mapper, job.corrections)
    return Outcome(summary, artefact)


def choose_again(paths: StorePaths, templates: Path, corrections: Path | None, mapper: Mapper = map_here) -> Path:
    """Choose mid-sagittal slices in a finished store, without its DICOM tree; see `choose_for_store`."""
    listed = read_template_list(templates)
    places = locate_templates(listed, lambda uids: UidIndex(paths.private).locate(uids))
    return choose_for_store(paths.store, paths.midsagittal, places, mapper, corrections)


def _check_paths(job: ConvertJob) -> None:
    if not job.dicom_dir.is_dir():
        msg = f"DICOM folder not found: {job.dicom_dir}"
        raise PreprocessError(msg)
    source, target = job.dicom_dir.resolve(), job.out.resolve()
    if target.is_relative_to(source):
        msg = f"--out {job.out} lies inside the DICOM folder, which is never written to; choose a path outside it"
        raise PreprocessError(msg)
    if job.mapping_table is not None:
        check_mapping_path(job.mapping_table)


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


# --- headers ---------------------------------------------------------------------------------------------------------


def _index(task: IndexTask, root: Path, num_files: int, mapper: Mapper) -> tuple[list[str], dict[str, int], int]:
    """Read all headers into the private index.

    Returns
    -------
    tuple
        Names of the batches in the order of the walk; part → header rows; number of files.
    """
    names: list[str] = []
    lost: list[list[WalkedFile]] = []
    parts: Counter[str] = Counter()
    walked = 0

    def named() -> Iterator[tuple[str, list[WalkedFile]]]:
        nonlocal walked
        for number, files in enumerate(batches(walk(root))):
            names.append(batch_name(files))
            walked += len(files)
            yield f"index-{number:06d}", files

    read = partial(index_batch, task)
    for files, outcome in mapper(read, named(), title="headers", total=num_files, unit="file", size=len):
        if isinstance(outcome, TaskFailure):
            lost.append(files)
        else:
            parts.update(outcome.parts)
    for files in lost:
        parts.update(_index_apart(task, files, mapper))
        names += [batch_name([file]) for file in files]
    lost_names = {batch_name(files) for files in lost}
    names = [name for name in names if name not in lost_names]
    sweep_index(Path(task.folder), frozenset(names), parts)
    return names, dict(parts), walked


def _index_apart(task: IndexTask, files: Sequence[WalkedFile], mapper: Mapper) -> Counter[str]:
    """Read a batch that killed its process again file by file, so that it costs one file."""
    parts: Counter[str] = Counter()
    singles = ((f"index-alone-{number:06d}", [file]) for number, file in enumerate(files))
    for single, outcome in mapper(partial(index_batch, task), singles, title="headers, alone", total=len(files)):
        if isinstance(outcome, TaskFailure):
            row = FileRow(single[0].path, 0, "unreadable_header:crash")
            write_batch(task, batch_name(single), [row], "")
        else:
            parts.update(outcome.parts)
    return parts


# --- exams -----------------------------------------------------------------------------------------------------------


def _settle(job: SettleJob, parts: dict[str, int], mapper: Mapper) -> list[PartOutcome]:
    """Settle every part; one whose process dies is taken apart until the file at fault is found."""
    items = ((f"convert-{name}", Part(name, num_rows)) for name, num_rows in sorted(parts.items()))
    outcomes: list[PartOutcome] = []
    crashed: list[Part] = []
    rows = sum(parts.values())
    for part, outcome in mapper(
        partial(settle_part, job), items, title="exams", total=rows, unit="image", size=lambda part: part.num_rows
    ):
        if isinstance(outcome, TaskFailure):
            crashed.append(part)
        else:
            outcomes.append(outcome)
    for part in crashed:
        faults = tuple(sorted(_crashes(job, part, mapper).items()))
        again = [(f"convert-{part.name}", part._replace(known_faults=faults))]
        for _, outcome in mapper(partial(settle_part, job), again, title=f"exams of part {part.name}", total=1):
            if isinstance(outcome, TaskFailure):
                msg = (
                    f"part {part.name} kills its process, though none of its files does alone: most likely there is "
                    "too little memory per task; free some, or start Ray with fewer CPUs, and run the command again"
                )
                raise PreprocessError(msg)
            outcomes.append(outcome)
    return outcomes


def _crashes(job: SettleJob, part: Part, mapper: Mapper) -> dict[str, str]:
    """Find the files of a part that kill the process that decodes them."""
    suspects = list_suspects(job, part)
    faults: dict[str, str] = {}
    for suspect in _killers(partial(convert_suspect, job), suspects, "convert", mapper):
        files = list_files(job, suspect)
        found = [file.path for file in _killers(partial(decode_suspect, job), files, "decode", mapper)]
        faults |= dict.fromkeys(found or [file.path for file in files], "decoder_crash")
    return faults


def _killers(function: partial[None], suspects: Iterable[Suspect], verb: str, mapper: Mapper) -> list[Suspect]:
    suspects = list(suspects)
    items = ((f"{verb}-alone-{number:04d}", suspect) for number, suspect in enumerate(suspects))
    results = mapper(function, items, title=f"{verb} alone", total=len(suspects))
    return [suspect for suspect, result in results if isinstance(result, TaskFailure)]


# --- reports ---------------------------------------------------------------------------------------------------------


def _report(
    paths: StorePaths, names: Sequence[str], parts: Sequence[str], outcomes: Sequence[PartOutcome], walked: int
) -> Summary:
    """Put the reports together from those of the parts, none of which is held whole."""
    commit_point("reports:start")
    alone = Counter(file.code for name in names for file in settled_files(paths.private / "index", name))
    series_stored, store_hash = stored_series(paths.store)
    summary = Summary.of(
        sum((outcome.codes for outcome in outcomes), alone),
        files_walked=walked,
        exams_seen=sum(outcome.exams_seen for outcome in outcomes),
        series_stored=series_stored,
        store_hash=store_hash,
    )

    def lines(kind: str) -> Iterator[bytes]:
        return ((paths.private / "parts" / f"{part}.{kind}.csv").read_bytes() for part in parts)

    outside = (file_lines(settled_files(paths.private / "index", name)) for name in names)
    private = chain([csv_lines([FILE_COLUMNS])], outside, lines("files"))
    write_pieces(paths.private / "files.csv", private, mode=0o600)
    counted = count_lines({("", "", code): count for code, count in alone.items()})
    write_pieces(paths.report / "files.csv", chain([csv_lines([COUNT_COLUMNS]), counted], lines("counts")))
    write_pieces(paths.report / "stacks.csv", chain([csv_lines([STACK_COLUMNS])], lines("stacks")))
    write_atomic(paths.report / "summary.json", summary.to_json())
    commit_point("reports:after")
    return summary


def _check_overrides(policy: Policy, outcomes: Sequence[PartOutcome]) -> None:
    """Refuse an override file that names what the tree does not have: the person meant something else."""
    known = frozenset().union(*(outcome.overrides for outcome in outcomes))
    absent = sum(name not in known for name in policy.overrides)
    if absent:
        msg = (
            f"{absent} of {len(policy.overrides)} lines of the override file name no series of this tree; "
            "give a SeriesInstanceUID, or a series_id of stacks.csv"
        )
        raise PreprocessError(msg)
