"""What the epochs of a trial are made of: a batch's gradients in passes, the optimiser's steps, the learning rate.

Shape suffixes: N studies, M samples (slices), B batch, P outputs.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from lbp_ray.nets.folding import computed_once
from lbp_ray.samples import Samples, SamplesOnGpu, some

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from lbp_ray.samples import Slices
    from lbp_ray.streaming import BlockOrder
    from lbp_ray.study import Recipe


def learning_rate(recipe: Recipe, epoch: int) -> float:
    """Return the learning rate of an epoch counted from 1 over both stages."""
    if epoch > recipe.frozen_epochs and recipe.learning_rate_unfrozen is not None:
        return recipe.learning_rate_unfrozen
    return recipe.learning_rate if epoch < recipe.learning_rate_drop else recipe.learning_rate_late


def train_epoch(
    score: Callable[[Samples], Tensor],
    optimiser: torch.optim.Optimizer,
    samples: Samples,
    *,
    targets_NP: Tensor,
    order: np.ndarray | BlockOrder,
    batch_size: int,
) -> float:
    """Train for one epoch.

    Parameters
    ----------
    score
        Samples of one batch → (B, P) logits, with gradients.
    optimiser
        Holds the parameters that train.
    samples
        The training slices.
    targets_NP
        Label of every study; each of the P outputs is a head of its own.
    order
        Permutation of the samples.
    batch_size
        Samples per step; the last batch may be smaller.

    Returns
    -------
    float
        Mean loss over the samples (summed over outputs).
    """
    step = training_step(score, optimiser, targets_NP)
    return take_steps(step, samples, order=order, batch_size=batch_size)


def training_step(
    score: Callable[[Any], Tensor],
    optimiser: torch.optim.Optimizer,
    targets_NP: Tensor,
    *,
    images_per_pass: int | None = None,
    network: nn.Module | None = None,
) -> Callable[[Any], Tensor]:
    """Return the function that trains on one batch and returns its mean loss, on the device (see `train_epoch`).

    Parameters
    ----------
    score, optimiser, targets_NP
        As `train_epoch` takes them.
    images_per_pass
        Samples that are scored at once; gradients of a batch are summed over its passes. None takes the whole batch.
    network
        What `score` runs, so that the passes of a batch share what does not depend on their samples.
    """

    def step(batch: Samples | SamplesOnGpu) -> Tensor:
        optimiser.zero_grad(set_to_none=True)
        with computed_once(network) if network and images_per_pass else nullcontext():
            losses = [one_pass(part, part.size / batch.size) for part in passes(batch, images_per_pass)]
        optimiser.step()
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def one_pass(part: Samples | SamplesOnGpu, share: float) -> Tensor:
        logits_BP = score(part)
        targets_BP = targets_NP[torch.as_tensor(part.study_M)].to(logits_BP.device)
        loss = binary_cross_entropy_with_logits(logits_BP.float(), targets_BP, reduction="none").mean(0).sum() * share
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    return step


def passes(samples: Slices, size: int | None) -> list[Slices]:
    """Divide samples into passes of `size`, the last maybe smaller; None leaves them together."""
    size = size or samples.size
    return [some(samples, slice(start, start + size)) for start in range(0, samples.size, size)]


def take_steps(
    step: Callable[[Any], Tensor], samples: Slices, *, order: np.ndarray | BlockOrder | Tensor, batch_size: int
) -> float:
    """Take an epoch's steps and return the mean loss, which the device is asked for once, at the end."""
    starts = range(0, samples.size, batch_size)
    losses = torch.empty(0)
    for number, start in enumerate(starts):
        loss = step(some(samples, order[start : start + batch_size]))
        if number == 0:  # one tensor: a list of small ones would scatter the heap
            losses = loss.new_empty(len(starts))
        losses[number] = loss
    total = 0.0
    for start, value in zip(starts, losses.tolist(), strict=True):
        total += value * min(batch_size, samples.size - start)
    return total / samples.size


def adam(parameters: list[nn.Parameter], recipe: Recipe) -> torch.optim.Adam:
    """Make the recipe's Adam, in its fused form; the learning rate is set before each epoch."""
    return torch.optim.Adam(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True)
