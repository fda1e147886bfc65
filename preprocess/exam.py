"""One exam in this process: DICOM folder → volume, geometry and what became of every file. No store, no key, no Ray."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from preprocess.accounting import QUARANTINED, SKIPPED
from preprocess.convert import Identity, converted_codes, faulty_codes, make_record
from preprocess.deidentify import KEY_BYTES, Pseudonymiser
from preprocess.geometry import GeometryError
from preprocess.headers.index import index_files, walk
from preprocess.pixels.volume import VolumeError, load_volume
from preprocess.select import Exam, select

if TYPE_CHECKING:
    import numpy as np

    from preprocess.store.schema import SeriesRecord


class ExamError(ValueError):
    """A folder from which no single sagittal T2 stack can be taken; `codes` says what became of every file.

    Parameters
    ----------
    message
        What was required, found, and what to do; names no identifier.
    codes
        Relative path → code.
    """

    def __init__(self, message: str, codes: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.codes = codes or {}

    def __reduce__(self) -> tuple[type[ExamError], tuple[str, dict[str, str]]]:
        return ExamError, (str(self), self.codes)


@dataclass(frozen=True)
class ConvertedExam:
    """The sagittal T2 stack of one exam."""

    pixels_SHW: np.ndarray
    """Stored values as `SliceStore.read` would return them."""
    record: SeriesRecord
    """As the store would hold it; its pseudonyms are random and mean nothing."""
    codes: dict[str, str]
    """Relative path → code of every file of the folder."""

    @property
    def spacing_mm(self) -> tuple[float, float]:
        """Row spacing, then column spacing, of the canonical images."""
        return self.record.spacing_row_mm, self.record.spacing_column_mm


def convert_exam(dicom_dir: Path | str) -> ConvertedExam:
    """Convert the one exam below a folder.

    Parameters
    ----------
    dicom_dir
        Folder with the files of one study; other files may lie between them.

    Returns
    -------
    ConvertedExam
        Volume, record and codes.

    Raises
    ------
    ExamError
        If the folder holds no exam, several, or none with a convertible sagittal T2 stack.
    """
    root = Path(dicom_dir)
    if not root.is_dir():
        msg = f"DICOM folder not found: {root}"
        raise ExamError(msg)
    selection = select(index_files(str(root), list(walk(root))))
    codes = {row.path: code for row, code in selection.settled}
    for exam in selection.exams:
        for verdict in exam.verdicts:
            codes |= faulty_codes(verdict.stack, verdict.code or "not_best")
    candidates = [exam for exam in selection.exams if exam.selected]
    if len(candidates) != 1:
        msg = (
            f"{root} holds {len(candidates)} exams with a sagittal T2 stack, exactly one is required "
            f"({_explain(codes)}); give the folder of one study"
        )
        raise ExamError(msg, codes)
    return _convert(root, candidates[0], codes)


def _convert(root: Path, exam: Exam, codes: dict[str, str]) -> ConvertedExam:
    (verdict,) = exam.selected
    try:
        volume = load_volume(root, verdict.stack)
    except (VolumeError, GeometryError) as error:
        codes |= faulty_codes(verdict.stack, str(error), getattr(error, "faults", None))
        msg = f"the sagittal T2 stack in {root} cannot be converted: {error}: {QUARANTINED[str(error)]}"
        raise ExamError(msg, codes) from None
    identity = Identity.of(Pseudonymiser(secrets.token_bytes(KEY_BYTES)), exam, verdict.stack)
    codes |= converted_codes(verdict.stack)
    return ConvertedExam(volume.pixels_SHW, make_record(identity, verdict, volume), codes)


def _explain(codes: dict[str, str]) -> str:
    found = sorted({code.partition(":")[0] for code in codes.values()})
    meanings = {**SKIPPED, **QUARANTINED}
    return "; ".join(f"{code}: {meanings.get(code, code)}" for code in found) or "no file"
