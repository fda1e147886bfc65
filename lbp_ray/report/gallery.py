"""Every figure of the report with the words around it: a new figure is a drawing function and an entry in `FIGURES`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lbp_ray.report import curves, figures, rules
from lbp_ray.report.optimism import mark
from lbp_ray.report.theme import Picture, drawing, svg_bytes
from lbp_ray.report.words import (
    SELECTIONS,
    THRESHOLD_SOURCES,
    bounds,
    by_slices,
    interval_level,
    listed,
    metric,
    named,
    num_positive,
    num_scored,
    number,
    slices,
    units,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.figure import Figure

    from lbp_ray.result import SliceCountResult, StudyResult


@dataclass(frozen=True)
class Entry:
    """One kind of figure."""

    name: str
    """File name without suffix, and the name the page's template asks for."""
    title: str
    draw: Callable[[StudyResult], Figure]
    caption: Callable[[StudyResult], str]
    """What is shown, how to read it, and n."""
    finding: Callable[[StudyResult, SliceCountResult], str]
    """What one slice count shows, for the alternative text."""
    applies: Callable[[StudyResult], bool] = lambda _: True
    """Whether this result has anything to draw."""


THESIS_FIGURES = {
    "learning": {1: "16", 3: "17", 5: "18"},
    "confusion": {1: "20(a)", 3: "21(a)", 5: "22(a)"},
    "roc": {1: "20(b)", 3: "21(b)", 5: "22(b)"},
    "precision_recall": {1: "20(c)", 3: "21(c)", 5: "22(c)"},
}
"""Figures of the Oulu thesis that a figure stands for, by slice count."""


def counterpart(name: str, result: StudyResult) -> str:
    """Say which figures of the Oulu thesis a figure stands for; nothing where there is none."""
    numbers = THESIS_FIGURES.get(name, {})
    counts = [part.num_slices for part in by_slices(result) if part.num_slices in numbers]
    if not counts:
        return ""
    told = listed([numbers[count] for count in counts])
    of = listed([*map(str, counts[:-1]), slices(counts[-1])])
    return f" What the Oulu thesis shows in {'Figure' if len(counts) == 1 else 'Figures'} {told}, for {of}."


def draw_all(result: StudyResult) -> dict[str, Picture]:
    """Draw every figure that the result has data for.

    Parameters
    ----------
    result
        A result that `check_reportable` accepted.

    Returns
    -------
    dict
        Figure name → picture, in the order of `FIGURES`.
    """
    with drawing():
        return {entry.name: _picture(entry, result) for entry in FIGURES if entry.applies(result)}


def sample_sizes(result: StudyResult) -> str:
    """Write how many studies (slices, at that level) were scored; slice counts may differ."""
    sizes = {(num_scored(part), num_positive(part)) for part in by_slices(result)}
    if len(sizes) == 1:
        total, positive = sizes.pop()
        return f"n\u00a0=\u00a0{total} {units(result)}, {positive} symptomatic"
    told = [f"{num_scored(part)} with {slices(part.num_slices)}" for part in by_slices(result)]
    return f"n\u00a0=\u00a0{listed(told)}"


def trial_count(result: StudyResult) -> str:
    """Write how many trainings a slice count rests on."""
    folds, seeds = result.num_folds, len(result.seeds)
    return f"{folds} folds × {seeds} {'seed' if seeds == 1 else 'seeds'}"


def _picture(entry: Entry, result: StudyResult) -> Picture:
    findings = "; ".join(f"{slices(part.num_slices)}: {entry.finding(result, part)}" for part in by_slices(result))
    svg = svg_bytes(entry.draw(result), entry.title, result)
    warning = f" {mark(result).capitalize()}." if mark(result) else ""
    caption = entry.caption(result) + counterpart(entry.name, result) + warning
    return Picture(entry.name, entry.title, caption, f"{entry.title}. {findings}.{warning}", svg)


def _estimate(name: str) -> Callable[[StudyResult, SliceCountResult], str]:
    def finding(_: StudyResult, part: SliceCountResult) -> str:
        summary = metric(part, name)
        interval = summary.interval
        return f"{number(summary.estimate)}, " + ("no interval" if interval is None else f"interval {bounds(interval)}")

    return finding


