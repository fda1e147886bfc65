"""The self-contained page and the files beside it."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lbp_ray.report.checks import check_opened, check_reportable
from lbp_ray.report.details import detail_tables
from lbp_ray.report.gallery import draw_all, sample_sizes, trial_count
from lbp_ray.report.holdout import holdout_picture, holdout_tables, opening_sentences
from lbp_ray.report.optimism import mark, notice
from lbp_ray.report.provenance import crop_sentences, source_name
from lbp_ray.report.readers import cohort_sentences, reader_tables
from lbp_ray.report.rules import rule_tables
from lbp_ray.report.settings import choices_table
from lbp_ray.report.sheets import Sheet, sheet_csv, sheet_mark, sheet_markdown
from lbp_ray.report.spectrum import excluded_picture, excluded_sentences, excluded_table
from lbp_ray.report.tables import ALL_METRICS, metrics_csv, metrics_markdown
from lbp_ray.report.theme import Picture, inline_svg
from lbp_ray.report.thesis_tables import group_name, thesis_tables
from lbp_ray.report.verdict import INTERVAL_EXPLANATION, comparison, interval_meaning, verdict_sentences
from lbp_ray.report.words import (
    APART,
    METRIC_LABELS,
    METRIC_MEANINGS,
    SELECTIONS,
    THRESHOLD_FREE,
    THRESHOLD_SOURCES,
    bounds,
    by_slices,
    chance_level,
    interval_level,
    listed,
    mean_with_spread,
    metric,
    number,
    prevalence,
    short_hash,
    slices,
    spread_name,
    units,
)
from preprocess.commit import write_atomic

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lbp_ray.result import ExcludedScores, MetricSummary, StudyResult, Unsealed

TEMPLATE, STYLE = "report.html.j2", "style.css"

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class MetricRow:
    """One line of the page's metrics table."""

    label: str
    meaning: str
    cells: tuple[dict[str, str], ...]
    """Per slice count: estimate, bounds, seeds."""
    chance: str
    between: str
    group: str
    """``scores``, ``decisions`` (at thresholds) or ``apart`` (shown, but not one of the eight)."""


@dataclass(frozen=True)
class Step:
    """One step of the cohort's funnel."""

    name: str
    count: int
    lost: int
    reason: str
    width: float
    """Percent of the first step."""


@dataclass(frozen=True)
class Report:
    """All that a page is filled with."""

    result: StudyResult
    unsealed: Sequence[Unsealed]
    excluded: ExcludedScores | None
    pictures: Mapping[str, Picture]
    sheets: Mapping[str, Sheet]


def write_report(
    result: StudyResult,
    folder: Path,
    *,
    contact_sheet: bytes | None = None,
    unsealed: Sequence[Unsealed] = (),
    excluded: ExcludedScores | None = None,
) -> Path:
    """Write the page, its figures and its tables.

    Parameters
    ----------
    result
        The study's result: with the two last parameters the only source of every number, figure and sentence.
    folder
        Where to write; made when missing. Existing files of the same names are replaced.
    contact_sheet
        PNG of the crops that the models saw; left out when None.
    unsealed
        Every opening of the hold-out for this result; none where it is sealed.
    excluded
        Scores of the groups that the study left out; None where they were not asked for.

    Returns
    -------
    Path
        ``folder/report.html``. Beside it: ``figures/*.svg``, and ``tables/*.csv`` with ``tables/*.md`` of the same
        names.

    Raises
    ------
    ValueError
        If the result cannot be reported (see `check_reportable`), an opening or the excluded groups' scores are of
        another result, or the contact sheet is not a PNG.
    """
    check_reportable(result)
    check_opened(result, unsealed, excluded)
    if contact_sheet is not None and not contact_sheet.startswith(PNG_SIGNATURE):
        msg = f"contact_sheet must be the bytes of a PNG, found {contact_sheet[:8]!r}; encode the picture as PNG"
        raise ValueError(msg)
    report = _compose(result, sorted(unsealed, key=lambda told: told.opening.line), excluded)
    for picture in report.pictures.values():
        write_atomic(folder / "figures" / f"{picture.name}.svg", picture.svg)
    for sheet in report.sheets.values():
        write_atomic(folder / "tables" / f"{sheet.name}.csv", sheet_csv(sheet, result).encode())
        write_atomic(folder / "tables" / f"{sheet.name}.md", sheet_markdown(sheet, result).encode())
    write_atomic(folder / "tables" / "metrics.csv", metrics_csv(result).encode())
    write_atomic(folder / "tables" / "metrics.md", metrics_markdown(result).encode())
    page = folder / "report.html"
    write_atomic(page, render_page(report, contact_sheet).encode())
    return page


