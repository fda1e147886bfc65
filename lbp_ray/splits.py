"""Sealed hold-out and cross-validation folds, made on one row per patient and then expanded to exams."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedKFold, train_test_split

from preprocess.commit import content_id

if TYPE_CHECKING:
    from collections.abc import Mapping

HOLDOUT = -1
"""Fold number of exams in the sealed hold-out."""


class SplitError(ValueError):
    """A split that cannot be made, or one that would leak."""


def make_split(exams: pd.DataFrame, *, folds: int, holdout_fraction: float, seed: int) -> pd.DataFrame:
    """Assign every exam to the hold-out or to one fold.

    Patients are drawn, not exams: a patient is positive if any exam is, and all exams follow their patient.

    Parameters
    ----------
    exams
        One row per exam of the binary task: ``study_id``, ``patient_id``, ``label`` (0 or 1).
    folds
        Number of cross-validation folds.
    holdout_fraction
        Share of patients to seal away; 0 keeps none.
    seed
        Seed of both draws.

    Returns
    -------
    pandas.DataFrame
        Sorted by ``study_id``: ``study_id``, ``patient_id``, ``fold`` (`HOLDOUT` or 0..folds-1).

    Raises
    ------
    SplitError
        If there are too few patients of a class, or the result is not balanced.
    """
    patients = exams.groupby("patient_id", sort=True)["label"].max().astype(int).reset_index()
    fewest = int(patients["label"].value_counts().reindex([0, 1], fill_value=0).min())
    if fewest < folds + (holdout_fraction > 0):
        msg = (
            f"{folds} folds{' and a hold-out' if holdout_fraction else ''} need at least "
            f"{folds + (holdout_fraction > 0)} patients of each class, found {fewest}; lower split.folds"
        )
        raise SplitError(msg)
    fold_of_patient = pd.Series(HOLDOUT, index=patients["patient_id"], name="fold")
    kept = np.arange(len(patients))
    if holdout_fraction:
        kept, _ = train_test_split(
            kept, test_size=holdout_fraction, stratify=patients["label"], shuffle=True, random_state=seed
        )
        kept = np.sort(kept)
    labels = patients["label"].to_numpy()[kept]
    splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
    for fold, (_, members) in enumerate(splitter.split(kept, labels)):
        fold_of_patient.iloc[kept[members]] = fold
    split = exams[["study_id", "patient_id"]].sort_values("study_id", ignore_index=True)
    split["fold"] = split["patient_id"].map(fold_of_patient).astype(int)
    check_split(split)
    _check_balance(patients.assign(fold=fold_of_patient.to_numpy()))
    return split


def check_split(split: pd.DataFrame) -> None:
    """Refuse a split in which a patient stands in two folds or an exam stands twice.

    Parameters
    ----------
    split
        ``study_id``, ``patient_id``, ``fold``.

    Raises
    ------
    SplitError
        Naming the first patient or exam at fault.
    """
    repeated = split["study_id"][split["study_id"].duplicated()]
    if len(repeated):
        msg = f"study {repeated.iloc[0]} stands {int((split['study_id'] == repeated.iloc[0]).sum())} times in the split"
        raise SplitError(msg + "; one row per exam is required")
    spread = split.groupby("patient_id")["fold"].nunique()
    leaking = spread[spread > 1]
    if len(leaking):
        found = sorted(split.loc[split["patient_id"] == leaking.index[0], "fold"].unique().tolist())
        msg = (
            f"patient {leaking.index[0]} stands in folds {found} ({len(leaking)} such patient(s)): training would see "
            "the patients it is tested on; delete the split and let the study make it again, by patient"
        )
        raise SplitError(msg)


def _check_balance(patients: pd.DataFrame) -> None:
    inside = patients[patients["fold"] != HOLDOUT]
    counts = inside.groupby("fold")["label"].agg(["sum", "size"])
    if np.ptp(counts["sum"]) > 1 or np.ptp(counts["size"]) > 2:
        msg = f"folds are not balanced: positive patients {counts['sum'].tolist()}, patients {counts['size'].tolist()}"
        raise SplitError(msg)


def split_hash(split: pd.DataFrame, labels: Mapping[str, int]) -> str:
    """Return the address of a split and the labels that training may see.

    Parameters
    ----------
    split
        As `make_split` returns it.
    labels
        Label of every exam outside the hold-out, by study; hold-out labels must not be in it.
    """
    rows = split[["study_id", "patient_id", "fold"]].values.tolist()
    return content_id({"rows": rows, "labels": dict(sorted(labels.items()))})


def holdout_commitment(split: pd.DataFrame) -> str:
    """Return a hash that commits which exams are sealed, without their labels."""
    return content_id(sorted(split.loc[split["fold"] == HOLDOUT, "study_id"]))
