"""Corrections of mid-sagittal slices by hand: a CSV of ``study_id,slice_index``, accepted whole or not at all."""

from __future__ import annotations

import csv
import io
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from preprocess.midsagittal.match import MidsagittalError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

COLUMNS = ("study_id", "slice_index")
"""Required columns; any other, such as a note, is ignored and stored nowhere."""

MAX_FAULTS_SHOWN = 20
"""Faults that one message lists; the rest are counted."""


@dataclass(frozen=True)
class CorrectionRow:
    """One line, as it stands in the file."""

    line: int
    study_id: str
    slice_text: str


@dataclass(frozen=True)
class Corrections:
    """A correction file that was read, but not yet held against a store."""

    path: Path
    rows: tuple[CorrectionRow, ...]

    @property
    def study_ids(self) -> frozenset[str]:
        """Studies that the file names."""
        return frozenset(row.study_id for row in self.rows)

    def resolve(self, num_slices: Mapping[str, int]) -> dict[str, int]:
        """Check every line against the store.

        Parameters
        ----------
        num_slices
            Slices of each study's sagittal T2 series; studies that the file does not name may be left out.

        Returns
        -------
        dict
            Study pseudonym → slice index, counted from 0 at the patient's right.

        Raises
        ------
        MidsagittalError
            Naming line and fault of all rows at once; never what stands in a line, which may be an identifier.
        """
        times = Counter(row.study_id for row in self.rows)
        faults = [
            f"line {row.line}: {fault}"
            for row in self.rows
            if (fault := _fault(row, num_slices.get(row.study_id), times[row.study_id]))
        ]
        if faults:
            more = len(faults) - MAX_FAULTS_SHOWN
            listed = "; ".join(faults[:MAX_FAULTS_SHOWN]) + (f"; and {more} more" if more > 0 else "")
            msg = f"{self.path}: {len(faults)} faulty row(s), nothing was corrected: {listed}"
            raise MidsagittalError(msg)
        return {row.study_id: int(row.slice_text) for row in self.rows}


def read_corrections(path: Path) -> Corrections:
    """Read a correction file.

    Raises
    ------
    MidsagittalError
        If the file is missing, is no UTF-8 text, or lacks a column.
    """
    try:
        reader = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""))
    except (OSError, UnicodeDecodeError) as error:
        msg = f"corrections cannot be read: {path} ({type(error).__name__}); a UTF-8 CSV is required"
        raise MidsagittalError(msg) from None
    absent = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if absent:
        msg = f"{path} lacks the column(s) {', '.join(absent)}; a header line {','.join(COLUMNS)} is required"
        raise MidsagittalError(msg)
    rows = (CorrectionRow(reader.line_num, *((row[name] or "").strip() for name in COLUMNS)) for row in reader)
    return Corrections(path, tuple(rows))


def _fault(row: CorrectionRow, num_slices: int | None, times: int) -> str:
    """Say what is wrong with a row; empty when nothing is."""
    faults = []
    if times > 1:
        faults.append(f"its study stands on {times} lines")
    if num_slices is None:
        faults.append("study_id names no study with a sagittal T2 series in the store")
    if not row.slice_text.isdecimal() or not row.slice_text.isascii():
        faults.append("slice_index is not an integer from 0 on")
    elif num_slices is not None and int(row.slice_text) >= num_slices:
        faults.append(f"slice_index is out of range, the series has slices 0 to {num_slices - 1}")
    return ", ".join(faults)
