"""The results as a console table, as CSV for software and as Markdown for people."""

from __future__ import annotations

import csv
import io
import textwrap
from typing import TYPE_CHECKING

from lbp_ray.report.checks import check_reportable
from lbp_ray.report.optimism import notice
from lbp_ray.report.verdict import comparison, verdict_sentences
from lbp_ray.report.words import (
    APART,
    METRIC_LABELS,
    SELECTIONS,
    THRESHOLD_SOURCES,
    by_slices,
    chance_level,
    estimate_with_bounds,
    interval_level,
    metric,
    num_positive,
    num_scored,
    number,
    p_value,
    percent,
    prevalence,
    short_hash,
    slices,
    spread_name,
    spread_of,
    units,
)
from lbp_ray.result import METRIC_NAMES

if TYPE_CHECKING:
    from lbp_ray.result import MetricSummary, SliceCountResult, StudyResult

CONSOLE_WIDTH = 100
"""Columns that the console table never exceeds."""

LABEL_WIDTH, CELL_WIDTH, CELLS_IN_ROW = 18, 27, 3

ALL_METRICS = (*METRIC_NAMES, *APART)
"""The eight; accuracy, which is kept apart because an uneven mix of classes flatters it; and separation."""

CSV_COLUMNS = (
    "result_hash", "num_slices", "metric", "estimate", "low", "high", "interval_level", "interval_method", "seed_mean",
    "seed_sd", "seed_se", "num_seeds", "per_seed", "chance", "level", "num_scored", "num_positive", "selection",
    "threshold_source", "optimistic",
)  # fmt: skip


def render_console(result: StudyResult) -> str:
    """Lay out the results for the end of a command.

    Parameters
    ----------
    result
        The study's result.

    Returns
    -------
    str
        Lines of at most `CONSOLE_WIDTH` columns: who was studied, the eight metrics per slice count with interval and
        spread over seeds, Bayes-optimal AUC, permutation p, verdict and statements; of an optimistic result why it
        has no interval and no verdict, before any figure. No line end at the end.

    Raises
    ------
    ValueError
        If the result cannot be reported; see `check_reportable`.
    """
    check_reportable(result)
    parts = by_slices(result)
    blocks = [_block(parts[start : start + CELLS_IN_ROW], result) for start in range(0, len(parts), CELLS_IN_ROW)]
    lines = [
        *_wrapped(result.name),
        *_wrapped(_who(result)),
        *_wrapped(_how(result)),
        *[line for sentence in notice(result) for line in _wrapped(sentence, "! ")],
        "",
        *[line for block in blocks for line in (*block, "")],
        *_wrapped(_key(result)),
        "",
        *[line for line in (*_wrapped(_verdict(result)), "") if line or not result.optimistic],
        *[line for statement in result.statements for line in _wrapped(statement, "- ")],
        f"result {short_hash(result)}",
    ]
    return "\n".join(lines)


