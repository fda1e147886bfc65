"""Where facts come from: this process, a pinned task per node of a Ray cluster, or a task per node of a SLURM step."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.doctor.facts import Offer
from cluster.doctor.gather import gather
from cluster.doctor.lines import read_lines
from cluster.slurm.container import bound_folders, container_prefix
from preprocess.job import connect

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from cluster.doctor.facts import Ask, NodeFacts

ANSWER_S = 120.0
"""Seconds that a Ray node may take: it starts a Python, and perhaps PyTorch on every GPU."""

CONNECT_S = 5.0
"""Seconds to wait for a connection to the head."""

STEP_S = 240.0
"""The same for all tasks of a SLURM step in an allocation."""


class Answers(NamedTuple):
    """Facts of the nodes that answered, and why the others did not."""

    nodes: tuple[NodeFacts, ...]
    silent: dict[str, str]
    departed: tuple[str, ...] = ()
    """Hosts that were in the Ray cluster and are not any more."""


def ask_here(ask: Ask) -> Answers:
    """Look at this machine."""
    return Answers((gather(ask, socket.gethostname()),), {})


def ask_ray(ask: Ask) -> Answers:
    """Look at every node of the Ray cluster that RAY_ADDRESS names, whatever else runs there."""
    address = os.environ.get("RAY_ADDRESS", "this machine")
    refusal = _refusal(address)
    if refusal:
        return Answers((), {f"Ray at {address}": refusal})
    with ExitStack() as cluster:
        try:
            cluster.enter_context(connect())
        except Exception as error:  # Ray raises errors of many kinds where it cannot join or start
            return Answers((), {f"Ray at {address}": str(error).strip().splitlines()[0]})
        return _ask_cluster(ask, ray.nodes())  # type: ignore[no-untyped-call]


def _refusal(address: str) -> str:
    """Return why nobody answers at an address, or nothing: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return ""
    try:
        socket.create_connection((host.removeprefix("ray://"), int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        return f"no connection: {error.strerror or error}; is RAY_ADDRESS right, and the head alive?"
    return ""


def _ask_cluster(ask: Ask, listed: Sequence[dict[str, Any]]) -> Answers:
    task: Any = ray.remote(num_cpus=0, max_retries=0)(gather)
    nodes = [node for node in listed if node["Alive"]]
    names = node_names(nodes)
    running = {
        task.options(
            name=f"doctor-{names[node['NodeID']]}",
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        ).remote(ask, names[node["NodeID"]], ray_offer(node["Resources"])): names[node["NodeID"]]
        for node in nodes
    }
    done, late = ray.wait(list(running), num_returns=len(running), timeout=ANSWER_S)
    silent = {running[reference]: f"no answer within {ANSWER_S:g} s" for reference in late}
    facts = []
    for reference in done:
        try:
            facts.append(ray.get(reference))
        except Exception as error:  # whatever a foreign installation raises is the finding
            silent[running[reference]] = str(error).strip().splitlines()[-1]
    return Answers(tuple(sorted(facts, key=lambda node: str(node.name))), silent, departed(listed))


def departed(listed: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """Return the hosts of dead nodes on which no other node lives; Ray lists a node for long after its end."""
    alive = {node["NodeManagerAddress"] for node in listed if node["Alive"]}
    dead = (node for node in listed if node["NodeManagerAddress"] not in alive)
    return tuple(dict.fromkeys(str(node["NodeManagerHostname"]) for node in dead))


def node_names(nodes: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return a name for each node id: its host's, with some digits of the id where a host has several nodes."""
    hosts = [node["NodeManagerHostname"] for node in nodes]
    return {
        node["NodeID"]: host if hosts.count(host) == 1 else f"{host}-{node['NodeID'][:6]}"
        for node, host in zip(nodes, hosts, strict=True)
    }


def ray_offer(resources: dict[str, float]) -> Offer:
    """Return what Ray hands out of a node."""
    store = int(resources.get("object_store_memory", 0))
    return Offer(
        source="Ray",
        cpus=resources.get("CPU", 0.0),
        gpus=resources.get("GPU", 0.0),
        memory_bytes=int(resources.get("memory", 0)) + store or None,
        object_store_bytes=store or None,
    )


def ask_slurm(ask: Ask, options: Sequence[str], container: Path | None = None) -> Answers:
    """Look at every node of this allocation, or of what srun gets with the given options; inside an image if any."""
    allocated = "SLURM_JOB_ID" in os.environ
    granted = os.environ.get("SLURM_JOB_NUM_NODES") if allocated else None
    command = step_command(ask, options, nodes=granted, container=container)
    if not allocated:
        sys.stderr.write("srun asks for nodes; squeue --me tells why it may take long\n")
    environment = dict(os.environ)
    if "SLURM_CPUS_PER_TASK" in environment:
        environment.setdefault("SRUN_CPUS_PER_TASK", environment["SLURM_CPUS_PER_TASK"])  # steps don't inherit it
    try:
        step = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=STEP_S if allocated else None,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Answers((), {"srun": str(error)})
    nodes = tuple(read_lines(step.stdout))
    wanted = max((node.step_nodes for node in nodes), default=1)
    missing = wanted - len(nodes)
    return Answers(nodes, {f"{missing} node(s) of the step": _reason(step)} if missing > 0 else {})


def _reason(step: subprocess.CompletedProcess[str]) -> str:
    """Return the last words of a task, or of srun where no task said anything."""
    lines = step.stderr.strip().splitlines()
    tasks = [line for line in lines if not line.startswith(("srun:", "slurmstepd:"))]
    return (tasks or lines or [f"srun ended with {step.returncode}"])[-1]


def step_command(ask: Ask, options: Sequence[str], *, nodes: str | None, container: Path | None = None) -> list[str]:
    """Return the srun command of one task per node.

    Parameters
    ----------
    ask
        What to look at.
    options
        Further options of srun, as the user gave them.
    nodes
        Number of nodes of the allocation that this runs in; None outside of one.
    container
        Apptainer image that a study would run in, if any: the tasks see what its trials would.
    """
    within = ["--overlap", f"--nodes={nodes}", f"--ntasks={nodes}"] if nodes else []
    prefix = container_prefix(container, bound_folders(os.environ), gpus=1)
    python = [*prefix, "python"] if prefix else [sys.executable]
    return ["srun", "--ntasks-per-node=1", *within, *options, *python, "-m", "cluster.doctor", ask.model_dump_json()]
