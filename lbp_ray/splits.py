"""Sealed hold-out and cross-validation folds, made on one row per patient and then expanded to exams.

Whatever is fitted on data passes one gate, `require_no_holdout`. A root of runs has one ledger of openings, whatever
its studies and their splits: an exam that was opened stays opened in all of them.

Shape suffixes: E exams, P patients.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from lbp_ray.config import FrozenModel
from preprocess.commit import content_id

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

HOLDOUT = -1
"""Fold number of exams in the sealed hold-out."""

LEDGER = "holdout_ledger.jsonl"
"""File in the root of runs: one line per opening of a hold-out, whichever study it was opened for."""


Purpose = Literal[
    "templates",
    "region_finder",
    "training",
    "oversampling",
    "smote",
    "scaling",
    "pca",
    "duplicates",
    "sweep",
    "threshold",
    "epoch",
]
"""What is fitted on data; see `PURPOSES`."""

_INSIDE = "give it exams of the folds only (fold 0 and up in the split's table)"

PURPOSES: dict[Purpose, tuple[str, str]] = {
    "templates": (
        "the templates of the mid-sagittal choice, by which every exam is cropped, would show",
        "choose templates of other patients, or set midsagittal.allow_holdout_templates=true and have the report say "
        "so",
    ),
    "region_finder": (
        "the segmenter that places the crops would be trained on",
        "train it again after `python -m lbp_ray.seal`, with this study as the one whose hold-out stays unseen, or set "
        "roi.allow_holdout_training=true and have the report say so",
    ),
    "training": ("a network would be trained on", _INSIDE),
    "oversampling": ("oversampling, which repeats exams of the rarer class in training, would copy", _INSIDE),
    "smote": ("SMOTE, which makes training examples between neighbours, would draw them from", _INSIDE),
    "scaling": ("the mean and spread that features are scaled by would be taken from", _INSIDE),
    "pca": ("principal components would be fitted on", _INSIDE),
    "duplicates": ("the signatures that near-duplicates are looked up by would be fitted on", _INSIDE),
    "sweep": ("a sweep would rank its settings by scores of", _INSIDE),
    "threshold": ("a decision threshold would be fitted on scores of", _INSIDE),
    "epoch": ("the epoch that scores would be chosen on", _INSIDE),
}
"""Every purpose: what would happen to the hold-out, and what to do instead."""


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

    Patients are drawn, not exams: a patient is positive if any exam is, and all exams follow their patient. Shuffled,
    then ordered by class and number of exams, patients are dealt to the folds in laps of alternating direction, so that
    positive patients and patients per fold differ by at most 1, and exams per fold by few.

    Parameters
    ----------
    exams
        One row per exam of the binary task: ``study_id``, ``patient_id``, ``label`` (0 or 1).
    folds
        Number of cross-validation folds.
    holdout_fraction
        Share of patients to seal away, rounded up; 0 keeps none.
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
        If an exam stands twice or has no patient, there are too few patients of a class, or the result is not balanced.
    """
    if not _is_ascending(exams["study_id"]):
        exams = exams.sort_values("study_id")
        _refuse_repeated(exams["study_id"])
    patient_E, names = _patient_codes(exams)
    positive_P = np.bincount(patient_E, exams["label"].to_numpy(dtype=float)) > 0
    exams_P = np.bincount(patient_E)
    generator = np.random.Generator(np.random.Philox(key=_secret(seed, positive_P)))
    order = generator.permutation(len(names))
    sealed = np.empty(0, np.int64)
    if holdout_fraction:
        drawn = order[~names.isin(never_holdout)[order]] if never_holdout else order
        sealed = _draw_holdout(drawn, positive_P, holdout_fraction)
    _require_enough(positive_P, sealed, folds)
    fold_P = np.full(len(names), HOLDOUT)
    is_kept = np.ones(len(names), bool)
    is_kept[sealed] = False
    kept = order[is_kept[order]]
    most = exams_P.max()
    # Positive ones first, by exams ascending, then descending: like meets like where classes meet.
    rank_P = np.where(positive_P, exams_P - most - 1, most - exams_P)
    small = np.int16 if most < np.iinfo(np.int16).max else np.int64  # 16 bits are sorted by digits, in linear time
    kept = kept[np.argsort(rank_P[kept].astype(small), kind="stable")]  # ties stay shuffled
    fold_P[kept] = generator.permutation(folds)[_laps(len(kept), folds)]
    split = exams[["study_id", "patient_id"]].reset_index(drop=True).assign(fold=fold_P[patient_E])
    _check_balance(fold_P, positive_P, folds)
    return split


