"""The study's configuration: the models behind ``configs/*.yaml`` of ``python -m lbp_ray.tune``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from lbp_ray.config import AbsolutePath, FrozenModel

NUMERICS_VERSION = 1
"""Raised by hand whenever the same inputs give other numbers; part of every trial's identity."""

PositiveInt = Annotated[int, Field(ge=1)]

StudyRule = Literal["any", "mean", "top_k", "noisy_or"]
"""How slice probabilities become a study's; see `Recipe.study_rule`."""

Level = Literal["study", "slice"]
"""What is scored; see `EvaluationConfig.level`."""

Criterion = Literal["youden", "closest", "g_mean", "max_mcc", "sensitivity", "npv"]
"""Which point of a ROC curve is the threshold; see `EvaluationConfig.threshold_criterion`."""


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
    gradings: AbsolutePath | None = None
    """Linked gradings CSV: Pfirrmann and Modic of each disc by one or two readers; None leaves their tables out."""
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
    near_duplicates: Literal["refuse", "report"] = "refuse"
    """What happens when exams of two patients in different folds show the same pixels."""


class ProtocolConfig(FrozenModel):
    """The acquisition that the study wanted, by columns of the store's manifest; what is None is not checked."""

    manufacturer: str | None = None
    """As the manifest spells it, e.g. ``ge``."""
    field_strength_t: Annotated[float, Field(gt=0)] | None = None
    echo_time_ms: Annotated[float, Field(gt=0)] | None = None
    repetition_time_ms: Annotated[float, Field(gt=0)] | None = None
    echo_train_length: Annotated[float, Field(gt=0)] | None = None
    slice_thickness_mm: Annotated[float, Field(gt=0)] | None = None
    spacing_slice_mm: Annotated[float, Field(gt=0)] | None = None
    """Distance between slice centres."""
    rows: PositiveInt | None = None
    columns: PositiveInt | None = None
    spacing_row_mm: Annotated[float, Field(gt=0)] | None = None
    spacing_column_mm: Annotated[float, Field(gt=0)] | None = None
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Share of the wanted value by which a measured one may differ; rows, columns and manufacturer must be equal."""

    @property
    def wanted(self) -> dict[str, float | int | str]:
        """Wanted value of each parameter that is checked."""
        return self.model_dump(exclude={"tolerance"}, exclude_none=True)


class CohortConfig(FrozenModel):
    """How answers, gradings and acquisition are read."""

    strict_gt30: bool = False
    """Whether exactly 30 days of pain fall short of a symptomatic year; read where the questionnaire gives days, not
    codes (code 3 is more than 30 days already)."""
    agreement_weights: Literal["linear", "quadratic"] = "quadratic"
    """Weights of the two readers' kappa."""
    adjudication: Literal["worse", "better", "reader_1", "missing"] = "worse"
    """The grade of a disc that two readers grade differently and no third row decides."""
    pfirrmann_zero: Literal["missing", "grade"] = "missing"
    """Whether Pfirrmann 0, which the scale does not have, is an ungraded disc or a grade; it is flagged either way."""
    protocol: ProtocolConfig | None = None
    """Wanted acquisition, counted against the store's headers; None skips the check. No exam is left out by it."""


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
    """Compute backbone features once for all trials; without ``fold_extraction`` bit-equal to recomputing them."""
    fold_extraction: bool = True
    """Compute the features with one input channel and with BatchNorm inside the convolutions: less arithmetic, equal
    but in float32's last digits. Ignored where ``feature_cache`` is false."""
    fold_training: bool = True
    """Let the convolutions carry BatchNorm's constant scale and shift while all weights train: the same function of the
    same weights in less time and half the memory, equal but in the last digits. Ignored with ``unfrozen_batchnorm:
    train``."""
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
    shuffle: Literal["full", "block"] = "full"
    """Order of an epoch's slices: all of them shuffled, or blocks of studies in shuffled order and the slices shuffled
    within each. ``block`` reads a feature table larger than memory block by block; another order gives other
    numbers."""
    block_studies: PositiveInt = 4096
    """Studies of the crops per block: 168 MB of features with 5 slices. Ignored with a full shuffle."""
    images_per_pass: PositiveInt | Literal["auto"] | None = "auto"
    """Slices of a batch that go through the network at once in the unfrozen epochs; gradients are summed over the
    passes, which moves the last digits. None takes the whole batch. ``auto`` becomes, when the study starts, so many
    that a worker on a CPU stays below 1.5 GiB; the whole batch on a GPU, where workers share a trial, and where
    BatchNorm looks at the batch."""
    unfrozen_dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    """Autocast type of the unfrozen epochs; features are always float32. ``auto`` becomes, when the study starts,
    ``bfloat16`` where the trials' device computes it natively, else ``float32``; the result names what it became. On
    CPUs that is decided by the first run of the study, and its folder keeps it for later ones."""
    head: Literal["one_logit", "two_logit"] = "one_logit"
    """Last layer: one logit with binary cross-entropy, or one per class with a softmax over both."""
    selection: Literal["fixed_epochs", "inner_validation", "same_fold"] = "fixed_epochs"
    """What chooses the epoch that scores: nothing (the last one does), a part of the training folds that is held out of
    training, or the evaluated fold itself, which makes its scores optimistic and bars them from intervals."""
    checkpoint: Literal["best_mcc", "min_loss"] = "best_mcc"
    """The epoch that a selection takes: of the largest MCC at its own ROC threshold among the epochs up to the lowest
    loss (ties: the later one), or of the lowest loss. Ignored with fixed epochs."""
    checkpoint_top_k: PositiveInt = 1
    """How many of the best epochs are averaged, by their probabilities."""
    inner_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    """Share of the training patients that ``inner_validation`` holds out."""
    stop_patience: PositiveInt | None = None
    """Unfrozen epochs without a lower loss on what selects, after which training stops; None trains to the end."""
    study_rule: StudyRule = "any"
    """Study probability from slice probabilities: ``any`` (their maximum: positive if any slice is), ``mean``,
    ``top_k`` (mean of the largest) or ``noisy_or`` (1 - product of 1 - p)."""
    study_rule_k: PositiveInt = 2
    """How many of the largest slice probabilities ``top_k`` averages."""
    threads: PositiveInt = 1
    """CPU threads of one trial: they change float32 sums, so they belong to the recipe."""

    @property
    def block(self) -> int | None:
        """Studies per block of the shuffle, or None where all slices are shuffled."""
        return self.block_studies if self.shuffle == "block" else None

    @property
    def carries_norms(self) -> bool:
        """Whether convolutions carry BatchNorm while all weights train."""
        return self.fold_training and self.unfrozen_batchnorm == "eval"

    @model_validator(mode="after")
    def _stages_fit(self) -> Recipe:
        if self.feature_cache and self.frozen_batchnorm == "train":
            msg = (
                "feature_cache needs frozen_batchnorm: eval, because features drift while BatchNorm is in train mode; "
                "set feature_cache: false to train that way"
            )
            raise ValueError(msg)
        if isinstance(self.images_per_pass, int) and self.unfrozen_batchnorm == "train":
            msg = "images_per_pass divides a batch that unfrozen_batchnorm: train looks at as a whole; set it to null"
            raise ValueError(msg)
        if self.frozen_epochs + self.unfrozen_epochs == 0:
            msg = "frozen_epochs + unfrozen_epochs must be at least 1"
            raise ValueError(msg)
        self._refuse_unread()
        return self

    def _refuse_unread(self) -> None:
        """Refuse keys that were changed and would change nothing."""
        fields = Recipe.model_fields
        changed = {name for name in fields if getattr(self, name) != fields[name].default}
        unread = {
            "a selection (inner_validation or same_fold)": {"stop_patience", "checkpoint", "checkpoint_top_k"}
            if self.selection == "fixed_epochs"
            else set(),
            "selection: inner_validation": {"inner_fraction"} if self.selection != "inner_validation" else set(),
            "study_rule: top_k": {"study_rule_k"} if self.study_rule != "top_k" else set(),
        }
        faults = [f"{name} is read with {needs} only" for needs, names in unread.items() for name in names & changed]
        if self.stop_patience is not None and self.stop_patience >= self.unfrozen_epochs:
            faults.append(f"stop_patience {self.stop_patience} cannot stop {self.unfrozen_epochs} unfrozen epoch(s)")
        if faults:
            raise ValueError("; ".join(sorted(faults)))


