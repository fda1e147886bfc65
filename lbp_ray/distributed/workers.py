"""The workers of one network, started by Ray Train inside a Tune trial that only waits for them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Protocol

import ray.train
from ray.train.torch import TorchConfig, TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

START_S = 300
"""Seconds within which the workers of one network must have met each other."""


class Resources(Protocol):
    """What of a compute section says how workers run."""

    @property
    def gpus_per_worker(self) -> float:
        """GPUs of one worker; 0 trains on CPUs."""

    @property
    def max_failures(self) -> int:
        """Retries of a network one of whose workers died."""


def run_workers(
    train_worker: Callable[[dict[str, Any]], None],
    given: dict[str, Any],
    name: str,
    *,
    compute: Resources,
    storage: Path,
) -> None:
    """Train one network by its workers and report their learning curve to the waiting trial.

    Parameters
    ----------
    train_worker
        What each worker runs on `given`.
    given
        Picklable; its ``spec`` says how many workers there are and how many threads each has.
    name
        Of the network; Ray Train's records are named after it and the time.
    compute
        GPUs and retries; a worker that dies ends the others, and all go on from the checkpoint.
    storage
        Where Ray Train keeps its own records.
    """
    spec = given["spec"]
    report: Any = TuneReportCallback()  # type: ignore[no-untyped-call]
    gpus = {"GPU": compute.gpus_per_worker} if compute.gpus_per_worker else {}
    TorchTrainer(
        train_worker,
        train_loop_config=given,
        torch_config=TorchConfig(timeout_s=START_S),
        scaling_config=ray.train.ScalingConfig(
            num_workers=spec.workers,
            use_gpu=bool(gpus),
            resources_per_worker={"CPU": spec.recipe.threads, **gpus},
        ),
        run_config=ray.train.RunConfig(
            name=f"{name}-{time.strftime('%Y%m%d-%H%M%S')}",
            storage_path=str(storage),
            failure_config=ray.train.FailureConfig(max_failures=compute.max_failures),
            callbacks=[report],
        ),
    ).fit()
