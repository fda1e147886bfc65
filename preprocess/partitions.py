"""Header rows on disk, in parts by a hash of the study, so that no process ever holds those of a whole tree.

Private, below ``index/`` of the private folder: ``<part>/<batch>.parquet`` has the rows of one batch of files that
belong to studies of one part; ``batches/<batch>.json`` is written last, says that the batch is done, and holds the
files that need no further decision. A batch whose files are unchanged since (path, size, modification time) is not
read again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import defaultdict
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from preprocess.accounting import FileOutcome, strongest
from preprocess.commit import canonical_json, commit_point, content_id, write_atomic
from preprocess.deidentify import Pseudonymiser
from preprocess.headers.index import FileRow, WalkedFile, index_files

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

FILES_PER_BATCH = 1024
"""Most headers read by one task: long enough to hide its dispatch."""

MIN_FILES_PER_BATCH = 256
"""A batch ends with a folder once it has as many, so that a file added to the tree changes few batches."""

LARGE_TREE_FILES = 1_000_000
"""Trees with more files get parts named by two characters (1,024) instead of one (32)."""

ROWS_IN_MEMORY = 20_000
"""A part with more header rows is taken up in 32 blocks, by the next character of the study's pseudonym."""

BASE32 = "abcdefghijklmnopqrstuvwxyz234567"
"""Characters of pseudonyms."""

_Batch: TypeAlias = "list[WalkedFile]"

_ARROW_TYPES = {
    "str": pa.string(),
    "int": pa.int64(),
    "int | None": pa.int64(),
    "float | None": pa.float64(),
    "tuple[str, ...]": pa.list_(pa.string()),
    "tuple[float, ...]": pa.list_(pa.float64()),
}
_PATH = "path"
ROW_SCHEMA = pa.schema(
    [("study_id", pa.string())]
    # File names may hold bytes that are no text.
    + [(f.name, pa.binary() if f.name == _PATH else _ARROW_TYPES[str(f.type)]) for f in fields(FileRow)]
)
"""Columns of a batch: pseudonym of the study, then the fields of `FileRow`."""
_TEXTS = [f.name for f in fields(FileRow) if f.type == "str" and f.name != _PATH]
_TUPLES = [f.name for f in fields(FileRow) if str(f.type).startswith("tuple")]


@dataclass(frozen=True)
class IndexTask:
    """What every batch needs to know."""

    root: str
    folder: str
    """``index`` of the private folder."""
    key: bytes
    part_characters: int

    def __repr__(self) -> str:
        """Keep the key out of logs."""
        return f"IndexTask(part_characters={self.part_characters})"


@dataclass(frozen=True)
class BatchOutcome:
    """What one batch came to."""

    batch: str
    parts: dict[str, int]
    """Part → header rows."""


def batches(files: Iterable[WalkedFile]) -> Iterator[_Batch]:
    """Cut a walk into batches: at the end of a folder when there are enough files, else at the limit."""
    batch: _Batch = []
    for file in files:
        folder_ends = bool(batch) and os.path.dirname(batch[-1].path) != os.path.dirname(file.path)
        if len(batch) >= FILES_PER_BATCH or (folder_ends and len(batch) >= MIN_FILES_PER_BATCH):
            yield batch
            batch = []
        batch.append(file)
    if batch:
        yield batch


def part_characters_for(num_files: int) -> int:
    """Length of the names of the parts that suits a tree."""
    return 1 if num_files <= LARGE_TREE_FILES else 2


