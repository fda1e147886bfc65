"""The doctor: planted faults, most of them real, are found; a healthy cluster gives no finding."""

from __future__ import annotations

import base64
import os
import platform
import re
import resource
import shlex
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from slurm_hosts import missing_requirement, slurm

from cluster.__main__ import main
from cluster.doctor import command
from cluster.doctor.facts import Ask, GpuFacts, Offer, Survey, TempFacts, WeightsFacts
from cluster.doctor.gather import IMAGENET_FILE, busy, gather, slurm_offer, token_facts, unreadable, weights_facts
from cluster.doctor.lines import lines_of, read_lines
from cluster.doctor.machine import cgroup, vectors
from cluster.doctor.network import meet
from cluster.doctor.nodes import departed, node_names, step_command
from cluster.doctor.probe import collect, leave_token, probe_folder, visit
from cluster.ray.upload import measure_upload

ROOT = Path(__file__).parents[1]
NEEDS_MOUNTS = pytest.mark.skipif(
    os.getuid() != 0 or not shutil.which("unshare") or not shutil.which("taskset"),
    reason="needs root, unshare and taskset to give a node mounts and CPUs of its own",
)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder and a Ray configuration of its own."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in [name for name in os.environ if name.startswith(("RAY_AUTH", "RAY_A", "SLURM"))]:
        if name != "RAY_AUTH_TOKEN":
            monkeypatch.delenv(name)
    return tmp_path


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """Facts of this machine as a node that nothing is wrong with."""
    facts = gather(Ask(probe="p"), "n1")
    roomy = {"memory_available": 8 * 10**9, "shm_bytes": 8 * 10**9, "open_files": 65536, "processes": -1}
    token = facts.token.model_copy(update={"mode": 0o600, "is_mine": True, "required": True, "is_named": False})
    return facts.model_copy(
        update={
            "machine": facts.machine.model_copy(update=roomy),
            "temp": TempFacts(path=Path("/tmp"), free_bytes=10**12),
            "token": token,
            "clock_synchronised": True,
            "address": "192.0.2.7",
        }
    )


def survey_of(*nodes, **ask):
    more = {
        name: ask.pop(name)
        for name in ("silent", "departed", "storage_errors", "echoes", "upload", "proxied")
        if name in ask
    }
    return Survey(ask=Ask(probe="p", **ask), nodes=nodes, **more)


def judged(survey):
    return {(finding.level, finding.check, finding.nodes): finding for finding in command.judge(survey)}


def changed(facts, name, **changes):
    """Return a second node, whose facts differ; `section__field` reaches into a section."""
    update = {"name": name}
    for key, value in changes.items():
        section, _, field = key.partition("__")
        old = update.get(section, getattr(facts, section))
        update[section] = old.model_copy(update={field: value}) if field else value
        if isinstance(value, dict):
            update[section] = {**old, **value}
    return facts.model_copy(update=update)


# What is altered on the second node → level, check and a word of what is found.
ALTERED = {
    "version": ({"versions": {"torch": "2.6.0"}}, "blocker", "versions", "torch 2"),
    "absent": ({"versions": {"zarr": None}}, "blocker", "packages", "not installed: zarr"),
    "code": ({"code": "f00"}, "blocker", "code", "other source files"),
    "decoder": ({"codecs": {"RLE": ()}}, "blocker", "codecs", "no decoder of RLE"),
    "cpus": ({"offer": Offer(source="Ray", cpus=512)}, "warning", "CPUs", "Ray counts 512 CPUs"),
    "fewer CPUs than there are": ({"offer": Offer(source="Ray", cpus=0.5)}, None, "", ""),
    "quota": ({"machine__cpu_quota": 0.5}, None, "", ""),
    "cgroup": (
        {"machine__memory_limit": 4 * 10**9, "offer": Offer(source="Ray", memory_bytes=64 * 10**9)},
        "warning",
        "memory",
        "counts 64.0 GB, the node may use 4.0 GB",
    ),
    "full memory": ({"machine__memory_available": 10**8}, "warning", "memory", "0.1 GB free"),
    "shm": ({"machine__shm_bytes": 64 * 10**6}, "warning", "/dev/shm", "holds 0.1 GB"),
    "full temp": ({"temp__free_bytes": 10**6}, "blocker", "temp", "0.0 GB left"),
    "spilling": ({"temp__used_share": 0.97}, "warning", "temp", "97% full"),
    "hidden GPU": (
        {"gpus": GpuFacts(driver=("A100",) * 2, visible="", usable=0)},
        "warning",
        "GPUs",
        "2 GPU(s) stay idle",
    ),
    "processes": ({"machine__processes": 512}, "warning", "limits", "512 processes"),
    "someone's token": ({"token__is_mine": False}, "blocker", "token", "belongs to somebody else"),
    "lost token": ({"token__mode": None, "token__is_named": True}, "blocker", "token", "is not there"),
    "clock": ({"clock_synchronised": False}, "warning", "time service", "not synchronised"),
    "firewall": ({"unreachable": {"n1": "timed out"}}, "blocker", "network", "n1: timed out"),
}


