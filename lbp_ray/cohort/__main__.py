"""Tables 3 and 4, the readers' agreement, the protocol check and the funnel of a cohort.

``python -m lbp_ray.cohort --questionnaire CSV [--gradings CSV] [--store STORE] [--config study.yaml] --out DIR``
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from lbp_ray.cohort.funnel import funnel_markdown, funnel_svg, read_funnel
from lbp_ray.cohort.gradings import grade_exams, graded_table
from lbp_ray.cohort.protocol import check_protocol
from lbp_ray.cohort.questionnaire import CohortError, reported_rows
from lbp_ray.cohort.summary import summarise_cohort, task_exams
from lbp_ray.cohort.tables import (
    agreement_table,
    grade_markdown,
    grade_table,
    group_markdown,
    group_table,
    percent,
)
from lbp_ray.config import load_config
from lbp_ray.study import CohortConfig, StudyConfig
from preprocess.commit import write_atomic
from preprocess.midsagittal.choose import CONTRAST
from preprocess.store.read import SliceStore

if TYPE_CHECKING:
    from lbp_ray.result import CohortSummary


def run_cohort(options: argparse.Namespace) -> tuple[CohortSummary, dict[str, str]]:
    """Summarise a cohort; return the summary and the content of each file.

    Raises
    ------
    ValueError
        Of the room at fault: answers, gradings, configuration or store.
    """
    config = load_config(StudyConfig, options.config).cohort if options.config else CohortConfig()
    questionnaire = _read(options.questionnaire)
    gradings = _read(options.gradings) if options.gradings else None
    manifest = _manifest(options.store, questionnaire, config) if options.store else None
    summary = summarise_cohort(questionnaire, gradings, manifest, config)
    files = {
        "table3.csv": _csv(group_table(summary)),
        "table3.md": group_markdown(summary),
        "rows.csv": _csv(reported_rows(questionnaire, strict_gt30=config.strict_gt30)),
    }
    if gradings is not None:
        files |= {
            "table4.csv": _csv(grade_table(summary)),
            "table4.md": grade_markdown(summary),
            "agreement.csv": _csv(agreement_table(summary.agreement)),
            "graded.csv": _csv(graded_table(grade_exams(gradings, config))),
        }
    if manifest is not None and config.protocol is not None:
        files["protocol.csv"] = _csv(check_protocol(manifest, config.protocol)[1])
    return summary, files


def _read(path: Path) -> pd.DataFrame:
    if not path.is_file():
        msg = f"{path} not found: give a CSV as collected, or one that `python -m preprocess link` wrote"
        raise CohortError(msg)
    table = pd.read_csv(path, dtype={"study_id": str, "patient_id": str})
    if not isinstance(table.index, pd.RangeIndex):
        msg = f"{path}: rows have more fields than the header names; mend the header, or remove trailing commas"
        raise CohortError(msg)
    return table


def _manifest(store: Path, questionnaire: pd.DataFrame, config: CohortConfig) -> pd.DataFrame:
    """Rows of the exams of the binary task; of all exams where the questionnaire names none."""
    if config.protocol is None:
        msg = "--store is read for the protocol check: give --config, a file whose cohort.protocol says what was wanted"
        raise CohortError(msg)
    manifest = SliceStore.open(store, contrast=CONTRAST).manifest
    if "study_id" not in questionnaire:
        return manifest
    task = task_exams(questionnaire, strict_gt30=config.strict_gt30)
    return manifest[manifest["study_id"].isin(task["study_id"])]


def _csv(table: pd.DataFrame) -> str:
    return str(table.to_csv(index=False, lineterminator="\n"))


def render_console(summary: CohortSummary) -> str:
    """Lay out the summary in a few lines: groups, rows that meet several rules or none, agreement, protocol."""
    lines = [
        f"{row.group.replace('_', ' '):<26}{row.count:>7}{percent(row.share):>7}{percent(row.share_complete):>7}"
        for row in summary.groups
    ]
    lines = [f"{'':<26}{'N':>7}{'asked':>7}{'compl.':>7}", *lines]
    lines.append(f"{'all':<26}{summary.num_subjects:>7}  {summary.num_complete} complete")
    lines.append(f"rows that meet several rules: {summary.num_multi_match}, none: {summary.num_no_match} (rows.csv)")
    if summary.grades:
        exams = sum(row.counts[0] for row in summary.grades if row.scale == "modic")
        lines.append(f"graded exams of the task: {exams}; discs graded Pfirrmann 0: {summary.num_pfirrmann_zero}")
    for row in summary.agreement:
        if row.level == "all" and row.kappa is not None:
            between = f" [{row.interval.low:.2f}, {row.interval.high:.2f}]" if row.interval else ""
            kappa = f"{row.weights} kappa {row.kappa:.2f}{between} over {row.num_pairs} discs"
            lines.append(f"{row.scale}: {kappa}; {row.num_adjudicated} adjudicated ({summary.adjudication})")
    lines += [
        f"protocol: {row.parameter} {row.wanted}: {row.num_out} out, {row.num_unknown} unknown (found {row.found})"
        for row in summary.protocol
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, write the artefacts and return the exit status: 0, or 2 for what cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m lbp_ray.cohort", description=__doc__)
    parser.add_argument("--questionnaire", type=Path, help="CSV of answers, linked or not")
    parser.add_argument("--gradings", type=Path, help="linked CSV of Pfirrmann and Modic grades")
    parser.add_argument("--store", type=Path, help="slice store, for the protocol check")
    parser.add_argument("--config", type=Path, help="study's YAML file; its section cohort is read")
    parser.add_argument("--funnel", type=Path, help="CSV of name,count,reason: the way to the analysed exams")
    parser.add_argument("--out", type=Path, required=True, help="folder for the artefacts")
    options = parser.parse_args(arguments)
    if options.questionnaire is None and (options.funnel is None or options.gradings or options.store):
        parser.error("--questionnaire is required; only --funnel can stand without it")
    console = ""
    files: dict[str, str] = {}
    try:
        if options.questionnaire:
            summary, files = run_cohort(options)
            console = render_console(summary)
        if options.funnel:
            steps = read_funnel(options.funnel)
            files |= {"funnel.md": funnel_markdown(steps), "funnel.svg": funnel_svg(steps).decode()}
        for name, text in files.items():
            write_atomic(options.out / name, text.encode())
    except (OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(*filter(None, (console, f"{options.out}: {', '.join(files)}")), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
