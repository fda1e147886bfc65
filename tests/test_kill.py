"""kill -9 at every commit point and at random moments, then the same command: tables as if nothing had happened."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import test_segment_run
from river import LIMIT_S, ROOT, expect, prepare_cohort, run, start, study_arguments, tables

from preprocess.job import NODE_LOST_STATUS

pytestmark = pytest.mark.ray

STUDY = study_arguments("recipe.frozen_epochs=2", "slice_counts=[1]", "seeds=[0,1]", "evaluation.permutations=0")

DRIVER_POINTS = [
    f"{stage}:{side}-rename"
    for stage in ("split", "crops", "duplicates", "features", "result")
    for side in ("before", "after")
]
WORKER_POINTS = ["features:shard", "trial:checkpoint", "trial:before-rename", "trial:after-rename"]
NUM_MOMENTS = 20


@pytest.fixture(scope="module")
def undisturbed(module_folder):
    """Root of a cohort with a finished study, and how long the study took, in seconds."""
    prepare_cohort(module_folder)
    begun = time.monotonic()
    expect(module_folder, "lbp_ray.tune", *STUDY)
    return module_folder, time.monotonic() - begun


def fresh_runs(root: Path, folder: Path) -> str:
    """Return the override that sends a study's runs to an empty folder."""
    shutil.rmtree(folder / "runs", ignore_errors=True)
    return f"paths.runs={folder / 'runs'}"


def committed_trials(folder: Path) -> dict[str, int]:
    trials = folder / "runs" / "small" / "trials"
    return {path.name: path.stat().st_mtime_ns for path in trials.glob("k*")} if trials.is_dir() else {}


def finish_and_compare(root: Path, folder: Path, runs: str) -> None:
    before = committed_trials(folder)
    output = expect(root, "lbp_ray.tune", *STUDY, runs)
    after = committed_trials(folder)
    assert before.items() <= after.items(), "a committed trial was run again"
    assert output.count("done after") == len(after) - len(before)
    assert tables(folder) == tables(root)
    assert not list((folder / "runs").rglob("in_progress/*.pt"))


def test_commit_points_are_all_known():
    source = "\n".join(path.read_text() for path in (ROOT / "lbp_ray").rglob("*.py"))
    named = set(re.findall(r'committed_directory\([^)]*point="(\w+)"', source))
    single = set(re.findall(r'commit_point\("([\w:-]+)"\)', source)) - {"phantom"}
    expected = {f"{name}:{side}-rename" for name in named - {"phantom"} for side in ("before", "after")} | single
    assert expected == {*DRIVER_POINTS, *WORKER_POINTS, *test_segment_run.POINTS}


@pytest.mark.slow
def test_kill_of_the_driver_at_every_commit_point(undisturbed, tmp_path):
    """Killed at one point after the other; every run goes on where the kill before left it."""
    root, _ = undisturbed
    runs = fresh_runs(root, tmp_path)
    for number, point in enumerate(DRIVER_POINTS):
        before, marker = committed_trials(tmp_path), tmp_path / f"marker{number}"
        status, output = run(root, "lbp_ray.tune", *STUDY, runs, LBP_RAY_KILL_AT=f"{point}@{marker}")
        assert marker.exists(), f"{point} was never reached: {output[-2000:]}"
        assert status == -signal.SIGKILL, point
        assert before.items() <= committed_trials(tmp_path).items(), f"{point}: a committed trial was run again"
    finish_and_compare(root, tmp_path, runs)


@pytest.mark.slow
@pytest.mark.parametrize("point", WORKER_POINTS)
def test_kill_of_a_worker_at_every_commit_point(undisturbed, tmp_path, point):
    root, _ = undisturbed
    runs = fresh_runs(root, tmp_path)
    status, output = run(root, "lbp_ray.tune", *STUDY, runs, LBP_RAY_KILL_AT=f"{point}@{tmp_path / 'marker'}")
    assert (tmp_path / "marker").exists(), "the commit point was never reached"
    assert status == 0, output[-2000:]
    assert tables(tmp_path) == tables(root)
    assert not list((tmp_path / "runs").rglob("in_progress/*.pt"))


