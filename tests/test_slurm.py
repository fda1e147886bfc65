"""A real SLURM with two hosts: studies through ``python -m cluster slurm``, their exit codes, and what is left."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from river import LIMIT_S, ROOT, environment, prepare_cohort, result_folder, run, study_arguments, tables
from slurm_hosts import OTHER_USER, cancel_all, closed_folder, missing_requirement, slurm

from preprocess.job import NODE_LOST_STATUS

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing_requirement()), reason=str(missing_requirement())),
]

STUDY = study_arguments("compute.gpus_per_trial=0")
"""The hosts' GPUs are copies of /dev/null."""

SLEEPER = """
import ray, time
ray.init()
@ray.remote(num_gpus=1)
def hold():
    time.sleep(600)
held = [hold.remote() for _ in range(4)]
print("holding", flush=True)
ray.get(held)
"""


MEET = """
import pathlib, ray, time
ray.init()
pathlib.Path("{}").touch()
while not pathlib.Path("{}").exists():
    time.sleep(0.2)
print("sees", ray.cluster_resources()["GPU"], len(ray.nodes()))
time.sleep(5)
"""
"""Ends only if two such jobs run at a time."""


@pytest.fixture(scope="module")
def cluster(module_folder):
    """Two hosts under a controller, and a cohort on storage that they share."""
    prepare_cohort(module_folder)
    with slurm(2) as running:
        running.root, running.launched = module_folder, []
        yield running


@pytest.fixture(autouse=True)
def _no_job_left(cluster):
    """End what a failed test left, or the next one waits behind it."""
    yield
    while cluster.launched:
        process = cluster.launched.pop()
        process.kill()
        process.communicate()
    cancel_all(cluster)


def launch(cluster, *options, user=0, **extra):
    """Start ``python -m cluster slurm`` on two nodes, as on a login node."""
    if user:
        home = cluster.folder / "shared" / str(user)
        home.mkdir()
        os.chown(home, user, user)
        extra |= {"HOME": str(home), "LBP_RAY_ROOT": str(home)}
    other = cluster.as_user("n1", user) if user else []
    asked = ["--nodes", "2", "--gpus-per-node", "2", "--cpus-per-task", "2", "--mem", "4G"]
    process = subprocess.Popen(
        [*other, sys.executable, "-m", "cluster", "slurm", *asked, *options],
        cwd=ROOT,
        env=environment(cluster.root, **cluster.environment) | extra,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    cluster.launched.append(process)
    return process


def finish(process):
    output, _ = process.communicate(timeout=LIMIT_S)
    return process.returncode, output


def job_of(cluster):
    (job,) = set(cluster.ask("squeue", "-h", "-o", "%i").split())
    return job


def wait_for(condition, limit_s=LIMIT_S):
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.5)


def log_of(cluster, job):
    file = cluster.root / "slurm" / f"{job}.log"
    return file.read_text() if file.is_file() else ""


def processes(cluster, name):
    """Return the command lines on one host, without its own daemon and the question itself."""
    lines = cluster.on(name, "ps", "ax", "-o", "args=").splitlines()
    return sorted(line for line in lines if not re.search(r"^ps |slurmd|^bash -c", line))


def left(cluster):
    """Return every process, listening port and temporary file of the hosts."""
    found = {}
    for name in cluster.names:
        ports = cluster.on(name, "ss", "-H", "-l", "-t", "-u", "-n").splitlines()
        shared = cluster.on(name, "find", "/dev/shm", "-mindepth", "1").splitlines()
        files = [str(path) for path in cluster.temporary(name).rglob("*")]
        found[name] = processes(cluster, name), [line.split()[4] for line in ports], shared, files
    return found


@pytest.fixture(scope="module")
def study(cluster):
    """Run a small study, watching processes meanwhile."""
    before = left(cluster)
    process = launch(
        cluster,
        *("--time", "60", "--fetch", str(cluster.root / "fetched")),
        *("--", "python", "-m", "lbp_ray.tune", *STUDY),
    )
    seen, token = {name: set() for name in cluster.names}, ""
    while process.poll() is None:
        for name in cluster.names:
            seen[name] |= set(processes(cluster, name))
        for file in cluster.temporary("n1").glob("lbp-*.b/token"):
            assert file.stat().st_mode & 0o777 == 0o600
            assert file.parent.stat().st_mode & 0o777 == 0o700
            token = file.read_text()
        time.sleep(1)
    status, output = finish(process)
    return SimpleNamespace(before=before, after=left(cluster), seen=seen, token=token, status=status, output=output)


def test_study_succeeds_and_its_report_is_fetched(cluster, study):
    assert study.status == 0, study.output[-3000:]
    assert "4 GPU(s) stay idle; auto would use them" in study.output
    assert "| 4 done, 0 failed" in study.output
    fetched = cluster.root / "fetched" / "report.html"
    assert fetched.read_bytes() == (result_folder(cluster.root) / "report" / "report.html").read_bytes()


