"""The Tune trial: it takes no CPU, waits for the remote call of its cell and passes the learning curve on.

Nothing here imports torch, because these processes only wait: they start at once and stay small.
"""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray
from ray import tune
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lbp_ray.cell import Shared, TrialPlace, TrialSpec

SEE_ALL_GPUS = {"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}}
"""Runtime environment of calls on GPUs. CUDA looks at the visible GPUs once per process, and Ray gives a process that
it uses again another GPU: a call therefore sees all and takes the one it was given."""


def on_given_gpu(shared: Shared) -> Shared:
    """Name the GPU that Ray gave this call, of all that its process sees; nothing changes on a CPU."""
    given = [str(number) for number in ray.get_gpu_ids()]
    if shared.device != "cuda" or not given:
        return shared
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return replace(shared, device=f"cuda:{visible.split(',').index(given[0]) if visible else given[0]}")


@ray.remote(max_retries=0, num_returns="streaming")
def run_cell(shared: Shared, spec: TrialSpec, place: TrialPlace) -> Iterator[dict[str, Any]]:
    """Run one cell and stream its learning curve; the commit happens in this call, not in the waiting trial."""
    from lbp_ray.distributed.worker import train_cell

    yield from train_cell(on_given_gpu(shared), spec, place)


@ray.remote(max_retries=0, max_calls=1)
def measured_share(shared: Shared, spec: TrialSpec) -> tuple[float, str]:
    """Return the share of this node's GPU that a trial takes, and a sentence about it; the process ends thereafter."""
    from lbp_ray.distributed.worker import resident, trial_data
    from lbp_ray.packing import gpus_for, measure_peak

    given = on_given_gpu(shared)
    peak = measure_peak(spec, trial_data(given), resident(given))
    share = gpus_for(peak)
    taken, total = (value / 2**30 for value in peak)
    sentence = f"a trial takes {taken:.1f} of the {total:.0f} GiB of a GPU of {socket.gethostname()}"
    return share, f"{sentence}: {int(1 / share)} share one"


def largest_share(shared: Shared, spec: TrialSpec, resources: dict[str, float]) -> tuple[float, str]:
    """Measure a trial on one GPU of every node, because Ray starts it on any of them with the same share.

    Parameters
    ----------
    shared
        What every worker loads.
    spec
        A trial of the study, one with the most slices.
    resources
        ``CPU`` and ``GPU`` of a trial that has a whole GPU. A node that lacks them runs no trial and is not measured.

    Returns
    -------
    tuple of float and str
        The largest share that was measured, and a sentence about it. GPUs of one node are taken to be alike; a node
        that joins the cluster later is not measured.

    Raises
    ------
    RunError
        If a trial does not fit on one of the GPUs.
    """
    places: list[Any] = [
        NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"] and all(node["Resources"].get(name, 0.0) >= amount for name, amount in resources.items())
    ]
    given = options("measure", resources)
    calls = [
        measured_share.options(**given, scheduling_strategy=place).remote(shared, spec)
        for place in places or ["DEFAULT"]  # where nodes were lost meanwhile, Ray waits for one
    ]
    try:
        share, sentence = max(ray.get(calls))
    except RayTaskError as error:
        if isinstance(error.cause, ValueError):
            raise error.cause from None
        raise
    return share, f"{sentence} (fewest of the GPUs of {len(places)} nodes)" if len(places) > 1 else sentence


def options(name: str, resources: dict[str, float]) -> dict[str, Any]:
    """Return Ray's options of a named call that takes these resources."""
    given: dict[str, Any] = {"name": name, "num_cpus": resources["CPU"], "num_gpus": resources["GPU"]}
    return given | {"runtime_env": SEE_ALL_GPUS} if resources["GPU"] else given


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
        call = run_cell.options(**options(spec.cell.name, resources))
        for record in call.remote(shared, spec, place):  # type: ignore[attr-defined]
            tune.report(ray.get(record))

    return trial
