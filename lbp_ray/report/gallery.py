"""Every figure of the report with the words around it: a new figure is a drawing function and an entry in `FIGURES`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lbp_ray.report import curves, figures
from lbp_ray.report.theme import drawing, svg_bytes
from lbp_ray.report.words import bounds, by_slices, interval_level, listed, metric, num_scored, number, slices

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
    finding: Callable[[SliceCountResult], str]
    """What one slice count shows, for the alternative text."""
    applies: Callable[[StudyResult], bool] = lambda _: True
    """Whether this result has anything to draw."""


@dataclass(frozen=True)
class Picture:
    """A figure drawn from one result."""

    name: str
    title: str
    caption: str
    alt: str
    svg: bytes


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
    """Write how many studies were scored; slice counts may differ when some lack a neighbour."""
    sizes = {(num_scored(part), len(part.scores_positive)) for part in by_slices(result)}
    if len(sizes) == 1:
        total, positive = sizes.pop()
        return f"n\u00a0=\u00a0{total} studies, {positive} symptomatic"
    told = [f"{num_scored(part)} with {slices(part.num_slices)}" for part in by_slices(result)]
    return f"n\u00a0=\u00a0{listed(told)}"


def trial_count(result: StudyResult) -> str:
    """Write how many trainings a slice count rests on."""
    folds, seeds = result.num_folds, len(result.seeds)
    return f"{folds} folds × {seeds} {'seed' if seeds == 1 else 'seeds'}"


def _picture(entry: Entry, result: StudyResult) -> Picture:
    findings = "; ".join(f"{slices(part.num_slices)}: {entry.finding(part)}" for part in by_slices(result))
    svg = svg_bytes(entry.draw(result), entry.title, result)
    return Picture(entry.name, entry.title, entry.caption(result), f"{entry.title}. {findings}.", svg)


def _estimate(name: str) -> Callable[[SliceCountResult], str]:
    def finding(part: SliceCountResult) -> str:
        interval = metric(part, name).interval
        return f"{number(interval.estimate)}, interval {bounds(interval)}"

    return finding


def _permutation_finding(part: SliceCountResult) -> str:
    test = part.permutation
    if test is None:
        return "not tested"
    return f"true labels {number(test.observed)}, shuffled mean {number(test.mean)}, p {number(test.p_value, 3)}"


def _learning_finding(part: SliceCountResult) -> str:
    last = part.learning
    if not last.epoch:
        return "no epoch recorded"
    losses = f"training loss {number(last.train_loss[-1])}, validation loss {number(last.validation_loss[-1])}"
    return f"after epoch {last.epoch[-1]} {losses}, validation AUC {number(last.validation_auc[-1])}"


def _folds_finding(part: SliceCountResult) -> str:
    return f"fold AUC {number(min(part.fold_auc))} to {number(max(part.fold_auc))}"


def _confusion_finding(part: SliceCountResult) -> str:
    table = part.confusion
    positives = f"{table.tp} true positives, {table.fp} false positives"
    return f"{positives}, {table.fn} false negatives, {table.tn} true negatives"


def _scores_finding(part: SliceCountResult) -> str:
    medians = [number(scores[len(scores) // 2]) for scores in (part.scores_positive, part.scores_negative)]
    return f"median score {medians[0]} of symptomatic and {medians[1]} of asymptomatic studies"


def _permutation_caption(result: StudyResult) -> str:
    tests = [part.permutation for part in by_slices(result) if part.permutation is not None]
    nulls = listed([f"{number(test.mean, 3)} ± {number(test.sd, 3)}" for test in tests])
    return (
        f"Labels shuffled among patients, {tests[0].num_permutations} times; same folds, same heads on the frozen"
        f" features. Grey: AUC with shuffled labels, mean ± SD {nulls}. Bar: AUC with the true labels. Dotted: 0.5."
        " The smallest p a test can give is 1 / (shuffles + 1)."
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
    ),
    Entry(
        "metrics",
        "Eight metrics by slice count",
        figures.draw_metrics,
        lambda result: (
            f"Marker and bar: estimate of the seed-averaged scores with its {interval_level(result)} interval over"
            f" patients. Small ticks under it: each seed alone, of {len(result.seeds)}. Dotted: chance, what a guess"
            f" blind to the images should reach; recall and specificity have no such value. {sample_sizes(result)}."
        ),
        _estimate("balanced_accuracy"),
    ),
    Entry(
        "roc",
        "ROC curves",
        curves.draw_roc,
        lambda result: (
            "Study-level out-of-fold scores, averaged over seeds. Ring: the decisions at cross-fitted thresholds, which"
            f" vary by fold, so that it need not lie on the curve. {sample_sizes(result)}."
        ),
        _estimate("roc_auc"),
    ),
    Entry(
        "precision_recall",
        "Precision-recall curves",
        curves.draw_precision_recall,
        lambda result: (
            "Dotted: the prevalence, which is the precision of a guess at any recall. Ring: the decisions at"
            f" cross-fitted thresholds. AP is the area under the steps. {sample_sizes(result)}."
        ),
        _estimate("average_precision"),
    ),
    Entry(
        "scores",
        "Out-of-fold scores by class",
        figures.draw_scores,
        lambda result: (
            "Symptomatic studies upward, asymptomatic downward; the score is averaged over seeds. Vertical lines: the"
            f" threshold of each of {result.num_folds} folds, fitted on the other folds. The axis spans the scores that"
            f" occur. {sample_sizes(result)}."
        ),
        _scores_finding,
    ),
    Entry(
        "learning",
        "Learning curves",
        curves.draw_learning,
        lambda result: (
            f"Mean over {trial_count(result)}; band: one standard deviation over these trials. Shaded: all weights"
            " trained. Shown to judge how training went, not to score the models."
        ),
        _learning_finding,
        applies=lambda result: all(part.learning.epoch for part in result.slice_counts),
    ),
    Entry(
        "confusion",
        "Confusion matrices",
        figures.draw_confusion,
        lambda result: (
            "Each study judged by the threshold fitted on the other folds. Share of the upper left: recall; of the"
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
        "permutation",
        "Against shuffled labels",
        figures.draw_permutation,
        _permutation_caption,
        _permutation_finding,
        applies=lambda result: any(part.permutation is not None for part in result.slice_counts),
    ),
)
"""All figures, in the order of the page."""
