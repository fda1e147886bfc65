"""The study's configuration: the models behind ``configs/*.yaml`` of ``python -m lbp_ray.tune``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from lbp_ray.config import AbsolutePath, FrozenModel

NUMERICS_VERSION = 1
"""Raised by hand whenever the same inputs give other numbers; part of every trial's identity."""

PositiveInt = Annotated[int, Field(ge=1)]


class PathsConfig(FrozenModel):
    """Where the study reads and writes; absolute, on storage that every node sees."""

    store: AbsolutePath
    """Slice store written by ``python -m preprocess``."""
    midsagittal: AbsolutePath | None = None
    """Mid-sagittal artefact; None takes the only one beside the store and refuses a choice."""
    questionnaire: AbsolutePath
    """Linked questionnaire CSV (``python -m preprocess link``)."""
    annotations: AbsolutePath
    """Linked CVAT 1.1 XML: the lumbar region of annotated slices."""
    regions: AbsolutePath | None = None
    """Regions artefact (``python -m lbp_ray.segment``); None takes the only one below ``runs`` that was made from this
    store and mid-sagittal choice. Read with ``roi.source: model`` only."""
    roi_overrides: AbsolutePath | None = None
    """CSV of what a person decides about single exams: ``study_id,action,centre_row,centre_column``."""
    roi_corrections: AbsolutePath | None = None
    """CVAT file of predicted masks that a person corrected. Read with ``roi.source: model`` only."""
    truth: AbsolutePath | None = None
    """Linked truth table of a synthetic cohort; None for patients."""
    runs: AbsolutePath
    """Root of crops, features, trials and results."""


class RoiConfig(FrozenModel):
    """The fixed region of interest."""

    source: Literal["annotation", "model"] = "annotation"
    """What boxes are centred on: the annotated shapes, or predicted masks. Never a mixture; only what a person decides
    about single exams stands beside predicted masks, and is counted."""
    centre: Literal["union", "mean_of_five"] = "union"
    """Centre of an annotation: the centroid of its shapes' union, or the mean of its five rectangles' centres."""
    label_blind: bool = False
    """Declares that the segmenter never saw a pain label, which a study needs whose folds are not the segmenter's; the
    report says so."""
    allow_holdout_training: bool = False
    """Accept a segmenter that was trained on sealed patients; the report then says so."""
    width_px: PositiveInt = 200
    """Antero-posterior size in pixels (image columns)."""
    height_px: PositiveInt = 400
    """Cranio-caudal size in pixels (image rows)."""
    width_mm: Annotated[float, Field(gt=0)] | None = None
    """Antero-posterior size of a physical box, resampled onto ``width_px``; None cuts that many pixels as they are."""
    height_mm: Annotated[float, Field(gt=0)] | None = None
    """Cranio-caudal size of a physical box; given with ``width_mm`` or not at all."""
    slice_pitch_mm: Annotated[float, Field(gt=0)] = 4.0
    """Signed step between neighbouring slices along the patient's right-left axis, in mm."""
    tolerance_mm: Annotated[float, Field(gt=0)] = 1.0
    """A neighbour must lie within this distance of its nominal offset, else the study is excluded."""

    @model_validator(mode="after")
    def _consistent(self) -> RoiConfig:
        if (self.width_mm is None) != (self.height_mm is None):
            msg = "width_mm and height_mm belong together: give both or none"
            raise ValueError(msg)
        if self.source == "model" and self.centre == "mean_of_five":
            msg = "centre: mean_of_five needs five rectangles per slice, which a predicted mask has not; use union"
            raise ValueError(msg)
        return self

    @property
    def size_mm(self) -> tuple[float, float] | None:
        """Height and width of the physical box, or None."""
        return None if self.height_mm is None or self.width_mm is None else (self.height_mm, self.width_mm)


class SplitConfig(FrozenModel):
    """Hold-out and folds, made on one row per patient."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the hold-out draw and of the folds; not a model seed."""
    folds: Annotated[int, Field(ge=2)] = 10
    holdout_fraction: Annotated[float, Field(ge=0, lt=0.5)] = 0.1
    """Share of patients sealed away before any training; 0 keeps none."""


class MidsagittalConfig(FrozenModel):
    """How the study may use the mid-sagittal artefact."""

    allow_holdout_templates: bool = False
    """Accept templates of sealed patients: their slices then shape where every exam is cropped, and the report says so.
    Otherwise a patient with a template is never sealed, and a sealed one with a template is refused."""


