"""Counts and costs → what every stage takes, and what holds it up. Pure arithmetic."""

from __future__ import annotations

import heapq
import math
from typing import TYPE_CHECKING, Literal, NamedTuple

from lbp_ray.config import FrozenModel
from lbp_ray.features import BATCH_SIZE, CUDA_BATCH_SIZE, CUDA_SHARD_STUDIES, SHARD_STUDIES
from lbp_ray.plan.counts import Counts, cells, count
from lbp_ray.plan.flops import PARAMETERS, image_cost
from lbp_ray.plan.hardware import Hardware
from lbp_ray.plan.sizes import StudySizes
from lbp_ray.plan.spans import NONE, Span

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lbp_ray.plan.calibration import Calibration, Costs
    from lbp_ray.plan.counts import Cell

RAY_START_S = Span(low=3.3, middle=4.2, high=8.0)
"""From ``ray.init`` to a first task. Stated: measured on two cores when the project was designed."""

TRIAL_S = Span(low=0.08, middle=0.12, high=0.25)
"""What Tune takes for one trial of a reused actor. Stated: measured likewise."""

LIGHT_START_S = Span(low=1.0, middle=2.0, high=4.0)
"""A Ray worker that imports no torch. Stated."""

CROP_ROW_BYTES = 3_000
"""What the driver holds of each exam while crops are cut: a row of the table. Stated."""

AGGREGATE_S = Span(low=2.0, middle=4.0, high=10.0)
"""Aggregation without its bootstrap and permutations. Stated: a small study on two cores."""

REPORT_S = Span(low=1.5, middle=4.0, high=15.0)
"""The report. Stated likewise; it does not grow with the cohort."""

LEVELS = 2
"""Studies and slices: what intervals are made of."""

PAGE_CACHE_SHARE = 0.5
"""Share of a node's memory that may hold crops or features which were read before. Assumed."""

SEVERAL_SHARE = 0.9
"""Speed of several GPUs or workers on one trial, as a share of as many single ones. Assumed."""

HEADER_BYTES = 16_384
"""What is read of a DICOM file that is looked at and left aside. Assumed."""

Bottleneck = Literal["compute", "memory", "disk", "network", "start-up"]


class Stage(FrozenModel):
    """What one stage takes."""

    name: str
    work: str
    seconds: Span
    compute_s: Span
    input_s: Span
    """Reading and writing; beside the computing, so that the longer of both counts."""
    start_s: Span
    bottleneck: Bottleneck
    """What holds the stage up; ``memory`` where it does not fit, whatever the time says."""
    worker_bytes: int
    """Memory of one worker."""
    node_bytes: int
    """Memory of all workers of a node, and of what they share."""
    disk_bytes: int
    """What stays on disk."""


class Plan(FrozenModel):
    """The prediction: one row per stage."""

    sizes: StudySizes
    counts: Counts
    hardware: Hardware
    slots: int
    """Trials that run at once."""
    stages: tuple[Stage, ...]
    advice: tuple[str, ...] = ()

    def stage(self, name: str) -> Stage:
        """Return one stage."""
        return next(stage for stage in self.stages if stage.name == name)

    @property
    def total(self) -> Span:
        """Time of all stages, one after the other."""
        return sum((stage.seconds for stage in self.stages), NONE)

    @property
    def disk_bytes(self) -> int:
        """What all stages leave on disk."""
        return sum(stage.disk_bytes for stage in self.stages)


class _Load(NamedTuple):
    """What a stage asks of memory and storage."""

    worker_bytes: float = 0.0
    node_bytes: float = 0.0
    disk_bytes: float = 0.0
    input_s: Span = NONE
    start_s: Span = NONE


def predict(sizes: StudySizes, hardware: Hardware, calibration: Calibration) -> Plan:
    """Predict every stage of a study.

    Parameters
    ----------
    sizes
        The study.
    hardware
        What it would run on.
    calibration
        Costs of what runs on cores wherever the study runs.
    """
    counts = count(sizes)
    counts = counts.model_copy(update={"store_bytes": round(_pixel_bytes(sizes) * calibration.costs.store_ratio)})
    stages = (
        *_data_stages(sizes, counts, hardware, calibration.costs),
        _extraction(sizes, counts, hardware, calibration.costs),
        *_trial_stages(sizes, counts, hardware, calibration.costs),
        *_closing_stages(sizes, counts, hardware, calibration.costs),
    )
    return Plan(sizes=sizes, counts=counts, hardware=hardware, slots=trial_slots(sizes, hardware), stages=stages)


