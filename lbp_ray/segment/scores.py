"""How good the masks are: Dice and centroid error of every annotated slice, beside a box that never looks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lbp_ray.config import FrozenModel
from lbp_ray.roi.regions import SCORE_COLUMNS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import pandas as pd

PLACE_COLUMNS = SCORE_COLUMNS[:5]
"""Which slice a score belongs to: study, patient, series, slice and fold."""

TAIL_PERCENTILE = 95
"""Percentile of the centroid error that is reported beside its median."""


@dataclass(frozen=True)
class MeanBox:
    """A fixed box: its edges as distances from the centre of the image, mm, rows downward and columns to the right."""

    top_mm: float
    left_mm: float
    bottom_mm: float
    right_mm: float

    def mask(self, shape: tuple[int, int], spacing_mm: tuple[float, float]) -> np.ndarray:
        """Rasterise the box on an image: a pixel belongs when its centre does.

        Parameters
        ----------
        shape
            Rows and columns of the image.
        spacing_mm
            Row spacing, then column spacing.

        Returns
        -------
        numpy.ndarray
            (rows, columns) bool.
        """
        rows, columns = (
            (np.arange(size) + 0.5 - size / 2) * step for size, step in zip(shape, spacing_mm, strict=True)
        )
        inside_rows = (rows >= self.top_mm) & (rows < self.bottom_mm)
        inside_columns = (columns >= self.left_mm) & (columns < self.right_mm)
        return np.asarray(inside_rows[:, None] & inside_columns[None, :])


def mean_box(annotated: Iterable[tuple[np.ndarray, tuple[float, float]]]) -> MeanBox:
    """Average the bounding boxes of a training fold: the baseline that sees no image.

    Parameters
    ----------
    annotated
        Mask (H, W) bool and spacing (row, column) in mm of every annotated slice that the fold's model is trained on.

    Returns
    -------
    MeanBox
        Mean distance of each edge from the centre of its image.

    Raises
    ------
    ValueError
        If there is no mask, or one is empty.
    """
    edges_mm = [_edges_mm(mask_HW, spacing_mm) for mask_HW, spacing_mm in annotated]
    if not edges_mm:
        msg = "the mean box of a training fold needs at least one annotated mask, found none; use fewer folds"
        raise ValueError(msg)
    return MeanBox(*(float(edge) for edge in np.mean(edges_mm, axis=0)))


def _edges_mm(mask_HW: np.ndarray, spacing_mm: tuple[float, float]) -> np.ndarray:
    pixels = np.argwhere(mask_HW)
    if not len(pixels):
        msg = "an annotated mask without a pixel has no box; leave the annotation out"
        raise ValueError(msg)
    edges = np.concatenate([pixels.min(axis=0), pixels.max(axis=0) + 1])
    return np.asarray((edges - np.tile(mask_HW.shape, 2) / 2) * np.tile(spacing_mm, 2))


def dice(first_HW: np.ndarray, second_HW: np.ndarray) -> float:
    """Return twice the overlap of two masks over the sum of their sizes, 0-1; two empty masks agree and score 1.

    Raises
    ------
    ValueError
        If the masks differ in shape.

    References
    ----------
    Dice LR. Measures of the amount of ecologic association between species. Ecology 1945;26:297-302.
    """
    if first_HW.shape != second_HW.shape:
        msg = f"masks of one image are required, found shapes {first_HW.shape} and {second_HW.shape}"
        raise ValueError(msg)
    total = int(np.count_nonzero(first_HW)) + int(np.count_nonzero(second_HW))
    return 2 * int(np.count_nonzero(first_HW & second_HW)) / total if total else 1.0


def centroid_error_mm(truth_HW: np.ndarray, predicted_HW: np.ndarray, spacing_mm: tuple[float, float]) -> float:
    """Return the Euclidean distance between the centroids of two masks.

    Parameters
    ----------
    truth_HW, predicted_HW
        (H, W) bool.
    spacing_mm
        Row spacing, then column spacing.

    Returns
    -------
    float
        Distance in mm. A prediction without a pixel has no centroid and counts as the corner of the image that is
        furthest from the true one: the largest error that the image allows, so that finding nothing never flatters.

    Raises
    ------
    ValueError
        If the true mask is empty.
    """
    if not np.any(truth_HW):
        msg = "the annotated mask holds no pixel, so that no distance from it can be measured; leave the slice out"
        raise ValueError(msg)
    scale = np.asarray(spacing_mm, dtype=float)
    truth_mm = (np.argwhere(truth_HW).mean(axis=0) + 0.5) * scale
    if np.any(predicted_HW):
        return float(np.linalg.norm((np.argwhere(predicted_HW).mean(axis=0) + 0.5) * scale - truth_mm))
    far_mm = np.maximum(truth_mm, np.asarray(truth_HW.shape) * scale - truth_mm)
    return float(np.linalg.norm(far_mm))


def score_slice(
    place: Mapping[str, Any],
    truth_HW: np.ndarray,
    predicted_HW: np.ndarray,
    baseline_HW: np.ndarray,
    spacing_mm: tuple[float, float],
) -> dict[str, Any]:
    """Score one annotated slice.

    Parameters
    ----------
    place
        Which slice it is; of its keys `PLACE_COLUMNS` are taken.
    truth_HW
        (H, W) bool, the annotation.
    predicted_HW
        (H, W) bool, by the model of the fold, which never saw the patient.
    baseline_HW
        (H, W) bool, the mean box of the fold's training masks on this image.
    spacing_mm
        Row spacing, then column spacing.

    Returns
    -------
    dict
        One row of ``scores.parquet``: `lbp_ray.roi.regions.SCORE_COLUMNS` in their order.
    """
    return {name: place[name] for name in PLACE_COLUMNS} | {
        "dice": dice(truth_HW, predicted_HW),
        "baseline_dice": dice(truth_HW, baseline_HW),
        "centroid_error_mm": centroid_error_mm(truth_HW, predicted_HW, spacing_mm),
        "baseline_error_mm": centroid_error_mm(truth_HW, baseline_HW, spacing_mm),
    }


class DiceSummary(FrozenModel):
    """Mean Dice over images, and how far it may be off by three ways of counting."""

    mean: float
    se_images: float | None
    """Standard deviation over images / sqrt(images); too small when a patient has several slices. None with one."""
    se_patients: float | None
    """Standard error of the same mean with patients as the unit: equal to `se_images` when each has one slice."""
    se_folds: float | None
    """Standard deviation of the fold means / sqrt(folds), what the Oulu thesis calls ± 0.01. Folds share most of their
    training patients, so that it says how even the folds are, not how sure the mean is. None with one fold."""


class ErrorSummary(FrozenModel):
    """Centroid error over images, mm."""

    median_mm: float
    tail_mm: float
    """`TAIL_PERCENTILE` of the images lie below it."""
    largest_mm: float


class FoldSummary(FrozenModel):
    """The images of one fold, predicted by the model that saw none of their patients."""

    fold: int
    num_images: int
    num_patients: int
    dice: float
    baseline_dice: float
    centroid_error_mm: float
    """Median."""
    baseline_error_mm: float
    """Median."""


class ScoreSummary(FrozenModel):
    """All that is said about the out-of-fold masks of the annotated slices, each beside the mean box."""

    num_images: int
    num_patients: int
    num_folds: int
    dice: DiceSummary
    baseline_dice: DiceSummary
    centroid_error: ErrorSummary
    baseline_error: ErrorSummary
    folds: tuple[FoldSummary, ...]
    """In ascending order."""


def summarise(scores: pd.DataFrame) -> ScoreSummary:
    """Summarise the scores of all annotated slices.

    Parameters
    ----------
    scores
        `lbp_ray.roi.regions.SCORE_COLUMNS`, one row per annotated slice: those of the folds, or those that no network
        was trained on (a negative fold), never both.

    Returns
    -------
    ScoreSummary
        Means, standard errors, percentiles and the same per fold.

    Raises
    ------
    ValueError
        If there is no score, a column is missing, a value is not finite or out of range, a slice was scored twice, a
        patient stands in two folds, or folds are mixed with patients that no network was trained on. All faults are
        listed.
    """
    faults = list(_faults(scores))
    if faults:
        msg = "scores cannot be summarised; train the folds again by patient\n" + "\n".join(f"  - {f}" for f in faults)
        raise ValueError(msg)
    folds = tuple(_fold(int(str(fold)), part) for fold, part in scores.groupby("fold", sort=True))
    return ScoreSummary(
        num_images=len(scores),
        num_patients=scores["patient_id"].nunique(),
        num_folds=len(folds),
        dice=_dice(scores, "dice"),
        baseline_dice=_dice(scores, "baseline_dice"),
        centroid_error=_error(scores["centroid_error_mm"].to_numpy()),
        baseline_error=_error(scores["baseline_error_mm"].to_numpy()),
        folds=folds,
    )


def _faults(scores: pd.DataFrame) -> Iterable[str]:
    missing = [name for name in SCORE_COLUMNS if name not in scores]
    if missing or scores.empty:
        wanted = ", ".join(SCORE_COLUMNS)
        yield f"rows with the columns {wanted} are required, found {len(scores)} rows; missing: {missing}"
        return
    for name in SCORE_COLUMNS[5:]:
        highest = 1.0 if name.endswith("dice") else np.inf
        values = scores[name].to_numpy(dtype=float)
        wrong = int(np.sum(~(np.isfinite(values) & (values >= 0) & (values <= highest))))
        if wrong:
            yield f"{name}: finite values from 0 to {highest:g} are required, {wrong} of {len(values)} are not"
    repeated = scores.duplicated(["study_id", "series_id", "slice_index"], keep=False)
    for study_id in sorted(set(scores.loc[repeated, "study_id"])):
        yield f"study {study_id}: a slice was scored more than once"
    if scores["fold"].min() < 0 <= scores["fold"].max():
        yield "patients that no network was trained on have a summary of their own, found them among the folds"
    num_folds = scores.groupby("patient_id")["fold"].nunique()
    for patient_id in num_folds.index[num_folds > 1]:
        yield f"patient {patient_id} stands in {num_folds[patient_id]} folds: a model was scored on who trained it"


def _dice(scores: pd.DataFrame, column: str) -> DiceSummary:
    values = scores[column]
    return DiceSummary(
        mean=float(values.mean()),
        se_images=_standard_error(values.to_numpy()),
        se_patients=_clustered_error(values - values.mean(), scores["patient_id"]),
        se_folds=_standard_error(values.groupby(scores["fold"]).mean().to_numpy()),
    )


def _standard_error(values: np.ndarray) -> float | None:
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None


def _clustered_error(deviations: pd.Series[float], patients: pd.Series[str]) -> float | None:
    """Return the standard error of a mean over images whose deviations hang together within a patient.

    References
    ----------
    Liang KY, Zeger SL. Longitudinal data analysis using generalized linear models. Biometrika 1986;73:13-22: the robust
    variance of an intercept, with the factor n / (n - 1) for n patients.
    """
    sums = deviations.groupby(patients).sum().to_numpy()
    count = len(sums)
    return float(np.sqrt(count / (count - 1) * np.sum(sums**2)) / len(deviations)) if count > 1 else None


def _error(values: np.ndarray) -> ErrorSummary:
    median, tail = np.percentile(values, [50, TAIL_PERCENTILE])
    return ErrorSummary(median_mm=float(median), tail_mm=float(tail), largest_mm=float(values.max()))


def _fold(fold: int, part: pd.DataFrame) -> FoldSummary:
    return FoldSummary(
        fold=fold,
        num_images=len(part),
        num_patients=part["patient_id"].nunique(),
        dice=float(part["dice"].mean()),
        baseline_dice=float(part["baseline_dice"].mean()),
        centroid_error_mm=float(part["centroid_error_mm"].median()),
        baseline_error_mm=float(part["baseline_error_mm"].median()),
    )
