"""``python -m cluster slurm``: write the job, submit it, follow it, fetch the report."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from cluster.slurm.launch import (
    SlurmError,
    ask,
    fetch,
    follow,
    read_study,
    refuse_idle_gpus,
    submit,
)
from cluster.slurm.render import render
from cluster.slurm.spec import JOB_NAME, STOP_BEFORE_S, NodeGroup, SlurmSpec

if TYPE_CHECKING:
    import argparse

LEFT_ALONE = 130
"""Exit status after Ctrl-C, which leaves the job running."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options; what comes after ``--`` is the command that the job runs."""
    parser.usage = "python -m cluster slurm --nodes N --gpus-per-node N --time HH:MM:SS [options] -- COMMAND ..."
    parser.add_argument("--nodes", type=int, default=1, help="number of nodes (1)")
    parser.add_argument("--gpus-per-node", default="0", metavar="[TYPE:]N", help="GPUs on each, such as 4 or a100:4")
    parser.add_argument("--cpus-per-task", type=int, help="CPUs on each node")
    parser.add_argument("--mem", help="memory on each node, such as 64G")
    parser.add_argument("--time", help="time limit, such as 08:00:00")
    for name in ("partition", "account", "qos", "constraint", "array"):
        parser.add_argument(f"--{name}", help=f"as sbatch's --{name}")
    parser.add_argument("--exclusive", action="store_true", help="share the nodes with nobody")
    parser.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="nodes=N,gpus=[TYPE:]N,...",
        help="further nodes of another kind, with cpus=, memory=, partition=, constraint= (a heterogeneous job)",
    )
    parser.add_argument("--module", action="append", default=[], help="environment module to load; may be repeated")
    parser.add_argument("--container", type=Path, help="Apptainer image that Ray and the command run in")
    parser.add_argument("--name", default=JOB_NAME, help=f"name of the job ({JOB_NAME})")
    parser.add_argument("--logs", type=Path, help="folder of the job's text and log ($LBP_RAY_ROOT/slurm)")
    parser.add_argument(
        "--stop-before",
        type=int,
        default=STOP_BEFORE_S,
        metavar="SECONDS",
        help=f"stop and requeue so long before the time limit ({STOP_BEFORE_S})",
    )
    parser.add_argument("--fetch", type=Path, metavar="FOLDER", help="copy the report to a new folder at the end")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="print the job's text and submit nothing")
    what.add_argument("--no-wait", action="store_true", help="submit and return")
    what.add_argument("--follow", metavar="JOB", help="follow a job submitted before")
    what.add_argument("--cancel", metavar="JOB", help="cancel a job")


def read_group(text: str) -> NodeGroup:
    """Return the nodes that ``nodes=1,gpus=v100:2,partition=old`` describes.

    Raises
    ------
    ValueError
        Naming what is wrong.
    """
    values: dict[str, Any] = {}
    for part in text.split(","):
        key, separator, value = part.partition("=")
        if not separator or key not in NodeGroup.model_fields:
            msg = f"--also takes {', '.join(NodeGroup.model_fields)} as key=value, found {part!r} in {text!r}"
            raise ValueError(msg)
        values[key] = value
    return _group(**values)


def _group(gpus: str = "0", **values: Any) -> NodeGroup:  # noqa: ANN401  (pydantic judges them)
    kind, _, number = gpus.rpartition(":")
    return NodeGroup.model_validate({"gpus": number, **({"gpu_type": kind} if kind else {}), **values})


def read_spec(parsed: argparse.Namespace, root: str | None) -> SlurmSpec:
    """Return the job that a command line asks for.

    Parameters
    ----------
    parsed
        The command line.
    root
        ``LBP_RAY_ROOT``, if it is set.

    Raises
    ------
    ValueError
        Naming what is wrong.
    """
    if parsed.time is None or not parsed.command:
        msg = "--time and, after --, the command are required: python -m cluster slurm --time 08:00:00 -- python -m ..."
        raise ValueError(msg)
    if parsed.logs is None and root is None:
        msg = "set LBP_RAY_ROOT, or give --logs a folder on storage that every node sees"
        raise ValueError(msg)
    try:
        first = _group(
            parsed.gpus_per_node,
            nodes=parsed.nodes,
            cpus=parsed.cpus_per_task,
            memory=parsed.mem,
            partition=parsed.partition,
            constraint=parsed.constraint,
        )
        return SlurmSpec(
            command=tuple(parsed.command),
            groups=(first, *(read_group(text) for text in parsed.also)),
            time=parsed.time,
            project=Path.cwd(),
            logs=parsed.logs or Path(str(root)) / "slurm",
            python=Path(sys.executable),
            root=None if root is None else Path(root),
            name=parsed.name,
            account=parsed.account,
            qos=parsed.qos,
            modules=tuple(parsed.module),
            container=parsed.container,
            array=parsed.array,
            exclusive=parsed.exclusive,
            stop_before_s=parsed.stop_before,
        )
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        msg = f"this job cannot be written: {faults}"
        raise ValueError(msg) from error


def run(parsed: argparse.Namespace) -> int:
    """Do what the command line asks and return the exit status: the job's, when it is followed."""
    if parsed.cancel:
        ask("scancel", parsed.cancel)
        return 0
    if parsed.follow:
        refuse_useless_fetch(parsed)
        return watch(parsed.follow, parsed)
    spec = read_spec(parsed, os.environ.get("LBP_RAY_ROOT"))
    if parsed.dry_run:
        sys.stdout.write(render(spec))
        return 0
    refuse_useless_fetch(parsed)
    study = read_study(spec.command)  # a configuration that cannot be read is found here, not after hours in a queue
    if study is not None:
        refuse_idle_gpus(spec, study)
    job = submit(render(spec), spec.logs)
    sys.stdout.write(f"submitted job {job}; its log: {spec.logs}\n")
    sys.stdout.flush()
    return 0 if parsed.no_wait else watch(job, parsed)


def refuse_useless_fetch(parsed: argparse.Namespace) -> None:
    """Refuse a report that could not be copied at the end, before hours are waited for it.

    Raises
    ------
    SlurmError
        Naming the reason.
    """
    if parsed.fetch is None:
        return
    if parsed.no_wait:
        msg = "--fetch copies the report when the job has ended, which --no-wait does not wait for; give it to --follow"
        raise SlurmError(msg)
    if parsed.array or parsed.fetch.exists():
        why = "one job has one report, an array has several" if parsed.array else f"{parsed.fetch} exists"
        msg = f"--fetch needs a job and a new folder: {why}"
        raise SlurmError(msg)


def watch(job: str, parsed: argparse.Namespace) -> int:
    """Follow a job, fetch its report if asked, and return its exit status; Ctrl-C leaves it running."""
    try:
        status, report = follow(job)
    except KeyboardInterrupt:
        sys.stdout.write(
            f"\njob {job} goes on; python -m cluster slurm --follow {job} shows it again, --cancel {job} ends it\n"
        )
        return LEFT_ALONE
    if status == 0 and parsed.fetch:
        if report is None:
            msg = f"job {job} succeeded but its log names no report to fetch"
            raise SlurmError(msg)
        sys.stdout.write(f"report: {fetch(report, parsed.fetch)}\n")
    return status