@pytest.mark.parametrize(("changes", "level", "check", "words"), ALTERED.values(), ids=ALTERED)
def test_altered_fact_is_found_on_its_node_alone(healthy, changes, level, check, words):
    second = changed(healthy, "n2", **changes)
    found = judged(survey_of(healthy, second))
    assert set(found) == ({(level, check, ("n2",))} if level else set())
    assert all(words in finding.found and finding.cause and finding.fix for finding in found.values())


def test_same_nodes_are_not_remarked_upon(healthy):
    assert judged(survey_of(healthy, changed(healthy, "n2"), mode="slurm")) == {}


def test_clock_skew_is_measured_against_the_storage(healthy, tmp_path):
    leave_token(tmp_path, "p")
    facts = visit(tmp_path, "p", node="n1")
    assert abs(facts.clock_offset_s) < 0.5
    late = facts.model_copy(update={"clock_offset_s": facts.clock_offset_s + 90})
    nodes = [changed(healthy, name, storage=(told,)) for name, told in (("n1", facts), ("n2", late))]
    found = judged(survey_of(*nodes, storage=(tmp_path,), echoes={str(tmp_path): ("n1", "n2")}))
    assert "n2 is 90.0 s ahead of n1" in found["blocker", "clocks", ("n1", "n2")].found


def test_models_of_gpu_are_compared(healthy):
    nodes = [changed(healthy, name, gpus=GpuFacts(driver=(name,), usable=1)) for name in ("A100", "H100")]
    assert ("warning", "GPU models", ("A100", "H100")) in judged(survey_of(*nodes))


@pytest.mark.parametrize(("gpus", "matters"), [(None, True), (0.0, True), (0.5, False)])
def test_vector_instructions_are_compared_where_trials_run_on_cpus(healthy, gpus, matters):
    nodes = [
        changed(healthy, name, machine__vectors=name.upper(), gpus=GpuFacts(driver=("A100",), usable=1))
        for name in ("avx2", "avx512")
    ]
    found = judged(survey_of(*nodes, trial_gpus=gpus))
    assert set(found) == ({("warning", "CPU vectors", ("avx2", "avx512"))} if matters else set())
    assert all("AVX2 on avx2; AVX512 on avx512" in finding.found for finding in found.values())


def test_vector_instructions_are_named_as_trials_record_them(healthy):
    from lbp_ray.trial import environment

    assert healthy.machine.vectors in (environment("cpu")["device"], None)
    assert (platform.machine() == "x86_64") == (healthy.machine.vectors is not None)


X86 = "processor : 0\nflags\t\t: fpu sse2 {}\nprocessor : 1\n"
LARGE = "avx avx2 fma avx512f avx512dq avx512bw avx512vl"


@pytest.mark.parametrize(
    ("flags", "name"),
    [(LARGE, "AVX512"), (LARGE.replace("vl", "cd"), "AVX2"), ("avx2 fma", "AVX2"), ("avx", "DEFAULT"), (None, None)],
)
def test_vector_instructions_of_a_processor(flags, name):
    assert vectors(X86.format(flags) if flags else "Features : fp asimd\n") == name


def test_trial_that_no_node_holds(healthy):
    small = changed(healthy, "n2", offer=Offer(source="Ray", cpus=1))
    assert judged(survey_of(small, trial_cpus=1.0, mode="ray")) == {}
    found = judged(survey_of(small, trial_cpus=1.0, trial_gpus=0.25, mode="ray"))
    assert "0.25 GPUs; offered are n2: 1 CPUs, 0 GPUs" in found["blocker", "trial size", ()].found


