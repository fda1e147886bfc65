"""``python -m preprocess``: convert (the default), link, verify, inspect."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from preprocess.mapper import map_here
from preprocess.pipeline import ConvertJob, Outcome, StorePaths, convert_tree

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMANDS = ("convert", "link", "verify", "inspect")
DEFAULT_MAX_QUARANTINE = 0.05
"""Share of quarantined files above which a conversion ends with a non-zero exit code."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, call, report; return the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] not in {*COMMANDS, "-h", "--help"}:
        words.insert(0, "convert")
    options = _parser().parse_args(words)
    try:
        return int(options.run(options))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m preprocess", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="{" + ",".join(COMMANDS) + "}")
    convert = commands.add_parser("convert", help="DICOM tree to slice store (may be left out)")
    convert.add_argument("dicom_dir", type=Path)
    convert.add_argument("--out", type=Path, required=True, help="the store, ends in .zarr")
    convert.add_argument("--templates", type=Path, help="CSV with SOPInstanceUID of hand-picked mid-sagittal slices")
    convert.add_argument("--key-file", type=Path, help="pseudonym key (mode 0600); default: made beside the store")
    convert.add_argument("--num-cpus", type=int, help="CPUs of the local Ray cluster; 0 runs in this process")
    convert.add_argument("--max-quarantine", type=float, default=DEFAULT_MAX_QUARANTINE, metavar="SHARE")
    convert.set_defaults(run=_convert)
    link = commands.add_parser("link", help="labels, gradings and annotations to the store's pseudonyms")
    link.add_argument("store", type=Path)
    link.add_argument("--out", type=Path, required=True)
    link.add_argument("--csv", type=Path, action="append", default=[])
    link.add_argument("--cvat", type=Path, action="append", default=[])
    link.add_argument("--keep-text", action="append", default=[], metavar="COLUMN", help="let a text column pass")
    link.add_argument("--allow-unlinked", action="store_true", help="write what links, though some rows do not")
    link.set_defaults(run=_link)
    for name, run in (("verify", _verify), ("inspect", _inspect)):
        command = commands.add_parser(name)
        command.add_argument("store", type=Path)
        command.set_defaults(run=run)
    return parser


def _convert(options: argparse.Namespace) -> int:
    job = ConvertJob(options.dicom_dir, options.out, options.templates, options.key_file)
    outcome = _run(job, options.num_cpus)
    print(outcome.summary.to_text())
    if outcome.midsagittal:
        print(f"mid-sagittal slices: {outcome.midsagittal}")
    paths = StorePaths(options.out)
    print(f"store: {paths.store}  (hash {outcome.summary.store_hash[:16]})")
    print(f"report: {paths.report}, private: {paths.private}")
    share = outcome.summary.quarantined_share
    if share > options.max_quarantine:
        print(
            f"error: {share:.1%} of the files are quarantined, above --max-quarantine {options.max_quarantine:.1%}; "
            f"see {paths.private / 'files.csv'}",
            file=sys.stderr,
        )
        return 1
    if not outcome.summary.series_stored:
        print(f"error: no sagittal T2 series was found; {paths.report / 'stacks.csv'} says why", file=sys.stderr)
        return 1
    return 0


def _run(job: ConvertJob, num_cpus: int | None) -> Outcome:
    from preprocess.job import connect, map_on_ray, require_absolute

    given = (job.dicom_dir, job.out, job.templates, job.key_file)
    require_absolute([path for path in given if path is not None])
    if num_cpus == 0:
        return convert_tree(job, map_here)
    absolute = [path.absolute() if path is not None else None for path in given]
    assert absolute[0] is not None
    assert absolute[1] is not None
    with connect(num_cpus):
        return convert_tree(ConvertJob(absolute[0], absolute[1], absolute[2], absolute[3]), map_on_ray)


def _link(options: argparse.Namespace) -> int:
    from preprocess.job import require_absolute
    from preprocess.link import LinkJob, link_files

    require_absolute([options.store, options.out, *options.csv, *options.cvat])
    keep_text = frozenset(options.keep_text)
    files = (tuple(options.csv), tuple(options.cvat))
    report = link_files(LinkJob(options.store, options.out, *files, keep_text, options.allow_unlinked))
    print(report.to_text())
    return 0


def _verify(options: argparse.Namespace) -> int:
    from preprocess.store import verify_store

    findings = verify_store(options.store)
    for finding in findings:
        print(f"{finding.series_id}  {finding.fault}")
    print(f"{options.store}: {len(findings)} fault(s)" if findings else f"{options.store}: sound")
    return 1 if findings else 0


def _inspect(options: argparse.Namespace) -> int:
    from preprocess.store import SliceStore

    store = SliceStore.open(options.store)
    manifest = store.manifest
    print(f"{store.path}  hash {store.content_hash}")
    print(f"{manifest['patient_id'].nunique()} patients, {manifest['study_id'].nunique()} exams, {len(store)} series")
    for name in ("contrast", "confidence", "manufacturer", "dtype"):
        counts = sorted(Counter(manifest[name]).items())
        print(f"{name}: " + ", ".join(f"{value} {count}" for value, count in counts))
    sizes = ("num_slices", "rows", "columns", "spacing_slice_mm", "spacing_row_mm")
    for name in (*sizes, "echo_time_ms", "repetition_time_ms"):
        low, high = manifest[name].min(), manifest[name].max()
        print(f"{name}: {low:g}" + ("" if low == high else f" to {high:g}"))
    return 0


if __name__ == "__main__":
    os.umask(0o022)
    sys.exit(main())
