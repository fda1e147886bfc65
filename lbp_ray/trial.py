"""One trial: a fold x seed x slice count trained, scored on its fold and committed. No Ray here."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from lbp_ray.cell import TrialError
from lbp_ray.segment.loop import rank_and_world
from lbp_ray.selection import EpochRecord
from lbp_ray.sharing import from_first
from lbp_ray.training import Training
from preprocess.commit import committed_directory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lbp_ray.cell import TrialData, TrialPlace, TrialSpec
    from lbp_ray.resident import Resident
    from lbp_ray.samples import Samples


def run_trial(spec: TrialSpec, data: TrialData, resident: Resident, place: TrialPlace) -> Iterator[EpochRecord]:
    """Train one cell, yield its learning curve and commit its predictions; the first of several workers writes.

    Parameters
    ----------
    spec
        What to train.
    data
        The study's shared data.
    resident
        This process's backbone.
    place
        Where to write. A complete trial is left as it is and its curve is yielded again.

    Yields
    ------
    EpochRecord
        After each epoch, those of a resumed checkpoint included.

    Raises
    ------
    TrialError
        If a class is missing, a loss or score is not finite, or another number of workers runs than was planned.

    Notes
    -----
    The network that stays is the best of the chosen epochs, also where several were averaged.
    """
    rank, world = rank_and_world()
    if world != spec.workers:
        msg = f"{spec.cell.name} was planned for {spec.workers} worker(s), {world} run(s)"
        raise TrialError(msg)
    if from_first(place.is_complete):
        place.checkpoint.unlink(missing_ok=True)  # left by a kill right after the commit
        yield from (EpochRecord(**row) for row in _read_history(place.final))
        return
    if rank == 0:
        shutil.rmtree(place.final, ignore_errors=True)  # committed by a study that kept no network
    torch.set_num_threads(spec.recipe.threads)
    training = Training(spec, data, resident)
    yield from training.epochs(place.checkpoint)
    tables = {
        "out_of_fold": _predictions(training, training.validation),
        "holdout": _predictions(training, training.holdout),
    }
    if rank == 0:
        _commit(training, tables, place)


def _commit(training: Training, tables: dict[str, pd.DataFrame], place: TrialPlace) -> None:
    """Write what a trial leaves, and drop its checkpoint."""
    spec = training.spec
    with committed_directory(place.final, point="trial") as folder:
        for name, table in tables.items():
            table.to_parquet(folder / f"{name}.parquet", index=False)
        pd.DataFrame(training.history).to_parquet(folder / "history.parquet", index=False)
        if place.keep_model:
            model = {"backbone": training.backbone.state_dict(), "head": training.head.state_dict()}
            torch.save(model, folder / place.model.name)
        record = {
            "trial_id": spec.trial_id,
            "spec": spec.model_dump(mode="json"),
            "epochs": training.scoring_epochs,
            "environment": environment(training.device),
            "seconds": training.seconds,
        }
        (folder / "trial.json").write_text(json.dumps(record, indent=1))
    place.checkpoint.unlink(missing_ok=True)


def _predictions(training: Training, samples: Samples) -> pd.DataFrame:
    """One row per slice: where it is and its probability."""
    data = training.data
    return pd.DataFrame(
        {
            "study_id": [data.study_ids[row] for row in samples.study_M],
            "slice_index": data.slice_index_NK[samples.study_M, samples.offset_M],
            "slice_offset_mm": data.offset_mm_NK[samples.study_M, samples.offset_M],
            "probability": training.probabilities(samples),
        }
    )


def _read_history(final: Path) -> list[dict[Any, Any]]:
    return [dict(row) for row in pd.read_parquet(final / "history.parquet").to_dict("records")]


def environment(device: str) -> dict[str, str]:
    """Return what else might change a trial's last digits: library versions and the model of the device it ran on."""
    on_gpu = device.startswith("cuda")
    model = torch.cuda.get_device_name(device) if on_gpu else torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__, "numpy": np.__version__, "device": str(model)}