class ComputeConfig(FrozenModel):
    """Where and how fast, never what: on one model of device it changes no number, but for the number of workers.

    Workers that share a trial's batches change float32 in the last digits, so their number is part of a trial's
    address; packing is not.
    """

    gpus_per_trial: Annotated[float, Field(ge=0)] | Literal["auto"] = 0.0
    """GPUs of a trial. A fraction packs several trials on one, 0 trains on CPUs. A whole number above 1 shares each
    batch of the unfrozen epochs among as many workers, one GPU each. ``auto`` measures the memory of a trial when the
    study starts, on one GPU of every node, and packs as many as fit where fewest do; where the cluster has no GPU it is
    0. Trials of a CPU and of a GPU, or of two models of GPU, are not mixed in one table."""
    workers_per_trial: PositiveInt = 1
    """The same on CPUs: workers that share each batch, ``recipe.threads`` CPUs each. On GPUs it stays 1: there is one
    per GPU."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Retries of a cell whose worker died or raised."""
    keep_models: Literal["none", "first_seed", "all"] = "first_seed"
    """Which trained networks stay on disk for ``predict`` (94 MB each)."""
    trackers: tuple[Literal["mlflow", "wandb"], ...] = ()
    """Who is told of every committed trial and of the result, offline, in a folder of its name beside the trials; both
    come with the extra ``tracking``."""
    verbose: bool = True
    """Progress and a console line per finished cell."""

    @field_validator("gpus_per_trial")
    @classmethod
    def _whole_gpus(cls, value: float | Literal["auto"]) -> float | Literal["auto"]:
        if value != "auto" and value > 1 and not value.is_integer():
            msg = "several GPUs per trial must be a whole number, one for each worker; a share of one is at most 1"
            raise ValueError(msg)
        return value

    @model_validator(mode="after")
    def _one_worker_per_gpu(self) -> ComputeConfig:
        if self.workers_per_trial > 1 and self.gpus_per_trial != 0:
            msg = (
                f"workers_per_trial: {self.workers_per_trial} is for CPUs; on GPUs gpus_per_trial alone says how many "
                f"workers share a trial (found {self.gpus_per_trial}), so set one of the two"
            )
            raise ValueError(msg)
        return self

    @property
    def workers(self) -> int:
        """Workers that share a trial."""
        gpus = 1.0 if self.gpus_per_trial == "auto" else self.gpus_per_trial
        return max(self.workers_per_trial, int(gpus))

    @property
    def gpus_per_worker(self) -> float:
        """GPUs of one worker; with ``auto`` a whole one, until a trial is measured."""
        return 1.0 if self.gpus_per_trial == "auto" else min(self.gpus_per_trial, 1.0)


