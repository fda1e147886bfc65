"""What the workers of one trial tell each other; for a worker alone, everything here leaves things as they are.

Every worker holds the whole trial. Of each global batch it computes a contiguous part, and the logits of all parts are
joined, so that each sees the loss of the whole batch: the gradients, averaged over workers, are then those of one
worker at that batch, however unevenly the batch divides.

Shape suffixes: B batch, P outputs.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lbp_ray.segment.loop import rank_and_world

Value = TypeVar("Value")


def part_of(size: int) -> slice:
    """Return this worker's part of a batch; it is empty where there are more workers than samples."""
    rank, world = rank_and_world()
    return slice(size * rank // world, size * (rank + 1) // world)


def joined(logits_BP: Tensor, size: int) -> Tensor:
    """Put the workers' logits together, with gradients.

    Parameters
    ----------
    logits_BP
        Of this worker's part.
    size
        Samples of the whole batch.

    Returns
    -------
    torch.Tensor
        (size, P); float32 where there are several workers. The gradient that reaches each part is that of the loss
        times the number of workers, which averaging over workers takes back.
    """
    world = rank_and_world()[1]
    if world == 1:
        return logits_BP
    part = part_of(size)
    whole_BP = logits_BP.new_zeros(size, logits_BP.shape[1], dtype=torch.float32)
    whole_BP[part] = logits_BP.detach()
    dist.all_reduce(whole_BP)
    if logits_BP.requires_grad:
        logits_BP.register_hook(lambda gradient: gradient * world)  # type: ignore[no-untyped-call]
    return torch.cat([whole_BP[: part.start], logits_BP.float(), whole_BP[part.stop :]])


def averaging(network: nn.Module) -> nn.Module:
    """Make the gradients of a network the mean over all workers, who start from the first one's weights."""
    return DistributedDataParallel(network) if rank_and_world()[1] > 1 else network


def from_first(value: Value) -> Value:
    """Return what the first worker holds: on another host a file may not be seen yet."""
    held = [value]
    if rank_and_world()[1] > 1:
        dist.broadcast_object_list(held, src=0)
    return held[0]
