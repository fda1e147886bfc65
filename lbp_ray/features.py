"""Frozen-backbone features of every slice: computed once, shared by every trial.

While the backbone is frozen with BatchNorm in eval mode its pooled features are constants, so training the last layer
on them gives the very numbers that the whole network in the loop would give.

Shape suffixes: N studies, K slice offsets, H rows, W columns, F features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torchvision

from lbp_ray.nets.resnet import standardise
from preprocess.commit import content_id

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import nn

BATCH_SIZE = 16
"""Images per forward pass of the extraction; fixed, because another batch size may move float32 in the last digits."""

SHARD_STUDIES = 16
"""Studies per shard: the unit of work, of resume and of one Ray task."""


class FeatureCacheError(ValueError):
    """A feature cache that would not equal the network in the loop."""


def features_id(
    *, crops_hash: str, weights_hash: str, threads: int, batchnorm: str = "eval", device: str = "cpu"
) -> str:
    """Return the address of a feature table.

    Parameters
    ----------
    crops_hash
        Content hash of the crops artefact.
    weights_hash
        SHA-256 of the backbone's state.
    threads
        CPU threads of the extraction: they change float32 sums.
    batchnorm
        BatchNorm mode of the frozen backbone; only ``eval`` gives constant features.
    device
        Kind of device, ``cpu`` or ``cuda``: their float32 sums differ.

    Raises
    ------
    FeatureCacheError
        If BatchNorm is in train mode.
    """
    if batchnorm != "eval":
        msg = (
            f"the feature cache needs BatchNorm in eval mode, found {batchnorm!r}: running statistics would drift and "
            "every feature depend on its batch; set recipe.frozen_batchnorm: eval or recipe.feature_cache: false"
        )
        raise FeatureCacheError(msg)
    return content_id(
        {
            "crops": crops_hash,
            "weights": weights_hash,
            "threads": threads,
            "batch_size": BATCH_SIZE,
            "batchnorm": batchnorm,
            "device": device,
            "dtype": "float32",
            "layout": "channels_last",
            "standardise": "per image",
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        }
    )


def shard_bounds(num_studies: int) -> list[tuple[int, int]]:
    """Return the half-open study ranges of the shards, in order."""
    return [(start, min(start + SHARD_STUDIES, num_studies)) for start in range(0, num_studies, SHARD_STUDIES)]


def extract(backbone: nn.Module, crops_NKHW: np.ndarray, *, device: str = "cpu") -> np.ndarray:
    """Run the frozen backbone over every slice of some studies.

    Parameters
    ----------
    backbone
        Frozen ResNet50 without its last layer, as `lbp_ray.nets.resnet.build_backbone` makes it.
    crops_NKHW
        Stored pixel values.
    device
        Torch device to run on.

    Returns
    -------
    numpy.ndarray
        (N, K, F) float32.

    Raises
    ------
    FeatureCacheError
        If any layer of the backbone is in train mode.
    """
    if any(module.training for module in backbone.modules()):
        msg = "the backbone is in train mode: its features would not be constants; call backbone.eval() first"
        raise FeatureCacheError(msg)
    num_studies, num_offsets = crops_NKHW.shape[:2]
    flat = crops_NKHW.reshape(-1, *crops_NKHW.shape[2:])
    with torch.inference_mode():
        parts = [backbone(standardise(torch.from_numpy(batch).to(device))).cpu() for batch in _batches(flat)]
    return torch.cat(parts).reshape(num_studies, num_offsets, -1).numpy()


def _batches(flat: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(flat), BATCH_SIZE):
        yield np.array(flat[start : start + BATCH_SIZE])


def load_features(folder: Path) -> torch.Tensor:
    """Read a committed feature table into memory.

    Returns
    -------
    torch.Tensor
        (N, K, F) float32.
    """
    return torch.from_numpy(np.load(folder / "features.npy"))