def test_trials_ran_on_both_nodes(cluster, study):
    for name in cluster.names:
        assert any(re.match(r"ray::k\d-fold\d\d-seed\d", line) for line in study.seen[name]), study.seen[name]


def test_tables_are_those_of_one_machine(cluster, study, tmp_path):
    status, output = run(cluster.root, "lbp_ray.tune", *STUDY, f"paths.runs={tmp_path / 'runs'}")
    assert status == 0, output[-3000:]
    assert tables(tmp_path) == tables(cluster.root)


def test_token_appears_nowhere(cluster, study):
    assert len(study.token) == 64
    texts = [path.read_text(errors="replace") for path in (cluster.root / "slurm").iterdir()]
    texts += [line for lines in study.seen.values() for line in lines]
    texts += [path.read_text(errors="replace") for path in result_folder(cluster.root).rglob("*") if path.is_file()]
    assert not [text for text in texts if study.token in text]


def test_finished_study_leaves_nothing(study):
    assert study.after == study.before


def test_exit_code_of_the_command_is_the_jobs(cluster):
    left_by_killed = cluster.temporary("n1") / "lbp-99999.0"
    left_by_killed.mkdir()
    status, output = finish(launch(cluster, "--time", "60", "--", "python", "-c", "raise SystemExit(7)"))
    assert status == 7, output
    assert not left_by_killed.exists()
    assert "FAILED on n[1-2], exit status 7" in output


def test_ray_that_does_not_start_fails_the_job(cluster):
    before = left(cluster)
    status, output = finish(launch(cluster, "--time", "60", "--", "true", RAY_START_HOOK="absent.module"))
    assert status == 1, output
    assert "No module named 'absent'" in output
    assert left(cluster) == before


def test_scancel_leaves_nothing(cluster):
    before = left(cluster)
    process = launch(cluster, "--time", "60", "--", "python", "-c", SLEEPER)
    wait_for(lambda: "submitted" in (process.stdout.readline()))
    job = job_of(cluster)
    wait_for(
        lambda: "holding" in log_of(cluster, job) and any("ray::hold" in line for line in processes(cluster, "n2"))
    )
    assert left(cluster) != before
    cluster.ask("scancel", job)
    status, output = finish(process)
    assert status == 143
    assert "CANCELLED" in output
    assert left(cluster) == before


@pytest.mark.skipif(bool(closed_folder(ROOT)), reason="other users cannot read the project's folder")
def test_jobs_of_two_users_share_nodes_without_meeting(cluster):
    half = ("--cpus-per-task", "1", "--gpus-per-node", "1", "--mem", "2G", "--time", "60")
    folder = cluster.folder / "shared"
    first, second = (
        launch(cluster, *half, "--", "python", "-c", MEET.format(folder / mine, folder / other), user=user)
        for mine, other, user in (("one", "two", 0), ("two", "one", OTHER_USER))
    )
    for status, output in (finish(first), finish(second)):
        assert status == 0, output
        assert "sees 2.0 2" in output
    assert {(folder / name).stat().st_uid for name in ("one", "two")} == {0, OTHER_USER}


LOOK = "import ray; ray.init(); print('sees', sorted(n['Resources'].get('GPU', 0) for n in ray.nodes()))"


def test_nodes_of_two_kinds_are_one_cluster(cluster):
    kinds = ("--nodes", "1", "--gpus-per-node", "2", "--also", "nodes=1,gpus=1,cpus=1,memory=2G")
    before = left(cluster)
    status, output = finish(launch(cluster, *kinds, "--time", "60", "--", "python", "-c", LOOK))
    assert status == 0, output
    assert "sees [1.0, 2.0]" in output
    offered = re.findall(r"^ready: (n\d): (\d) CPUs, (\d) GPUs, ([\d.]+) GiB", output, flags=re.MULTILINE)
    assert [line[:3] for line in sorted(offered)] == [("n1", "2", "2"), ("n2", "1", "1")]
    heaps = [float(line[3]) for line in sorted(offered)]
    assert 0.6 * 4 < heaps[0] < 4
    assert 0.6 * 2 < heaps[1] < 2
    assert left(cluster) == before


TASK = """
import pathlib, sys, time
mark = pathlib.Path("{root}", "mark{{array}}")
first = not mark.exists()
mark.touch()
print("index", {{array}}, flush=True)
sys.exit({status} if first and {{array}} == 5 else 0)
"""


def test_every_task_of_an_array_has_its_index_and_is_requeued_alone(cluster, tmp_path):
    one = ("--nodes", "1", "--array", "3,5", "--time", "60", "--name", "array")
    task = TASK.format(root=tmp_path, status=NODE_LOST_STATUS)
    status, output = finish(launch(cluster, *one, "--", "python", "-c", task))
    assert status == 0, output
    logs = sorted((cluster.root / "slurm").glob("*_*.log"))
    told = [re.findall(r"^index (\d)$", path.read_text(), flags=re.MULTILINE) for path in logs]
    assert told == [["3"], ["5", "5"]]