def descendants(pid: int) -> dict[int, str]:
    """Return process id → command line of everything below a process."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
    found: dict[int, str] = {}
    frontier = {pid}
    while frontier:
        frontier = {child for child, parent in parents.items() if parent in frontier}
        for child in frontier:
            try:
                found[child] = Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ").strip()
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Processes of Ray that stay when a driver is killed; they commit nothing."""


def end_orphans(below: dict[int, str], limit_s: float = 60.0) -> None:
    """Wait for the orphans of a killed driver, one of which may still commit its trial, and kill Ray's agents."""

    def left() -> dict[int, str]:
        return {pid: command for pid, command in below.items() if is_running(pid)}

    end = time.monotonic() + limit_s
    while time.monotonic() < end and any(not command.startswith(AGENTS) for command in left().values()):
        time.sleep(0.2)
    for pid in left():
        kill(pid)


def is_running(pid: int) -> bool:
    """Tell whether a process is there and has not ended (one that nobody waits for stays as a zombie)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it may have ended meanwhile
        os.kill(pid, signal.SIGKILL)


def wait_for_checkpoint(folder: Path) -> list[Path]:
    """Wait until a trial is under way; return the checkpoints of those that are."""
    end = time.monotonic() + LIMIT_S
    while not (kept := list((folder / "runs" / "small" / "in_progress").glob("*.pt"))):
        assert time.monotonic() < end, "no trial has left a checkpoint"
        time.sleep(0.01)
    return kept


@pytest.mark.slow
@pytest.mark.parametrize("series", range(NUM_MOMENTS // 4))
def test_kills_at_four_random_moments(undisturbed, tmp_path, series):
    """Of a Ray worker and then of the driver, twice, at seeded shares of the undisturbed run's duration.

    The second run goes on where the first was killed, and has less left to do.
    """
    root, duration_s = undisturbed
    runs = fresh_runs(root, tmp_path / "runs")
    chance = random.Random(series)
    for latest in (0.95, 0.6):
        first_s, second_s = sorted(chance.uniform(0.05, latest) * duration_s for _ in range(2))
        process = start(root, "lbp_ray.tune", *STUDY, runs)
        time.sleep(first_s)
        workers = [pid for pid, command in descendants(process.pid).items() if command.startswith("ray::")]
        for pid in chance.sample(sorted(workers), min(1, len(workers))):
            kill(pid)
        time.sleep(second_s - first_s)
        below = descendants(process.pid)
        process.kill()
        process.communicate(timeout=LIMIT_S)
        end_orphans(below)
    finish_and_compare(root, tmp_path / "runs", runs)


@pytest.mark.slow
def test_an_interrupted_study_keeps_its_checkpoints(undisturbed, tmp_path):
    """Ctrl-C, which Tune takes for an end without errors."""
    root, _ = undisturbed
    runs = fresh_runs(root, tmp_path / "runs")
    process = start(root, "lbp_ray.tune", *STUDY, runs)
    kept = wait_for_checkpoint(tmp_path / "runs")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 2, output[-2000:]
    assert "run the same command again to run only what is missing" in output
    committed = committed_trials(tmp_path / "runs")
    assert all(path.exists() or any(name.startswith(path.stem) for name in committed) for path in kept)
    finish_and_compare(root, tmp_path / "runs", runs)


@pytest.mark.slow
def test_a_lost_node_ends_the_driver_with_what_to_do(undisturbed, tmp_path):
    """Ray's agents take the whole node with them; Tune alone would wait for ever."""
    root, _ = undisturbed
    runs = fresh_runs(root, tmp_path / "runs")
    process = start(root, "lbp_ray.tune", *STUDY, runs)
    wait_for_checkpoint(tmp_path / "runs")
    below = descendants(process.pid)
    agents = [pid for pid, command in below.items() if command == "ray::RuntimeEnvAgent"]
    kill(agents[0])
    output, _ = process.communicate(timeout=LIMIT_S)
    end_orphans(below)
    assert process.returncode == NODE_LOST_STATUS
    assert "Ray node or the cluster's head has died; run the same command again" in output
    finish_and_compare(root, tmp_path / "runs", runs)
