"""Questionnaire answers → groups by the Oulu study's rules → the binary task."""

from __future__ import annotations

import numpy as np
import pandas as pd

SYMPTOMATIC_FREQUENCY = 3
"""Lowest frequency code (more than 30 days a year) that counts as a symptomatic year."""
SYMPTOMATIC_INTENSITY = 6
"""Lowest intensity (0-10) of a symptomatic year."""
ASYMPTOMATIC_FREQUENCY = 1
"""Highest frequency code (1-7 days a year) of an asymptomatic subject."""
ASYMPTOMATIC_INTENSITY = 3
"""Highest intensity of an asymptomatic subject."""
SLIGHT_INTENSITY = 5
"""Highest intensity of a slightly symptomatic subject."""

LABELS = {"symptomatic": 1, "asymptomatic": 0}
"""Groups of the binary task and their labels; every other group is left out."""

ANSWERS = ("low_back_pain", "frequency", "intensity", "previous_episodes", "pain_now")
"""Columns that a questionnaire must have."""


class CohortError(ValueError):
    """A questionnaire that cannot be used as it is."""


def classify(questionnaire: pd.DataFrame) -> pd.Series:
    """Assign each questionnaire row to one group.

    Parameters
    ----------
    questionnaire
        One row per subject with the columns of `ANSWERS`: ``low_back_pain`` (1 no, 2 yes), ``frequency`` in the last 12
        months (1: 1-7 days, 2: 8-30 days, 3: more than 30 days, 4: daily), ``intensity`` (0-10), ``previous_episodes``
        during follow-up and ``pain_now`` (0 or 1). "No" to the first question implies frequency and intensity 0.

    Returns
    -------
    pandas.Series
        Group names, aligned with the rows: ``symptomatic_asymptomatic`` (a symptomatic year without present pain,
        tested first), ``asymptomatic``, ``symptomatic``, ``slightly_symptomatic``, ``unclassified`` (complete answers
        that meet no rule) or ``not_enough_data``.

    Raises
    ------
    CohortError
        If a column is missing or an answer is outside its range.

    References
    ----------
    Oulu thesis, section 3.1; the rules overlap there, and their order is this project's reading.
    """
    answers = _validated(questionnaire)
    no_pain = answers["low_back_pain"] == 1
    frequency = answers["frequency"].mask(no_pain, 0)
    intensity = answers["intensity"].mask(no_pain, 0)
    pain_now = answers["pain_now"] == 1
    symptomatic_year = (frequency >= SYMPTOMATIC_FREQUENCY) & (intensity >= SYMPTOMATIC_INTENSITY)
    asymptomatic = (
        (frequency <= ASYMPTOMATIC_FREQUENCY)
        & (intensity <= ASYMPTOMATIC_INTENSITY)
        & (answers["previous_episodes"] == 0)
    )
    complete = frequency.notna() & intensity.notna() & answers[["previous_episodes", "pain_now"]].notna().all(axis=1)
    groups = np.select(
        [
            ~complete,
            symptomatic_year & ~pain_now,
            asymptomatic,
            symptomatic_year,
            pain_now & (intensity <= SLIGHT_INTENSITY),
        ],
        ["not_enough_data", "symptomatic_asymptomatic", "asymptomatic", "symptomatic", "slightly_symptomatic"],
        "unclassified",
    )
    return pd.Series(groups, index=questionnaire.index, name="group")


def _validated(questionnaire: pd.DataFrame) -> pd.DataFrame:
    missing = [name for name in ANSWERS if name not in questionnaire]
    if missing:
        msg = f"the questionnaire lacks the column(s) {', '.join(missing)}; required are {', '.join(ANSWERS)}"
        raise CohortError(msg)
    answers = pd.DataFrame({name: pd.to_numeric(questionnaire[name], errors="coerce") for name in ANSWERS})
    unreadable = answers.isna() & questionnaire[list(ANSWERS)].notna()
    ranges = {
        "low_back_pain": (1, 2),
        "frequency": (0, 4),
        "intensity": (0, 10),
        "previous_episodes": (0, 1),
        "pain_now": (0, 1),
    }
    faults = []
    for name, (low, high) in ranges.items():
        bad = unreadable[name] | (answers[name] < low) | (answers[name] > high)
        if bad.any():
            rows = ", ".join(str(row + 2) for row in np.flatnonzero(bad)[:5])
            faults.append(f"{name} must be a number from {low} to {high}: {int(bad.sum())} row(s), e.g. line(s) {rows}")
    if faults:
        msg = "the questionnaire has answers out of range: " + "; ".join(faults)
        raise CohortError(msg)
    return answers


def label_exams(questionnaire: pd.DataFrame) -> pd.DataFrame:
    """Classify a linked questionnaire and label the binary task.

    Parameters
    ----------
    questionnaire
        Linked rows: ``patient_id``, ``study_id`` and the columns of `ANSWERS`.

    Returns
    -------
    pandas.DataFrame
        Sorted by ``study_id``: ``study_id``, ``patient_id``, ``group`` and ``label`` (1, 0, or missing outside the
        task).

    Raises
    ------
    CohortError
        If an exam has more than one row.
    """
    repeated = questionnaire["study_id"][questionnaire["study_id"].duplicated()].unique()
    if len(repeated):
        msg = (
            f"{len(repeated)} exam(s) have more than one questionnaire row, e.g. study {repeated[0]}; "
            "keep one row per exam and link again"
        )
        raise CohortError(msg)
    exams = questionnaire[["study_id", "patient_id"]].copy()
    exams["group"] = classify(questionnaire)
    exams["label"] = exams["group"].map(LABELS).astype("Int64")
    return exams.sort_values("study_id", ignore_index=True)
