"""The U-Net that finds the lumbar region: VGG11-BN encoder, one logit per pixel.

Shape suffixes: B batch, H rows, W columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from segmentation_models_pytorch import Unet

if TYPE_CHECKING:
    from torch import nn

    from lbp_ray.nets.weights import StateDict


def build_unet(encoder: StateDict | None, *, seed: int) -> nn.Module:
    """Build the network in channels_last.

    Parameters
    ----------
    encoder
        State of a VGG11-BN for three channels (`lbp_ray.nets.weights.load_backbone_weights`); its first convolution is
        summed over channels, which is what three copies of one grey image would give. None: random encoder.
    seed
        Seed of everything that starts at random: the decoder, and the encoder if there is no state.

    Returns
    -------
    torch.nn.Module
        Maps (B, 1, H, W) float32 to (B, 1, H, W) logits.

    References
    ----------
    Oulu thesis, section 3.3: U-Net with a VGG11-BN encoder from segmentation-models-pytorch.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network: Any = Unet("vgg11_bn", encoder_weights=None, in_channels=1, classes=1)
    if encoder is not None:
        first = "features.0.weight"
        network.encoder.load_state_dict(encoder | {first: encoder[first].sum(1, keepdim=True)})
    module: nn.Module = network.to(memory_format=torch.channels_last)
    return module
