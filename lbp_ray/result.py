"""The one result object of a study: every table, figure and sentence of the report comes from it.

It holds aggregates only (and scores without ids), no patient-level row that names a study.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from pydantic import field_validator

from lbp_ray.config import FrozenModel
from lbp_ray.splits import Opening
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
    """How far an estimate would move with other patients, conditional on the trained models."""

    low: float
    high: float
    level: float
    """Nominal coverage, e.g. 0.95."""
    method: str
    """How it was made, e.g. ``percentile bootstrap over patients, 2000 resamples``."""


class MetricSummary(FrozenModel):
    """One metric."""

    name: str
    estimate: float
    """Of the scores averaged over models (seeds; on the hold-out folds too)."""
    interval: Interval | None
    """Of the estimate, over patients; None where what was chosen on the evaluated fold bars it."""
    per_seed: tuple[float, ...]
    """Value of each model alone, by its own threshold: of each seed's complete out-of-fold table, in seed order; on the
    hold-out of each fold model of each seed."""
    mean: float
    """Of those values: the mean of metrics, where the estimate is the metric of means."""
    sd: float | None
    """Sample standard deviation of those values; None with a single one."""

    @property
    def se(self) -> float | None:
        """Standard error of their mean."""
        return None if self.sd is None else float(self.sd / len(self.per_seed) ** 0.5)


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
    """Mean over all fold x seed trials at each epoch (1-based) that all reached; the band is one standard deviation."""

    epoch: tuple[int, ...]
    stage: tuple[str, ...]
    """``frozen`` or ``unfrozen``, one per epoch."""
    train_loss: tuple[float, ...]
    train_loss_sd: tuple[float, ...]
    validation_loss: tuple[float, ...]
    validation_loss_sd: tuple[float, ...]
    validation_auc: tuple[float, ...]
    validation_auc_sd: tuple[float, ...]


class ProtocolNull(FrozenModel):
    """Balanced accuracy that a way of judging gives on labels that know nothing: 0.5 is honest, more is optimism."""

    selection: str
    """``fixed_epochs`` or ``same_fold``."""
    threshold_source: str
    """``cross_fitted`` or ``same_fold``."""
    mean: float
    sd: float
    """Over permutations."""


class PermutationNull(FrozenModel):
    """Out-of-fold ROC-AUC of the frozen stage when labels are shuffled among patients."""

    num_permutations: int
    observed: float
    """The frozen stage's AUC with the true labels, same heads, same folds."""
    mean: float
    sd: float
    p_value: float
    null: tuple[float, ...]
    balanced_accuracy: tuple[ProtocolNull, ...]
    """Of the same shuffles: judged honestly, by the same fold's thresholds, by its epochs, by both."""


class SelectedEpoch(FrozenModel):
    """The epoch whose network scores, and how often it was chosen among fold x seed trials."""

    epoch: int
    stage: str
    """``frozen`` or ``unfrozen``."""
    trials: int


class FoldChoice(FrozenModel):
    """One fold taken as the only validation fold, as the Oulu thesis did with a fold that it does not name."""

    fold: int
    num_studies: int
    num_positive: int
    threshold: float
    """Of the seed-averaged scores."""
    epochs: tuple[int, ...]
    """Chosen epoch of each seed."""
    confusion: Confusion
    metrics: tuple[MetricSummary, ...]
    """The eight on this fold, without intervals: epoch and threshold may have been chosen on it."""


class VarianceSplit(FrozenModel):
    """Where the variance of the ROC-AUC comes from; standard deviations, in units of the AUC."""

    patient_sd: float | None
    """Other patients: DeLong's, of the seed-averaged pooled AUC; None where the result is optimistic."""
    fold_sd: float
    """Folds that differ beyond what their few patients explain; 0 where they do not."""
    seed_sd: float | None
    """Another training seed: of single seeds' pooled AUC; None with a single one."""


