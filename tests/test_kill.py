"""kill -9 at every commit point and at random moments, then the same command: tables as if nothing had happened."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import test_segment_run
from river import LIMIT_S, ROOT, expect, prepare_cohort, run, start, study_arguments, tables

from preprocess.job import NODE_LOST_STATUS

if TYPE_CHECKING:
    from collections.abc import Iterable

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("kill")]

STUDY = study_arguments("recipe.frozen_epochs=2", "slice_counts=[1]", "seeds=[0,1]", "evaluation.permutations=0")

DRIVER_POINTS = [
    f"{stage}:{side}-rename" for stage in ("crops", "split", "features", "result") for side in ("before", "after")
]
WORKER_POINTS = ["features:shard", "trial:checkpoint", "trial:before-rename", "trial:after-rename"]
NUM_MOMENTS = 20


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Root of a cohort with a finished study, and how long the study took, in seconds."""
    root = tmp_path_factory.mktemp("kill")
    prepare_cohort(root)
    begun = time.monotonic()
    expect(root, "lbp_ray.tune", *STUDY)
    return root, time.monotonic() - begun


def fresh_runs(root: Path, folder: Path) -> str:
    """Return the override that sends a study's runs to an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
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
@pytest.mark.parametrize("point", [*DRIVER_POINTS, *WORKER_POINTS])
def test_kill_at_every_commit_point(undisturbed, tmp_path, point):
    root, _ = undisturbed
    folder = tmp_path / "runs"
    runs = fresh_runs(root, folder)
    folder.mkdir(exist_ok=True)
    status, output = run(root, "lbp_ray.tune", *STUDY, runs, LBP_RAY_KILL_AT=f"{point}@{folder / 'marker'}")
    assert (folder / "marker").exists(), "the commit point was never reached"
    if point in DRIVER_POINTS:
        assert status == -signal.SIGKILL
    else:
        assert status == 0, output[-2000:]
        assert tables(folder) == tables(root)
    finish_and_compare(root, folder, runs)


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


def wait_until_gone(pids: Iterable[int], limit_s: float = 60.0) -> None:
    """Wait for the orphans of a killed driver: one may still commit its trial, which would not be the rerun's."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end and any(Path(f"/proc/{pid}").exists() for pid in pids):
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(NUM_MOMENTS))
def test_kill_at_a_random_moment(undisturbed, tmp_path, moment):
    """Even moments kill the driver, odd ones a Ray worker, at a seeded share of the undisturbed run's duration."""
    root, duration_s = undisturbed
    runs = fresh_runs(root, tmp_path / "runs")
    chance = random.Random(moment)
    process = start(root, "lbp_ray.tune", *STUDY, runs)
    time.sleep(chance.uniform(0.05, 0.95) * duration_s)
    below = descendants(process.pid)
    if moment % 2 == 0:
        process.kill()
    else:
        workers = [pid for pid, command in below.items() if command.startswith("ray::")]
        for pid in chance.sample(sorted(workers), min(1, len(workers))):
            os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=LIMIT_S)
    wait_until_gone(below)
    finish_and_compare(root, tmp_path / "runs", runs)


@pytest.mark.slow
def test_a_lost_node_ends_the_driver_with_what_to_do(undisturbed, tmp_path):
    """Ray's agents take the whole node with them; Tune alone would wait for ever."""
    root, _ = undisturbed
    runs = fresh_runs(root, tmp_path / "runs")
    process = start(root, "lbp_ray.tune", *STUDY, runs)
    end = time.monotonic() + 300
    while not list((tmp_path / "runs").rglob("in_progress/*.pt")) and time.monotonic() < end:
        time.sleep(0.1)  # until a trial is under way
    below = descendants(process.pid)
    agents = [pid for pid, command in below.items() if command == "ray::RuntimeEnvAgent"]
    os.kill(agents[0], signal.SIGKILL)
    output, _ = process.communicate(timeout=LIMIT_S)
    wait_until_gone(below)
    assert process.returncode == NODE_LOST_STATUS
    assert "the Ray node of this machine has died; run the same command again" in output
    finish_and_compare(root, tmp_path / "runs", runs)
