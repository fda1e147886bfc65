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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from numcodecs import blosc  # type: ignore[import-untyped]
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.storage import LocalStore

from preprocess.accounting import StackOutcome
from preprocess.commit import (
    PARTIAL_PREFIX,
    canonical_json,
    commit_point,
    committed_directory,
    sweep_partials,
    write_atomic,
)
from preprocess.mapper import Mapper, TaskFailure, map_here

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd

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


def create_store(path: Path, *, key_id: str, part_characters: int = 1, dates: str = "drop") -> int:
    """Make an empty store, or check that an existing one may be written to in the same way.

    Parameters
    ----------
    path
        The ``.zarr`` folder.
    key_id
        Public name of the pseudonym key.
    part_characters
        Length of the names of a new store's parts, one of `PART_CHARACTERS`; an existing store keeps its own.
    dates
        ``drop`` or ``shift``.

    Returns
    -------
    int
        Length of the names of the store's parts.

    Raises
    ------
    StoreError
        If the store has another schema version, its pseudonyms were made with another key, or dates are treated
        otherwise.
    """
    root = path / "zarr.json"
    if not root.exists():
        attributes: dict[str, Any] = {
            "kind": "lbp_ray slice store",
            "schema_version": SCHEMA_VERSION,
            "key_id": key_id,
            "part_characters": part_characters,
            "dates": dates,
            "longitudinal_temporal_information_modified": "MODIFIED" if dates == "shift" else "REMOVED",
            **DEIDENTIFICATION,
        }
        content = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
        write_atomic(root, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())
    found = _root_attributes(path)
    if found["key_id"] != key_id:
        msg = (
            f"{path} was made with pseudonym key {found['key_id']}, this key is {key_id}: the same patient would "
            "get two names; use the first key (--key-file) or another --out"
        )
        raise StoreError(msg)
    if found["dates"] != dates:
        msg = f"{path} was made with --dates {found['dates']}; use the same, or another --out"
        raise StoreError(msg)
    return int(found["part_characters"])


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
            attributes=record_attributes(record),
            # Else an all-zero slice is left out, and cannot be told from a lost one.
            config={"write_empty_chunks": True},
        )
        array[...] = pixels_SHW
        commit = {
            "row": {
                **record_attributes(record),
                "content_hash": content_hash(record_attributes(record), pixels_SHW),
                "shard_bytes": (partial / SHARD_NAME).stat().st_size,
            },
            "array_sha256": hashlib.sha256((partial / "zarr.json").read_bytes()).hexdigest(),
        }
        (partial / COMMIT_NAME).write_text(canonical_json(commit))


