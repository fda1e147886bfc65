"""Three hosts with Ray, and what clusters do to a study in its midst: every table as if nothing had happened.

Who has no token gets nowhere, and no token is left anywhere.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hosts import hosts, missing_requirement, wait_for
from river import environment, prepare_cohort, run, study_arguments, tables

from preprocess.job import NODE_LOST_STATUS

pytestmark = [
    pytest.mark.multihost,
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing_requirement()), reason=str(missing_requirement())),
]

STUDY = study_arguments(
    "recipe.frozen_epochs=2",
    "recipe.unfrozen_epochs=6",
    "slice_counts=[1]",
    "seeds=[0,1]",
    "evaluation.permutations=0",
    "compute.gpus_per_trial=0",
)
"""Four trials of some seven seconds each; every epoch but the first leaves a checkpoint."""

BIN = Path(sys.executable).parent
PORT = 6379
GIB = 2**30
ENDS_S = 1200.0
"""Seconds within which a study that was disturbed must end."""

LOST_NODE_S = 300.0
"""Seconds within which a trial of a host that no longer answers has been run elsewhere."""


class Ray:
    """Ray on three hosts, started by hand: the head runs no trial, the two workers one at a time each."""

    def __init__(self, cluster):
        self.cluster, self.root = cluster, cluster.shared
        self.token = self.root / "token"
        self.token.touch(mode=0o600)
        self.token.write_text(secrets.token_hex(32))
        self.outputs, self.processes = [], []

    def environment(self, **extra):
        ray = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token), "PATH": f"{BIN}:{os.environ['PATH']}"}
        return environment(self.root, TMPDIR=str(self.cluster.folder / "t"), PYTHONUNBUFFERED="1", **ray, **extra)

    def popen(self, name, *command, **extra):
        """Start a command on a host; its output goes to a file of its own."""
        output = self.cluster.folder / "log" / f"{len(self.outputs):02d}-{name}.out"
        self.outputs.append(output)
        inside = [*self.cluster.enter(name), *command]
        with output.open("wb") as log:
            process = subprocess.Popen(
                inside, env=self.environment(**extra), stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        self.processes.append(process)
        return process

    def start(self, name, **extra):
        head = [f"--port={PORT}", "--head", "--num-cpus=0", "--dashboard-host=127.0.0.1"]
        worker = [f"--address={self.cluster.address('n1')}:{PORT}", "--num-cpus=1"]
        given = [f"--node-ip-address={self.cluster.address(name)}", "--object-store-memory=200000000"]
        role = head if name == "n1" else worker
        self.popen(name, "ray", "start", "--block", *role, *given, "--temp-dir=/tmp/ray", **extra)
        log = self.outputs[-1]
        wait_for(lambda: "Ray runtime started" in log.read_text(), f"Ray on {name}; see {log}")

    def end(self, name):
        """End every process of Ray and of a study on a host."""
        for pid, command in self.cluster.running(name).items():
            if command != "sleep infinity" and not command.startswith("bash -c"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def again(self, name, **extra):
        """Start Ray anew on a host."""
        self.end(name)
        self.start(name, **extra)

    def study(self, runs):
        """Start the study on the head's host, or go on with it."""
        where = f"paths.runs={self.root / runs / 'runs'}"
        address = f"{self.cluster.address('n1')}:{PORT}"
        return self.popen("n1", "python", "-m", "lbp_ray.tune", *STUDY, where, RAY_ADDRESS=address)

    def find(self, name, words):
        """Return the one process of a host whose command line has these words."""
        return min(pid for pid, text in self.cluster.running(name).items() if words in text)  # not a fork of it

    def trials(self, name):
        """Return process and cell of the trials that a host runs."""
        found = {pid: re.match(r"ray::(k\d-fold\d\d-seed\d)", text) for pid, text in self.cluster.running(name).items()}
        return {pid: match[1] for pid, match in found.items() if match}

    def wait_for_trial(self, name, runs):
        """Wait until a trial of a host has left a checkpoint; return its process and its cell."""

        found = []

        def under_way():
            kept = (self.root / runs / "runs" / "small" / "in_progress").glob("k*.pt")
            saved = {path.name[: len("k1-fold00-seed0")] for path in kept}
            found.extend((pid, cell) for pid, cell in self.trials(name).items() if cell in saved)
            return found

        wait_for(under_way, f"trial under way on {name}", ENDS_S)
        return found[0]


@pytest.fixture(scope="module")
def ray():
    """Ray on three hosts, and a cohort on storage that they share."""
    with hosts(3) as cluster:
        prepare_cohort(cluster.shared)
        running = Ray(cluster)
        for name in cluster.names:
            running.start(name)
        yield running
    for process in running.processes:  # their hosts are gone
        process.wait(timeout=30)


