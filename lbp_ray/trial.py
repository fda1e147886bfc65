"""One trial: a fold x seed x slice count trained, scored on its fold and committed. No Ray here."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from lbp_ray.cell import TrialError
from lbp_ray.training import EpochRecord, Training
from preprocess.commit import committed_directory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lbp_ray.cell import TrialData, TrialPlace, TrialSpec
    from lbp_ray.training import Resident, Samples


def run_trial(spec: TrialSpec, data: TrialData, resident: Resident, place: TrialPlace) -> Iterator[EpochRecord]:
    """Train one cell, yield its learning curve and commit its predictions.

    Parameters
    ----------
    spec
        What to train.
    data
        The study's shared data.
    resident
        This process's backbone.
    place
        Where to write. An existing ``place.final`` is left as it is and its curve is yielded again.

    Yields
    ------
    EpochRecord
        After each epoch, those of a resumed checkpoint included.

    Raises
    ------
    TrialError
        If a class is missing or a loss or score is not finite.
    """
    if place.final.is_dir():
        yield from (EpochRecord(**row) for row in _read_history(place.final))
        return
    torch.set_num_threads(spec.recipe.threads)
    training = Training(spec, data, resident)
    yield from training.epochs(place.checkpoint)
    with committed_directory(place.final, point="trial") as folder:
        _predictions(training, training.validation).to_parquet(folder / "out_of_fold.parquet", index=False)
        _predictions(training, training.holdout).to_parquet(folder / "holdout.parquet", index=False)
        pd.DataFrame(training.history).to_parquet(folder / "history.parquet", index=False)
        if place.keep_model:
            model = {"backbone": training.backbone.state_dict(), "head": training.head.state_dict()}
            torch.save(model, folder / "model.pt")
        record = {"trial_id": spec.trial_id, "spec": spec.model_dump(mode="json"), "environment": environment()}
        (folder / "trial.json").write_text(json.dumps(record, indent=1))
    place.checkpoint.unlink(missing_ok=True)


def _predictions(training: Training, samples: Samples) -> pd.DataFrame:
    """One row per slice: where it is and its probability."""
    data, logits_M = training.data, training.logits(samples)
    if not np.isfinite(logits_M).all():
        msg = f"{training.spec.cell.name}: {int((~np.isfinite(logits_M)).sum())} score(s) are not finite"
        raise TrialError(msg)
    return pd.DataFrame(
        {
            "study_id": [data.study_ids[row] for row in samples.study_M],
            "slice_index": data.slice_index_NK[samples.study_M, samples.offset_M],
            "slice_offset_mm": data.offset_mm_NK[samples.study_M, samples.offset_M],
            "probability": 1.0 / (1.0 + np.exp(-logits_M)),
        }
    )


def _read_history(final: Path) -> list[dict[Any, Any]]:
    return [dict(row) for row in pd.read_parquet(final / "history.parquet").to_dict("records")]


def environment() -> dict[str, str]:
    """Return what else might change a trial's last digits: library versions and the device model."""
    return {"torch": torch.__version__, "numpy": np.__version__, "device": _device_model()}


def _device_model() -> str:
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return str(torch.backends.cpu.get_cpu_capability())