def _patient_codes(exams: pd.DataFrame) -> tuple[np.ndarray, pd.Index]:
    """Return each exam's patient, numbered in the order of first exams, and the patients' names."""
    codes, names = pd.factorize(exams["patient_id"])
    if (codes < 0).any():
        nameless = exams["study_id"].to_numpy()[codes < 0]
        msg = f"study {nameless[0]} has no patient_id ({len(nameless)} such exam(s)); link the questionnaire again"
        raise SplitError(msg)
    return codes, names


def _secret(seed: int, positive_P: np.ndarray) -> np.ndarray:
    """Return the key of the draws, which takes every patient's label to know.

    A file of the run tells the seed. Were the order of patients known from it, so would sealed labels be: who is sealed
    though a negative patient before them is not must be positive.
    """
    told = hashlib.sha256(f"{seed} {len(positive_P)} ".encode() + np.packbits(positive_P).tobytes())
    return np.frombuffer(told.digest()[:16], dtype="<u8").astype(np.uint64)


def _draw_holdout(may_be_sealed: np.ndarray, positive_P: np.ndarray, fraction: float) -> np.ndarray:
    """Take the first patients of each class, as many as its share of all patients is due."""
    size = math.ceil(round(fraction * len(positive_P), 9))  # 0.07 * 100 is a little more than 7
    due = min(max(round(size * float(positive_P.mean())), 1), size - 1)
    is_positive = positive_P[may_be_sealed]
    found = int(is_positive.sum()), int((~is_positive).sum())
    if size < 2 or found < (due, 0) or found[1] < size - due:
        msg = (
            f"a hold-out of {size} patients needs both classes, here {due} symptomatic and {size - due} asymptomatic "
            f"patients that no template shows; found {found[0]} and {found[1]}: choose templates of fewer patients, or "
            "set split.holdout_fraction to 0"
        )
        raise SplitError(msg)
    return np.concatenate([may_be_sealed[is_positive][:due], may_be_sealed[~is_positive][: size - due]])


def _require_enough(positive_P: np.ndarray, sealed: np.ndarray, folds: int) -> None:
    """Refuse folds that would lack a class, in which nothing could be scored."""
    for name, is_of_class in (("symptomatic", positive_P), ("asymptomatic", ~positive_P)):
        found, taken = int(is_of_class.sum()), int(is_of_class[sealed].sum())
        if found - taken < folds:
            msg = (
                f"{folds} folds{' and a hold-out' if taken else ''} need at least {folds + taken} patients of each "
                f"class, found {found} {name} ones; lower split.folds"
            )
            raise SplitError(msg)


def _laps(count: int, folds: int) -> np.ndarray:
    """Fold of each of `count` patients in a row: 0 up to the last, back down to 0, and so on."""
    lap, place = np.divmod(np.arange(count), folds)
    return np.where(lap % 2 == 0, place, folds - 1 - place)


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
    _refuse_repeated(split["study_id"])
    patient_E, names = _patient_codes(split)
    fold_E = split["fold"].to_numpy()
    first_P = np.empty(len(names), fold_E.dtype)
    first_P[patient_E] = fold_E  # any one of a patient's folds: all must equal it
    leaking = np.unique(patient_E[fold_E != first_P[patient_E]])
    if len(leaking):
        found = sorted(set(fold_E[patient_E == leaking[0]].tolist()))
        msg = (
            f"patient {names[leaking[0]]} stands in folds {found} ({len(leaking)} such patient(s)): training would see "
            "the patients it is tested on; delete the split and let the study make it again, by patient"
        )
        raise SplitError(msg)