class SliceCountResult(FrozenModel):
    """All that is reported for one slice count."""

    num_slices: int
    metrics: tuple[MetricSummary, ...]
    """The eight at the result's level."""
    accuracy: MetricSummary
    separation: MetricSummary
    """Mean probability of the symptomatic minus that of the asymptomatic, at the result's level."""
    other_level: tuple[MetricSummary, ...]
    """The eight at the other level: of slices where the result is of studies, of studies where it is of slices. The
    same as `metrics` in the estimates where there is one slice."""
    variance: VarianceSplit
    epochs: tuple[SelectedEpoch, ...]
    """Ascending."""
    choices: tuple[FoldChoice, ...]
    """Each fold alone, in fold order, at study level."""
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


class RecallAt(FrozenModel):
    """Recall at a false-positive rate."""

    false_positive_rate: float
    recall: float
    interval: Interval | None


class RuleResult(FrozenModel):
    """One study rule applied to one slice count's slice probabilities, seed-averaged, at study level."""

    num_slices: int
    rule: str
    """``any``, ``mean``, ``top_k`` or ``noisy_or``."""
    roc_auc: float
    interval: Interval | None
    recall_at: tuple[RecallAt, ...]
    """At the same false-positive rates for all rules and slice counts: more slices then earn nothing by crying more."""


class OrCurve(FrozenModel):
    """What the any-slice rule would do to the one-slice network if slices were independent; no better images in it."""

    num_slices: int
    curve: Curve
    false_positive_rate: float
    """Of the one-slice decisions, after the rule."""
    recall: float


class Duplicates(FrozenModel):
    """Exams of different patients whose crops show (nearly) the same pixels."""

    num_exams: int
    """Compared."""
    num_pairs: int
    """Pairs of different patients alike."""
    num_across_folds: int
    """Of those, in different folds, or one of them in the hold-out."""
    lowest_correlation: float
    """From which on two crops count as alike."""


class GroupRow(FrozenModel):
    """One row of Table 3."""

    group: str
    count: int
    share: float
    """Of all subjects asked."""
    share_complete: float | None
    """Of those with complete answers; None for the group without."""


class GradeRow(FrozenModel):
    """One row of Table 4: discs of one grade at each level."""

    scale: str
    """``pfirrmann`` or ``modic``."""
    grade: int
    counts: tuple[int, ...]
    """L1-L2 to L5-S1."""
    shares: tuple[float, ...]
    """Of the exams graded at that level."""


class Agreement(FrozenModel):
    """Two readers' weighted kappa on one disc level, or on all (``all``)."""

    scale: str
    level: str
    weights: str
    """``linear`` or ``quadratic``."""
    num_pairs: int
    kappa: float | None
    """None where both readers give one and the same grade throughout."""
    interval: Interval | None
    num_adjudicated: int
    """Pairs that differ and were decided by the rule."""


class ProtocolRow(FrozenModel):
    """One acquisition parameter against the protocol."""

    parameter: str
    wanted: str
    found: str
    """Range over the exams."""
    num_out: int
    num_unknown: int
    """Exams whose header does not say."""


class CohortSummary(FrozenModel):
    """Who was asked, who belongs to which group, and how the discs were graded, as the published tables count them."""

    groups: tuple[GroupRow, ...]
    num_subjects: int
    num_complete: int
    num_multi_match: int
    """Rows that meet several rules; their order decides."""
    num_no_match: int
    """Complete rows that meet none."""
    grades: tuple[GradeRow, ...]
    num_pfirrmann_zero: int
    """Discs graded 0, which Pfirrmann's scale does not have."""
    adjudication: str
    agreement: tuple[Agreement, ...]
    protocol: tuple[ProtocolRow, ...]


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

    schema_version: int = 3
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
    level: str
    """``study`` or ``slice``: what headline metrics and curves score."""
    selection: str
    """What chose the scoring epoch: ``fixed_epochs``, ``inner_validation`` or ``same_fold``."""
    threshold_source: str
    """``cross_fitted`` or ``same_fold``."""
    comparisons: tuple[AreaComparison, ...]
    """Every pair of slice counts, ascending; empty with a single one, and where the result is optimistic."""
    rules: tuple[RuleResult, ...]
    """Slice counts x study rules, in the order of `StudyRule`; one slice has the rule ``any`` only."""
    or_curves: tuple[OrCurve, ...]
    """For every larger slice count; empty where no one-slice network was trained, and where slices are scored."""
    duplicates: Duplicates
    cohort: CohortSummary | None
    """None in tests of parts."""
    bayes: BayesReference | None
    """None unless the cohort is synthetic, and where slices are scored."""
    acquisition: dict[str, str]
    """Human-readable acquisition facts (matrix, spacing, TE, TR), for the report's data section."""
    crops: CropProvenance

    @property
    def optimistic(self) -> bool:
        """Whether a fold was judged by what was chosen on it."""
        return "same_fold" in (self.selection, self.threshold_source)

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


