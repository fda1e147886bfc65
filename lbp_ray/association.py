"""Does where a crop comes from know the label? Counts by source and class, and a permutation test among patients.

A network could read the source off a crop's place. If sources differ between the classes, so could its scores.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lbp_ray.permutation import permute_labels
from lbp_ray.result import ClassCount, CropProvenance, SegmenterScores
from lbp_ray.splits import HOLDOUT

if TYPE_CHECKING:
    from lbp_ray.prepare import Prepared

NUM_PERMUTATIONS = 4999
"""Shuffles behind the p-value; the smallest that can be told is 1 in 5000."""


def describe_provenance(prepared: Prepared, *, seed: int) -> CropProvenance:
    """Count crop sources and reasons of exclusion by class, and test the sources.

    Parameters
    ----------
    prepared
        The study; its sealed exams have no label and are left out.
    seed
        Seed of the shuffles (``evaluation.seed``).
    """
    drawn = prepared.split.table
    inside = drawn[drawn["fold"] != HOLDOUT]
    cropped = inside.merge(prepared.crops.table[["study_id", "crop_source"]], on="study_id")
    excluded = inside.merge(prepared.crops.excluded[["study_id", "reason"]], on="study_id")
    statistic, p_value = source_association(cropped, seed=seed)
    return CropProvenance(
        sources=_counts(cropped, "crop_source"),
        excluded=_counts(excluded, "reason"),
        statistic=statistic,
        p_value=p_value,
        num_permutations=NUM_PERMUTATIONS,
        segmenter=None if prepared.regions is None else segmenter_scores(prepared.regions.scores),
    )


def source_association(cropped: pd.DataFrame, *, seed: int) -> tuple[float | None, float | None]:
    """Test whether crop sources and labels are independent.

    Parameters
    ----------
    cropped
        One row per exam: ``patient_id``, ``fold``, ``label`` (0 or 1), ``crop_source``.
    seed
        Seed of the shuffles.

    Returns
    -------
    statistic
        Pearson's chi-square of the table of sources by classes; None with fewer than two sources.
    p_value
        (1 + shuffles with at least as large a statistic) / (1 + `NUM_PERMUTATIONS`). Labels are shuffled among patients
        of a fold, the exams of one together, as `lbp_ray.permutation.permute_labels` does: exams of one patient are not
        counted as independent.
    """
    source_N, names = pd.factorize(cropped["crop_source"], sort=True)
    if len(names) < 2:
        return None, None
    labels_N = cropped["label"].to_numpy(dtype=np.int64)
    shuffled_NP = permute_labels(
        labels_N, cropped["patient_id"].to_numpy(), cropped["fold"].to_numpy(), count=NUM_PERMUTATIONS, seed=seed
    )
    membership_SN = np.arange(len(names))[:, None] == source_N[None, :]
    statistics = _chi_square(membership_SN.astype(np.int64) @ np.column_stack([labels_N, shuffled_NP]), membership_SN)
    # Equal tables must tie: sums of floats in another order would not.
    at_least = np.count_nonzero(statistics[1:] >= statistics[0] - 1e-9)
    return float(statistics[0]), float((1 + at_least) / (1 + NUM_PERMUTATIONS))


def _chi_square(positive_SP: np.ndarray, membership_SN: np.ndarray) -> np.ndarray:
    """Pearson's chi-square of each column of positives per source, (P,)."""
    size_S1 = membership_SN.sum(axis=1)[:, None]
    share_P = positive_SP.sum(axis=0) / membership_SN.shape[1]
    expected_SP = size_S1 * share_P
    spread_P = np.maximum(share_P * (1 - share_P), np.finfo(float).tiny)
    return np.asarray(((positive_SP - expected_SP) ** 2 / (size_S1 * spread_P)).sum(axis=0))


def segmenter_scores(scores: pd.DataFrame) -> SegmenterScores:
    """Summarise how well a segmenter finds the annotated regions of patients that it never saw.

    Parameters
    ----------
    scores
        `lbp_ray.roi.regions.SCORE_COLUMNS`; rows of a fold's own network (fold 0 and above) count.
    """
    out_of_fold = scores[scores["fold"] >= 0]
    dice, folds = out_of_fold["dice"], out_of_fold.groupby("fold")["dice"].mean()
    return SegmenterScores(
        num_images=len(dice),
        num_folds=len(folds),
        dice=float(dice.mean()),
        standard_error_images=_standard_error(dice),
        standard_error_folds=_standard_error(folds),
        baseline_dice=float(out_of_fold["baseline_dice"].mean()),
        centroid_error_median_mm=float(out_of_fold["centroid_error_mm"].median()),
        centroid_error_p95_mm=float(out_of_fold["centroid_error_mm"].quantile(0.95)),
    )


def _standard_error(values: pd.Series[float]) -> float | None:
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None


def _counts(exams: pd.DataFrame, column: str) -> tuple[ClassCount, ...]:
    return tuple(
        ClassCount(name=str(name), negative=int((rows["label"] == 0).sum()), positive=int((rows["label"] == 1).sum()))
        for name, rows in exams.groupby(column, sort=True)
    )