class Recipe(FrozenModel):
    """How one network is trained: everything that changes its numbers."""

    architecture: Literal["resnet50"] = "resnet50"
    weights: str = "imagenet"
    """``imagenet`` (torchvision's IMAGENET1K_V1), ``random`` (seeded) or the absolute path of a state dict."""
    weights_seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the random start; ignored for other weights."""
    frozen_epochs: Annotated[int, Field(ge=0)] = 40
    """Epochs that train the last layer on constant backbone features."""
    unfrozen_epochs: Annotated[int, Field(ge=0)] = 1
    """Epochs that train all weights, after the frozen ones."""
    frozen_batchnorm: Literal["eval", "train"] = "eval"
    """BatchNorm mode of the frozen backbone. ``train`` lets running statistics drift: features are then not constant
    and ``feature_cache`` must be false."""
    unfrozen_batchnorm: Literal["eval", "train"] = "eval"
    """BatchNorm mode while all weights train."""
    feature_cache: bool = True
    """Compute backbone features once for all trials; bit-equal to recomputing them."""
    adam_at_unfreeze: Literal["keep", "reset"] = "keep"
    """Whether the last layer's Adam moments survive the unfreezing."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    learning_rate_late: Annotated[float, Field(gt=0)] = 1e-5
    """Learning rate from epoch ``learning_rate_drop`` on."""
    learning_rate_drop: PositiveInt = 30
    """First epoch (counted from 1, over both stages) that uses ``learning_rate_late``."""
    learning_rate_unfrozen: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of the unfrozen epochs; None lets the schedule above run on."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-3
    """Adam's L2 term."""
    batch_size: PositiveInt = 32
    """Slices per step; every slice is a sample of its own."""
    unfrozen_dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    """Autocast type of the unfrozen epochs; features are always float32. ``auto`` becomes, when the study starts,
    ``bfloat16`` where the trials' device computes it natively, else ``float32``; the result names what it became."""
    study_rule: Literal["max", "mean"] = "max"
    """Study probability from slice probabilities: ``max`` is positive if any slice is."""
    threads: PositiveInt = 1
    """CPU threads of one trial: they change float32 sums, so they belong to the recipe."""

    @model_validator(mode="after")
    def _cache_needs_constant_features(self) -> Recipe:
        if self.feature_cache and self.frozen_batchnorm == "train":
            msg = (
                "feature_cache needs frozen_batchnorm: eval, because features drift while BatchNorm is in train mode; "
                "set feature_cache: false to train that way"
            )
            raise ValueError(msg)
        if self.frozen_epochs + self.unfrozen_epochs == 0:
            msg = "frozen_epochs + unfrozen_epochs must be at least 1"
            raise ValueError(msg)
        return self


class ComputeConfig(FrozenModel):
    """Where and how fast, never what: changes no number on one model of device."""

    gpus_per_trial: Annotated[float, Field(ge=0)] = 0.0
    """GPUs that a trial asks Ray for; fractions pack several trials on one, 0 trains on CPUs. Trials of a CPU and of a
    GPU, or of two models of GPU, are not mixed in one table."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Retries of a cell whose worker died or raised."""
    keep_models: Literal["none", "first_seed", "all"] = "first_seed"
    """Which trained networks stay on disk for ``predict`` (94 MB each)."""
    verbose: bool = True
    """Progress bars and a console line per finished cell."""


class EvaluationConfig(FrozenModel):
    """How the out-of-fold table is judged."""

    bootstrap_resamples: PositiveInt = 2000
    """Resamples of patients behind every interval but that of ROC-AUC, which is DeLong's."""
    interval_level: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    permutations: Annotated[int, Field(ge=0)] = 200
    """Label permutations among patients for the null of the frozen stage; 0 skips it."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of resamples and permutations."""
    allow_mixed_environments: bool = False
    """Accept trials that ran with other library versions or on other device models."""


class StudyConfig(FrozenModel):
    """A whole study."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,40}$")]
    """Folder of the run below ``paths.runs``."""
    statements: tuple[str, ...] = ()
    """Sentences that must stand at the top of the report (e.g. that the cohort is synthetic)."""
    paths: PathsConfig
    roi: RoiConfig = RoiConfig()
    split: SplitConfig = SplitConfig()
    midsagittal: MidsagittalConfig = MidsagittalConfig()
    recipe: Recipe = Recipe()
    slice_counts: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 3, 5)
    """Odd numbers of adjacent slices around the mid-sagittal one."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0, 1, 2, 3, 4)
    """Model seeds: initial last layer and batch order."""
    evaluation: EvaluationConfig = EvaluationConfig()
    compute: ComputeConfig = ComputeConfig()

    @field_validator("slice_counts")
    @classmethod
    def _odd(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(count % 2 == 0 for count in value):
            msg = "slice counts must be odd (the mid-sagittal slice and as many on each side)"
            raise ValueError(msg)
        return _distinct(value)

    @field_validator("seeds")
    @classmethod
    def _distinct_seeds(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        return _distinct(value)

    @model_validator(mode="after")
    def _one_source(self) -> StudyConfig:
        unread = [name for name in ("regions", "roi_corrections") if getattr(self.paths, name) is not None]
        if self.roi.source == "annotation" and unread:
            msg = f"paths.{unread[0]} is read with roi.source: model only; set that, or leave the path out"
            raise ValueError(msg)
        return self

    @property
    def offsets_mm(self) -> tuple[float, ...]:
        """Nominal slice offsets from the mid-sagittal slice, ascending, for the largest slice count."""
        reach = max(self.slice_counts) // 2
        return tuple(step * self.roi.slice_pitch_mm for step in range(-reach, reach + 1))


def _distinct(value: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(value)) != len(value):
        msg = f"must not repeat a value, found {list(value)}"
        raise ValueError(msg)
    return tuple(sorted(value))
