from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import pytest

from preprocess.commit import KILL_AT_VARIABLE, committed_directory, content_id, write_atomic


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_directory_appears_whole_or_not_at_all(tmp_path):
    with committed_directory(tmp_path / "done", point="test") as partial:
        (partial / "a").write_text("1")
        assert not (tmp_path / "done").exists()
    assert names(tmp_path) == ["done"]
    with pytest.raises(RuntimeError), committed_directory(tmp_path / "failed", point="test"):
        raise RuntimeError
    assert names(tmp_path) == ["done"]


def test_first_commit_of_a_name_stays(tmp_path):
    with committed_directory(tmp_path / "x", point="test") as ours:
        (ours / "late").touch()
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "early").touch()
    assert names(tmp_path / "x") == ["early"]
    assert names(tmp_path) == ["x"]


def test_what_a_killed_writer_left_is_swept_and_a_living_one_is_not(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    prefix = f".partial-x-{socket.gethostname()}-"
    for owner in (f"{prefix}{dead.pid}", f"{prefix}{os.getppid()}", ".partial-x-otherhost-1"):
        (tmp_path / owner).mkdir()
    with committed_directory(tmp_path / "x", point="test"):
        pass
    assert names(tmp_path) == sorted([f"{prefix}{os.getppid()}", ".partial-x-otherhost-1", "x"])


@pytest.mark.parametrize("point", ["before", "after"])
def test_kill_at_a_commit_point_happens_once(tmp_path, point):
    code = (
        "from pathlib import Path; from preprocess.commit import committed_directory\n"
        f"with committed_directory(Path({str(tmp_path / 'x')!r}), point='t'): pass"
    )
    env = {**os.environ, KILL_AT_VARIABLE: f"t:{point}-rename@{tmp_path / 'marker'}"}
    runs = [subprocess.run([sys.executable, "-c", code], env=env, check=False).returncode for _ in range(2)]
    assert runs == [-signal.SIGKILL, 0]
    assert (tmp_path / "x").is_dir()
    assert names(tmp_path) == ["marker", "x"]


def test_file_is_replaced_whole_and_private_when_asked(tmp_path):
    write_atomic(tmp_path / "f", b"old")
    write_atomic(tmp_path / "f", b"new", mode=0o600)
    assert (tmp_path / "f").read_bytes() == b"new"
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o600
    assert names(tmp_path) == ["f"]


def test_equal_values_have_equal_addresses():
    assert content_id({"a": 1, "b": [2]}) == content_id({"b": [2], "a": 1})
    assert content_id({"a": 1}) != content_id({"a": 2})
    with pytest.raises(ValueError, match="not JSON compliant"):
        content_id(float("nan"))