def metrics_csv(result: StudyResult) -> str:
    """Write one row per slice count and metric, at full precision.

    Parameters
    ----------
    result
        A result that `check_reportable` accepted.

    Returns
    -------
    str
        CSV with the columns `CSV_COLUMNS`; ``per_seed`` holds the seeds' values separated by semicolons, in seed order.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for part in by_slices(result):
        for name in ALL_METRICS:
            values = _csv_values(part, metric(part, name))
            how = [result.selection, result.threshold_source, str(result.optimistic).lower()]
            at = [result.level, num_scored(part), num_positive(part)]
            writer.writerow([short_hash(result), part.num_slices, name, *values, *at, *how])
    return buffer.getvalue()


def metrics_markdown(result: StudyResult) -> str:
    """Write the metrics table for a README or a manuscript.

    Parameters
    ----------
    result
        A result that `check_reportable` accepted.
    """
    parts = by_slices(result)
    bayes = _bayes_cells(parts, result, 3)
    rows = [
        ["metric", *[slices(part.num_slices) for part in parts], "between slice counts"],
        ["---", *["---:" for _ in parts], "---"],
        *[
            [METRIC_LABELS[name], *[_cell(result, metric(part, name), 3) for part in parts], comparison(result, name)]
            for name in ALL_METRICS
        ],
        *([["Bayes-optimal ROC-AUC", *bayes, ""]] if bayes else []),
        *([] if result.optimistic else [["permutation p", *_permutation_cells(parts), ""]]),
    ]
    lines = ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows]
    title = " ".join(result.name.split()).replace("<", "&lt;")
    key = f"{_key(result)}; {_how(result)}; result {short_hash(result)}."
    warning = [" ".join(notice(result)), ""] if result.optimistic else []
    return "\n".join([f"**{title}**: {_who(result)}", "", *warning, *lines, "", key, ""])


def _who(result: StudyResult) -> str:
    parts = by_slices(result)
    folds, seeds = result.num_folds, len(result.seeds)
    scored = {num_scored(part) for part in parts}
    share = _plain(percent(prevalence(parts[0]))) if len(scored) == 1 else ""
    positive = f"{result.num_positive} symptomatic" + (f" ({share})" if share else "")
    return (
        f"{result.num_studies} studies of {result.num_patients} patients, {positive}; {folds} folds × {seeds}"
        f" seed{'' if seeds == 1 else 's'}; {result.num_holdout_studies} studies sealed as hold-out"
    )


def _verdict(result: StudyResult) -> str:
    """Write what follows the notice of an optimistic result, or the whole verdict of an honest one."""
    return " ".join(verdict_sentences(result)[len(notice(result)) :])


def _how(result: StudyResult) -> str:
    epochs = SELECTIONS.get(result.selection, result.selection)
    thresholds = THRESHOLD_SOURCES.get(result.threshold_source, result.threshold_source)
    return f"epochs: {epochs}; thresholds: {thresholds}; scores of {units(result)}"


def _key(result: StudyResult) -> str:
    interval = "" if result.optimistic else f" [{interval_level(result)} interval over patients, conditional on the"
    models = "" if result.optimistic else " trained models]"
    return f"estimate{interval}{models} ±{spread_name(result)} over seeds (n = {len(result.seeds)})"


def _block(parts: list[SliceCountResult], result: StudyResult) -> list[str]:
    header = _row("", [slices(part.num_slices) for part in parts])
    lines = [header, "─" * len(header)]
    bayes = _bayes_cells(parts, result, 2)
    for name in METRIC_NAMES:
        lines.append(_row(METRIC_LABELS[name], [_cell(result, metric(part, name), 2) for part in parts]))
        if name == "roc_auc" and bayes:
            lines.append(_row("  Bayes-optimal", bayes))
    return lines if result.optimistic else [*lines, _row("permutation p", _permutation_cells(parts))]


def _bayes_cells(parts: list[SliceCountResult], result: StudyResult, decimals: int) -> list[str]:
    return [] if result.bayes is None else [number(result.bayes.realised_auc, decimals)] * len(parts)


def _permutation_cells(parts: list[SliceCountResult]) -> list[str]:
    tests = [part.permutation for part in parts]
    return [
        "not run" if test is None else f"{_plain(p_value(test.p_value))} ({test.num_permutations} shuffles)"
        for test in tests
    ]


def _row(label: str, cells: list[str]) -> str:
    return f"{label:<{LABEL_WIDTH}}" + "".join(f"{cell:>{CELL_WIDTH}}" for cell in cells)


def _cell(result: StudyResult, summary: MetricSummary, decimals: int) -> str:
    spread = spread_of(result, summary)
    told = estimate_with_bounds(summary, decimals)
    return told if spread is None else f"{told} ±{number(spread, decimals)}"


def _csv_values(part: SliceCountResult, summary: MetricSummary) -> list[object]:
    interval = summary.interval
    ends = [None] * 4 if interval is None else [interval.low, interval.high, interval.level, interval.method]
    seeds = [summary.mean, summary.sd, summary.se, len(summary.per_seed), ";".join(map(repr, summary.per_seed))]
    return [summary.estimate, *ends, *seeds, chance_level(summary.name, prevalence(part))]


def _wrapped(text: str, bullet: str = "") -> list[str]:
    return textwrap.wrap(_plain(text), CONSOLE_WIDTH, initial_indent=bullet, subsequent_indent=" " * len(bullet))


def _plain(text: str) -> str:
    """Turn typographic spaces, and whatever could steer a terminal, into plain spaces."""
    return "".join(character if character.isprintable() else " " for character in text)
