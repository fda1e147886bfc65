"""What breaks at a size or wastes what there is, and what to set. Pure decisions on a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lbp_ray.features import MAPPED_BYTES
from lbp_ray.plan.counts import cells, count
from lbp_ray.plan.predict import PAGE_CACHE_SHARE, cell_seconds, resampling_bytes, trial_bytes
from lbp_ray.plan.render import size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lbp_ray.plan.calibration import Calibration
    from lbp_ray.plan.predict import Plan

SMALL_SAMPLE = 10_000
"""Studies above which repeating a whole cross-validation tells little more: folds then hold thousands."""

LONG_S = 24 * 3600.0
"""Seconds of the unfrozen epochs from which on something should change."""

MANY_PATIENTS = 100_000
"""Patients from which on shuffling labels, which looks up every patient among all, takes hours."""

LARGE_MODELS = 100e9
"""Bytes of kept networks that are worth a word."""


def advise(plan: Plan, calibration: Calibration) -> tuple[str, ...]:
    """List what breaks or is wasted, the stages in their order, each with what to set.

    Parameters
    ----------
    plan
        The prediction.
    calibration
        Memory of a worker, and what the processor computes natively.
    """
    return (
        *_data_advice(plan),
        *_trial_advice(plan, calibration),
        *_closing_advice(plan),
    )


def _data_advice(plan: Plan) -> Iterator[str]:
    sizes, counts = plan.sizes, plan.counts
    if sizes.feature_cache and counts.feature_bytes > MAPPED_BYTES and not sizes.blocks:
        yield (
            f"features: {size(counts.feature_bytes)} are refused by a full shuffle, which reads at most "
            f"{size(MAPPED_BYTES)} at random: set recipe.shuffle: block (other order, other numbers)"
        )
    if not sizes.feature_cache and sizes.frozen_epochs:
        yield (
            f"features: without the cache the frozen epochs run the backbone {counts.frozen_passes:,} times instead of "
            f"{counts.distinct_slices:,}: set recipe.feature_cache: true"
        )


def _trial_advice(plan: Plan, calibration: Calibration) -> Iterator[str]:
    sizes, counts, hardware = plan.sizes, plan.counts, plan.hardware
    unfrozen = plan.stage("unfrozen epochs")
    held = trial_bytes(sizes, 0)
    share = min(sizes.gpus_per_trial or 1.0, 1.0)
    if hardware.gpus and held > share * hardware.gpu_bytes:
        yield (
            f"unfrozen epochs: a pass of {sizes.images_per_pass} holds about {size(held)}, its share of a GPU is "
            f"{size(share * hardware.gpu_bytes)}: set compute.gpus_per_trial=1 or more, or recipe.unfrozen_dtype: auto"
        )
    heads = plan.stage("heads").seconds.middle
    if counts.developed > SMALL_SAMPLE and heads > unfrozen.seconds.middle / 2:
        yield (
            f"heads: {sizes.frozen_epochs} epochs are {counts.head_steps:,} steps at this size: fewer "
            "recipe.frozen_epochs make as many steps as the thesis did (other numbers)"
        )
    if unfrozen.bottleneck == "memory":
        yield (
            f"unfrozen epochs: {plan.slots} trials at once need {size(unfrozen.node_bytes)} on a node of "
            f"{size(hardware.node_bytes)}: raise recipe.threads, so that fewer run at once, or lower "
            "recipe.images_per_pass"
        )
    if unfrozen.bottleneck in ("network", "disk"):
        yield (
            f"unfrozen epochs: crops of {size(counts.crop_bytes)} exceed {PAGE_CACHE_SHARE:.0%} of a node's "
            f"{size(hardware.node_bytes)}, so that every trial reads its own from storage, longer than it "
            "computes: put paths.runs on local or faster disks, or train fewer seeds and folds"
        )
    if (
        sizes.unfrozen_epochs
        and sizes.seeds > 1
        and (counts.developed > SMALL_SAMPLE or unfrozen.seconds.middle > LONG_S)
    ):
        less = sizes.model_copy(update={"seeds": 1})
        yield (
            f"repeats: {sizes.folds} folds x {sizes.seeds} seeds are a small-sample device; seeds: [0] leaves "
            f"{count(less).training_images / counts.training_images:.0%} of the unfrozen epochs"
        )
    longest = max(sum(part.middle for part in cell_seconds(cell, sizes, hardware)) for cell in set(cells(sizes)))
    if hardware.gpus > 1 and (counts.trials < plan.slots or longest > LONG_S) and sizes.gpus_per_trial <= 1:
        yield (
            f"trials: the longest takes {longest / 3600:.1f} h on one GPU and {min(plan.slots, counts.trials)} run at "
            f"once on {hardware.gpus} GPUs: set compute.gpus_per_trial to 2, 4 or 8 on GPUs of one node"
        )
    if hardware.gpus and not sizes.gpus_per_trial:
        yield "trials: the configuration asks for no GPU; the plan takes compute.gpus_per_trial=1, set it"
    if not hardware.gpus and unfrozen.seconds.middle > LONG_S:
        yield "trials: more than a day on CPUs; see what GPUs would take with --gpus N --gpu h100"
    native = calibration.costs.gemm_bfloat16_flop_s.middle > 1.5 * calibration.costs.gemm_float32_flop_s.middle
    if sizes.dtype == "float32" and sizes.unfrozen_epochs and (native or hardware.gpus):
        yield (
            "unfrozen epochs: float32, although bfloat16 is faster here: recipe.unfrozen_dtype: auto (other numbers; "
            "features stay float32)"
        )
    if sizes.keep_models == "all" and counts.model_bytes > LARGE_MODELS:
        yield f"models: {size(counts.model_bytes)} of networks stay: set compute.keep_models: first_seed or none"


def _closing_advice(plan: Plan) -> Iterator[str]:
    sizes, counts, hardware = plan.sizes, plan.counts, plan.hardware
    if sizes.permutations and counts.developed > MANY_PATIENTS:
        yield (
            f"permutations: one process trains all of them on {counts.developed:,} studies, where chance needs no "
            "shuffling to be known: set evaluation.permutations=0"
        )
    needed = resampling_bytes(sizes, counts)
    if needed > hardware.node_bytes:
        fewer = max(1, int(sizes.bootstrap_resamples * hardware.node_bytes / needed / 2))
        yield (
            f"aggregation: {sizes.bootstrap_resamples:,} resamples hold {size(needed)} of weights: set "
            f"evaluation.bootstrap_resamples={fewer}"
        )
