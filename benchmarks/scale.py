"""What grows with a cohort and what must not: splitting millions of patients, memory of heads, memory of a worker.

The splitter stands beside scikit-learn's StratifiedGroupKFold, whose time is linear in patients and extended from a
part of them. Memory is the peak of a process of its own, from its status, less what all workers of a node share: crops,
and the pages of libraries' files (0.4 GiB once).
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import pandas as pd
import torch
from sklearn.model_selection import StratifiedGroupKFold

from benchmarks.arithmetic import CROP
from benchmarks.synthetic import POSITIVE_SHARE, make_specs, make_study
from benchmarks.timing import ROUNDS, interleave, spread
from lbp_ray import features
from lbp_ray.native import Dtype, images_per_pass, keep_freed_memory, native_dtype
from lbp_ray.nets.resnet import NUM_FEATURES, build_backbone
from lbp_ray.nets.weights import load_backbone_weights
from lbp_ray.resident import Resident
from lbp_ray.splits import make_split
from lbp_ray.study import Recipe
from lbp_ray.training import Training

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lbp_ray.cell import TrialData

PATIENTS, FOLDS = 2_400_000, 10
SLOW_PATIENTS = 5_000
"""Patients of the measured part of scikit-learn's splitter."""

HEAD_STUDIES = 4_000
"""Studies of the smaller feature table (164 MB with 5 slices); the larger has four times as many."""

BLOCK_STUDIES = 500
WORKER_STUDIES = 40
"""Studies of the trial whose worker is measured: more steps take no more memory."""


def measure(*, quick: bool = False) -> Iterator[dict[str, object]]:
    """Yield the splitter's time, the memory ratio of heads and the peaks of a trial's worker."""
    yield from _split(200_000 if quick else PATIENTS)
    yield _heads(200 if quick else HEAD_STUDIES, rounds=1 if quick else ROUNDS)
    yield from _workers(rounds=1 if quick else ROUNDS)


def _exams(patients: int) -> pd.DataFrame:
    names = np.char.add("p", np.arange(patients).astype(str))
    labels = (np.random.default_rng(0).random(patients) < POSITIVE_SHARE).astype(int)
    return pd.DataFrame({"study_id": names, "patient_id": names, "label": labels})


def _split(patients: int) -> Iterator[dict[str, object]]:
    exams, part = _exams(patients), _exams(SLOW_PATIENTS)
    slow = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0)
    seconds = interleave(
        {
            "project": lambda: make_split(exams, folds=FOLDS, holdout_fraction=0.1, seed=0),
            "usual": lambda: list(slow.split(part, part["label"], part["patient_id"])),
        }
    )
    extended = seconds["usual"] * patients / SLOW_PATIENTS
    conditions = f"{ROUNDS} rounds, CPU time, hold-out and {FOLDS} folds"
    yield {
        "figure": f"split of {patients:,} patients: StratifiedGroupKFold (extended) / project",
        **spread(extended / seconds["project"]),
        "arithmetic": f"{spread(seconds['usual'])['median']} s for {SLOW_PATIENTS:,} patients, linear",
        "conditions": conditions,
    }
    yield {
        "figure": f"split of {patients:,} patients, s",
        **spread(seconds["project"]),
        "at_most": 1.0,
        "conditions": conditions,
    }


def _heads(studies: int, *, rounds: int) -> dict[str, object]:
    peaks: dict[int, list[float]] = {studies: [], 4 * studies: []}
    with tempfile.TemporaryDirectory() as folder:
        for number in peaks:
            _write_features(Path(folder, str(number)), number)
        for _ in range(rounds):
            for number, found in peaks.items():
                found.append(_peak_gib("heads", f"{folder}/{number}", str(number)))
    small, large = (np.array(found) for found in peaks.values())
    return {
        "figure": "peak memory of head training: 4 N / N studies",
        **spread(large / small),
        "at_most": 1.1,
        "arithmetic": f"N = {studies:,}: {spread(small)['median']} GiB, 4 N: {spread(large)['median']} GiB; tables of "
        f"{studies * 5 * NUM_FEATURES * 4 / 2**30:.2f} and {studies * 5 * NUM_FEATURES * 16 / 2**30:.2f} GiB on disk",
        "conditions": f"recipe.shuffle: block of {BLOCK_STUDIES} studies, a process each, {rounds} round(s)",
    }


