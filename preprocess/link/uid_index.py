"""Which identifiers became which pseudonyms: the private index that templates and `link` look things up in.

Two folders of Parquet files in the private folder (0700, files 0600), one file per prefix of the study's pseudonym::

    exams/<part>.parquet     patient id, issuer, accession number, study UID → pseudonyms, for every exam seen
    slices/<part>.parquet    SOP Instance UID → series and slice, for every slice stored

A part is written by one task and read one after the other, so that neither needs the whole index in memory. What a
store holds is the manifest's word, not this index's: an exam listed here may have no series, a slice may be gone.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from preprocess.commit import commit_point, stream_atomic, write_atomic
from preprocess.deidentify import normalise

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

_KEYED = ("issuer", "patient", "accession")
"""Texts that are looked up in normalised form."""

_EXAMS = pa.schema(
    [(name, pa.string()) for name in ("patient_id", "study_id", *_KEYED, "study_uid")]
    + [(f"{name}_key", pa.string()) for name in _KEYED]
)
SLICES = pa.schema(
    [("study_id", pa.string()), ("series_id", pa.string()), ("slice_index", pa.int32()), ("sop_uid", pa.string())]
)
"""Columns of the slices."""

_OBJECTS = pa.schema(
    [
        ("series_uid", pa.string()),
        ("sop_uid", pa.string()),
        ("frame", pa.int64()),
        ("position_mm", pa.list_(pa.float64())),
    ]
)

EXAM_COLUMNS = ("patient_id", "study_id", "issuer_key", "patient_key", "accession_key")
"""What `UidIndex.exams_of` returns: keys are normalised, ids are pseudonyms."""

LOOKUP_ROWS = 250_000
"""Index rows compared at a time: enough to share the cost of hashing what is looked for, about 30 MB."""

MAPPING_COLUMNS = {
    "IssuerOfPatientID": "issuer",
    "PatientID": "patient",
    "AccessionNumber": "accession",
    "StudyInstanceUID": "study_uid",
    "patient_id": "patient_id",
    "study_id": "study_id",
}
"""Column of the mapping table → column of the index."""

_SHAREABLE_SUFFIXES = (".zarr", ".report", ".midsagittal")


class UidIndexError(ValueError):
    """An identifier that cannot be looked up, an index that is missing, or a table that may not be written there."""


@dataclass(frozen=True)
class ExamEntry:
    """One exam of the tree, converted or not: identifiers as in the header, and their pseudonyms."""

    issuer: str
    """IssuerOfPatientID; empty when absent, as are the next two."""
    patient: str
    accession: str
    study_uid: str
    patient_id: str
    study_id: str


@dataclass(frozen=True)
class SliceEntry:
    """One slice of the store."""

    sop_uid: str
    """SOP Instance UID; of a frame of a multi-frame object ``<SOP Instance UID>#<frame number from 1>``."""
    study_id: str
    series_id: str
    slice_index: int


# --- writing ---------------------------------------------------------------------------------------------------------


def write_index_part(private: Path, part: str, exams: Sequence[ExamEntry], slices: Sequence[SliceEntry]) -> None:
    """Write one part of the index; what earlier runs on other trees put into it stays.

    Parameters
    ----------
    private
        Private folder.
    part
        Prefix of the pseudonyms of the studies in it. Nobody else may be writing the same part.
    exams
        Exams of this run. They replace earlier entries of the same study.
    slices
        Stored slices of these exams. They replace earlier entries of the same object in the same study.
    """
    study_ids = {exam.study_id for exam in exams} | {place.study_id for place in slices}
    assert all(study_id.startswith(part) for study_id in study_ids), part
    commit_point("uid-index:before")
    exams_by_id = {row["study_id"]: row for row in [*_rows(private, "exams", part), *map(_exam_row, exams)]}
    _write(_part_path(private, "exams", part), [exams_by_id[key] for key in sorted(exams_by_id)], _EXAMS)
    commit_point("uid-index:between")
    merged = [*_rows(private, "slices", part), *map(vars, slices)]
    slices_by_id = {(row["study_id"], row["sop_uid"]): row for row in merged}
    ordered = sorted(slices_by_id.values(), key=lambda row: tuple(row[name] for name in SLICES.names))
    _write(_part_path(private, "slices", part), ordered, SLICES)
    commit_point("uid-index:after")


