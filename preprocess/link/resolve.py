"""Keys of label rows and image names → exams and slices of the store, for millions of rows at once.

Everything is a column: the keys of a file, the exams and slices of the index that match any of them, and what the
manifest says of those. Joins pair rows with candidates; a row is linked when exactly one candidate is left. Shapes: R
rows of a file, P pairs of row and candidate.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from preprocess.link.uid_index import SLICES, UidIndex, in_batches
from preprocess.store.read import SliceStore, complete_partitions
from preprocess.store.schema import MANIFEST_SCHEMA

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

REASONS = {
    "linked": "written under pseudonyms",
    "linked_partly": "written, but only its boxes, polygons and masks: other shapes (points, tag, ...) are left behind",
    "unmatched": "no exam of the index has this patient or accession number",
    "no_key": "neither accession number nor patient id in the row",
    "multi_exam": "the patient has several exams and the row no accession number (or exams share the number)",
    "shared_patient_id": "patients of several issuers have this id: add IssuerOfPatientID or AccessionNumber",
    "patient_mismatch": "the exam of this accession number belongs to another patient",
    "not_stored": "the exam was seen, but none of its series is in the store; the report says why",
    "slice_unmatched": "the slice is none of a series in the store, or of another exam than the row (a frame of a "
    "multi-frame object is <SOPInstanceUID>#<frame number>)",
    "series_unmatched": "the series is none in the store, or is no longer in the private index: name the file by the "
    "series_id that `export` gives",
    "slice_ambiguous": "several stored slices (or series) have this id: add AccessionNumber or PatientID, or name the "
    "file by pseudonyms",
    "duplicate": "the same key occurs earlier in this file",
    "bad_size": "the annotated image size is not the size of the stored slice",
    "bad_coordinates": "a coordinate is missing or no number, or a mask does not fit its rectangle or image",
    "bad_mask": "no mask: neither PNG (grey or palette) nor NIfTI, or damaged, or with values other than 1 to 5 or one "
    "single",
    "bad_grid": "the NIfTI mask does not lie on the grid of the stored series (size, spacing, directions or origin), "
    "and nothing is resampled",
    "empty_mask": "the mask marks no pixel",
}
"""Reason code of a row → what it means."""

CODES = {reason: number for number, reason in enumerate(REASONS)}
"""Reason code → the number that stands for it in arrays."""

KEYS = pa.schema([(name, pa.string()) for name in ("accession", "patient", "issuer", "sop_uid", "reader")])
"""What identifies a row, empty where it says nothing: the first three normalised, the object id without spaces; several
readers may each have a row. Instead of an object id, ``<study_id>/<series_id>/<slice_index>`` names a slice by
pseudonyms, `series_key` a whole series."""

WHOLE_SERIES = -1
"""Slice index of what names a series."""

_SERIES = (
    "patient_id", "study_id", "series_id", "rows", "columns", "transpose", "flip_rows", "flip_columns", "num_slices",
    "affine", "missing_mm",
)  # fmt: skip
_PSEUDONYM = "[a-z2-7]{26}"
_SLICE_NAME = re.compile(rf"(?:.*/)?({_PSEUDONYM})/({_PSEUDONYM})/0*([0-9]{{1,6}})")
_SERIES_NAME = re.compile(_PSEUDONYM)


def slice_key(name: str) -> str:
    """Return what a picture is looked up by, given its name without suffix: three pseudonyms, else an object id."""
    found = _SLICE_NAME.fullmatch(name)
    return "/".join(found.groups()) if found else name.rpartition("/")[2]


def series_key(name: str) -> str:
    """Return what a volume is looked up by, given its pseudonym or its Series Instance UID."""
    return f"/{name}" if _SERIES_NAME.fullmatch(name) else f"//{name}"


@dataclass(frozen=True)
class Resolution:
    """What each row of a file stands for."""

    codes_R: np.ndarray
    """int8 numbers of `CODES`."""
    matches_R: np.ndarray
    """Row in `Book.exams`, or in `Book.slices` where rows name slices; -1 for none."""


@dataclass(frozen=True)
class Book:
    """What the identifiers of some files stand for. Private.

    Attributes
    ----------
    exams
        Exams of the index, with ``stored`` (any series) and ``same_patient`` (as in the store).
    slices
        Slices of the index whose series is in the store: ``study_id``, ``slice_index``, ``sop_uid`` and ``series``, the
        row in `series`.
    series
        Facts of the manifest about the series of these slices.
    origins
        Pseudonyms of the series asked for by their Series Instance UID → position in patient LPS, mm, of the first
        pixel of the file of the first slice: the store itself keeps no absolute position.
    """

    exams: Any
    slices: Any
    series: Any
    origins: dict[str, tuple[float, ...]]

    @classmethod
    def open(cls, store: Path, private: Path, keys: Sequence[Any]) -> Book:
        """Look up all keys, reading index and manifest once, part by part.

        Parameters
        ----------
        store, private
            The store and its private folder.
        keys
            Tables of `KEYS`, one per file.

        Raises
        ------
        ValueError
            If the store is incomplete or its index is missing.
        """
        index = UidIndex(private)
        asked = pa.concat_tables([KEYS.empty_table(), *keys])
        exams = index.exams_of(asked["patient"], asked["accession"])
        names = pc.unique(asked["sop_uid"].filter(pc.match_substring(asked["sop_uid"], "/"))).to_pylist()
        by_uid, origins = _of_series(index, [name for name in names if name.startswith("//")])
        slices = pa.concat_tables([index.slices_of(asked["sop_uid"]), by_uid])
        ours = [tuple(name.split("/")) for name in names if not name.startswith("//")]
        series_ids = pa.concat_arrays(
            [slices["series_id"].combine_chunks(), pa.array([n[1] for n in ours], pa.string())]
        )
        study_ids = pa.concat_arrays([pc.unique(table["study_id"]) for table in (exams, slices)])
        studies, series = _stored(store, study_ids, series_ids)
        at = pc.index_in(exams["study_id"], value_set=studies["study_id"])
        same = pc.equal(studies["patient_id"].take(at), exams["patient_id"])
        exams = exams.append_column("stored", pc.is_valid(at)).append_column("same_patient", pc.fill_null(same, False))
        slices = pa.concat_tables([slices, _by_pseudonym(ours, series)])
        slices = slices.append_column("series", pc.index_in(slices["series_id"], value_set=series["series_id"]))
        slices = slices.filter(pc.is_valid(slices["series"])).drop_columns("series_id")
        return cls(exams.combine_chunks(), slices.combine_chunks(), series, origins)

    def places(self, matches: np.ndarray, *, by_slice: bool) -> Any:  # noqa: ANN401  (Arrow table)
        """Pseudonyms and geometry of matched exams or slices, in the order given; nulls for -1."""
        rows = pa.array(matches, mask=matches < 0)
        if not by_slice:
            return self.exams.select(["patient_id", "study_id"]).take(rows)
        slices = self.slices.select(["slice_index", "series"]).take(rows)
        return self.series.take(slices["series"]).append_column("slice_index", slices["slice_index"])


def _of_series(index: UidIndex, names: Sequence[str]) -> tuple[Any, dict[str, tuple[float, ...]]]:
    """Find whole series by ``//<Series Instance UID>``: rows as of slices, and where each begins."""
    objects = index.objects_of_series([name.removeprefix("//") for name in names])
    places: dict[tuple[str, str, str], None] = {}
    origins: dict[str, tuple[float, ...]] = {}
    uids = dict(zip(objects["sop_uid"].to_pylist(), objects["series_uid"].to_pylist(), strict=True))
    positions = dict(zip(objects["sop_uid"].to_pylist(), objects["position_mm"].to_pylist(), strict=True))
    for row in index.slices_of(objects["sop_uid"]).to_pylist():
        places[row["study_id"], row["series_id"], f"//{uids[row['sop_uid']]}"] = None
        if row["slice_index"] == 0:
            origins[row["series_id"]] = tuple(positions[row["sop_uid"]])
    return _slice_rows([(study, series, WHOLE_SERIES, name) for study, series, name in places]), origins


