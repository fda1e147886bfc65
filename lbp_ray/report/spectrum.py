"""Subjects that the study left out, scored post hoc: what networks say of those between the two classes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lbp_ray.report.optimism import mark, own_groups_notice
from lbp_ray.report.sheets import Sheet
from lbp_ray.report.theme import COLOURS, STAMP_HEIGHT_IN, Picture, colour_of, drawing, new_figure, svg_bytes
from lbp_ray.report.thesis_tables import group_name
from lbp_ray.report.words import listed, number, percent, slices

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

    from lbp_ray.result import ExcludedByCount, ExcludedScores, GroupScores, StudyResult


def excluded_sentences(excluded: ExcludedScores) -> list[str]:
    """Say what was scored, by how many networks, and who could not be."""
    told = [
        "A study of the two ends says little of the subjects between them, whom a clinic meets as well. No network was"
        f" trained on these groups; scores are the mean of {excluded.num_models} networks per slice count. The study's"
        " own groups stand beside them, out of fold.",
        "They have no label of the task, so no metric is computed: only how they spread between its classes.",
    ]
    if excluded.left_out:
        lost = listed([f"{count} ({reason})" for reason, count in sorted(excluded.left_out.items())])
        told.append(f"Not scored: {lost}.")
    return told


def excluded_table(excluded: ExcludedScores) -> Sheet:
    """Make the table of scores and of the share called symptomatic, by group."""
    held = [(part, group) for part in _by_slices(excluded) for group in part.groups]
    rows = tuple(
        (
            str(part.num_slices),
            group_name(group.group),
            str(group.num_studies),
            number(group.mean, 3) + (f" ± {number(group.sd, 3)}" if group.sd is not None else ""),
            " / ".join(number(value, 3) for value in group.quartiles),
            percent(group.share_positive) + _share_bounds(group),
        )
        for part, group in held
    )
    records = tuple(_record(part, group) for part, group in held)
    note = (
        "Scores by questionnaire group, and the share called symptomatic with its interval over patients: by the"
        " study's threshold, of the task's own groups by that of their fold."
    )
    note = " ".join([note, *own_groups_notice(excluded)])
    head = ("slices", "group", "studies", "mean ± SD", "quartiles", "called symptomatic")
    return Sheet("excluded", "Groups that the study left out", note, head, "rlrrrr", rows, records)


def excluded_picture(result: StudyResult, excluded: ExcludedScores) -> Picture:
    """Draw quartiles and mean of the scores by group, with the study's threshold."""
    title = "Scores by questionnaire group"
    with drawing():
        svg = svg_bytes(_draw(_by_slices(excluded)), title, result)
    caption = (
        "Thick line: from the first to the third quartile; stroke: median; marker: mean. Vertical line: the study's"
        " threshold. The task's own groups are scored out of fold."
    )
    warning = f" {mark(result).capitalize()}." if mark(result) else ""
    told = listed(
        [
            f"{slices(part.num_slices)}: " + ", ".join(_finding(group) for group in part.groups)
            for part in excluded.slice_counts
        ]
    )
    return Picture("excluded_scores", title, caption + warning, f"{title}. {told}.{warning}", svg)


def _draw(parts: Sequence[ExcludedByCount]) -> Figure:
    names = list(dict.fromkeys(group.group for part in parts for group in part.groups))
    figure = new_figure(0.9 + 0.34 * len(names) + STAMP_HEIGHT_IN)
    grid = figure.subplots(1, len(parts), sharey=True, sharex=True, squeeze=False)
    for index, (axis, part) in enumerate(zip(grid[0], parts, strict=True)):
        for group in part.groups:
            y, (low, middle, high) = names.index(group.group), group.quartiles
            axis.plot([low, high], [y, y], color=colour_of(index), linewidth=6, alpha=0.35, solid_capstyle="butt")
            axis.plot([middle, middle], [y - 0.25, y + 0.25], color=colour_of(index), linewidth=1.8)
            axis.plot([group.mean], [y], marker="o", markersize=5, color=COLOURS["ink"], linestyle="none")
        axis.axvline(part.threshold, color=COLOURS["ink"], linewidth=0.9)
        axis.set_title(slices(part.num_slices))
        axis.set_xlabel("score")
        axis.grid(visible=False, axis="y")
        axis.tick_params(axis="y", length=0, labelcolor=COLOURS["ink"])
    grid[0, 0].set_yticks(range(len(names)), [group_name(name) for name in names])
    grid[0, 0].set_ylim(len(names) - 0.5, -0.5)
    return figure


def _by_slices(excluded: ExcludedScores) -> list[ExcludedByCount]:
    return sorted(excluded.slice_counts, key=lambda part: part.num_slices)


def _finding(group: GroupScores) -> str:
    return f"{group_name(group.group)} median {number(group.quartiles[1])}"


def _share_bounds(group: GroupScores) -> str:
    interval = group.interval
    return "" if interval is None else f" ({percent(interval.low)} to {percent(interval.high)})"


def _record(part: ExcludedByCount, group: GroupScores) -> dict[str, object]:
    (first, median, third), interval = group.quartiles, group.interval
    return {
        "num_slices": part.num_slices,
        "threshold": part.threshold,
        **group.model_dump(exclude={"quartiles", "interval"}),
        "quartile_1": first,
        "median": median,
        "quartile_3": third,
        "share_low": None if interval is None else interval.low,
        "share_high": None if interval is None else interval.high,
        "interval_method": None if interval is None else interval.method,
    }
