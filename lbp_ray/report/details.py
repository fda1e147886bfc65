"""What stands behind a headline: the other level, areas fold by fold, variance, chosen epochs, each fold alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lbp_ray.report.sheets import Sheet
from lbp_ray.report.thesis_tables import summary_record
from lbp_ray.report.verdict import differing
from lbp_ray.report.words import (
    METRIC_LABELS,
    NO_SPREAD,
    SELECTIONS,
    THRESHOLD_SOURCES,
    by_slices,
    estimate_with_bounds,
    interval_level,
    mean_with_spread,
    metric,
    named,
    number,
    p_value,
    percent,
    slices,
    spread_name,
)
from lbp_ray.result import METRIC_NAMES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lbp_ray.result import FoldChoice, HoldoutChoice, StudyResult


def detail_tables(result: StudyResult) -> list[Sheet]:
    """Make every table of this module that the result has data for.

    Parameters
    ----------
    result
        A result that `check_reportable` accepted.
    """
    made = [
        _other_level(result),
        _areas(result),
        _comparisons(result),
        _variance(result),
        _epochs(result),
        _fold_ranges(result),
        _each_fold(result),
        _protocols(result),
    ]
    return [sheet for sheet in made if sheet.rows]


def _other_level(result: StudyResult) -> Sheet:
    parts = by_slices(result)
    rows = tuple(
        (METRIC_LABELS[name], *[estimate_with_bounds(named(part.other_level, name)) for part in parts])
        for name in METRIC_NAMES
        if all(part.other_level for part in parts)
    )
    records = tuple(
        {"num_slices": part.num_slices, **summary_record(summary)} for part in parts for summary in part.other_level
    )
    if result.level == "study":
        title, why = (
            "Secondary: every slice for itself",
            (
                "Slices of a study share its label and its patient, so many slices are no more evidence than one study."
                " A patient's verdict is given on studies."
            ),
        )
    else:
        title, why = (
            "Secondary: one score per study",
            (
                "This study's headline figures are of slices, as one reading of the thesis has it; a patient is told"
                " apart by studies."
            ),
        )
    head = ("metric", *[slices(part.num_slices) for part in parts])
    return Sheet("other_level", title, why, head, "l" + "r" * len(parts), rows, records)


def _areas(result: StudyResult) -> Sheet:
    held = [part for part in by_slices(result) if part.fold_auc]
    records: tuple[dict[str, object], ...] = tuple(
        {
            "num_slices": part.num_slices,
            "pooled": metric(part, "roc_auc").estimate,
            "mean_of_folds": float(np.mean(part.fold_auc)),
            "sd_of_folds": float(np.std(part.fold_auc, ddof=1)) if len(part.fold_auc) > 1 else None,
            "lowest_fold": min(part.fold_auc),
            "highest_fold": max(part.fold_auc),
        }
        for part in held
    )
    note = (
        "ROC-AUC of all folds' scores pooled, and of each fold for itself. Pooled scores come from several networks: if"
        " folds sit at different levels, the pooled value is the lower."
    )
    head = ("slices", "pooled", "mean of folds", "SD over folds", "lowest fold", "highest fold")
    return Sheet("areas", "ROC-AUC pooled and by fold", note, head, "lrrrrr", _rounded(records), records)


def _comparisons(result: StudyResult) -> Sheet:
    records = tuple(pair.model_dump(exclude={"level"}) for pair in result.comparisons)
    rows = tuple(
        (
            f"{slices(pair.second)} − {slices(pair.first)}",
            number(pair.difference, 3),
            f"{number(pair.low, 3)} to {number(pair.high, 3)}",
            p_value(pair.p_value),
            p_value(pair.p_adjusted),
            "differ" if pair in differing(result) else "not distinguishable here",
        )
        for pair in result.comparisons
    )
    note = (
        "Difference of two areas under the ROC curve on the same studies, by a paired test over patients. The verdict"
        " goes by the p-value after Holm's correction over all pairs; p and intervals beside it are of each pair alone,"
        " unadjusted, so that an interval may exclude 0 where the pair is not distinguishable. What is not"
        " distinguishable is not equal: the interval says how large the difference may still be."
    )
    interval = f"unadjusted {interval_level(result)} interval"
    head = ("slices", "difference of ROC-AUC", interval, "p, unadjusted", "p, Holm", "verdict")
    return Sheet("comparisons", "Slice counts compared", note, head, "lrrrrl", rows, records)


def _variance(result: StudyResult) -> Sheet:
    records: tuple[dict[str, object], ...] = tuple(
        {"num_slices": part.num_slices, **part.variance.model_dump(include={"patient_sd", "fold_sd", "seed_sd"})}
        for part in by_slices(result)
    )
    note = (
        "Standard deviation of ROC-AUC of study scores, by what could have been another: the patients, the folds beyond"
        " what their few patients explain, the training seed."
        + (
            " That of other patients would be an interval in disguise, and is left out."
            if result.optimistic
            else " Only the first, before any widening, is in an interval."
        )
    )
    head = ("slices", "other patients", "other folds", "another seed")
    return Sheet("variance", "What moves ROC-AUC", note, head, "lrrr", _rounded(records), records)


def _epochs(result: StudyResult) -> Sheet:
    trials = {part.num_slices: sum(row.trials for row in part.epochs) for part in by_slices(result)}
    held = [(part.num_slices, row) for part in by_slices(result) for row in part.epochs]
    rows = tuple(
        (str(count), str(row.epoch), row.stage, str(row.trials), percent(row.trials / trials[count]))
        for count, row in held
    )
    records = tuple({"num_slices": count, **row.model_dump()} for count, row in held)
    how = SELECTIONS.get(result.selection, result.selection)
    note = f"The epoch whose network scores, over fold and seed: {how}."
    head = ("slices", "epoch", "stage", "trials", "share")
    return Sheet("epochs", "Scoring epochs", note, head, "lrlrr", rows, records)


def _fold_ranges(result: StudyResult) -> Sheet:
    parts = by_slices(result)
    rows = tuple(
        (METRIC_LABELS[name], *[metric_range(part.choices, name) for part in parts])
        for name in METRIC_NAMES
        if all(part.choices for part in parts)
    )
    note = (
        "Each fold taken as the only validation fold, as the Oulu thesis did with one that it does not name: lowest and"
        " highest value over the folds, seeds averaged. Any of them could have been printed."
        f" Epochs {SELECTIONS.get(result.selection, result.selection)}, thresholds"
        f" {THRESHOLD_SOURCES.get(result.threshold_source, result.threshold_source)}."
    )
    head = ("metric", *[slices(part.num_slices) for part in parts])
    records = tuple(
        {"num_slices": part.num_slices, "metric": name, "lowest": min(values), "highest": max(values)}
        for part in parts
        for name in METRIC_NAMES
        if (values := choice_values(part.choices, name))
    )
    return Sheet("fold_ranges", "One fold alone", note, head, "l" + "r" * len(parts), rows, records)


def _each_fold(result: StudyResult) -> Sheet:
    held = [(part.num_slices, choice) for part in by_slices(result) for choice in part.choices]
    rows = tuple(
        (
            str(count),
            str(choice.fold),
            f"{choice.num_positive} / {choice.num_studies}",
            number(choice.threshold, 3),
            ", ".join(map(str, choice.epochs)),
            " / ".join(str(value) for value in choice.confusion.model_dump().values()),
            *[mean_with_spread(result, named(choice.metrics, name)) for name in METRIC_NAMES],
        )
        for count, choice in held
    )
    records = tuple(_fold_record(count, choice) for count, choice in held)
    note = (
        f"Mean ± {spread_name(result)} over seeds of each fold for itself; threshold and counts are of the"
        " seed-averaged scores. No intervals: a fold holds few patients, and epoch and threshold may have been chosen"
        " on it."
    )
    names = [METRIC_LABELS[name] for name in METRIC_NAMES]
    head = ("slices", "fold", "symptomatic / all", "threshold", "epoch by seed", "TP / FP / FN / TN", *names)
    return Sheet("fold_choices", "Every fold alone", note, head, "rrrrlr" + "r" * len(names), rows, records)


def _fold_record(count: int, choice: FoldChoice) -> dict[str, object]:
    figures: dict[str, object] = {}
    for summary in choice.metrics:
        figures |= {
            summary.name: summary.estimate,
            f"{summary.name}_mean": summary.mean,
            f"{summary.name}_sd": summary.sd,
            f"{summary.name}_se": summary.se,
        }
    counts = {"fold": choice.fold, "num_studies": choice.num_studies, "num_positive": choice.num_positive}
    epochs = {"threshold": choice.threshold, "epochs": ";".join(map(str, choice.epochs))}
    return {"num_slices": count, **counts, **epochs, **choice.confusion.model_dump(), **figures}


def _protocols(result: StudyResult) -> Sheet:
    held = [
        (part.num_slices, null)
        for part in by_slices(result)
        if part.permutation is not None
        for null in part.permutation.balanced_accuracy
    ]
    rows = tuple(
        (
            str(count),
            SELECTIONS.get(null.selection, null.selection),
            THRESHOLD_SOURCES.get(null.threshold_source, null.threshold_source),
            f"{number(null.mean, 3)} ± {number(null.sd, 3)}",
        )
        for count, null in held
    )
    records = tuple(
        {
            "num_slices": count,
            "null_selection": null.selection,
            "null_threshold_source": null.threshold_source,
            "mean": null.mean,
            "sd": null.sd,
        }
        for count, null in held
    )
    note = (
        "Balanced accuracy on labels shuffled among patients, mean ± SD over the shuffles, frozen stage. Such labels"
        " know nothing: 0.50 is honest, what is above it is made by the way of judging. Whatever this study's own"
        " settings, thresholds are Youden's of study scores, and a fold that chooses an epoch takes that of the largest"
        " MCC up to the lowest loss."
    )
    head = ("slices", "epoch", "threshold", "balanced accuracy")
    return Sheet("protocols", "What each way of judging makes of nothing", note, head, "rllr", rows, records)


def choice_values(choices: Sequence[FoldChoice] | Sequence[HoldoutChoice], name: str) -> list[float]:
    """Return one metric of every choice of a fold, in fold order."""
    return [named(choice.metrics, name).estimate for choice in choices]


def metric_range(choices: Sequence[FoldChoice] | Sequence[HoldoutChoice], name: str) -> str:
    """Write the lowest and highest value over the choices of a fold."""
    values = choice_values(choices, name)
    return f"{number(min(values))} to {number(max(values))}"


def _rounded(records: Sequence[dict[str, object]]) -> tuple[tuple[str, ...], ...]:
    """Write records as cells: what is a fraction to three decimals, what is absent as a dash."""
    return tuple(
        tuple(
            NO_SPREAD if value is None else number(value, 3) if isinstance(value, float) else str(value)
            for value in record.values()
        )
        for record in records
    )
