"""What a trial does on a GPU alone: data that stays there, and steps replayed from a recorded graph. Unrun so far.

No line here has run on a GPU yet; the arithmetic of `CropsOnGpu` is tested on a CPU.

Shape suffixes: N studies, K slice offsets, H rows, W columns, B batch.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lbp_ray.cell import TrialError

if TYPE_CHECKING:
    from collections.abc import Callable

    from lbp_ray.samples import SamplesOnGpu

HELD_BYTES = 4 * 2**30
"""Largest crops, in bytes, that each trial's process keeps on its GPU: 5,000 studies of 5 slices of 400 x 200."""

WARM_UP_STEPS = 3
"""Full batches that run as they are before one is recorded: libraries choose their kernels in them."""

_log = logging.getLogger(__name__)


class CropsOnGpu:
    """The crops of a study on a device, standardised there from 16-bit pixels when they are asked for.

    Gives what `lbp_ray.nets.resnet.standardise` gives, which asks the device at each batch whether an image is
    constant; here that was asked once.

    Parameters
    ----------
    crops_NKHW
        Stored pixel values, uint16 or int16.
    row_N
        Row of each study in the crops.
    device
        Torch device.

    Raises
    ------
    TrialError
        If an image is constant.
    """

    def __init__(self, crops_NKHW: np.ndarray, row_N: np.ndarray, device: str) -> None:
        shape = (len(row_N), *crops_NKHW.shape[1:])
        self._bits_NKHW = torch.empty(shape, dtype=torch.int16, device=device)  # PyTorch gathers no uint16 on GPUs
        self._stored = torch.int16 if crops_NKHW.dtype == np.int16 else torch.uint16
        self._mean_NK, self._std_NK = (torch.empty(shape[:2], device=device) for _ in range(2))
        for study, row in enumerate(row_N):
            self._bits_NKHW[study] = torch.from_numpy(np.array(crops_NKHW[row]).view(np.int16)).to(device)
            values_KHW = self._as_float(self._bits_NKHW[study])
            self._mean_NK[study] = values_KHW.mean(dim=(1, 2))
            self._std_NK[study] = values_KHW.std(dim=(1, 2), correction=0)
        blank = (self._std_NK == 0).nonzero().tolist()
        if blank:
            msg = f"crop {blank[0][1]} of study {blank[0][0]} is constant; a blank crop cannot be standardised"
            raise TrialError(msg)

    def images(self, study_B: Tensor, offset_B: Tensor) -> Tensor:
        """Return (B, 3, H, W) float32 in channels_last."""
        values_BHW = self._as_float(self._bits_NKHW[study_B, offset_B])
        mean, std = (table[study_B, offset_B][:, None, None] for table in (self._mean_NK, self._std_NK))
        image_B1HW = ((values_BHW - mean) / std).unsqueeze(1)
        return image_B1HW.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)

    def _as_float(self, bits: Tensor) -> Tensor:
        return bits.view(self._stored).to(torch.float32)


def why_not_held(crops_NKHW: np.ndarray, num_studies: int) -> str:
    """Say why crops of so many studies may not stay on a GPU; '' where they may: 16-bit, not beyond `HELD_BYTES`."""
    if crops_NKHW.dtype not in (np.uint16, np.int16):
        return f"their type is {crops_NKHW.dtype}, neither uint16 nor int16"
    held = num_studies * crops_NKHW[0].nbytes
    return f"they take {held:,} bytes, at most {HELD_BYTES:,} are held" if held > HELD_BYTES else ""


class RecordedStep:
    """A training step whose full batches, after a few, are replayed from one recorded CUDA graph.

    A graph repeats kernels on the memory they were recorded with, its learning rate included, without the Python and
    the launches that a small batch waits for. A smaller batch, and everything after a recording that failed, runs as
    it is.

    Parameters
    ----------
    step
        Takes a batch of device tensors, trains on it and returns its loss; asks the device for nothing.
    optimiser
        The fused Adam that `step` calls.
    batch_size
        Samples of a full batch.
    """

    def __init__(
        self, step: Callable[[SamplesOnGpu], Tensor], optimiser: torch.optim.Optimizer, *, batch_size: int
    ) -> None:
        self._step, self._optimiser, self._batch_size = step, optimiser, batch_size
        self._left = WARM_UP_STEPS
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: SamplesOnGpu
        self._loss: Tensor

    def __call__(self, batch: SamplesOnGpu) -> Tensor:
        """Train on one batch and return its loss."""
        if batch.size == self._batch_size and self._left == 0:
            self._left = -1  # once
            self._record(batch)
        if self._graph is None or batch.size < self._batch_size:
            self._left -= self._left > 0
            return self._step(batch)
        self._take(batch)
        self._graph.replay()
        return self._loss.clone()

    def _take(self, batch: SamplesOnGpu) -> None:
        for mine, given in zip(self._batch, batch, strict=True):
            mine.copy_(given)

    def _record(self, batch: SamplesOnGpu) -> None:
        self._batch = type(batch)(*(part.clone() for part in batch))
        self._optimiser.zero_grad(set_to_none=True)  # so that gradients are born in the graph's own memory
        self._capturable(True)
        try:
            graph = torch.cuda.CUDAGraph()
            # On the batch's GPU: without a stream it would be recorded on that of the process's first graph.
            stream = torch.cuda.Stream(batch.study_M.device)  # type: ignore[no-untyped-call]
            # The outer context: where a recording fails, the inner one leaves its stream current.
            with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
                self._loss = self._step(self._batch)
            self._graph = graph
        except (RuntimeError, ValueError) as error:  # the latter where the batch is not on a GPU
            cause = error.__context__ or error  # the end of a recording that failed hides why it did
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            _log.warning("the training step could not be recorded as a CUDA graph and runs as it is: %s", cause)
        finally:
            self._capturable(False)

    def _capturable(self, value: bool) -> None:  # the fused Adam is so anyway; PyTorch wants to be told, and warns
        for group in self._optimiser.param_groups:
            group["capturable"] = value
