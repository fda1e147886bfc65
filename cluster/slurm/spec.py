"""What a SLURM job is asked to be: one frozen, validated model."""

from __future__ import annotations

import re
from pathlib import Path  # noqa: TC003  (pydantic reads it at run time)
from typing import Annotated

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from lbp_ray.config import AbsolutePath, FrozenModel

JOB_NAME = "lbp-ray"
"""What squeue shows unless the job is given a name."""

STOP_BEFORE_S = 120
"""Seconds before the time limit at which SLURM tells the job to stop: the end of the command and of Ray fit in."""

EARLY_S = 60
"""Seconds by which SLURM may send its signal too early."""

LONGEST_STOP_S = 65535
"""Largest lead of ``--signal`` that SLURM accepts, in seconds."""


def _one_line(value: str) -> str:
    if re.search(r"[\x00-\x1f\x7f'\"]", value):
        msg = f"must be one line without quotes, found {value!r}"
        raise ValueError(msg)
    return value


def _plain_folder(value: Path) -> Path:
    if re.search(r"[%\\]", _one_line(str(value))):
        msg = f"must hold neither % nor backslash, which SLURM replaces in the names of logs, found {str(value)!r}"
        raise ValueError(msg)
    return value


def _time(value: str) -> str:
    if not re.fullmatch(r"(\d+-\d{1,2}(:\d{2}){0,2})|(\d+(:\d{2}){0,2})", value):
        msg = f"must be minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS, found {value!r}"
        raise ValueError(msg)
    return value


Word = Annotated[str, StringConstraints(min_length=1), AfterValidator(_one_line)]
"""A value of one #SBATCH option: it stays on its line."""

Folder = Annotated[AbsolutePath, AfterValidator(_plain_folder)]
"""Folder on storage that every node sees."""

Memory = Annotated[str, StringConstraints(pattern=r"^\d+[KMGT]?$")]
"""Memory as SLURM writes it: 64G; a bare number is MiB; 0 is all of the node."""

GpuType = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.\-]+$")]
"""Name of a GPU type in the cluster's gres.conf, such as a100."""


def seconds_of(time: str) -> int:
    """Return the seconds in a time limit as SLURM writes it; 0 is no limit."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    # After days come hours; alone, one or two numbers are minutes and seconds.
    hours, minutes, seconds = [*parts, 0, 0][:3] if dash or len(parts) == 3 else (0, *[*parts, 0][:2])
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


class NodeGroup(FrozenModel):
    """Nodes of one kind. A job with several groups is a heterogeneous job of SLURM."""

    nodes: Annotated[int, Field(ge=1)] = 1
    """Number of nodes."""
    gpus: Annotated[int, Field(ge=0)] = 0
    """GPUs on each node."""
    gpu_type: GpuType | None = None
    """Type of those GPUs; None takes any."""
    cpus: Annotated[int, Field(ge=1)] | None = None
    """CPUs on each node; None leaves it to the partition's default, or takes the whole node where it is exclusive."""
    memory: Memory | None = None
    """Memory on each node; None leaves it to the partition's default."""
    partition: Word | None = None
    """Partition of this group; None takes the cluster's default."""
    constraint: Word | None = None
    """Features that the nodes must have."""

    @model_validator(mode="after")
    def _type_needs_gpus(self) -> NodeGroup:
        if self.gpu_type and not self.gpus:
            msg = f"gpu_type {self.gpu_type!r} needs gpus of at least 1, found 0"
            raise ValueError(msg)
        return self


class SlurmSpec(FrozenModel):
    """One job: its nodes, the limits it runs under, and the command it runs on them."""

    command: Annotated[tuple[str, ...], Field(min_length=1)]
    """Command and arguments; ``{array}`` as an argument's part stands for the index of an array's task."""
    groups: Annotated[tuple[NodeGroup, ...], Field(min_length=1)]
    """Kinds of nodes; Ray's head runs on the first node of the first."""
    time: Annotated[str, AfterValidator(_time)]
    """Time limit, as SLURM writes it."""
    project: Folder
    """Folder that holds this project's code, on storage that every node sees."""
    logs: Folder
    """Folder of the job's text and log, on storage that every node sees."""
    python: AbsolutePath
    """Python of the environment that this project is installed in, the same on every node."""
    root: AbsolutePath | None = None
    """``LBP_RAY_ROOT`` of the study; None does not set it."""
    name: Word = JOB_NAME
    """Name of the job."""
    account: Word | None = None
    """Account that pays."""
    qos: Word | None = None
    """Quality of service."""
    modules: tuple[Word, ...] = ()
    """Environment modules that are loaded on every node."""
    container: Folder | None = None
    """Apptainer image that Ray and the command run in; None runs them in `python`'s environment."""
    array: Annotated[str, StringConstraints(pattern=r"^\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*(%\d+)?$")] | None = None
    """Indices of an array of jobs, each a cluster of its own, such as 0-4%2."""
    exclusive: bool = False
    """Whether nodes are shared with nobody."""
    stop_before_s: Annotated[int, Field(ge=10, le=LONGEST_STOP_S)] = STOP_BEFORE_S
    """Seconds before the time limit at which the command is stopped and the job requeued."""

    @model_validator(mode="after")
    def _possible(self) -> SlurmSpec:
        if self.array and len(self.groups) > 1:
            msg = "an array of heterogeneous jobs is not possible in SLURM; give either array or one group of nodes"
            raise ValueError(msg)
        if self.array and not any("{array}" in word for word in self.command):
            msg = (
                f"array {self.array} would start the same command several times, in one folder; write {{array}}, which "
                "stands for the index of a task, where the tasks differ, such as seeds=[{array}] name=study{array}"
            )
            raise ValueError(msg)
        if 0 < seconds_of(self.time) <= self.stop_before_s + EARLY_S:
            msg = (
                f"a limit of {self.time} ends before the study can start: it is stopped {self.stop_before_s} s before "
                f"the limit (--stop-before), and SLURM may say so {EARLY_S} s early; give more time"
            )
            raise ValueError(msg)
        if any("\0" in word for word in self.command):
            msg = "command must not hold a null character"
            raise ValueError(msg)
        return self

    @property
    def gpus_of_nodes(self) -> tuple[int, ...]:
        """GPUs of every node, group by group."""
        return tuple(group.gpus for group in self.groups for _ in range(group.nodes))
