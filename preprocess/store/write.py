"""Write a slice store: one whole array per series, then the parts of manifest and candidates."""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

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
    sweep_partials,
    write_atomic,
)
from preprocess.store.schema import (
    CANDIDATES_SCHEMA,
    COMMIT_NAME,
    DEIDENTIFICATION,
    MANIFEST_SCHEMA,
    SCHEMA_VERSION,
    SHARD_NAME,
    IncompleteStoreError,
    SeriesRecord,
    StoreError,
    content_hash,
    fan_out,
    record_attributes,
    root_attributes,
    series_path,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy as np


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
    found = root_attributes(path)
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


def sweep_store(store: Path) -> None:
    """Delete what killed writers left in a store. Only for the one job that holds its lock."""
    for folder in [store, store / "manifest", store / "candidates", *fan_out(store)]:
        sweep_partials(folder)


def committed_series(store: Path, part: str = "") -> Iterator[dict[str, Any]]:
    """Yield the manifest row of every committed series of a part, whether or not the manifest has it yet."""
    for folder in fan_out(store, part):
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
