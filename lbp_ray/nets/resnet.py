"""ResNet50 as a feature backbone plus a last layer.

Shape suffixes: B batch, C channels, H rows, W columns, F features, P outputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torchvision.models import resnet50

if TYPE_CHECKING:
    from lbp_ray.nets.weights import StateDict

NUM_FEATURES = 2048
"""Pooled features of ResNet50."""


def build_backbone(state: StateDict) -> nn.Module:
    """Build ResNet50 up to its pooled features, in channels_last, frozen and in eval mode.

    Parameters
    ----------
    state
        What `lbp_ray.nets.weights.load_backbone_weights` returned.

    Returns
    -------
    torch.nn.Module
        Maps (B, 3, H, W) float32 to (B, 2048).
    """
    backbone: nn.Module = resnet50(weights=None)
    backbone.fc = nn.Identity()
    backbone.load_state_dict(state)
    backbone.requires_grad_(False)
    return backbone.eval().to(memory_format=torch.channels_last)


def build_head(*, seed: int, num_outputs: int = 1) -> nn.Linear:
    """Build the last layer with PyTorch's default initial values, drawn from `seed` alone.

    Parameters
    ----------
    seed
        Model seed.
    num_outputs
        Number of independent heads; all start from the same values, as separate runs of one seed would.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        single = nn.Linear(NUM_FEATURES, 1)
    head = nn.Linear(NUM_FEATURES, num_outputs)
    with torch.no_grad():
        head.weight.copy_(single.weight.expand(num_outputs, -1))
        head.bias.copy_(single.bias.expand(num_outputs))
    return head


class TwoLogits(nn.Linear):
    """A last layer with a logit per class: a softmax over both is the sigmoid of their difference, which it returns."""

    def forward(self, features_BF: Tensor) -> Tensor:
        """Map (B, 2048) features to (B, 1) differences, symptomatic minus asymptomatic."""
        logits_B2 = super().forward(features_BF)
        return logits_B2[:, 1:] - logits_B2[:, :1]


def build_two_logit_head(*, seed: int) -> TwoLogits:
    """Build the last layer with a logit per class, with PyTorch's default initial values, drawn from `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TwoLogits(NUM_FEATURES, 2)


def load_head(state: StateDict) -> nn.Linear:
    """Rebuild a trained last layer of either kind from its state dict."""
    head = TwoLogits(NUM_FEATURES, 2) if len(state["bias"]) == 2 else nn.Linear(NUM_FEATURES, 1)
    head.load_state_dict(state)
    return head


def set_batchnorm_mode(module: nn.Module, mode: Literal["eval", "train"]) -> None:
    """Put every BatchNorm layer in eval (constant statistics) or train (drifting statistics) mode."""
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.train(mode == "train")


def standardise(pixels_BHW: Tensor, *, channels: int = 3) -> Tensor:
    """Standardise each image by its own mean and standard deviation and copy it to three channels.

    Parameters
    ----------
    pixels_BHW
        Stored pixel values, any real type.
    channels
        Copies; a network of `lbp_ray.nets.folding.fold` takes one.

    Returns
    -------
    torch.Tensor
        (B, channels, H, W) float32 in channels_last.

    Raises
    ------
    ValueError
        If an image is constant.

    References
    ----------
    Oulu thesis, section 3.4: (x − mean) / std of that image; grey copied to three channels.
    """
    values = pixels_BHW.to(torch.float32)
    mean = values.mean(dim=(1, 2), keepdim=True)
    std = values.std(dim=(1, 2), keepdim=True, correction=0)
    if bool((std == 0).any()):
        blank = int((std.flatten() == 0).nonzero()[0])
        msg = f"image {blank} of the batch is constant; a blank crop cannot be standardised"
        raise ValueError(msg)
    image_B1HW = ((values - mean) / std).unsqueeze(1)
    return image_B1HW.expand(-1, channels, -1, -1).contiguous(memory_format=torch.channels_last)