def record_attributes(record: SeriesRecord) -> dict[str, Any]:
    """Return a record as the JSON attributes of its array."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(record).items()}


def content_hash(attributes: dict[str, Any], pixels_SHW: np.ndarray) -> str:
    """SHA-256 (hexadecimal) of a series: canonical JSON of its attributes, then its pixels in little-endian C order."""
    digest = hashlib.sha256(canonical_json(attributes).encode())
    little = pixels_SHW.astype(pixels_SHW.dtype.newbyteorder("<"), order="C", copy=False)
    digest.update(np.ascontiguousarray(little).data)
    return digest.hexdigest()


def sweep_store(store: Path) -> None:
    """Delete what killed writers left in a store. Only for the one job that holds its lock."""
    for folder in [store, store / "manifest", store / "candidates", *_fan_out(store)]:
        sweep_partials(folder)


def _fan_out(store: Path, part: str = "") -> Iterator[Path]:
    """Folders that hold the series of a part, in order."""
    names = sorted(entry.name for entry in os.scandir(store) if len(entry.name) == 2 and entry.is_dir())
    return (store / name for name in names if name.startswith(part))


def committed_series(store: Path, part: str = "") -> Iterator[dict[str, Any]]:
    """Yield the manifest row of every committed series of a part, whether or not the manifest has it yet."""
    for folder in _fan_out(store, part):
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


def write_manifest_part(store: Path, part: str) -> None:
    """Rebuild one part of the manifest from the commit files; an unchanged part is left alone."""
    commit_point("manifest:before")
    rows = sorted(committed_series(store, part), key=lambda row: str(row["series_id"]))
    if rows:
        _replace(store / "manifest" / f"{part}.parquet", pa.Table.from_pylist(rows, MANIFEST_SCHEMA))
    commit_point("manifest:after")


def write_candidates_part(store: Path, part: str, rows: list[dict[str, Any]]) -> None:
    """Write how every stack of a part was judged; exams of earlier runs on other trees stay.

    Parameters
    ----------
    store
        The store.
    part
        Its part.
    rows
        Values of `CANDIDATES_SCHEMA`.
    """
    path = store / "candidates" / f"{part}.parquet"
    fresh = {row["study_id"] for row in rows}
    earlier = pq.ParquetFile(path).read(use_threads=False).to_pylist() if path.exists() else []
    merged = [*rows, *(row for row in earlier if row["study_id"] not in fresh)]
    merged.sort(key=lambda row: (row["study_id"], row["series_id"]))
    _replace(path, pa.Table.from_pylist(merged, CANDIDATES_SCHEMA))


def _replace(path: Path, table: Any) -> None:  # noqa: ANN401  (pyarrow has no types)
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd", use_dictionary=False, write_statistics=False)
    content = buffer.getvalue().to_pybytes()
    if not path.exists() or path.read_bytes() != content:
        write_atomic(path, content)


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
        self.content_hash = hash_contents(
            pa.Table.from_pandas(manifest[["series_id", "content_hash"]], preserve_index=False)
        )
        self._rows = manifest.set_index("series_id", drop=False)

    @classmethod
    def open(cls, path: Path | str, *, partition: str | None = None, contrast: str | None = None) -> SliceStore:
        """Open a store after checking that it is complete.

        Parameters
        ----------
        path
            The ``.zarr`` folder.
        partition
            One part of `manifest_partitions`; None opens all.
        contrast
            Show the series of one contrast only; None shows all.

        Raises
        ------
        StoreError
            If the folder is not a store of this schema version.
        IncompleteStoreError
            If a series is missing, unfinished, absent from the manifest, or its shard is missing or of the wrong size.
        """
        path = Path(path)
        _root_attributes(path)
        manifest = _read_manifest(path, partition)
        for finding in _structural_findings(path, manifest, partition or ""):
            msg = (
                f"{path}: series {finding.series_id}: {finding.fault}. The store is incomplete: run the same "
                "`python -m preprocess` command again to finish it, after deleting the series folder if it is damaged"
            )
            raise IncompleteStoreError(msg)
        if contrast is not None:
            manifest = manifest[manifest["contrast"] == contrast].reset_index(drop=True)
        if manifest.empty and partition is None:
            wanted = f" {contrast}" if contrast else ""
            msg = (
                f"{path} holds no{wanted} series: the conversion did not finish, or found nothing to convert; run the "
                "same `python -m preprocess` command again and read its report"
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


def manifest_partitions(path: Path) -> list[str]:
    """Names of the parts of a store's manifest, sorted: prefixes of the study pseudonyms in them."""
    return sorted(part.stem for part in (path / "manifest").glob("[!.]*.parquet"))


def _read_manifest(path: Path, partition: str | None = None) -> pd.DataFrame:
    parts = manifest_partitions(path) if partition is None else [partition]
    files = [file for part in parts if (file := path / "manifest" / f"{part}.parquet").exists()]
    tables = [MANIFEST_SCHEMA.empty_table(), *(pq.read_table(file, schema=MANIFEST_SCHEMA) for file in files)]
    manifest: pd.DataFrame = pa.concat_tables(tables).to_pandas()
    return manifest.sort_values("series_id", ignore_index=True)


def stored_series(path: Path) -> tuple[int, str]:
    """Count the series of a store and hash their contents, one part of the manifest at a time.

    Returns
    -------
    tuple
        Number of series; what `SliceStore.content_hash` is for the whole store.
    """
    columns = ["series_id", "content_hash"]
    files = [path / "manifest" / f"{part}.parquet" for part in manifest_partitions(path)]
    empty = MANIFEST_SCHEMA.empty_table().select(columns)
    table = pa.concat_tables([empty, *(pq.read_table(file, columns=columns) for file in files)])
    return table.num_rows, hash_contents(table)


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


def _structural_findings(path: Path, manifest: pd.DataFrame, part: str = "") -> Iterator[Finding]:
    """Compare folders, shards and sizes with the manifest; reads no pixel."""
    listed = {folder.name: sorted(os.listdir(folder)) for folder in _fan_out(path, part)}
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


def verify_store(path: Path, mapper: Mapper = map_here) -> list[Finding]:
    """Check everything: completeness as `SliceStore.open` does, then every pixel, attribute and commit file.

    Parameters
    ----------
    path
        The store.
    mapper
        Where the parts are read.

    Returns
    -------
    list of Finding
        Empty for a sound store.
    """
    length = int(_root_attributes(path)["part_characters"])
    parts = sorted({folder.name[:length] for folder in _fan_out(path)} | set(manifest_partitions(path)))
    items = ((f"verify-{part}", part) for part in parts)
    findings: list[Finding] = []
    for part, found in mapper(partial(_verify_part, path), items, title="verify", total=len(parts), unit="part"):
        findings += [Finding(f"part {part}", "corrupted")] if isinstance(found, TaskFailure) else found
    return sorted(findings, key=lambda finding: (finding.series_id, finding.fault))


def _verify_part(path: Path, part: str) -> list[Finding]:
    manifest = _read_manifest(path, part)
    findings = list(_structural_findings(path, manifest, part))
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
