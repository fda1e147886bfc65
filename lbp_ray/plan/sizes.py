"""What a study's work depends on: numbers alone, from a configuration and the store that it names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from lbp_ray.cohort import label_exams
from lbp_ray.config import FrozenModel
from lbp_ray.plan.spans import PlanError
from lbp_ray.prepare import read_questionnaire
from lbp_ray.study import StudyConfig
from preprocess.midsagittal.choose import CONTRAST
from preprocess.store.read import read_manifest

if TYPE_CHECKING:
    from collections.abc import Sequence

OULU_STUDIES = 526
"""Studies of the Oulu thesis's binary task."""

FILES_PER_EXAM = 45
"""DICOM files of an exam whose tree has not been read: sagittal T2 and T1 and a few more series. Assumed."""

Whole = Annotated[int, Field(ge=0)]
Some = Annotated[int, Field(ge=1)]


class StudySizes(FrozenModel):
    """Sizes of a study; every field is a count unless its name says otherwise."""

    exams: Some
    """Exams that are converted, located, cropped and run through the backbone."""
    studies: Annotated[int, Field(ge=4)]
    """Exams of the binary task, one per patient: those that are split and trained on."""
    stored_slices: Some = 15
    """Slices of a stored series."""
    rows: Some = 512
    columns: Some = 512
    """Size of a stored slice in pixels of two bytes."""
    files_per_exam: Some = FILES_PER_EXAM
    """DICOM files that are indexed per exam."""
    height_px: Some
    width_px: Some
    """Size of a crop, of two bytes a pixel."""
    slice_counts: tuple[Some, ...]
    folds: Annotated[int, Field(ge=2)]
    seeds: Some
    """Model seeds."""
    holdout_fraction: float
    """Share of patients sealed away, rounded up."""
    inner_fraction: float
    """Share of the training patients that choose the epoch; 0 without such a choice."""
    frozen_epochs: Whole
    unfrozen_epochs: Whole
    batch_size: Some
    images_per_pass: Some
    """Of a batch, in the unfrozen epochs."""
    carries_norms: bool = True
    """Whether convolutions carry BatchNorm there, which halves what the backward pass keeps."""
    dtype: Literal["float32", "bfloat16"]
    """Type of the unfrozen epochs."""
    threads: Some
    """CPU threads of a trial."""
    gpus_per_trial: Annotated[float, Field(ge=0)]
    """0: trials run on CPUs. ``auto`` counts as 1: packing changes no throughput that can be predicted."""
    workers: Some
    """Workers that share a trial on CPUs."""
    feature_cache: bool
    blocks: bool
    """Whether batches are drawn block by block, so that features need not fit in memory."""
    keep_models: Literal["none", "first_seed", "all"]
    permutations: Whole
    bootstrap_resamples: Some

    @property
    def num_trials(self) -> int:
        """Slice counts × folds × seeds."""
        return len(self.slice_counts) * self.folds * self.seeds


def oulu_config(overrides: Sequence[str] = ()) -> StudyConfig:
    """Return the Oulu study's configuration, which the models' defaults are, with paths that nothing reads."""
    if overrides:
        msg = f"{overrides[0]!r} replaces a value of a configuration file: give --config, too"
        raise PlanError(msg)
    paths = dict.fromkeys(("store", "questionnaire", "annotations", "runs"), "/nowhere")
    return StudyConfig.model_validate({"name": "oulu", "paths": paths})


def sizes_of(config: StudyConfig, *, studies: int | None = None) -> StudySizes:
    """Gather a study's sizes.

    Parameters
    ----------
    config
        The study. Where its store exists, exams and slices are counted there; where its questionnaire does, the
        binary task is counted, else every exam belongs to it. Its recipe leaves nothing to the device
        (`lbp_ray.native.for_device`).
    studies
        Plan for so many studies instead, the store's slices being typical of them.

    Raises
    ------
    PlanError
        If there are fewer than four studies, or neither a store nor a number.
    """
    recipe, evaluation = config.recipe, config.evaluation
    dtype, most = recipe.unfrozen_dtype, recipe.images_per_pass
    assert dtype != "auto"
    assert most != "auto"
    found = _found(config)
    if studies is not None:
        found |= {"exams": studies, "studies": studies}
    if not found.get("exams"):
        msg = f"how many studies? {config.paths.store} holds no sagittal T2 series; convert first, or give --studies N"
        raise PlanError(msg)
    if found["studies"] < 2 * config.split.folds:
        msg = (
            f"{found['studies']} studies cannot fill {config.split.folds} folds with both classes; give more --studies"
        )
        raise PlanError(msg)
    gpus = config.compute.gpus_per_trial
    return StudySizes(
        **found,
        height_px=config.roi.height_px,
        width_px=config.roi.width_px,
        slice_counts=config.slice_counts,
        folds=config.split.folds,
        seeds=len(config.seeds),
        holdout_fraction=config.split.holdout_fraction,
        inner_fraction=recipe.inner_fraction if recipe.selection == "inner_validation" else 0.0,
        frozen_epochs=recipe.frozen_epochs,
        unfrozen_epochs=recipe.unfrozen_epochs,
        batch_size=recipe.batch_size,
        images_per_pass=min(most or recipe.batch_size, recipe.batch_size),
        carries_norms=recipe.carries_norms,
        dtype=dtype,
        threads=recipe.threads,
        gpus_per_trial=1.0 if gpus == "auto" else gpus,
        workers=config.compute.workers_per_trial,
        feature_cache=recipe.feature_cache,
        blocks=recipe.shuffle == "block",
        keep_models=config.compute.keep_models,
        permutations=evaluation.permutations,
        bootstrap_resamples=evaluation.bootstrap_resamples,
    )


def _found(config: StudyConfig) -> dict[str, int]:
    """Count what the study's files hold already."""
    if not (config.paths.store / "manifest").is_dir():
        return {}
    manifest = read_manifest(config.paths.store)
    manifest = manifest[manifest["contrast"] == CONTRAST]
    if manifest.empty:
        return {}
    task = len(manifest)
    if config.paths.questionnaire.is_file():
        answers = read_questionnaire(config.paths.questionnaire)
        labelled = label_exams(answers, strict_gt30=config.cohort.strict_gt30).dropna(subset="label")
        task = int(labelled["study_id"].isin(manifest["study_id"]).sum())
    typical = manifest[["num_slices", "rows", "columns"]].median().round().astype(int)
    return {
        "exams": len(manifest),
        "studies": task,
        "stored_slices": int(typical["num_slices"]),
        "rows": int(typical["rows"]),
        "columns": int(typical["columns"]),
    }