class EvaluationConfig(FrozenModel):
    """How the out-of-fold table is judged."""

    bootstrap_resamples: PositiveInt = 2000
    """Resamples of patients behind every bootstrap interval."""
    level: Level = "study"
    """What the headline metrics and curves score; the other level's metrics stand beside them. Slice counts are
    compared on studies at either level."""
    threshold_source: Literal["cross_fitted", "same_fold"] = "cross_fitted"
    """Whose scores a fold's threshold is fitted on: those of the other folds, or its own, which makes its decisions
    optimistic and bars them from intervals."""
    threshold_criterion: Criterion = "youden"
    """The point of the ROC curve: largest recall + specificity (``youden``), ``closest`` to recall 1 and specificity 1,
    largest ``g_mean`` or ``max_mcc``, or the highest threshold that reaches ``threshold_target`` in ``sensitivity`` or
    ``npv``. Ties: the higher specificity."""
    threshold_target: Annotated[float, Field(gt=0, le=1)] | None = None
    """Sensitivity or NPV that must be reached; given with those criteria only."""
    threshold_level: Level = "study"
    """Scores that thresholds are fitted on: the studies', after aggregation, or the slices', before it."""
    ensemble_threshold: Literal["refit", "mean_of_seeds"] = "refit"
    """Threshold of the seed-averaged scores: fitted on them, or the mean of the seeds' thresholds."""
    spread: Literal["sd", "se"] = "sd"
    """What stands after ± in tables: standard deviation over seeds, or that divided by the root of their number; files
    hold both."""
    area_interval: Literal["delong", "bootstrap"] = "delong"
    """Interval of ROC-AUC: DeLong's on the logit scale, or the percentiles of a bootstrap over patients."""
    share_interval: Literal["wilson", "bootstrap"] = "wilson"
    """Interval of precision, NPV, recall, specificity and accuracy; Wilson's only where every patient has one exam,
    else the bootstrap over patients."""
    cross_validated_variance: Literal["nadeau_bengio", "one_model"] = "nadeau_bengio"
    """Variance of out-of-fold scores: inflated by 1 + K / (K - 1), because each patient trained the networks that score
    the others, or taken as that of one model on new patients. The hold-out's is never inflated."""
    interval_level: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    permutations: Annotated[int, Field(ge=0)] = 200
    """Label permutations among patients for the null of the frozen stage; 0 skips it."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of resamples and permutations."""
    allow_mixed_environments: bool = False
    """Accept trials that ran with other library versions or on other device models."""

    @model_validator(mode="after")
    def _target_belongs_to_its_criterion(self) -> EvaluationConfig:
        if (self.threshold_target is not None) != (self.threshold_criterion in ("sensitivity", "npv")):
            msg = "threshold_target belongs to threshold_criterion: sensitivity or npv; give both or none"
            raise ValueError(msg)
        return self


