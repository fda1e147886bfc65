"""What SLURM granted: the nodes of a job, and the CPUs, memory and GPUs of one of them.

Standard library only. Everything decided here is a pure function of environment variables and of files that were read.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

MIB = 2**20

OBJECT_STORE_SHARE = 0.3
"""Share of a node's granted memory for Ray's object store, Ray's own default."""

SHARED_MEMORY_SHARE = 0.8
"""Share of what is free in /dev/shm that the object store may take; beyond it Ray would write to the disk."""

LEAST_OBJECT_STORE = 80 * MIB
"""Smallest object store that Ray starts with, in bytes."""

NO_LIMIT = 2**60
"""A cgroup limit above this many bytes is none."""


class GrantError(ValueError):
    """An allocation that contradicts itself or what was asked."""


@dataclass(frozen=True)
class Node:
    """A node of the job."""

    name: str
    """As SLURM calls it."""
    cpus: int
    """CPUs of the job on it."""
    group: int | None = None
    """Component of a heterogeneous job; None in any other."""


@dataclass(frozen=True)
class Allocation:
    """The nodes of one job; the first is the one that the batch step runs on."""

    job_id: int
    """``SLURM_JOB_ID``, of the first component in a heterogeneous job; tasks of an array have one each."""
    nodes: tuple[Node, ...]
    """All nodes, component by component."""
    restarts: int = 0
    """How many times SLURM has requeued the job."""


def expand_cpus(text: str) -> list[int]:
    """Return CPUs per node from SLURM's short form: ``16(x2),8`` is 16, 16, 8.

    Raises
    ------
    GrantError
        If `text` is of another form.
    """
    cpus: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            msg = f"SLURM_JOB_CPUS_PER_NODE must be of the form 16(x2),8, found {text!r}"
            raise GrantError(msg)
        cpus += [int(match[1])] * int(match[2] or 1)
    return cpus


def read_allocation(environment: Mapping[str, str], expand: Callable[[str], list[str]]) -> Allocation:
    """Return the nodes of the job that this process runs in.

    Parameters
    ----------
    environment
        Environment of the batch step.
    expand
        Turns a node list such as ``n[1-3]`` into names (``scontrol show hostnames``).

    Raises
    ------
    GrantError
        If this is no batch step, or nodes and CPU counts do not match.
    """
    if "SLURM_JOB_ID" not in environment:
        msg = "SLURM_JOB_ID is not set: this command runs inside a SLURM job; submit with python -m cluster slurm"
        raise GrantError(msg)
    components = int(environment.get("SLURM_HET_SIZE", "0"))
    nodes: list[Node] = []
    for group in range(components) if components else (None,):
        suffix = "" if group is None else f"_HET_GROUP_{group}"
        names = expand(environment[f"SLURM_JOB_NODELIST{suffix}"])
        cpus = expand_cpus(environment[f"SLURM_JOB_CPUS_PER_NODE{suffix}"])
        if len(names) != len(cpus):
            msg = f"SLURM names {len(names)} nodes but CPUs of {len(cpus)}: {names}, {cpus}"
            raise GrantError(msg)
        nodes += [Node(name, count, group) for name, count in zip(names, cpus, strict=True)]
    return Allocation(
        job_id=int(environment["SLURM_JOB_ID"]),
        nodes=tuple(nodes),
        restarts=int(environment.get("SLURM_RESTART_COUNT", "0")),
    )


@dataclass(frozen=True)
class Grant:
    """What Ray may use of one node."""

    cpus: int
    gpus: int
    memory: int
    """Bytes for the heaps of all processes."""
    object_store: int
    """Bytes of Ray's object store, which lies in shared memory."""


@dataclass(frozen=True)
class NodeFacts:
    """What one node shows of the limits that hold on it."""

    affinity: int
    """CPUs that this process may run on: the cgroup's cpuset, where SLURM constrains cores."""
    memory_limits: tuple[int, ...]
    """Bytes: the machine's memory and the limits of the process's cgroups."""
    free_shared_memory: int
    """Bytes free in /dev/shm."""


def read_grant(environment: Mapping[str, str], facts: NodeFacts, *, gpus_asked: int) -> Grant:
    """Return what Ray may use of this node, SLURM's word checked against the node's.

    Parameters
    ----------
    environment
        Environment of the step on this node.
    facts
        What the node shows.
    gpus_asked
        GPUs per node that the job asked for.

    Raises
    ------
    GrantError
        If SLURM, ``CUDA_VISIBLE_DEVICES`` and the job disagree on the GPUs.
    """
    cpus = min(facts.affinity, int(environment.get("SLURM_CPUS_PER_TASK") or environment["SLURM_CPUS_ON_NODE"]))
    memory = min(facts.memory_limits)
    if per_node := int(environment.get("SLURM_MEM_PER_NODE", "0")):
        memory = min(memory, per_node * MIB)
    elif per_cpu := int(environment.get("SLURM_MEM_PER_CPU", "0")):
        memory = min(memory, per_cpu * cpus * MIB)
    elif per_gpu := int(environment.get("SLURM_MEM_PER_GPU", "0")) * gpus_asked:
        memory = min(memory, per_gpu * MIB)
    store = int(min(OBJECT_STORE_SHARE * memory, SHARED_MEMORY_SHARE * facts.free_shared_memory))
    store = max(store, LEAST_OBJECT_STORE)
    gpus = _gpus(environment, gpus_asked)
    return Grant(cpus=cpus, gpus=gpus, memory=max(memory - store, MIB), object_store=store)


def _gpus(environment: Mapping[str, str], asked: int) -> int:
    granted = int(environment.get("SLURM_GPUS_ON_NODE", "0"))
    devices = environment.get("CUDA_VISIBLE_DEVICES", "")
    visible = [name for name in devices.split(",") if name and name != "NoDevFiles"]
    if len(visible) > 1 and any(name.startswith("MIG-") for name in visible):
        msg = (
            f"{len(visible)} parts of GPUs (MIG) were granted on this node, of which CUDA shows a process only the "
            "first; ask for one per node, or for whole GPUs"
        )
        raise GrantError(msg)
    if asked and (granted < asked or len(visible) < asked):
        msg = (
            f"{asked} GPU(s) were asked for on this node; SLURM_GPUS_ON_NODE is {granted} and CUDA_VISIBLE_DEVICES "
            f"{devices!r}; check GresTypes and gres.conf, and that no module or profile sets CUDA_VISIBLE_DEVICES"
        )
        raise GrantError(msg)
    return len(visible) if asked else 0


def look_at_node() -> NodeFacts:
    """Read this node's limits; cgroups of version 1 and 2."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_cgroup_limits(Path("/proc/self/cgroup"))]
    shared = os.statvfs("/dev/shm")
    return NodeFacts(
        affinity=len(os.sched_getaffinity(0)),
        memory_limits=tuple(limits),
        free_shared_memory=shared.f_bavail * shared.f_frsize,
    )


def _cgroup_limits(membership: Path, mounted: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Return every memory limit, in bytes, of this process's cgroup and of those above it."""
    limits = []
    for line in membership.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, name = mounted, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = mounted / "memory", "memory.limit_in_bytes"
        else:
            continue
        here = root / path.lstrip("/")
        for folder in (here, *here.parents):
            if folder == root.parent:
                break
            text = (folder / name).read_text().strip() if (folder / name).is_file() else "max"
            if text != "max" and int(text) < NO_LIMIT:
                limits.append(int(text))
    return limits
