"""Two studies at once on one host, of two users and two jobs: they share neither a port nor a file, nor an end.

The batch steps are real, srun is a stand-in that runs its command on the same host.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hosts import OTHER_USER, closed_folder, hosts, missing_requirement, wait_for
from river import LIMIT_S, ROOT, environment, prepare_cohort, study_arguments, tables

from cluster.slurm.allocation import FIRST_PORT, LAST_PORT, PORTS

pytestmark = [
    pytest.mark.multihost,
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing_requirement()), reason=str(missing_requirement())),
    pytest.mark.skipif(bool(closed_folder(ROOT)), reason="other users cannot read the project's folder"),
]

JOBS = {17: 0, 17 + (LAST_PORT + 1 - FIRST_PORT) // PORTS: OTHER_USER}
"""Number of each job → its user; by their numbers both would take the same ports."""

PROGRAMS = {
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
    "scontrol": "echo n1",
}
"""Stand-ins of SLURM's programs."""

EPOCHS = {17: 2, 4017: 8}
"""Epochs of all weights: the first study ends while the second runs."""


def study(epochs):
    given = ("recipe.frozen_epochs=2", f"recipe.unfrozen_epochs={epochs}", "slice_counts=[1]")
    return study_arguments(*given, "evaluation.permutations=0", "compute.gpus_per_trial=0")


def launch(cluster, job, user, runs="runs"):
    """Start a study as the batch step of a job does, by its user; its output goes to a file."""
    root, programs = cluster.shared / str(job), cluster.shared / "programs"
    slurm = {"SLURM_JOB_ID": str(job), "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_CPUS_PER_NODE": "1"}
    slurm |= {"SLURM_CPUS_ON_NODE": "1", "SLURM_MEM_PER_NODE": "4000"}
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    given = environment(root, PATH=path, HOME=str(root), TMPDIR=str(cluster.folder / "t"), **slurm)
    step = [sys.executable, "-m", "cluster.slurm.allocation", "--gpus=0", "--", "python", "-m", "lbp_ray.tune"]
    with (cluster.folder / "log" / f"{job}.out").open("wb") as log:
        return subprocess.Popen(
            [*cluster.as_user("n1", user), *step, *study(EPOCHS[job]), f"paths.runs={root / runs}"],
            env=given,
            cwd=ROOT,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
        )


def make_roots(cluster):
    """Give every job a root of its own with the same cohort, and the stand-ins."""
    (cluster.shared / "programs").mkdir()
    for name, text in PROGRAMS.items():
        (cluster.shared / "programs" / name).write_text(f"#!/bin/sh\n{text}\n")
        (cluster.shared / "programs" / name).chmod(0o755)
    prepare_cohort(cluster.shared / "17")
    for job in list(JOBS)[1:]:
        shutil.copytree(cluster.shared / "17", cluster.shared / str(job))
        subprocess.run(["chown", "-R", str(JOBS[job]), cluster.shared / str(job)], check=True)


def files(cluster):
    return sorted(str(path) for path in (*cluster.temporary("n1").iterdir(), *cluster.shared.rglob(".partial-*")))


def owners(cluster, words):
    """Return the users of the host's processes whose command line has these words."""
    return {Path(f"/proc/{pid}").stat().st_uid for pid, text in cluster.running("n1").items() if words in text}


@pytest.fixture(scope="module")
def both():
    """Two studies whose time together was watched, and what each has left."""
    with hosts(1) as cluster:
        make_roots(cluster)
        before = files(cluster), cluster.on("n1", "ls", "/dev/shm"), len(cluster.running("n1"))
        started, tokens, lines, at_once = {}, {}, set(), False
        for job, user in JOBS.items():
            started[job] = launch(cluster, job, user)
            log = cluster.folder / "log" / f"{job}.out"
            wait_for(lambda log=log: "ready: n1" in log.read_text(), f"Ray of {job}; see {log}")
        token = str(cluster.folder / "t" / "lbp-17.b" / "token")
        peek = subprocess.run([*cluster.as_user("n1", OTHER_USER), "cat", token], capture_output=True, text=True)
        while started[17].poll() is None:
            lines |= set(cluster.running("n1").values())
            at_once = at_once or owners(cluster, "raylet/raylet ") == set(JOBS.values())
            for job in JOBS:
                for file in cluster.temporary("n1").glob(f"lbp-{job}.b/token"):
                    tokens[job] = file.read_text()
            time.sleep(0.2)
        first_alone = started[4017].poll(), owners(cluster, "raylet/raylet ")
        statuses = {job: process.wait(timeout=LIMIT_S) for job, process in started.items()}
        outputs = {job: (cluster.folder / "log" / f"{job}.out").read_text() for job in JOBS}
        after = files(cluster), cluster.on("n1", "ls", "/dev/shm"), len(cluster.running("n1"))
        yield SimpleNamespace(**locals())


def test_both_succeed_and_neither_stops_the_other(both):
    assert both.statuses == dict.fromkeys(JOBS, 0), "\n".join(text[-2000:] for text in both.outputs.values())
    assert both.at_once
    assert both.first_alone == (None, {OTHER_USER})


def test_tables_are_those_of_a_study_alone(both):
    alone = launch(both.cluster, 4017, OTHER_USER, "alone/runs")
    assert alone.wait(timeout=LIMIT_S) == 0
    root = both.cluster.shared / "4017"
    assert tables(root) == tables(root / "alone")


def test_nothing_is_left_of_either(both):
    assert both.after == both.before


def test_tokens_differ_and_appear_nowhere(both):
    assert len(set(both.tokens.values())) == 2
    texts = [line.encode() for line in both.lines] + [text.encode() for text in both.outputs.values()]
    texts += [path.read_bytes() for path in both.cluster.folder.rglob("*") if path.is_file()]
    assert not [text[:200] for text in texts for token in both.tokens.values() if token.encode() in text]


def test_other_user_cannot_read_the_token(both):
    assert both.peek.returncode
    assert "Permission denied" in both.peek.stderr


def test_ports_differ(both):
    ports = [text.split("ssh -L ")[1].split(":")[0] for text in both.outputs.values()]
    assert len(set(ports)) == 2
