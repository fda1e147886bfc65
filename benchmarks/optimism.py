"""What ways of judging give on labels that know nothing, at the size of the Oulu study.

Features are drawn, not computed from images: non-negative, correlated through a few common factors, like pooled
features behind a rectifier. With shuffled labels it does not matter what they show, only how many there are for how
few studies. Only the frozen stage is trained, with one seed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from lbp_ray.cell import TrialData
from lbp_ray.nets.resnet import NUM_FEATURES
from lbp_ray.permutation import permutation_null
from lbp_ray.study import Recipe

if TYPE_CHECKING:
    from collections.abc import Iterator

POSITIVES, NEGATIVES, FOLDS = 102, 371, 10
PERMUTATIONS = 100
MANY = 1000
"""Permutations that tell a few thousandths from nothing."""

FACTORS = 50
"""Common factors of the features."""


def measure() -> Iterator[dict[str, object]]:
    """Yield balanced accuracy on shuffled labels by what chose the epoch and the threshold, for 1, 3 and 5 slices."""
    torch.set_num_threads(1)
    data = _synthetic_data(slices=5)
    recipe = Recipe(weights="random")
    for num_slices, count in ((1, PERMUTATIONS), (3, PERMUTATIONS), (5, PERMUTATIONS), (1, MANY), (5, MANY)):
        null = permutation_null(data, recipe=recipe, num_slices=num_slices, count=count, seed=0, progress=False)
        for protocol in null.balanced_accuracy:
            yield {
                "figure": "balanced accuracy on labels shuffled among patients",
                "num_slices": num_slices,
                **protocol.model_dump(),
                "standard_error": protocol.sd / count**0.5,
                "conditions": f"{POSITIVES} + {NEGATIVES} studies, {FOLDS} folds, {recipe.frozen_epochs} epochs, "
                f"{count} permutations, synthetic features",
            }


def _synthetic_data(*, slices: int) -> TrialData:
    chance = np.random.default_rng(0)
    number = POSITIVES + NEGATIVES
    factors = chance.standard_normal((number, 1, FACTORS)) + 0.5 * chance.standard_normal((number, slices, FACTORS))
    loadings = chance.standard_normal((FACTORS, NUM_FEATURES)) / np.sqrt(FACTORS)
    features = np.maximum(factors @ loadings + 0.3 * chance.standard_normal((number, slices, NUM_FEATURES)), 0)
    names = tuple(f"{row:03d}" for row in range(number))
    return TrialData(
        crops_NKHW=np.empty((number, slices, 0, 0)),
        crop_row_N=np.arange(number),
        features_NKF=torch.from_numpy(features.astype(np.float32)),
        study_ids=names,
        patient_ids=names,
        labels_N=np.repeat([1, 0], [POSITIVES, NEGATIVES]).astype(np.float32),
        folds_N=np.arange(number) % FOLDS,
        slice_index_NK=np.tile(np.arange(slices), (number, 1)),
        offset_mm_NK=np.tile((np.arange(slices) - slices // 2) * 4.0, (number, 1)),
    )
