"""Questionnaire answers → groups by the Oulu study's rules → the binary task."""

from __future__ import annotations

import numpy as np
import pandas as pd

SYMPTOMATIC_FREQUENCY = 3
"""Lowest frequency code (more than 30 days a year) that counts as a symptomatic year."""
SYMPTOMATIC_DAYS = 30
"""Days of pain that count as one, where days are given: as many, or with ``strict_gt30`` more."""
SYMPTOMATIC_INTENSITY = 6
"""Lowest intensity (0-10) of a symptomatic year."""
ASYMPTOMATIC_FREQUENCY = 1
"""Highest frequency code (1-7 days a year) of an asymptomatic subject."""
ASYMPTOMATIC_DAYS = 7
"""The same in days."""
ASYMPTOMATIC_INTENSITY = 3
"""Highest intensity of an asymptomatic subject."""
SLIGHT_INTENSITY = 5
"""Highest intensity of a slightly symptomatic subject."""

LABELS = {"symptomatic": 1, "asymptomatic": 0}
"""Groups of the binary task and their labels; every other group is left out."""

PRECEDENCE = ("symptomatic_asymptomatic", "asymptomatic", "symptomatic", "slightly_symptomatic")
"""The rules, in the order that decides where an answer meets several."""

UNCLASSIFIED, NOT_ENOUGH_DATA = "unclassified", "not_enough_data"
"""Groups of complete answers that meet no rule, and of incomplete ones."""

ANSWERS = ("low_back_pain", "frequency", "intensity", "previous_episodes", "pain_now")
"""Columns that a questionnaire must have; `DAYS` may stand in for ``frequency``."""

DAYS = "frequency_days"
"""Column of a questionnaire that gives days of pain in the last 12 months, not codes."""

RANGES = {
    "low_back_pain": (1, 2),
    "frequency": (0, 4),
    DAYS: (0, 365),
    "intensity": (0, 10),
    "previous_episodes": (0, 1),
    "pain_now": (0, 1),
}
"""Lowest and highest value of each answer."""

_CODED = ("low_back_pain", "frequency", "previous_episodes", "pain_now")


class CohortError(ValueError):
    """A questionnaire, gradings, or what is said of a cohort, that cannot be used as they are."""


def classify(questionnaire: pd.DataFrame, *, strict_gt30: bool = False) -> pd.Series[str]:
    """Assign each questionnaire row to one group.

    Parameters
    ----------
    questionnaire
        One row per subject with the columns of `ANSWERS`: ``low_back_pain`` (1 no, 2 yes), ``frequency`` in the last 12
        months (1: 1-7 days, 2: 8-30 days, 3: more than 30 days, 4: daily) or in its place ``frequency_days`` (0-365),
        ``intensity`` (0-10), ``previous_episodes`` during follow-up and ``pain_now`` (0 or 1). "No" to the first
        question implies frequency and intensity 0.
    strict_gt30
        Whether exactly 30 days fall short of a symptomatic year. Codes are not touched: code 3 is more than 30 days.

    Returns
    -------
    pandas.Series
        Group names, aligned with the rows: ``symptomatic_asymptomatic`` (a symptomatic year without present pain,
        tested first), ``asymptomatic``, ``symptomatic``, ``slightly_symptomatic``, ``unclassified`` (complete answers
        that meet no rule) or ``not_enough_data``.

    Raises
    ------
    CohortError
        If a column is missing, frequency is given twice or not at all, or an answer is outside its range.

    References
    ----------
    Oulu thesis, section 3.1; the rules overlap there, and their order is this project's reading.
    """
    answers = _answers(questionnaire, strict_gt30=strict_gt30)
    rules = _rules(answers)
    complete = answers.notna().all(axis=1)
    groups = np.select([~complete, *(rules[name] for name in PRECEDENCE)], [NOT_ENOUGH_DATA, *PRECEDENCE], UNCLASSIFIED)
    return pd.Series(groups, index=questionnaire.index, name="group")


def matched_rules(questionnaire: pd.DataFrame, *, strict_gt30: bool = False) -> pd.DataFrame:
    """Tell which rules each row meets, each rule alone and as the thesis words it.

    Parameters
    ----------
    questionnaire, strict_gt30
        As in `classify`.

    Returns
    -------
    pandas.DataFrame
        One bool column per rule of `PRECEDENCE`, aligned with the rows. A rule that needs a missing answer is not met.
        A symptomatic year without present pain meets two: the wording of ``symptomatic`` does not ask for present pain.

    Raises
    ------
    CohortError
        As `classify` does.
    """
    return _rules(_answers(questionnaire, strict_gt30=strict_gt30))


def _rules(answers: pd.DataFrame) -> pd.DataFrame:
    intensity, pain_now = answers["intensity"], answers["pain_now"]
    symptomatic_year = (answers["often"] == 1) & (intensity >= SYMPTOMATIC_INTENSITY)
    mild_year = (answers["seldom"] == 1) & (intensity <= ASYMPTOMATIC_INTENSITY)
    return pd.DataFrame(
        {
            "symptomatic_asymptomatic": symptomatic_year & (pain_now == 0),
            "asymptomatic": mild_year & (answers["previous_episodes"] == 0),
            "symptomatic": symptomatic_year,
            "slightly_symptomatic": (pain_now == 1) & (intensity <= SLIGHT_INTENSITY),
        }
    )


