"""Synthetic studies in memory: noise crops, a split and the cells of a study, of any size."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lbp_ray.cell import Cell, TrialData, TrialSpec
from lbp_ray.splits import HOLDOUT, make_split

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lbp_ray.study import Recipe

POSITIVE_SHARE = 113 / 526
"""Symptomatic studies of the Oulu cohort."""

VALUES = 1500
"""Stored pixel values are drawn below this; the content of an image changes no time."""


def make_study(
    studies: int,
    crop: tuple[int, int],
    *,
    folds: int,
    offsets: int = 5,
    positive_share: float = POSITIVE_SHARE,
) -> TrialData:
    """Draw one crop per study and offset, labels and a split as a study would make it; no features yet.

    Parameters
    ----------
    studies
        Number of studies, one per patient; a tenth of them is sealed.
    crop
        Rows and columns.
    folds
        Number of folds.
    offsets
        Slices per study.
    positive_share
        Share of symptomatic studies.
    """
    names = tuple(f"study{number:06d}" for number in range(studies))
    positive_N = np.arange(studies) < round(studies * positive_share)
    exams = pd.DataFrame({"study_id": names, "patient_id": names, "label": positive_N.astype(int)})
    folds_N = make_split(exams, folds=folds, holdout_fraction=0.1, seed=0)["fold"].to_numpy()
    chance = np.random.default_rng(0)
    reach = offsets // 2
    return TrialData(
        crops_NKHW=chance.integers(0, VALUES, (studies, offsets, *crop), dtype=np.uint16),
        crop_row_N=np.arange(studies),
        features_NKF=None,
        study_ids=names,
        patient_ids=names,
        labels_N=np.where(folds_N == HOLDOUT, np.nan, positive_N).astype(np.float32),
        folds_N=folds_N,
        slice_index_NK=np.tile(np.arange(offsets), (studies, 1)),
        offset_mm_NK=np.tile((np.arange(offsets) - reach) * 4.0, (studies, 1)),
    )


def make_specs(
    recipe: Recipe, *, folds: int, seeds: Sequence[int], slice_counts: Sequence[int] = (1, 3, 5)
) -> list[TrialSpec]:
    """List the cells of a study, in the order in which it runs them."""
    return [
        TrialSpec(
            cell=Cell(num_slices=num_slices, fold=fold, seed=seed),
            recipe=recipe,
            crops_hash="synthetic",
            split_hash="synthetic",
            weights_hash="random",
        )
        for num_slices in slice_counts
        for fold in range(folds)
        for seed in seeds
    ]