def _is_ascending(study_ids: pd.Series[str]) -> bool:
    """Whether exams are sorted and none stands twice; a glance, where sorting millions of names takes seconds."""
    later, earlier = study_ids[1:].reset_index(drop=True), study_ids[:-1].reset_index(drop=True)
    return bool((later > earlier).all())


def _refuse_repeated(study_ids: pd.Series[str]) -> None:
    if not _is_ascending(study_ids) and study_ids.duplicated().any():
        repeated = study_ids[study_ids.duplicated()]
        msg = f"study {repeated.iloc[0]} stands {int((study_ids == repeated.iloc[0]).sum())} times in the split"
        raise SplitError(msg + "; one row per exam is required")


def sealed_among(split_table: pd.DataFrame, study_ids: Iterable[str]) -> pd.DataFrame:
    """Return the rows of a split that are sealed and among some exams."""
    is_sealed = (split_table["fold"] == HOLDOUT) & split_table["study_id"].isin(list(study_ids))
    return split_table[is_sealed]


def require_no_holdout(split_table: pd.DataFrame, study_ids: Iterable[str], purpose: Purpose) -> None:
    """Refuse a fit on sealed exams: the one gate that everything fitted on data passes.

    Parameters
    ----------
    split_table
        ``study_id``, ``patient_id``, ``fold``.
    study_ids
        Exams that something is about to be fitted on. Where whole patients are fitted on, all of their exams.
    purpose
        What is fitted, of `PURPOSES`.

    Raises
    ------
    SplitError
        Naming the purpose, how many sealed exams it would use, the first of them and what to do.
    """
    sealed = sealed_among(split_table, study_ids)
    if len(sealed):
        would, instead = PURPOSES[purpose]
        first = sealed.iloc[0]
        msg = (
            f"{would} {sealed['patient_id'].nunique()} patient(s) of the sealed hold-out, e.g. patient "
            f"{first['patient_id']} (study {first['study_id']}; {len(sealed)} sealed exam(s) in all), which would then "
            f"not be untouched: {instead}"
        )
        raise SplitError(msg)


def _check_balance(fold_P: np.ndarray, positive_P: np.ndarray, folds: int) -> None:
    inside = fold_P != HOLDOUT
    patients = np.bincount(fold_P[inside], minlength=folds)
    positive = np.bincount(fold_P[inside & positive_P], minlength=folds)
    if np.ptp(positive) > 1 or np.ptp(patients) > 2:
        msg = f"folds are not balanced: positive patients {positive.tolist()}, patients {patients.tolist()}"
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
            If a patient stands in two folds, a sealed exam has its label in the table, or the table does not match its
            hashes.
        """
        table = pd.read_parquet(folder / "split.parquet")
        meta = json.loads((folder / "split.json").read_text())
        check_split(table)
        told = table[(table["fold"] == HOLDOUT) & table["label"].notna()]
        if len(told):
            msg = (
                f"{folder / 'split.parquet'} holds labels of {len(told)} sealed exam(s), e.g. of study "
                f"{told['study_id'].iloc[0]}: the hold-out is not sealed; delete {folder} and run the study again"
            )
            raise SplitError(msg)
        found = split_hash(table, training_labels(table)), holdout_commitment(table)
        if found != (meta["split_hash"], meta["holdout_commitment"]):
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
    """1 for the first opening of the root, of whichever study and split."""
    number: int
    """1 where no exam had been opened before; from 2 on the hold-out is no longer untouched."""
    study: str
    """Name of the study that it was opened for."""
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
    """Read the openings of a root's hold-outs; an absent ledger has none.

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
