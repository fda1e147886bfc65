"""Waits until every node of a job has joined its Ray cluster, with the GPUs that were asked for.

``python -m cluster.slurm.gather 4,4,2`` runs beside the job's Ray before the study does.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

import ray

WAIT_S = 300.0
"""Seconds within which every node must have joined: file systems are slow when many nodes import at once."""

POLL_S = 0.5
"""Seconds between two looks."""


def missing(nodes: list[dict[str, Any]], gpus: list[int]) -> str | None:
    """Return what is missing in the cluster, or None if it is complete.

    Parameters
    ----------
    nodes
        What ``ray.nodes()`` lists.
    gpus
        GPUs of every node of the job, in any order.
    """
    alive = [node for node in nodes if node["Alive"]]
    names = ", ".join(sorted(str(node["NodeManagerHostname"]) for node in alive)) or "none"
    if len(alive) < len(gpus):
        return f"{len(alive)} of {len(gpus)} nodes have joined Ray ({names})"
    found = sorted(int(node["Resources"].get("GPU", 0)) for node in alive)
    if found != sorted(gpus):
        return f"Ray sees {found} GPUs on its nodes ({names}), the job asked for {sorted(gpus)}"
    return None


def describe(node: dict[str, Any]) -> str:
    """Return one line about a node."""
    offer = node["Resources"]
    gib = offer.get("memory", 0) / 2**30
    return f"{node['NodeManagerHostname']}: {offer.get('CPU', 0):g} CPUs, {offer.get('GPU', 0):g} GPUs, {gib:.1f} GiB"


def connect(end: float) -> None:
    """Join the cluster that RAY_ADDRESS names, as soon as it answers.

    Raises
    ------
    ConnectionError
        If it does not answer before `end`.
    """
    while True:
        try:
            ray.init(log_to_driver=False, logging_level=logging.CRITICAL)
        except (ConnectionError, RuntimeError):
            if time.monotonic() > end:
                raise
            time.sleep(POLL_S)
        else:
            return


def main(arguments: list[str] | None = None) -> int:
    """Wait, print the nodes and return the exit status."""
    (listed,) = sys.argv[1:] if arguments is None else arguments
    gpus = [int(number) for number in listed.split(",")]
    end = time.monotonic() + WAIT_S
    connect(end)
    while (lack := missing(ray.nodes(), gpus)) is not None:  # type: ignore[no-untyped-call]
        if time.monotonic() > end:
            sys.stderr.write(f"error: {lack} after {WAIT_S:.0f} s; see the lines of the others above\n")
            return 1
        time.sleep(POLL_S)
    for node in ray.nodes():  # type: ignore[no-untyped-call]
        sys.stdout.write(f"ready: {describe(node)}\n")
    ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
