"""Submits a job, follows it to its end and fetches the report; runs on a login node."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cluster.slurm.spec import SlurmSpec
    from lbp_ray.study import StudyConfig

POLL_S = 5.0
"""Seconds between two questions to the controller: sites ask users to be sparing with them."""

ENDED = frozenset(
    {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "PREEMPTED"}
)
"""States that a job does not leave; one that SLURM requeues shows as PENDING instead."""

PATIENCE = 24
"""Questions in a row that the controller may leave unanswered before a job is no longer followed."""

WORDS = {"OUT_OF_MEMORY": "give --mem more", "TIMEOUT": "give --time more; submitted again, it goes on"}
"""What to do about a state that explains itself."""


class SlurmError(ValueError):
    """A SLURM command that failed."""


@dataclass(frozen=True)
class JobRecord:
    """What the controller says of one job, or of one task of an array."""

    job: str
    state: str
    exit_status: int
    """Exit status of the batch step; 128 plus the signal if one killed it."""
    nodes: str
    restarts: int
    reason: str
    """Why a job waits; ``None``, in letters, when it does not."""
    log: Path

    @property
    def status(self) -> int:
        """Exit status that stands for the job's end: 0 only if it completed."""
        return 0 if self.state == "COMPLETED" else self.exit_status or 1


def ask(*command: str) -> str:
    """Run a SLURM command and return what it prints.

    Raises
    ------
    SlurmError
        With what SLURM says, if the command is missing or fails.
    """
    try:
        environment = outer_environment(os.environ)
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    except FileNotFoundError:
        msg = f"{command[0]} was not found; run this on a login node of the SLURM cluster"
        raise SlurmError(msg) from None
    except subprocess.CalledProcessError as error:
        msg = f"{command[0]} ended with status {error.returncode}: {(error.stderr or error.stdout).strip()}"
        raise SlurmError(msg) from None


def read_records(text: str) -> list[JobRecord]:
    """Return the jobs in the output of ``scontrol show job --oneliner``.

    Of a heterogeneous job only the first component counts: it runs the batch step.
    """
    records = []
    for line in filter(None, text.splitlines()):
        fields = dict(re.findall(r"(?:^| )([A-Za-z/:]+)=(.*?)(?= [A-Za-z/:]+=|$)", line))
        if fields.get("HetJobOffset", "0") != "0":
            continue
        task = fields.get("ArrayTaskId")
        records.append(
            JobRecord(
                job=fields["JobId"] if task is None else f"{fields['ArrayJobId']}_{task}",
                state=fields["JobState"],
                exit_status=_exit_status(fields.get("ExitCode", "0:0")),
                nodes=fields.get("NodeList", "(null)"),
                restarts=int(fields.get("Restarts", "0")),
                reason=fields.get("Reason", "None"),
                log=Path(fields.get("StdOut", "/dev/null")),
            )
        )
    return records


def _exit_status(text: str) -> int:
    """Return the exit status in SLURM's ``status:signal``; 128 plus the signal if one ended the process."""
    status, signal = (int(part) for part in text.split(":"))
    return status or (128 + signal if signal else 0)


def read_accounts(text: str) -> list[JobRecord]:
    """Return the jobs in the output of ``sacct -X -P -n -o JobID,State,ExitCode``.

    Of a heterogeneous job only the first component counts.
    """
    records = []
    for line in filter(None, text.splitlines()):
        job, state, code = line.split("|")
        name, _, component = job.partition("+")
        if component in {"", "0"}:
            records.append(
                JobRecord(
                    job=name,
                    state=state.split()[0],  # CANCELLED by 1000
                    exit_status=_exit_status(code),
                    nodes="",
                    restarts=0,
                    reason="None",
                    log=Path("/dev/null"),
                )
            )
    return records


def look_up(job: str, known: Mapping[str, JobRecord]) -> list[JobRecord]:
    """Return what the controller says of a job, or, if it has forgotten it, the accounting.

    Parameters
    ----------
    job
        Number of the job, or of an array of them.
    known
        What was known of it before: the accounting tells of its end, but not where its log lies.

    Raises
    ------
    SlurmError
        If neither knows it.
    """
    try:
        return read_records(ask("scontrol", "show", "job", job, "--oneliner"))
    except SlurmError as error:
        if "Invalid job id" not in str(error):
            raise
        try:
            records = read_accounts(ask("sacct", "-X", "-P", "-n", "-o", "JobID,State,ExitCode", "-j", job))
        except SlurmError:
            records = []
        if not records:
            msg = f"{error}; the controller forgets jobs minutes after their end, and sacct does not know it either"
            raise SlurmError(msg) from error
        return [_on_what_was_known(record, known.get(record.job)) for record in records]


def _on_what_was_known(record: JobRecord, earlier: JobRecord | None) -> JobRecord:
    if earlier is None:
        return record
    return replace(earlier, state=record.state, exit_status=record.exit_status, reason=record.reason)


def describe(record: JobRecord) -> str:
    """Return one line about a job."""
    where = "" if record.nodes in {"(null)", ""} else f" on {record.nodes}"
    why = f" ({record.reason})" if record.state == "PENDING" and record.reason != "None" else ""
    again = f", requeued {record.restarts} time(s)" if record.restarts else ""
    todo = f"; {WORDS[record.state]}" if record.state in WORDS else ""
    end = f", exit status {record.exit_status}" if record.state in ENDED and record.exit_status else ""
    return f"job {record.job}: {record.state}{where}{why}{again}{end}{todo}"


