"""What one Ray worker keeps between calls, and what it does with it.

Every remote call carries a name that people see in the dashboard: ``features-0003`` or ``k3-fold02-seed1``.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import torch
from ray.util.metrics import Gauge

from lbp_ray.cell import TrialData
from lbp_ray.features import extract, load_features
from lbp_ray.nets.resnet import build_backbone
from lbp_ray.nets.weights import WeightsError, load_backbone_weights, weights_sha256
from lbp_ray.roi.crops import Crops
from lbp_ray.splits import Split
from lbp_ray.training import Resident
from lbp_ray.trial import run_trial
from preprocess.commit import commit_point, write_atomic

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lbp_ray.cell import Shared, TrialPlace, TrialSpec


@lru_cache(maxsize=1)
def resident(shared: Shared) -> Resident:
    """Load the backbone once per process and check that it is the one the driver planned with."""
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
def trial_data(shared: Shared) -> TrialData:
    """Map crops and load features and split once per process."""
    return load_trial_data(shared.crops, shared.split, shared.features)


def load_trial_data(crops_folder: Path, split_folder: Path, features_folder: Path | None) -> TrialData:
    """Join crops, features and split: one row per study that has both crops and a fold."""
    crops, split = Crops.open(crops_folder), Split.open(split_folder)
    rows = crops.table.drop(columns="patient_id").reset_index(names="row")
    rows = rows.merge(split.table, on="study_id", validate="one_to_one")
    row_N = rows["row"].to_numpy()
    features = load_features(features_folder) if features_folder is not None else None
    return TrialData(
        crops_NKHW=crops.pixels_NKHW,
        crop_row_N=row_N,
        features_NKF=features if features is None else features[torch.from_numpy(row_N.copy())],
        study_ids=tuple(rows["study_id"]),
        patient_ids=tuple(rows["patient_id"]),
        labels_N=rows["label"].astype("float32").to_numpy(),
        folds_N=rows["fold"].to_numpy(),
        slice_index_NK=np.stack(rows["slice_index"].to_list()),
        offset_mm_NK=np.stack(rows["slice_offset_mm"].to_list()),
    )


@ray.remote(max_retries=3)
def extract_shard(shared: Shared, bounds: tuple[int, int], threads: int, shard: Path) -> None:
    """Compute and commit the features of one range of studies."""
    torch.set_num_threads(threads)
    crops = Crops.open(shared.crops)
    keeper = resident(shared)
    features_NKF = extract(keeper.reset(), crops.pixels_NKHW[slice(*bounds)], device=shared.device)
    write_atomic(shard, features_NKF.tobytes())
    commit_point("features:shard")


def train_cell(shared: Shared, spec: TrialSpec, place: TrialPlace) -> Iterator[dict[str, Any]]:
    """Train and commit one cell, and yield its learning curve, also as gauges of the dashboard."""
    tags = {"cell": spec.cell.name}
    loss = Gauge("lbp_ray_validation_loss", "Loss on the evaluated fold", tag_keys=("cell",))
    area = Gauge("lbp_ray_validation_auc", "Study-level ROC-AUC on the evaluated fold", tag_keys=("cell",))
    for record in run_trial(spec, trial_data(shared), resident(shared), place):
        loss.set(record.validation_loss, tags=tags)
        area.set(record.validation_auc, tags=tags)
        yield asdict(record)