def trial_slots(sizes: StudySizes, hardware: Hardware) -> int:
    """Return how many trials run at once."""
    on_cores = hardware.cores // (sizes.threads * (1 if hardware.gpus else sizes.workers))
    on_gpus = int(hardware.gpus / _gpus_per_trial(sizes)) if hardware.gpus else on_cores
    return max(1, min(on_cores, on_gpus))


def bottleneck(*, compute_s: float, input_s: float, start_s: float, fits: bool, shared: bool) -> Bottleneck:
    """Decide what holds a stage up.

    Parameters
    ----------
    compute_s, input_s, start_s
        Its parts.
    fits
        Whether the memory it needs is there.
    shared
        Whether its storage is behind a network.
    """
    if not fits:
        return "memory"
    parts: dict[Bottleneck, float] = {
        "compute": compute_s,
        "network" if shared else "disk": input_s,
        "start-up": start_s,
    }
    return max(parts, key=lambda name: parts[name])


def makespan(durations_s: Sequence[float], slots: int) -> float:
    """Return when the last of some trials ends that start in order, each in the first free slot."""
    free = [0.0] * min(slots, max(len(durations_s), 1))
    for duration_s in durations_s:
        heapq.heapreplace(free, free[0] + duration_s)
    return max(free)


def trial_bytes(sizes: StudySizes, worker_bytes: int) -> int:
    """Return the memory of a trial's worker: network, gradients, Adam and one pass's activations.

    Parameters
    ----------
    sizes
        The study.
    worker_bytes
        Of a worker that has the network.
    """
    activations = image_cost(sizes.height_px, sizes.width_px).activations
    value_bytes = 2 if sizes.dtype == "bfloat16" else 4
    batch = sizes.images_per_pass * activations * value_bytes * (1 if sizes.carries_norms else 2)
    return worker_bytes + (batch + 3 * 4 * PARAMETERS if sizes.unfrozen_epochs else 0)


def _stage(name: str, work: str, compute_s: Span, load: _Load, hardware: Hardware) -> Stage:
    busy = compute_s.at_least(load.input_s)
    return Stage(
        name=name,
        work=work,
        seconds=busy + load.start_s,
        compute_s=compute_s,
        input_s=load.input_s,
        start_s=load.start_s,
        bottleneck=bottleneck(
            compute_s=compute_s.middle,
            input_s=load.input_s.middle,
            start_s=load.start_s.middle,
            fits=load.node_bytes <= hardware.node_bytes,
            shared=hardware.is_shared,
        ),
        worker_bytes=round(load.worker_bytes),
        node_bytes=round(load.node_bytes),
        disk_bytes=round(load.disk_bytes),
    )


def _pixel_bytes(sizes: StudySizes) -> int:
    return sizes.exams * sizes.stored_slices * sizes.rows * sizes.columns * 2


def _transfer(hardware: Hardware, *, read: float = 0.0, written: float = 0.0, nodes: int | None = None) -> Span:
    """Time of bytes that all nodes (or some) read and write in equal parts."""
    nodes = nodes or hardware.nodes
    return (hardware.read_bytes_s * nodes).under(read) + (hardware.write_bytes_s * nodes).under(written)


