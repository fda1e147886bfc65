"""The Oulu thesis's Tables 3, 4 and 5, made from one result: groups, grades of discs, metrics by slice count."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lbp_ray.report.sheets import Sheet
from lbp_ray.report.verdict import comparison
from lbp_ray.report.words import (
    METRIC_LABELS,
    NO_SPREAD,
    by_slices,
    estimate_with_bounds,
    interval_level,
    mean_with_spread,
    metric,
    percent,
    slices,
    spread_name,
)
from lbp_ray.result import METRIC_NAMES

if TYPE_CHECKING:
    from lbp_ray.result import CohortSummary, GradeRow, MetricSummary, StudyResult

DISCS = ("L1-L2", "L2-L3", "L3-L4", "L4-L5", "L5-S1")
"""Levels of Table 4, in its order."""

GROUP_LABELS = {
    "asymptomatic": "asymptomatic",
    "slightly_symptomatic": "slightly symptomatic",
    "symptomatic": "symptomatic",
    "symptomatic_asymptomatic": "symptomatic/asymptomatic",
    "unclassified": "complete, but meets no rule",
    "not_enough_data": "not enough data",
}
"""How a questionnaire group is written for a reader."""


def group_name(code: str) -> str:
    """Write a questionnaire group for a reader."""
    return GROUP_LABELS.get(code, code)


def thesis_tables(result: StudyResult) -> list[Sheet]:
    """Make the tables that the result has data for.

    Parameters
    ----------
    result
        A result that `check_reportable` accepted.
    """
    cohort = result.cohort
    held = [] if cohort is None else [_groups(cohort), *([_grades(cohort)] if cohort.grades else [])]
    return [*held, _metrics(result)]


def _groups(cohort: CohortSummary) -> Sheet:
    rows = tuple(
        (
            group_name(row.group),
            str(row.count),
            percent(row.share),
            NO_SPREAD if row.share_complete is None else percent(row.share_complete),
        )
        for row in cohort.groups
    )
    records = tuple(
        {"group": row.group, "subjects": row.count, "share": row.share, "share_complete": row.share_complete}
        for row in cohort.groups
    )
    note = (
        f"Table 3 of the Oulu thesis, with both denominators: all {cohort.num_subjects} subjects who answered, and the"
        f" {cohort.num_complete} with complete answers. The thesis names the second number and prints shares of the"
        " first."
    )
    head = ("group", "subjects", f"of {cohort.num_subjects}", f"of {cohort.num_complete} complete")
    return Sheet("table3", "Questionnaire groups", note, head, "lrrr", rows, records, judged=False)


def _grades(cohort: CohortSummary) -> Sheet:
    rows = tuple(
        (
            f"{row.scale.capitalize()} {row.grade}",
            *[f"{count} ({percent(share)})" for count, share in zip(row.counts, row.shares, strict=True)],
        )
        for row in cohort.grades
    )
    records = tuple(record for row in cohort.grades for record in _grade_records(row))
    note = "Table 4 of the Oulu thesis: discs of each grade, and their share of the exams graded at that level"
    return Sheet("table4", "Grades of discs", f"{note}.", ("grade", *DISCS), "lrrrrr", rows, records, judged=False)


def _grade_records(row: GradeRow) -> list[dict[str, object]]:
    return [
        {"scale": row.scale, "grade": row.grade, "level": disc, "exams": count, "share": share}
        for disc, count, share in zip(DISCS, row.counts, row.shares, strict=True)
    ]


def _metrics(result: StudyResult) -> Sheet:
    parts = by_slices(result)
    head = [f"{slices(part.num_slices)}{told}" for part in parts for told in (f", mean ± {spread_name(result)}", "")]
    compared = len(parts) > 1 and not result.optimistic
    rows = tuple(
        (
            METRIC_LABELS[name],
            *[
                cell
                for part in parts
                for cell in (
                    mean_with_spread(result, metric(part, name)),
                    estimate_with_bounds(metric(part, name)),
                )
            ],
            *([comparison(result, name)] if compared else []),
        )
        for name in METRIC_NAMES
    )
    records = tuple(
        {"num_slices": part.num_slices, **summary_record(metric(part, name)), "verdict": comparison(result, name)}
        for part in parts
        for name in METRIC_NAMES
    )
    interval = "" if result.optimistic else f" with its {interval_level(result)} interval over patients"
    note = (
        f"Table 5 of the Oulu thesis: mean ± {spread_name(result)} over {len(result.seeds)} seeds; beside it the"
        f" estimate of the seed-averaged scores{interval}"
    )
    align = "l" + "rr" * len(parts) + "l" * compared
    columns = ("metric", *head, *(["between slice counts"] if compared else []))
    return Sheet("table5", "Eight metrics by slice count", f"{note}.", columns, align, rows, records)


def summary_record(summary: MetricSummary) -> dict[str, object]:
    """Lay a metric out for software: mean, SD, SE and n over models, estimate and interval."""
    interval = summary.interval
    return {
        "metric": summary.name,
        "mean": summary.mean,
        "sd": summary.sd,
        "se": summary.se,
        "n": len(summary.per_seed),
        "estimate": summary.estimate,
        "low": None if interval is None else interval.low,
        "high": None if interval is None else interval.high,
        "interval_level": None if interval is None else interval.level,
        "interval_method": None if interval is None else interval.method,
    }