def _by_pseudonym(names: Sequence[tuple[str, ...]], series: Any) -> Any:  # noqa: ANN401  (Arrow tables)
    """Rows as of slices for what the store holds of ``/<series>`` and ``<study>/<series>/<slice>``."""
    columns = (series[name].to_pylist() for name in ("series_id", "study_id", "num_slices"))
    known = {series_id: (study_id, count) for series_id, study_id, count in zip(*columns, strict=True)}
    rows = []
    for study_id, series_id, *index in names:
        stored_study, count = known.get(series_id, ("", 0))
        if not index and count:
            rows.append((stored_study, series_id, WHOLE_SERIES, f"/{series_id}"))
        elif index and stored_study == study_id and int(index[0]) < count:
            rows.append((study_id, series_id, int(index[0]), f"{study_id}/{series_id}/{index[0]}"))
    return _slice_rows(rows)


def _slice_rows(rows: Sequence[tuple[str, str, int, str]]) -> Any:  # noqa: ANN401  (Arrow table)
    columns = list(zip(*rows, strict=True)) or [()] * len(SLICES.names)
    return pa.table([pa.array(column, kind.type) for column, kind in zip(columns, SLICES, strict=True)], SLICES)


def _stored(store: Path, study_ids: Any, series_ids: Any) -> tuple[Any, Any]:  # noqa: ANN401  (Arrow arrays)
    """Distinct (study, patient) of the studies, and `_SERIES` of the series, that a complete store holds."""
    empty = pa.schema([MANIFEST_SCHEMA.field(name) for name in _SERIES]).empty_table()
    studies, series = [empty.select(["study_id", "patient_id"])], [empty]
    for table in in_batches(_manifest(store, empty.schema)):
        found = table.filter(pc.is_in(table["study_id"], value_set=study_ids)).select(["study_id", "patient_id"])
        studies.append(found.group_by(found.column_names).aggregate([]))
        series.append(table.filter(pc.is_in(table["series_id"], value_set=series_ids)))
    return pa.concat_tables(studies), pa.concat_tables(series)


