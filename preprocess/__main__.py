"""``python -m preprocess``: convert (the default), midsagittal, link, export, verify, inspect."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from preprocess.mapper import Mapper, map_here
from preprocess.pipeline import ConvertJob, choose_again, convert_tree
from preprocess.select import CONTRASTS, Policy, read_overrides
from preprocess.store.paths import StorePaths

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

COMMANDS = ("convert", "midsagittal", "link", "export", "verify", "inspect")
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
    except BrokenPipeError:  # `... | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m preprocess", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="{" + ",".join(COMMANDS) + "}")
    _add_convert(commands.add_parser("convert", help="DICOM tree to slice store (may be left out)"))
    midsagittal = commands.add_parser("midsagittal", help="choose mid-sagittal slices again, with other templates")
    midsagittal.add_argument("store", type=Path)
    midsagittal.add_argument("--templates", type=Path, required=True, help="CSV of hand-picked mid-sagittal slices")
    midsagittal.add_argument("--corrections", type=Path, help="CSV study_id,slice_index of slices corrected by hand")
    midsagittal.add_argument("--num-cpus", type=int, help="CPUs of the local Ray cluster; 0 runs in this process")
    midsagittal.set_defaults(run=_midsagittal)
    link = commands.add_parser("link", help="labels, gradings and annotations to the store's pseudonyms")
    link.add_argument("store", type=Path)
    link.add_argument("--out", type=Path, required=True)
    link.add_argument("--csv", type=Path, action="append", default=[])
    link.add_argument("--cvat", type=Path, action="append", default=[], help="XML, archive or backup from CVAT")
    link.add_argument("--masks", type=Path, action="append", default=[], help="folder of PNG or NIfTI masks")
    link.add_argument("--keep-text", action="append", default=[], metavar="COLUMN", help="let a text column pass")
    link.add_argument("--allow-unlinked", action="store_true", help="write what links, though some rows do not")
    link.set_defaults(run=_link)
    export = commands.add_parser("export", help="series to NIfTI or PNG")
    export.add_argument("store", type=Path)
    export.add_argument("--out", type=Path, required=True)
    export.add_argument("--series", action="append", default=[], metavar="SERIES_ID", help="default: every series")
    export.add_argument("--format", choices=("nifti", "png", "png16"), default="nifti")
    export.add_argument("--num-cpus", type=int, help="CPUs of the local Ray cluster; 0 runs in this process")
    export.set_defaults(run=_export)
    verify = commands.add_parser("verify", help="read everything and name every fault")
    verify.add_argument("store", type=Path)
    verify.add_argument("--num-cpus", type=int, help="CPUs of the local Ray cluster; 0 runs in this process")
    verify.set_defaults(run=_verify)
    inspect = commands.add_parser("inspect", help="print what is inside")
    inspect.add_argument("store", type=Path)
    inspect.set_defaults(run=_inspect)
    return parser


def _add_convert(convert: argparse.ArgumentParser) -> None:
    convert.add_argument("dicom_dir", type=Path)
    convert.add_argument("--out", type=Path, required=True, help="the store, ends in .zarr")
    convert.add_argument("--templates", type=Path, help="CSV of hand-picked mid-sagittal slices")
    convert.add_argument("--corrections", type=Path, help="CSV study_id,slice_index of slices corrected by hand")
    convert.add_argument("--key-file", type=Path, help="pseudonym key (mode 0600); default: made beside the store")
    convert.add_argument("--mapping-table", type=Path, help="write the private table of identifiers and pseudonyms")
    convert.add_argument(
        "--overrides", type=Path, help="CSV series,action: use or skip a series whatever the rules say"
    )
    convert.add_argument("--contrast", action="append", choices=CONTRASTS, help="default: t2_sagittal; may be repeated")
    convert.add_argument("--stir", choices=("exclude", "fat_suppressed"), default="exclude", help="what STIR counts as")
    convert.add_argument(
        "--fat-suppressed",
        choices=("exclude", "fallback"),
        default="exclude",
        help="whether a fat-suppressed T2 stack stands in for an exam without a plain one",
    )
    convert.add_argument("--allow-gaps", action="store_true", help="convert stacks in which slices are missing")
    convert.add_argument("--dates", choices=("drop", "shift"), default="drop")
    convert.add_argument("--num-cpus", type=int, help="CPUs of the local Ray cluster; 0 runs in this process")
    convert.add_argument("--max-quarantine", type=float, default=DEFAULT_MAX_QUARANTINE, metavar="SHARE")
    convert.set_defaults(run=_convert)


def _convert(options: argparse.Namespace) -> int:
    inputs = (options.templates, options.corrections, options.key_file, options.mapping_table, options.overrides)
    with _mapper(options.num_cpus, [options.dicom_dir, options.out, *inputs]) as mapper:
        outcome = convert_tree(_job(options), mapper)
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
        wanted = ", ".join(options.contrast or ["t2_sagittal"])
        print(f"error: no {wanted} series was found; {paths.report / 'stacks.csv'} says why", file=sys.stderr)
        return 1
    return 0


def _job(options: argparse.Namespace) -> ConvertJob:
    policy = Policy(
        contrasts=tuple(dict.fromkeys(options.contrast or ["t2_sagittal"])),
        stir=options.stir,
        fat_suppressed=options.fat_suppressed,
        allow_gaps=options.allow_gaps,
        overrides=read_overrides(options.overrides) if options.overrides else {},
    )
    return ConvertJob(
        _absolute(options.dicom_dir),
        _absolute(options.out),
        templates=options.templates,
        corrections=options.corrections,
        key_file=options.key_file,
        mapping_table=options.mapping_table,
        policy=policy,
        shift_dates=options.dates == "shift",
    )


def _absolute(path: Path) -> Path:
    """Make a path mean the same in every process."""
    return path.absolute()


@contextmanager
def _mapper(num_cpus: int | None, given: Sequence[Path | None]) -> Iterator[Mapper]:
    """Yield where tasks run: on Ray, or in this process when no CPU is asked for."""
    from preprocess.job import connect, map_on_ray, require_absolute

    require_absolute([path for path in given if path is not None])
    if num_cpus == 0:
        yield map_here
        return
    with connect(num_cpus):
        yield map_on_ray


def _midsagittal(options: argparse.Namespace) -> int:
    store = _absolute(options.store)
    with _mapper(options.num_cpus, [options.store, options.templates, options.corrections]) as mapper:
        artefact = choose_again(StorePaths(store), options.templates, options.corrections, mapper)
    print(f"mid-sagittal slices: {artefact}")
    return 0


def _link(options: argparse.Namespace) -> int:
    from preprocess.job import require_absolute
    from preprocess.link.link import LinkJob, link_files

    require_absolute([options.store, options.out, *options.csv, *options.cvat, *options.masks])
    keep_text = frozenset(options.keep_text)
    files = (tuple(options.csv), tuple(options.cvat), tuple(options.masks))
    report = link_files(LinkJob(options.store, options.out, *files, keep_text, options.allow_unlinked))
    print(report.to_text())
    return 0


def _export(options: argparse.Namespace) -> int:
    from preprocess.store.export import export_store

    store, out = _absolute(options.store), _absolute(options.out)
    with _mapper(options.num_cpus, [options.store, options.out]) as mapper:
        written = export_store(store, out, options.format, series_ids=options.series or None, mapper=mapper)
    print(f"{written} series written to {options.out}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    from preprocess.store.verify import verify_store

    with _mapper(options.num_cpus, [options.store]) as mapper:
        findings = verify_store(_absolute(options.store), mapper)
    for finding in findings:
        print(f"{finding.series_id}  {finding.fault}")
    print(f"{options.store}: {len(findings)} fault(s)" if findings else f"{options.store}: sound")
    return 1 if findings else 0


def _inspect(options: argparse.Namespace) -> int:
    from preprocess.store.describe import describe_store

    print(describe_store(options.store))
    return 0


if __name__ == "__main__":
    os.umask(0o022)
    sys.exit(main())