class HoldoutChoice(FrozenModel):
    """The hold-out judged by one validation fold's networks alone, as the Oulu thesis judged it."""

    fold: int
    threshold: float
    confusion: Confusion
    metrics: tuple[MetricSummary, ...]
    """Estimate: seed-averaged scores at that threshold; `MetricSummary.per_seed`: each seed alone."""


class HoldoutResult(FrozenModel):
    """The hold-out judged by one slice count: the mean of all fold models and seeds, one threshold."""

    num_slices: int
    num_studies: int
    num_positive: int
    threshold: float
    threshold_source: str
    """``out_of_fold``: fitted on the seed-averaged out-of-fold scores; ``mean_of_models``: the mean of all models'."""
    confusion: Confusion
    metrics: tuple[MetricSummary, ...]
    """The eight; intervals over the hold-out's patients, conditional on the trained models."""
    accuracy: MetricSummary
    roc: Curve
    precision_recall: Curve
    choices: tuple[HoldoutChoice, ...]
    """Each fold's networks alone, in fold order."""


class Unsealed(FrozenModel):
    """What an opening told; its file leaves out which studies were opened."""

    opening: Opening
    num_lost: int
    """Sealed studies without a crop: not predicted."""
    slice_counts: tuple[HoldoutResult, ...]

    @field_validator("opening", mode="before")
    @classmethod
    def _studies_are_not_told(cls, value: object) -> object:
        return {"studies": ()} | value if isinstance(value, dict) else value

    def save(self, path: Path) -> None:
        """Write as JSON, atomically, without the studies that were opened."""
        write_atomic(path, self.model_dump_json(indent=1, exclude={"opening": {"studies"}}).encode())

    @classmethod
    def load(cls, path: Path) -> Unsealed:
        """Read what `save` wrote; its opening then names no study."""
        return cls.model_validate_json(path.read_bytes())


class GroupScores(FrozenModel):
    """Scores of one questionnaire group that no network was trained on."""

    group: str
    num_studies: int
    mean: float
    sd: float | None
    quartiles: tuple[float, float, float]
    share_positive: float
    """Called symptomatic at the study's threshold; of the task's own groups as they were judged out of fold, at the
    threshold of their fold."""
    interval: Interval | None
    """Of that share, over patients; None for the task's own groups of an optimistic study."""


class ExcludedByCount(FrozenModel):
    """The excluded groups judged by one slice count; the task's own groups beside them, out of fold."""

    num_slices: int
    threshold: float
    groups: tuple[GroupScores, ...]


class ExcludedScores(FrozenModel):
    """Post hoc: what the networks say of subjects that the study left out (spectrum bias)."""

    result_hash: str
    num_models: int
    """Networks averaged per slice count."""
    left_out: dict[str, int]
    """Why excluded exams could not be scored, with counts."""
    slice_counts: tuple[ExcludedByCount, ...]

    def save(self, path: Path) -> None:
        """Write as JSON, atomically."""
        write_atomic(path, self.model_dump_json(indent=1).encode())

    @classmethod
    def load(cls, path: Path) -> ExcludedScores:
        """Read what `save` wrote."""
        return cls.model_validate_json(path.read_bytes())