def _manifest(store: Path, schema: Any) -> Iterator[Any]:  # noqa: ANN401  (Arrow schema and tables)
    """Yield the manifest by partition, each checked to be complete."""
    for partition in tqdm(complete_partitions(store), desc="store", unit="partition", disable=None, delay=1):
        manifest = SliceStore.open(store, partition=partition).manifest
        yield pa.Table.from_pandas(manifest[list(_SERIES)], schema, preserve_index=False)


def resolve(keys: Any, book: Book, *, by_slice: bool) -> Resolution:  # noqa: ANN401  (Arrow table)
    """Find the exam, or the slice, of every row.

    An accession number decides where there is one, with patient id and issuer as a check and to tell exams apart that
    share it; else the patient id, if one exam has it; else the object id alone.

    Parameters
    ----------
    keys
        `KEYS` of R rows.
    book
        Made from these keys, among others.
    by_slice
        Rows name slices.
    """
    keys = keys.combine_chunks()
    codes_R, exams_R = _resolve_exams(keys, book.exams)
    matches_R = exams_R
    if by_slice:
        codes_R, matches_R = _resolve_slices(keys, book, codes_R, exams_R)
    linked_R = codes_R == CODES["linked"]
    readers_R = keys["reader"].to_pandas()
    found = pa.array(matches_R[linked_R])
    if by_slice:  # one slice may go by its object id and by pseudonyms
        facts = {name: _to_numpy(book.slices[name].take(found)) for name in ("series", "slice_index")}
    else:
        facts = {"exam": matches_R[linked_R]}
    repeated = pd.DataFrame(facts | {"reader": readers_R[linked_R].to_numpy()}).duplicated().to_numpy()
    codes_R[np.flatnonzero(linked_R)[repeated]] = CODES["duplicate"]
    return Resolution(codes_R, matches_R)


