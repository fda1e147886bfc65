"""The machine as it was measured, or a given one with what is assumed of it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from lbp_ray.config import FrozenModel
from lbp_ray.plan.flops import image_cost
from lbp_ray.plan.spans import PlanError, Span

if TYPE_CHECKING:
    from lbp_ray.plan.calibration import Calibration
    from lbp_ray.plan.sizes import StudySizes


class Gpu(NamedTuple):
    """Published peaks of a GPU, dense, in TFLOP/s, and its memory in GB."""

    bfloat16: float
    float32: float
    memory_gb: float


GPUS = {
    "h200": Gpu(989, 67, 141),
    "h100": Gpu(989, 67, 80),
    "a100": Gpu(312, 19.5, 80),
}
"""Data sheets of the SXM modules, without sparsity. Float32 is full float32 here, never TF32."""

TRAINING_SHARE = Span(low=0.06, middle=0.10, high=0.17)
"""Share of the bfloat16 peak that training ResNet50 reaches, batch 32, not compiled: 60, 100 and 170 TFLOP/s of an
H100. Assumed; NVIDIA's published A100 figures (large batches, DALI) are 0.19 in mixed precision."""

INFERENCE_SHARE = Span(low=0.12, middle=0.15, high=0.30)
"""The same for scoring. Assumed."""

FLOAT32_SHARE = Span(low=0.3, middle=0.5, high=0.7)
"""Share of the float32 peak, without tensor cores, of extraction and of float32 epochs. Assumed."""

GPUS_PER_NODE, CORES_PER_GPU, MEMORY_PER_GPU = 8, 16, 128 * 10**9
"""Of a given machine with GPUs. Assumed."""

MEMORY_PER_CORE = 4 * 10**9
"""Of a given machine without GPUs. Assumed."""

NETWORK_BYTES_S = 1.25e9
"""Bytes per second that a node reads from storage that all nodes share: 10 Gbit/s. Assumed."""


class Hardware(FrozenModel):
    """What a study would run on; rates are of one GPU or of one CPU worker."""

    name: str
    nodes: int
    cores: int
    """Of all nodes."""
    gpus: int
    """Of all nodes; 0: trials run on CPUs."""
    node_bytes: int
    """Memory of one node."""
    gpu_bytes: int
    extraction_s: Span
    """Seconds per image."""
    evaluation_s: Span
    training_s: Span
    optimiser_s: Span
    """Seconds per step; 0 where a GPU's share is assumed, which has it in it."""
    head_step_s: Span
    read_bytes_s: Span
    """Per node."""
    write_bytes_s: Span
    is_shared: bool
    """Whether storage is behind a network."""
    assumptions: tuple[str, ...]