def begin(ray, runs):
    """Start the study with crops and features of the undisturbed one; return it, and a trial under way on n3."""
    without = shutil.ignore_patterns("trials", "results", "tune", "in_progress")
    shutil.copytree(ray.root / "undisturbed", ray.root / runs, ignore=without)
    process = ray.study(runs)
    return process, *ray.wait_for_trial("n3", runs)


def finish(ray, process, limit_s=ENDS_S):
    """Return the exit status of a study and what it said."""
    output = ray.outputs[ray.processes.index(process)]
    try:
        return process.wait(timeout=limit_s), output.read_text()
    except subprocess.TimeoutExpired:
        pytest.fail(f"the study has not ended: {output.read_text()[-3000:]}")


def committed(ray, runs):
    trials = ray.root / runs / "runs" / "small" / "trials"
    return {path.name: path.stat().st_mtime_ns for path in trials.glob("k*")}


def assert_as_undisturbed(ray, runs, process, before):
    """The study succeeds with the tables of the undisturbed one; no committed trial ran again, nothing is left over.

    Returns what it said.
    """
    status, output = finish(ray, process)
    assert status == 0, output[-3000:]
    assert tables(ray.root / runs) == tables(ray.root / "undisturbed")
    assert before.items() <= committed(ray, runs).items()
    assert not list((ray.root / runs).rglob("in_progress/*.pt"))
    assert not list((ray.root / runs).rglob(".partial-*"))
    shutil.rmtree(ray.root / runs)
    return output


@pytest.fixture(scope="module")
def undisturbed(ray):
    """The study on three hosts that nothing happens to."""
    status, output = finish(ray, ray.study("undisturbed"))
    assert status == 0, output[-3000:]


