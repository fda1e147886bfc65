"""A trial shared by several workers: Ray Train inside the Tune trial, which only waits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ray.train

from lbp_ray.distributed.workers import run_workers

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lbp_ray.cell import Shared, TrialPlace, TrialSpec
    from lbp_ray.study import ComputeConfig


def train_worker(config: dict[str, Any]) -> None:
    """Train one cell as one of its workers; what Ray Train runs, on the GPU that it made the current one."""
    from lbp_ray.distributed.worker import train_cell

    for record in train_cell(config["shared"], config["spec"], config["place"]):
        ray.train.report(record)


def shared_trial(
    shared: Shared, cells: dict[str, tuple[TrialSpec, TrialPlace]], compute: ComputeConfig, storage: Path
) -> Callable[[dict[str, str]], None]:
    """Return the function that Tune runs once per cell: it starts the cell's workers and waits for them.

    Parameters
    ----------
    shared
        What every worker loads.
    cells
        Specification and place of each cell, by its name.
    compute
        GPUs and retries; a worker that dies ends the others, and all go on from the checkpoint.
    storage
        Where Ray Train keeps its own records.
    """

    def trial(cell: dict[str, str]) -> None:
        spec, place = cells[cell["name"]]
        given = {"shared": shared, "spec": spec, "place": place}
        run_workers(train_worker, given, spec.cell.name, compute=compute, storage=storage)

    return trial
