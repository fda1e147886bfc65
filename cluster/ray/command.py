"""``python -m cluster job``: submit a command to an existing Ray cluster once, follow it, end with its exit code."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.ray.submission import describe, read_submission
from cluster.ray.token import has_token

if TYPE_CHECKING:
    import argparse

LEFT_ALONE = 130
"""Exit status after Ctrl-C, which leaves the job running."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options; what comes after ``--`` is the command that the job runs."""
    parser.usage = "python -m cluster job [--no-wait | --follow JOB | --stop JOB] -- COMMAND ..."
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--no-wait", action="store_true", help="submit and return")
    what.add_argument("--follow", metavar="JOB", help="follow a job submitted before")
    what.add_argument("--stop", metavar="JOB", help="stop a job; committed trials stay")


def run(parsed: argparse.Namespace) -> int:
    """Do what the command line asks and return the exit status: the command's own, when it is followed.

    Raises
    ------
    ValueError
        If the token, the folder, the command or the cluster is not as it must be.
    """
    if has_token(os.environ):
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # before ray is imported: it reads the mode once
    from cluster.ray import jobs

    if parsed.stop:
        return _report(describe(jobs.stop(jobs.connect(), parsed.stop)))
    if parsed.follow:
        return watch(parsed.follow)
    from cluster.ray.package import code_hash, require_sendable

    folder = Path.cwd()
    require_sendable(folder)
    submission = read_submission(parsed.command, code_hash(folder), os.environ.get("LBP_RAY_ROOT"))
    step = jobs.submit(jobs.connect(), submission, folder)
    _report(f"job {step.name}: {step.told}")
    return 0 if parsed.no_wait else watch(step.name)


def watch(name: str) -> int:
    """Follow a job and return its exit status; Ctrl-C leaves it running."""
    from cluster.ray import jobs

    # asyncio would turn the first Ctrl-C into a cancellation, which may be lost where a line of the log has just come.
    signal.signal(signal.SIGINT, _interrupt)
    try:
        record = jobs.follow(jobs.connect(), name)
    except KeyboardInterrupt:
        _report(
            f"\njob {name} goes on; python -m cluster job --follow {name} shows it again, as does the same command; "
            f"python -m cluster job --stop {name} ends it"
        )
        return LEFT_ALONE
    _report(describe(record))
    return record.status


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _report(line: str) -> int:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
    return 0
