"""Trial outputs → one complete out-of-fold table. Gaps, duplicates, NaN and mixtures are refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lbp_ray.metrics import MetricError, study_scores, thresholds_by_fold
from lbp_ray.splits import HOLDOUT, require_no_holdout
from lbp_ray.summaries import THRESHOLD_OF
from preprocess.commit import content_id

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lbp_ray.cell import TrialSpec
    from lbp_ray.splits import Split
    from lbp_ray.study import EvaluationConfig, Level, Recipe

OUT_OF_FOLD_COLUMNS = (
    "recipe_id",
    "study_id",
    "slice_index",
    "slice_offset_mm",
    "fold",
    "seed",
    "num_slices",
    "probability",
    "study_probability",
    "threshold",
    "slice_threshold",
    "threshold_source",
    "epoch",
    "selection",
    "label",
    "split_hash",
    "trial_id",
)
"""Columns of the out-of-fold table, in order."""

KEY = ["num_slices", "seed", "study_id", "slice_index"]
"""What may stand once in the out-of-fold table of one recipe."""


class IncompleteStudyError(ValueError):
    """A set of trials that no valid table can be made of."""


def recipe_id(spec: TrialSpec) -> str:
    """Return the address of a trial's recipe: everything but fold, seed and slice count."""
    return content_id({"recipe": spec.recipe.model_dump(mode="json"), "weights": spec.weights_hash})


def collect(
    specs: Sequence[TrialSpec], folders: Sequence[Path], split: Split, evaluation: EvaluationConfig
) -> pd.DataFrame:
    """Join the predictions of all trials into the out-of-fold table.

    Parameters
    ----------
    specs
        Every planned trial.
    folders
        Their committed folders, in the same order.
    split
        Folds and labels.
    evaluation
        How thresholds are fitted.

    Returns
    -------
    pandas.DataFrame
        `OUT_OF_FOLD_COLUMNS`, sorted by `KEY`.

    Raises
    ------
    IncompleteStudyError
        If a trial is absent or not the planned one, a study is predicted twice, not at all or in a fold that is not its
        own, or a probability is not a number in [0, 1].
    """
    absent = [spec.cell.name for spec, folder in zip(specs, folders, strict=True) if not folder.is_dir()]
    if absent:
        msg = (
            f"{len(absent)} of {len(specs)} trial(s) are missing, e.g. {', '.join(absent[:3])}: no table is made of an "
            "incomplete study; run the study again, it runs only what is missing"
        )
        raise IncompleteStudyError(msg)
    table = pd.concat([_trial_rows(spec, folder) for spec, folder in zip(specs, folders, strict=True)])
    truth = split.table[["study_id", "fold", "label"]].rename(columns={"fold": "fold_of_study"})
    table = table.merge(truth, on="study_id", how="left")
    table["split_hash"] = split.split_hash
    _check(table, specs, split)
    require_no_holdout(split.table, table["study_id"], "threshold")
    table = with_study_scores(table, specs[0].recipe)
    table = _with_thresholds(table, evaluation)
    return table.sort_values(KEY, ignore_index=True)[list(OUT_OF_FOLD_COLUMNS)]


def collect_holdout(specs: Sequence[TrialSpec], folders: Sequence[Path], evaluation: EvaluationConfig) -> pd.DataFrame:
    """Join the hold-out predictions of all trials, keyed also by fold; there are no labels and no decisions in it.

    ``threshold_source`` says whose scores make the threshold that a network alone is judged by.
    """
    tables = [
        pd.read_parquet(folder / "holdout.parquet").assign(
            **spec.cell.model_dump(),
            trial_id=spec.trial_id,
            epoch=json.loads((folder / "trial.json").read_text())["epochs"][0],
            selection=spec.recipe.selection,
            threshold_source=evaluation.threshold_source,
        )
        for spec, folder in zip(specs, folders, strict=True)
    ]
    return pd.concat(tables).sort_values(["num_slices", "seed", "fold", "study_id", "slice_index"], ignore_index=True)


def check_environments(folders: Sequence[Path], *, allow_mixed: bool = False) -> dict[str, str]:
    """Return the environment that all trials ran in.

    Parameters
    ----------
    folders
        Committed trials.
    allow_mixed
        Accept several environments and return them joined.

    Raises
    ------
    IncompleteStudyError
        If trials ran with other library versions or on other device models.
    """
    records = [json.loads((folder / "trial.json").read_text())["environment"] for folder in folders]
    values = {name: sorted({str(record[name]) for record in records}) for name in records[0]}
    mixed = {name: found for name, found in values.items() if len(found) > 1}
    if mixed and not allow_mixed:
        msg = (
            f"the trials ran in different environments: {mixed}; numbers may differ in the last digits. Run them again "
            "in one, or set evaluation.allow_mixed_environments: true"
        )
        raise IncompleteStudyError(msg)
    return {name: " and ".join(found) for name, found in values.items()}


def _trial_rows(spec: TrialSpec, folder: Path) -> pd.DataFrame:
    record = json.loads((folder / "trial.json").read_text())
    if record["trial_id"] != spec.trial_id:
        found = record["trial_id"][:16]
        msg = f"{folder} holds trial {found}, planned was {spec.trial_id[:16]}; delete the folder and run again"
        raise IncompleteStudyError(msg)
    return pd.read_parquet(folder / "out_of_fold.parquet").assign(
        recipe_id=recipe_id(spec),
        fold=spec.cell.fold,
        seed=spec.cell.seed,
        num_slices=spec.cell.num_slices,
        epoch=record["epochs"][0],
        selection=spec.recipe.selection,
        trial_id=spec.trial_id,
    )


