"""Judges of a node's room: CPUs, memory, GPUs, temporary files, limits, and whether a trial fits at all."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

from cluster.doctor.findings import Finding, gigabytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cluster.doctor.facts import NodeFacts, Survey

SOCKET_PATH_BYTES = 107
"""Longest path of a Unix socket on Linux."""

PRIVATE_BYTES = len("/lbp-1234567.0/ray")
"""Ray's folder and the private one around it, below the temporary folder of the machine."""

SESSION_BYTES = len("/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store")
"""What Ray appends to its folder."""

MEMORY_BYTES = 2 * 10**9
"""Free memory below which Ray's own processes hardly start (its head with dashboard takes as much)."""

SHM_BYTES = 10**9
"""Smallest useful /dev/shm; containers often get 64 MB."""

TEMP_BYTES = 10**9
"""Free temporary space below which Ray's logs alone may fill it."""

TEMP_SHARE = 0.95
"""Share of used space from which Ray no longer spills objects to a disk (local_fs_capacity_threshold)."""

OPEN_FILES = 4096
"""Smallest useful limit of open files."""

PROCESSES = 4096
"""Smallest useful limit of processes and threads of a user: a Ray worker starts dozens."""


def cpus(survey: Survey) -> Iterator[Finding]:
    """Find nodes that lend more CPUs than their processes may use."""
    for node in survey.nodes:
        machine = node.machine
        quota = machine.cpu_quota or math.inf
        usable = min(machine.cpus_allowed, quota)
        lent = node.offer.cpus if node.offer else min(machine.cpu_count, quota)
        if lent > usable:
            source = node.offer.source if node.offer else "Ray"
            yield Finding(
                "warning",
                "CPUs",
                (node.name,),
                f"{source} counts {lent:g} CPUs, but processes may use {usable:g} (affinity "
                f"{machine.cpus_allowed}, cgroup {machine.cpu_quota or 'no limit'}, machine {machine.cpu_count})",
                "more trials than cores start and slow each other; Ray counts the machine, not what is granted",
                f"ray start --num-cpus={int(usable)}; under SLURM ask for them: --cpus-per-task={math.ceil(lent)}",
            )


def memory(survey: Survey) -> Iterator[Finding]:
    """Find nodes that lend more memory than they may use, or that have little left."""
    for node in survey.nodes:
        machine, offer = node.machine, node.offer
        usable = min(machine.memory_bytes, machine.memory_limit or machine.memory_bytes)
        if offer and offer.memory_bytes and offer.memory_bytes > usable:
            yield Finding(
                "warning",
                "memory",
                (node.name,),
                f"{offer.source} counts {gigabytes(offer.memory_bytes)}, the node may use {gigabytes(usable)}",
                "a control group limits the processes; beyond it the kernel kills them without a word",
                f"ray start --memory={int(usable * 0.6)} --object-store-memory={int(usable * 0.2)}, or ask SLURM for "
                "more: --mem",
            )
        elif min(machine.memory_available, usable) < MEMORY_BYTES:
            yield Finding(
                "warning",
                "memory",
                (node.name,),
                f"{gigabytes(min(machine.memory_available, usable))} free",
                "other processes hold the memory, or the job was granted little",
                "ps -eo user,rss,comm --sort=-rss | head shows who; under SLURM ask for more: --mem",
            )


def shared_memory(survey: Survey) -> Iterator[Finding]:
    """Find nodes whose /dev/shm does not hold Ray's object store."""
    for node in survey.nodes:
        needed = (node.offer.object_store_bytes if node.offer else None) or SHM_BYTES
        if node.machine.shm_bytes < needed:
            yield Finding(
                "warning",
                "/dev/shm",
                (node.name,),
                f"/dev/shm holds {gigabytes(node.machine.shm_bytes)}, the object store wants {gigabytes(needed)}",
                "containers get 64 MB unless told otherwise; Ray then keeps shared arrays in a file under its "
                "temporary folder, slowly",
                "docker run --shm-size=8g; Kubernetes: an emptyDir of medium Memory at /dev/shm; else lower "
                "ray start --object-store-memory",
            )


