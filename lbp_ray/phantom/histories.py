"""Latent pain histories and the questionnaire answers they lead to.

Pain comes in episodes over fifteen years of follow-up: they start at random, last days to months and hurt more or less,
as the person's disposition has it. What a person *is* follows from the history itself, in days and episodes
(`latent_group`); what a person *answers* is read off the same history on the day of the exam. Histories are drawn until
the person is what is wanted, never until the answers are: the questionnaire's codes and the rules that sort answers are
not known here, so what those rules make of the answers can be held against the truth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from collections.abc import Sequence

FOLLOW_UP_DAYS = 15 * 365
"""Length of the follow-up that previous episodes are counted in."""

LONG_PAIN_DAYS, SHORT_PAIN_DAYS = 30, 7
"""A long year of pain has more days of it than the first; a nearly painless one at most the second."""

SEVERE, MODERATE, MILD = 6, 5, 3
"""Worst intensity (0-10): severe pain reaches the first; moderate and mild pain never exceed the others."""

_EPISODES = 12
_BATCH = 2048

DISPOSITIONS: dict[str, tuple[float, float, float, float]] = {
    "asymptomatic": (0.02, 3.0, 2.0, 0.0),
    "symptomatic": (0.7, 90.0, 6.5, 0.75),
    "symptomatic_asymptomatic": (0.8, 50.0, 6.5, 0.1),
    "slightly_symptomatic": (0.5, 40.0, 3.0, 0.6),
    "not_enough_data": (0.3, 20.0, 3.0, 0.3),
}
"""Per group: episodes per year, typical duration (days), typical intensity, chance of pain on the day of the exam."""


@dataclass(frozen=True)
class PainYear:
    """What the histories of several people come to on the day of the exam; one entry per person."""

    days: np.ndarray
    """Days with pain among the last 365, begun ones counted whole."""
    worst: np.ndarray
    """Highest intensity (0-10) of those days; 0 without any."""
    ongoing: np.ndarray
    """Whether an episode is going on."""
    earlier: np.ndarray
    """Whether an episode began before those 365 days."""


def pain_year(start: np.ndarray, end: np.ndarray, intensity: np.ndarray) -> PainYear:
    """Sum histories up (see `draw_histories` for the arrays)."""
    hurts = intensity > 0
    year = (end - np.maximum(start, -365)).clip(0) * hurts
    return PainYear(
        days=np.minimum(np.ceil(year.sum(axis=1)), 365),
        worst=np.where(year > 0, intensity, 0).max(axis=1),
        ongoing=np.any((end >= 0) & hurts, axis=1),
        earlier=np.any(hurts & (end > start) & (start < -365), axis=1),
    )


def latent_group(year: PainYear) -> np.ndarray:
    """Say what people are, by their histories and not by their answers.

    Parameters
    ----------
    year
        Their last year.

    Returns
    -------
    numpy.ndarray
        Per person: ``symptomatic`` (a long year of severe pain that goes on), ``symptomatic_asymptomatic`` (the same,
        but over), ``asymptomatic`` (a nearly painless year after none), ``slightly_symptomatic`` (neither, with
        moderate pain that goes on) or ``other``.
    """
    long_and_severe = (year.days > LONG_PAIN_DAYS) & (year.worst >= SEVERE)
    painless = (year.days <= SHORT_PAIN_DAYS) & (year.worst <= MILD) & ~year.earlier
    moderate = year.ongoing & (year.worst <= MODERATE)
    kinds = {
        "symptomatic": long_and_severe & year.ongoing,
        "symptomatic_asymptomatic": long_and_severe & ~year.ongoing,
        "asymptomatic": painless,
        "slightly_symptomatic": moderate & ~painless,
    }
    assert (sum(people.astype(int) for people in kinds.values()) <= 1).all()
    return np.select(list(kinds.values()), list(kinds), "other")


def draw_questionnaire(groups: Sequence[str], rng: np.random.Generator) -> pd.DataFrame:
    """Draw one questionnaire row per wanted group.

    Parameters
    ----------
    groups
        Group name per row.
    rng
        Random stream.

    Returns
    -------
    pandas.DataFrame
        ``low_back_pain``, ``frequency``, ``intensity``, ``previous_episodes``, ``pain_now`` as nullable integers.
    """
    wanted = pd.Series(list(groups))
    parts = []
    for group in sorted(wanted.unique()):
        rows = wanted.index[wanted == group]
        parts.append(_draw_group(str(group), len(rows), rng).set_index(rows))
    return pd.concat(parts).sort_index().astype("Int64")


def _draw_group(group: str, count: int, rng: np.random.Generator) -> pd.DataFrame:
    found: list[pd.DataFrame] = []
    while sum(map(len, found)) < count:
        year = pain_year(*draw_histories(group, _BATCH, rng))
        if group == "not_enough_data":
            answers, forgotten = _forget(answer(year), rng)
            found.append(answers[forgotten])
        else:
            found.append(answer(year)[latent_group(year) == group])
    return pd.concat(found).iloc[:count]


def draw_histories(disposition: str, count: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Draw pain episodes of `count` people.

    Parameters
    ----------
    disposition
        Key of `DISPOSITIONS`.
    count
        Number of people.
    rng
        Random stream.

    Returns
    -------
    tuple of numpy.ndarray
        Start and end (days before the exam, negative before it) and intensity (0–10) of each episode, shape
        (people, episodes); absent episodes have intensity 0 and no length.
    """
    rate, days, hurt, present = DISPOSITIONS[disposition]
    shape = (count, _EPISODES)
    onset = -(rng.uniform(0, 1, (count, 1)) ** 0.5) * FOLLOW_UP_DAYS
    happens = np.arange(_EPISODES) < rng.poisson(rate * -onset / 365)
    start = rng.uniform(0, 1, shape) * onset
    end = np.minimum(start + days * np.exp(rng.normal(0, 1.0, shape)), -1.0)
    person = rng.normal(hurt, 1.6, (count, 1))
    intensity = np.clip(np.rint(person + rng.normal(0, 1.2, shape)), 1, 10) * happens
    ongoing = rng.random(count) < present
    start[:, 0] = np.where(ongoing, -days * np.exp(rng.normal(0, 1.0, count)), start[:, 0])
    end[:, 0] = np.where(ongoing, 0.0, end[:, 0])
    intensity[:, 0] = np.where(ongoing, np.clip(np.rint(person[:, 0]), 1, 10), intensity[:, 0])
    return start, np.where(intensity > 0, end, start), intensity


def answer(year: PainYear) -> pd.DataFrame:
    """Answer the questionnaire; who had no pain is not asked how often and how bad."""
    pain = year.days > 0
    frequency = np.select([year.days <= 7, year.days <= 30, year.days < 330], [1, 2, 3], 4)
    answers = pd.DataFrame(
        {
            "low_back_pain": np.where(pain, 2, 1),
            "frequency": frequency,
            "intensity": year.worst,
            "previous_episodes": year.earlier,
            "pain_now": year.ongoing,
        }
    ).astype(float)
    answers.loc[~pain, ["frequency", "intensity"]] = np.nan
    return answers


def _forget(answers: pd.DataFrame, rng: np.random.Generator) -> tuple[pd.DataFrame, np.ndarray]:
    """Leave out one answer of each row, as people do; also say which rows had been asked for it."""
    columns = np.array(["frequency", "intensity", "previous_episodes", "pain_now"])
    skipped = columns[rng.integers(0, len(columns), len(answers))]
    asked = (answers["low_back_pain"] == 2).to_numpy() | np.isin(skipped, ["previous_episodes", "pain_now"])
    for column in columns:
        answers.loc[skipped == column, column] = np.nan
    return answers, asked
