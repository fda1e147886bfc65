"""Score the subjects that a study left out, post hoc: the networks only ever met the two ends of the spectrum.

``python -m lbp_ray.excluded --config configs/oulu_honest.yaml --result RUNS/oulu_honest/results/ID``

Slightly symptomatic, symptomatic/asymptomatic and unclassifiable subjects train and test nothing. What the networks say
of them shows how far the figures of the two chosen groups would carry (spectrum bias). Shape suffixes: N studies,
K slice offsets, H rows, W columns, M slices of one slice count.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from lbp_ray.aggregate import out_of_fold_inflation
from lbp_ray.cohort import label_exams
from lbp_ray.cohort.questionnaire import LABELS
from lbp_ray.ensemble import ensemble_threshold, model_means
from lbp_ray.finished import EXCLUDED_FILE, Finished, run_on_result
from lbp_ray.intervals import resampled_interval, widened, wilson_interval
from lbp_ray.out_of_fold import seed_means, with_study_scores
from lbp_ray.predict import Predictor, slice_probabilities
from lbp_ray.prepare import read_questionnaire
from lbp_ray.report.optimism import own_groups_notice
from lbp_ray.result import ExcludedByCount, ExcludedScores, GroupScores, Interval
from lbp_ray.roi.crops import Crops

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lbp_ray.study import EvaluationConfig, StudyConfig

IN_SPLIT = "patient_in_split"
"""Reason of an exam whose patient was trained on or sealed with another exam."""

NOT_IN_STORE = "not_in_store"
"""Reason of a questionnaire row without a stored exam."""


class ExcludedError(ValueError):
    """A study whose excluded subjects cannot be scored."""


class Scoreable(NamedTuple):
    """Excluded exams."""

    rows: pd.DataFrame
    """Those that can be scored: rows of the crops table with ``group``, indexed by their row in the crops."""
    left_out: dict[str, int]
    """Why the others cannot, with counts."""


def score_excluded(config: StudyConfig, result_folder: Path) -> ExcludedScores:
    """Score every exam outside the task by the networks that a finished study kept.

    Parameters
    ----------
    config
        Names the study and its paths; what decides a figure is read from the result.
    result_folder
        The result.

    Returns
    -------
    ExcludedScores
        Distribution of each group per slice count, and of the task's own groups as they were judged out of fold (mean
        over seeds, threshold of their fold). Also written into the result folder.

    Raises
    ------
    ValueError
        If the folder is no untouched result of the study, its crops are gone, no network was kept, or no excluded exam
        can be scored.
    """
    finished = Finished.open(config, result_folder)
    predictor = Predictor.load(result_folder)
    if finished.crops_folder is None:
        msg = f"the crops of {result_folder} are gone; run the study again, it makes them anew"
        raise ExcludedError(msg)
    crops, made = Crops.open(finished.crops_folder), finished.config
    rows = read_questionnaire(config.paths.questionnaire)
    exams = label_exams(rows, strict_gt30=made.cohort.strict_gt30)
    scoreable = scoreable_exams(exams, finished.split.table, crops)
    counts = sorted(set(made.slice_counts) & set(predictor.by_slice_count))
    networks = {count: predictor.by_slice_count[count].models for count in counts}
    torch.set_num_threads(made.recipe.threads)
    per_count, num_images = [], sum(len(networks[count]) * count for count in counts) * len(scoreable.rows)
    outside = finished.table("out_of_fold")
    bar: tqdm[Any]
    with tqdm(total=num_images, desc="excluded", unit="slice", disable=not made.compute.verbose) as bar:
        for count in counts:
            predictions = _predict(networks[count], crops, scoreable.rows, count, bar=bar, config=made)
            per_count.append(_describe_count(predictions, outside[outside["num_slices"] == count], exams, made))
    scores = ExcludedScores(
        result_hash=finished.result.result_hash,
        num_models=min(len(models) for models in networks.values()),
        left_out=scoreable.left_out,
        slice_counts=tuple(per_count),
    )
    scores.save(result_folder / EXCLUDED_FILE)
    return scores


def scoreable_exams(exams: pd.DataFrame, split: pd.DataFrame, crops: Crops) -> Scoreable:
    """Choose the exams outside the task that a network may score.

    Parameters
    ----------
    exams
        As `lbp_ray.cohort.label_exams` returns them.
    split
        Whoever has an exam in it was trained on or is sealed, and stays out with all exams.
    crops
        The study's crops; they were cut for every exam of the store, whatever its group.

    Raises
    ------
    ExcludedError
        If there is none.
    """
    outside = exams[exams["label"].isna()].set_index("study_id")
    reasons = crops.excluded.set_index("study_id")["reason"].reindex(outside.index)
    reasons = reasons.mask(reasons.isna() & ~outside.index.isin(crops.table["study_id"]), NOT_IN_STORE)
    reasons = reasons.mask(outside["patient_id"].isin(split["patient_id"]), IN_SPLIT)
    left_out = {str(reason): int(count) for reason, count in reasons.value_counts().items()}
    kept = outside.index[reasons.isna()]
    if not len(kept):
        msg = (
            f"none of {len(outside)} exams outside the task can be scored: {left_out or 'the questionnaire has none'}; "
            "annotate some, or crop by predicted masks (roi.source: model), and run the study again"
        )
        raise ExcludedError(msg)
    rows = crops.table[crops.table["study_id"].isin(kept)]
    return Scoreable(rows.assign(group=rows["study_id"].map(outside["group"])), left_out)


def _predict(
    networks: Sequence[Path], crops: Crops, rows: pd.DataFrame, count: int, *, bar: tqdm[Any], config: StudyConfig
) -> pd.DataFrame:
    """Score the slices of one slice count by each network: one row per slice and network."""
    centre, reach = crops.pixels_NKHW.shape[1] // 2, count // 2
    around = slice(centre - reach, centre + reach + 1)
    crops_MHW = crops.pixels_NKHW[rows.index.to_numpy(), around].reshape(-1, *crops.pixels_NKHW.shape[2:])
    device = "cuda" if config.compute.gpus_per_trial and torch.cuda.is_available() else "cpu"
    slices = rows[["study_id", "patient_id", "group"]].assign(
        slice_index=pd.Series([list(indices[around]) for indices in rows["slice_index"]], index=rows.index),
        num_slices=count,
        seed=0,
    )
    tables = [
        slices.explode("slice_index").assign(
            fold=number, probability=slice_probabilities(path, crops_MHW, device=device, advance=bar.update)
        )
        for number, path in enumerate(networks)
    ]
    return with_study_scores(pd.concat(tables, ignore_index=True), config.recipe)


def _describe_count(
    predictions: pd.DataFrame, outside: pd.DataFrame, exams: pd.DataFrame, config: StudyConfig
) -> ExcludedByCount:
    threshold = ensemble_threshold(outside, config.evaluation)
    own = seed_means(outside, config.evaluation).drop(columns="label").merge(exams, on="study_id")
    others = model_means(predictions).assign(threshold=threshold)
    barred = None if config.optimistic else config.evaluation
    inflation = out_of_fold_inflation(config)
    groups = [describe_group(own[own["group"] == name], barred, inflation=inflation) for name in sorted(LABELS)]
    groups += [describe_group(rows, config.evaluation) for _, rows in others.groupby("group", sort=True)]
    return ExcludedByCount(
        num_slices=int(outside["num_slices"].iloc[0]),
        threshold=threshold,
        groups=tuple(groups),
    )


def describe_group(rows: pd.DataFrame, evaluation: EvaluationConfig | None, *, inflation: float = 1.0) -> GroupScores:
    """Describe the study scores of one questionnaire group.

    Parameters
    ----------
    rows
        One or more rows per study: ``study_id``, ``patient_id``, ``group``, ``study_probability`` and the ``threshold``
        from which on the study is called symptomatic.
    evaluation
        Level and kind of the interval; None makes none.
    inflation
        Factor of the variance, for cross-validated scores (`cross_validation_inflation`).
    """
    studies = rows.drop_duplicates("study_id")
    scores_N = studies["study_probability"].to_numpy()
    called_N = scores_N >= studies["threshold"].to_numpy()
    low, middle, high = np.quantile(scores_N, (0.25, 0.5, 0.75))
    share = float(called_N.mean())
    interval = None
    if evaluation is not None:
        interval = widened(_share_interval(called_N, studies["patient_id"], evaluation), share, inflation=inflation)
    return GroupScores(
        group=str(studies["group"].iloc[0]),
        num_studies=len(studies),
        mean=float(scores_N.mean()),
        sd=float(scores_N.std(ddof=1)) if len(studies) > 1 else None,
        quartiles=(float(low), float(middle), float(high)),
        share_positive=share,
        interval=interval,
    )


def _share_interval(called_N: np.ndarray, patients_N: pd.Series[str], evaluation: EvaluationConfig) -> Interval:
    """Interval of a share over patients: Wilson's, or a bootstrap where patients with several exams cluster.

    A share of 0 or 1 has no spread to resample; its interval is then Wilson's with patients as the trials.
    """
    patients, patient_N, counts_C = np.unique(patients_N, return_inverse=True, return_counts=True)
    share, level = float(called_N.mean()), evaluation.interval_level
    is_clustered = len(patients) < len(patients_N)
    if share in (0, 1) or (evaluation.share_interval == "wilson" and not is_clustered):
        low, high = wilson_interval(round(share * len(patients)), len(patients), level=level)
        return Interval(low=low, high=high, level=level, method=f"Wilson over {len(patients)} patients")
    weights_BC = np.random.default_rng(evaluation.seed).multinomial(
        len(patients), np.full(len(patients), 1 / len(patients)), size=evaluation.bootstrap_resamples
    )
    called_C = np.bincount(patient_N, called_N)
    return resampled_interval(weights_BC @ called_C / (weights_BC @ counts_C), level=level)


def describe(scores: ExcludedScores) -> str:
    """Write the distributions, for a console."""
    lines = []
    for part in scores.slice_counts:
        lines += [
            f"{part.num_slices} slice(s), called symptomatic from {part.threshold:.3f} on",
            f"  {'group':<25} {'n':>5} {'mean ± SD':>13} {'quartiles':>17}  called symptomatic",
            *(_group_line(group) for group in part.groups),
            "",
        ]
    left_out = ", ".join(f"{reason}: {count}" for reason, count in scores.left_out.items())
    lines += [
        f"{' and '.join(sorted(LABELS))}: out of fold, mean over seeds, at the threshold of their fold; the other "
        f"groups: mean of {scores.num_models} fold networks, none of which met the subject.",
        *own_groups_notice(scores),
        f"left out: {left_out or 'none'}",
    ]
    return "\n".join(lines)


def _group_line(group: GroupScores) -> str:
    spread = f"{group.mean:.3f} ± {'-' if group.sd is None else f'{group.sd:.3f}'}"
    quartiles = " ".join(f"{value:.3f}" for value in group.quartiles)
    bounds = "" if group.interval is None else f" [{group.interval.low:.2f}, {group.interval.high:.2f}]"
    share = f"{group.share_positive:.2f}{bounds}"
    return f"  {group.group:<25} {group.num_studies:>5} {spread:>13} {quartiles:>17}  {share}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, score the excluded subjects, render the report again and return the exit status."""
    return run_on_result(
        lambda config, folder: describe(score_excluded(config, folder)),
        arguments,
        prog="python -m lbp_ray.excluded",
        description=__doc__,
        replaceable="paths, name and compute",
    )


if __name__ == "__main__":
    sys.exit(main())