class StudyConfig(FrozenModel):
    """A whole study."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,40}$")]
    """Folder of the run below ``paths.runs``."""
    statements: tuple[str, ...] = ()
    """Sentences that must stand at the top of the report (e.g. that the cohort is synthetic)."""
    paths: PathsConfig
    roi: RoiConfig = RoiConfig()
    split: SplitConfig = SplitConfig()
    cohort: CohortConfig = CohortConfig()
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
    def _slice_thresholds_fit_the_rule(self) -> StudyConfig:
        if self.evaluation.threshold_level == "slice" and self.recipe.study_rule != "any":
            msg = (
                "evaluation.threshold_level: slice judges a study by whether any slice passes the slices' threshold; "
                f"with recipe.study_rule: {self.recipe.study_rule} it would say nothing: use threshold_level: study"
            )
            raise ValueError(msg)
        if self.evaluation.threshold_level == "slice" and self.evaluation.ensemble_threshold == "refit":
            msg = (
                "evaluation.threshold_level: slice with ensemble_threshold: refit would fit a threshold to averaged "
                "slices and hold it against averages of the networks' largest slices, which are larger: use "
                "evaluation.ensemble_threshold: mean_of_seeds"
            )
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _passes_are_of_one_worker(self) -> StudyConfig:
        if isinstance(self.recipe.images_per_pass, int) and self.compute.workers > 1:
            msg = (
                f"recipe.images_per_pass: {self.recipe.images_per_pass} is for one worker; {self.compute.workers} "
                "workers share each batch already: set it to null"
            )
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _one_source(self) -> StudyConfig:
        unread = [name for name in ("regions", "roi_corrections") if getattr(self.paths, name) is not None]
        if self.roi.source == "annotation" and unread:
            msg = f"paths.{unread[0]} is read with roi.source: model only; set that, or leave the path out"
            raise ValueError(msg)
        return self

    @property
    def optimistic(self) -> bool:
        """Whether a fold is judged by what was chosen on it: no interval and no verdict is made of such a study."""
        return "same_fold" in (self.recipe.selection, self.evaluation.threshold_source)

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
