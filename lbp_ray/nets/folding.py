"""A ResNet50 whose BatchNorm layers stand still, with less arithmetic and the same function.

Three equal input channels are one whose first filter is the sum of the three, and BatchNorm in eval mode is a scale and
a shift that its convolution can carry. Both are exact in real numbers; float32 differs in the last digits. `fold` does
both on a copy, for extraction: it must not be trained, because Adam's steps on folded weights are others. `carry_norms`
does the second for training: weights, scales and shifts stay the network's own parameters, and gradients reach them.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d
from torch.nn.utils.fusion import fuse_conv_bn_eval

if TYPE_CHECKING:
    from collections.abc import Iterator


def fold(backbone: nn.Module) -> nn.Module:
    """Return a copy of a frozen backbone that takes one channel and has no BatchNorm.

    Parameters
    ----------
    backbone
        Frozen ResNet50 in eval mode, as `lbp_ray.nets.resnet.build_backbone` makes it.

    Returns
    -------
    torch.nn.Module
        Maps (B, 1, H, W) float32 to (B, 2048), in channels_last.

    Raises
    ------
    ValueError
        If a layer is in train mode: its BatchNorm would not be constant.
    """
    if any(module.training for module in backbone.modules()):
        msg = "only a network in eval mode can be folded: call backbone.eval() first"
        raise ValueError(msg)
    folded = copy.deepcopy(backbone)
    for parent, convolution, norm in list(_pairs(folded)):
        fused = fuse_conv_bn_eval(getattr(parent, convolution), getattr(parent, norm))
        setattr(parent, convolution, fused)
        setattr(parent, norm, nn.Identity())
    first = folded.conv1
    assert isinstance(first, nn.Conv2d)
    first.weight = nn.Parameter(first.weight.detach().sum(dim=1, keepdim=True), requires_grad=False)
    first.in_channels = 1
    return folded.requires_grad_(False).eval().to(memory_format=torch.channels_last)


class CarryingConvolution(nn.Module):
    """A convolution that also does what the BatchNorm after it does in eval mode.

    Parameters
    ----------
    convolution, norm
        The layers it stands for; their parameters and statistics are used as they are at each pass.
    """

    def __init__(self, convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.convolution, self.norm = convolution, norm
        self.held: tuple[Tensor, Tensor] | None = None
        """Weight and bias while `computed_once` holds them."""

    def fused(self) -> tuple[Tensor, Tensor]:
        """Return the weight and bias of both layers, with gradients to their parameters."""
        norm = self.norm
        assert norm.running_var is not None
        assert norm.running_mean is not None
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        return self.convolution.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Convolve, scale and shift."""
        weight, bias = self.held or self.fused()
        layer = self.convolution
        # A kernel of one pixel cannot be dilated; but PyTorch, on one CPU thread and for fewer than 16 images, computes
        # such a convolution by its slow loop unless it is.
        alone = image_BCHW.device.type == "cpu" and layer.kernel_size == (1, 1)
        dilation = (2, 2) if alone else layer.dilation
        return conv2d(image_BCHW, weight, bias, layer.stride, cast("tuple[int, int]", layer.padding), dilation)


def carry_norms(backbone: nn.Module) -> nn.Module:
    """Return a network of the same parameters and statistics whose convolutions carry their BatchNorm.

    It saves the passes over every feature map that BatchNorm takes, and half the memory that the backward pass keeps.

    Parameters
    ----------
    backbone
        ResNet50 of `lbp_ray.nets.resnet.build_backbone`. Whatever changes its tensors in place changes both networks.

    Returns
    -------
    torch.nn.Module
        What `backbone` computes in eval mode, whichever mode it is in.
    """
    shared = {id(tensor): tensor for tensor in (*backbone.parameters(), *backbone.buffers())}
    carrying: nn.Module = copy.deepcopy(backbone, shared)
    for parent, convolution, norm in list(_pairs(carrying)):
        layers = getattr(parent, convolution), getattr(parent, norm)
        setattr(parent, convolution, CarryingConvolution(*layers))
        setattr(parent, norm, nn.Identity())
    return carrying


@contextmanager
def computed_once(network: nn.Module) -> Iterator[None]:
    """Compute the weights of all `CarryingConvolution` once for the passes inside.

    Gradients of the passes are summed on these weights and handed on to the network's parameters at the end.
    """
    layers = [module for module in network.modules() if isinstance(module, CarryingConvolution)]
    try:
        for layer in layers:
            weight, bias = layer.fused()
            trains = weight.requires_grad
            layer.held = weight.detach().requires_grad_(trains), bias.detach().requires_grad_(trains)
        yield
        for layer in layers:
            gradients = [tensor.grad for tensor in layer.held or ()]
            if gradients[0] is not None:
                torch.autograd.backward(layer.fused(), gradients)
    finally:
        for layer in layers:
            layer.held = None


def _pairs(network: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """Convolutions and the BatchNorm that follows each, as names in their parent."""
    for parent in network.modules():
        names = [name for name, _ in parent.named_children()]
        if isinstance(parent, nn.Sequential):
            candidates = list(pairwise(names))
        else:
            candidates = [(name, name.replace("conv", "bn")) for name in names if name.startswith("conv")]
        for convolution, norm in candidates:
            if isinstance(getattr(parent, norm, None), nn.BatchNorm2d):
                yield parent, convolution, norm
