"""What one Ray worker keeps between calls, and what it does with it.

Every remote call carries a name that people see in the dashboard: ``features-0003`` or ``k3-fold02-seed1``.
"""

from __future__ import annotations

from functools import lru_cache
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import torch
from ray.util.metrics import Counter, Gauge

from lbp_ray.cell import TrialData
from lbp_ray.distributed.waiter import on_given_gpu
from lbp_ray.features import Extracted, extract, load_features
from lbp_ray.native import keep_freed_memory
from lbp_ray.nets.folding import fold
from lbp_ray.nets.resnet import build_backbone
from lbp_ray.nets.weights import WeightsError, load_backbone_weights, weights_sha256
from lbp_ray.resident import Resident
from lbp_ray.roi.crops import Crops
from lbp_ray.segment.loop import rank_and_world
from lbp_ray.splits import HOLDOUT, Split
from lbp_ray.trial import run_trial

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import nn

    from lbp_ray.cell import Shared, TrialPlace, TrialSpec
    from lbp_ray.features import Shards
    from lbp_ray.study import Recipe


@lru_cache(maxsize=1)
def resident(shared: Shared) -> Resident:
    """Load the backbone once per process and GPU and check that it is the one the driver planned with."""
    keep_freed_memory()
    for earlier in (resident, folded):  # of the GPU that this process had before: others run there now
        earlier.cache_clear()
    torch.cuda.empty_cache()
    state = load_backbone_weights(shared.weights, seed=shared.weights_seed)
    found = weights_sha256(state)
    if found != shared.weights_hash:
        msg = (
            f"this node loads other weights than the driver ({found[:12]}, not {shared.weights_hash[:12]}); put "
            "the same weights file or library version on every node"
        )
        raise WeightsError(msg)
    return Resident(build_backbone(state), device=shared.device)


@lru_cache(maxsize=1)
def folded(shared: Shared) -> nn.Module:
    """Fold the base backbone once per process; for extraction only."""
    return fold(resident(shared).reset())


@lru_cache(maxsize=1)
def trial_data(shared: Shared) -> TrialData:
    """Map crops and load features and split once per process."""
    return load_trial_data(shared.crops, shared.split, shared.features, block_studies=shared.block_studies)


def load_trial_data(
    crops_folder: Path, split_folder: Path, features_folder: Path | None, *, block_studies: int | None = None
) -> TrialData:
    """Join crops, features and split: one row per study that has both crops and a fold.

    Parameters
    ----------
    crops_folder, split_folder, features_folder
        Committed artefacts; no features where the recipe recomputes them.
    block_studies
        Studies per block of the recipe's shuffle, None for a full one.
    """
    crops, split = Crops.open(crops_folder), Split.open(split_folder)
    rows = crops.table.drop(columns="patient_id").reset_index(names="row")
    rows = rows.merge(split.table, on="study_id", validate="one_to_one")
    row_N = rows["row"].to_numpy()
    features = None if features_folder is None else load_features(features_folder, row_N, block_studies=block_studies)
    return TrialData(
        crops_NKHW=crops.pixels_NKHW,
        crop_row_N=row_N,
        features_NKF=features,
        study_ids=tuple(rows["study_id"]),
        patient_ids=tuple(rows["patient_id"]),
        labels_N=rows["label"].astype("float32").to_numpy(),
        folds_N=rows["fold"].to_numpy(),
        slice_index_NK=np.stack(rows["slice_index"].to_list()),
        offset_mm_NK=np.stack(rows["slice_offset_mm"].to_list()),
    )


@ray.remote(max_retries=3)
def extract_shard(shared: Shared, shards: Shards, index: int, recipe: Recipe) -> Extracted:
    """Compute and commit the features of one shard."""
    torch.set_num_threads(recipe.threads)
    given = on_given_gpu(shared)
    network = folded(given) if recipe.fold_extraction else resident(given).reset()
    pixels_NKHW = Crops.open(shared.crops).pixels_NKHW[shards.rows(index)]
    begun = perf_counter()
    shards.write(index, extract(network, pixels_NKHW, device=given.device))
    done = Extracted(pixels_NKHW.shape[0] * pixels_NKHW.shape[1], perf_counter() - begun)
    passed_slices().inc(done.images, tags={"stage": "extraction"})
    gpu_memory(given.device)
    torch.cuda.empty_cache()  # trials that follow on this GPU need the room; nothing happens without one
    return done


def train_cell(shared: Shared, spec: TrialSpec, place: TrialPlace) -> Iterator[dict[str, Any]]:
    """Train and commit one cell, and yield its learning curve, also as metrics of this node's Prometheus endpoint.

    Yields
    ------
    dict
        An `lbp_ray.selection.EpochRecord`, the ``slices`` that the epoch trained on or scored, and its ``seconds``;
        both are 0 for an epoch of an earlier run.
    """
    tags = {"cell": spec.cell.name}
    loss = Gauge("lbp_ray_validation_loss", "Loss on the evaluated fold", tag_keys=("cell",))
    area = Gauge("lbp_ray_validation_auc", "Study-level ROC-AUC on the evaluated fold", tag_keys=("cell",))
    data, kept = trial_data(shared), resident(shared)
    slices = int((data.folds_N != HOLDOUT).sum()) * spec.cell.num_slices  # each is trained on or scored, once per epoch
    first = rank_and_world()[0] == 0
    before = epochs_before(spec, place) if first else 0
    begun = perf_counter()
    for record in run_trial(spec, data, kept, place):
        cost = {"slices": 0, "seconds": 0.0}
        if record.epoch > before:
            cost = {"slices": slices, "seconds": perf_counter() - begun}
            if first:  # workers that share a trial share its slices
                passed_slices().inc(slices, tags={"stage": record.stage})
        loss.set(record.validation_loss, tags=tags)
        area.set(record.validation_auc, tags=tags)
        gpu_memory(kept.device)
        yield record._asdict() | cost
        begun = perf_counter()


def epochs_before(spec: TrialSpec, place: TrialPlace) -> int:
    """Return how many epochs of a trial an earlier run trained: their records come again, their work does not."""
    if place.is_complete:
        return spec.recipe.frozen_epochs + spec.recipe.unfrozen_epochs
    if not place.checkpoint.is_file():
        return 0
    state = torch.load(place.checkpoint, map_location="cpu", weights_only=True, mmap=True)  # no weight is read
    return len(state["history"])


def passed_slices() -> Counter:
    """Return the counter of slices that went through a network, by stage; its rate is a node's speed."""
    return Counter("lbp_ray_slices", "Slices that a network trained on, scored or extracted", tag_keys=("stage",))


def gpu_memory(device: str) -> None:
    """Export the GPU memory that PyTorch holds in this process, in bytes; 0 on a CPU."""
    held = torch.cuda.memory_reserved(device) if device.startswith("cuda") else 0
    Gauge("lbp_ray_gpu_memory_bytes", "GPU memory that PyTorch holds in a worker").set(held)
