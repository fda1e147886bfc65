"""Masks of many exams, shard by shard: one network and one file each. Knows nothing of Ray."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd
import torch

from lbp_ray.segment.infer import Segmenter
from lbp_ray.segment.region import describe_mask, without_specks
from preprocess.commit import commit_point, content_id, write_atomic
from preprocess.cvat.shapes import rle_from_mask
from preprocess.store.read import SliceStore, complete_partitions
from preprocess.store.scan import partition_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np

    from lbp_ray.segment.plan import Plan

SHARD_SLICES = 64
"""Most slices of one shard: some seconds of work, the most that a killed worker loses."""


class Slice(NamedTuple):
    """One slice of the store."""

    study_id: str
    series_id: str
    slice_index: int


class Network(NamedTuple):
    """A trained network and how it computes."""

    model: Path
    input_px: int
    bfloat16: bool
    threads: int
    device: str


@dataclass(frozen=True)
class MaskShard:
    """Slices that one network segments, near each other in the store."""

    fold: int
    """Of the network; `lbp_ray.segment.network.FINAL` for the final one."""
    slices: tuple[Slice, ...]

    @property
    def shard_id(self) -> str:
        """Address of the shard within one set of networks."""
        return content_id([self.fold, [list(item) for item in self.slices]])


def mask_shards(plan: Plan) -> list[MaskShard]:
    """Cut all slices to be segmented into shards: mid slices and annotated ones, each by one network. Pure."""
    columns = ["study_id", "patient_id", "series_id", "slice_index"]
    wanted = pd.concat([plan.middle[columns], plan.annotated[columns]]).drop_duplicates(["series_id", "slice_index"])
    groups: dict[int, list[Slice]] = {}
    for study_id, patient_id, series_id, index in sorted(wanted.itertuples(index=False, name=None)):
        groups.setdefault(plan.model_of(patient_id), []).append(Slice(study_id, series_id, int(index)))
    return [
        MaskShard(fold, tuple(slices[start : start + SHARD_SLICES]))
        for fold, slices in sorted(groups.items())
        for start in range(0, len(slices), SHARD_SLICES)
    ]


@lru_cache(maxsize=1)
def resident(network: Network) -> Segmenter:
    """Keep one network in this process."""
    torch.set_num_threads(network.threads)
    return Segmenter(network.model, input_px=network.input_px, device=network.device, bfloat16=network.bfloat16)


@lru_cache(maxsize=1)
def parts_of(store: Path) -> list[str]:
    """Keep the names of the store's parts in this process."""
    return complete_partitions(store)


@lru_cache(maxsize=32)
def open_part(store: Path, partition: str) -> SliceStore:
    """Keep some parts of the store open in this process."""
    return SliceStore.open(store, partition=partition)


def segment_shard(shard: MaskShard, network: Network, store_path: Path, out: Path) -> None:
    """Segment the slices of a shard and commit their table: one row each, columns as in ``regions.parquet``."""
    stores = [open_part(store_path, partition_of(item.study_id, parts_of(store_path))) for item in shard.slices]
    images = [
        store.read_slice(item.series_id, item.slice_index) for store, item in zip(stores, shard.slices, strict=True)
    ]
    masks = resident(network).masks(images)
    rows = [
        _row(store, item, shard.fold, without_specks(mask))
        for store, item, mask in zip(stores, shard.slices, masks, strict=True)
    ]
    buffer = io.BytesIO()
    pd.DataFrame(rows).to_parquet(buffer, index=False)
    write_atomic(out, buffer.getvalue())
    commit_point("regions:shard")


def _row(store: SliceStore, item: Slice, fold: int, mask: np.ndarray) -> dict[str, object]:
    record = store.record(item.series_id)
    region = describe_mask(mask, (record.spacing_row_mm, record.spacing_column_mm))
    return {
        "study_id": item.study_id,
        "patient_id": record.patient_id,
        "series_id": item.series_id,
        "slice_index": item.slice_index,
        "fold": fold,
        "rows": mask.shape[0],
        "columns": mask.shape[1],
        "row_mm": record.spacing_row_mm,
        "column_mm": record.spacing_column_mm,
        "mask_rle": rle_from_mask(mask),
        **asdict(region),
    }


def read_masks(files: Mapping[MaskShard, Path]) -> pd.DataFrame:
    """Read all shards, one row per slice, sorted."""
    table = pd.concat([pd.read_parquet(path) for path in files.values()], ignore_index=True)
    return table.sort_values(["study_id", "series_id", "slice_index"], ignore_index=True)