def _compose(result: StudyResult, unsealed: Sequence[Unsealed], excluded: ExcludedScores | None) -> Report:
    pictures = draw_all(result)
    sheets = [
        *thesis_tables(result),
        *detail_tables(result),
        *rule_tables(result),
        *reader_tables(result),
        choices_table(result),
    ]
    for told in unsealed:
        sheets += holdout_tables(result, told)
        drawn = holdout_picture(result, told)
        pictures[drawn.name] = drawn
    if excluded is not None:
        sheets.append(excluded_table(excluded))
        drawn = excluded_picture(result, excluded)
        pictures[drawn.name] = drawn
    return Report(result, unsealed, excluded, pictures, {sheet.name: sheet for sheet in sheets})


def render_page(report: Report, contact_sheet: bytes | None) -> str:
    """Fill the template.

    Parameters
    ----------
    report
        What `check_reportable` and `check_opened` accepted, with its figures and tables.
    contact_sheet
        PNG bytes, or None.
    """
    here, result = Path(__file__).parent, report.result
    environment = Environment(
        loader=FileSystemLoader(here),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "slices": slices,
        "source_name": source_name,
        "group_name": group_name,
        "mark": lambda sheet: sheet_mark(sheet, result),
        "sentences": lambda told: opening_sentences(result, told),
    }
    inlined = {name: Markup(inline_svg(picture.svg, name)) for name, picture in report.pictures.items()}
    return environment.get_template(TEMPLATE).render(
        result=result,
        parts=by_slices(result),
        hash=short_hash(result),
        style=Markup((here / STYLE).read_text()),
        notice=notice(result),
        warning=mark(result),
        verdict=verdict_sentences(result)[len(notice(result)) :],
        interval_meaning=interval_meaning(result),
        interval_explanation=INTERVAL_EXPLANATION,
        level=interval_level(result),
        units=units(result),
        spread=spread_name(result),
        selection=SELECTIONS.get(result.selection, result.selection),
        threshold_source=THRESHOLD_SOURCES.get(result.threshold_source, result.threshold_source),
        methods=interval_methods(result),
        rows=[_metric_row(result, name) for name in ALL_METRICS],
        seed_rows=[(METRIC_LABELS[name], [metric(part, name) for part in by_slices(result)]) for name in ALL_METRICS],
        pictures=report.pictures,
        inlined=inlined,
        sheets=report.sheets,
        unsealed=report.unsealed,
        excluded_sentences=[] if report.excluded is None else excluded_sentences(report.excluded),
        funnel=_funnel(result),
        cohort_sentences=cohort_sentences(result),
        sizes=sample_sizes(result),
        trials=trial_count(result),
        config=flattened(result.config),
        crop_sentences=crop_sentences(result),
        contact_sheet=None if contact_sheet is None else base64.b64encode(contact_sheet).decode(),
    )


def interval_methods(result: StudyResult) -> str:
    """Name how the intervals were made; several methods are listed, none is an empty text."""
    held = [summary.interval for part in result.slice_counts for summary in part.metrics]
    return listed(sorted({interval.method for interval in held if interval is not None}))


def flattened(config: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Turn nested settings into ``section.key`` rows, in their own order; lists stay on one line."""
    rows: list[tuple[str, str]] = []
    for key, value in config.items():
        if isinstance(value, dict) and value:
            rows += flattened(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            rows.append((f"{prefix}{key}", text))
    return rows


def _metric_row(result: StudyResult, name: str) -> MetricRow:
    parts = by_slices(result)
    levels = [chance_level(name, prevalence(part)) for part in parts]
    chances = sorted({number(level) for level in levels if level is not None})
    return MetricRow(
        label=METRIC_LABELS[name],
        meaning=METRIC_MEANINGS[name].replace("study", result.level),
        cells=tuple(_metric_cell(result, metric(part, name)) for part in parts),
        chance=" / ".join(chances),
        between=comparison(result, name),
        group="apart" if name in APART else "scores" if name in THRESHOLD_FREE else "decisions",
    )


def _metric_cell(result: StudyResult, summary: MetricSummary) -> dict[str, str]:
    return {
        "estimate": number(summary.estimate, 3),
        "bounds": "" if summary.interval is None else bounds(summary.interval, 3),
        "seeds": "one seed" if summary.sd is None else f"seeds {mean_with_spread(result, summary)}",
    }


def _funnel(result: StudyResult) -> list[Step]:
    first = max((step.count for step in result.funnel), default=1) or 1
    before = [step.count for step in result.funnel[:1]] + [step.count for step in result.funnel]
    return [
        Step(step.name, step.count, max(previous - step.count, 0), step.reason, round(100 * step.count / first, 2))
        for step, previous in zip(result.funnel, before, strict=False)
    ]
