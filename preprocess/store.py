"""The slice store: schema, writer, reader and verification.

Layout of ``X.zarr`` (Zarr v3, readable by any implementation)::

    zarr.json                          root group: schema version, key id
    ab/<series_id>/zarr.json           one array (S, H, W) with typed attributes; ab = first two characters of study_id
    ab/<series_id>/c.0.0.0             its only shard: chunk = one slice, blosc-zstd-bitshuffle, then crc32c
    ab/<series_id>/commit.json         manifest row and file sizes: a series that has it was renamed into place whole
    manifest/<c>.parquet               rows of all series whose study_id begins with c, rebuilt from the commit files

A missing shard would read as zeros without an error, so the reader trusts the manifest, not the array: a store that is
not exactly what its manifest says is refused, and every read is checked against the content hash.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from numcodecs import blosc  # type: ignore[import-untyped]
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.storage import LocalStore

from preprocess.commit import (
    PARTIAL_PREFIX,
    canonical_json,
    commit_point,
    committed_directory,
    content_id,
    sweep_partials,
    write_atomic,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd

SCHEMA_VERSION = 1
"""Raised when the layout or the meaning of a column changes; other versions are refused."""

SHARD_NAME = "c.0.0.0"
"""The only shard of a series: one file, because the chunk key separator is a dot."""

COMMIT_NAME = "commit.json"


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
    inverted: bool
    rescale_slope: tuple[float, ...]
    rescale_intercept: tuple[float, ...]
    lossy: bool
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


@dataclass(frozen=True)
class Finding:
    """One fault of a store."""

    series_id: str
    fault: str
    """``uncommitted``, ``not_in_manifest``, ``missing_series``, ``missing_shard``, ``wrong_size`` or ``corrupted``."""


# --- writing ---------------------------------------------------------------------------------------------------------


def use_one_thread() -> None:
    """Keep this process's compression and Zarr input/output on one thread: workers are spread by process."""
    blosc.set_nthreads(1)
    zarr.config.set({"threading.max_workers": 1, "async.concurrency": 2})


def create_store(path: Path, *, key_id: str) -> None:
    """Make an empty store, or check that an existing one may be written to with this key.

    Raises
    ------
    StoreError
        If the store has another schema version or its pseudonyms were made with another key.
    """
    root = path / "zarr.json"
    if not root.exists():
        attributes = {"kind": "lbp_ray slice store", "schema_version": SCHEMA_VERSION, "key_id": key_id}
        content = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
        write_atomic(root, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())
    attributes = _root_attributes(path)
    if attributes["key_id"] != key_id:
        msg = (
            f"{path} was made with pseudonym key {attributes['key_id']}, this key is {key_id}: the same patient would "
            "get two names; use the first key (--key-file) or another --out"
        )
        raise StoreError(msg)


def _root_attributes(path: Path) -> dict[str, Any]:
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


def write_series(store: Path, record: SeriesRecord, pixels_SHW: np.ndarray) -> None:
    """Commit one series: a whole array in one shard, under its final name only when it is on the disk.

    Parameters
    ----------
    store
        An existing store.
    record
        Its attributes.
    pixels_SHW
        int16 or uint16 stored values of shape (``num_slices``, ``rows``, ``columns``), in native byte order.
    """
    assert pixels_SHW.shape == (record.num_slices, record.rows, record.columns)
    final = series_path(store, record.study_id, record.series_id)
    with committed_directory(final, point="series") as partial:
        array = zarr.create_array(
            LocalStore(partial),
            shape=pixels_SHW.shape,
            dtype=pixels_SHW.dtype,
            chunks=(1, *pixels_SHW.shape[1:]),
            shards=pixels_SHW.shape,
            compressors=[BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle"), Crc32cCodec()],
            chunk_key_encoding={"name": "default", "separator": "."},
            fill_value=0,
            dimension_names=("slice", "row", "column"),
            attributes=_attributes(record),
            # Else an all-zero slice is left out, and cannot be told from a lost one.
            config={"write_empty_chunks": True},
        )
        array[...] = pixels_SHW
        commit = {
            "row": {
                **_attributes(record),
                "content_hash": content_hash(_attributes(record), pixels_SHW),
                "shard_bytes": (partial / SHARD_NAME).stat().st_size,
            },
            "array_sha256": hashlib.sha256((partial / "zarr.json").read_bytes()).hexdigest(),
        }
        (partial / COMMIT_NAME).write_text(canonical_json(commit))


def _attributes(record: SeriesRecord) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(record).items()}


