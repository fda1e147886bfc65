"""One training loop for every segmentation network, by one worker or by several that share each batch.

What differs between networks is a `Task`: its slices or volumes, how they are turned, the loss.
"""

from __future__ import annotations

import io
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from lbp_ray.nets.syncnorm import synchronise_batchnorm
from lbp_ray.segment.network import SegmentError
from preprocess.commit import commit_point, write_atomic

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor, nn


class Task(Protocol):
    """What a network is trained for."""

    @property
    def size(self) -> int:
        """Number of training samples."""

    @property
    def validation_size(self) -> int:
        """Number of validation samples; 0 for a final model."""

    def training_batch(self, samples_B: np.ndarray, epoch: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of training samples, turned as this epoch turns them."""

    def validation_batch(self, samples_B: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of validation samples, as they are."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of every sample, (B,)."""

    def dice(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the Dice coefficient of every sample, (B,)."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a network is trained."""

    epochs: int
    learning_rate: float
    drops: tuple[tuple[int, float], ...]
    """(first epoch, counted from 1; learning rate from there on), ascending."""
    weight_decay: float
    batch_size: int
    """Samples of one step over all workers; an epoch's batches differ by one at most."""
    bfloat16: bool
    seed: int

    def learning_rate_at(self, epoch: int) -> float:
        """Return the learning rate of an epoch counted from 1."""
        return [self.learning_rate, *(rate for first, rate in self.drops if epoch >= first)][-1]

    def batches(self, size: int, epoch: int) -> list[np.ndarray]:
        """Return the epoch's samples in a counted order, cut into batches of nearly one size."""
        order = np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(size)
        return np.array_split(order, -(-size // self.batch_size))


@dataclass(frozen=True)
class EpochRecord:
    """One line of a learning curve."""

    epoch: int
    learning_rate: float
    train_loss: float
    """Mean over the epoch's samples, while training."""
    validation_loss: float | None
    """Mean over the fold that is left out; for looking, nothing is chosen on it. None for a final model."""
    validation_dice: float | None


def rank_and_world() -> tuple[int, int]:
    """Return this worker's number and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class Training:
    """A network while it trains; `epochs` yields a record after each.

    Parameters
    ----------
    network
        Starts from its present state.
    task, schedule
        What it learns, and how.
    device
        Torch device of this worker.
    """

    def __init__(self, network: nn.Module, task: Task, schedule: Schedule, *, device: str = "cpu") -> None:
        self.task, self.schedule, self.device = task, schedule, device
        self.rank, self.world = rank_and_world()
        fewest = task.size // -(-task.size // schedule.batch_size) if task.size else 0
        if fewest < max(2, self.world):
            msg = (
                f"{task.size} training sample(s) in batches of {schedule.batch_size} give batches of {fewest}; "
                f"{max(2, self.world)} are required: annotate more, or use fewer workers or larger batches"
            )
            raise SegmentError(msg)
        self.network = synchronise_batchnorm(network.to(device), device.split(":")[0])
        self.optimiser = torch.optim.Adam(
            self.network.parameters(), lr=schedule.learning_rate, weight_decay=schedule.weight_decay, fused=True
        )
        self.history: list[EpochRecord] = []

    def epochs(self, checkpoint: Path, *, checkpoint_s: float) -> Iterator[EpochRecord]:
        """Train to the end, resuming from a checkpoint when there is one.

        Parameters
        ----------
        checkpoint
            In-progress state.
        checkpoint_s
            Least time between two writings of it, in seconds.
        """
        self._resume(checkpoint)
        model = DistributedDataParallel(self.network) if self.world > 1 else self.network
        yield from list(self.history)
        saved_s = time.monotonic()
        for epoch in range(len(self.history) + 1, self.schedule.epochs + 1):
            self.history.append(self._epoch(model, epoch))
            last = epoch == self.schedule.epochs
            if self.rank == 0 and not last and time.monotonic() - saved_s >= checkpoint_s:
                self._save(checkpoint)
                saved_s = time.monotonic()
            yield self.history[-1]

    def _epoch(self, model: nn.Module, epoch: int) -> EpochRecord:
        rate = self.schedule.learning_rate_at(epoch)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        model.train()
        total = torch.zeros((), dtype=torch.float64)
        for batch in self.schedule.batches(self.task.size, epoch):
            inputs, targets = self.task.training_batch(batch[self.rank :: self.world], epoch)
            losses = self._losses(model, inputs, targets)[0]
            # Workers' gradients are averaged: this makes the average the mean over the whole batch.
            (losses.sum() * (self.world / len(batch))).backward()  # type: ignore[no-untyped-call]
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)
            total += losses.detach().double().sum().cpu()
        train_loss = float(self._summed(total)) / self.task.size
        validation = self._validate()
        if not np.isfinite([train_loss, *(value for value in validation if value is not None)]).all():
            msg = f"the loss is not finite at epoch {epoch}; lower recipe.learning_rate"
            raise SegmentError(msg)
        return EpochRecord(epoch, rate, train_loss, *validation)

    def _losses(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and Dice of every sample."""
        with torch.autocast(self.device.split(":")[0], dtype=torch.bfloat16, enabled=self.schedule.bfloat16):
            outputs = model(inputs.to(self.device, non_blocking=True))
        targets = targets.to(self.device, non_blocking=True)
        return self.task.loss(outputs.float(), targets), self.task.dice(outputs.detach().float(), targets)

    @torch.no_grad()
    def _validate(self) -> tuple[float | None, float | None]:
        size = self.task.validation_size
        if not size:
            return None, None
        self.network.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        mine = np.arange(size)[self.rank :: self.world]
        for start in range(0, len(mine), self.schedule.batch_size):
            batch = self.task.validation_batch(mine[start : start + self.schedule.batch_size])
            sums += torch.stack([values.double().sum().cpu() for values in self._losses(self.network, *batch)])
        loss, dice = (self._summed(sums) / size).tolist()
        return loss, dice

    def _summed(self, values: Tensor) -> Tensor:
        """Sum over all workers."""
        if self.world > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values.cpu()

    def _save(self, checkpoint: Path) -> None:
        buffer = io.BytesIO()
        state: dict[str, Any] = {
            "network": self.network.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "history": [asdict(record) for record in self.history],
        }
        torch.save(state, buffer)
        write_atomic(checkpoint, buffer.getvalue())
        commit_point("segment:checkpoint")

    def _resume(self, checkpoint: Path) -> None:
        """Take up the first worker's checkpoint on all workers: on another host its file may not be seen yet."""
        found = [checkpoint.read_bytes() if self.rank == 0 and checkpoint.is_file() else None]
        if self.world > 1:
            dist.broadcast_object_list(found, src=0)
        if found[0] is None:
            return
        state = torch.load(io.BytesIO(found[0]), map_location=self.device, weights_only=True)
        self.history = [EpochRecord(**record) for record in state["history"]]
        self.network.load_state_dict(state["network"])
        self.optimiser.load_state_dict(state["optimiser"])
