"""What Ray Tune adds to each trial: one process per trial, as usual, against trials that wait for a remote call.

Both run the same small body, a last layer that `lbp_ray.training` trains for `EPOCHS` epochs, on the same local cluster
in turn, and report its logits, which must be equal. The usual way is a function trainable that imports torch and the
training, makes its data and holds the trial's CPU. The project's is `lbp_ray.distributed.waiter`: the trial waits
without importing torch, and the body runs in worker processes that stay, data included. The project runs as many trials
as the study has, start-up included; the usual way runs a few, and what its start-up takes is left out.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import ray
import torch
from ray import tune

from benchmarks.arithmetic import oulu_sizes
from benchmarks.synthetic import make_specs, make_study
from benchmarks.timing import ROUNDS, fastest_type, gemm, interleave, spread
from lbp_ray.cell import TrialPlace
from lbp_ray.distributed import waiter
from lbp_ray.nets.resnet import NUM_FEATURES
from lbp_ray.plan.counts import count
from lbp_ray.resident import Resident
from lbp_ray.study import Recipe
from lbp_ray.training import Training
from preprocess.job import connect

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lbp_ray.cell import Shared, TrialData, TrialSpec

SLOTS = 2
"""Trials at a time."""

USUAL_TRIALS = (2, 12)
"""Trials of a short and a longer run of the usual way: the difference is what more trials cost."""

STUDIES, FOLDS, EPOCHS = 62, 2, 4
"""Of a body, which stays small beside what it is started for."""

GPU_STUDY_S = 300.0
"""Wall-clock goal of the study on one GPU."""


def measure(*, quick: bool = False) -> Iterator[dict[str, object]]:
    """Yield the ratio of wall seconds per trial, and what the project's are of a study's."""
    few, many = (2, 4) if quick else USUAL_TRIALS
    trials, rounds = (6, 1) if quick else (count(oulu_sizes()).trials, ROUNDS)
    specs = bodies(trials)
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    with tempfile.TemporaryDirectory() as folder, connect(SLOTS):
        logits: dict[str, dict[str, list[float]]] = {}
        cases: dict[str, Callable[[], object]] = {
            "few": lambda: usual(specs[:few], folder),
            "many": lambda: logits.update(usual=usual(specs[:many], folder)),
            "project": lambda: logits.update(project=waiting(specs, folder)),
        }
        seconds = interleave(cases, rounds=rounds, clock=time.perf_counter)
        body_s = min(_body_seconds(specs[0]))
    each = {
        "one process per trial": SLOTS * (seconds["many"] - seconds["few"]) / (many - few),
        "project": SLOTS * seconds["project"] / trials,
    }
    conditions = (
        f"{SLOTS} slots, {rounds} round(s), wall clock, a body of {1e3 * body_s:.0f} ms; one process per trial: {many} "
        f"trials less {few}, each with its imports; project: {trials} trials with start-up"
    )
    yield {
        "figure": "slot-seconds per trial: one process per trial / project",
        **spread(each["one process per trial"] / each["project"]),
        "at_least": 5,
        "slot_s_per_trial": {name: spread(values) for name, values in each.items()},
        "largest_logit_difference": largest_difference(logits["usual"], logits["project"]),
        "conditions": conditions,
    }
    yield _share(float(np.median(each["project"])), conditions)


def _share(overhead_s: float, conditions: str) -> dict[str, object]:
    """Overhead of 150 trials over the least that the study can take: its operations at the core's gemm peak."""
    torch.set_num_threads(1)
    counts = count(oulu_sizes())
    product, gflop = gemm(fastest_type())
    peak_s = float(np.median(interleave({"gemm": product})["gemm"])) * counts.cached_flop / 1e9 / gflop
    total_s = counts.trials * overhead_s
    return {
        "figure": "Tune's overhead as a share of the full-size study on these cores (upper limit)",
        "ratio": float(f"{total_s / peak_s:.3g}"),
        "at_most": 0.05,
        "arithmetic": f"{counts.trials} trials x {overhead_s:.3g} slot-s = {total_s:.3g} s, over "
        f"{counts.cached_flop / 1e15:.2f} PFLOP at one core's fastest gemm peak = {peak_s:.4g} core-s, less than the "
        "study takes",
        "share_of_a_300_s_study_on_one_gpu": float(f"{total_s / SLOTS / GPU_STUDY_S:.3g}"),
        "conditions": conditions,
    }