def _permutation_finding(_: StudyResult, part: SliceCountResult) -> str:
    test = part.permutation
    if test is None:
        return "not tested"
    return f"true labels {number(test.observed)}, shuffled mean {number(test.mean)}"


def _choices_finding(_: StudyResult, part: SliceCountResult) -> str:
    values = [named(choice.metrics, "roc_auc").estimate for choice in part.choices]
    return f"ROC-AUC {number(min(values))} to {number(max(values))} over {len(values)} folds"


def _learning_finding(_: StudyResult, part: SliceCountResult) -> str:
    last = part.learning
    if not last.epoch:
        return "no epoch recorded"
    losses = f"training loss {number(last.train_loss[-1])}, validation loss {number(last.validation_loss[-1])}"
    return f"after epoch {last.epoch[-1]} {losses}, validation AUC {number(last.validation_auc[-1])}"


def _folds_finding(_: StudyResult, part: SliceCountResult) -> str:
    return f"fold AUC {number(min(part.fold_auc))} to {number(max(part.fold_auc))}"


def _confusion_finding(_: StudyResult, part: SliceCountResult) -> str:
    table = part.confusion
    positives = f"{table.tp} true positives, {table.fp} false positives"
    return f"{positives}, {table.fn} false negatives, {table.tn} true negatives"


