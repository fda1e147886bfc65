"""The regions artefact: one lumbar mask per exam, by a network that never saw its patient, and how good they are.

Written by ``python -m lbp_ray.segment``, read when crops are cut. A mask is stored as run lengths over the whole image,
row by row, beginning with background.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lbp_ray.config import FrozenModel
from preprocess.commit import canonical_json
from preprocess.cvat.shapes import mask_from_rle

if TYPE_CHECKING:
    from pathlib import Path

OUT_OF_FOLD = "out_of_fold"
"""Source of a mask by the fold model that never saw the patient."""

MODEL = "model"
"""Source of a mask by the final model, of a patient that no model saw."""

FLAGS = {
    "empty": "the mask holds no pixel",
    "several_components": "the mask falls into several parts of some size",
    "small": "area, height or width is far below that of any annotated region",
    "large": "area, height or width is far above that of any annotated region",
    "at_edge": "the mask touches the edge of the image",
}
"""Why a mask is sent to review instead of being cropped."""

COLUMNS = (
    "study_id", "patient_id", "series_id", "slice_index", "rows", "columns", "source", "fold", "mask_rle", "area_mm2",
    "height_mm", "width_mm", "components", "centroid_row", "centroid_column", "flags",
)  # fmt: skip
"""Columns of ``regions.parquet``; ``mask_rle`` are run lengths, ``flags`` codes of `FLAGS` joined by ``+``."""

SCORE_COLUMNS = (
    "study_id", "patient_id", "series_id", "slice_index", "fold", "dice", "baseline_dice", "centroid_error_mm",
    "baseline_error_mm",
)  # fmt: skip
"""Columns of ``scores.parquet``: one row per annotated slice, out of fold, beside a fixed mean box."""


class RegionError(ValueError):
    """Regions that cannot be made or used."""


class Plausible(FrozenModel):
    """Ranges outside which a mask is flagged, from the annotated regions."""

    area_mm2: tuple[float, float]
    height_mm: tuple[float, float]
    width_mm: tuple[float, float]


class RegionsMeta(FrozenModel):
    """What a regions artefact was made from."""

    version: int
    regions_hash: str = ""
    """SHA-256 of the tables and of everything else here."""
    store: str
    """Content hash of the slice store."""
    midsagittal: str
    """SHA-256 of the mid-sagittal table."""
    annotations: str
    """SHA-256 of the annotation file."""
    weights_hash: str
    """SHA-256 of the encoder's initial weights."""
    recipe: dict[str, Any]
    num_folds: int
    nested_in: str | None
    """Split hash of the study whose outer folds are the segmenter's folds; None: folds of its own, by patient."""
    trained_patients: tuple[str, ...]
    """Every patient that any of its networks was trained on, sorted."""
    plausible: Plausible
    statements: tuple[str, ...]
    environment: dict[str, str]

    def hashed_with(self, table: pd.DataFrame, scores: pd.DataFrame) -> RegionsMeta:
        """Return the same with the hash of some tables."""
        return self.model_copy(update={"regions_hash": hash_regions(table, scores, self)})


@dataclass(frozen=True)
class Regions:
    """A committed regions artefact."""

    table: pd.DataFrame
    """`COLUMNS`, sorted by study."""
    scores: pd.DataFrame
    """`SCORE_COLUMNS`."""
    meta: RegionsMeta
    folder: Path

    @classmethod
    def open(cls, folder: Path) -> Regions:
        """Read an artefact; refuse one that was edited.

        Raises
        ------
        RegionError
            If the folder is no regions artefact or its tables do not match their hash.
        """
        if not (folder / "regions.json").is_file():
            msg = f"{folder} is no regions artefact (no regions.json); `python -m lbp_ray.segment` makes them"
            raise RegionError(msg)
        meta = RegionsMeta.model_validate_json((folder / "regions.json").read_bytes())
        table, scores = (pd.read_parquet(folder / f"{name}.parquet") for name in ("regions", "scores"))
        if hash_regions(table, scores, meta) != meta.regions_hash:
            msg = f"{folder} was changed after it was made; delete it and run `python -m lbp_ray.segment` again"
            raise RegionError(msg)
        return cls(table, scores, meta, folder)


def hash_regions(table: pd.DataFrame, scores: pd.DataFrame, meta: RegionsMeta) -> str:
    """Return the SHA-256 of all masks, their description, the scores and what they were made from."""
    digest = hashlib.sha256(canonical_json(meta.model_dump(mode="json", exclude={"regions_hash"})).encode())
    for runs in table["mask_rle"]:
        digest.update(np.asarray(runs, dtype="<i4").tobytes() + b"|")
    for frame in (table.drop(columns="mask_rle"), scores):
        digest.update(frame.to_json(orient="records", double_precision=10).encode())
    return digest.hexdigest()


def mask_of(row: dict[Any, Any] | pd.Series[Any]) -> np.ndarray:
    """Return the mask of one row of the table: (rows, columns) bool, on the pixel grid of the store."""
    return mask_from_rle(row["mask_rle"], (int(row["rows"]), int(row["columns"])))
