"""Readers' Pfirrmann and Modic grades, validated and adjudicated to one grade per disc.

Suffixes: R readers (1, 2, consensus), E exams, L disc levels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lbp_ray.cohort.questionnaire import CohortError
from preprocess.cvat.shapes import LEVELS

if TYPE_CHECKING:
    from collections.abc import Collection

    from lbp_ray.study import CohortConfig

SCALES = {"pfirrmann": 5, "modic": 3}
"""Highest grade of each scale; the lowest in a file is 0, which Pfirrmann's scale does not have."""

READERS = (1, 2, 3)
"""Two readers, and the consensus that decides where they differ."""


@dataclass(frozen=True)
class Grades:
    """One scale's grades of every exam; NaN where a disc was not graded."""

    read_REL: np.ndarray
    """As read; Pfirrmann 0 is NaN where it is taken for a missing grade."""
    final_EL: np.ndarray
    """Adjudicated."""
    decided_EL: np.ndarray
    """Whether the rule decided, because the readers differ and no consensus row does."""
    zero_EL: np.ndarray
    """Whether a reader wrote Pfirrmann 0; False throughout for Modic, whose type 0 is a healthy endplate."""


@dataclass(frozen=True)
class Gradings:
    """Validated grades; made by `grade_exams` only."""

    study_ids: tuple[str, ...]
    """Ascending: the exams E of the arrays."""
    scales: dict[str, Grades]


def grade_exams(table: pd.DataFrame, config: CohortConfig, *, studies: Collection[str] | None = None) -> Gradings:
    """Validate gradings and decide one grade per disc.

    Parameters
    ----------
    table
        Linked gradings: ``study_id``, ``reader`` (1, 2, or 3 for the consensus), ``pfirrmann_L1L2`` to
        ``pfirrmann_L5S1`` (0-5) and ``modic_L1L2`` to ``modic_L5S1`` (0-3); one row per exam and reader, empty where a
        disc was not graded.
    config
        `CohortConfig.adjudication` and `CohortConfig.pfirrmann_zero`.
    studies
        Exams to keep; None keeps all. What is validated is the whole table.

    Notes
    -----
    A consensus grade decides. Without one, a disc has the grade that both readers gave, or the only one given; where
    they differ, the rule decides: ``worse`` the higher number, ``better`` the lower one, ``reader_1`` the first
    reader's, ``missing`` none.

    Raises
    ------
    CohortError
        If a column is missing, an exam is not named, a reader or a grade is out of range, or an exam has two rows of
        one reader.
    """
    grades = _validated(table)
    exams = sorted(set(grades["study_id"]) & set(studies) if studies is not None else set(grades["study_id"]))
    indexed = grades.set_index(["reader", "study_id"])
    rows = indexed.reindex(pd.MultiIndex.from_product([READERS, exams]))
    scales = {}
    for scale in SCALES:
        columns = [f"{scale}_{level}" for level in LEVELS]
        read_REL = rows[columns].to_numpy(float).reshape(len(READERS), len(exams), len(LEVELS))
        zero_EL = (read_REL == 0).any(axis=0) & (scale == "pfirrmann")
        if scale == "pfirrmann" and config.pfirrmann_zero == "missing":
            read_REL = np.where(read_REL == 0, np.nan, read_REL)
        scales[scale] = Grades(read_REL, *_adjudicated(read_REL, config.adjudication), zero_EL)
    return Gradings(tuple(exams), scales)


def _adjudicated(read_REL: np.ndarray, rule: str) -> tuple[np.ndarray, np.ndarray]:
    first, second, consensus = read_REL
    differ = ~np.isnan(first) & ~np.isnan(second) & (first != second)
    by_rule = {
        "worse": np.fmax(first, second),
        "better": np.fmin(first, second),
        "reader_1": first,
        "missing": np.full_like(first, np.nan),
    }[rule]
    between = np.where(differ, by_rule, np.where(np.isnan(first), second, first))
    undecided = np.isnan(consensus)
    return np.where(undecided, between, consensus), differ & undecided


def _validated(table: pd.DataFrame) -> pd.DataFrame:
    columns = [f"{scale}_{level}" for scale in SCALES for level in LEVELS]
    missing = [name for name in ("study_id", "reader", *columns) if name not in table]
    if missing:
        hint = "; they are not linked: run `python -m preprocess link` on them" if "study_id" in missing else ""
        msg = f"the gradings lack the column(s) {', '.join(missing)}{hint}"
        raise CohortError(msg)
    numbers = pd.DataFrame(
        {name: pd.to_numeric(table[name], errors="coerce").astype(float) for name in ("reader", *columns)}
    )
    faults = _fault("study_id must name an exam", table["study_id"].isna())
    faults += _fault("reader must be 1, 2, or 3 for the consensus", ~numbers["reader"].isin(READERS))
    for name in columns:
        highest = SCALES[name.split("_")[0]]
        wrong = ~numbers[name].isin(range(highest + 1)) & table[name].notna()
        faults += _fault(f"{name} must be a whole number from 0 to {highest}, or empty", wrong)
    numbers.insert(0, "study_id", table["study_id"])
    repeated = numbers.duplicated(["study_id", "reader"], keep="first")
    faults += _fault("an exam must have one row per reader", repeated)
    if faults:
        msg = "the gradings cannot be used: " + "; ".join(faults)
        raise CohortError(msg)
    return numbers.astype({"reader": int, "study_id": str})


def _fault(rule: str, wrong: pd.Series[bool]) -> list[str]:
    lines = ", ".join(str(row + 2) for row in np.flatnonzero(wrong)[:5])
    return [f"{rule}: {int(wrong.sum())} row(s), e.g. line(s) {lines}"] if wrong.any() else []


def graded_table(gradings: Gradings) -> pd.DataFrame:
    """Lay out the adjudicated grades, one row per exam.

    Returns
    -------
    pandas.DataFrame
        ``study_id``, the ten grades as nullable integers, ``adjudicated`` (discs and endplates that the rule decided)
        and ``pfirrmann_zero`` (discs that a reader graded 0).
    """
    table = pd.DataFrame({"study_id": gradings.study_ids})
    for scale, grades in gradings.scales.items():
        for number, level in enumerate(LEVELS):
            table[f"{scale}_{level}"] = pd.Series(grades.final_EL[:, number]).astype("Int64")
    table["adjudicated"] = sum(grades.decided_EL.sum(axis=1) for grades in gradings.scales.values())
    table["pfirrmann_zero"] = gradings.scales["pfirrmann"].zero_EL.sum(axis=1)
    return table