def with_study_scores(table: pd.DataFrame, recipe: Recipe) -> pd.DataFrame:
    """Add each study's score by the recipe's rule to its slices.

    Parameters
    ----------
    table
        ``num_slices``, ``seed``, ``fold``, ``study_id``, ``probability``: one row per slice of each model.
    recipe
        Names the rule.
    """
    model_M = table.groupby(["num_slices", "seed", "fold", "study_id"], sort=False).ngroup().to_numpy()
    _, scores = study_scores(model_M, table["probability"].to_numpy(), rule=recipe.study_rule, k=recipe.study_rule_k)
    return table.assign(study_probability=scores[model_M])


def fold_thresholds(slices: pd.DataFrame, evaluation: EvaluationConfig, level: Level) -> dict[int, float]:
    """Return the threshold that each fold's studies, or slices, are judged by.

    Parameters
    ----------
    slices
        One row per slice of one seed, or of the average over seeds: ``study_id``, ``fold``, ``label``, ``probability``,
        ``study_probability``.
    evaluation
        Whose scores, and by which criterion. With ``threshold_level: slice`` studies are judged by the slices'
        threshold: by the rule ``any``, a study is positive if a slice passes it.
    level
        What is judged.
    """
    labels, scores, folds = fitting_scores(slices, evaluation, level)
    criterion, target = evaluation.threshold_criterion, evaluation.threshold_target
    return thresholds_by_fold(
        labels, scores, folds, source=evaluation.threshold_source, criterion=criterion, target=target
    )


def fitting_scores(
    slices: pd.DataFrame, evaluation: EvaluationConfig, level: Level
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return labels, scores and folds of what a threshold is fitted on: studies, or slices."""
    by_slice = "slice" in (level, evaluation.threshold_level)
    units = slices if by_slice else slices.drop_duplicates("study_id")
    scores = units["probability" if by_slice else "study_probability"]
    return units["label"].to_numpy(dtype=int), scores.to_numpy(), units["fold"].to_numpy()


def _with_thresholds(table: pd.DataFrame, evaluation: EvaluationConfig) -> pd.DataFrame:
    table = table.assign(threshold=np.nan, slice_threshold=np.nan, threshold_source=evaluation.threshold_source)
    for (count, seed), rows in table.groupby(["num_slices", "seed"]):
        for level, column in THRESHOLD_OF.items():
            try:
                table.loc[rows.index, column] = rows["fold"].map(fold_thresholds(rows, evaluation, level))
            except MetricError as error:
                msg = (
                    f"k{count} seed{seed}, thresholds for {level} scores, {error}. Trained networks are kept: with "
                    "another evaluation the same command only makes the tables again"
                )
                raise MetricError(msg) from error
    return table


def seed_means(table: pd.DataFrame, evaluation: EvaluationConfig) -> pd.DataFrame:
    """Average the scores of one slice count over seeds, and say by which threshold they are judged.

    Parameters
    ----------
    table
        Its rows of the out-of-fold table.
    evaluation
        Whether the threshold is fitted on the averages or is the mean of the seeds'.

    Returns
    -------
    pandas.DataFrame
        One row per slice, sorted by study and slice: ``study_id``, ``slice_index``, ``fold``, ``label``,
        ``probability``, ``study_probability``, ``threshold``, ``slice_threshold``.
    """
    means = table.groupby(["study_id", "slice_index"], sort=True, as_index=False).agg(
        fold=("fold", "first"),
        label=("label", "first"),
        probability=("probability", "mean"),
        study_probability=("study_probability", "mean"),
        threshold=("threshold", "mean"),
        slice_threshold=("slice_threshold", "mean"),
    )
    if evaluation.ensemble_threshold == "refit":
        means["threshold"] = means["fold"].map(fold_thresholds(means, evaluation, "study"))
        means["slice_threshold"] = means["fold"].map(fold_thresholds(means, evaluation, "slice"))
    return means


def _check(table: pd.DataFrame, specs: Sequence[TrialSpec], split: Split) -> None:
    faults = []
    repeated = table.duplicated(["recipe_id", *KEY])
    if repeated.any():
        row = table[repeated].iloc[0]
        cell = f"k{row.num_slices} seed{row.seed}"
        faults.append(f"study {row.study_id} is predicted twice by {cell} ({int(repeated.sum())} rows)")
    if table["recipe_id"].nunique() > 1:
        faults.append(f"{table['recipe_id'].nunique()} recipes are mixed in one table")
    if (table["fold"] != table["fold_of_study"]).any():
        row = table[table["fold"] != table["fold_of_study"]].iloc[0]
        faults.append(f"study {row.study_id} is predicted by fold {row.fold}, which trained on it or never held it out")
    bad = ~table["probability"].between(0, 1)
    if bad.any():
        example = table[bad].iloc[0].trial_id[:16]
        faults.append(f"{int(bad.sum())} probabilities are not numbers in [0, 1], e.g. of trial {example}")
    expected = int((split.table["fold"] != HOLDOUT).sum())
    for num_slices, seed in sorted({(spec.cell.num_slices, spec.cell.seed) for spec in specs}):
        rows = table[(table["num_slices"] == num_slices) & (table["seed"] == seed)]
        if len(rows) != expected * num_slices or rows["study_id"].nunique() != expected:
            faults.append(f"k{num_slices} seed{seed} predicts {len(rows)} slices, {expected * num_slices} are due")
    if faults:
        msg = "the out-of-fold table is not valid: " + "; ".join(faults) + "; delete the trials at fault and run again"
        raise IncompleteStudyError(msg)