def temp(survey: Survey) -> Iterator[Finding]:
    """Find temporary folders that are too long for sockets, not writable, or full."""
    for node in survey.nodes:
        folder = node.temp
        longest = len(os.fsencode(folder.path)) + PRIVATE_BYTES + SESSION_BYTES
        if folder.error or folder.free_bytes < TEMP_BYTES:
            yield Finding(
                "blocker",
                "temp",
                (node.name,),
                folder.error or f"{folder.path} has {gigabytes(folder.free_bytes)} left",
                "the disk of temporary files is full or may not be written to; Ray cannot start or dies of its logs",
                "export TMPDIR to a writable folder on a local disk with room, where Ray is started",
            )
        elif folder.used_share > TEMP_SHARE:
            yield Finding(
                "warning",
                "temp",
                (node.name,),
                f"{folder.path} is {folder.used_share:.0%} full",
                f"Ray stops spilling objects above {TEMP_SHARE:.0%}",
                f"du -xsh {folder.path}/* shows what fills it; or export TMPDIR to another disk",
            )
        if longest > SOCKET_PATH_BYTES and survey.ask.mode != "ray":
            unwritable = folder.spare_error
            yield Finding(
                "blocker" if unwritable else "warning",
                "temp path",
                (node.name,),
                f"{folder.path} is {longest - SOCKET_PATH_BYTES} bytes too long; Ray's files would lie in /tmp"
                + (f": {unwritable}" if unwritable else ""),
                f"Ray's sockets lie below it, and their paths must stay within {SOCKET_PATH_BYTES} bytes (AF_UNIX)",
                "export TMPDIR to a folder with a short name on a local disk with room, or TMPDIR=/tmp",
            )


def gpus(survey: Survey) -> Iterator[Finding]:
    """Find GPUs that are promised and not usable, or there and hidden."""
    wanted = survey.ask.trial_gpus is None or survey.ask.trial_gpus > 0
    for node in survey.nodes:
        seen, usable = node.gpus, node.gpus.usable or 0
        lent = int(node.offer.gpus) if node.offer else usable
        state = f"the driver lists {len(seen.driver)}, CUDA_VISIBLE_DEVICES is {seen.visible!r}, PyTorch uses {usable}"
        state += f": {seen.error}" if seen.error else ""
        if node.offer and lent > usable:
            yield Finding(
                "blocker" if wanted else "warning",
                "GPUs",
                (node.name,),
                f"{node.offer.source} lends {lent} GPU(s); {state}",
                "the GPUs are hidden from the process, the driver is too old for this PyTorch, or somebody holds them",
                'nvidia-smi; python -c "import torch; torch.zeros(1).cuda()" names the reason; ray start where '
                "CUDA_VISIBLE_DEVICES is right",
            )
        elif wanted and len(seen.driver) > lent and not (node.offer and node.offer.source == "SLURM"):
            yield Finding(
                "warning",
                "GPUs",
                (node.name,),
                f"{len(seen.driver) - lent} GPU(s) stay idle: {state}",
                "CUDA_VISIBLE_DEVICES hides them, or Ray was started with fewer",
                "unset CUDA_VISIBLE_DEVICES where Ray is started, or ray start --num-gpus=N",
            )


def limits(survey: Survey) -> Iterator[Finding]:
    """Find limits of open files and processes that Ray reaches."""
    for node in survey.nodes:
        small = {
            "open files (ulimit -Hn)": (node.machine.open_files, OPEN_FILES),
            "processes (ulimit -Hu)": (node.machine.processes, PROCESSES),
        }
        for what, (found, needed) in small.items():
            if 0 <= found < needed:
                yield Finding(
                    "warning",
                    "limits",
                    (node.name,),
                    f"{found} {what}, {needed} are advisable",
                    "login nodes are often limited; Ray ends with 'Too many open files' or 'Resource temporarily "
                    "unavailable'",
                    "run on a compute node (salloc, sbatch); an administrator: /etc/security/limits.conf",
                )


def trial_fits(survey: Survey) -> Iterator[Finding]:
    """Find a trial that no node holds: Ray would wait for ever."""
    cpus_wanted, gpus_wanted = survey.ask.trial_cpus, survey.ask.trial_gpus or 0.0

    lent = {node.name: _lent(node) for node in survey.nodes}
    if lent and not any(cpus >= cpus_wanted and gpus >= gpus_wanted for cpus, gpus in lent.values()):
        offers = "; ".join(f"{name}: {cpus:g} CPUs, {gpus:g} GPUs" for name, (cpus, gpus) in lent.items())
        yield Finding(
            "blocker",
            "trial size",
            (),
            f"a worker of a trial asks for {cpus_wanted:g} CPUs and {gpus_wanted:g} GPUs; offered are {offers}",
            "no node holds one, and Ray would wait for ever",
            "lower recipe.threads or compute.gpus_per_trial, or ask for larger nodes",
        )


def _lent(node: NodeFacts) -> tuple[float, float]:
    """Return CPUs and GPUs that are handed out, or, where nobody says, those that are there."""
    if node.offer:
        return node.offer.cpus, node.offer.gpus
    return min(node.machine.cpus_allowed, node.machine.cpu_quota or math.inf), float(node.gpus.usable or 0)


JUDGES = (cpus, memory, shared_memory, temp, gpus, limits, trial_fits)
