"""`python -m cluster job` against a real head with a token: what a user types in a second terminal."""

from __future__ import annotations

import contextlib
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.job_submission import JobSubmissionClient
from river import LIMIT_S, ROOT, SMALL, environment, prepare_cohort, result_folder
from test_ray_job import BIN, free_port, wait_for, wait_for_end

pytestmark = [pytest.mark.ray, pytest.mark.slow]

HOLD = """import pathlib, sys, time
print("started", flush=True)
while not pathlib.Path(sys.argv[1]).exists():
    time.sleep(0.1)
"""
"""A command that runs until a file is there."""


@pytest.fixture(scope="module")
def head(module_folder):
    """Start a head; yield where it is, a folder to submit from, and the environment of a second terminal."""
    folder = Path(tempfile.mkdtemp(prefix="lbp", dir="/tmp"))  # socket paths must stay short
    clone = module_folder / "clone"
    clone.mkdir()
    (clone / ".rayignore").write_text("runs\n")
    (clone / "hold.py").write_text(HOLD)
    token = folder / ".ray" / "auth_token"
    token.parent.mkdir()
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    url = f"http://127.0.0.1:{free_port()}"
    start = ["ray", "start", "--head", "--block", f"--port={free_port()}", f"--dashboard-port={url.rpartition(':')[2]}"]
    variables = environment(module_folder, HOME=str(folder), PATH=f"{BIN}:/usr/bin:/bin", RAY_AUTH_MODE="token")
    log = folder / "head.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*start, "--num-cpus=2", "--dashboard-agent-listen-port=0", f"--temp-dir={folder}/ray"],
            env=variables,
            stdout=output,
            stderr=output,
        )
    try:
        wait_for(lambda: "Ray runtime started" in log.read_text(), process, log)
        second = {**variables, "RAY_API_SERVER_ADDRESS": url}
        del second["LBP_RAY_ROOT"], second["RAY_AUTH_MODE"]
        yield SimpleNamespace(
            root=module_folder, folder=folder, clone=clone, url=url, environment=second, token=token.read_text()
        )
    finally:
        process.terminate()
        wait_for_end(process)
        shutil.rmtree(folder, ignore_errors=True)  # Ray's agents may still write


def start(head, *words, cwd=None, **variables):
    """Start ``python -m cluster job`` and return its process."""
    return subprocess.Popen(
        [sys.executable, "-m", "cluster", "job", *words],
        cwd=cwd or head.clone,
        env=head.environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(head, *words, **rest):
    process = start(head, *words, **rest)
    output, _ = process.communicate(timeout=LIMIT_S)
    return process.returncode, output


def held(path):
    return ("--", "python", "hold.py", str(path))


def read_until(process, text):
    """Return a process's output up to the line that holds `text`."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return "".join(lines)
    pytest.fail("".join(lines))


def name_in(output):
    return re.search(r"job (lbp-[0-9a-f]{12}-\d+)", output)[1]


def jobs_of(head, name):
    """Return the states of all attempts of a submission, by their number."""
    client = JobSubmissionClient(head.url, headers={"Authorization": f"Bearer {head.token}"})
    base = name.rpartition("-")[0]
    return {job.submission_id: str(job.status) for job in client.list_jobs() if base in str(job.submission_id)}


def test_exit_code_and_log_are_the_commands_and_a_failure_is_started_again(head):
    command = ("--", "python", "-c", "print('se' + 'en'); raise SystemExit(7)")
    for attempt in ("1", "2"):
        status, output = run(head, *command)
        assert status == 7, output
        assert re.search("^seen$", output, flags=re.MULTILINE)
        assert name_in(output).endswith(f"-{attempt}")


def test_the_same_submission_is_one_job(head, tmp_path):
    clients = [start(head, *held(tmp_path / "go")) for _ in range(2)]
    first = [read_until(client, "started") for client in clients]
    third = start(head, *held(tmp_path / "go"))
    assert "is there already" in read_until(third, "started")
    (tmp_path / "go").touch()
    for client in (*clients, third):
        client.communicate(timeout=60)
        assert client.returncode == 0
    assert jobs_of(head, name_in(first[0])) == {name_in(first[1]): "SUCCEEDED"}


def test_ctrl_c_leaves_the_job_and_stop_ends_it(head, tmp_path):
    client = start(head, *held(tmp_path / "never"))
    name = name_in(read_until(client, "started"))
    client.send_signal(signal.SIGINT)
    rest, _ = client.communicate(timeout=60)
    assert client.returncode == 130
    assert f"--stop {name}" in rest
    assert "Traceback" not in rest
    assert jobs_of(head, name) == {name: "RUNNING"}
    assert run(head, "--stop", name)[0] == 0
    assert jobs_of(head, name) == {name: "STOPPED"}
    assert run(head, "--follow", name)[0] == 143


def test_root_of_the_terminal_goes_with_the_job(head):
    show = ("--", "python", "-c", "import os; print('root=' + os.environ['LBP_RAY_ROOT'])")
    assert f"root={head.root}" in run(head, *show)[1]
    assert "root=/elsewhere" in run(head, *show, LBP_RAY_ROOT="/elsewhere")[1]


@pytest.mark.parametrize("token", ["0" * 64, None], ids=["wrong", "none"])
def test_stranger_is_refused_without_showing_a_token(head, tmp_path, token):
    if token:
        (tmp_path / "token").touch(mode=0o600)
        (tmp_path / "token").write_text(token)
    variables = {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")} if token else {"HOME": str(tmp_path)}
    status, output = run(head, "--", "python", "-c", "print(1)", **variables)
    assert status == 2
    assert "refused the token" in output
    assert head.token not in output
    assert "0" * 64 not in output
    assert "Traceback" not in output


def test_nobody_at_home_is_said(head):
    status, output = run(head, "--follow", "lbp-1", RAY_API_SERVER_ADDRESS=f"http://127.0.0.1:{free_port()}")
    assert status == 2
    assert "Set RAY_API_SERVER_ADDRESS" in output
    assert "Traceback" not in output


def test_a_job_that_never_was_is_said(head):
    status, output = run(head, "--stop", "lbp-000000000000-1")
    assert status == 2
    assert "lbp-000000000000-1" in output
    assert "Traceback" not in output


def documented(page):
    """Return the job commands of a page's blocks."""
    text = (ROOT / "docs" / page).read_text()
    return re.findall(r"^python -m cluster job -- (python -m lbp_ray.tune .*)$", text, flags=re.MULTILINE)


def arguments_of_all_processes():
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield entry.read_bytes()
        except OSError:
            continue


def test_the_documented_study_runs_and_the_token_is_nowhere(head):
    prepare_cohort(head.root)
    (command,) = documented("howto-ray-job.md")
    process = start(head, "--", *shlex.split(command), *SMALL, "slice_counts=[1]", cwd=ROOT)
    output = None
    while output is None:
        assert not any(head.token.encode() in arguments for arguments in arguments_of_all_processes())
        with contextlib.suppress(subprocess.TimeoutExpired):
            output, _ = process.communicate(timeout=1)
    assert process.returncode == 0, output[-3000:]
    assert f"report: {result_folder(head.root) / 'report' / 'report.html'}" in output
    kept = {head.folder / ".ray" / "auth_token"}
    files = [path for folder in (head.folder, head.root) for path in folder.rglob("*") if path.is_file()]
    assert {path for path in files if head.token.encode() in path.read_bytes()} == kept
