"""Read a slice store that is complete; refuse one that is not exactly what its manifest says."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from zarr.storage import LocalStore

from preprocess.commit import PARTIAL_PREFIX
from preprocess.store.schema import (
    MANIFEST_SCHEMA,
    SHARD_NAME,
    IncompleteStoreError,
    SeriesRecord,
    StoreError,
    content_hash,
    fan_out,
    hash_contents,
    root_attributes,
    series_path,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd


@dataclass(frozen=True)
class Finding:
    """One fault of a store."""

    series_id: str
    fault: str
    """``uncommitted``, ``not_in_manifest``, ``missing_series``, ``missing_shard``, ``wrong_size`` or ``corrupted``."""


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
        root_attributes(path)
        manifest = read_manifest(path, partition)
        for finding in structural_findings(path, manifest, partition or ""):
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

    def read_slice(self, series_id: str, index: int) -> np.ndarray:
        """Read one slice of a series; its checksum is verified, the series' content hash is not.

        Parameters
        ----------
        series_id
            Pseudonym, as in the manifest.
        index
            Slice, from 0.

        Returns
        -------
        numpy.ndarray
            (H, W) int16 or uint16, oriented as in `read`.

        Raises
        ------
        StoreError
            If the series has no such slice.
        IncompleteStoreError
            If the shard is missing or the slice's checksum fails.
        """
        row = self._row(series_id)
        if not 0 <= index < row["num_slices"]:
            msg = f"series {series_id} has slices 0 to {row['num_slices'] - 1}, not {index}"
            raise StoreError(msg)
        return _read_array(series_path(self.path, row["study_id"], series_id), series_id, index)[1]

    def positions_mm(self, series_id: str) -> np.ndarray:
        """Signed position (S,) of each slice along the right → left normal, mm, relative to the first."""
        return np.array(self._row(series_id)["positions_mm"], dtype=np.float64)

    def _row(self, series_id: str) -> pd.Series[Any]:
        if series_id not in self._rows.index:
            msg = f"no series {series_id} in {self.path}; `python -m preprocess inspect` lists them"
            raise StoreError(msg)
        return cast("pd.Series[Any]", self._rows.loc[series_id])


def _read_array(folder: Path, series_id: str, index: int | None = None) -> tuple[dict[str, Any], np.ndarray]:
    """Read attributes and all slices, or one."""
    if not (folder / SHARD_NAME).is_file():
        raise _damaged(series_id, "its shard is missing")
    try:
        array = zarr.open_array(LocalStore(folder, read_only=True), mode="r")
        return dict(array.attrs), np.asarray(array[...] if index is None else array[index])
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
    """Name the parts of a store's manifest, sorted: prefixes of the study pseudonyms in them."""
    return sorted(part.stem for part in (path / "manifest").glob("[!.]*.parquet"))


def complete_partitions(path: Path) -> list[str]:
    """Name the parts of a store's manifest, for readers that open one after the other.

    A part that is gone altogether would else be missed: its series lie in no part that is opened.

    Raises
    ------
    StoreError
        If the folder is no store.
    IncompleteStoreError
        If the manifest is empty, or a folder of series is in none of its parts.
    """
    root_attributes(path)
    parts = manifest_partitions(path)
    if not parts:
        SliceStore.open(path)  # says why
    for folder in fan_out(path):
        if not folder.name.startswith(tuple(parts)) and any(folder.iterdir()):
            msg = f"{path}: folder {folder.name} is in no part of the manifest: run `python -m preprocess` to the end"
            raise IncompleteStoreError(msg)
    return parts


def read_manifest(path: Path, partition: str | None = None) -> pd.DataFrame:
    """Read the manifest, or one part of it, sorted by series; checks nothing."""
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


def structural_findings(path: Path, manifest: pd.DataFrame, part: str = "") -> Iterator[Finding]:
    """Compare folders, shards and sizes with the manifest; reads no pixel."""
    listed = {folder.name: sorted(os.listdir(folder)) for folder in fan_out(path, part)}
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