def _exam_row(exam: ExamEntry) -> dict[str, str]:
    return vars(exam) | {f"{name}_key": normalise(getattr(exam, name)) for name in _KEYED}


def _part_path(private: Path, kind: str, part: str) -> Path:
    return private / kind / f"{part}.parquet"


def _rows(private: Path, kind: str, part: str) -> list[dict[str, Any]]:
    path = _part_path(private, kind, part)
    rows: list[dict[str, Any]] = pq.ParquetFile(path).read(use_threads=False).to_pylist() if path.exists() else []
    return rows


def _write(path: Path, rows: list[dict[str, Any]], schema: Any) -> None:  # noqa: ANN401  (pyarrow has no types)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    buffer = pa.BufferOutputStream()
    table = pa.Table.from_pylist(rows, schema)
    pq.write_table(table, buffer, compression="zstd", use_dictionary=False, write_statistics=False)
    content = buffer.getvalue().to_pybytes()
    if not path.exists() or path.read_bytes() != content:
        write_atomic(path, content, mode=0o600)


# --- looking up ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UidIndex:
    """The index of a store, read part by part.

    Raises
    ------
    UidIndexError
        If the private folder has none.
    """

    private: Path

    def __post_init__(self) -> None:
        if not self._paths("exams"):
            msg = f"no identifier index in {self.private}: run `python -m preprocess` on the DICOM tree first"
            raise UidIndexError(msg)

    def exams_of(self, patient_keys: Any, accession_keys: Any) -> Any:  # noqa: ANN401  (Arrow arrays)
        """Find the exams that have one of the patient ids or one of the accession numbers.

        Parameters
        ----------
        patient_keys, accession_keys
            Arrow arrays or lists of normalised texts; empty ones match nothing.

        Returns
        -------
        pyarrow.Table
            `EXAM_COLUMNS`, one row per exam, sorted by study.
        """
        wanted = {"patient_key": _distinct(patient_keys), "accession_key": _distinct(accession_keys)}
        return self._matches("exams", pa.schema([_EXAMS.field(name) for name in EXAM_COLUMNS]), wanted)

    def slices_of(self, sop_uids: Any) -> Any:  # noqa: ANN401  (Arrow arrays)
        """Find stored slices by their objects.

        Parameters
        ----------
        sop_uids
            Arrow array or list, each as in `SliceEntry.sop_uid`.

        Returns
        -------
        pyarrow.Table
            ``study_id``, ``series_id``, ``slice_index``, ``sop_uid``, one row per slice, sorted in this order. An
            object id that two studies share has several rows.
        """
        return self._matches("slices", SLICES, {"sop_uid": _distinct(sop_uids)})

    def objects_of_series(self, series_uids: Sequence[str]) -> Any:  # noqa: ANN401  (Arrow table)
        """Find the images of series in the headers of the tree that was converted last.

        Parameters
        ----------
        series_uids
            Series Instance UIDs.

        Returns
        -------
        pyarrow.Table
            ``series_uid``, ``sop_uid`` as in `SliceEntry`, ``position_mm`` (x, y, z in patient LPS).
        """
        wanted = _distinct(list(series_uids))
        found = [_OBJECTS.empty_table()]
        paths = sorted((self.private / "index").glob("*/[!.]*.parquet")) if len(wanted) else []
        for path in tqdm(paths, desc="headers", unit="batch", disable=None, delay=1):
            table = pq.ParquetFile(path).read(columns=_OBJECTS.names, use_threads=False)
            found.append(table.filter(pc.is_in(table["series_uid"], value_set=wanted)).select(_OBJECTS.names))
        objects = pa.concat_tables(found)
        numbered = pc.binary_join_element_wise(
            objects["sop_uid"], pc.cast(pc.add(objects["frame"], 1), pa.string()), "#"
        )
        names = pc.coalesce(numbered, objects["sop_uid"])
        return objects.drop_columns("frame").set_column(1, "sop_uid", names)

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
            Naming the rows (not the UIDs) that no stored slice matches, or that several do.
        """
        found: dict[str, list[tuple[str, int]]] = {}
        for row in self.slices_of(list(sop_uids)).to_pylist():
            found.setdefault(row["sop_uid"], []).append((row["series_id"], row["slice_index"]))
        faulty = [str(line) for line, name in enumerate(sop_uids, start=2) if len(found.get(name, ())) != 1]
        if faulty:
            msg = (
                f"templates: line(s) {', '.join(faulty)} name no slice of a sagittal T2 series in the store, or an "
                "object id that several have; choose templates among converted slices (see the file lists in the "
                "private folder)"
            )
            raise UidIndexError(msg)
        return [found[name][0] for name in sop_uids]

    def _paths(self, kind: str) -> list[Path]:
        return sorted((self.private / kind).glob("[!.]*.parquet"))

    def _tables(self, kind: str, columns: Sequence[str]) -> Iterator[Any]:
        for path in tqdm(self._paths(kind), desc=f"index of {kind}", unit="part", disable=None, delay=1):
            yield pq.ParquetFile(path).read(columns=list(columns), use_threads=False)

    def _matches(self, kind: str, schema: Any, wanted: dict[str, Any]) -> Any:  # noqa: ANN401  (Arrow tables)
        if not any(map(len, wanted.values())):
            return schema.empty_table()
        found = [schema.empty_table()]
        for table in in_batches(self._tables(kind, schema.names)):
            masks = [pc.is_in(table[name], value_set=values) for name, values in wanted.items()]
            found.append(table.filter(masks[0] if len(masks) == 1 else pc.or_(*masks)))
        return pa.concat_tables(found)


def in_batches(tables: Iterable[Any]) -> Iterator[Any]:
    """Join small tables to some of at least `LOOKUP_ROWS` rows each (the last may have fewer)."""
    waiting: list[Any] = []
    for table in tables:
        waiting.append(table)
        if sum(map(len, waiting)) >= LOOKUP_ROWS:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)


def _distinct(values: Any) -> Any:  # noqa: ANN401  (Arrow arrays)
    array = values if isinstance(values, (pa.Array, pa.ChunkedArray)) else pa.array(values, pa.string())
    distinct = pc.unique(array)
    return distinct.filter(pc.fill_null(pc.not_equal(distinct, ""), fill_value=False))


# --- mapping table ---------------------------------------------------------------------------------------------------


def write_mapping_table(private: Path, out: Path) -> int:
    """Write identifiers and pseudonyms of every exam as CSV (0600), for re-identification or later erasure.

    Parameters
    ----------
    private
        Private folder of a store.
    out
        The table, columns of `MAPPING_COLUMNS`, sorted by study. Replaced only if it is such a table.

    Returns
    -------
    int
        Exams written.

    Raises
    ------
    UidIndexError
        If there is no index, or `out` lies in a folder made to be shared, or is another file.
    """
    index = UidIndex(private)
    check_mapping_path(out)
    with stream_atomic(out, mode=0o600) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(MAPPING_COLUMNS)
        count = 0
        for table in index._tables("exams", tuple(MAPPING_COLUMNS.values())):
            columns = [table[name].to_pylist() for name in MAPPING_COLUMNS.values()]
            writer.writerows(zip(*columns, strict=True))
            count += len(table)
    return count


def check_mapping_path(out: Path) -> None:
    """Refuse a path that a mapping table may not have, as `write_mapping_table` does."""
    for path in (out.absolute(), out.resolve()):
        inside = [part for part in path.parts if part.endswith(_SHAREABLE_SUFFIXES)]
        if inside:
            msg = f"the mapping table may not be written into {inside[0]}, which is made to be shared: use another path"
            raise UidIndexError(msg)
    if out.exists() and not _is_mapping_table(out):
        msg = f"{out} exists and is no mapping table: choose another path"
        raise UidIndexError(msg)


def _is_mapping_table(path: Path) -> bool:
    if not path.is_file():
        return False
    header = (",".join(MAPPING_COLUMNS) + "\n").encode()
    with path.open("rb") as file:
        return file.read(len(header)) == header