def content_hash(attributes: dict[str, Any], pixels_SHW: np.ndarray) -> str:
    """SHA-256 (hexadecimal) of a series: canonical JSON of its attributes, then its pixels in little-endian C order."""
    digest = hashlib.sha256(canonical_json(attributes).encode())
    little = pixels_SHW.astype(pixels_SHW.dtype.newbyteorder("<"), order="C", copy=False)
    digest.update(np.ascontiguousarray(little).data)
    return digest.hexdigest()


def sweep_store(store: Path) -> None:
    """Delete what killed writers left in a store. Only for the one job that holds its lock."""
    for folder in [store, store / "manifest", *_fan_out(store)]:
        sweep_partials(folder)


def _fan_out(store: Path) -> Iterator[Path]:
    """Folders that hold series, in order."""
    names = sorted(entry.name for entry in os.scandir(store) if len(entry.name) == 2 and entry.is_dir())
    return (store / name for name in names)


def committed_series(store: Path) -> Iterator[dict[str, Any]]:
    """Yield the manifest row of every committed series, whether or not the manifest has it yet, by fan-out folder."""
    for folder in _fan_out(store):
        for name in sorted(os.listdir(folder)):
            if not name.startswith(PARTIAL_PREFIX):
                yield _commit_row(folder / name)


def _commit_row(folder: Path) -> dict[str, Any]:
    try:
        row: dict[str, Any] = json.loads((folder / COMMIT_NAME).read_bytes())["row"]
    except (OSError, ValueError, KeyError):
        msg = f"series {folder.name} has no readable commit file: delete {folder} and run `python -m preprocess` again"
        raise IncompleteStoreError(msg) from None
    return row


def write_manifest(store: Path) -> None:
    """Rebuild the manifest from the commit files, one partition at a time; unchanged partitions are left alone."""
    commit_point("manifest:before")
    for character, members in groupby(committed_series(store), key=lambda row: str(row["study_id"])[0]):
        rows = sorted(members, key=lambda row: str(row["series_id"]))
        buffer = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows, MANIFEST_SCHEMA), buffer, compression="zstd")
        content, path = buffer.getvalue().to_pybytes(), store / "manifest" / f"{character}.parquet"
        if not path.exists() or path.read_bytes() != content:
            write_atomic(path, content)
            commit_point("manifest:partition")
    commit_point("manifest:after")


# --- reading ---------------------------------------------------------------------------------------------------------


class SliceStore:
    """A complete slice store, read only. Made by `SliceStore.open`.

    Attributes
    ----------
    path
        The ``.zarr`` folder.
    manifest
        One row per series, sorted by ``series_id``; columns of `MANIFEST_SCHEMA`.
    content_hash
        Hash over the content hashes of all series: what later artefacts name as their input.
    """

    def __init__(self, path: Path, manifest: pd.DataFrame) -> None:
        self.path = path
        self.manifest = manifest
        self.content_hash = store_hash(manifest)
        self._rows = manifest.set_index("series_id", drop=False)

    @classmethod
    def open(cls, path: Path | str) -> SliceStore:
        """Open a store after checking that it is complete.

        Raises
        ------
        StoreError
            If the folder is not a store of this schema version.
        IncompleteStoreError
            If a series is missing, unfinished, absent from the manifest, or its shard is missing or of the wrong size.
        """
        path = Path(path)
        _root_attributes(path)
        manifest = _read_manifest(path)
        for finding in _structural_findings(path, manifest):
            msg = (
                f"{path}: series {finding.series_id}: {finding.fault}. The store is incomplete: run the same "
                "`python -m preprocess` command again to finish it, after deleting the series folder if it is damaged"
            )
            raise IncompleteStoreError(msg)
        if manifest.empty:
            msg = (
                f"{path} holds no series: the conversion did not finish, or found nothing to convert; run the same "
                "`python -m preprocess` command again and read its report"
            )
            raise IncompleteStoreError(msg)
        return cls(path, manifest)

    def __len__(self) -> int:
        return len(self.manifest)

    def record(self, series_id: str) -> SeriesRecord:
        """Return what the manifest says about a series."""
        row = self._row(series_id)
        values = {field.name: _python_value(row[field.name]) for field in fields(SeriesRecord)}
        return SeriesRecord(**values)

    def read(self, series_id: str) -> np.ndarray:
        """Read the stored integer values of a series.

        Parameters
        ----------
        series_id
            Pseudonym, as in the manifest.

        Returns
        -------
        numpy.ndarray
            (S, H, W) int16 or uint16: slices patient right → left, rows cranial → caudal, columns anterior →
            posterior. Never rescaled.

        Raises
        ------
        IncompleteStoreError
            If the shard is missing, a checksum fails, or the content is not what was committed.
        """
        row = self._row(series_id)
        attributes, pixels_SHW = _read_array(series_path(self.path, row["study_id"], series_id), series_id)
        if content_hash(attributes, pixels_SHW) != row["content_hash"]:
            raise _damaged(series_id, "its content is not what was committed")
        return pixels_SHW

    def positions_mm(self, series_id: str) -> np.ndarray:
        """Signed position (S,) of each slice along the right → left normal, mm, relative to the first."""
        return np.array(self._row(series_id)["positions_mm"], dtype=np.float64)

    def _row(self, series_id: str) -> pd.Series[Any]:
        if series_id not in self._rows.index:
            msg = f"no series {series_id} in {self.path}; `python -m preprocess inspect` lists them"
            raise StoreError(msg)
        return cast("pd.Series[Any]", self._rows.loc[series_id])