def bodies(number: int) -> list[TrialSpec]:
    """List what so many trials train: the last layer alone."""
    recipe = Recipe(weights="random", frozen_epochs=EPOCHS, unfrozen_epochs=0)
    return make_specs(recipe, folds=FOLDS, seeds=range(-(-number // FOLDS)), slice_counts=[1])[:number]


@lru_cache(maxsize=1)
def _loaded() -> tuple[TrialData, Resident]:
    """Make, once per process, what a body reads."""
    torch.set_num_threads(1)
    data = make_study(STUDIES, (1, 1), folds=FOLDS, offsets=1)
    features_NKF = torch.randn(STUDIES, 1, NUM_FEATURES, generator=torch.Generator().manual_seed(0)).abs()
    return replace(data, features_NKF=features_NKF), Resident(torch.nn.Identity())


def train_body(spec: TrialSpec) -> list[float]:
    """Train a last layer as the project does and return its logits of the evaluated fold."""
    training = Training(spec, *_loaded())
    list(training.epochs(Path("no-checkpoint")))
    return [float(value) for value in training.logits(training.validation)]


def _body_seconds(spec: TrialSpec) -> Iterator[float]:
    for _ in range(3):
        begun = time.perf_counter()
        train_body(spec)
        yield time.perf_counter() - begun


def largest_difference(usual: dict[str, list[float]], project: dict[str, list[float]]) -> float:
    """Compare the logits of the trials that ran both ways."""
    return max(float(np.abs(np.subtract(logits, project[name])).max()) for name, logits in usual.items())


def _fit(trainable: Any, specs: list[TrialSpec], folder: str, *, reuse: bool) -> dict[str, list[float]]:  # noqa: ANN401
    """Run the trials and return the logits that each reported."""
    results = tune.Tuner(
        trainable,
        param_space={"name": tune.grid_search([spec.cell.name for spec in specs])},
        tune_config=tune.TuneConfig(reuse_actors=reuse, trial_name_creator=lambda trial: str(trial.config["name"])),
        run_config=tune.RunConfig(storage_path=folder, verbose=0),
    ).fit()
    assert not results.errors
    return {result.config["name"]: result.metrics["logits"] for result in results}


def usual(specs: list[TrialSpec], folder: str) -> dict[str, list[float]]:
    """Run each trial in a process of its own."""
    named = {spec.cell.name: spec for spec in specs}

    def trial(config: dict[str, str]) -> None:
        tune.report({"logits": train_body(named[config["name"]])})

    return _fit(tune.with_resources(trial, {"CPU": 1}), specs, folder, reuse=False)


@ray.remote(max_retries=0, num_returns="streaming")
def _cell_body(shared: Shared, spec: TrialSpec, place: TrialPlace) -> Iterator[dict[str, Any]]:
    yield {"logits": train_body(spec)}


def waiting(specs: list[TrialSpec], folder: str) -> dict[str, list[float]]:
    """Run the trials in processes that stay, as the project does."""
    place = TrialPlace(final=None, checkpoint=None)  # type: ignore[arg-type]  (the body reads none)
    resources = {"CPU": 1.0, "GPU": 0.0}
    with patch.object(waiter, "run_cell", _cell_body):
        trial = waiter.waiting_trial(None, {spec.cell.name: (spec, place) for spec in specs}, resources)
        trainable = tune.with_resources(trial, tune.PlacementGroupFactory([{}, resources]))
        return _fit(trainable, specs, folder, reuse=True)