def _write_features(folder: Path, studies: int) -> None:
    folder.mkdir()
    shape = (studies, 5, NUM_FEATURES)
    table = np.lib.format.open_memmap(folder / "features.npy", mode="w+", dtype=np.float32, shape=shape)
    for start in range(0, studies, BLOCK_STUDIES):
        block = table[start : start + BLOCK_STUDIES]
        block[:] = np.random.default_rng(start).random(block.shape, np.float32)
    table.flush()


def _workers(*, rounds: int) -> Iterator[dict[str, object]]:
    dtype = native_dtype("auto", gpu=False)
    types: tuple[Dtype, ...] = (dtype,) if dtype == "float32" else (dtype, "float32")
    for wanted in types:
        most = images_per_pass(wanted, CROP[0] * CROP[1])
        passes, whole = ([_peak_gib("worker", wanted, str(size)) for _ in range(rounds)] for size in (most, 0))
        conditions = f"crops of {CROP[0]} x {CROP[1]}, an unfrozen epoch, 1 thread, a process each, {rounds} round(s)"
        yield {
            "figure": f"peak memory of a trial's worker in passes of {most}, {wanted}, GiB",
            **spread(np.array(passes)),
            "at_most": 1.5,
            "conditions": f"{conditions}; crops, which are shared, not counted",
        }
        yield {
            "figure": f"peak memory of a trial's worker, {wanted}: whole batches / passes",
            **spread(np.array(whole) / np.array(passes)),
            "arithmetic": f"whole batches of 32: {spread(np.array(whole))['median']} GiB; passes of {most}: "
            f"{spread(np.array(passes))['median']} GiB",
            "conditions": conditions,
        }


def _peak_gib(*arguments: str) -> float:
    child = [sys.executable, "-m", "benchmarks.scale", *arguments]
    return float(subprocess.run(child, capture_output=True, text=True, check=True).stdout)


def train_heads(folder: Path, studies: int) -> int:
    """Train a head for two epochs on a table on disk; return the bytes that trials share, none here."""
    features.IN_MEMORY_BYTES = 0  # as for a table that is larger than memory
    recipe = Recipe(weights="random", frozen_epochs=2, unfrozen_epochs=0, shuffle="block", block_studies=BLOCK_STUDIES)
    data = make_study(studies, (1, 1), folds=FOLDS)
    table = features.load_features(folder, data.crop_row_N, block_studies=recipe.block)
    _train(recipe, replace(data, features_NKF=table), num_slices=5)
    return 0


def train_network(dtype: Dtype, most: int) -> int:
    """Train all weights for an epoch and return the bytes that trials share."""
    keep_freed_memory()
    recipe = Recipe(
        weights="random", frozen_epochs=0, feature_cache=False, unfrozen_dtype=dtype, images_per_pass=most or None
    )
    data = make_study(WORKER_STUDIES, CROP, folds=4)
    _train(recipe, data, num_slices=3)
    return data.crops_NKHW.nbytes


def _train(recipe: Recipe, data: TrialData, *, num_slices: int) -> None:
    torch.set_num_threads(1)
    spec = make_specs(recipe, folds=1, seeds=[0], slice_counts=[num_slices])[0]
    resident = Resident(build_backbone(load_backbone_weights("random")))
    list(Training(spec, data, resident).epochs(Path("no-checkpoint")))


def own_bytes() -> int:
    """Return the peak memory of this process, pages of files not counted."""
    status = Path("/proc/self/status").read_text()
    peak, files = (1024 * int(re.findall(rf"{name}:\s+(\d+)", status)[0]) for name in ("VmHWM", "RssFile"))
    return peak - files


if __name__ == "__main__":
    import ray.tune  # noqa: F401  (as a worker has)

    kind, first, second = sys.argv[1:]
    shared = (
        train_heads(Path(first), int(second)) if kind == "heads" else train_network(cast("Dtype", first), int(second))
    )
    print((own_bytes() - shared) / 2**30)