class Wish(NamedTuple):
    """Hardware as asked for on the command line; None leaves a number to this machine, or to an assumption."""

    gpus: int | None = None
    gpu: str | None = None
    cores: int | None = None
    nodes: int | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing was asked for."""
        return all(value is None for value in self)


def describe_hardware(wish: Wish, calibration: Calibration, sizes: StudySizes) -> Hardware:
    """Return what a study would run on, with the costs of its images there.

    Parameters
    ----------
    wish
        What was asked for; nothing means the calibrated machine.
    calibration
        Costs of the calibrated machine; those of another crop size are scaled by operations.
    sizes
        The study.

    Raises
    ------
    PlanError
        If a number is below 1, a GPU is named without a number, or cores are asked for of what a GPU was measured.
    """
    wrong = {name: value for name, value in wish._asdict().items() if isinstance(value, int) and value < 1}
    if wrong or (wish.gpu and not wish.gpus):
        found = ", ".join(f"--{name} {value}" for name, value in wrong.items()) or f"--gpu {wish.gpu} without --gpus"
        msg = f"hardware is counted from 1, found {found}; leave an option out to plan for this machine"
        raise PlanError(msg)
    require_gpus(wish, calibration.machine.device)
    here = _calibrated(calibration, sizes)
    if wish.is_empty:
        return here
    if wish.gpus:
        return _with_gpus(here, wish, calibration, sizes)
    nodes = wish.nodes or 1
    cores = wish.cores or here.cores * nodes
    return here.model_copy(
        update={
            "name": f"{cores} cores on {nodes} node(s)",
            "nodes": nodes,
            "cores": cores,
            "gpus": 0,
            "node_bytes": MEMORY_PER_CORE * cores // nodes,
            **_shared_storage(here, nodes),
            "assumptions": (*_core_assumptions(calibration), f"{MEMORY_PER_CORE / 1e9:g} GB of memory per core"),
        }
    )


def require_gpus(wish: Wish, device: str) -> None:
    """Refuse to plan cores by what a GPU costs.

    Raises
    ------
    PlanError
        If cores or nodes are asked for, but no GPUs, where images are measured on one.
    """
    if device == "cuda" and not wish.is_empty and not wish.gpus:
        msg = "images are measured on a GPU, which says nothing of cores: add --gpus, or set compute.gpus_per_trial=0"
        raise PlanError(msg)


def _calibrated(calibration: Calibration, sizes: StudySizes) -> Hardware:
    """Return the machine that was measured."""
    costs, machine = calibration.costs, calibration.machine
    wanted, found = (
        image_cost(*size) for size in ((sizes.height_px, sizes.width_px), (calibration.height_px, calibration.width_px))
    )
    notes = []
    if wanted != found:
        notes.append(
            f"images were measured at {calibration.height_px} x {calibration.width_px}; their cost is scaled by "
            f"operations to {sizes.height_px} x {sizes.width_px}"
        )
    if sizes.dtype != calibration.dtype:
        notes.append(f"the unfrozen epochs were measured in {calibration.dtype}, the study asks for {sizes.dtype}")
    if sizes.threads != calibration.threads:
        notes.append(f"workers were measured with {calibration.threads} thread(s), the study asks for {sizes.threads}")
    if calibration.probe_images < sizes.images_per_pass:
        notes.append(
            f"a pass of {sizes.images_per_pass} images was measured on {calibration.probe_images} and scaled: large "
            "batches on CPUs take up to a fifth more per image"
        )
    if machine.device == "cuda":
        notes.append("steps of all weights were measured as they are, where trials replay them from a CUDA graph")
    return Hardware(
        name=f"{machine.name}, {machine.cores} cores" + (f", {machine.gpus} GPU(s)" if machine.gpus else ""),
        nodes=1,
        cores=machine.cores,
        gpus=machine.gpus,
        node_bytes=machine.memory_bytes,
        gpu_bytes=machine.gpu_memory_bytes,
        extraction_s=costs.extraction_s * (wanted.forward / found.forward),
        evaluation_s=costs.evaluation_s * (wanted.forward / found.forward),
        training_s=costs.training_s * (wanted.training / found.training),
        optimiser_s=costs.optimiser_s,
        head_step_s=costs.head_step_s,
        read_bytes_s=costs.read_bytes_s,
        write_bytes_s=costs.write_bytes_s,
        is_shared=False,
        assumptions=tuple(notes),
    )


def _with_gpus(here: Hardware, wish: Wish, calibration: Calibration, sizes: StudySizes) -> Hardware:
    assert wish.gpus is not None
    name = wish.gpu or "h100"
    gpu, nodes = GPUS[name], wish.nodes or math.ceil(wish.gpus / GPUS_PER_NODE)
    cores = wish.cores or wish.gpus * CORES_PER_GPU
    cost = image_cost(sizes.height_px, sizes.width_px)
    half = sizes.dtype == "bfloat16"
    peak = gpu.bfloat16 if half else gpu.float32
    measured = _measured_shares(calibration)
    shares = measured or {
        "training": TRAINING_SHARE if half else FLOAT32_SHARE,
        "evaluation": INFERENCE_SHARE if half else FLOAT32_SHARE,
        "extraction": FLOAT32_SHARE,
    }
    whose = "measured on this machine's GPU" if measured else "assumed"
    rates = {
        "training": shares["training"] * (peak * 1e12),
        "evaluation": shares["evaluation"] * (peak * 1e12),
        "extraction": shares["extraction"] * (gpu.float32 * 1e12),
    }
    told = ", ".join(f"{stage} {rate.low / 1e12:.0f} to {rate.high / 1e12:.0f}" for stage, rate in rates.items())
    return here.model_copy(
        update={
            "name": f"{wish.gpus} x {name.upper()} and {cores} cores on {nodes} node(s)",
            "nodes": nodes,
            "cores": cores,
            "gpus": wish.gpus,
            "node_bytes": MEMORY_PER_GPU * math.ceil(wish.gpus / nodes),
            "gpu_bytes": int(gpu.memory_gb * 1e9),
            "extraction_s": rates["extraction"].under(cost.forward),
            "evaluation_s": rates["evaluation"].under(cost.forward),
            "training_s": rates["training"].under(cost.training),
            "optimiser_s": here.optimiser_s if measured else Span.exactly(0.0),
            **_shared_storage(here, nodes),
            "assumptions": (
                f"TFLOP/s per {name.upper()}: {told} (share of the published peaks {whose}: "
                f"{f'{peak:g} bfloat16, ' if half else ''}{gpu.float32:g} float32)",
                "a step of the last layer costs on the GPU what it costs on this machine",
                *(["Adam's step of all weights costs what it costs on this machine's GPU"] if measured else []),
                *_core_assumptions(calibration),
                f"{MEMORY_PER_GPU / 1e9:g} GB of memory per GPU",
                *([f"{CORES_PER_GPU} cores per GPU"] if wish.cores is None else []),
                *([f"{GPUS_PER_NODE} GPUs per node"] if wish.nodes is None else []),
                *([f"{NETWORK_BYTES_S / 1e9:g} GB/s of shared storage per node"] if nodes > 1 else []),
            ),
        }
    )


def _measured_shares(calibration: Calibration) -> dict[str, Span] | None:
    """Return what a measured GPU reached of its own peaks, or None where a CPU was measured."""
    if calibration.machine.device != "cuda":
        return None
    costs, cost = calibration.costs, image_cost(calibration.height_px, calibration.width_px)
    peak = costs.gemm_bfloat16_flop_s if calibration.dtype == "bfloat16" else costs.gemm_float32_flop_s
    return {
        "training": costs.training_s.under(cost.training) * (1 / peak.middle),
        "evaluation": costs.evaluation_s.under(cost.forward) * (1 / peak.middle),
        "extraction": costs.extraction_s.under(cost.forward) * (1 / costs.gemm_float32_flop_s.middle),
    }


def _core_assumptions(calibration: Calibration) -> tuple[str, ...]:
    return (f"a core does what one of {calibration.machine.name} does",)


def _shared_storage(here: Hardware, nodes: int) -> dict[str, object]:
    """Return rates of storage: one node keeps those measured here."""
    if nodes == 1:
        return {"read_bytes_s": here.read_bytes_s, "write_bytes_s": here.write_bytes_s, "is_shared": False}
    rate = Span.exactly(NETWORK_BYTES_S)
    return {"read_bytes_s": rate, "write_bytes_s": rate, "is_shared": True}
