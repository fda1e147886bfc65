"""What the thesis leaves open, and how this study decided it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lbp_ray.choices import CHOICES, value_in, written
from lbp_ray.report.sheets import Sheet

if TYPE_CHECKING:
    from lbp_ray.choices import Choice
    from lbp_ray.result import StudyResult

UNKNOWN = "not recorded"
"""Stands for a setting that a result of an older version does not hold."""


def choices_table(result: StudyResult) -> Sheet:
    """Set the thesis's open points that have a key beside what the study did, the default, and what it changes."""
    rows = tuple(
        (choice.reference, choice.question, choice.key, *_decided(result, choice), choice.effect) for choice in CHOICES
    )
    records = tuple(
        {"reference": row[0], "key": row[2], "value": row[3], "default": row[4], "differs": row[5]} for row in rows
    )
    note = (
        "Points that the Oulu thesis does not settle, by the numbers of the documentation's list of choices. Whoever"
        " reads its text otherwise can set the key and run again."
    )
    head = ("", "open question", "key", "this study", "default", "differs", "what it changes")
    return Sheet("choices", "Choices", note, head, "lllllll", rows, records, judged=False)


def _decided(result: StudyResult, choice: Choice) -> tuple[str, str, str]:
    default = written(choice.default)
    try:
        value = written(value_in(result.config, choice.key))
    except (KeyError, TypeError):
        return UNKNOWN, default, ""
    return value, default, "" if value == default else "yes"
