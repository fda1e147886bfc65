"""What a person decides about crops by hand: a CSV of ``study_id,action,centre_row,centre_column``."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

USE, EXCLUDE, CENTRE = "use", "exclude", "centre"
"""Actions: crop by a mask although it is flagged; make no crop; put the box's centre at a place."""

COLUMNS = ("study_id", "action", "centre_row", "centre_column")
"""Required columns; any other, such as a note, is ignored and stored nowhere."""

MAX_FAULTS_SHOWN = 20
"""Faults that one message lists; the rest are counted."""


class OverrideError(ValueError):
    """An override file that cannot be used as it is."""


@dataclass(frozen=True)
class Override:
    """What is decided about one study."""

    action: str
    centre: tuple[float, float] | None = None
    """Row and column in continuous pixel coordinates of the store; None unless the action is ``centre``."""


@dataclass(frozen=True)
class OverrideTargets:
    """What overrides may speak of."""

    shapes: Mapping[str, tuple[int, int]]
    """Study → rows and columns of its images."""
    masks: frozenset[str]
    """Studies with a predicted mask that is not empty."""
    corrected: frozenset[str]
    """Studies whose mask was also corrected by hand."""


def read_overrides(path: Path, targets: OverrideTargets) -> dict[str, Override]:
    """Read an override file: whole or not at all.

    Parameters
    ----------
    path
        UTF-8 CSV with the columns `COLUMNS`.
    targets
        What its rows may name.

    Returns
    -------
    dict
        Study → what to do.

    Raises
    ------
    OverrideError
        If the file is absent, is no text or lacks a column; or naming line and fault of all bad rows at once, never
        what stands in them, which may be an identifier.
    """
    try:
        reader = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""))
        rows = [(reader.line_num, [(row[name] or "").strip() for name in COLUMNS]) for row in _checked(reader, path)]
    except (OSError, UnicodeDecodeError) as error:
        msg = f"overrides cannot be read: {path} ({type(error).__name__}); a UTF-8 CSV is required"
        raise OverrideError(msg) from None
    times = Counter(cells[0] for _, cells in rows)
    faults = [f"line {line}: {fault}" for line, cells in rows if (fault := _fault(cells, times[cells[0]], targets))]
    if faults:
        more = len(faults) - MAX_FAULTS_SHOWN
        listed = "; ".join(faults[:MAX_FAULTS_SHOWN]) + (f"; and {more} more" if more > 0 else "")
        msg = f"{path}: {len(faults)} faulty row(s), no override was applied: {listed}"
        raise OverrideError(msg)
    return {
        study: Override(action, (float(row), float(column)) if action == CENTRE else None)
        for _, (study, action, row, column) in rows
    }


def _checked(reader: csv.DictReader[str], path: Path) -> csv.DictReader[str]:
    absent = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if absent:
        msg = f"{path} lacks the column(s) {', '.join(absent)}; a header line {','.join(COLUMNS)} is required"
        raise OverrideError(msg)
    return reader


def _fault(cells: list[str], times: int, targets: OverrideTargets) -> str:
    """Say what is wrong with a row; empty when nothing is."""
    study, action, *place = cells
    faults = []
    if times > 1:
        faults.append(f"its study stands on {times} lines")
    if study not in targets.shapes:
        faults.append("study_id names no study with a sagittal T2 series in the store")
    if study in targets.corrected:
        faults.append("its study also has a corrected mask in paths.roi_corrections: keep one of the two")
    if action not in (USE, EXCLUDE, CENTRE):
        faults.append(f"action must be {USE}, {EXCLUDE} or {CENTRE}")
    elif action == USE and study in targets.shapes and study not in targets.masks:
        faults.append(f"there is no predicted mask to {USE}: give a {CENTRE}")
    if action == CENTRE:
        faults += _place_faults(place, targets.shapes.get(study))
    elif any(place):
        faults.append(f"centre_row and centre_column belong to the action {CENTRE} only")
    return ", ".join(faults)


def _place_faults(place: list[str], shape: tuple[int, int] | None) -> list[str]:
    try:
        row, column = (float(text) for text in place)
    except ValueError:
        return ["centre_row and centre_column must be numbers"]
    if not (math.isfinite(row) and math.isfinite(column)):
        return ["centre_row and centre_column must be numbers"]
    if shape and not (0 <= row <= shape[0] and 0 <= column <= shape[1]):
        return [f"the centre lies outside the image of {shape[0]} x {shape[1]} (rows x columns)"]
    return []
