"""Latent pain histories and the questionnaire answers they lead to.

Pain comes in episodes over fifteen years of follow-up: they start at random, last days to months and hurt more or less,
as the person's disposition has it. Answers are read off the history on the day of the exam. Nothing here knows the
rules that sort answers into groups: histories are drawn until `lbp_ray.cohort.classify` puts them where wanted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lbp_ray.cohort import classify

if TYPE_CHECKING:
    from collections.abc import Sequence

FOLLOW_UP_DAYS = 15 * 365
"""Length of the follow-up that previous episodes are counted in."""

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
        answers = answer(*draw_histories(group, _BATCH, rng))
        if group == "not_enough_data":
            answers = _forget(answers, rng)
        found.append(answers[classify(answers) == group])
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


def answer(start: np.ndarray, end: np.ndarray, intensity: np.ndarray) -> pd.DataFrame:
    """Answer the questionnaire from histories (see `draw_histories` for the arrays)."""
    year = (end - np.maximum(start, -365)).clip(0) * (intensity > 0)
    days = np.minimum(np.ceil(year.sum(axis=1)), 365)
    worst = np.where(year > 0, intensity, 0).max(axis=1)
    earlier = ((intensity > 0) & (end > start) & (start < -365)).any(axis=1)
    pain = days > 0
    frequency = np.select([days <= 7, days <= 30, days < 330], [1, 2, 3], 4)
    answers = pd.DataFrame(
        {
            "low_back_pain": np.where(pain, 2, 1),
            "frequency": frequency,
            "intensity": worst,
            "previous_episodes": earlier,
            "pain_now": ((end >= 0) & (intensity > 0)).any(axis=1),
        }
    ).astype(float)
    answers.loc[~pain, ["frequency", "intensity"]] = np.nan
    return answers


def _forget(answers: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    """Leave out one answer of each row, as people do."""
    columns = np.array(["frequency", "intensity", "previous_episodes", "pain_now"])
    skipped = columns[rng.integers(0, len(columns), len(answers))]
    for column in columns:
        answers.loc[skipped == column, column] = np.nan
    return answers