def test_container_wraps_ray_and_the_command(cluster, tmp_path):
    program, image = tmp_path / "apptainer", tmp_path / "image.sif"
    program.write_text(
        f"""#!/bin/bash\necho "$@" >> {tmp_path}/calls\nwhile [ "$1" != {image} ]; do shift; done\nexec "${{@:2}}"\n"""
    )
    program.chmod(0o700)
    path = f"{tmp_path}:{environment(cluster.root)['PATH']}"
    inside = ("--container", str(image), "--time", "60", "--", "python", "-c", LOOK)
    status, output = finish(launch(cluster, *inside, PATH=path))
    assert status == 0, output
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [sum(f"{image} {word}" in call for call in calls) for word in ("ray start", "python")] == [2, 2]
    assert all(call.startswith(f"exec --nv --bind={ROOT} --bind={cluster.root}") for call in calls)


@pytest.fixture
def image(tmp_path):
    """An Apptainer image that is a folder: what it binds of this machine, and the search path inside.

    Returns its folder and the variables that bind what it lacks.
    """
    folder = tmp_path / "image"
    for name in ("usr", "etc", "proc", "sys", "dev", "tmp", "var/tmp", "root", ".singularity.d/env"):
        (folder / name).mkdir(parents=True)
    for link in (path for path in Path("/").iterdir() if path.is_symlink() and path.readlink().parts[0] == "usr"):
        (folder / link.name).symlink_to(link.readlink())
    shutil.copy("/etc/nsswitch.conf", folder / "etc")
    search = f"export PATH={Path(sys.executable).parent}:/usr/bin:/bin\n"
    (folder / ".singularity.d" / "env" / "90-environment.sh").write_text(search)
    return folder, {"APPTAINER_BIND": f"/usr,{sys.base_prefix},{sys.prefix}"}


@pytest.mark.skipif(shutil.which("apptainer") is None, reason="needs Apptainer, which Debian 12 has no package of")
def test_apptainer_runs_ray_and_the_command(cluster, image):
    folder, binds = image
    before = left(cluster)
    look = f"import os; print('inside', os.environ['APPTAINER_CONTAINER']); {LOOK}"
    inside = ("--container", str(folder), "--time", "60", "--", "python", "-c", look)
    status, output = finish(launch(cluster, *inside, **binds))
    assert status == 0, output
    assert f"inside {folder}" in output
    assert "sees [2.0, 2.0]" in output
    assert left(cluster) == before


def test_urgent_job_takes_the_nodes_and_the_study_goes_on_after_it(cluster, tmp_path):
    long = (*STUDY, "recipe.unfrozen_epochs=8", f"paths.runs={tmp_path / 'runs'}")
    process = launch(cluster, "--time", "60", "--", "python", "-m", "lbp_ray.tune", *long)
    wait_for(lambda: list((tmp_path / "runs" / "small" / "in_progress").glob("k*.pt")))
    cluster.ask("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 5")
    status, output = finish(process)
    assert status == 0, output[-3000:]
    assert re.search(r"RUNNING .*requeued \d time", output)
    done = re.findall(r"^(k\d-fold\d\d-seed\d) done after", output, flags=re.MULTILINE)
    assert sorted(done) == sorted(set(done))
    assert (result_folder(tmp_path) / "report" / "report.html").is_file()


def test_time_limit_requeues_and_the_rerun_runs_only_what_is_missing(cluster, tmp_path):
    # SLURM looks at time limits twice a minute: the signal comes between 75 and 105 seconds after the start.
    limits = ("--time", "2", "--stop-before", "15")
    long = (*STUDY, "recipe.unfrozen_epochs=8", f"paths.runs={tmp_path / 'runs'}")
    process = launch(cluster, *limits, "--", "python", "-m", "lbp_ray.tune", *long)
    wait_for(lambda: "submitted" in process.stdout.readline())
    job = job_of(cluster)
    wait_for(lambda: "Restarts=1" in cluster.ask("scontrol", "show", "job", job))
    cluster.ask("scontrol", "update", f"JobId={job}", "TimeLimit=30")  # a busy machine would need many more runs
    status, output = finish(process)
    assert status == 0, output[-3000:]
    assert "the time limit is near" in output
    assert re.search(r"RUNNING .*requeued \d+ time", output)
    done = re.findall(r"^(k\d-fold\d\d-seed\d) done after", output, flags=re.MULTILINE)
    assert sorted(done) == sorted(set(done))
    assert (result_folder(tmp_path) / "report" / "report.html").is_file()


def test_lost_node_leaves_the_job_to_the_others(cluster, study, tmp_path):
    """The last test: the node stays lost."""
    process = launch(
        cluster, "--time", "30", "--", "python", "-m", "lbp_ray.tune", *STUDY, f"paths.runs={tmp_path / 'runs'}"
    )
    wait_for(lambda: any(re.match(r"ray::k\d-fold", line) for line in processes(cluster, "n2")))
    cluster.kill("n2")
    status, output = finish(process)
    assert status == 0, output[-3000:]
    assert "Node failure on n2" in output
    assert "requeued" not in output
    assert tables(tmp_path) == tables(cluster.root)