@pytest.fixture(autouse=True)
def _nothing_left(ray):
    """End what a failed test left, or the next study waits behind it."""
    yield
    for pid, command in ray.cluster.running("n1").items():
        if "python -m lbp_ray.tune" in command:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    for pid in ray.trials("n3"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    ray.cluster.cut("n3", healed=True)


@pytest.fixture
def mended(ray):
    """Bring back what a test has taken away from n3."""
    yield
    ray.cluster.cut("n3", healed=True)
    ray.again("n3")


@pytest.mark.usefixtures("undisturbed", "mended")
def test_raylet_killed(ray):
    process, _, _ = begin(ray, "raylet")
    before = committed(ray, "raylet")
    os.kill(ray.find("n3", "raylet/raylet "), signal.SIGKILL)
    assert_as_undisturbed(ray, "raylet", process, before)


@pytest.mark.usefixtures("undisturbed")
def test_driver_killed(ray):
    process, _, _ = begin(ray, "driver")
    os.kill(ray.find("n1", "python -m lbp_ray.tune"), signal.SIGKILL)
    assert process.wait(timeout=30)
    before = committed(ray, "driver")
    assert_as_undisturbed(ray, "driver", ray.study("driver"), before)


@pytest.mark.usefixtures("undisturbed")
def test_partition_of_twenty_seconds_is_waited_out(ray):
    process, _, _ = begin(ray, "short")
    before = committed(ray, "short")
    ray.cluster.cut("n3")
    time.sleep(20)
    ray.cluster.cut("n3", healed=True)
    assert "DiedError" not in assert_as_undisturbed(ray, "short", process, before)


@pytest.mark.usefixtures("undisturbed", "mended")
def test_late_commit_of_a_zombie_changes_nothing(ray):
    """Cut off for 120 s; the trial there stands still until it was run elsewhere, then commits."""
    ray.again("n3", RAY_gcs_rpc_server_reconnect_timeout_s="600")  # a raylet that nobody answers would end after 60 s
    process, zombie, cell = begin(ray, "long")
    before, begun_s = committed(ray, "long"), time.monotonic()
    os.kill(zombie, signal.SIGSTOP)
    ray.cluster.cut("n3")
    every = committed(ray, "undisturbed").keys()
    wait_for(lambda: committed(ray, "long").keys() == every, f"{cell} elsewhere, and all others", ENDS_S)
    elsewhere, trials = committed(ray, "long"), ray.root / "long" / "runs" / "small" / "trials"
    last_ns = trials.stat().st_mtime_ns
    os.kill(zombie, signal.SIGCONT)
    wait_for(lambda: trials.stat().st_mtime_ns != last_ns, "late commit", LOST_NODE_S)
    wait_for(lambda: not list(trials.glob(f".partial-{cell}*-n3-*")), "end of the late commit")
    assert elsewhere.items() <= committed(ray, "long").items()
    time.sleep(max(0.0, begun_s + 120 - time.monotonic()))
    ray.cluster.cut("n3", healed=True)
    assert_as_undisturbed(ray, "long", process, before | elsewhere)


@pytest.mark.usefixtures("undisturbed", "mended")
def test_trial_that_runs_out_of_memory_is_tried_again(ray):
    """The host's control group says that it is full until Ray has ended the trial, and with it what waits for it."""
    memory = "/sys/fs/cgroup/memory.current"
    ray.cluster.on("n3", "mount", "-t", "tmpfs", "tmpfs", "/sys/fs/cgroup")
    for name, value in (("max", 8 * GIB), ("current", GIB), ("stat", "inactive_file 0\nactive_file 0\nanon 1")):
        ray.cluster.on("n3", "sh", "-c", f"echo '{value}' > /sys/fs/cgroup/memory.{name}")
    ray.again("n3")
    process, pid, _ = begin(ray, "memory")
    before = committed(ray, "memory")
    ray.cluster.on("n3", "sh", "-c", f"echo {16 * GIB} > {memory}")
    wait_for(lambda: not Path(f"/proc/{pid}").exists(), "end of the trial that took too much")
    ray.cluster.on("n3", "sh", "-c", f"echo {GIB} > {memory}")
    assert re.search("(begins|started) again", assert_as_undisturbed(ray, "memory", process, before))
    ray.cluster.on("n3", "umount", "/sys/fs/cgroup")


@pytest.mark.usefixtures("undisturbed")
def test_slow_node_is_waited_for(ray):
    """Trials on n3 stand still for three quarters of the time."""
    process, _, _ = begin(ray, "slow")
    before = committed(ray, "slow")
    while process.poll() is None:
        for number, seconds in ((signal.SIGSTOP, 0.75), (signal.SIGCONT, 0.25)):
            for pid in ray.trials("n3"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            time.sleep(seconds)
    assert_as_undisturbed(ray, "slow", process, before)


def test_full_storage_is_said_and_freed_space_is_used(ray, undisturbed):
    full = ray.root / "full"
    full.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o"]
    subprocess.run([*mount, "size=200m", "tmpfs", full], check=True)
    try:
        given = (*STUDY, f"paths.runs={full / 'runs'}", "compute.max_failures=1")
        status, output = run(ray.root, "lbp_ray.tune", *given)
        assert status == 2, output[-3000:]
        assert "No space left on device" in output.splitlines()[-1]
        assert "run the same command again" in output.splitlines()[-1]
        before = committed(ray, "full")
        subprocess.run([*mount, "remount,size=4g", "tmpfs", full], check=True)
        status, output = run(ray.root, "lbp_ray.tune", *given)
        assert status == 0, output[-3000:]
        assert tables(full) == tables(ray.root / "undisturbed")
        assert before.items() <= committed(ray, "full").items()
    finally:
        subprocess.run(["umount", full], check=True)


@pytest.mark.usefixtures("undisturbed")
def test_lost_head_ends_the_study_and_a_new_one_goes_on(ray):
    process, _, _ = begin(ray, "head")
    for words in ("gcs_server", "raylet/raylet "):
        os.kill(ray.find("n1", words), signal.SIGKILL)
    try:
        status, _ = finish(ray, process)
    finally:
        for name in ray.cluster.names:
            ray.again(name)
    assert status == NODE_LOST_STATUS
    before = committed(ray, "head")
    assert_as_undisturbed(ray, "head", ray.study("head"), before)


ASK = """
import json, sys, urllib.error, urllib.request
headers = {"Authorization": f"Bearer {open(sys.argv[1]).read()}"} if len(sys.argv) > 1 else {}
for path, data in (("api/version", None), ("api/jobs/", None), ("api/jobs/", {"entrypoint": "true"})):
    body = json.dumps(data).encode() if data else None
    given = {**headers, "Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:8265/{path}", body, given)
    try:
        print(urllib.request.urlopen(request, timeout=20).status)
    except urllib.error.HTTPError as error:
        print(error.code)
"""


def test_dashboard_and_jobs_want_the_token(ray):
    ask = [*ray.cluster.enter("n1"), sys.executable, "-c", ASK]
    answers = [subprocess.run([*ask, *given], capture_output=True, text=True) for given in ([], [ray.token])]
    assert [answer.stdout.split() for answer in answers] == [["401"] * 3, ["200"] * 3]
    submit = [*ray.cluster.enter("n1"), "ray", "job", "submit", "--address=http://127.0.0.1:8265", "--", "echo", "hi"]
    for mode, status, said in (("disabled", 1, "authentication"), ("token", 0, "succeeded")):
        given = {**ray.environment(), "RAY_AUTH_MODE": mode}
        done = subprocess.run(submit, env=given, capture_output=True, text=True, timeout=120)
        assert (done.returncode, said in done.stdout + done.stderr) == (status, True), done.stderr[-2000:]


def test_token_appears_nowhere(ray, undisturbed):
    token = ray.token.read_text()
    lines = [text for name in ray.cluster.names for text in ray.cluster.running(name).values()]
    assert any("raylet" in line for line in lines)
    assert not [line for line in lines if token in line]
    files = [path for path in ray.cluster.folder.rglob("*") if path.is_file() and path != ray.token]
    assert any(path.name == "gcs_server.out" for path in files)
    assert not [path for path in files if token.encode() in path.read_bytes()]
