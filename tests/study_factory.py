"""Small shared data, specifications and trained nothing: what tests of training and aggregation start from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lbp_ray.cell import Cell, TrialData, TrialSpec
from lbp_ray.features import extract
from lbp_ray.nets.resnet import build_backbone
from lbp_ray.nets.weights import load_backbone_weights
from lbp_ray.study import Recipe

if TYPE_CHECKING:
    from torch import nn


def random_backbone(seed: int = 0) -> nn.Module:
    return build_backbone(load_backbone_weights("random", seed=seed))


def make_data(folds: list[int], *, shape: tuple[int, int] = (64, 32), offsets: int = 3, seed: int = 0) -> TrialData:
    """One study per entry of `folds` (-1: hold-out), labels alternating, pixels noise with a label-dependent stripe."""
    generator = np.random.default_rng(seed)
    number = len(folds)
    labels = (np.arange(number) % 2).astype(np.float32)
    pixels = generator.integers(0, 1000, (number, offsets, *shape)).astype(np.uint16)
    pixels[labels == 1, :, : shape[0] // 4] += 1500
    reach = offsets // 2
    return TrialData(
        crops_NKHW=pixels,
        crop_row_N=np.arange(number),
        features_NKF=None,
        study_ids=tuple(f"s{row:03d}" for row in range(number)),
        patient_ids=tuple(f"p{row:03d}" for row in range(number)),
        labels_N=np.where(np.array(folds) < 0, np.nan, labels).astype(np.float32),
        folds_N=np.array(folds),
        slice_index_NK=np.tile(np.arange(offsets) + 5, (number, 1)),
        offset_mm_NK=np.tile((np.arange(offsets) - reach) * 4.0, (number, 1)),
    )


def with_features(data: TrialData, backbone: nn.Module) -> TrialData:
    import torch

    return TrialData(**{**vars(data), "features_NKF": torch.from_numpy(extract(backbone, data.crops_NKHW))})


def make_spec(num_slices: int = 1, fold: int = 0, seed: int = 0, **recipe: Any) -> TrialSpec:
    chosen = {"weights": "random", "frozen_epochs": 3, "unfrozen_epochs": 1, "batch_size": 4, **recipe}
    return TrialSpec(
        cell=Cell(num_slices=num_slices, fold=fold, seed=seed),
        recipe=Recipe(**chosen),
        crops_hash="c" * 64,
        split_hash="s" * 64,
        weights_hash="w" * 64,
    )
