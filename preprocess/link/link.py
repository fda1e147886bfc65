"""Labels, gradings, annotations and masks → the store's pseudonyms, with an account of every row.

Rows that cannot be linked are reported by file, line and reason code, never by content. Each file is read twice, in
chunks: once for its keys, which are looked up together, once to be translated. What is held of a row between the two is
its keys.
"""

from __future__ import annotations

import csv
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from preprocess.commit import commit_point, stream_atomic
from preprocess.link.drawn import scan_annotations
from preprocess.link.masks import scan_masks
from preprocess.link.resolve import REASONS, Book
from preprocess.link.source import LinkError, Source
from preprocess.link.table import scan_table
from preprocess.store.paths import StorePaths

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


@dataclass(frozen=True)
class LinkJob:
    """What to link."""

    store: Path
    out: Path
    """Folder for the linked files. Tables keep their names; annotations and masks become ``<name>.xml``."""
    tables: tuple[Path, ...] = ()
    annotations: tuple[Path, ...] = ()
    """CVAT exports."""
    masks: tuple[Path, ...] = ()
    """Folders of mask files."""
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


def link_files(job: LinkJob) -> LinkReport:
    """Translate every file and write ``link_report.csv`` and the linked files.

    Raises
    ------
    ValueError
        If the store is incomplete, its private index is missing, a file has no key column or is no CVAT export,
        or a row stays unlinked and ``allow_unlinked`` is not set: then only ``link_report.csv`` is written.
    """
    _check_places(job)
    tables = [scan_table(path, job.keep_text) for path in job.tables]
    sources: list[Source] = [*tables, *map(scan_annotations, job.annotations), *map(scan_masks, job.masks)]
    _check_out_names(sources)
    book = Book.open(job.store, StorePaths(job.store).private, [source.keys for source in sources])
    with ExitStack() as linked:  # an error leaves none of them
        codes = []
        for source in sources:
            linked.callback(commit_point, "link:file")
            codes.append(source.translate(book, linked.enter_context(stream_atomic(job.out / source.out_name))))
        counts = _write_report(job.out / "link_report.csv", sources, codes)
        report = LinkReport(counts, {table.name: list(table.withheld) for table in tables if table.withheld})
        if report.num_unlinked and not job.allow_unlinked:
            msg = (
                f"{report.num_unlinked} row(s) cannot be linked and nothing was written but "
                f"{job.out / 'link_report.csv'}, which names file, line and reason; mend them, or let them go with "
                f"--allow-unlinked\n{report.to_text()}"
            )
            raise LinkError(msg)
    return report


def _check_places(job: LinkJob) -> None:
    """Refuse to write where the inputs lie."""
    out = job.out.resolve()
    for path in (*job.tables, *job.annotations):
        if path.resolve().parent == out:
            msg = f"--out {job.out} is the folder of {path.name}, which would be overwritten; choose another folder"
            raise LinkError(msg)
    for path in job.masks:
        if out.is_relative_to(path.resolve()):
            msg = f"--out {job.out} lies in the masks of {path}, and would be taken for some; choose another folder"
            raise LinkError(msg)


def _check_out_names(sources: Sequence[Source]) -> None:
    names = [source.out_name for source in sources]
    if len({*names, "link_report.csv"}) <= len(names):
        msg = "two linked files would have one name, or that of link_report.csv (annotations become .xml): rename one"
        raise LinkError(msg)


def _write_report(path: Path, sources: Sequence[Source], codes: Sequence[np.ndarray]) -> dict[tuple[str, str], int]:
    reasons = list(REASONS)
    counts: Counter[tuple[str, str]] = Counter()
    with stream_atomic(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["file", "line", "reason"])
        for source, codes_R in zip(sources, codes, strict=True):
            name = source.name
            writer.writerows((name, line, reasons[code]) for line, code in zip(source.lines, codes_R, strict=True))
            numbers, found = np.unique(codes_R, return_counts=True)
            counts.update({(name, reasons[number]): int(count) for number, count in zip(numbers, found, strict=True)})
    return dict(counts)