def submit(text: str, logs: Path) -> str:
    """Submit a job and return its number; its text is kept beside its log.

    Parameters
    ----------
    text
        What sbatch reads.
    logs
        Folder of texts and logs.

    Raises
    ------
    SlurmError
        With SLURM's own words if it refuses the job, or if the folder cannot be written to.
    """
    try:
        logs.mkdir(parents=True, exist_ok=True)
        number, name = tempfile.mkstemp(prefix="submitting-", suffix=".sbatch", dir=logs)
        with os.fdopen(number, "w") as file:
            file.write(text)
    except OSError as error:
        msg = f"the folder of logs cannot be written to ({error}); give another as --logs"
        raise SlurmError(msg) from error
    kept = Path(name)
    try:
        job = ask("sbatch", "--parsable", name).strip().partition(";")[0]
    except SlurmError:
        kept.unlink()
        raise
    kept.rename(logs / f"{job}.sbatch")
    return job


def outer_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without what an outer job has left in it, which the new job would take for its own."""
    kept = ("SLURM_CONF", "SLURM_CLUSTERS")
    return {name: value for name, value in environment.items() if name in kept or not name.startswith("SLURM_")}


class LogFollower:
    """Prints what a growing log has gained."""

    def __init__(self) -> None:
        self._read = 0
        self.report: Path | None = None
        """Page that the study has said it wrote."""

    def follow(self, log: Path) -> None:
        """Print the whole lines that came since the last call; a bar's redrawn states become lines."""
        if not log.is_file():
            return
        with log.open("rb") as opened:
            opened.seek(self._read)
            new = opened.read()
        whole = new[: max(new.rfind(b"\n"), new.rfind(b"\r")) + 1]
        self._read += len(whole)
        for line in re.split(r"[\r\n]+", whole.decode(errors="replace")):
            if match := re.fullmatch(r"report: (/.+)", line):
                self.report = Path(match[1])
            if line.strip():
                sys.stdout.write(f"{line}\n")


def follow(job: str) -> tuple[int, Path | None]:
    """Print a job's log and state until it has ended.

    Parameters
    ----------
    job
        Number of the job, or of an array of them.

    Returns
    -------
    int
        The job's exit status; of an array, the largest.
    Path or None
        Page of the report, if the job wrote one.
    """
    log, shown, known, unanswered = LogFollower(), "", dict[str, JobRecord](), 0
    while True:
        try:
            # The controller forgets a job some minutes after its end, and so each task of an array.
            ends = {name: record for name, record in known.items() if record.state in ENDED}
            known, unanswered = ends | {record.job: record for record in look_up(job, known)}, 0
        except SlurmError:  # a busy controller; a job that it has never shown is an error at once
            unanswered += 1
            if not known or unanswered > PATIENCE:
                raise
        records = list(known.values())
        ended = all(record.state in ENDED for record in records)
        for record in records if len(records) == 1 else ():
            log.follow(record.log)
        line = "\n".join(map(describe, records))
        if line != shown:
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()
            shown = line
        if ended:
            return max(record.status for record in records), log.report
        time.sleep(POLL_S)


def fetch(report: Path, folder: Path) -> Path:
    """Copy a report with its tables and figures, and return the copy's page.

    Raises
    ------
    SlurmError
        If the page is not visible from here or `folder` exists.
    """
    if not report.is_file():
        msg = f"the report {report} is not visible from this machine; copy it from a node of the job"
        raise SlurmError(msg)
    if folder.exists():
        msg = f"the report is not copied over {folder}, which exists; give --fetch a new folder"
        raise SlurmError(msg)
    shutil.copytree(report.parent, folder)
    return folder / report.name


def read_study(command: Sequence[str]) -> StudyConfig | None:
    """Return the study that a command runs; None for anything but ``python -m lbp_ray.tune``, and for an array's.

    Parameters
    ----------
    command
        What the job runs.

    Raises
    ------
    ValueError
        If its configuration cannot be read.
    """
    words = list(command)
    if "lbp_ray.tune" not in words or "--config" not in words or any("{array}" in word for word in words):
        return None
    from lbp_ray.config import load_config
    from lbp_ray.study import StudyConfig

    overrides = [word for word in words[words.index("lbp_ray.tune") :] if re.match(r"[a-z_]+(\.[a-z_]+)*=", word)]
    return load_config(StudyConfig, Path(words[words.index("--config") + 1]), overrides)


def refuse_idle_gpus(spec: SlurmSpec, study: StudyConfig) -> None:
    """Refuse GPUs that no trial would use, unless the command itself says so.

    Raises
    ------
    SlurmError
        With the override that uses them.
    """
    said = any(word.startswith("compute.gpus_per_trial=") for word in spec.command)
    if any(spec.gpus_of_nodes) and study.compute.gpus_per_trial == 0 and not said:
        msg = (
            "the job asks for GPUs, but compute.gpus_per_trial is 0 and trials would run on CPUs; add "
            "compute.gpus_per_trial=auto to the command, or compute.gpus_per_trial=0 to have it so"
        )
        raise SlurmError(msg)
