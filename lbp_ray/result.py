"""The one result object of a study: every table, figure and sentence of the report comes from it.

It holds aggregates only (and scores without ids), no patient-level row that names a study.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from lbp_ray.config import FrozenModel
from preprocess.commit import content_id, write_atomic

if TYPE_CHECKING:
    from pathlib import Path

METRIC_NAMES = (
    "average_precision",
    "roc_auc",
    "precision",
    "npv",
    "recall",
    "specificity",
    "balanced_accuracy",
    "mcc",
)
"""The eight metrics of the Oulu study, in the order of its Table 5."""

TABLES = ("out_of_fold", "holdout")
"""Tables beside ``result.json``, named without their ending; `StudyResult.hashes` holds the SHA-256 of each."""


def table_hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each of a result's tables, by its name in `TABLES`."""
    return {name: hashlib.sha256((folder / f"{name}.parquet").read_bytes()).hexdigest() for name in TABLES}


class Interval(FrozenModel):
    """An estimate with its uncertainty over patients, conditional on the trained models."""

    estimate: float
    low: float
    high: float
    level: float
    """Nominal coverage, e.g. 0.95."""
    method: str
    """How it was made, e.g. ``percentile bootstrap over patients, 2000 resamples``."""


class MetricSummary(FrozenModel):
    """One metric of one slice count."""

    name: str
    per_seed: tuple[float, ...]
    """Value of each seed's complete out-of-fold table, in seed order."""
    mean: float
    sd: float | None
    """Sample standard deviation over seeds; None with a single seed."""
    interval: Interval
    """Of the seed-averaged out-of-fold scores; resampling unit: the patient."""


class Curve(FrozenModel):
    """Points of a ROC (x: false-positive rate, y: recall) or precision-recall (x: recall, y: precision) curve."""

    x: tuple[float, ...]
    y: tuple[float, ...]


class Confusion(FrozenModel):
    """Study-level decisions of the seed-averaged scores at cross-fitted thresholds."""

    tp: int
    fp: int
    fn: int
    tn: int


class LearningCurve(FrozenModel):
    """Mean over all fold x seed trials at each epoch (1-based); the band is one standard deviation over trials."""

    epoch: tuple[int, ...]
    stage: tuple[str, ...]
    """``frozen`` or ``unfrozen``, one per epoch."""
    train_loss: tuple[float, ...]
    train_loss_sd: tuple[float, ...]
    validation_loss: tuple[float, ...]
    validation_loss_sd: tuple[float, ...]
    validation_auc: tuple[float, ...]
    validation_auc_sd: tuple[float, ...]


class PermutationNull(FrozenModel):
    """Out-of-fold ROC-AUC of the frozen stage when labels are shuffled among patients."""

    num_permutations: int
    observed: float
    """The frozen stage's AUC with the true labels, same heads, same folds."""
    mean: float
    sd: float
    p_value: float
    null: tuple[float, ...]


class SliceCountResult(FrozenModel):
    """All that is reported for one slice count."""

    num_slices: int
    metrics: tuple[MetricSummary, ...]
    accuracy: MetricSummary
    roc: Curve
    precision_recall: Curve
    confusion: Confusion
    learning: LearningCurve
    permutation: PermutationNull | None
    fold_auc: tuple[float, ...]
    """Seed-averaged ROC-AUC within each fold, in fold order."""
    scores_positive: tuple[float, ...]
    """Seed-averaged study probabilities of the symptomatic studies, ascending (no ids)."""
    scores_negative: tuple[float, ...]
    fold_thresholds: tuple[float, ...]
    """Cross-fitted threshold of each fold, in fold order."""


class AreaComparison(FrozenModel):
    """ROC-AUC of two slice counts on the same studies, by the seed-averaged scores."""

    first: int
    second: int
    """The larger slice count."""
    difference: float
    """Area of the second minus that of the first."""
    low: float
    high: float
    level: float
    """Nominal coverage of the interval of the difference."""
    p_value: float
    """Two-sided, of no difference (DeLong, patients as clusters)."""
    p_adjusted: float
    """The same after Holm's correction over all pairs of slice counts."""


class FunnelStep(FrozenModel):
    """One step of the cohort's way from the store to the analysis."""

    name: str
    count: int
    reason: str
    """Why the ones lost before this step were lost; empty for the first step."""


class ClassCount(FrozenModel):
    """Exams of one kind, by class."""

    name: str
    negative: int
    """Asymptomatic."""
    positive: int
    """Symptomatic."""


class SegmenterScores(FrozenModel):
    """How well the segmenter behind the crops finds annotated regions of patients that it never saw."""

    num_images: int
    num_folds: int
    dice: float
    """Mean over images."""
    standard_error_images: float | None
    """Standard error of the mean, over images; None with a single one."""
    standard_error_folds: float | None
    """Standard error of the mean of the folds' means, over folds; None with a single one."""
    baseline_dice: float
    """Mean over images of a fixed mean box."""
    centroid_error_median_mm: float
    centroid_error_p95_mm: float


class CropProvenance(FrozenModel):
    """Where the crops come from, and whether that depends on the label; sealed exams are left out."""

    sources: tuple[ClassCount, ...]
    """Cross-validated exams by crop source."""
    excluded: tuple[ClassCount, ...]
    """Exams without a crop by reason."""
    statistic: float | None
    """Pearson's chi-square of sources by classes; None with fewer than two sources."""
    p_value: float | None
    """By shuffling labels among the patients of each fold."""
    num_permutations: int
    segmenter: SegmenterScores | None
    """None where boxes are centred on annotations."""


class BayesReference(FrozenModel):
    """The best AUC that any model could reach on these very studies (synthetic cohorts only)."""

    realised_auc: float
    num_studies: int


class StudyResult(FrozenModel):
    """A whole study."""

    schema_version: int = 2
    name: str
    statements: tuple[str, ...]
    """Plain sentences a reader must see first: synthetic data, random start, reduced recipe, interval meaning."""
    config: dict[str, Any]
    """The resolved science configuration (no paths)."""
    hashes: dict[str, str]
    """Store, crops, split, weights, recipe: what this result was computed from; and its own `TABLES`."""
    environment: dict[str, str]
    """Library versions, device, numerics version."""
    funnel: tuple[FunnelStep, ...]
    groups: dict[str, int]
    """Questionnaire groups → number of exams."""
    num_patients: int
    num_studies: int
    num_positive: int
    num_holdout_studies: int
    """Sealed studies, with crops or without."""
    holdout_commitment: str
    """Hash that commits the sealed hold-out before any training."""
    num_folds: int
    seeds: tuple[int, ...]
    slice_counts: tuple[SliceCountResult, ...]
    comparisons: tuple[AreaComparison, ...]
    """Every pair of slice counts, ascending; empty with a single one."""
    bayes: BayesReference | None
    """None unless the cohort is synthetic."""
    acquisition: dict[str, str]
    """Human-readable acquisition facts (matrix, spacing, TE, TR), for the report's data section."""
    crops: CropProvenance | None = None
    """None in results that were saved before it was counted."""

    @property
    def result_hash(self) -> str:
        """Address of this result: what tables and figures carry."""
        return content_id(self.model_dump(mode="json"))

    def save(self, path: Path) -> None:
        """Write as JSON, atomically."""
        write_atomic(path, json.dumps(self.model_dump(mode="json"), indent=1, allow_nan=False).encode())

    @classmethod
    def load(cls, path: Path) -> StudyResult:
        """Read what `save` wrote."""
        return cls.model_validate_json(path.read_bytes())
