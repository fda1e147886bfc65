"""Feature shards over all Ray workers, resumable, assembled into one memory-mappable table."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import ray
from tqdm import tqdm

from lbp_ray.distributed.waiter import options
from lbp_ray.distributed.worker import extract_shard
from lbp_ray.features import Extracted, Shards, refuse_random_access
from lbp_ray.roi.crops import Crops

if TYPE_CHECKING:
    from pathlib import Path

    from lbp_ray.cell import Shared
    from lbp_ray.study import Recipe

MAX_QUEUED = 1024
"""Shards that Ray knows at a time: more than any cluster's slots, few enough to ask about one by one."""

GPUS_PER_WORKER = 0.5
"""Two workers share a GPU, so that one computes while the other reads."""


def ensure_features(shared: Shared, final: Path, *, recipe: Recipe, gpus: float, progress: bool) -> None:
    """Compute the feature table unless it is committed already.

    Parameters
    ----------
    shared
        What the workers load.
    final
        Committed table, ``features.npy`` (N, K, F) float32; its shards lie beside it.
    recipe
        Says how many CPU threads each worker has and whether the network is folded; both are part of the address.
    gpus
        GPUs of a trial; any but 0 extracts on GPUs.
    progress
        Show a progress bar.

    Raises
    ------
    FeatureCacheError
        If the recipe would shuffle a table that is too large for it.
    """
    crops_NKHW = Crops.open(shared.crops).pixels_NKHW
    refuse_random_access(crops_NKHW, recipe)
    shards = Shards.of(final, crops_NKHW, device=shared.device)
    if final.is_dir():
        shutil.rmtree(shards.folder, ignore_errors=True)  # left by a kill right after the commit
        return
    queue = shards.begin()[::-1]
    resources = {"CPU": float(recipe.threads), "GPU": GPUS_PER_WORKER if gpus else 0.0}
    pending: list[ray.ObjectRef[Extracted]] = []
    total = Extracted(0, 0.0)
    with tqdm(
        total=len(shards), initial=len(shards) - len(queue), desc="features", unit="shard", disable=not progress
    ) as bar:
        while queue or pending:
            while queue and len(pending) < MAX_QUEUED:
                index = queue.pop()
                task = extract_shard.options(**options(f"features-{index:04d}", resources))
                pending.append(task.remote(shared, shards, index, recipe))
            done, pending = ray.wait(pending)
            for part in ray.get(done):
                total = Extracted(total.images + part.images, total.seconds + part.seconds)
            bar.update(len(done))
    shards.assemble(total)
