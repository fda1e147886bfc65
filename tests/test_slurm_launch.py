"""What a login node does: reads command lines, jobs and logs, without SLURM."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from cluster.__main__ import main
from cluster.slurm import command, launch

RECORD = (
    "JobId=12 JobName=lbp-ray UserId=x(1) JobState=FAILED Reason=NonZeroExitCode Dependency=(null) Restarts=2 "
    "ExitCode=7:0 RunTime=00:00:11 NodeList=n[1-2] StdOut=/shared/my study/slurm/12.log Power="
)


def test_record_of_a_failed_job():
    (record,) = launch.read_records(f"{RECORD}\n\n")
    assert (record.job, record.state, record.status, record.restarts) == ("12", "FAILED", 7, 2)
    assert record.log == Path("/shared/my study/slurm/12.log")
    assert launch.describe(record) == "job 12: FAILED on n[1-2], requeued 2 time(s), exit status 7"


@pytest.mark.parametrize(
    ("state", "code", "status"),
    [("COMPLETED", "0:0", 0), ("CANCELLED", "0:15", 143), ("TIMEOUT", "0:0", 1), ("FAILED", "75:0", 75)],
)
def test_exit_status_of_an_end(state, code, status):
    (record,) = launch.read_records(RECORD.replace("FAILED", state).replace("7:0", code))
    assert record.status == status


def test_only_the_first_component_of_a_heterogeneous_job_counts():
    first, second = f"{RECORD} HetJobId=12 HetJobOffset=0", RECORD.replace("=12 ", "=13 ") + " HetJobOffset=1"
    assert [record.job for record in launch.read_records(f"{first}\n{second}")] == ["12"]


def test_a_busy_controller_is_asked_again(monkeypatch, capsys):
    answers = iter([RECORD.replace("FAILED", "RUNNING"), None, RECORD])

    def ask(*_):
        if (answer := next(answers)) is None:
            raise launch.SlurmError("timed out")
        return answer

    monkeypatch.setattr(launch, "ask", ask)
    monkeypatch.setattr(launch.time, "sleep", lambda _: None)
    assert launch.follow("12") == (7, None)
    assert capsys.readouterr().out.splitlines()[-1].startswith("job 12: FAILED")


def test_end_that_the_controller_forgets_is_remembered(monkeypatch):
    task = RECORD.replace("JobId=12", "JobId=12 ArrayJobId=12 ArrayTaskId=0")
    other = RECORD.replace("JobId=12", "JobId=13 ArrayJobId=12 ArrayTaskId=1").replace("7:0", "0:0")
    running, done = other.replace("FAILED", "RUNNING"), other.replace("FAILED", "COMPLETED")
    answers = iter([f"{task}\n{running}", running, done])
    monkeypatch.setattr(launch, "ask", lambda *_: next(answers))
    monkeypatch.setattr(launch.time, "sleep", lambda _: None)
    assert launch.follow("12") == (7, None)


def test_waiting_tasks_of_an_array_are_not_waited_for_when_they_run(monkeypatch):
    waiting = RECORD.replace("JobId=12", "JobId=12 ArrayJobId=12 ArrayTaskId=0-1%1").replace("FAILED", "PENDING")
    tasks = [RECORD.replace("JobId=12", f"JobId={13 - n} ArrayJobId=12 ArrayTaskId={n}") for n in (0, 1)]
    answers = iter([waiting, "\n".join(tasks).replace("FAILED", "COMPLETED").replace("7:0", "0:0")])
    monkeypatch.setattr(launch, "ask", lambda *_: next(answers))
    monkeypatch.setattr(launch.time, "sleep", lambda _: None)
    assert launch.follow("12") == (0, None)


ACCOUNTS = "12_0|FAILED|7:0\n12_1|COMPLETED|0:0\n14+0|CANCELLED by 1000|0:15\n14+1|CANCELLED by 1000|0:0\n"


def test_accounting_tells_of_a_job_that_the_controller_has_forgotten(monkeypatch):
    asked = []

    def ask(*words):
        asked.append(words[0])
        if words[0] == "scontrol":
            raise launch.SlurmError("slurm_load_jobs error: Invalid job id specified")
        return ACCOUNTS

    monkeypatch.setattr(launch, "ask", ask)
    assert launch.follow("12") == (143, None)
    assert asked == ["scontrol", "sacct"]
    assert [(record.job, record.status) for record in launch.read_accounts(ACCOUNTS)] == [
        ("12_0", 7),
        ("12_1", 0),
        ("14", 143),
    ]


def test_end_of_a_followed_job_that_the_controller_has_forgotten_is_accounted_for(monkeypatch, tmp_path, capsys):
    log = tmp_path / "12.log"
    running = RECORD.replace("FAILED", "RUNNING").replace("/shared/my study/slurm/12.log", str(log))

    def ask(*words):
        if words[0] == "sacct":
            return "12|COMPLETED|0:0\n"
        if log.exists():
            raise launch.SlurmError("slurm_load_jobs error: Invalid job id specified")
        return running

    monkeypatch.setattr(launch, "ask", ask)
    monkeypatch.setattr(launch.time, "sleep", lambda _: log.write_text("report: /shared/report.html\n"))
    assert launch.follow("12") == (0, Path("/shared/report.html"))
    assert "job 12: COMPLETED on n[1-2]" in capsys.readouterr().out


def test_job_that_nobody_knows_is_an_error(monkeypatch):
    def ask(*_):
        raise launch.SlurmError("slurm_load_jobs error: Invalid job id specified")

    monkeypatch.setattr(launch, "ask", ask)
    with pytest.raises(launch.SlurmError, match="sacct does not know it either"):
        launch.follow("12")


SBATCH = """#!/bin/sh
echo "$SLURM_CPU_BIND,$SLURM_CONF" > "$0.environment"
[ -s "$2" ] || exit 1
grep -q refused "$2" && { echo no such partition >&2; exit 1; }
echo "77;cluster"
"""


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    program = tmp_path / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text(SBATCH)
    program.chmod(0o700)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    return program


def test_text_is_kept_by_the_jobs_number(sbatch, tmp_path):
    assert launch.submit("text", tmp_path / "logs") == "77"
    assert [(path.name, path.read_text()) for path in (tmp_path / "logs").iterdir()] == [("77.sbatch", "text")]


def test_refused_job_leaves_no_text(sbatch, tmp_path):
    with pytest.raises(launch.SlurmError, match="no such partition"):
        launch.submit("refused", tmp_path / "logs")
    assert not list((tmp_path / "logs").iterdir())


def test_folder_of_logs_that_cannot_be_written_is_explained(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(launch.SlurmError, match="give another as --logs"):
        launch.submit("text", tmp_path / "file" / "logs")


def test_job_is_submitted_without_the_variables_of_an_outer_job(sbatch, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_CPU_BIND", "quiet,mask_cpu:0x1")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    launch.submit("text", tmp_path / "logs")
    assert Path(f"{sbatch}.environment").read_text() == ",/etc/slurm.conf\n"


def tune(*overrides):
    return ("python", "-m", "lbp_ray.tune", "--config", "configs/demo.yaml", *overrides)


@pytest.mark.parametrize(
    ("gpus", "words", "refused"),
    [
        ("4", tune(), True),
        ("4", tune("compute.gpus_per_trial=auto"), False),
        ("4", tune("compute.gpus_per_trial=0"), False),
        ("0", tune(), False),
        ("4", ("true",), False),
    ],
)
def test_gpus_that_no_trial_would_use_are_refused(sbatch, tmp_path, monkeypatch, capsys, gpus, words, refused):
    monkeypatch.setenv("LBP_RAY_ROOT", str(tmp_path))
    monkeypatch.chdir(Path(__file__).parents[1])
    status = main(["slurm", "--gpus-per-node", gpus, "--time", "60", "--no-wait", "--", *words])
    assert status == (2 if refused else 0)
    assert ("add compute.gpus_per_trial=auto" in capsys.readouterr().err) == refused


def test_report_of_an_array_is_refused_before_it_runs(sbatch, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LBP_RAY_ROOT", str(tmp_path))
    asked = ["--array", "0-4", "--time", "60", "--fetch", str(tmp_path / "new")]
    assert main(["slurm", *asked, "--", "echo", "{array}"]) == 2
    assert "an array has several" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--time", "60", "--no-wait", "--fetch", "new", "--", "true"], "--no-wait does not wait for; give it to"),
        (["--follow", "12", "--fetch", "."], "--fetch needs a job and a new folder: . exists"),
        (["--time", "60", "--array", "0-4", "--", "true"], "write {array}, which stands for the index"),
    ],
    ids=["nobody waits", "exists", "equal tasks"],
)
def test_what_would_be_in_vain_is_refused_before_anything_starts(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LBP_RAY_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))  # no SLURM here
    assert main(["slurm", *words]) == 2
    assert message in capsys.readouterr().err


def test_log_is_followed_by_whole_lines(tmp_path, capsys):
    log, follower = tmp_path / "12.log", launch.LogFollower()
    follower.follow(log)
    log.write_text("one\rtwo\nthr")
    follower.follow(log)
    log.write_text("one\rtwo\nthree\nreport: /shared/report.html\n")
    follower.follow(log)
    assert capsys.readouterr().out.split("\n") == ["one", "two", "three", "report: /shared/report.html", ""]
    assert follower.report == Path("/shared/report.html")


def test_report_is_not_copied_over_anything(tmp_path):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.html").write_text("page")
    assert launch.fetch(tmp_path / "report" / "report.html", tmp_path / "copy").read_text() == "page"
    with pytest.raises(launch.SlurmError, match="exists"):
        launch.fetch(tmp_path / "report" / "report.html", tmp_path / "copy")
    with pytest.raises(launch.SlurmError, match="not visible"):
        launch.fetch(tmp_path / "absent.html", tmp_path / "other")


def parsed(*words, command_words=("true",)):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    options = parser.parse_args(words)
    options.command = list(command_words)
    return options


def test_command_line_becomes_a_job():
    words = [
        "--nodes",
        "2",
        "--gpus-per-node",
        "a100:4",
        "--time",
        "8:00:00",
        "--also",
        "nodes=1,gpus=v100:2,memory=8G",
    ]
    spec = command.read_spec(parsed(*words), "/shared/study")
    assert [(group.nodes, group.gpu_type, group.gpus) for group in spec.groups] == [(2, "a100", 4), (1, "v100", 2)]
    assert spec.gpus_of_nodes == (4, 4, 2)
    assert spec.logs == Path("/shared/study/slurm")


@pytest.mark.parametrize(
    ("words", "root", "message"),
    [
        ([], "/shared", "--time and, after --, the command are required"),
        (["--time", "5"], None, "set LBP_RAY_ROOT"),
        (["--time", "5", "--nodes", "0"], "/shared", "nodes: Input should be greater"),
        (["--time", "5", "--also", "gpu=2"], "/shared", "found 'gpu=2'"),
        (["--time", "soon"], "/shared", "time: .*found 'soon'"),
    ],
)
def test_wrong_command_line_is_explained(words, root, message):
    with pytest.raises(ValueError, match=message):
        command.read_spec(parsed(*words), root)


def test_dry_run_submits_nothing(capsys, monkeypatch):
    monkeypatch.setenv("LBP_RAY_ROOT", "/shared/study")
    assert main(["slurm", "--time", "5", "--dry-run", "--", "python", "-c", "print('a b')"]) == 0
    assert capsys.readouterr().out.endswith(""" -- \\\n  python -c 'print('"'"'a b'"'"')'\n""")


def test_missing_slurm_is_explained(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["slurm", "--cancel", "12"]) == 2
    assert "scancel was not found; run this on a login node" in capsys.readouterr().err