def _scores_finding(_: StudyResult, part: SliceCountResult) -> str:
    medians = [number(scores[len(scores) // 2]) for scores in (part.scores_positive, part.scores_negative)]
    return f"median score {medians[0]} of the symptomatic and {medians[1]} of the asymptomatic"


def _permutation_caption(result: StudyResult) -> str:
    tests = [part.permutation for part in by_slices(result) if part.permutation is not None]
    nulls = listed([f"{number(test.mean, 3)} ± {number(test.sd, 3)}" for test in tests])
    return (
        f"Labels shuffled among patients, {tests[0].num_permutations} times; same folds, same heads on the frozen"
        f" features. Grey: AUC with shuffled labels, mean ± SD {nulls}. Bar: AUC with the true labels. Dotted: 0.5."
        + ("" if result.optimistic else " The smallest p a test can give is 1 / (shuffles + 1).")
    )


def _judged(result: StudyResult) -> str:
    """Say in a caption how decisions were made."""
    if result.threshold_source == "cross_fitted":
        return "the decisions at cross-fitted thresholds, which vary by fold, so that it need not lie on the curve"
    return "the decisions at each fold's own threshold, which was fitted on what it judges"


def _selection(result: StudyResult) -> str:
    return SELECTIONS.get(result.selection, result.selection)


def _thresholds(result: StudyResult) -> str:
    return THRESHOLD_SOURCES.get(result.threshold_source, result.threshold_source)


def _metrics_caption(result: StudyResult) -> str:
    interval = "" if result.optimistic else f" with its {interval_level(result)} interval over patients"
    return (
        f"Marker{'' if result.optimistic else ' and bar'}: estimate of the seed-averaged scores{interval}. Small ticks"
        f" under it: each seed alone, of {len(result.seeds)}. Dotted: chance, what a guess blind to the images should"
        f" reach; recall and specificity have no such value. {sample_sizes(result)}."
    )


def _choices_caption(result: StudyResult) -> str:
    return (
        "Each marker is one fold taken as the only validation fold; thin line: from the lowest to the highest; bar: all"
        " folds together. The Oulu thesis judged by one fold and does not say which: it could have been any of these."
    )


def _rules_caption(result: StudyResult) -> str:
    bars = "" if result.optimistic else f" Bars: {interval_level(result)} intervals over patients."
    return (
        "Recall of each study rule where all may call the same share of the asymptomatic symptomatic, so that a rule"
        f" earns nothing by crying more.{bars} Dotted: a guess."
    )


def _or_caption(_: StudyResult) -> str:
    return (
        "Solid: networks on these slices. Dashed: the one-slice network put through the any-slice rule, as if further"
        " slices were independent and showed nothing new. Ring and diamond: the decisions of either. Only what lies"
        " above the dashed line is more than the rule."
    )


FIGURES = (
    Entry(
        "overview",
        "ROC-AUC between chance and the best possible",
        figures.draw_overview,
        lambda result: (
            f"Out-of-fold ROC-AUC and its {interval_level(result)} interval over patients; {sample_sizes(result)}."
            + (" Line on the right: the best that any model could reach on these very studies." if result.bayes else "")
        ),
        _estimate("roc_auc"),
        applies=lambda result: not result.optimistic,
    ),
    Entry(
        "metrics",
        "Eight metrics by slice count",
        figures.draw_metrics,
        _metrics_caption,
        _estimate("balanced_accuracy"),
    ),
    Entry(
        "roc",
        "ROC curves",
        curves.draw_roc,
        lambda result: (
            f"{result.level.capitalize()}-level out-of-fold scores, averaged over seeds. Ring: {_judged(result)}."
            f" {sample_sizes(result)}."
        ),
        _estimate("roc_auc"),
    ),
    Entry(
        "precision_recall",
        "Precision-recall curves",
        curves.draw_precision_recall,
        lambda result: (
            "Dotted: the prevalence, which is the precision of a guess at any recall. Ring: the decisions. AP is the"
            f" area under the steps. {sample_sizes(result)}."
        ),
        _estimate("average_precision"),
    ),
    Entry(
        "scores",
        "Out-of-fold scores by class",
        figures.draw_scores,
        lambda result: (
            f"Symptomatic {units(result)} upward, asymptomatic downward; scores are averaged over seeds. Vertical"
            f" lines: the threshold of each of {result.num_folds} folds, {_thresholds(result)}. The axis spans the"
            " scores that occur."
        ),
        _scores_finding,
    ),
    Entry(
        "learning",
        "Learning curves",
        curves.draw_learning,
        lambda result: (
            f"Mean over {trial_count(result)}; band: one standard deviation over these trials. Shaded: all weights"
            f" trained. Triangles: the epochs whose networks score, {_selection(result)}; their size grows with the"
            " trials that took them. Shown to judge how training went, not to score the models."
        ),
        _learning_finding,
        applies=lambda result: all(part.learning.epoch for part in result.slice_counts),
    ),
    Entry(
        "confusion",
        "Confusion matrices",
        figures.draw_confusion,
        lambda result: (
            f"Each {result.level} judged by a threshold {_thresholds(result)}. Share of the upper left: recall; of the"
            f" lower right: specificity. {sample_sizes(result)}."
        ),
        _confusion_finding,
    ),
    Entry(
        "folds",
        "Fold by fold",
        figures.draw_folds,
        lambda result: (
            f"Each dot is one of {result.num_folds} folds. With few studies in a fold the dots scatter by chance alone:"
            " a good fold proves nothing and a bad one disproves nothing. Dotted: 0.5."
        ),
        _folds_finding,
        applies=lambda result: all(part.fold_auc for part in result.slice_counts),
    ),
    Entry(
        "fold_choices",
        "Every fold as the only validation fold",
        figures.draw_choices,
        _choices_caption,
        _choices_finding,
        applies=lambda result: all(part.choices for part in result.slice_counts),
    ),
    Entry(
        "rules",
        "Study rules at equal false-positive rates",
        rules.draw_rules,
        _rules_caption,
        lambda result, part: rules.rules_finding(result, part.num_slices),
        applies=lambda result: bool(rules.rates_of(result)),
    ),
    Entry(
        "or_rule",
        "What the any-slice rule does by itself",
        rules.draw_or_rule,
        _or_caption,
        lambda result, part: rules.or_finding(result, part.num_slices),
        applies=lambda result: bool(result.or_curves) and result.level == "study",
    ),
    Entry(
        "permutation",
        "Against shuffled labels",
        figures.draw_permutation,
        _permutation_caption,
        _permutation_finding,
        applies=lambda result: any(part.permutation is not None for part in result.slice_counts),
    ),
)
"""All figures, in the order of the page."""