def test_open_cluster_is_told(healthy):
    assert ("warning", "authentication", ("n1",)) in judged(
        survey_of(changed(healthy, "n1", token__required=False), mode="ray")
    )


def test_lost_echo_and_full_storage_are_found(healthy, tmp_path):
    leave_token(tmp_path, "p")
    facts = visit(tmp_path, "p", node="n1").model_copy(update={"free_bytes": 10**8})
    found = judged(survey_of(changed(healthy, "n1", storage=(facts,)), storage=(tmp_path,)))
    assert set(found) == {("blocker", "shared storage", ("n1",)), ("blocker", "space", ())}


def test_probe_leaves_nothing(tmp_path):
    assert leave_token(tmp_path, "p") == ""
    assert visit(tmp_path, "p", node="n1").token_seen
    assert collect(tmp_path, "p") == ("n1",)
    assert list(tmp_path.iterdir()) == []


def test_read_only_storage_is_found(healthy):
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR | stat.S_IROTH | stat.S_IXOTH)
    user = os.geteuid()
    try:
        os.seteuid(user or 65534)  # root may write everywhere
        error = leave_token(folder, "p")
        facts = visit(folder, "p", node="n1")
    finally:
        os.seteuid(user)
        folder.rmdir()
    node = changed(healthy, "n1", storage=(facts,))
    found = judged(survey_of(node, storage=(folder,), storage_errors={str(folder): error}))
    assert set(found) == {("blocker", "storage", ())}
    assert "Permission denied" in found["blocker", "storage", ()].found


def test_busy_port_is_found(healthy):
    with socket.create_server(("", 0)) as listener:
        port = listener.getsockname()[1]
        reason = busy(port)
    assert busy(port) == ""
    found = judged(survey_of(changed(healthy, "n1", busy_ports={port: reason}), ports=(port,)))
    assert found["blocker", "ports", ("n1",)].found == f"port {port}: in use"


@pytest.mark.parametrize("mode", ["here", "slurm"])
def test_long_temporary_folder_is_a_blocker_only_where_there_is_no_other(healthy, tmp_path, mode):
    node = changed(healthy, "n1", temp__path=tmp_path / ("x" * 60))
    found = judged(survey_of(node, mode=mode))
    assert set(found) == {("warning", "temp path", ("n1",))}
    assert "bytes too long; Ray's files would lie in /tmp" in found["warning", "temp path", ("n1",)].found
    closed = changed(node, "n1", temp__spare_error="Read-only file system")
    assert "Read-only" in judged(survey_of(closed, mode=mode))["blocker", "temp path", ("n1",)].found
    assert judged(survey_of(node, mode="ray")) == {}  # it runs already


@pytest.mark.parametrize(("length", "fits"), [(25, True), (26, False)])
def test_temporary_folder_just_fits(healthy, length, fits):
    node = changed(healthy, "n1", temp__path=Path("/" + "x" * (length - 1)))
    assert (judged(survey_of(node)) == {}) is fits


@pytest.mark.parametrize(("mode", "level"), [(0o644, "blocker"), (0o600, None)])
def test_readable_token_file_is_found(healthy, home, mode, level):
    path = home / ".ray" / "auth_token"
    path.parent.mkdir()
    path.write_text("0" * 64)
    path.chmod(mode)
    found = judged(survey_of(healthy.model_copy(update={"token": token_facts({})})))
    assert set(found) == ({(level, "token", ("n1",))} if level else set())
    assert all(finding.fix.startswith("chmod 600") for finding in found.values())


def test_weights_are_looked_for_where_torchvision_does(tmp_path):
    import torch

    from lbp_ray.nets.weights import RESNET50

    assert RESNET50.imagenet.url.endswith(IMAGENET_FILE)
    assert weights_facts("imagenet", {"TORCH_HOME": str(tmp_path)}).path.parent == tmp_path / "hub" / "checkpoints"
    assert weights_facts("imagenet", os.environ).path == Path(torch.hub.get_dir(), "checkpoints", IMAGENET_FILE)


