"""What is submitted, under which name, and whether at all. Pure: nothing here talks to a cluster."""

from __future__ import annotations

import hashlib
import json
import shlex
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

ENDED = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})
"""States that a job does not leave."""

STOPPED_STATUS = 143
"""Exit status of a job that was stopped: 128 plus SIGTERM, which it was sent."""

WORDS = {
    "Failed to download runtime_env file package": "a file of the working directory changed while it was sent: write "
    "logs and results elsewhere, and submit again",
    "JOB_SUPERVISOR_ACTOR_START_TIMEOUT": "the head has no room for the job's process: ray status",
    "JOB_SUPERVISOR_ACTOR_DIED": "the head's node was lost; submitted again, a study goes on",
}
"""What to do about a failure that is not the command's own."""


class JobError(ValueError):
    """A job that cannot be submitted, followed or stopped."""


@dataclass(frozen=True)
class Submission:
    """A command with all that decides what it does, as far as this machine can know."""

    command: tuple[str, ...]
    config_hash: str
    """SHA-256 of the file after ``--config``; empty without one."""
    code_hash: str
    """Hash of what is sent."""
    root: str | None = None
    """``LBP_RAY_ROOT`` of the terminal, which the job is given; ``None`` leaves it the head's."""

    @property
    def identity(self) -> str:
        """Name shared by all attempts: equal exactly if command, configuration, code and root are."""
        told = json.dumps([self.command, self.config_hash, self.code_hash, self.root])
        return f"lbp-{hashlib.sha256(told.encode()).hexdigest()[:12]}"

    @property
    def entrypoint(self) -> str:
        """The command as one line for the job's shell."""
        return shlex.join(self.command)

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables that the job gets on top of the head's."""
        return {} if self.root is None else {"LBP_RAY_ROOT": self.root}


@dataclass(frozen=True)
class JobRecord:
    """What the job server says of one job."""

    name: str
    state: str
    exit_code: int | None = None
    """Of the command; negative for a signal, ``None`` if it has not ended by itself."""
    message: str = ""
    error: str = ""
    """Ray's name of a failure."""

    @property
    def ended(self) -> bool:
        """Whether the job has left its process."""
        return self.state in ENDED

    @property
    def status(self) -> int:
        """Exit status that stands for the job's end: the command's own, where it has one."""
        if self.state == "SUCCEEDED":
            return 0
        if self.state == "STOPPED":
            return STOPPED_STATUS
        code = self.exit_code or 1
        return code if code > 0 else 128 - code


@dataclass(frozen=True)
class Step:
    """What to do about a submission."""

    name: str
    """Submission id of the attempt."""
    runs: bool
    """Whether it is there already, so that it is only followed."""
    told: str


def read_submission(command: Sequence[str], code_hash: str, root: str | None) -> Submission:
    """Return what a command line asks for.

    Raises
    ------
    JobError
        If there is no command, its configuration is not there, or the root is relative.
    """
    if not command:
        msg = "after --, the command is required: python -m cluster job -- python -m lbp_ray.tune --config ..."
        raise JobError(msg)
    if root is not None and not Path(root).is_absolute():
        msg = f"LBP_RAY_ROOT must be an absolute path on storage that every node sees, found {root!r}"
        raise JobError(msg)
    file = config_file(command)
    if file is not None and not file.is_file():
        msg = f"configuration file not found: {file}; submit from the root of the clone, whose own are under configs/"
        raise JobError(msg)
    content = "" if file is None else hashlib.sha256(file.read_bytes()).hexdigest()
    return Submission(command=tuple(command), config_hash=content, code_hash=code_hash, root=root)


def config_file(command: Sequence[str]) -> Path | None:
    """Return the file after ``--config``, if a command has one."""
    for word, following in zip(command, [*command[1:], None], strict=True):
        if word == "--config" and following is not None:
            return Path(following)
        if word.startswith("--config="):
            return Path(word.partition("=")[2])
    return None


def next_step(identity: str, jobs: Sequence[JobRecord]) -> Step:
    """Decide whether to follow the attempt that runs or to start the next one.

    Parameters
    ----------
    identity
        Name shared by all attempts.
    jobs
        All jobs that the cluster knows.
    """
    attempts = {number: job for job in jobs if (number := _attempt(job.name, identity))}
    if not attempts:
        return Step(f"{identity}-1", runs=False, told="submitted")
    number, last = max(attempts.items(), key=itemgetter(0))
    if not last.ended:
        return Step(last.name, runs=True, told="is there already, following it")
    return Step(f"{identity}-{number + 1}", runs=False, told=f"submitted; attempt {number} ended before ({last.state})")


def describe(job: JobRecord) -> str:
    """Return one line about a job, with what to do where that is known."""
    todo = next((word for cause, word in WORDS.items() if cause in job.message or cause == job.error), "")
    status = f", exit status {job.status}" if job.ended and job.status else ""
    own = job.exit_code is not None or job.state != "FAILED"
    lines = [line for line in job.message.splitlines() if line.strip()]
    why = "" if own or not lines else f": {lines[-1].strip()}"
    return f"job {job.name}: {job.state}{status}{why}{f'; {todo}' if todo else ''}"


def _attempt(name: str, identity: str) -> int:
    base, _, number = name.rpartition("-")
    return int(number) if base == identity and number.isdecimal() else 0
