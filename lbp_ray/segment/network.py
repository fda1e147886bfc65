"""What one network of a region finder is: its specification, its address, its place.

No torch at run time: the processes that wait for a network import this and stay light.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lbp_ray.config import FrozenModel
from lbp_ray.segment.config import RegionRecipe
from preprocess.commit import content_id

if TYPE_CHECKING:
    from pathlib import Path

    from lbp_ray.runs import RunPaths


class SegmentError(ValueError):
    """A segmentation network that cannot be trained or used."""


FINAL = -1
"""Number of the network that is trained on every patient that may be seen."""

APART = -2
"""Fold of annotated patients that no network is trained on: sealed, or kept for the test."""


class FoldSpec(FrozenModel):
    """All that determines one network."""

    fold: int
    """The patients of this fold are left out; `FINAL` leaves out none."""
    recipe: RegionRecipe
    set_hash: str
    """Training set, initial weights and folds."""
    workers: int

    @property
    def name(self) -> str:
        """Name of the network wherever people see it, e.g. ``roi-fold02``."""
        return "roi-final" if self.fold == FINAL else f"roi-fold{self.fold:02d}"

    @property
    def fold_id(self) -> str:
        """Address of the network; where the first weights came from does not matter, only what they are."""
        identity = self.model_dump(mode="json")
        for key in ("weights", "weights_seed"):
            identity["recipe"].pop(key, None)
        return content_id(identity)


@dataclass(frozen=True)
class FoldPlace:
    """Where a network is left."""

    final: Path
    """Folder that appears, complete, when the network is trained."""
    checkpoint: Path
    """In-progress state."""

    @property
    def model(self) -> Path:
        """The trained network's state dict."""
        return self.final / "model.pt"


def place_of(spec: FoldSpec, paths: RunPaths) -> FoldPlace:
    """Return where a network is trained and left."""
    return FoldPlace(paths.trial(spec.name, spec.fold_id), paths.checkpoint(spec.name, spec.fold_id))
