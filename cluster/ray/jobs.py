"""Talks to the job server of a cluster: submits, follows, stops."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import aiohttp
from ray.dashboard.modules.job.utils import redact_url_password
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from cluster.ray.proxy import proxy_of_job_server, spare_loopback
from cluster.ray.submission import JobError, JobRecord, Step, Submission, next_step
from cluster.ray.token import token_file

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ray.dashboard.modules.job.pydantic_models import JobDetails

POLL_S = 2.0
"""Seconds between two attempts to follow a job whose log has paused or whose server does not answer."""

PATIENCE = 30
"""Attempts in a row that the server may leave unanswered before a job is no longer followed."""

STOP_S = 60.0
"""Seconds within which a stopped job must have ended: Ray kills it 3 seconds after it has asked."""


for _name in ("_private.runtime_env.packaging", "dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk"):
    logging.getLogger(f"ray.{_name}").setLevel(logging.WARNING)  # they would list every file that is left out


@contextmanager
def explained() -> Iterator[None]:
    """Turn what Ray's client raises into a `JobError` that says what to do."""
    try:
        yield
    except AuthenticationError as error:
        reason = str(error).strip().splitlines()[0]
        msg = (
            f"{_through()}the cluster refused the token: {reason} The head's token must lie in "
            f"{token_file(os.environ)}, mode 0600 (RAY_AUTH_TOKEN_PATH names another file)"
        )
        raise JobError(msg) from None
    except BrokenPipeError:  # of our own output
        raise
    except ConnectionError as error:
        msg = (
            f"{_through()}{redact_url_password(str(error).strip())} Set RAY_API_SERVER_ADDRESS=http://HOST:8265 to the "
            "address of the cluster's dashboard, or of your tunnel to it (ssh -L 8265:127.0.0.1:8265 HOST)"
        )
        raise JobError(msg) from None
    except (OSError, RuntimeError, aiohttp.ClientError) as error:
        msg = f"{_through()}the job server did not do it: {redact_url_password(str(error).strip())}"
        raise JobError(msg) from None


def _through() -> str:
    """Return the words that come first where a proxy may have answered in place of the cluster; else nothing."""
    proxy = proxy_of_job_server()
    if proxy is None:
        return ""
    return (
        f"{proxy.variable} is set: a proxy gets what is meant for {proxy.host}, the token too, and may itself have "
        f"answered this (export no_proxy={proxy.host}, and make a new token if the proxy is not yours): "
    )


def connect() -> JobSubmissionClient:
    """Return a client of the cluster that ``RAY_API_SERVER_ADDRESS`` or ``RAY_ADDRESS`` names, or that runs here.

    A proxy is left out on the way to this machine itself, where tunnels begin: it could not reach it, and would see
    the token.

    Raises
    ------
    JobError
        If no job server answers or it refuses the token.
    """
    spare_loopback()
    with explained():
        return JobSubmissionClient()


def read_record(details: JobDetails) -> JobRecord:
    """Return what is needed of Ray's details of a job."""
    return JobRecord(
        name=details.submission_id or "",
        state=str(details.status),
        exit_code=details.driver_exit_code,
        message=details.message or "",
        error=details.error_type or "",
    )


def look(client: JobSubmissionClient, name: str) -> JobRecord:
    """Return a job's record.

    Raises
    ------
    JobError
        If the cluster knows no such job.
    """
    with explained():
        return read_record(client.get_job_info(name))


def submit(client: JobSubmissionClient, submission: Submission, folder: Path) -> Step:
    """Start a submission unless it runs, and return what was done.

    Raises
    ------
    JobError
        If the server refuses it.
    """
    try:
        return _start(client, submission, folder)
    except JobError as error:  # another client has just submitted the same: the server takes a name once
        if "already exists" not in str(error):
            raise
    return _start(client, submission, folder)


def _start(client: JobSubmissionClient, submission: Submission, folder: Path) -> Step:
    environment = {"working_dir": str(folder), "env_vars": submission.variables}
    with explained():
        step = next_step(submission.identity, [read_record(details) for details in client.list_jobs()])
        if not step.runs:
            client.submit_job(entrypoint=submission.entrypoint, submission_id=step.name, runtime_env=environment)
    return step


class LogFollower:
    """Prints a job's log, and after a lost connection goes on where it was."""

    def __init__(self) -> None:
        self._shown = 0

    async def follow(self, client: JobSubmissionClient, name: str) -> None:
        """Print the log until the job or the connection ends; the server tells it from its beginning every time."""
        known, told = self._shown, 0
        async for text in client.tail_job_logs(name):
            sys.stdout.write(text[max(0, known - told) :])
            sys.stdout.flush()
            told += len(text)
            self._shown = max(known, told)


def follow(client: JobSubmissionClient, name: str) -> JobRecord:
    """Print a job's log until it has ended, and return its record.

    Raises
    ------
    JobError
        If there is no such job, or the server has not answered for long.
    """
    log, unanswered = LogFollower(), 0
    record = look(client, name)
    while True:
        try:
            with explained():
                asyncio.run(log.follow(client, name))
            record, unanswered = look(client, name), 0
        except JobError:
            unanswered += 1
            if unanswered > PATIENCE:
                raise
        if record.ended:
            return record
        time.sleep(POLL_S)


def stop(client: JobSubmissionClient, name: str) -> JobRecord:
    """Stop a job, wait for its end and return its record.

    Raises
    ------
    JobError
        If there is no such job, or it does not end.
    """
    record = look(client, name)
    if not record.ended:
        with explained():
            client.stop_job(name)
    deadline = time.monotonic() + STOP_S
    while not record.ended:
        if time.monotonic() > deadline:
            msg = f"job {name} was told to stop {STOP_S:.0f} s ago and is still {record.state}; ray job status {name}"
            raise JobError(msg)
        time.sleep(0.5)
        record = look(client, name)
    return record
