"""The self-contained page and the files beside it."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lbp_ray.report.checks import check_reportable
from lbp_ray.report.gallery import Picture, draw_all, sample_sizes, trial_count
from lbp_ray.report.provenance import crop_sentences, source_name
from lbp_ray.report.tables import ALL_METRICS, metrics_csv, metrics_markdown
from lbp_ray.report.theme import inline_svg
from lbp_ray.report.verdict import INTERVAL_EXPLANATION, INTERVAL_MEANING, comparison, verdict_sentences
from lbp_ray.report.words import (
    METRIC_LABELS,
    METRIC_MEANINGS,
    THRESHOLD_FREE,
    bounds,
    by_slices,
    chance_level,
    interval_level,
    listed,
    metric,
    number,
    prevalence,
    short_hash,
    slices,
)
from preprocess.commit import write_atomic

if TYPE_CHECKING:
    from lbp_ray.result import MetricSummary, StudyResult

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
    """``scores``, ``decisions`` (at thresholds) or ``apart`` (accuracy: shown, but not one of the eight)."""


@dataclass(frozen=True)
class Step:
    """One step of the cohort's funnel."""

    name: str
    count: int
    lost: int
    reason: str
    width: float
    """Percent of the first step."""


def write_report(result: StudyResult, folder: Path, *, contact_sheet: bytes | None = None) -> Path:
    """Write the page, its figures and its tables.

    Parameters
    ----------
    result
        The study's result: the only source of every number, figure and sentence.
    folder
        Where to write; made when missing. Existing files of the same names are replaced.
    contact_sheet
        PNG of the crops that the models saw; left out when None.

    Returns
    -------
    Path
        ``folder/report.html``. Beside it: ``figures/*.svg``, ``tables/metrics.csv``, ``tables/metrics.md``.

    Raises
    ------
    ValueError
        If the result cannot be reported (see `check_reportable`) or the contact sheet is not a PNG.
    """
    check_reportable(result)
    if contact_sheet is not None and not contact_sheet.startswith(PNG_SIGNATURE):
        msg = f"contact_sheet must be the bytes of a PNG, found {contact_sheet[:8]!r}; encode the picture as PNG"
        raise ValueError(msg)
    pictures = draw_all(result)
    for picture in pictures.values():
        write_atomic(folder / "figures" / f"{picture.name}.svg", picture.svg)
    write_atomic(folder / "tables" / "metrics.csv", metrics_csv(result).encode())
    write_atomic(folder / "tables" / "metrics.md", metrics_markdown(result).encode())
    page = folder / "report.html"
    write_atomic(page, render_page(result, pictures, contact_sheet).encode())
    return page


def render_page(result: StudyResult, pictures: dict[str, Picture], contact_sheet: bytes | None) -> str:
    """Fill the template.

    Parameters
    ----------
    result
        A result that `check_reportable` accepted.
    pictures
        Its figures, by name.
    contact_sheet
        PNG bytes, or None.
    """
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "slices": slices, "source_name": source_name}
    inlined = {name: Markup(inline_svg(picture.svg, name)) for name, picture in pictures.items()}
    return environment.get_template(TEMPLATE).render(
        result=result,
        parts=by_slices(result),
        hash=short_hash(result),
        style=Markup((here / STYLE).read_text()),
        verdict=verdict_sentences(result),
        interval_meaning=INTERVAL_MEANING,
        interval_explanation=INTERVAL_EXPLANATION,
        level=interval_level(result),
        methods=interval_methods(result),
        rows=[_metric_row(result, name) for name in ALL_METRICS],
        seed_rows=[(METRIC_LABELS[name], [metric(part, name) for part in by_slices(result)]) for name in ALL_METRICS],
        pictures=pictures,
        inlined=inlined,
        funnel=_funnel(result),
        sizes=sample_sizes(result),
        trials=trial_count(result),
        config=flattened(result.config),
        crop_sentences=crop_sentences(result),
        contact_sheet=None if contact_sheet is None else base64.b64encode(contact_sheet).decode(),
    )


def interval_methods(result: StudyResult) -> str:
    """Name how the intervals were made; several methods are listed."""
    return listed(sorted({metric.interval.method for part in result.slice_counts for metric in part.metrics}))


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
        meaning=METRIC_MEANINGS[name],
        cells=tuple(_metric_cell(metric(part, name)) for part in parts),
        chance=" / ".join(chances),
        between=comparison(result, name),
        group="apart" if name == "accuracy" else "scores" if name in THRESHOLD_FREE else "decisions",
    )


def _metric_cell(summary: MetricSummary) -> dict[str, str]:
    spread = "one seed" if summary.sd is None else f"seeds {number(summary.mean, 3)} ± {number(summary.sd, 3)}"
    return {
        "estimate": number(summary.interval.estimate, 3),
        "bounds": bounds(summary.interval, 3),
        "seeds": spread,
    }


def _funnel(result: StudyResult) -> list[Step]:
    first = max((step.count for step in result.funnel), default=1) or 1
    before = [step.count for step in result.funnel[:1]] + [step.count for step in result.funnel]
    return [
        Step(step.name, step.count, max(previous - step.count, 0), step.reason, round(100 * step.count / first, 2))
        for step, previous in zip(result.funnel, before, strict=False)
    ]