def test_absent_damaged_and_differing_weights_are_found(healthy, tmp_path):
    path = tmp_path / "hub" / "checkpoints" / IMAGENET_FILE
    absent = weights_facts("imagenet", {"TORCH_HOME": str(tmp_path)})
    path.parent.mkdir(parents=True)
    path.write_bytes(b"cut off")
    damaged = weights_facts("imagenet", {"TORCH_HOME": str(tmp_path)})
    good = WeightsFacts(path=path, sha256="0676ba61" + "0" * 56)
    nodes = [changed(healthy, f"n{i}", weights=told) for i, told in enumerate((absent, damaged, good, good))]
    found = [finding for finding in command.judge(survey_of(*nodes, weights="imagenet")) if finding.check == "weights"]
    assert [finding.nodes for finding in found] == [("n0",), ("n1",), ("n1",)]
    assert "is damaged" in found[1].found


def test_missing_input_is_found(healthy, tmp_path):
    path = tmp_path / "store.zarr"
    node = changed(healthy, "n1", unreadable={str(path): unreadable(path)})
    assert "No such file" in judged(survey_of(node, inputs=(path,)))["blocker", "inputs", ("n1",)].found
    path.mkdir()
    assert unreadable(path) == ""


def test_too_large_upload_is_found(healthy, tmp_path, monkeypatch):
    monkeypatch.setattr("cluster.ray.upload.LIMIT_BYTES", 2**20)
    (tmp_path / ".gitignore").write_text("ignored\n")
    (tmp_path / "ignored").write_bytes(os.urandom(2**21))
    assert measure_upload(tmp_path).zipped_bytes < 1000
    (tmp_path / "scan.dcm").write_bytes(os.urandom(2**21))
    found = judged(survey_of(healthy, upload=measure_upload(tmp_path)))
    assert "the largest: scan.dcm (2 MiB)" in found["blocker", "upload", ()].found


def test_upload_of_the_clone_is_small():
    clone = measure_upload(ROOT)
    assert (clone.zipped_bytes < 20 * 2**20, clone.limit_bytes) == (True, 100 * 2**20)


@pytest.mark.parametrize(("exempt", "variable"), [("", "http_proxy"), ("127.0.0.1", "")])
def test_proxy_before_the_dashboard_is_found(healthy, monkeypatch, exempt, variable):
    monkeypatch.setenv("http_proxy", "http://user:secret@proxy:3128")
    monkeypatch.setenv("no_proxy", exempt)
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert command.examine(Ask(probe="p")).proxied == variable  # on this machine, from where jobs are submitted
    found = judged(survey_of(healthy, proxied=variable))
    assert len(found) == bool(variable)
    assert "secret" not in str(found)


VERSION_2 = {"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000", "a/b/memory.max": "4096", "memory.max": "max"}
VERSION_1 = {
    "cpu/cpu.cfs_quota_us": "150000",
    "cpu/cpu.cfs_period_us": "100000",
    "memory/a/memory.limit_in_bytes": "4096",
    "memory/memory.limit_in_bytes": "9223372036854771712",
}


@pytest.mark.parametrize(
    ("listing", "files"),
    [("0::/a/b", VERSION_2), ("4:memory:/a/b\n1:cpu,cpuacct:/", VERSION_1)],
    ids=["version 2", "version 1"],
)
def test_tightest_control_group_counts(tmp_path, listing, files):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert cgroup(listing, tmp_path) == (1.5, 4096)


def test_no_control_group_is_no_limit(tmp_path):
    assert cgroup("0::/", tmp_path) == (None, None)