def _data_stages(sizes: StudySizes, counts: Counts, hardware: Hardware, costs: Costs) -> tuple[Stage, ...]:
    exams, stored = sizes.exams, counts.store_bytes
    volume = sizes.stored_slices * sizes.rows * sizes.columns * 2
    slices = exams * sizes.stored_slices
    others = exams * max(sizes.files_per_exam - sizes.stored_slices, 0)
    light = 250e6 + 6 * volume
    per_node = light * hardware.cores / hardware.nodes
    start = RAY_START_S + LIGHT_START_S
    converting = (costs.convert_slice_s * slices + costs.header_s * others) * (1 / hardware.cores)
    reading = exams * volume + others * HEADER_BYTES
    # Crops are cut by the driver alone, which writes them one by one.
    return (
        _stage(
            "convert",
            f"{slices:,} slices of {exams * sizes.files_per_exam:,} files",
            converting,
            _Load(light, per_node, stored, _transfer(hardware, read=reading, written=stored), start),
            hardware,
        ),
        _stage(
            "mid-sagittal",
            f"{exams:,} exams",
            costs.locate_s * (exams / hardware.cores),
            _Load(light, per_node, 2_000 * exams, _transfer(hardware, read=stored), start),
            hardware,
        ),
        _stage(
            "crops",
            f"{counts.distinct_slices:,} crops, one process",
            costs.crop_s * exams,
            _Load(
                500e6 + CROP_ROW_BYTES * exams,
                500e6 + CROP_ROW_BYTES * exams,
                counts.crop_bytes,
                _transfer(hardware, read=stored, written=counts.crop_bytes, nodes=1),
            ),
            hardware,
        ),
    )


