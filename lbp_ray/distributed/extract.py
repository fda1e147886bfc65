"""Feature shards over all Ray workers, resumable, assembled into one memory-mappable table."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import numpy as np
import ray
from tqdm import tqdm

from lbp_ray.distributed.worker import extract_shard
from lbp_ray.features import shard_bounds
from lbp_ray.nets.resnet import NUM_FEATURES
from lbp_ray.roi.crops import Crops
from preprocess.commit import committed_directory

if TYPE_CHECKING:
    from pathlib import Path

    from lbp_ray.cell import Shared


def ensure_features(shared: Shared, final: Path, shards: Path, *, threads: int, gpus: float, progress: bool) -> None:
    """Compute the feature table unless it is committed already.

    Parameters
    ----------
    shared
        What the workers load.
    final
        Committed table, ``features.npy`` (N, K, F) float32.
    shards
        Folder of finished shards; those of a killed run are kept.
    threads
        CPU threads of each worker; part of the table's address.
    gpus
        GPUs that each worker asks for.
    progress
        Show a progress bar.
    """
    if final.is_dir():
        shutil.rmtree(shards, ignore_errors=True)  # left by a kill right after the commit
        return
    num_studies, num_offsets = Crops.open(shared.crops).pixels_NKHW.shape[:2]
    bounds = shard_bounds(num_studies)
    files = [shards / f"{index:06d}.f32" for index in range(len(bounds))]
    pending = []
    for index, (bound, file) in enumerate(zip(bounds, files, strict=True)):
        if not file.is_file():
            task = extract_shard.options(name=f"features-{index:04d}", num_cpus=threads, num_gpus=gpus)
            pending.append(task.remote(shared, bound, threads, file))
    finished = len(bounds) - len(pending)
    with tqdm(total=len(bounds), initial=finished, desc="features", unit="shard", disable=not progress) as bar:
        while pending:
            done, pending = ray.wait(pending)
            ray.get(done)
            bar.update(len(done))
    with committed_directory(final, point="features") as partial:
        table = np.lib.format.open_memmap(
            partial / "features.npy", mode="w+", dtype=np.float32, shape=(num_studies, num_offsets, NUM_FEATURES)
        )
        for (start, stop), file in zip(bounds, files, strict=True):
            table[start:stop] = np.fromfile(file, dtype=np.float32).reshape(stop - start, num_offsets, NUM_FEATURES)
        table.flush()
    shutil.rmtree(shards, ignore_errors=True)
