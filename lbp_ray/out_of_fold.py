"""Trial outputs → one complete out-of-fold table. Gaps, duplicates, NaN and mixtures are refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lbp_ray.metrics import cross_fitted_thresholds
from lbp_ray.splits import HOLDOUT
from preprocess.commit import content_id

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lbp_ray.cell import TrialSpec
    from lbp_ray.metrics import StudyRule
    from lbp_ray.splits import Split

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


def collect(specs: Sequence[TrialSpec], folders: Sequence[Path], split: Split) -> pd.DataFrame:
    """Join the predictions of all trials into the out-of-fold table.

    Parameters
    ----------
    specs
        Every planned trial.
    folders
        Their committed folders, in the same order.
    split
        Folds and labels.

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
    table = _with_study_scores(table, specs[0].recipe.study_rule)
    _check(table, specs, split)
    table = _with_thresholds(table)
    return table.sort_values(KEY, ignore_index=True)[list(OUT_OF_FOLD_COLUMNS)]


def collect_holdout(specs: Sequence[TrialSpec], folders: Sequence[Path]) -> pd.DataFrame:
    """Join the hold-out predictions of all trials, keyed also by fold; there are no labels in it."""
    tables = [
        pd.read_parquet(folder / "holdout.parquet").assign(**spec.cell.model_dump(), trial_id=spec.trial_id)
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
    found = json.loads((folder / "trial.json").read_text())["trial_id"]
    if found != spec.trial_id:
        msg = f"{folder} holds trial {found[:16]}, planned was {spec.trial_id[:16]}; delete the folder and run again"
        raise IncompleteStudyError(msg)
    return pd.read_parquet(folder / "out_of_fold.parquet").assign(
        recipe_id=recipe_id(spec),
        fold=spec.cell.fold,
        seed=spec.cell.seed,
        num_slices=spec.cell.num_slices,
        epoch=spec.recipe.frozen_epochs + spec.recipe.unfrozen_epochs,
        selection="fixed_epochs",
        trial_id=spec.trial_id,
    )


def _with_study_scores(table: pd.DataFrame, rule: StudyRule) -> pd.DataFrame:
    grouped = table.groupby(["num_slices", "seed", "study_id"])["probability"]
    return table.assign(study_probability=grouped.transform(rule))


def _with_thresholds(table: pd.DataFrame) -> pd.DataFrame:
    table = table.assign(threshold=np.nan, threshold_source="cross_fitted")
    for _, rows in table.groupby(["num_slices", "seed"]):
        studies = rows.drop_duplicates("study_id")
        thresholds = cross_fitted_thresholds(
            studies["label"].to_numpy(dtype=int), studies["study_probability"].to_numpy(), studies["fold"].to_numpy()
        )
        table.loc[rows.index, "threshold"] = rows["fold"].map(thresholds)
    return table


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