def _answers(questionnaire: pd.DataFrame, *, strict_gt30: bool) -> pd.DataFrame:
    """Return what the rules ask for, validated: 0, 1 or missing, and ``intensity``."""
    given = _validated(questionnaire)
    no_pain = given["low_back_pain"] == 1
    column, days_are_given = _frequency_column(given), DAYS in given
    frequency = given[column].mask(no_pain, 0)
    if days_are_given:
        often = frequency > SYMPTOMATIC_DAYS if strict_gt30 else frequency >= SYMPTOMATIC_DAYS
    else:
        often = frequency >= SYMPTOMATIC_FREQUENCY
    seldom = frequency <= (ASYMPTOMATIC_DAYS if days_are_given else ASYMPTOMATIC_FREQUENCY)
    return pd.DataFrame(
        {
            "often": often.astype(float).mask(frequency.isna()),
            "seldom": seldom.astype(float).mask(frequency.isna()),
            "intensity": given["intensity"].mask(no_pain, 0),
            "previous_episodes": given["previous_episodes"],
            "pain_now": given["pain_now"],
            "asked": given["low_back_pain"],
        }
    )


def _validated(questionnaire: pd.DataFrame) -> pd.DataFrame:
    names = tuple(_frequency_column(questionnaire) if name == "frequency" else name for name in ANSWERS)
    missing = [name for name in names if name not in questionnaire]
    if missing:
        msg = f"the questionnaire lacks the column(s) {', '.join(missing)}; required are {', '.join(names)}"
        raise CohortError(msg)
    answers = pd.DataFrame({name: pd.to_numeric(questionnaire[name], errors="coerce").astype(float) for name in names})
    unreadable = answers.isna() & questionnaire[list(names)].notna()
    faults = []
    for name in names:
        low, high = RANGES[name]
        bad = unreadable[name] | (answers[name] < low) | (answers[name] > high)
        if name in _CODED:
            bad |= answers[name].notna() & (answers[name] % 1 != 0)
        if bad.any():
            kind = "whole number" if name in _CODED else "number"
            rows = ", ".join(str(row + 2) for row in np.flatnonzero(bad)[:5])
            faults.append(f"{name} must be a {kind} from {low} to {high}: {int(bad.sum())} row(s), e.g. line(s) {rows}")
    if faults:
        msg = "the questionnaire has answers out of range: " + "; ".join(faults)
        raise CohortError(msg)
    return answers


def _frequency_column(questionnaire: pd.DataFrame) -> str:
    given = [name for name in ("frequency", DAYS) if name in questionnaire]
    if len(given) != 1:
        msg = (
            f"the questionnaire must have one of the columns frequency (codes 0-4) and {DAYS} (0-365), found "
            f"{'both; drop the one that was not asked' if given else 'neither'}"
        )
        raise CohortError(msg)
    return given[0]


def label_exams(questionnaire: pd.DataFrame, *, strict_gt30: bool = False) -> pd.DataFrame:
    """Classify a linked questionnaire and label the binary task.

    Parameters
    ----------
    questionnaire
        Linked rows: ``patient_id``, ``study_id`` and the columns of `ANSWERS`.
    strict_gt30
        As in `classify`.

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
    exams["group"] = classify(questionnaire, strict_gt30=strict_gt30)
    exams["label"] = exams["group"].map(LABELS).astype("Int64")
    return exams.sort_values("study_id", ignore_index=True)


def reported_rows(questionnaire: pd.DataFrame, *, strict_gt30: bool = False) -> pd.DataFrame:
    """List every row that meets several rules or none, and every row that contradicts itself.

    Parameters
    ----------
    questionnaire, strict_gt30
        As in `classify`; a ``study_id`` is carried along where there is one.

    Returns
    -------
    pandas.DataFrame
        ``line`` of the CSV (the header is line 1), ``study_id`` where known, ``why`` (``several_rules``, ``no_rule`` or
        ``contradiction``: "no" to the first question beside a frequency, an intensity or present pain), ``rules`` met
        (joined by ``+``, in their order) and the ``group`` given. Incomplete rows are listed for contradictions only. A
        row may stand twice.

    Raises
    ------
    CohortError
        As `classify` does.
    """
    groups = classify(questionnaire, strict_gt30=strict_gt30)
    rules = matched_rules(questionnaire, strict_gt30=strict_gt30)
    given = _validated(questionnaire)
    complete, met = groups != NOT_ENOUGH_DATA, rules.sum(axis=1)
    positive = given[[_frequency_column(given), "intensity", "pain_now"]] > 0
    listed = pd.DataFrame({"line": np.arange(len(groups)) + 2}, index=questionnaire.index)
    if "study_id" in questionnaire:
        listed["study_id"] = questionnaire["study_id"]
    kinds = {
        "several_rules": complete & (met > 1),
        "no_rule": complete & (met == 0),
        "contradiction": (given["low_back_pain"] == 1) & positive.any(axis=1),
    }
    names = rules.columns.to_numpy()
    listed["rules"] = ["+".join(names[row]) for row in rules.to_numpy()]
    listed["group"] = groups
    parts = [listed[rows].assign(why=why) for why, rows in kinds.items()]
    return pd.concat(parts).sort_values(["line", "why"], ignore_index=True)
