"""Study rules at equal false-positive rates, and what the any-slice rule alone would give to one slice's network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matplotlib.lines import Line2D

from lbp_ray.report.sheets import Sheet
from lbp_ray.report.theme import COLOURS, colour_of, label_panels, panels
from lbp_ray.report.words import (
    NO_SPREAD,
    RULE_LABELS,
    bounds,
    by_slices,
    interval_level,
    listed,
    number,
    percent,
    slices,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lbp_ray.result import Confusion, OrCurve, RecallAt, RuleResult, StudyResult


RULES = tuple(RULE_LABELS)
"""Every study rule, in the order of drawing."""

RULE_COLOURS = dict(zip(RULES, ("ink", "purple", "orange", "sky"), strict=True))
RULE_MARKERS = dict(zip(RULES, ("o", "s", "^", "D"), strict=True))

RING: dict[str, Any] = {
    "linestyle": "none", "zorder": 5, "clip_on": False, "markeredgewidth": 1.8, "markerfacecolor": COLOURS["paper"],
}  # fmt: skip
"""How decisions made are drawn on a curve."""

RULE_SHIFT = 0.17
"""Distance of two rules of one slice count, in slice counts."""


def rule_tables(result: StudyResult) -> list[Sheet]:
    """Make the tables of rules and of what the OR rule alone gives; those without rows are left out."""
    return [sheet for sheet in (_rules(result), _or_rule(result)) if sheet.rows]


def rates_of(result: StudyResult) -> list[float]:
    """Return the false-positive rates at which rules are compared, ascending."""
    return sorted({at.false_positive_rate for rule in result.rules for at in rule.recall_at})


def draw_rules(result: StudyResult) -> Figure:
    """Draw the recall of every rule and slice count, one panel per false-positive rate."""
    rates = rates_of(result)
    figure, axes = panels(len(rates), 3.1)
    counts = [part.num_slices for part in by_slices(result)]
    for rate, axis in zip(rates, axes, strict=True):
        axis.axhline(rate, linestyle=(0, (1, 2)), color=COLOURS["muted"], linewidth=1.2)
        for rule in result.rules:
            alone = len(_of(result, rule.num_slices)) == 1
            x = counts.index(rule.num_slices) + (0 if alone else (RULES.index(rule.rule) - 1.5) * RULE_SHIFT)
            for at in rule.recall_at:
                if at.false_positive_rate == rate:
                    _recall(axis, at, x, rule.rule)
        axis.set_xticks(range(len(counts)), [str(count) for count in counts])
        axis.set(xlim=(-0.5, len(counts) - 0.5), ylim=(-0.02, 1.02))
        axis.grid(visible=False, axis="x")
        axis.set_title(f"{percent(rate)} false positives")
    label_panels(axes, "slices", "recall")
    drawn = [name for name in RULES if any(rule.rule == name for rule in result.rules)]
    keys = [
        Line2D([], [], color=COLOURS[RULE_COLOURS[name]], marker=RULE_MARKERS[name], markersize=6, linestyle="none")
        for name in drawn
    ]
    labels = [RULE_LABELS[name] for name in drawn]
    figure.legend(keys, labels, loc="outside upper left", ncols=len(drawn), frameon=False, fontsize=8.5)
    return figure


def draw_or_rule(result: StudyResult) -> Figure:
    """Draw each larger slice count's ROC beside the curve that the OR rule alone makes of one slice's network."""
    parts = {part.num_slices: (index, part) for index, part in enumerate(by_slices(result))}
    figure, axes = panels(len(result.or_curves), 3.25)
    for told, axis in zip(result.or_curves, axes, strict=True):
        index, part = parts[told.num_slices]
        axis.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.03), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1), box_aspect=1)
        axis.set_title(slices(told.num_slices))
        axis.plot([0, 1], [0, 1], linestyle=(0, (1, 2)), color=COLOURS["muted"], linewidth=1.2)
        colour = colour_of(index)
        axis.plot(told.curve.x, told.curve.y, color=COLOURS["muted"], linewidth=1.4, linestyle=(0, (4, 2)))
        axis.plot(part.roc.x, part.roc.y, color=colour)
        axis.plot(
            [told.false_positive_rate],
            [told.recall],
            marker="D",
            markersize=6,
            markeredgecolor=COLOURS["muted"],
            **RING,
        )
        axis.plot(*_point(part.confusion), marker="o", markersize=7, markeredgecolor=colour, **RING)
        corner: dict[str, Any] = {"transform": axis.transAxes, "ha": "right", "fontsize": 8.5}
        axis.text(0.98, 0.12, f"trained on {slices(told.num_slices)}", color=colour, weight="bold", **corner)
        axis.text(0.98, 0.045, "OR of independent slices", color=COLOURS["muted"], **corner)
    label_panels(axes, "1 − specificity", "recall")
    return figure


def rules_finding(result: StudyResult, count: int) -> str:
    """Say what the rules of one slice count reach, for an alternative text."""
    told = [f"{RULE_LABELS.get(rule.rule, rule.rule)} AUC {number(rule.roc_auc)}" for rule in _of(result, count)]
    return listed(told) if told else "not compared"


def or_finding(result: StudyResult, count: int) -> str:
    """Say where the OR rule alone would put one slice count, for an alternative text."""
    held = next((told for told in result.or_curves if told.num_slices == count), None)
    if held is None:
        return "its own network is the reference"
    return (
        f"the OR rule alone gives recall {number(held.recall)} at {percent(held.false_positive_rate)} false positives"
    )


def _of(result: StudyResult, count: int) -> list[RuleResult]:
    return [rule for rule in result.rules if rule.num_slices == count]


def _recall(axis: Axes, at: RecallAt, x: float, rule: str) -> None:
    colour = COLOURS[RULE_COLOURS[rule]]
    if at.interval is not None:
        axis.plot([x, x], [at.interval.low, at.interval.high], color=colour, linewidth=2.2, alpha=0.5)
    axis.plot([x], [at.recall], marker=RULE_MARKERS[rule], markersize=6, color=colour, linestyle="none")


def _point(counts: Confusion) -> tuple[list[float], list[float]]:
    return [counts.fp / (counts.fp + counts.tn)], [counts.tp / (counts.tp + counts.fn)]


def _rules(result: StudyResult) -> Sheet:
    rates = rates_of(result)
    rows = tuple(
        (
            str(rule.num_slices),
            RULE_LABELS.get(rule.rule, rule.rule),
            number(rule.roc_auc, 3) + ("" if rule.interval is None else f" [{bounds(rule.interval, 3)}]"),
            *[_recall_cell(rule, rate) for rate in rates],
        )
        for rule in result.rules
    )
    records = tuple(record for rule in result.rules for record in _rule_records(rule))
    interval = "" if result.optimistic else f" with {interval_level(result)} intervals over patients"
    note = (
        f"Recall where each rule may call the same share of the asymptomatic symptomatic{interval}, study level, scores"
        " averaged over seeds. One slice has one rule. A rule that only cries more earns nothing here."
    )
    head = ("slices", "study rule", "ROC-AUC", *[f"recall at {percent(rate)} false positives" for rate in rates])
    return Sheet(
        "rules", "Study rules at equal false-positive rates", note, head, "ll" + "r" * (1 + len(rates)), rows, records
    )


def _recall_cell(rule: RuleResult, rate: float) -> str:
    at = next((at for at in rule.recall_at if at.false_positive_rate == rate), None)
    if at is None:
        return NO_SPREAD
    return number(at.recall) + ("" if at.interval is None else f" [{bounds(at.interval)}]")


def _rule_records(rule: RuleResult) -> list[dict[str, object]]:
    return [
        {
            "num_slices": rule.num_slices,
            "rule": rule.rule,
            "roc_auc": rule.roc_auc,
            "roc_auc_low": None if rule.interval is None else rule.interval.low,
            "roc_auc_high": None if rule.interval is None else rule.interval.high,
            "false_positive_rate": at.false_positive_rate,
            "recall": at.recall,
            "recall_low": None if at.interval is None else at.interval.low,
            "recall_high": None if at.interval is None else at.interval.high,
        }
        for at in rule.recall_at
    ]


def _or_rule(result: StudyResult) -> Sheet:
    confusions = {part.num_slices: part.confusion for part in by_slices(result)}
    records = tuple(_or_record(told, confusions[told.num_slices]) for told in result.or_curves)
    rows = tuple(
        (
            str(record["num_slices"]),
            *[number(float(str(record[name])), 3) for name in list(record)[1:]],
        )
        for record in records
    )
    note = (
        "Decisions of the one-slice network put through the any-slice rule, as if the further slices were independent"
        " copies with nothing new in them, beside what networks on these slices decided."
    )
    head = ("slices", "false positives, OR alone", "recall, OR alone", "false positives, found", "recall, found")
    return Sheet("or_rule", "What the any-slice rule alone would do", note, head, "lrrrr", rows, records)


def _or_record(told: OrCurve, counts: Confusion) -> dict[str, object]:
    (rate,), (recall,) = _point(counts)
    return {
        "num_slices": told.num_slices,
        "or_false_positive_rate": told.false_positive_rate,
        "or_recall": told.recall,
        "false_positive_rate": rate,
        "recall": recall,
    }
