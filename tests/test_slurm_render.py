"""The text that sbatch reads, whole and quoted."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from cluster.slurm.render import render
from cluster.slurm.spec import NodeGroup, SlurmSpec, seconds_of

GOLDEN = Path(__file__).parent / "golden"
STUDY = ("python", "-m", "lbp_ray.tune", "--config", "configs/oulu.yaml")


def asked(**values):
    given = {
        "command": STUDY,
        "groups": (NodeGroup(),),
        "time": "08:00:00",
        "project": Path("/shared/lbp_ray"),
        "logs": Path("/shared/study/slurm"),
        "python": Path("/shared/lbp_ray/.venv/bin/python"),
    }
    return SlurmSpec(**{**given, **values})


A100 = NodeGroup(nodes=2, gpus=4, gpu_type="a100", cpus=32, memory="256G", partition="gpu", constraint="nvme&ib")
SPECS = {
    "one_node": asked(),
    "every_option": asked(
        groups=(A100,),
        root=Path("/shared/study"),
        name="oulu",
        account="radiology",
        qos="long",
        modules=("cuda/12.4", "apptainer"),
        container=Path("/shared/images/lbp ray.sif"),
        array="0-4%2",
        exclusive=True,
        stop_before_s=300,
        command=(*STUDY, "seeds=[{array}]", "name=a $(b) 'c'"),
    ),
    "two_kinds": asked(
        groups=(A100, NodeGroup(gpus=2, gpu_type="v100", partition="old")), root=Path("/shared/study"), account="rad"
    ),
}


@pytest.mark.parametrize("name", SPECS)
def test_whole_text(name):
    assert render(SPECS[name]) == (GOLDEN / f"{name}.sbatch").read_text()


def test_command_reaches_the_shell_word_by_word():
    command = ("a b", "$HOME", "`id`", "it's", "two\nlines", "")
    last = render(asked(command=command)).split(" -- \\\n")[1]
    assert tuple(shlex.split(last)) == command


@pytest.mark.parametrize(
    "values",
    [
        {"name": "x\n#SBATCH --uid=0"},
        {"account": "a'b"},
        {"modules": ("cuda\nid",)},
        {"logs": Path("/shared/100%")},
        {"logs": Path("relative")},
        {"time": "soon"},
        {"array": "0-"},
        {"command": ()},
        {"stop_before_s": 0},
    ],
    ids=lambda values: "-".join(values),
)
def test_what_cannot_be_a_job_is_refused(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        asked(**values)


TIMES = {"90": 5400, "90:30": 5430, "08:00:00": 28800, "2-12": 216000, "2-12:30": 217800, "2-12:30:10": 217810, "0": 0}


@pytest.mark.parametrize("time", TIMES)
def test_every_form_of_a_time_limit_is_taken(time):
    assert f"#SBATCH --time={time}\n" in render(asked(time=time))
    assert seconds_of(time) == TIMES[time]


@pytest.mark.parametrize(("time", "stop_before_s"), [("3", 120), ("2:00", 60), ("0-1", 3540)])
def test_limit_that_leaves_no_time_is_refused(time, stop_before_s):
    with pytest.raises(ValueError, match="ends before the study can start"):
        asked(time=time, stop_before_s=stop_before_s)


def test_array_of_heterogeneous_jobs_is_refused():
    with pytest.raises(ValueError, match="not possible in SLURM"):
        asked(groups=(A100, NodeGroup()), array="0-1")


def test_gpu_type_without_gpus_is_refused():
    with pytest.raises(ValueError, match="needs gpus"):
        NodeGroup(gpu_type="a100")
