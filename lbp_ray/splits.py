"""Sealed hold-out and cross-validation folds, made on one row per patient and then expanded to exams.

A study has one ledger of openings, whatever splits it commits: an exam that was opened stays opened in all of them.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedKFold, train_test_split

from lbp_ray.config import FrozenModel
from preprocess.commit import content_id

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

HOLDOUT = -1
"""Fold number of exams in the sealed hold-out."""

LEDGER = "holdout_ledger.jsonl"
"""File in a study's folder: one line per opening of a hold-out."""


class SplitError(ValueError):
    """A split that cannot be made, or one that would leak."""


class LedgerError(ValueError):
    """A ledger of openings that is not as it was written."""


def make_split(
    exams: pd.DataFrame,
    *,
    folds: int,
    holdout_fraction: float,
    seed: int,
    never_holdout: frozenset[str] = frozenset(),
) -> pd.DataFrame:
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
    never_holdout
        Patients that stay outside the hold-out, such as those whose slices are templates; others are drawn instead.

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
        sealed = _draw_holdout(patients, holdout_fraction, seed, never_holdout)
        kept = np.setdiff1d(kept, sealed)
    labels = patients["label"].to_numpy()[kept]
    splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
    for fold, (_, members) in enumerate(splitter.split(kept, labels)):
        fold_of_patient.iloc[kept[members]] = fold
    split = exams[["study_id", "patient_id"]].sort_values("study_id", ignore_index=True)
    split["fold"] = split["patient_id"].map(fold_of_patient).astype(int)
    check_split(split)
    _check_balance(patients.assign(fold=fold_of_patient.to_numpy()))
    return split


def _draw_holdout(patients: pd.DataFrame, fraction: float, seed: int, never: frozenset[str]) -> np.ndarray:
    """Draw rows of patients to seal, stratified by label."""
    eligible = np.flatnonzero(~patients["patient_id"].isin(never))
    size = math.ceil(fraction * len(patients))
    labels = patients["label"].to_numpy()[eligible]
    if min((labels == 0).sum(), (labels == 1).sum(), len(eligible) - size) < 2:
        msg = (
            f"a hold-out of {size} patients needs at least {size + 2} that no template shows, two of each class, found "
            f"{(labels == 0).sum()} and {(labels == 1).sum()} in the classes; choose templates of fewer patients, or "
            "set split.holdout_fraction to 0"
        )
        raise SplitError(msg)
    _, sealed = train_test_split(eligible, test_size=size, stratify=labels, shuffle=True, random_state=seed)
    return np.asarray(sealed)


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


def training_labels(table: pd.DataFrame) -> dict[str, int]:
    """Return the labels that training may see, by study."""
    inside = table[table["fold"] != HOLDOUT]
    return dict(zip(inside["study_id"], inside["label"].astype(int).tolist(), strict=True))


@dataclass(frozen=True)
class Split:
    """A committed split: folds of every exam that was drawn, and labels outside the hold-out only."""

    table: pd.DataFrame
    """``study_id``, ``patient_id``, ``fold``, ``label`` (missing in the hold-out)."""
    split_hash: str
    holdout_commitment: str
    folder: Path

    @classmethod
    def open(cls, folder: Path) -> Split:
        """Read a committed split; refuse one that leaks or was edited.

        Raises
        ------
        SplitError
            If a patient stands in two folds or the table does not match its hash.
        """
        table = pd.read_parquet(folder / "split.parquet")
        meta = json.loads((folder / "split.json").read_text())
        check_split(table)
        if split_hash(table, training_labels(table)) != meta["split_hash"]:
            msg = f"{folder / 'split.parquet'} was changed after it was made; delete {folder} and run the study again"
            raise SplitError(msg)
        return cls(table, meta["split_hash"], meta["holdout_commitment"], folder)

    def of_studies(self, study_ids: pd.Series[str]) -> Split:
        """Return the same split with the rows of some exams only."""
        return replace(self, table=self.table[self.table["study_id"].isin(study_ids)].reset_index(drop=True))


def find_split(splits: Path, wanted: str) -> Split | None:
    """Open the committed split of one hash, or return None; equal splits under several addresses are one split.

    Parameters
    ----------
    splits
        Folder of all splits of a study.
    wanted
        As `split_hash` returns it.

    Raises
    ------
    SplitError
        If the split was edited.
    """
    for meta in sorted(splits.glob("[!.]*/split.json")):
        if json.loads(meta.read_text())["split_hash"] == wanted:
            return Split.open(meta.parent)
    return None


class Opening(FrozenModel):
    """One line of the ledger."""

    line: int
    """1 for the study's first opening, of whichever split."""
    number: int
    """1 where no exam had been opened before; from 2 on the hold-out is no longer untouched."""
    user: str
    time: str
    """UTC, ISO 8601."""
    result_hash: str
    """What the hold-out was opened for."""
    split_hash: str
    studies: tuple[str, ...]
    """Pseudonyms of all sealed exams, sorted: another split may seal some of them again."""
    previous: str
    """Hash of the line before: no line but the last can be changed or taken out unseen."""


def opening_number(earlier: Iterable[Opening], studies: Iterable[str]) -> int:
    """Return 1 plus the number of earlier openings that share an exam with these."""
    opened = frozenset(studies)
    return 1 + sum(not opened.isdisjoint(opening.studies) for opening in earlier)


def last_hash(openings: Sequence[Opening]) -> str:
    """Return the hash that the next line of a ledger must carry as its previous one."""
    return content_id(openings[-1].model_dump(mode="json")) if openings else ""


def read_ledger(path: Path) -> list[Opening]:
    """Read the openings of a study's hold-outs; an absent ledger has none.

    Raises
    ------
    LedgerError
        If a line was changed or taken out.
    """
    openings: list[Opening] = []
    for text in path.read_text().splitlines() if path.is_file() else ():
        opening = Opening.model_validate_json(text)
        expected = (len(openings) + 1, opening_number(openings, opening.studies), last_hash(openings))
        if (opening.line, opening.number, opening.previous) != expected:
            msg = f"{path}, line {expected[0]}: the ledger was changed after it was written; restore it from a backup"
            raise LedgerError(msg)
        openings.append(opening)
    return openings
