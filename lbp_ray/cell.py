"""What a trial is: its cell, its full specification and address, its place, and the data that all trials share.

No torch at run time: the process that waits for a trial imports this and stays light.

Shape suffixes: N studies, K slice offsets, H rows, W columns, F features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lbp_ray.config import FrozenModel
from lbp_ray.study import NUMERICS_VERSION, Recipe
from preprocess.commit import content_id

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from torch import Tensor

    from lbp_ray.streaming import FeatureFile


class TrialError(ValueError):
    """A trial that cannot give a valid result."""


class Cell(FrozenModel):
    """What distinguishes the trials of one recipe."""

    num_slices: int
    fold: int
    seed: int

    @property
    def name(self) -> str:
        """Name of the cell wherever people see it, e.g. ``k3-fold02-seed1``."""
        return f"k{self.num_slices}-fold{self.fold:02d}-seed{self.seed}"


class TrialSpec(FrozenModel):
    """All that determines a trial's numbers, by content and not by place."""

    cell: Cell
    recipe: Recipe
    crops_hash: str
    split_hash: str
    weights_hash: str
    workers: int = 1
    """Workers that share each batch: as many parts are summed, which moves float32 in the last digits."""
    numerics_version: int = NUMERICS_VERSION

    @property
    def trial_id(self) -> str:
        """Address of the trial; where the weights came from does not matter, only what they are."""
        identity = self.model_dump(mode="json")
        for key in ("weights", "weights_seed"):
            del identity["recipe"][key]
        return content_id(identity)


@dataclass(frozen=True)
class TrialPlace:
    """Where a trial leaves what it made."""

    final: Path
    """Folder that appears, complete, when the trial is done."""
    checkpoint: Path
    """In-progress state."""
    keep_model: bool = False
    """Whether the trained network stays (94 MB)."""

    @property
    def model(self) -> Path:
        """The trained network, where it is kept."""
        return self.final / "model.pt"

    @property
    def is_complete(self) -> bool:
        """Whether all that the trial must leave is committed."""
        return self.final.is_dir() and (self.model.is_file() or not self.keep_model)


@dataclass(frozen=True)
class Shared:
    """What a worker needs to load once: paths and hashes, no arrays."""

    crops: Path
    split: Path
    features: Path | None
    """None when the recipe recomputes features."""
    weights: str
    weights_seed: int
    weights_hash: str
    device: str
    block_studies: int | None = None
    """Studies per block of the shuffle, or None where all slices are shuffled."""


@dataclass(frozen=True)
class TrialData:
    """What every trial of a study shares, read-only."""

    crops_NKHW: np.ndarray
    """Stored pixel values of every cropped study (memory map)."""
    crop_row_N: np.ndarray
    """Row of each study in the crops."""
    features_NKF: Tensor | FeatureFile | None
    """Frozen-backbone features, in memory or on disk, or None when the recipe recomputes them."""
    study_ids: tuple[str, ...]
    patient_ids: tuple[str, ...]
    labels_N: np.ndarray
    """float32, 1 symptomatic, 0 asymptomatic, NaN in the sealed hold-out."""
    folds_N: np.ndarray
    """Fold of each study, `lbp_ray.splits.HOLDOUT` for the hold-out."""
    slice_index_NK: np.ndarray
    """Slice number in the store."""
    offset_mm_NK: np.ndarray
    """Signed distance from the mid-sagittal slice."""

    @property
    def patient_of(self) -> dict[str, str]:
        """Patient of each study."""
        return dict(zip(self.study_ids, self.patient_ids, strict=True))