def _resolve_exams(keys: Any, exams: Any) -> tuple[np.ndarray, np.ndarray]:  # noqa: ANN401  (Arrow tables)
    by_accession_R, by_patient_R = (_to_numpy(pc.not_equal(keys[name], "")) for name in ("accession", "patient"))
    patients = pc.if_else(pa.array(by_accession_R), "", keys["patient"])
    pairs = (_pairs(keys["accession"], exams["accession_key"]), _pairs(patients, exams["patient_key"]))
    row_P, exam_P = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    agrees_P = np.ones(len(row_P), bool)
    for name in ("patient", "issuer"):
        asked = keys[name].take(row_P)
        same = pc.or_(pc.equal(asked, ""), pc.equal(asked, exams[f"{name}_key"].take(exam_P)))
        agrees_P &= _to_numpy(same)
    agreed_R = np.bincount(row_P[agrees_P], minlength=len(keys)) > 0
    left_P = agrees_P | ~agreed_R[row_P]
    row_P, exam_P = row_P[left_P], exam_P[left_P]
    count_R, exam_R = _count_and_first(row_P, exam_P, len(keys))
    patient_E = _to_numpy(pc.index_in(exams["patient_id"], value_set=pc.unique(exams["patient_id"])))
    several_R = np.zeros(len(keys), bool)
    several_R[row_P[patient_E[exam_P] != patient_E[exam_R[row_P]]]] = True
    stored_E, same_E = (np.append(_to_numpy(exams[name]), False) for name in ("stored", "same_patient"))  # last: none
    rules = {
        "no_key": ~by_accession_R & ~by_patient_R,
        "unmatched": (count_R == 0) | (~by_accession_R & ~agreed_R),
        "shared_patient_id": several_R & ~by_accession_R,
        "multi_exam": count_R > 1,
        "patient_mismatch": ~agreed_R | (stored_E[exam_R] & ~same_E[exam_R]),
        "not_stored": ~stored_E[exam_R],
    }
    return _first_rule(rules, len(keys)), exam_R


def _resolve_slices(
    keys: Any,  # noqa: ANN401  (Arrow table)
    book: Book,
    codes_R: np.ndarray,
    exam_R: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Refine what the other keys said: the slice must be of their exam; alone, it is enough."""
    linked_R = codes_R == CODES["linked"]
    alone_R = (codes_R == CODES["no_key"]) & _to_numpy(pc.not_equal(keys["sop_uid"], ""))
    row_P, slice_P = _pairs(keys["sop_uid"], book.slices["sop_uid"])
    exam_P = pa.array(exam_R[row_P], mask=exam_R[row_P] < 0)
    same = pc.equal(book.slices["study_id"].take(slice_P), book.exams["study_id"].take(exam_P))
    left_P = alone_R[row_P] | (linked_R[row_P] & _to_numpy(pc.fill_null(same, False)))
    count_R, slice_R = _count_and_first(row_P[left_P], slice_P[left_P], len(keys))
    rules = {"slice_unmatched": count_R == 0, "slice_ambiguous": count_R > 1}
    return np.where(linked_R | alone_R, _first_rule(rules, len(keys)), codes_R), slice_R


def _first_rule(rules: dict[str, np.ndarray], num_rows: int) -> np.ndarray:
    """Name the first rule that holds for each row, else ``linked``."""
    codes_R = np.full(num_rows, CODES["linked"], np.int8)
    for reason, holds_R in reversed(rules.items()):
        codes_R[holds_R] = CODES[reason]
    return codes_R


def _pairs(left: Any, right: Any) -> tuple[np.ndarray, np.ndarray]:  # noqa: ANN401  (Arrow arrays)
    """Positions in `left` and in `right` of all equal texts, sorted; empty texts equal nothing."""
    rows = pa.table({"key": left, "row": np.arange(len(left))})
    candidates = pa.table({"key": right, "match": np.arange(len(right))})
    joined = rows.filter(pc.not_equal(rows["key"], "")).join(candidates, "key", join_type="inner")
    row_P, match_P = _to_numpy(joined["row"]), _to_numpy(joined["match"])
    order = np.lexsort((match_P, row_P))
    return row_P[order], match_P[order]


def _count_and_first(row_P: np.ndarray, match_P: np.ndarray, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Candidates per row, and one of them (-1 where there is none)."""
    match_R = np.full(num_rows, -1, np.int64)
    match_R[row_P[::-1]] = match_P[::-1]
    return np.bincount(row_P, minlength=num_rows), match_R


def _to_numpy(array: Any) -> np.ndarray:  # noqa: ANN401  (Arrow array)
    return np.asarray(array.to_numpy(zero_copy_only=False) if isinstance(array, pa.Array) else array.to_numpy())
