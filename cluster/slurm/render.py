"""The text that sbatch reads: a pure function of what is asked, every value quoted."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cluster.slurm.spec import NodeGroup, SlurmSpec

LOG_OF_JOB, LOG_OF_TASK = "%j.log", "%A_%a.log"
"""Names of logs, for a job and for a task of an array."""


def render(spec: SlurmSpec) -> str:
    """Return the text of the job, the same for the same `spec`.

    Parameters
    ----------
    spec
        What the job is asked to be.

    Returns
    -------
    str
        A bash script whose last line becomes the Python process that starts Ray on the nodes and runs the command.
        It holds no secret: the token is made inside the job.
    """
    shell = "#!/bin/bash -l" if spec.modules else "#!/bin/bash"  # environment modules are a function of login shells
    return "\n".join([shell, *_directives(spec), "", "set -eo pipefail", *_body(spec), ""])


def _directives(spec: SlurmSpec) -> Iterator[str]:
    first, *others = spec.groups
    log = spec.logs / (LOG_OF_TASK if spec.array else LOG_OF_JOB)
    options = {
        "job-name": spec.name,
        "time": spec.time,
        "account": spec.account,
        "qos": spec.qos,
        "array": spec.array,
        "output": str(log),
        "open-mode": "append",
        "signal": f"B:USR1@{spec.stop_before_s}",
    }
    yield from (_option(name, value) for name, value in sorted(options.items()) if value is not None)
    yield "#SBATCH --requeue"
    yield "#SBATCH --no-kill"  # a lost node ends its trials, not the job
    yield from _nodes(first, exclusive=spec.exclusive)
    for group in others:
        yield "#SBATCH hetjob"
        yield _option("time", spec.time)
        if spec.account is not None:
            yield _option("account", spec.account)
        if spec.qos is not None:
            yield _option("qos", spec.qos)
        yield from _nodes(group, exclusive=spec.exclusive)


def _nodes(group: NodeGroup, *, exclusive: bool) -> Iterator[str]:
    gpus = f"{group.gpu_type}:{group.gpus}" if group.gpu_type else str(group.gpus)
    options = {
        "nodes": str(group.nodes),
        "ntasks-per-node": "1",
        "cpus-per-task": None if group.cpus is None else str(group.cpus),
        "gpus-per-node": gpus if group.gpus else None,
        "mem": group.memory,
        "partition": group.partition,
        "constraint": group.constraint,
    }
    yield from (_option(name, value) for name, value in sorted(options.items()) if value is not None)
    if exclusive:
        yield "#SBATCH --exclusive"


def _option(name: str, value: str) -> str:
    return f"#SBATCH --{name}={shlex.quote(value)}"


def _body(spec: SlurmSpec) -> Iterator[str]:
    yield from (f"module load {shlex.quote(module)}" for module in spec.modules)
    yield f"cd {shlex.quote(str(spec.project))}"
    if spec.root is not None:
        yield f"export LBP_RAY_ROOT={shlex.quote(str(spec.root))}"
    yield f'export PATH={shlex.quote(str(spec.python.parent))}:"$PATH"'
    gpus = ",".join(str(number) for number in spec.gpus_of_nodes)
    words = [str(spec.python), "-m", "cluster.slurm.allocation", f"--gpus={gpus}"]
    if spec.container is not None:
        words.append(f"--container={spec.container}")
    yield f"exec {shlex.join(words)} -- \\"
    yield f"  {shlex.join(spec.command)}"