def test_nodes_meet_and_a_closed_port_is_found(tmp_path):
    ask = Ask(probe="p", storage=(tmp_path,), meet_s=10)
    leave_token(tmp_path, "p")
    with socket.create_server(("127.0.0.1", 0)) as gone:
        (probe_folder(tmp_path, "p") / "address-n3").write_text(f"127.0.0.1 {gone.getsockname()[1]}")
    (probe_folder(tmp_path, "p") / "met-n3").touch()
    told = {}
    threads = [
        threading.Thread(target=lambda name=name: told.update({name: meet(ask, name, nodes=3)}))
        for name in ("n1", "n2")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {name: set(failed) for name, failed in told.items()} == {"n1": {"n3"}, "n2": {"n3"}}
    assert "refused" in told["n1"]["n3"]


def test_facts_survive_mixed_lines(healthy):
    first, second = list(lines_of(healthy)), list(lines_of(changed(healthy, "n2")))
    mixed = [line for pair in zip(first, second, strict=True) for line in pair]
    broken = f"doctor-facts n3 {base64.b64encode(b'{').decode()}"
    assert len(first) > 1
    assert max(map(len, mixed)) < 1000
    assert list(read_lines("\n".join(["noise", *mixed, broken]))) == [healthy, changed(healthy, "n2")]


def test_step_takes_the_whole_allocation():
    inside = step_command(Ask(probe="p"), ["--nodes=9 ; rm x"], nodes="4")
    assert inside[:5] == ["srun", "--ntasks-per-node=1", "--overlap", "--nodes=4", "--ntasks=4"]
    assert "--nodes=9 ; rm x" in inside  # one word of a list, no shell
    assert "--overlap" not in step_command(Ask(probe="p"), [], nodes=None)


def test_step_looks_from_inside_an_image(monkeypatch):
    monkeypatch.setenv("LBP_RAY_ROOT", "/shared/study")
    words = step_command(Ask(probe="p"), ["--nodes=2"], nodes=None, container=Path("/images/lbp.sif"))
    inside = ["apptainer", "exec", "--nv", f"--bind={Path.cwd()}", "--bind=/shared/study", "/images/lbp.sif", "python"]
    assert words[2:-3] == ["--nodes=2", *inside]


def test_image_elsewhere_than_on_slurm_is_refused(capsys):
    assert doctor("--on", "here", "--container", "/images/lbp.sif") == 2
    assert "apptainer exec /images/lbp.sif python -m cluster doctor" in capsys.readouterr().err


def test_allocation_is_read_from_slurm():
    assert slurm_offer({}) is None
    granted = {"SLURM_JOB_ID": "7", "SLURM_CPUS_ON_NODE": "64", "SLURM_GPUS_ON_NODE": "2", "SLURM_MEM_PER_NODE": "1000"}
    assert slurm_offer(granted) == Offer(source="SLURM", cpus=64, gpus=2, memory_bytes=1000 * 2**20)
    assert slurm_offer(granted | {"SLURM_CPUS_PER_TASK": "8"}).cpus == 8


def test_nodes_of_one_host_keep_apart():
    rows = [{"NodeID": f"{i:06d}abc", "NodeManagerHostname": host} for i, host in enumerate(("a", "b", "b"))]
    assert list(node_names(rows).values()) == ["a", "b-000001", "b-000002"]


def test_host_that_left_is_a_warning_and_one_that_came_back_is_not(healthy):
    hosts = [("a", "1", True), ("b", "2", False), ("c", "3", False), ("c", "3", True)]
    listed = [{"NodeManagerHostname": h, "NodeManagerAddress": a, "Alive": alive} for h, a, alive in hosts]
    assert departed(listed) == ("b",)
    assert set(judged(survey_of(healthy, departed=departed(listed)))) == {("warning", "answer", ("b",))}


def test_dead_address_is_told_at_once(home, capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as gone:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{gone.getsockname()[1]}")
    assert doctor("--storage", str(home)) == 1
    assert f"answer on Ray at {os.environ['RAY_ADDRESS']}: no facts came: no connection" in capsys.readouterr().out


def install_srun(folder, *nodes):
    """Put an srun into a folder that starts each node as a process; a node is (name, words before its command)."""
    starts = "".join(
        f'SLURMD_NODENAME={name} SLURM_JOB_ID=7 SLURM_STEP_NUM_NODES={len(nodes)} {words} "$@" &\n'
        for name, words in nodes
    )
    skip = 'while case "$1" in --*) true;; *) false;; esac; do shift; done\n'
    (folder / "srun").write_text(f"#!/bin/bash\n{skip}{starts}wait\n")
    (folder / "srun").chmod(0o755)


@pytest.fixture(scope="module")
def sick(module_folder):
    """Three nodes: one is well, one is badly off, one sees another disk in place of the shared one."""
    folder, storage, shadows = (module_folder / name for name in ("bin", "storage", "shadows"))
    long = module_folder / ("long" * 10)
    for path in (folder, storage, shadows / "numpy-1.0.dist-info", long):
        path.mkdir(parents=True)
    (shadows / "numpy-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 1.0\n")
    for codec in ("gdcm", "jpeg_ls"):
        (shadows / f"{codec}.py").write_text(f"raise ImportError({codec!r})\n")
    mounts = (
        "mount -t tmpfs -o size=64m tmpfs /dev/shm",
        f"mount --bind {storage} {storage}",
        f"mount -o remount,bind,ro {storage}",
    )
    worse = f'{" && ".join(mounts)} && ulimit -n 1000 && exec taskset -c 0 "$@"'
    away = f'mount -t tmpfs tmpfs {storage} && exec "$@"'
    env = f"TMPDIR={long} PYTHONPATH={shadows}:{ROOT} SLURM_CPUS_PER_TASK=2 SLURM_GPUS_ON_NODE=2"
    install_srun(
        folder,
        ("n1", "env"),
        ("n2", f"{env} unshare --mount bash -c {shlex.quote(worse)} -"),
        ("n3", f"unshare --mount bash -c {shlex.quote(away)} -"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("HOME", str(module_folder))
        with socket.create_server(("", 0)) as listener:
            port = listener.getsockname()[1]
            ask = Ask(mode="slurm", probe="p", storage=(storage,), ports=(port,), meet_s=1)
            survey = command.examine(ask)
    assert list(storage.iterdir()) == []
    return survey


REAL = {
    "read-only storage": ("blocker", "storage", ("n2",), "Read-only file system"),
    "local storage": ("blocker", "shared storage", ("n3",), "does not show the file"),
    "other version": ("blocker", "versions", ("n2",), "1.0 on n2"),
    "missing codec": ("blocker", "codecs", ("n2",), "JPEG"),
    "long temp path": ("warning", "temp path", ("n2",), "bytes too long"),
    "busy port": ("blocker", "ports", ("n1", "n2", "n3"), "in use"),
    "GPUs that CUDA does not see": ("blocker", "GPUs", ("n2",), "SLURM lends 2 GPU(s)"),
    "bound to one core": ("warning", "CPUs", ("n2",), "SLURM counts 2 CPUs, but processes may use 1"),
    "small /dev/shm": ("warning", "/dev/shm", ("n2",), "holds 0.1 GB"),
    "open files": ("warning", "limits", ("n2",), "1000 open files"),
}


@NEEDS_MOUNTS
@pytest.mark.parametrize(("level", "check", "nodes", "words"), REAL.values(), ids=REAL)
def test_planted_fault_is_found_on_a_node_of_a_step(sick, level, check, nodes, words):
    finding = judged(sick)[level, check, nodes]
    assert words in finding.found


@NEEDS_MOUNTS
def test_well_node_is_left_alone(sick):
    assert [node.name for node in sick.nodes] == ["n1", "n2", "n3"]
    blamed = {check for _, check, nodes in judged(sick) if "n1" in nodes}
    assert blamed <= {"ports", "time service", "names"}


def test_node_that_says_nothing_is_found(tmp_path, home, monkeypatch):
    broken = "echo No module named pydantic >&2; echo srun: error: n2: task 1: Exited with exit code 1 >&2"
    install_srun(tmp_path, ("n1", "env"), ("n2", f"bash -c {shlex.quote(broken)} -"))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    survey = command.examine(Ask(mode="slurm", probe="p"))
    assert [node.name for node in survey.nodes] == ["n1"]
    assert "No module named" in judged(survey)["blocker", "answer", ("1 node(s) of the step",)].found


def doctor(*arguments):
    return main(["doctor", *arguments])


@pytest.mark.slurm
@pytest.mark.skipif(missing_requirement() is not None, reason=str(missing_requirement()))
def test_step_of_a_real_slurm_is_well_until_two_nodes_are_cut_apart(home):
    with slurm(2, cpus=os.cpu_count()) as cluster, tempfile.TemporaryDirectory(dir="/var/tmp") as storage:
        arguments = ["--on", "slurm", "--srun=--nodes=2", "--storage", storage]
        command = [sys.executable, "-m", "cluster", "doctor", *arguments]
        given = {**os.environ, **cluster.environment}
        well = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, check=False)
        address = cluster.on("n1", "hostname", "--ip-address").strip()
        cluster.on("n2", "ip", "route", "add", "blackhole", address)
        cut = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, check=False)
        assert os.listdir(storage) == []
    assert (well.returncode, "2 node(s), 28 checks: 0 blocker(s)" in well.stdout) == (0, True), well
    assert set(re.findall(r"^WARNING +(.+?) on ", well.stdout, flags=re.MULTILINE)) <= {
        "time service",
        *lacking_here(home),
    }, well.stdout
    assert cut.returncode == 1
    assert f"BLOCKER  network on n2: no connection to n1: {address} port" in cut.stdout


def lacking_here(home):
    """Return the checks that this very machine cannot pass, each with the reason."""
    limits = cgroup(Path("/proc/self/cgroup").read_text())
    told = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(told[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    lacks = {
        "CPUs": ("a control group or an affinity withholds CPUs", limits.cpus or affinity() < os.cpu_count()),
        "memory": ("a control group limits it, or others hold it", limits.memory_bytes or free < 3 * 10**9),
        "/dev/shm": ("containers get 64 MB", shutil.disk_usage("/dev/shm").total < total / 3),
        "temp": ("the disk is full", used_share(tempfile.gettempdir()) > 0.95),
        "space": ("the disk is full", shutil.disk_usage(home).free < 5 * 10**9),
        "limits": ("few open files or processes", min(limit_of("NOFILE"), limit_of("NPROC")) < 4096),
    }
    return {check: reason for check, (reason, is_so) in lacks.items() if is_so}


def affinity():
    return len(os.sched_getaffinity(0))


def used_share(folder):
    usage = shutil.disk_usage(folder)
    return 1 - usage.free / usage.total


def limit_of(name):
    """Return a hard limit; none counts as a large one."""
    limit = resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[1]
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit


@pytest.mark.ray
def test_healthy_ray_cluster_gives_no_finding(home, capsys):
    doctor("--on", "ray", "--storage", str(home))
    printed = capsys.readouterr().out
    assert "1 node(s), 28 checks: " in printed
    assert "(Ray: " in printed
    found = re.findall(r"^(?:BLOCKER|WARNING)  (.+?)(?: on \S+)?: ", printed, flags=re.MULTILINE)
    assert set(found) <= set(lacking_here(home)), printed
    assert ("nothing found" in printed) == (not found)
    assert not list(home.glob(".doctor-*"))


def test_blockers_are_printed_with_cause_and_fix(home, capsys, monkeypatch):
    monkeypatch.setenv("LBP_RAY_ROOT", str(home))
    monkeypatch.setenv("TORCH_HOME", str(home))
    config = str(ROOT / "configs" / "oulu_honest.yaml")
    assert doctor("--config", config, "--on", "here", "--port", "1") == 1
    printed = capsys.readouterr().out
    assert f"BLOCKER  inputs on {socket.gethostname()}: {home}/store.zarr" in printed
    assert (
        printed.count("  cause: ") == printed.count("  fix:   ") == printed.count("BLOCKER") + printed.count("WARNING")
    )
    assert IMAGENET_FILE in printed


def test_ports_are_looked_at_where_they_are_asked_for_alone():
    """A study on this machine starts its Ray on free ports."""
    assert command.plan("here", None, storage=[], ports=[]).ports == ()
    assert command.plan("here", None, storage=[], ports=[6379, 8265]).ports == (6379, 8265)


def test_absent_storage_is_a_blocker(home, capsys):
    assert doctor("--on", "here", "--storage", str(home / "not" / "mounted"), "--port", "1") == 1
    assert "is there" in capsys.readouterr().out


def test_what_cannot_be_carried_out_is_refused(capsys):
    assert doctor("--on", "here", "--storage", "runs") == 2
    assert "must be an absolute path" in capsys.readouterr().err


GUIDES = "".join((ROOT / "docs" / f"howto-{name}.md").read_text() for name in ("doctor", "when-it-fails"))


@pytest.mark.parametrize("line", sorted(set(re.findall("python -m cluster doctor([^`\n]*)", GUIDES))))
def test_command_of_the_guides_is_understood(line, monkeypatch):
    monkeypatch.setenv("LBP_RAY_ROOT", str(ROOT))
    monkeypatch.chdir(ROOT)
    asked = []
    monkeypatch.setattr(command, "examine", lambda ask, *_: asked.append(ask) or Survey(ask=ask, nodes=()))
    assert doctor(*shlex.split(line)) != 2
    assert (asked[0].weights == "imagenet") is ("oulu" in line)


def test_doctor_does_not_import_torch():
    code = "import sys, cluster.doctor.command; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
