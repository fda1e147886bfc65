"""Tables of labels and gradings → the store's pseudonyms.

A row is linked by accession number where it has one, else by patient id if that patient has exactly one exam in the
index. Key columns are dropped; of the others only numbers pass, because text may identify.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from preprocess.deidentify import normalise
from preprocess.link import source
from preprocess.link.resolve import CODES, KEYS, Book, resolve
from preprocess.link.source import LinkError, in_chunks

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

KEY_COLUMNS = {
    "PatientID": "patient",
    "AccessionNumber": "accession",
    "SOPInstanceUID": "sop_uid",
    "IssuerOfPatientID": "issuer",
}
"""Columns that identify → the key they are. They are looked up and dropped; the issuer only helps another."""

MAX_DIGITS = 7
"""Longest whole number that passes as an answer or a measurement: dates, telephone and record numbers are longer."""

_WHOLE = rf"\d{{1,{MAX_DIGITS}}}"
_NUMERIC = re.compile(rf"\s*([-+]?({_WHOLE}(\.\d*)?|\.\d+)([eE][-+]?\d{{1,3}})?|-?{_WHOLE}(;-?{_WHOLE})*)?\s*")


@dataclass(frozen=True)
class LabelTable:
    """A CSV of which keys and column types are known."""

    path: Path
    header: tuple[str, ...]
    passing: tuple[str, ...]
    """Columns that may be written."""
    keys: Any
    """Table of `KEYS`."""
    lines: np.ndarray
    """Line on which each row begins."""

    @property
    def name(self) -> str:
        """Of the file; the linked one keeps it."""
        return self.path.name

    out_name = name

    @property
    def by_slice(self) -> bool:
        """Whether rows name slices."""
        return "SOPInstanceUID" in self.header

    @property
    def withheld(self) -> tuple[str, ...]:
        """Columns that hold text."""
        return tuple(name for name in self.header if name not in self.passing and name not in KEY_COLUMNS)

    def translate(self, book: Book, out: TextIO) -> np.ndarray:
        """Write the linked rows; return the number in `CODES` of every row."""
        resolution = resolve(self.keys, book, by_slice=self.by_slice)
        ids = ["patient_id", "study_id", *(("series_id", "slice_index") if self.by_slice else ())]
        kept = [self.header.index(name) for name in self.passing]
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([*ids, *self.passing])
        start = 0
        for rows in self._chunks():
            here = np.flatnonzero(resolution.codes_R[start : start + len(rows)] == CODES["linked"])
            places = book.places(resolution.matches_R[start + here], by_slice=self.by_slice).select(ids)
            for row, names in zip(here, zip(*(column.to_pylist() for column in places), strict=True), strict=True):
                writer.writerow([*names, *(rows[row][column] for column in kept)])
            start += len(rows)
        return resolution.codes_R

    def _chunks(self) -> Iterator[list[list[str]]]:
        """Yield the rows again, as long as the first time."""
        rows = (cells for _, cells in islice(_read_table(self.path), 1, None))
        bar = tqdm(rows, desc="link", unit="row", total=len(self.lines), disable=None, delay=1)
        chunks = in_chunks(bar)
        for start in range(0, len(self.lines), source.CHUNK_ROWS):
            chunk = next(chunks, [])
            if len(chunk) != min(source.CHUNK_ROWS, len(self.lines) - start):
                msg = f"{self.path} changed while it was read; link it again"
                raise LinkError(msg)
            yield chunk


def scan_table(path: Path, keep_text: frozenset[str] = frozenset()) -> LabelTable:
    """Read the keys of a CSV, and find the columns that may pass.

    Parameters
    ----------
    path
        Has at least one of `KEY_COLUMNS` but the issuer.
    keep_text
        Names of text columns that may pass.

    Raises
    ------
    LinkError
        If it is no such table.
    """
    rows = _read_table(path)
    header = _checked_header(path, next(rows, (1, []))[1])
    places = {KEY_COLUMNS.get(name, name): column for column, name in enumerate(header)}
    others = [name for name in header if name not in KEY_COLUMNS]
    numeric = set(others)
    keys, lines = [], []
    for chunk in in_chunks(rows):
        lines.append(np.array([line for line, _ in chunk], np.int64))
        keys.append(keys_of([cells for _, cells in chunk], places))
        for name in sorted(numeric):
            if not all(_NUMERIC.fullmatch(cells[places[name]]) for _, cells in chunk):
                numeric.remove(name)
    passing = tuple(name for name in others if name in numeric or name in keep_text)
    table = pa.concat_tables([KEYS.empty_table(), *keys]).combine_chunks()
    return LabelTable(path, header, passing, table, np.concatenate([np.zeros(0, np.int64), *lines]))


def _checked_header(path: Path, header: Sequence[str]) -> tuple[str, ...]:
    wanted = [name for name in KEY_COLUMNS if name != "IssuerOfPatientID"]
    if not set(wanted) & set(header):
        msg = f"{path} has none of the columns {', '.join(wanted)}; name the key column so"
        raise LinkError(msg)
    if len(set(header)) < len(header):
        msg = f"{path}: column names must differ and no row may have more cells than the header"
        raise LinkError(msg)
    return tuple(header)


def keys_of(rows: list[list[str]], places: dict[str, int]) -> Any:  # noqa: ANN401  (Arrow table)
    """Make a table of `KEYS` from cells, given the column of each key that there is."""
    columns = {}
    for name in KEYS.names:
        texts = [cells[places[name]] for cells in rows] if name in places else [""] * len(rows)
        columns[name] = texts if name == "reader" else list(map(_object_id if name == "sop_uid" else normalise, texts))
    return pa.table(columns, KEYS)


def _object_id(text: str) -> str:
    return text.strip().lstrip("/")  # what begins so names a whole series, which a row is none of


def _read_table(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (line, cells) of the header and every row, filled up to the header's length."""
    if not path.is_file():
        msg = f"table not found: {path}"
        raise LinkError(msg)
    width, line = 0, 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            for cells in reader:
                width = width or len(cells)
                if len(cells) > width:
                    msg = f"{path}: column names must differ and no row may have more cells than the header"
                    raise LinkError(msg)
                if cells:
                    yield line, cells + [""] * (width - len(cells))
                line = reader.line_num + 1
    except (UnicodeDecodeError, csv.Error) as error:
        msg = f"{path} is not a UTF-8 CSV file ({type(error).__name__}); export it as one"
        raise LinkError(msg) from None
