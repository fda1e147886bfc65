"""A prediction beside what a finished run took: seconds of work, summed over its workers.

Trials record their seconds in ``trial.json`` (``{"seconds": {"frozen": s, "unfrozen": s, "evaluation": s}}``), feature
tables theirs in ``features.json`` (``{"seconds": s, "images": n}``). Work is compared, not wall time, because how many
workers ran at once is not recorded.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq

from lbp_ray.config import FrozenModel
from lbp_ray.plan.counts import Cell
from lbp_ray.plan.predict import cell_seconds
from lbp_ray.plan.spans import NONE, PlanError, Span
from lbp_ray.study import Recipe

if TYPE_CHECKING:
    from pathlib import Path

    from lbp_ray.plan.hardware import Hardware
    from lbp_ray.plan.sizes import StudySizes

TIMED = {"heads": "frozen", "unfrozen epochs": "unfrozen", "evaluation": "evaluation"}
"""Stage of a plan → key of a trial's seconds."""


class Comparison(FrozenModel):
    """One stage's work, predicted and done; seconds of all workers together."""

    stage: str
    predicted: Span
    took_s: float

    @property
    def ratio(self) -> float:
        """Predicted over done; 1 is right, below 1 too hopeful."""
        return self.predicted.middle / self.took_s


class Finished(FrozenModel):
    """What the trials of a run did and took."""

    cells: tuple[Cell, ...]
    seconds: dict[str, float]
    """By key of ``trial.json``, summed."""
    recipe: Recipe
    device: str
    """Model of the device that the trials ran on, as they recorded it."""
    height_px: int
    width_px: int
    extraction_s: float | None
    """None where no table of these crops tells."""
    images: int
    """Slices of the crops."""


def read_finished(study: Path) -> Finished:
    """Read what a finished study did and took.

    Parameters
    ----------
    study
        The study's folder below the root of runs.

    Raises
    ------
    PlanError
        If there are no trials, none that tells its seconds, trials of several recipes, or no crops.
    """
    records = {path.parent: json.loads(path.read_text()) for path in sorted(study.glob("trials/*/trial.json"))}
    if not records:
        msg = f"{study} holds no committed trial (trials/*/trial.json); give the folder of a study below paths.runs"
        raise PlanError(msg)
    timed = {folder: record for folder, record in records.items() if record.get("seconds")}
    if not timed:
        msg = (
            f"{len(records)} trial(s) of {study} carry no seconds, as trials of older versions; run the study again "
            "under another name"
        )
        raise PlanError(msg)
    first = next(iter(timed.values()))["spec"]
    if any({**record["spec"], "cell": None} != {**first, "cell": None} for record in timed.values()):
        msg = f"{study} holds trials of several recipes, splits or crops; move the others away to compare one"
        raise PlanError(msg)
    recipe = Recipe.model_validate(first["recipe"])
    shape = _crop_shape(study.parent, first["crops_hash"])
    seconds = {key: sum(record["seconds"].get(key, 0.0) for record in timed.values()) for key in TIMED.values()}
    return Finished(
        cells=_cells(timed, recipe),
        seconds=seconds,
        recipe=recipe,
        device=next(iter(timed.values())).get("environment", {}).get("device", ""),
        height_px=shape[2],
        width_px=shape[3],
        extraction_s=_extraction_seconds(study.parent, shape[0] * shape[1]),
        images=shape[0] * shape[1],
    )


def _crop_shape(root: Path, crops_hash: str) -> tuple[int, ...]:
    for meta in sorted(root.glob("crops/*/crops.json")):
        if json.loads(meta.read_text())["crops_hash"] == crops_hash:
            shape: tuple[int, ...] = np.load(meta.with_name("crops.npy"), mmap_mode="r").shape
            return shape
    msg = f"the crops {crops_hash[:12]} of this study are not below {root / 'crops'}; bring them back to compare"
    raise PlanError(msg)


def _extraction_seconds(root: Path, images: int) -> float | None:
    """Seconds of the feature table of so many images; several such tables tell nothing."""
    metas = [json.loads(path.read_text()) for path in root.glob("features/*/features.json")]
    found = [meta["seconds"] for meta in metas if meta.get("images") == images and "seconds" in meta]
    return float(found[0]) if len(found) == 1 else None


def _cells(timed: dict[Path, Any], recipe: Recipe) -> tuple[Cell, ...]:
    """Count each trial's work from the rows of its tables; what it trained on stands in the other folds' tables."""
    rows = {folder: pq.read_metadata(folder / "out_of_fold.parquet").num_rows for folder in timed}
    held = {folder: pq.read_metadata(folder / "holdout.parquet").num_rows for folder in timed}
    by_key = {folder: record["spec"]["cell"] for folder, record in timed.items()}
    cells = []
    for folder, key in by_key.items():
        others = {
            by_key[other]["fold"]: rows[other] for other in timed if by_key[other]["num_slices"] == key["num_slices"]
        }
        pooled, tested = sum(others.values()), rows[folder]
        inner = math.ceil(recipe.inner_fraction * (pooled - tested)) if recipe.selection == "inner_validation" else 0
        trained = pooled - tested - inner
        steps, unfrozen = -(-trained // recipe.batch_size), recipe.unfrozen_epochs
        cells.append(
            Cell(
                num_slices=key["num_slices"],
                frozen_passes=recipe.frozen_epochs * pooled,
                head_steps=recipe.frozen_epochs * steps,
                training_images=unfrozen * trained,
                unfrozen_steps=unfrozen * steps,
                evaluation_images=unfrozen * (tested + inner) + held[folder] if unfrozen else 0,
            )
        )
    return tuple(cells)


def compare(finished: Finished, sizes: StudySizes, hardware: Hardware) -> tuple[Comparison, ...]:
    """Predict a finished run's work and set it beside what it took.

    Parameters
    ----------
    finished
        The run.
    sizes
        Its crop size, batch size and dtype, as the calibration was made for.
    hardware
        The machine it ran on.
    """
    spent = [cell_seconds(cell, sizes, hardware) for cell in finished.cells]
    found = []
    if finished.extraction_s is not None:
        predicted = hardware.extraction_s * finished.images
        found.append(Comparison(stage="extraction", predicted=predicted, took_s=finished.extraction_s))
    for index, (stage, key) in enumerate(TIMED.items()):
        if finished.seconds[key]:
            predicted = sum((parts[index] for parts in spent), NONE)
            found.append(Comparison(stage=stage, predicted=predicted, took_s=finished.seconds[key]))
    return tuple(found)
