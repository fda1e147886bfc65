"""A finished study, read back for what comes after its report: the hold-out, and the subjects that it left out."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from lbp_ray.config import load_config
from lbp_ray.report import write_report
from lbp_ray.result import ExcludedScores, StudyResult, Unsealed, table_hashes
from lbp_ray.runs import RunPaths
from lbp_ray.splits import Split, find_split, holdout_commitment
from lbp_ray.study import StudyConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

RESULT_FILE = "result.json"
"""Name of the result object inside a result folder."""

EXCLUDED_FILE = "excluded.json"
"""Name of the excluded groups' scores inside a result folder."""


class FinishedError(ValueError):
    """A folder that is not the untouched result of a study."""


@dataclass(frozen=True)
class Finished:
    """A finished study whose tables are as they were written."""

    folder: Path
    result: StudyResult
    config: StudyConfig
    """As the result was made; paths and compute are those of today."""
    paths: RunPaths
    split: Split

    @classmethod
    def open(cls, config: StudyConfig, folder: Path) -> Finished:
        """Read a result folder.

        Parameters
        ----------
        config
            Names the study and its paths. What decides a figure (slice counts, seeds, folds, recipe, evaluation) is
            read from the result.
        folder
            The result, as printed at the study's end.

        Raises
        ------
        FinishedError
            If it is no result, one of another study, its tables were changed, or its split is gone.
        """
        if not (folder / RESULT_FILE).is_file():
            msg = (
                f"{folder} is no result (no {RESULT_FILE}); give the folder of a finished study, as printed at its end"
            )
            raise FinishedError(msg)
        result = StudyResult.load(folder / RESULT_FILE)
        _check_result(result, folder, config.name)
        today = config.model_dump(include={"paths", "compute"})
        paths = RunPaths(config.paths.runs, config.name)
        return cls(folder, result, StudyConfig.model_validate(result.config | today), paths, _split_of(result, paths))

    def table(self, name: str) -> pd.DataFrame:
        """Read one of `lbp_ray.result.TABLES`."""
        return pd.read_parquet(self.folder / f"{name}.parquet")

    @property
    def crops_folder(self) -> Path | None:
        """The crops that the study was made with, None where they are gone."""
        for meta in sorted((self.paths.root / "crops").glob("[!.]*/crops.json")):
            if json.loads(meta.read_text())["crops_hash"] == self.result.hashes["crops"]:
                return meta.parent
        return None


def _check_result(result: StudyResult, folder: Path, name: str) -> None:
    if result.name != name:
        msg = f"{folder} is a result of study {result.name}, the configuration is of {name}; give that study's own"
        raise FinishedError(msg)
    changed = [table for table, found in table_hashes(folder).items() if result.hashes.get(table) != found]
    if changed:
        msg = (
            f"{folder / changed[0]}.parquet is not the table that result.json was made with; delete {folder} and run "
            "the study again, it only aggregates"
        )
        raise FinishedError(msg)


def _split_of(result: StudyResult, paths: RunPaths) -> Split:
    """Open the split that a result was made with; none is ever drawn here."""
    split = find_split(paths.splits, result.hashes["split"])
    if split is None or holdout_commitment(split.table) != result.holdout_commitment:
        msg = (
            f"no split under {paths.splits} is the one that the result was made with "
            f"({result.hashes['split'][:16]}); give the paths.runs that it was made in, or restore the split"
        )
        raise FinishedError(msg)
    return split


def render_result(folder: Path, crops_folder: Path | None) -> Path:
    """Render a result's report, with every opening of its hold-out and the excluded groups where they were scored.

    Parameters
    ----------
    folder
        The result.
    crops_folder
        The crops that it was made with, for their contact sheet; None leaves that out.

    Returns
    -------
    pathlib.Path
        ``report/report.html`` in `folder`.
    """
    result = StudyResult.load(folder / RESULT_FILE)
    sheet = None if crops_folder is None else crops_folder / "contact_sheet.png"
    excluded = folder / EXCLUDED_FILE
    return write_report(
        result,
        folder / "report",
        contact_sheet=sheet.read_bytes() if sheet is not None and sheet.is_file() else None,
        unsealed=[Unsealed.load(path) for path in sorted(folder.glob("unsealed-*.json"))],
        excluded=ExcludedScores.load(excluded) if excluded.is_file() else None,
    )


def run_on_result(
    work: Callable[[StudyConfig, Path], str],
    arguments: Sequence[str] | None,
    *,
    prog: str,
    description: str | None,
    replaceable: str,
) -> int:
    """Run a command on a finished result, render its report again and return the exit status.

    Parameters
    ----------
    work
        Does the work on configuration and result folder, and returns what is printed of it.
    arguments
        Of the command line; None takes those of the process.
    prog, description
        Name and purpose, for its help.
    replaceable
        What single values of the configuration may be replaced.
    """
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--config", type=Path, required=True, help="YAML of the study, e.g. configs/oulu_honest.yaml")
    parser.add_argument("--result", type=Path, required=True, help="folder of the finished result")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help=f"replace single values: {replaceable}"
    )
    parsed = parser.parse_args(arguments)
    try:
        config = load_config(StudyConfig, parsed.config, parsed.overrides)
        sys.stdout.write(f"{work(config, parsed.result)}\n")
        page = render_result(parsed.result, Finished.open(config, parsed.result).crops_folder)
    except (ValueError, FileNotFoundError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"\nreport: {page}\n")
    return 0