def _read_array(folder: Path, series_id: str) -> tuple[dict[str, Any], np.ndarray]:
    if not (folder / SHARD_NAME).is_file():
        raise _damaged(series_id, "its shard is missing")
    try:
        array = zarr.open_array(LocalStore(folder, read_only=True), mode="r")
        return dict(array.attrs), np.asarray(array[...])
    except Exception as error:
        raise _damaged(series_id, f"reading failed ({type(error).__name__})") from error


def _damaged(series_id: str, why: str) -> IncompleteStoreError:
    return IncompleteStoreError(
        f"series {series_id}: {why}; run `python -m preprocess verify` on the store, delete the damaged series folders "
        "and run the conversion again"
    )


def _python_value(value: Any) -> Any:  # noqa: ANN401  (a manifest cell)
    if isinstance(value, (np.ndarray, list)):
        return tuple(float(item) for item in value)
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and np.isnan(value) else value


def store_hash(manifest: pd.DataFrame) -> str:
    """Hash over all series of a manifest."""
    return content_id(sorted(zip(manifest["series_id"], manifest["content_hash"], strict=True)))


def _read_manifest(path: Path) -> pd.DataFrame:
    parts = sorted((path / "manifest").glob("[!.]*.parquet"))
    tables = [MANIFEST_SCHEMA.empty_table(), *(pq.read_table(part, schema=MANIFEST_SCHEMA) for part in parts)]
    manifest: pd.DataFrame = pa.concat_tables(tables).to_pandas()
    return manifest.sort_values("series_id", ignore_index=True)


def _structural_findings(path: Path, manifest: pd.DataFrame) -> Iterator[Finding]:
    """Compare folders, shards and sizes with the manifest; reads no pixel."""
    listed = {folder.name: sorted(os.listdir(folder)) for folder in _fan_out(path)}
    present = {(folder, name) for folder, names in listed.items() for name in names}
    expected = set(zip(manifest["study_id"].str[:2], manifest["series_id"], strict=True))
    for _, name in sorted(present - expected):
        partial = name.startswith(PARTIAL_PREFIX)
        yield Finding(name.removeprefix(PARTIAL_PREFIX)[:26], "uncommitted" if partial else "not_in_manifest")
    for _, name in sorted(expected - present):
        yield Finding(name, "missing_series")
    for study_id, series_id, size in zip(
        manifest["study_id"], manifest["series_id"], manifest["shard_bytes"], strict=True
    ):
        if (study_id[:2], series_id) in present:
            yield from _shard_findings(series_path(path, study_id, series_id), int(size))


def _shard_findings(folder: Path, expected_bytes: int) -> Iterator[Finding]:
    try:
        found = (folder / SHARD_NAME).stat().st_size
    except OSError:
        yield Finding(folder.name, "missing_shard")
        return
    if found != expected_bytes:
        yield Finding(folder.name, "wrong_size")


def verify_store(path: Path) -> list[Finding]:
    """Check everything: completeness as `SliceStore.open` does, then every pixel, attribute and commit file.

    Returns
    -------
    list of Finding
        Empty for a sound store.
    """
    _root_attributes(path)
    manifest = _read_manifest(path)
    findings = list(_structural_findings(path, manifest))
    faulty = {finding.series_id for finding in findings}
    store = SliceStore(path, manifest)
    for study_id, series_id in zip(manifest["study_id"], manifest["series_id"], strict=True):
        if series_id not in faulty and not _is_sound(store, study_id, series_id):
            findings.append(Finding(series_id, "corrupted"))
    return findings


def _is_sound(store: SliceStore, study_id: str, series_id: str) -> bool:
    folder = series_path(store.path, study_id, series_id)
    try:
        store.read(series_id)
        commit = json.loads((folder / COMMIT_NAME).read_bytes())
        array_sha256 = hashlib.sha256((folder / "zarr.json").read_bytes()).hexdigest()
    except (IncompleteStoreError, OSError, ValueError):
        return False
    row = store.manifest.set_index("series_id").loc[series_id]
    return bool(commit["array_sha256"] == array_sha256 and commit["row"]["content_hash"] == row["content_hash"])
