"""The slice store: schema, writer, reader and verification.

Layout of ``X.zarr`` (Zarr v3, readable by any implementation)::

    zarr.json                          root group: schema version, key id
    ab/<series_id>/zarr.json           one array (S, H, W) with typed attributes; ab = first two characters of study_id
    ab/<series_id>/c.0.0.0             its only shard: chunk = one slice, blosc-zstd-bitshuffle, then crc32c
    ab/<series_id>/commit.json         manifest row and file sizes: a series that has it was renamed into place whole
    manifest/<part>.parquet            rows of the series whose study_id begins with <part>, made from the commit files
    candidates/<part>.parquet          every stack of the same exams, taken or not, with its code and evidence

A missing shard would read as zeros without an error, so the reader trusts the manifest, not the array: a store that is
not exactly what its manifest says is refused, and every read is checked against the content hash.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from preprocess.accounting import StackOutcome
from preprocess.commit import canonical_json

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SCHEMA_VERSION = 2
"""Raised when the layout or the meaning of a column changes; other versions are refused."""

SHARD_NAME = "c.0.0.0"
"""The only shard of a series: one file, because the chunk key separator is a dot."""

COMMIT_NAME = "commit.json"

HASHED_ROWS = 10_000
"""Rows that are text at one time while contents are hashed."""

PART_CHARACTERS = (1, 2)
"""Characters of the study pseudonym that name a part of the manifest: 32 parts, or 1,024 for a store of millions."""

DEIDENTIFICATION = {
    "patient_identity_removed": "YES",
    "deidentification_method": "typed allow-list; keyed pseudonyms (HMAC-SHA256)",
    "deidentification_method_code": "113100",
}
"""What the store says about its own de-identification, in the words of DICOM PS3.15, Annex E."""


class StoreError(ValueError):
    """A slice store that cannot be used as asked."""


class IncompleteStoreError(StoreError):
    """A slice store that is not exactly what its manifest says."""


@dataclass(frozen=True)
class SeriesRecord:
    """Everything but pixels that the store knows of a series: its array attributes and its manifest row."""

    patient_id: str
    study_id: str
    series_id: str
    source_id: str
    """Pseudonym of the set of objects it was made from."""
    contrast: str
    confidence: str
    evidence: str
    """``;``-joined codes that selected it."""
    num_slices: int
    rows: int
    columns: int
    dtype: str
    spacing_slice_mm: float
    spacing_row_mm: float
    spacing_column_mm: float
    positions_mm: tuple[float, ...]
    affine: tuple[float, ...]
    transpose: bool
    flip_rows: bool
    flip_columns: bool
    uneven_spacing: bool
    missing_mm: tuple[float, ...]
    """Where slices are missing along the normal, relative to the first; empty unless gaps were allowed."""
    inverted: bool
    padding_value: int | None
    """Stored value of pixels outside the scanned region, if the headers name one."""
    rescale_slope: tuple[float, ...]
    rescale_intercept: tuple[float, ...]
    lossy: bool
    study_date: str
    """Shifted ISO date of the exam; empty where dates are dropped."""
    manufacturer: str
    scanning_sequence: str
    sequence_variant: str
    acquisition_type: str
    patient_position: str
    echo_time_ms: float | None
    repetition_time_ms: float | None
    inversion_time_ms: float | None
    echo_train_length: float | None
    flip_angle_deg: float | None
    field_strength_t: float | None
    slice_thickness_mm: float | None
    averages: float | None
    bandwidth_hz: float | None


_ARROW_TYPES = {
    "str": pa.string(),
    "int": pa.int64(),
    "int | None": pa.int64(),
    "float": pa.float64(),
    "float | None": pa.float64(),
    "bool": pa.bool_(),
    "tuple[float, ...]": pa.list_(pa.float64()),
}
MANIFEST_SCHEMA = pa.schema(
    [(field.name, _ARROW_TYPES[str(field.type)]) for field in fields(SeriesRecord)]
    + [("content_hash", pa.string()), ("shard_bytes", pa.int64())]
)
"""Columns of the manifest: the record, the hash of attributes and pixels, and the size of the shard file."""


CANDIDATES_SCHEMA = pa.schema(
    [
        (field.name, {"str": pa.string(), "int": pa.int64()}.get(str(field.type), pa.float64()))
        for field in fields(StackOutcome)
    ]
)
"""Columns of the candidates: one row per stack of every exam."""


def root_attributes(path: Path) -> dict[str, Any]:
    """Read the attributes of a store.

    Raises
    ------
    StoreError
        If the folder is no store of this schema version.
    """
    try:
        attributes: dict[str, Any] = json.loads((path / "zarr.json").read_bytes())["attributes"]
        version = attributes["schema_version"]
    except (OSError, ValueError, KeyError, TypeError):
        msg = f"{path} is not a slice store (no readable zarr.json of one); make it with `python -m preprocess`"
        raise StoreError(msg) from None
    if version != SCHEMA_VERSION:
        msg = f"{path} has schema version {version}, this program reads {SCHEMA_VERSION}; convert again"
        raise StoreError(msg)
    return attributes


def series_path(store: Path, study_id: str, series_id: str) -> Path:
    """Folder of a series; fanned out by study, so that a manifest partition is rebuilt from its own folders."""
    return store / study_id[:2] / series_id


def fan_out(store: Path, part: str = "") -> Iterator[Path]:
    """Yield the folders that hold the series of a part, in order."""
    names = sorted(entry.name for entry in os.scandir(store) if len(entry.name) == 2 and entry.is_dir())
    return (store / name for name in names if name.startswith(part))


def record_attributes(record: SeriesRecord) -> dict[str, Any]:
    """Return a record as the JSON attributes of its array."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(record).items()}


def content_hash(attributes: dict[str, Any], pixels_SHW: np.ndarray) -> str:
    """SHA-256 (hexadecimal) of a series: canonical JSON of its attributes, then its pixels in little-endian C order."""
    digest = hashlib.sha256(canonical_json(attributes).encode())
    little = pixels_SHW.astype(pixels_SHW.dtype.newbyteorder("<"), order="C", copy=False)
    digest.update(np.ascontiguousarray(little).data)
    return digest.hexdigest()


def hash_contents(table: Any) -> str:  # noqa: ANN401  (pyarrow has no types)
    """Hash the contents of series: SHA-256 of the canonical JSON of their sorted (id, hash) pairs, few rows at a time.

    Parameters
    ----------
    table
        Arrow table with ``series_id`` and ``content_hash``, in any order.
    """
    digest = hashlib.sha256(b"[")
    ordered = table.select(["series_id", "content_hash"]).sort_by("series_id")
    for number, batch in enumerate(ordered.to_batches(max_chunksize=HASHED_ROWS)):
        pairs = zip(batch["series_id"].to_pylist(), batch["content_hash"].to_pylist(), strict=True)
        text = ",".join(canonical_json(pair) for pair in pairs)
        digest.update(f"{',' if number else ''}{text}".encode())
    digest.update(b"]")
    return digest.hexdigest()
