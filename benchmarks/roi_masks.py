"""Cropping at scale: masks of many exams by the region finder's workers, against a plain PyTorch loop.

Both read the same slices of the same store, with the same network, batch and one thread, in alternating rounds. The
plain loop is what one would write in a notebook: read a slice, scale it, stack a batch, run the network, threshold. It
measures nothing of its masks and writes nothing; ours also drops specks, measures every mask and commits a table.
Start-up (Ray, imports, loading the network) is left out of both.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import torch

from benchmarks.preprocess_speed import spread
from lbp_ray.distributed.regions import MaskWorker
from lbp_ray.nets.unet import build_unet
from lbp_ray.phantom.config import PhantomConfig
from lbp_ray.phantom.write import write_cohort
from lbp_ray.segment.masks import MaskShard, Network, Slice, segment_shard
from preprocess.__main__ import main as preprocess
from preprocess.job import connect
from preprocess.store.read import SliceStore

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

ROUNDS = 3
NUM_EXAMS = 64
MATRIX = 256
INPUT_PX = 256
BATCH = 16
SHARD = 16
"""Slices of one shard; small here, so that two workers have several each."""


def measure() -> Iterator[dict[str, object]]:
    """Yield the throughput of one worker over the plain loop's, and of two workers over one."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, connect(2):
        folder = Path(name)
        slices = _make_store(folder)
        torch.save(build_unet(None, seed=0).state_dict(), folder / "model.pt")
        network = Network(folder / "model.pt", INPUT_PX, bfloat16=False, threads=1, device="cpu")
        shards = [MaskShard(0, tuple(slices[start : start + SHARD])) for start in range(0, NUM_EXAMS, SHARD)]
        worker: Any = MaskWorker
        actors = [worker.options(num_cpus=1).remote() for _ in range(2)]
        warm = [actor.run.remote(shards[0], network, folder / "x.zarr", folder / "warm") for actor in actors]
        ray.get(warm)
        segment_shard(shards[0], network, folder / "x.zarr", folder / "warm")
        plain = build_unet(None, seed=0).eval()
        store = SliceStore.open(folder / "x.zarr")
        times: dict[str, list[float]] = {"plain": [], "one": [], "two": [], "here": []}
        for _ in range(ROUNDS):
            times["plain"].append(_timed(lambda: _plain_loop(plain, store, slices)))
            times["here"].append(_timed(lambda: _here(shards, network, folder)))
            times["one"].append(_timed(lambda: _spread_out(actors[:1], shards, network, folder)))
            times["two"].append(_timed(lambda: _spread_out(actors, shards, network, folder)))
    conditions = f"{NUM_EXAMS} slices of {MATRIX} x {MATRIX}, float32, batch {BATCH}, 1 thread, {ROUNDS} rounds"
    rate = NUM_EXAMS / min(times["one"])
    pairs = {
        "slices per second: one worker process, without Ray / plain PyTorch loop": ("plain", "here"),
        "slices per second: one Ray worker / plain PyTorch loop": ("plain", "one"),
        "slices per second: two Ray workers of one thread / one": ("one", "two"),
    }
    for figure, (slower, faster) in pairs.items():
        ratios = [first / second for first, second in zip(times[slower], times[faster], strict=True)]
        yield {"figure": figure, **spread(ratios), "conditions": conditions, "slices_per_s_here": rate}


def _make_store(folder: Path) -> list[Slice]:
    """Convert a synthetic cohort; return the middle slice of every exam."""
    config = PhantomConfig.model_validate(
        {"out": folder / "phantom", "image": {"matrix": MATRIX}, "tree": {"t1": False, "localizer": False}}
        | {"cohort": {"studies": NUM_EXAMS - 12, "positives": NUM_EXAMS // 3}}
    )
    write_cohort(config)
    status = preprocess([str(folder / "phantom" / "dicom"), "--out", str(folder / "x.zarr"), "--num-cpus", "0"])
    assert status == 0, "the synthetic cohort converts"
    manifest = SliceStore.open(folder / "x.zarr").manifest.sort_values("study_id")
    rows = zip(manifest["study_id"], manifest["series_id"], manifest["num_slices"], strict=True)
    return [Slice(study_id, series_id, int(count) // 2) for study_id, series_id, count in rows]


def _timed(work: Any) -> float:  # noqa: ANN401  (a function)
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


@torch.inference_mode()
def _plain_loop(network: nn.Module, store: SliceStore, slices: list[Slice]) -> None:
    masks = []
    for start in range(0, len(slices), BATCH):
        images = [
            torch.from_numpy(store.read_slice(item.series_id, item.slice_index).astype(np.float32))
            for item in slices[start : start + BATCH]
        ]
        batch = torch.stack([(image - image.mean()) / image.std() for image in images]).unsqueeze(1)
        masks.append(network(batch.contiguous(memory_format=torch.channels_last)) > 0)


def _here(shards: list[MaskShard], network: Network, folder: Path) -> None:
    for number, shard in enumerate(shards):
        segment_shard(shard, network, folder / "x.zarr", folder / f"{number}.parquet")


def _spread_out(actors: list[Any], shards: list[MaskShard], network: Network, folder: Path) -> None:
    calls = [
        actors[number % len(actors)].run.remote(shard, network, folder / "x.zarr", folder / f"{number}.parquet")
        for number, shard in enumerate(shards)
    ]
    ray.get(calls)
