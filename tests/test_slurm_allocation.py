"""What the batch step and the nodes decide, without SLURM and without Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.slurm import allocation, container, gather, grant, node, processes
from cluster.slurm.allocation import CANCELLED, MOST_RESTARTS, PORTS, TRY_AGAIN, Ending, choose_ports, decide
from cluster.slurm.grant import MIB, GrantError, Node, NodeFacts, read_allocation, read_grant

NODES = {"n[1-2]": ["n1", "n2"], "o7": ["o7"]}
NODES_OF_TWO = (Node("n1", 2), Node("n2", 2))
FACTS = NodeFacts(affinity=8, memory_limits=(64 * 2**30,), free_shared_memory=32 * 2**30)


@pytest.mark.parametrize(
    ("status", "reason", "restarts", "ending"),
    [
        (0, None, 0, Ending(0, requeue=False)),
        (7, None, 0, Ending(7, requeue=False)),
        (-9, None, 0, Ending(137, requeue=False)),
        (None, None, 0, Ending(1, requeue=False)),
        (TRY_AGAIN, None, 0, Ending(TRY_AGAIN, requeue=True)),
        (-15, "time", 3, Ending(TRY_AGAIN, requeue=True)),
        (None, "time", 0, Ending(TRY_AGAIN, requeue=True)),
        (0, "time", 0, Ending(0, requeue=False)),
        (-15, "time", MOST_RESTARTS, Ending(TRY_AGAIN, requeue=False)),
        (-15, "cancelled", 0, Ending(CANCELLED, requeue=False)),
        (0, "cancelled", 0, Ending(CANCELLED, requeue=False)),
    ],
)
def test_what_becomes_of_a_job(status, reason, restarts, ending):
    assert decide(status, reason, restarts) == ending


def test_ports_follow_from_the_jobs_number():
    assert choose_ports(17, lambda _: True) == choose_ports(17, lambda _: True)
    blocks = [choose_ports(job, lambda _: True) for job in range(500, 1500)]
    assert len({port for block in blocks for port in block}) == 1000 * PORTS
    assert all(20000 <= port < 32000 for block in blocks for port in block)


def test_a_busy_port_moves_the_whole_block():
    first, second, _ = choose_ports(17, lambda _: True)
    moved = choose_ports(17, lambda port: port != second)
    assert first not in moved
    assert second not in moved
    with pytest.raises(allocation.ClusterError, match="no free ports"):
        choose_ports(17, lambda _: False)


def test_bind_test_sees_a_listener_on_any_address():
    with node.socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        assert not allocation.is_free(busy.getsockname()[1])
        port = busy.getsockname()[1]
    assert allocation.is_free(port)


def test_nodes_of_a_job():
    environment = {"SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_CPUS_PER_NODE": "16(x2)"}
    found = read_allocation({**environment, "SLURM_RESTART_COUNT": "2"}, NODES.__getitem__)
    assert (found.job_id, found.restarts) == (5, 2)
    assert found.nodes == (Node("n1", 16), Node("n2", 16))


def test_nodes_of_a_heterogeneous_job():
    environment = {
        "SLURM_JOB_ID": "5",
        "SLURM_HET_SIZE": "2",
        "SLURM_JOB_NODELIST_HET_GROUP_0": "n[1-2]",
        "SLURM_JOB_CPUS_PER_NODE_HET_GROUP_0": "16,8",
        "SLURM_JOB_NODELIST_HET_GROUP_1": "o7",
        "SLURM_JOB_CPUS_PER_NODE_HET_GROUP_1": "4",
    }
    assert read_allocation(environment, NODES.__getitem__).nodes == (
        Node("n1", 16, 0),
        Node("n2", 8, 0),
        Node("o7", 4, 1),
    )


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "SLURM_JOB_ID is not set"),
        (
            {"SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_CPUS_PER_NODE": "16"},
            "2 nodes but CPUs of 1",
        ),
        ({"SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "o7", "SLURM_JOB_CPUS_PER_NODE": "many"}, "found 'many'"),
    ],
)
def test_contradicting_allocation_is_refused(environment, message):
    with pytest.raises(GrantError, match=message):
        read_allocation(environment, NODES.__getitem__)


GPUS = {"SLURM_CPUS_ON_NODE": "16", "SLURM_GPUS_ON_NODE": "2", "CUDA_VISIBLE_DEVICES": "0,3"}


def test_grant_is_the_least_of_what_limits():
    found = read_grant({**GPUS, "SLURM_MEM_PER_NODE": "10000"}, FACTS, gpus_asked=2)
    assert (found.cpus, found.gpus) == (8, 2)
    assert found.memory + found.object_store == 10000 * MIB
    assert found.object_store == pytest.approx(3000 * MIB, rel=0.01)


def test_grant_follows_the_cgroup_and_shared_memory():
    facts = NodeFacts(affinity=4, memory_limits=(64 * 2**30, 8 * 2**30), free_shared_memory=1000 * MIB)
    found = read_grant({**GPUS, "SLURM_CPUS_PER_TASK": "2"}, facts, gpus_asked=0)
    assert (found.cpus, found.gpus) == (2, 0)
    assert found.object_store == 800 * MIB
    assert found.memory + found.object_store == 8 * 2**30


@pytest.mark.parametrize(
    "wrong",
    [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": ""}, {"SLURM_GPUS_ON_NODE": "1"}],
    ids=lambda wrong: "-".join(f"{name}={value}" for name, value in wrong.items()),
)
def test_hidden_gpu_is_refused(wrong):
    with pytest.raises(GrantError, match="2 GPU"):
        read_grant({**GPUS, **wrong}, FACTS, gpus_asked=2)


@pytest.mark.parametrize(
    ("line", "file"),
    [("0::/slurm/job_5", "slurm/memory.max"), ("4:memory:/slurm/job_5", "memory/slurm/memory.limit_in_bytes")],
    ids=["version 2", "version 1"],
)
def test_limit_of_a_cgroup_above_counts(tmp_path, line, file):
    (tmp_path / "cgroup").write_text(f"{line}\n3:cpu:/slurm\n")
    (tmp_path / "mounted" / file).parent.mkdir(parents=True)
    (tmp_path / "mounted" / file).write_text("4294967296\n")
    assert grant._cgroup_limits(tmp_path / "cgroup", tmp_path / "mounted") == [2**32]


def test_memory_granted_per_gpu_counts():
    found = read_grant({**GPUS, "SLURM_MEM_PER_GPU": "4000"}, FACTS, gpus_asked=2)
    assert found.memory + found.object_store == 8000 * MIB


def test_parts_of_gpus_that_cuda_would_hide_are_refused():
    parts = {**GPUS, "CUDA_VISIBLE_DEVICES": "MIG-1,MIG-2"}
    with pytest.raises(GrantError, match=r"2 parts of GPUs .*ask for one per node"):
        read_grant(parts, FACTS, gpus_asked=2)
    assert read_grant({**parts, "CUDA_VISIBLE_DEVICES": "MIG-1"}, FACTS, gpus_asked=1).gpus == 1


def test_longest_folder_leaves_room_for_the_paths_of_sockets():
    base = f"/{'x' * (node.LONGEST_FOLDER - len('//lbp-5'))}"
    folder = node.private_folder("lbp-5", base)
    socket = folder / "ray" / "session_2026-11-22_11-22-33_123456_4194304" / "sockets" / "plasma_store"
    assert folder == Path(base) / "lbp-5"
    assert len(str(socket)) <= 107
    assert node.private_folder("lbp-5", f"{base}x") == Path("/tmp/lbp-5")


def test_temporary_folder_stays_short():
    assert node.private_folder("lbp-5", "/local/5") == Path("/local/5/lbp-5")
    assert node.private_folder("lbp-5", "/local/scratch/of/a/very/long/user/name") == Path("/tmp/lbp-5")


def test_token_is_private_and_gone_after(tmp_path):
    folder = tmp_path / "lbp-5"
    with node.kept_private(folder, "secret") as file:
        assert file.read_text() == "secret"
        assert file.stat().st_mode & 0o777 == 0o600
        assert folder.stat().st_mode & 0o777 == 0o700
    assert not folder.exists()


def test_folder_of_another_is_not_taken(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "lbp-5").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError), node.kept_private(tmp_path / "lbp-5", "secret"):
        pass
    assert (tmp_path / "elsewhere").is_dir()


def test_environment_forgets_other_clusters():
    shell = {"RAY_ADDRESS": "10.0.0.1:6379", "RAY_AUTH_TOKEN": "theirs", "LBP_RAY_ROOT": "/shared/study"}
    found = node.ray_environment(shell, Path("/tmp/lbp-5/token"))
    assert "RAY_ADDRESS" not in found
    assert "RAY_AUTH_TOKEN" not in found
    assert found["RAY_AUTH_TOKEN_PATH"] == "/tmp/lbp-5/token"
    assert found["LBP_RAY_ROOT"] == "/shared/study"


def test_ray_starts_with_the_grant_and_no_token():
    granted = grant.Grant(cpus=4, gpus=2, memory=7 * 2**30, object_store=2**30)
    head = node.start_arguments(granted, Path("/tmp/lbp-5"), head="10.0.0.1", ports=(20003, 20004, 20005), is_head=True)
    worker = node.start_arguments(granted, Path("/tmp/lbp-5"), head="10.0.0.1", ports=(20003, 4, 5), is_head=False)
    assert {"--head", "--port=20003", "--dashboard-host=127.0.0.1", "--dashboard-port=20004"} <= set(head)
    assert "--address=10.0.0.1:20003" in worker
    assert {"--num-cpus=4", "--num-gpus=2", "--temp-dir=/tmp/lbp-5/ray", "--min-worker-port=0"} <= set(head) & set(
        worker
    )


def test_container_sees_its_folders_and_the_drivers_libraries():
    image, folders = Path("/images/lbp.sif"), [Path("/shared"), Path("/tmp/lbp-5"), Path("/shared")]
    expected = ["apptainer", "exec", "--nv", "--bind=/shared", "--bind=/tmp/lbp-5", "/images/lbp.sif"]
    assert container.container_prefix(image, folders, gpus=1) == expected
    assert "--nv" not in container.container_prefix(image, folders, gpus=0)
    assert container.container_prefix(None, folders, gpus=1) == []


def test_container_sees_data_and_weights():
    assert container.bound_folders({"LBP_RAY_ROOT": "/shared/study", "TORCH_HOME": "/shared/torch"}) == [
        Path.cwd(),
        Path("/shared/study"),
        Path("/shared/torch"),
    ]
    assert container.bound_folders({}) == [Path.cwd()]


def test_singularity_is_taken_where_there_is_no_apptainer(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("singularity", "apptainer"):
        (tmp_path / name).touch(mode=0o700)
        assert container.container_prefix(Path("/images/lbp.sif"), [], gpus=0) == [name, "exec", "/images/lbp.sif"]


def test_requeue_is_of_one_task_of_an_array_and_of_no_job_that_has_ended():
    alone = {"SLURM_JOB_ID": "12"}
    task = {"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "4"}
    assert allocation.requeue_command(alone) == ["scontrol", "requeue", "Incomplete", "12"]
    assert allocation.requeue_command(task)[-1] == "12_4"


@pytest.mark.parametrize(("needed", "status"), [(2, TRY_AGAIN), (1, 0)])
def test_lost_worker_ends_what_needs_every_node(needed, status):
    place = SimpleNamespace(allocation=SimpleNamespace(nodes=NODES_OF_TWO))
    steps = [subprocess.Popen(["sleep", "60"]), subprocess.Popen(["false"])]
    process = subprocess.Popen(["sleep", "2"], start_new_session=True)
    quiet = SimpleNamespace(reason=None)
    assert allocation.wait_for(process, steps, place, quiet, needed=needed) == status
    steps[0].kill()
    steps[0].wait()


def test_step_takes_all_that_the_job_has_on_the_node():
    words = allocation.step_command(Node("o7", 16, 1), ["--is-head"], gpus=2)
    assert words[0] == "srun"
    assert {"--het-group=1", "--nodelist=o7", "--cpus-per-task=16", "--mem=0", "--gpus-per-node=2"} <= set(words)
    assert words[-3:] == ["-m", "cluster.slurm.node", "--is-head"]


def test_step_has_the_memory_of_its_own_component():
    batch = {
        "SLURM_MEM_PER_NODE": "4096",
        "SLURM_MEM_PER_NODE_HET_GROUP_0": "4096",
        "SLURM_MEM_PER_CPU_HET_GROUP_1": "1",
    }
    assert allocation.step_environment(batch, Node("n1", 2))["SLURM_MEM_PER_NODE"] == "4096"
    assert allocation.step_environment(batch, Node("n1", 2, 0))["SLURM_MEM_PER_NODE"] == "4096"
    second = allocation.step_environment({**batch, "SLURM_GPUS_PER_NODE": "2"}, Node("o7", 2, 1))
    assert second["SLURM_MEM_PER_CPU"] == "1"
    assert not second.keys() & {"SLURM_MEM_PER_NODE", "SLURM_GPUS_PER_NODE"}


def place_in_an_image(port, head="127.0.0.1"):
    return allocation.Place(
        allocation=SimpleNamespace(job_id=5, nodes=NODES_OF_TWO),
        gpus=(2, 2),
        head=head,
        ports=(port,),
        container=Path("/images/lbp.sif"),
        token=Path("/local/lbp-5.b/token"),
    )


def test_command_in_an_image_sees_the_sockets_of_ray_on_its_node(monkeypatch):
    started = []
    monkeypatch.setattr(allocation.subprocess, "Popen", lambda words, **_: started.append(words))
    place = place_in_an_image(1)
    place.run(["python"])
    (words,) = started
    assert {"--bind=/local/lbp-5.b", "--bind=/local/lbp-5.0"} <= set(words[: words.index("/images/lbp.sif")])


def test_command_in_an_image_waits_for_the_folder_that_it_shall_see():
    quiet = SimpleNamespace(reason=None)
    with subprocess.Popen(["sleep", "60"]) as head, node.socket.create_server(("127.0.0.1", 0)) as ray:
        place = place_in_an_image(ray.getsockname()[1])
        assert allocation.wait_for_head(head, place, quiet)
        ray.close()
        assert not allocation.wait_for_head(head, place, SimpleNamespace(reason="cancelled"))
        threading.Timer(1, head.kill).start()
        assert not allocation.wait_for_head(head, place, quiet)


def test_array_index_is_filled_in():
    assert allocation.filled(["seeds=[{array}]", "{a: 1}"], "3") == ["seeds=[3]", "{a: 1}"]
    assert allocation.filled(["seeds=[{array}]"], None) == ["seeds=[{array}]"]


@pytest.mark.parametrize(
    ("nodes", "gpus", "lack"),
    [
        ([("n1", 2), ("n2", 2)], [2, 2], None),
        ([("n1", 2), ("n2", 4)], [4, 2], None),
        ([("n1", 2)], [2, 2], r"1 of 2 nodes have joined Ray \(n1\)"),
        ([("n1", 2), ("n2", 1)], [2, 2], r"Ray sees \[1, 2\] GPUs"),
        ([], [0], r"0 of 1 nodes have joined Ray \(none\)"),
    ],
)
def test_missing_nodes_and_gpus_are_said(nodes, gpus, lack):
    listed = [{"Alive": True, "NodeManagerHostname": name, "Resources": {"GPU": float(count)}} for name, count in nodes]
    listed.append({"Alive": False, "NodeManagerHostname": "old", "Resources": {"GPU": 2.0}})
    found = gather.missing(listed, gpus)
    assert found is None if lack is None else grant.re.match(lack, found)


ORPHANS = """
import subprocess, sys, time
from cluster.slurm.processes import adopt_orphans, descendants, end_descendants
adopt_orphans()
subprocess.run(["bash", "-c", "trap '' TERM; setsid bash -c 'trap \\"\\" TERM; sleep 300; sleep 300' & disown"])
time.sleep(0.5)
print(*descendants(__import__("os").getpid()), flush=True)
end_descendants(grace_s=1)
"""


def test_orphans_that_ignore_term_are_ended():
    stranger = subprocess.Popen(["sleep", "300"])
    try:
        answer = subprocess.run(
            [sys.executable, "-c", ORPHANS],
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
            cwd=Path(__file__).parents[1],
        )
        orphans = answer.stdout.split()
        assert orphans
        assert not [pid for pid in orphans if Path(f"/proc/{pid}").exists()]
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_step_ends_when_the_batch_step_lets_go(tmp_path):
    fake = tmp_path / "ray"
    fake.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid; env > {tmp_path}/env; sleep 300\n")
    fake.chmod(0o700)
    given = {**os.environ, **GPUS, "PATH": f"{tmp_path}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)}
    words = ["--folder-name=lbp-5.0", "--head=127.0.0.1", "--gpus=2", "--ports", "1", "2", "3", "--is-head"]
    step = subprocess.Popen(
        [sys.executable, "-m", "cluster.slurm.node", *words], env=given, stdin=subprocess.PIPE, text=True
    )
    step.stdin.write("the token\n")
    step.stdin.flush()
    while not (tmp_path / "env").exists() or not (tmp_path / "env").read_text().endswith("\n"):
        time.sleep(0.05)
    step.stdin.close()
    assert step.wait(timeout=20) == 0
    assert not Path("/proc", (tmp_path / "pid").read_text().strip()).exists()
    assert "the token" not in (tmp_path / "env").read_text()
    assert {path.name for path in tmp_path.iterdir()} <= {"ray", "pid", "env"}


@pytest.fixture
def _own_signals():
    """Give the signals of this process back after the test."""
    numbers = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.usefixtures("_own_signals")
@pytest.mark.parametrize(
    "numbers", [(signal.SIGTERM, signal.SIGUSR1), (signal.SIGUSR1, signal.SIGTERM)], ids=["before", "after"]
)
def test_scancel_during_the_start_wins_over_the_time_limit(monkeypatch, numbers):
    """Real signals reach the batch step while its nodes start: it ends without a requeue and starts no command."""
    asked, started = [], []
    monkeypatch.setattr(allocation, "start_node", lambda *_: subprocess.Popen(["cat"], stdin=subprocess.PIPE))
    monkeypatch.setattr(allocation, "adopt_orphans", lambda: None)
    monkeypatch.setattr(allocation, "requeue_command", lambda _: asked.append("requeue") or ["true"])
    monkeypatch.setattr(allocation, "hostnames", NODES.__getitem__)
    monkeypatch.setattr(allocation, "own_address", lambda _: "127.0.0.1")
    monkeypatch.setattr(allocation, "end_descendants", lambda **_: None)

    def start(place, command):
        asked.append(command[:3])
        for number in numbers:
            os.kill(os.getpid(), number)
        started.append(subprocess.Popen(["sleep", "60"], start_new_session=True))
        return started[0]

    monkeypatch.setattr(allocation.Place, "run", start)
    granted = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "o7", "SLURM_JOB_CPUS_PER_NODE": "2"}
    for name, value in granted.items():
        monkeypatch.setenv(name, value)
    status = allocation.main(["--gpus=0", "--", "true"])
    started[0].kill()
    started[0].wait()
    assert status == CANCELLED
    assert asked == [["python", "-m", "cluster.slurm.gather"]]


def test_descendants_leave_the_dead_out():
    child = subprocess.Popen(["sleep", "300"])
    assert child.pid in processes.descendants(os.getpid())
    child.kill()
    time.sleep(0.2)
    assert child.pid not in processes.descendants(os.getpid())
    child.wait()
