"""A few columns of the store's manifest, one part at a time: what a driver may hold of millions of series."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from preprocess.store.read import complete_partitions

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path


def scan_manifest(
    store_path: Path, columns: Sequence[str], *, contrast: str | None = None
) -> Iterator[tuple[str, Any]]:
    """Yield columns of every part of the manifest, in the order of the parts.

    Parameters
    ----------
    store_path
        A slice store. Its parts must be there; what is in one is checked by `SliceStore.open` of that part.
    columns
        Names among those of `preprocess.store.schema.MANIFEST_SCHEMA`.
    contrast
        Only series of this contrast; None takes all.

    Yields
    ------
    str
        Name of the part, which is how the study pseudonyms of its series begin.
    pyarrow.Table
        The columns asked for; parts without such a series are left out.
    """
    wanted = list(dict.fromkeys([*columns, *(["contrast"] if contrast else [])]))
    for partition in complete_partitions(store_path):
        table = pq.read_table(store_path / "manifest" / f"{partition}.parquet", columns=wanted)
        if contrast:
            table = table.filter(pc.field("contrast") == contrast)
        if table.num_rows:
            yield partition, table.select(list(columns))


def partition_of(study_id: str, partitions: Sequence[str]) -> str:
    """Return the manifest part that holds a study."""
    return next(name for name in partitions if study_id.startswith(name))
