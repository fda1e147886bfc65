"""The Tune trial: it takes no CPU, waits for the remote call of its cell and passes the learning curve on.

Nothing here imports torch, because these processes only wait: they start at once and stay small.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ray
from ray import tune

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lbp_ray.cell import Shared, TrialPlace, TrialSpec


@ray.remote(max_retries=0, num_returns="streaming")
def run_cell(shared: Shared, spec: TrialSpec, place: TrialPlace) -> Iterator[dict[str, Any]]:
    """Run one cell and stream its learning curve; the commit happens in this call, not in the waiting trial."""
    from lbp_ray.distributed.worker import train_cell

    yield from train_cell(shared, spec, place)


def waiting_trial(
    shared: Shared, cells: dict[str, tuple[TrialSpec, TrialPlace]], resources: dict[str, float]
) -> Callable[[dict[str, str]], None]:
    """Return the function that Tune runs once per cell.

    Parameters
    ----------
    shared
        What every cell's worker loads.
    cells
        Specification and place of each cell, by its name.
    resources
        ``CPU`` and ``GPU`` that the call of a cell takes.
    """

    def trial(cell: dict[str, str]) -> None:
        spec, place = cells[cell["name"]]
        call = run_cell.options(name=spec.cell.name, num_cpus=resources["CPU"], num_gpus=resources["GPU"])
        for record in call.remote(shared, spec, place):  # type: ignore[attr-defined]
            tune.report(ray.get(record))

    return trial
