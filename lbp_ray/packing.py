"""How many trials share a GPU: measured memory to the share of a GPU that a trial asks Ray for.

Packing changes no number: each trial is a process of its own, and a trial's address does not name it.
"""

from __future__ import annotations

import math
import socket
from typing import TYPE_CHECKING, NamedTuple

import torch

from lbp_ray.runs import RunError
from lbp_ray.training import Training

if TYPE_CHECKING:
    from lbp_ray.cell import TrialData, TrialSpec
    from lbp_ray.resident import Resident

SPARE = 0.1
"""Share of a GPU's memory that stays free: fragments, and what libraries take later."""

MOST_PER_GPU = 8
"""Most trials on one GPU: a step of 32 slices leaves gaps that others fill, but not more than these."""

RAY_UNIT = 10_000
"""Ray counts resources in ten-thousandths."""

CONTEXT_BYTES = 640 * 2**20
"""What a process leaves on every GPU that it was ever given: its CUDA context and libraries. Assumed, not measured."""

MEASURED_STEPS = 6
"""Steps of all weights that are measured: enough that one is recorded as a CUDA graph and replayed."""


class Peak(NamedTuple):
    """What a trial takes of its GPU at most, and what the GPU has, in bytes."""

    taken: int
    """By its own process, and by the context of one process for each other GPU of the node: Ray gives a process
    another GPU from call to call, so that in the end each has a context on all."""
    total: int


def gpus_for(peak: Peak) -> float:
    """Return the share of a GPU with which as many trials start as its memory holds.

    Parameters
    ----------
    peak
        Of one trial.

    Returns
    -------
    float
        1 / n rounded down to Ray's unit, so that n fit; n is 1 to `MOST_PER_GPU`.
    """
    fit = int(peak.total * (1 - SPARE) // max(peak.taken, 1))
    return math.floor(RAY_UNIT / min(max(fit, 1), MOST_PER_GPU)) / RAY_UNIT


def measure_peak(spec: TrialSpec, data: TrialData, resident: Resident) -> Peak:
    """Take some steps of all weights, score some slices and read the GPU's memory. Unrun so far: needs a GPU.

    Parameters
    ----------
    spec
        A trial of the study, one with the most slices.
    data, resident
        As `lbp_ray.trial.run_trial` takes them; nothing of the steps may be used afterwards.

    Raises
    ------
    RunError
        If the GPU's memory is too small.
    """
    try:
        training = Training(spec, data, resident)
        if spec.recipe.unfrozen_epochs:
            training.unfreeze()
        training.rehearse(MEASURED_STEPS)
    except torch.OutOfMemoryError as error:
        msg = (
            f"compute.gpus_per_trial: auto: a trial does not fit on a GPU of node {socket.gethostname()}: {error}; "
            "start Ray there without that GPU (--num-gpus), or lower recipe.images_per_pass or recipe.batch_size"
        )
        raise RunError(msg) from None
    free, total = torch.cuda.mem_get_info(resident.device)
    outside = total - free - torch.cuda.memory_reserved(resident.device)  # the context, and other processes if any
    visitors = CONTEXT_BYTES * (torch.cuda.device_count() - 1)
    return Peak(outside + torch.cuda.max_memory_reserved(resident.device) + visitors, total)
