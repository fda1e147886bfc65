"""Every path that a run reads or writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lbp_ray.splits import LEDGER

if TYPE_CHECKING:
    from pathlib import Path


class RunError(ValueError):
    """A run folder that cannot be used as it is."""


@dataclass(frozen=True)
class RunPaths:
    """Paths below one root of runs; content-addressed artefacts are shared by all studies of the root."""

    root: Path
    """``paths.runs`` of the configuration."""
    study: str
    """The study's name."""

    def crops(self, address: str) -> Path:
        """Crops artefact of one content id."""
        return self.root / "crops" / address[:16]

    def features(self, address: str) -> Path:
        """Feature table of one content id."""
        return self.root / "features" / address[:16]

    @property
    def ledger(self) -> Path:
        """Openings of hold-outs, shared by all studies of the root: they may seal the same patients."""
        return self.root / LEDGER

    @property
    def folder(self) -> Path:
        """The study's own folder."""
        return self.root / self.study

    def split(self, address: str) -> Path:
        """Folder of one split: folds, training labels and the hash that seals the hold-out."""
        return self.splits / address[:16]

    @property
    def splits(self) -> Path:
        """All splits that the study has committed."""
        return self.folder / "splits"

    def training_set(self, address: str) -> Path:
        """Annotated slices on a network's grid."""
        return self.folder / "training_sets" / address[:16]

    def regions(self, address: str) -> Path:
        """Masks of every exam by one set of networks; shared by all studies of the root."""
        return self.all_regions / address[:16]

    @property
    def all_regions(self) -> Path:
        """Every regions artefact of the root, one folder each."""
        return self.root / "regions"

    @property
    def trials(self) -> Path:
        """Committed trials, one folder each; a folder that bears its final name is complete."""
        return self.folder / "trials"

    def trial(self, name: str, trial_id: str) -> Path:
        """Folder of one committed trial."""
        return self.trials / f"{name}-{trial_id[:16]}"

    def checkpoint(self, name: str, trial_id: str) -> Path:
        """In-progress state of one trial; deleted when the trial is committed."""
        return self.folder / "in_progress" / f"{name}-{trial_id[:16]}.pt"

    @property
    def tune(self) -> Path:
        """Ray Tune's own records (console, TensorBoard): a convenience, never the truth."""
        return self.folder / "tune"

    def result(self, address: str) -> Path:
        """Out-of-fold table, result object, figures and report of one complete set of trials."""
        return self.folder / "results" / address[:16]
