"""Arithmetic and activations of ResNet50 at any crop size, counted on a network without data."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet50

PARAMETERS = 23_508_032 + 2049
"""Of the backbone and a last layer of one logit."""

STATE_BYTES = 94_336_000
"""A trained network on disk: parameters, running statistics and names, float32."""


class ImageCost(NamedTuple):
    """What one image of three channels costs."""

    forward: int
    """Floating-point operations, two per multiply-add."""
    training: int
    """Forward and backward, the image itself needing no gradient."""
    activations: int
    """Values that stay in memory between forward and backward: outputs of convolutions, and as many of
    normalisations where no convolution carries those."""


@lru_cache(maxsize=64)
def image_cost(height_px: int, width_px: int) -> ImageCost:
    """Count one image.

    Parameters
    ----------
    height_px, width_px
        Size of the image; each must be at least 32 for the network's five halvings to leave a pixel.
    """
    with torch.device("meta"):
        network: Any = resnet50(weights=None)
        network.fc = nn.Linear(2048, 1)
        image = torch.empty(1, 3, height_px, width_px)
    network.eval()
    kept: list[int] = []
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda _layer, _inputs, output: kept.append(output.numel()))
    with FlopCounterMode(display=False) as counter:
        logits = network(image)
    forward = counter.get_total_flops()
    with counter:
        logits.sum().backward()
    return ImageCost(forward, forward + counter.get_total_flops(), sum(kept))