def _extraction(sizes: StudySizes, counts: Counts, hardware: Hardware, costs: Costs) -> Stage:
    images = counts.distinct_slices if sizes.feature_cache else 0
    workers = hardware.gpus or max(1, hardware.cores // sizes.threads)
    # Shards are whole: of few, the busiest worker takes clearly more than the mean.
    studies, batch = (CUDA_SHARD_STUDIES, CUDA_BATCH_SIZE) if hardware.gpus else (SHARD_STUDIES, BATCH_SIZE)
    shards = math.ceil(math.ceil(sizes.exams / studies) / workers)
    busiest = min(shards * studies * max(sizes.slice_counts), images)
    features = counts.feature_bytes if images else 0
    return _stage(
        "extraction",
        f"{images:,} forward passes" if images else "none: no feature cache",
        hardware.extraction_s * busiest,
        _Load(
            costs.worker_bytes + batch * sizes.height_px * sizes.width_px * 4,
            costs.worker_bytes * workers / hardware.nodes,
            features,
            _transfer(hardware, read=counts.crop_bytes, written=2 * features) if images else NONE,
            RAY_START_S + costs.start_s if images else NONE,
        ),
        hardware,
    )


def _gpus_per_trial(sizes: StudySizes) -> float:
    return sizes.gpus_per_trial or 1.0


def cell_seconds(cell: Cell, sizes: StudySizes, hardware: Hardware) -> tuple[Span, Span, Span]:
    """Return a trial's own time in heads, unfrozen epochs and evaluation, alone on one worker or GPU.

    Parameters
    ----------
    cell
        The trial's work.
    sizes
        The study.
    hardware
        Costs per image and step.
    """
    heads = hardware.head_step_s * cell.head_steps
    if not sizes.feature_cache:
        heads += hardware.evaluation_s * cell.frozen_passes
    unfrozen = hardware.training_s * cell.training_images + hardware.optimiser_s * cell.unfrozen_steps
    return heads, unfrozen, hardware.evaluation_s * cell.evaluation_images


def _trial_stages(sizes: StudySizes, counts: Counts, hardware: Hardware, costs: Costs) -> tuple[Stage, ...]:
    """Predict heads, unfrozen epochs and evaluation: the trials' time, shared out by what each stage takes of it."""
    slots, devices = trial_slots(sizes, hardware), _gpus_per_trial(sizes) if hardware.gpus else sizes.workers
    speed = devices * (SEVERAL_SHARE if devices > 1 else 1.0)
    speeds = (min(1.0, devices), speed, speed)  # each worker trains the whole last layer, and a part of the images
    work = list(cells(sizes))
    by_kind = {cell: cell_seconds(cell, sizes, hardware) for cell in set(work)}
    walls = []
    for bound in ("low", "middle", "high"):
        parts = {
            cell: [getattr(part, bound) / times for part, times in zip(spans, speeds, strict=True)]
            for cell, spans in by_kind.items()
        }
        sums = [sum(parts[cell][index] for cell in work) for index in range(3)]
        wall = makespan([sum(parts[cell]) for cell in work], slots)
        walls.append([wall * part / (sum(sums) or 1.0) for part in sums])
    heads, unfrozen, evaluation = (Span(low=a, middle=b, high=c) for a, b, c in zip(*walls, strict=True))
    start = RAY_START_S + costs.start_s + TRIAL_S * (counts.trials / min(slots, counts.trials))
    per_node = math.ceil(min(slots, counts.trials) / hardware.nodes)
    features = 0 if sizes.blocks or not sizes.feature_cache else counts.feature_bytes
    held = trial_bytes(sizes, costs.worker_bytes) if not hardware.gpus else costs.worker_bytes
    image_bytes = sizes.height_px * sizes.width_px * 2
    is_cached = counts.crop_bytes <= PAGE_CACHE_SHARE * hardware.node_bytes
    read = counts.crop_bytes * hardware.nodes if is_cached else counts.training_images * image_bytes
    scored = 0 if is_cached else counts.evaluation_images * image_bytes
    return (
        _stage(
            "heads",
            f"{counts.trials:,} trials, {counts.head_steps:,} steps",
            heads,
            _Load(
                costs.worker_bytes,
                per_node * costs.worker_bytes + features,
                counts.table_bytes + counts.checkpoint_bytes * slots,
                _transfer(hardware, read=_read_features(sizes, counts, hardware)) if sizes.feature_cache else NONE,
                start,
            ),
            hardware,
        ),
        _stage(
            "unfrozen epochs",
            f"{counts.training_images:,} images, {counts.unfrozen_steps:,} steps",
            unfrozen,
            _Load(
                held,
                per_node * held,
                counts.model_bytes,
                _transfer(hardware, read=read) if sizes.unfrozen_epochs else NONE,
            ),
            hardware,
        ),
        _stage(
            "evaluation",
            f"{counts.evaluation_images:,} images",
            evaluation,
            _Load(held, per_node * held, 0, _transfer(hardware, read=scored)),
            hardware,
        ),
    )


def _read_features(sizes: StudySizes, counts: Counts, hardware: Hardware) -> float:
    """Bytes that the last layers read: the table once per node; where memory does not keep it, twice in every epoch.

    Blocks are read whole, whatever a trial wants of them: once to train, once to score its fold.
    """
    if not sizes.blocks or counts.feature_bytes <= PAGE_CACHE_SHARE * hardware.node_bytes:
        return counts.feature_bytes * hardware.nodes
    passes = 3 if sizes.inner_fraction else 2
    return passes * counts.feature_bytes * counts.trials * sizes.frozen_epochs


def _closing_stages(sizes: StudySizes, counts: Counts, hardware: Hardware, costs: Costs) -> tuple[Stage, ...]:
    """Predict what the driver does alone when all trials have ended."""
    steps = counts.head_steps / sizes.seeds if sizes.permutations and sizes.feature_cache else 0
    features = counts.feature_bytes if steps else 0
    permuting = costs.worker_bytes + 2 * counts.developed * (sizes.permutations + 1) * 4
    resampling = costs.worker_bytes + resampling_bytes(sizes, counts)
    resampled = LEVELS * len(sizes.slice_counts) * sizes.bootstrap_resamples * counts.developed * _mean_slices(sizes)
    return (
        _stage(
            "permutations",
            f"{sizes.permutations} per slice count, one process" if steps else "none",
            costs.permutation_step_s * steps,
            _Load(permuting, permuting + features),
            hardware,
        ),
        _stage(
            "aggregation",
            f"{sizes.bootstrap_resamples:,} resamples of {counts.developed:,} studies",
            AGGREGATE_S + costs.bootstrap_s * resampled,
            _Load(resampling, resampling),
            hardware,
        ),
        _stage("report", "one page", REPORT_S, _Load(costs.worker_bytes, costs.worker_bytes, 20e6), hardware),
    )


def _mean_slices(sizes: StudySizes) -> float:
    """Units per study, over both levels and all slice counts."""
    return (1 + sum(sizes.slice_counts) / len(sizes.slice_counts)) / LEVELS


def resampling_bytes(sizes: StudySizes, counts: Counts) -> int:
    """Return what the bootstrap holds: the patients' draws, and the weight of every slice in every resample."""
    slices = counts.developed * max(sizes.slice_counts)
    return 8 * sizes.bootstrap_resamples * (slices + counts.developed)