def batch_name(files: _Batch) -> str:
    """Name of a batch, by the paths in it."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(os.fsencode(file.path) + b"\0")
    return digest.hexdigest()[:20]


def index_batch(task: IndexTask, files: _Batch) -> BatchOutcome:
    """Read the headers of a batch and write them by part, unless they are there.

    Returns
    -------
    BatchOutcome
        The parts in which the batch has rows.
    """
    folder, name = Path(task.folder), batch_name(files)
    signature = _signature(task, files)
    done = _done(folder, name)
    if done is None or done["signature"] != signature:
        rows = index_files(task.root, files)
        return write_batch(task, name, rows, signature)
    return BatchOutcome(name, done["parts"])


def _signature(task: IndexTask, files: _Batch) -> str:
    """Hash of sizes and times of a batch: what tells that a file was changed in place."""
    facts: list[object] = [task.part_characters, [field.name for field in fields(FileRow)]]
    for file in files:
        try:
            status = os.lstat(os.path.join(task.root, file.path))
            facts.append([file.fault, status.st_size, status.st_mtime_ns])
        except OSError:
            facts.append([file.fault, -1, -1])
    return content_id(facts)


def _done(folder: Path, name: str) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads((folder / "batches" / f"{name}.json").read_bytes())
    except (OSError, ValueError):
        return None
    return content


def write_batch(task: IndexTask, name: str, rows: Sequence[FileRow], signature: str) -> BatchOutcome:
    """Write header rows by part, then mark the batch as done.

    Parameters
    ----------
    task
        Where to, and the key.
    name
        Name of the batch.
    rows
        Its rows; those without a study are settled here.
    signature
        By which a later run knows that the files are unchanged.
    """
    names, folder = Pseudonymiser(task.key), Path(task.folder)
    by_part: dict[str, list[tuple[str, FileRow]]] = defaultdict(list)
    settled: dict[str, list[FileRow]] = defaultdict(list)
    study_ids: dict[str, str] = {}
    for row in rows:
        if not row.study_uid:
            settled[row.path].append(row)
            continue
        study_id = study_ids.setdefault(row.study_uid, names.study(row.study_uid))
        by_part[study_id[: task.part_characters]].append((study_id, row))
    for part, members in sorted(by_part.items()):
        write_atomic(folder / part / f"{name}.parquet", _to_parquet(members), mode=0o600)
    commit_point("index:batch")
    files = [_encoded(path, members) for path, members in sorted(settled.items())]
    parts = {part: len(members) for part, members in sorted(by_part.items())}
    done = canonical_json({"signature": signature, "parts": parts, "files": files})
    write_atomic(folder / "batches" / f"{name}.json", done.encode(), mode=0o600)
    return BatchOutcome(name, parts)


def _encoded(path: str, rows: list[FileRow]) -> list[object]:
    code = strongest(row.fault or "no_exam_id" for row in rows)
    return [os.fsencode(path).hex(), code, rows[0].size_bytes, rows[0].sop_uid]


def _to_parquet(members: list[tuple[str, FileRow]]) -> bytes:
    columns: dict[str, list[Any]] = {"study_id": [study_id for study_id, _ in members]}
    for name in ROW_SCHEMA.names[1:]:
        columns[name] = [getattr(row, name) for _, row in members]
    columns[_PATH] = [os.fsencode(path) for path in columns[_PATH]]
    for name in _TEXTS:  # Parquet text is UTF-8, and a header may hold anything
        columns[name] = [value.encode("utf-8", "replace").decode() for value in columns[name]]
    buffer = pa.BufferOutputStream()
    table = pa.Table.from_pydict(columns, ROW_SCHEMA)
    pq.write_table(table, buffer, compression="zstd", use_dictionary=False, write_statistics=False)
    content: bytes = buffer.getvalue().to_pybytes()
    return content


def settled_files(folder: Path, name: str) -> list[FileOutcome]:
    """Files of a batch that belong to no study."""
    done = _done(folder, name)
    assert done is not None
    return [
        FileOutcome(os.fsdecode(bytes.fromhex(path)), code, size, sop_uid, "", "")
        for path, code, size, sop_uid in done["files"]
    ]


def part_rows(folder: Path, part: str, names: frozenset[str]) -> Iterator[list[FileRow]]:
    """Yield the header rows of a part in blocks of whole studies; files of other batches are deleted.

    Parameters
    ----------
    folder
        ``index`` of the private folder.
    part
        The part.
    names
        Batches of this run.
    """
    paths = []
    for path in sorted((folder / part).glob("[!.]*.parquet")):
        if path.stem in names:
            paths.append(path)
        else:
            path.unlink()
    num_rows = sum(pq.read_metadata(path).num_rows for path in paths)
    blocks = [None] if num_rows <= ROWS_IN_MEMORY else [_starts_with(part + letter) for letter in BASE32]
    for block in blocks:
        rows = [row for path in paths for row in _from_table(_read_block(path, block))]
        if rows:
            yield rows


def _read_block(path: Path, block: Any) -> Any:  # noqa: ANN401  (pyarrow has no types)
    if block is None:
        return pq.ParquetFile(path).read(use_threads=False)  # a tenth of the time that a filter takes to set up
    return pq.read_table(path, schema=ROW_SCHEMA, filters=block)


def _starts_with(prefix: str) -> Any:  # noqa: ANN401  (pyarrow has no types)
    return pa.compute.starts_with(pa.compute.field("study_id"), prefix)


def _from_table(table: Any) -> Iterator[FileRow]:  # noqa: ANN401  (pyarrow has no types)
    columns = {name: table[name].to_pylist() for name in ROW_SCHEMA.names[1:]}
    columns[_PATH] = [os.fsdecode(path) for path in columns[_PATH]]
    for name in _TUPLES:
        columns[name] = [tuple(value) for value in columns[name]]
    keys = list(columns)
    for values in zip(*columns.values(), strict=True):
        yield FileRow(**dict(zip(keys, values, strict=True)))


def sweep_index(folder: Path, names: frozenset[str], parts: Iterable[str]) -> None:
    """Delete batches and parts that this run does not have."""
    for path in (folder / "batches").glob("[!.]*.json"):
        if path.stem not in names:
            path.unlink()
    kept = {"batches", *parts}
    for entry in list(os.scandir(folder)):
        if entry.is_dir() and entry.name not in kept:
            shutil.rmtree(entry.path)
