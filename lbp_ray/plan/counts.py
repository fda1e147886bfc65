"""Sizes of a study → passes, steps, operations and bytes. Pure arithmetic: nothing is measured or read."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lbp_ray.config import FrozenModel
from lbp_ray.nets.resnet import NUM_FEATURES
from lbp_ray.plan.flops import PARAMETERS, STATE_BYTES, image_cost

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lbp_ray.plan.sizes import StudySizes

STORE_RATIO = 0.67
"""Bytes of a stored series for each byte of its pixels, before it is measured."""

TRIAL_BYTES = 16_000
"""Tables, curve and record of a trial without its rows."""

ROW_BYTES = 12
"""A row of a trial's tables on disk."""

POOLED_ROW_BYTES = 40
"""A row of the study's out-of-fold and hold-out tables on disk."""

FROZEN_CHECKPOINT_BYTES = 3 * 4 * (NUM_FEATURES + 1) + 6_000
"""A trial between its stages: last layer, Adam's two moments and the curve."""


class Counts(FrozenModel):
    """What a study does and leaves; every field is a count, an amount of operations or of bytes."""

    trials: int
    holdout: int
    """Sealed studies."""
    developed: int
    """Studies outside the hold-out."""
    frozen_passes: int
    """Slices that frozen epochs look at, training and validation: forward passes without a cache."""
    distinct_slices: int
    """Slices that exist in the crops: forward passes with the cache."""
    training_images: int
    """Slices that unfrozen epochs train on."""
    evaluation_images: int
    """Slices that trained networks score: validation after each unfrozen epoch, and the hold-out."""
    head_steps: int
    unfrozen_steps: int
    naive_flop: float
    """Of a study whose every frozen epoch runs the backbone."""
    cached_flop: float
    """Of this study with its features computed once."""
    store_bytes: int
    crop_bytes: int
    feature_bytes: int
    checkpoint_bytes: int
    """In-progress state of one trial, at its largest."""
    model_bytes: int
    """Networks that stay on disk."""
    table_bytes: int
    """Trials' tables, and the study's out-of-fold and hold-out tables."""
    object_store_bytes: int
    """Crops and features, once per node."""

    @property
    def flop_ratio(self) -> float:
        """How much less arithmetic the cache leaves: no study can gain more at one precision."""
        return self.naive_flop / self.cached_flop


class Cell(FrozenModel):
    """Work of one trial."""

    num_slices: int
    frozen_passes: int
    head_steps: int
    training_images: int
    unfrozen_steps: int
    evaluation_images: int


def holdout_size(sizes: StudySizes) -> int:
    """Return how many studies are sealed: the patients' share, rounded up, as `lbp_ray.splits.make_split` does."""
    return math.ceil(round(sizes.holdout_fraction * sizes.studies, 9))


def cells(sizes: StudySizes) -> Iterator[Cell]:
    """Yield the work of every trial, in the order in which a study plans them."""
    held, developed = holdout_size(sizes), sizes.studies - holdout_size(sizes)
    unfrozen = sizes.unfrozen_epochs
    for num_slices in sizes.slice_counts:
        for fold in range(sizes.folds):
            tested = developed // sizes.folds + (fold < developed % sizes.folds)
            inner = math.ceil(sizes.inner_fraction * (developed - tested))
            trained = developed - tested - inner
            steps = math.ceil(trained * num_slices / sizes.batch_size)
            scored = (unfrozen * (tested + inner) + held) if unfrozen else 0
            cell = Cell(
                num_slices=num_slices,
                frozen_passes=sizes.frozen_epochs * developed * num_slices,
                head_steps=sizes.frozen_epochs * steps,
                training_images=unfrozen * trained * num_slices,
                unfrozen_steps=unfrozen * steps,
                evaluation_images=scored * num_slices,
            )
            yield from [cell] * sizes.seeds


def count(sizes: StudySizes) -> Counts:
    """Count what a study of some size does and leaves."""
    work = list(cells(sizes))
    held = holdout_size(sizes)
    developed = sizes.studies - held
    offsets, slices = max(sizes.slice_counts), sum(sizes.slice_counts)
    cost = image_cost(sizes.height_px, sizes.width_px)
    frozen_passes, training, evaluation = (
        sum(getattr(cell, name) for cell in work) for name in ("frozen_passes", "training_images", "evaluation_images")
    )
    distinct = sizes.exams * offsets
    after = training * cost.training + evaluation * cost.forward
    rows = sizes.seeds * slices * (developed + sizes.folds * held)
    crops, features = distinct * sizes.height_px * sizes.width_px * 2, distinct * NUM_FEATURES * 4
    kept = {"none": 0, "first_seed": sizes.num_trials // sizes.seeds, "all": sizes.num_trials}[sizes.keep_models]
    return Counts(
        trials=len(work),
        holdout=held,
        developed=developed,
        frozen_passes=frozen_passes,
        distinct_slices=distinct,
        training_images=training,
        evaluation_images=evaluation,
        head_steps=sum(cell.head_steps for cell in work),
        unfrozen_steps=sum(cell.unfrozen_steps for cell in work),
        naive_flop=frozen_passes * cost.forward + after,
        cached_flop=distinct * cost.forward + after,
        store_bytes=round(sizes.exams * sizes.stored_slices * sizes.rows * sizes.columns * 2 * STORE_RATIO),
        crop_bytes=crops,
        feature_bytes=features,
        checkpoint_bytes=3 * 4 * PARAMETERS if sizes.unfrozen_epochs > 1 else FROZEN_CHECKPOINT_BYTES,
        model_bytes=kept * STATE_BYTES,
        table_bytes=len(work) * TRIAL_BYTES + rows * (ROW_BYTES + POOLED_ROW_BYTES),
        object_store_bytes=crops + features,
    )
