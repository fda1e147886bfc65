"""Which identifiers became which pseudonyms: the private index that templates and `link` look things up in.

Two Parquet tables in the private folder (mode 0600): ``exams`` (patient id, accession number → pseudonyms) and
``slices`` (SOP Instance UID → series and slice). They never leave that folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from preprocess.commit import commit_point, write_atomic
from preprocess.deidentify import normalise

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_EXAMS = pa.schema(
    [(name, pa.string()) for name in ("patient_key", "accession_key", "patient_id", "study_id", "series_id")]
)
_SLICES = pa.schema([("sop_uid", pa.string()), ("series_id", pa.string()), ("slice_index", pa.int32())])


class UidIndexError(ValueError):
    """An identifier that cannot be looked up, or an index that is missing."""


@dataclass(frozen=True)
class ExamEntry:
    """One exam of the tree."""

    patient_key: str
    """Normalised patient id."""
    accession_key: str
    """Normalised accession number, may be empty."""
    patient_id: str
    study_id: str
    series_id: str
    """Empty when no series of the exam is in the store."""


@dataclass(frozen=True)
class UidIndex:
    """Both tables in memory."""

    exams: tuple[ExamEntry, ...]
    slices: dict[str, tuple[str, int]]
    """SOP Instance UID → (series_id, slice_index)."""

    @classmethod
    def load(cls, private: Path) -> UidIndex:
        """Read the index of a store.

        Raises
        ------
        UidIndexError
            If the private folder has none.
        """
        try:
            exams = pq.read_table(private / "exams.parquet", schema=_EXAMS).to_pylist()
            slices = pq.read_table(private / "slices.parquet", schema=_SLICES).to_pydict()
        except OSError:
            msg = f"no identifier index in {private}: run `python -m preprocess` on the DICOM tree first"
            raise UidIndexError(msg) from None
        places = zip(slices["series_id"], slices["slice_index"], strict=True)
        return cls(tuple(ExamEntry(**row) for row in exams), dict(zip(slices["sop_uid"], places, strict=True)))

    def locate(self, sop_uids: Sequence[str]) -> list[tuple[str, int]]:
        """Find slices of the store.

        Parameters
        ----------
        sop_uids
            SOP Instance UIDs.

        Returns
        -------
        list
            (series_id, slice_index) in the order asked.

        Raises
        ------
        UidIndexError
            Naming the rows (not the UIDs) that no stored slice matches.
        """
        absent = [str(line) for line, uid in enumerate(sop_uids, start=2) if uid not in self.slices]
        if absent:
            msg = (
                f"templates: line(s) {', '.join(absent)} name no slice of a sagittal T2 series in the store; "
                "choose templates among converted slices (see files.csv in the private folder)"
            )
            raise UidIndexError(msg)
        return [self.slices[uid] for uid in sop_uids]


def write_uid_index(private: Path, exams: Sequence[ExamEntry], slices: dict[str, tuple[str, int]]) -> UidIndex:
    """Add the exams of a run to the index; exams of earlier runs on other trees stay.

    Parameters
    ----------
    private
        Private folder.
    exams
        Exams of this run.
    slices
        SOP Instance UID → (series_id, slice_index) of this run's stored slices.
    """
    commit_point("uid-index:before")
    if (private / "exams.parquet").exists() and (private / "slices.parquet").exists():
        earlier = UidIndex.load(private)
        fresh = {exam.study_id for exam in exams}
        exams = [*exams, *(exam for exam in earlier.exams if exam.study_id not in fresh)]
        slices = earlier.slices | slices
    ordered = sorted(exams, key=lambda exam: exam.study_id)
    columns = {name: [getattr(exam, name) for exam in ordered] for name in _EXAMS.names}
    places = sorted((series_id, index, uid) for uid, (series_id, index) in slices.items())
    series_ids, indices, uids = zip(*places, strict=True) if places else ((), (), ())
    _write(private / "exams.parquet", pa.Table.from_pydict(columns, _EXAMS))
    commit_point("uid-index:between")
    table = {"sop_uid": list(uids), "series_id": list(series_ids), "slice_index": list(indices)}
    _write(private / "slices.parquet", pa.Table.from_pydict(table, _SLICES))
    commit_point("uid-index:after")
    return UidIndex(tuple(ordered), slices)


def _write(path: Path, table: Any) -> None:  # noqa: ANN401  (pyarrow has no types)
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    write_atomic(path, buffer.getvalue().to_pybytes(), mode=0o600)


def exam_entry(patient: str, accession: str, *, patient_id: str, study_id: str, series_id: str) -> ExamEntry:
    """Make an entry from header texts and pseudonyms."""
    return ExamEntry(normalise(patient), normalise(accession), patient_id, study_id, series_id)
