"""Batch normalisation over the batch of all workers, on any device.

PyTorch's own SyncBatchNorm runs on accelerators only; training spread over CPUs must give what one worker gives, too.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm


class CpuSyncBatchNorm(_BatchNorm):
    """Batch normalisation whose mean and variance are of the global batch while training.

    Parameters, buffers and their names are those of `torch.nn.BatchNorm2d` and `BatchNorm3d`.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 3:
            msg = f"expected (batch, channels, ...) with spatial axes, found {tuple(input.shape)}"
            raise ValueError(msg)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (B, C, ...) over batch and space; the gradient flows through the global statistics."""
        if not self.training:
            return super().forward(input)
        axes = [0, *range(2, input.dim())]
        values = input.float()
        count = values.numel() // values.shape[1]
        local = torch.stack([values.sum(axes), values.square().sum(axes), values.new_full((values.shape[1],), count)])
        sum_C, square_C, count_C = all_reduce(local)  # type: ignore[no-untyped-call]
        mean_C = sum_C / count_C
        variance_C = (square_C / count_C - mean_C.square()).clamp_min(0)
        self._track(mean_C.detach(), variance_C.detach() * (count_C / (count_C - 1)))
        shape = [1, -1, *[1] * (input.dim() - 2)]
        scale_C = self.weight * torch.rsqrt(variance_C + self.eps)
        shift_C = self.bias - mean_C * scale_C
        output: Tensor = (values * scale_C.view(shape) + shift_C.view(shape)).to(input.dtype)
        return output

    @torch.no_grad()
    def _track(self, mean_C: Tensor, unbiased_C: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean_C, self.momentum)
        self.running_var.lerp_(unbiased_C, self.momentum)


def synchronise_batchnorm(network: nn.Module, device: str) -> nn.Module:
    """Make a network's batch normalisation count the batches of all workers of the process group.

    Parameters
    ----------
    network
        Changed in place where its layers are replaced; state dicts fit both ways.
    device
        ``cpu`` or a GPU: there, PyTorch's own layer is used.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return network
    if device != "cpu":
        return cast("nn.Module", nn.SyncBatchNorm.convert_sync_batchnorm(network))  # type: ignore[no-untyped-call]
    for module in network.modules():
        for name, child in module.named_children():
            if isinstance(child, _BatchNorm):
                twin = CpuSyncBatchNorm(child.num_features, child.eps, child.momentum)
                twin.load_state_dict(child.state_dict())
                setattr(module, name, twin)
    return network
