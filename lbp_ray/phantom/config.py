"""What a cohort is: the configuration of ``python -m lbp_ray.phantom``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from lbp_ray.config import FrozenModel


class ImageSection(FrozenModel):
    """Sampling of every sagittal series."""

    matrix: int = Field(default=256, ge=64, le=1024)
    """Rows and columns of the stored images."""
    fov_mm: float = Field(default=280.0, gt=100)
    """Field of view of the square image."""
    spacing_mm: float = Field(default=4.0, gt=0)
    """Distance between slice centres."""
    thickness_mm: float = Field(default=4.0, gt=0)
    """Slice thickness: the width that sub-slices average over."""
    slices_min: int = Field(default=11, ge=3)
    """Fewest slices of a series."""
    slices_max: int = Field(default=17, ge=3)
    """Most slices of a series; the number is drawn evenly per exam."""
    mid_shift: int = Field(default=3, ge=0)
    """The true mid slice lies up to this many slices from the series' centre, drawn evenly."""
    subslices: int = Field(default=4, ge=1, le=8)
    """Thin planes averaged per slice."""
    noise: float = Field(default=0.011, ge=0)
    """Noise, as a share of the signal that a perfect coil receives from pure water."""

    @model_validator(mode="after")
    def _mid_slice_inside(self) -> Self:
        if self.slices_max < self.slices_min:
            msg = f"image.slices_max must be at least image.slices_min, found {self.slices_max} < {self.slices_min}"
            raise ValueError(msg)
        if self.slices_min // 2 - self.mid_shift < 1:
            msg = (
                f"image.slices_min must exceed twice image.mid_shift by 2, found {self.slices_min} and {self.mid_shift}"
            )
            raise ValueError(msg)
        return self


class CohortSection(FrozenModel):
    """Who is in the cohort and how grades lead to pain."""

    studies: int = Field(default=160, ge=4)
    """Exams of the binary task (symptomatic or asymptomatic)."""
    positives: int = Field(default=64, ge=1)
    """How many of them are symptomatic, exactly."""
    excluded: dict[Literal["slightly_symptomatic", "symptomatic_asymptomatic", "not_enough_data"], int] = Field(
        default={"slightly_symptomatic": 4, "symptomatic_asymptomatic": 6, "not_enough_data": 2}
    )
    """Questionnaire rows outside the binary task, by group."""
    excluded_imaged: int = Field(default=12, ge=1)
    """How many of those also have images; the templates come from them."""
    templates: int = Field(default=6, ge=1)
    """Hand-picked mid slices: of the excluded exams, those whose mid plane lies nearest a slice centre."""
    annotated: int | None = Field(default=None, ge=1)
    """Exams of the binary task with five rectangles; all when not given, and those outside the task as well."""
    exams_per_patient: tuple[float, float, float] = (0.86, 0.11, 0.03)
    """Shares of patients with one, two and three exams."""
    grades: Literal["spread", "oulu"] = "spread"
    """Marginal grades: evenly spread over healthy and worn, or the exact counts of the Oulu study (526 exams)."""
    level_correlation: float = Field(default=0.75, ge=0, lt=1)
    """Correlation of the latent wear between levels of one spine."""
    patient_correlation: float = Field(default=0.8, ge=0, lt=1)
    """Correlation of the latent wear between exams of one patient."""
    bayes_auc: float = Field(default=0.97, gt=0.5, lt=0.995)
    """Expected ROC-AUC of the best possible score, the true probability given the grades; sets the model's strength."""
    readers: Literal[1, 2] = 1
    """Reader 1 writes the true grades; reader 2, if there is one, now and then differs by one grade."""

    @model_validator(mode="after")
    def _counts_agree(self) -> Self:
        faults = []
        if self.positives >= self.studies:
            faults.append(
                f"cohort.positives must be fewer than cohort.studies, found {self.positives} of {self.studies}"
            )
        if self.excluded_imaged > sum(self.excluded.values()):
            faults.append(
                f"cohort.excluded_imaged is {self.excluded_imaged} of {sum(self.excluded.values())} excluded rows"
            )
        if self.annotated is not None and self.annotated > self.studies:
            faults.append(f"cohort.annotated must be at most cohort.studies, found {self.annotated} of {self.studies}")
        if self.grades == "oulu" and self.studies != 526:
            faults.append(f"cohort.grades=oulu needs cohort.studies=526, found {self.studies}")
        if faults:
            raise ValueError("; ".join(faults))
        return self


class TreeSection(FrozenModel):
    """What else lies in the DICOM tree."""

    t1: bool = True
    """Write a sagittal T1 series beside every T2."""
    localizer: bool = True
    """Write a three-plane localizer in every exam."""
    junk_files: int = Field(default=8, ge=0)
    """Files that are not DICOM: notes, empty files, what desktop systems leave behind."""
    flipped_share: float = Field(default=0.05, ge=0, le=1)
    """Share of exams whose images are stored posterior side first (first direction cosine −y)."""


class PhantomConfig(FrozenModel):
    """A whole synthetic cohort."""

    out: Path
    """Folder to write; absolute. It appears, complete, when everything in it is written."""
    seed: int = Field(default=1, ge=0)
    """Seed of everything random. The same configuration gives the same bytes."""
    workers: int | None = Field(default=None, ge=1)
    """Processes; as many as the CPUs this process may use when not given. Does not change the result."""
    image: ImageSection = ImageSection()
    cohort: CohortSection = CohortSection()
    tree: TreeSection = TreeSection()

    @model_validator(mode="after")
    def _absolute(self) -> Self:
        if not self.out.is_absolute():
            msg = f"out must be an absolute path, found {str(self.out)!r}"
            raise ValueError(msg)
        return self
