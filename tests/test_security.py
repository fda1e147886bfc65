"""What must not stand in the code: calls that run what a file or a word of somebody else's says."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(path for package in ("lbp_ray", "preprocess", "cluster") for path in (ROOT / package).rglob("*.py"))

FORBIDDEN = {
    "eval", "exec", "compile", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput",
    "tempfile.mktemp", "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "pickle.load",
    "pickle.loads", "joblib.load", "pd.read_pickle", "pandas.read_pickle", "shutil.unpack_archive",
}  # fmt: skip
"""Calls that none of the packages makes."""


def keyword(call, name):
    """Return the constant that a call gives for a keyword, or None."""
    values = (item.value for item in call.keywords if item.arg == name)
    return next((value.value for value in values if isinstance(value, ast.Constant)), None)


def dangers(source):
    """Return the dangerous calls in a module."""
    names = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        called = ast.unparse(call.func)
        called = names.get(called, called)
        if called in FORBIDDEN:
            yield called
        if called == "torch.load" and keyword(call, "weights_only") is not True:
            yield "torch.load without weights_only=True"
        if any(item.arg == "shell" and keyword(call, "shell") is not False for item in call.keywords):
            yield "shell"
        if called == "np.load" and any(item.arg == "allow_pickle" for item in call.keywords):
            yield "np.load with allow_pickle"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_and_no_word_is_run(path):
    assert list(dangers(path.read_text())) == []


@pytest.mark.parametrize(
    "line",
    [
        "torch.load('a')",
        "torch.load('a', weights_only=False)",
        "yaml.load('a', Loader=yaml.Loader)",
        "from yaml import unsafe_load as load; load('a')",
        "subprocess.run('a', shell=True)",
        "subprocess.Popen('a', shell=flag)",
        "os.system('a')",
        "from os import system; system('a')",
        "np.load('a', allow_pickle=True)",
        "pickle.loads(b'a')",
        "eval('a')",
    ],
)
def test_a_dangerous_line_would_be_seen(line):
    assert list(dangers(line))


def test_harmless_lines_are_not():
    assert not list(dangers("model.eval(); re.compile('a'); torch.load('a', weights_only=True); yaml.safe_load('a')"))


STARTED = """
import os, ray
from preprocess.job import connect
with connect(1):
    print(ray.get_runtime_context().gcs_address, os.environ["RAY_AUTH_TOKEN"], flush=True)
    input()
"""

JOIN = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False, logging_level='CRITICAL')"


@pytest.mark.slow
@pytest.mark.ray
def test_ray_that_a_command_starts_refuses_who_has_no_token(tmp_path):
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {"HOME": str(tmp_path)}
    run = [sys.executable, "-c"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([*run, STARTED], cwd=ROOT, env=own, **pipes) as process:
        address, token = process.stdout.readline().split()
        strangers = ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64})
        owner = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
        done = [
            subprocess.run([*run, JOIN, address], env=own | given, capture_output=True, check=False, timeout=120)
            for given in (*strangers, owner)
        ]
        process.communicate("end\n", timeout=60)
    assert [bool(answer.returncode) for answer in done] == [True, True, False], done


ENDS_BADLY = """
import ray
from preprocess.job import connect
with connect(1):
    print(ray.get_runtime_context().get_temp_dir(), flush=True)
    input()
    raise SystemExit(3)
"""


@pytest.mark.ray
def test_files_of_a_ray_that_a_command_starts_are_closed_to_others_and_gone_after():
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with subprocess.Popen([sys.executable, "-c", ENDS_BADLY], cwd=ROOT, env=own, **pipes) as process:
        folder = Path(process.stdout.readline().strip())
        assert list(folder.glob("session_2*/sockets/raylet*"))
        assert folder.parent.stat().st_mode & 0o777 == 0o700
        process.communicate("end\n", timeout=60)
    assert process.returncode == 3
    assert not folder.parent.exists()


FAKE_RAY = """#!/bin/sh
[ "$1" = start ] || exit 0
for word in "$@"; do case "$word" in --temp-dir=*) folder=${word#--temp-dir=};; esac; done
mkdir -p "$folder" && chmod 777 "$folder"
echo "folder $folder"
exec sleep 300
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["asked", "killed"])
def test_files_of_make_head_are_closed_to_others_and_gone_after(tmp_path, number):
    fake = tmp_path / "venv" / "bin" / "ray"
    fake.parent.mkdir(parents=True)
    fake.write_text(FAKE_RAY)
    fake.chmod(0o700)
    command = ["make", "--no-print-directory", "-o", f"{tmp_path}/venv/.installed", "head", f"VENV={tmp_path}/venv"]
    own = {**os.environ, "HOME": str(tmp_path)}
    with subprocess.Popen(command, cwd=ROOT, env=own, stdout=subprocess.PIPE, text=True) as process:
        folder = next(Path(line.split()[1]) for line in process.stdout if line.startswith("folder "))
        (head,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        mode = folder.parent.stat().st_mode & 0o777
        os.kill(process.pid if number == signal.SIGTERM else int(head), number)
        process.communicate(timeout=30)
    assert mode == 0o700
    end = time.monotonic() + 10
    while folder.parent.exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert not folder.parent.exists()


def test_a_folder_that_is_named_for_the_head_is_kept(tmp_path):
    words = [
        "make",
        "--dry-run",
        "-o",
        f"{tmp_path}/.installed",
        "head",
        f"VENV={tmp_path}",
        "HEAD_FOLDER=/tmp/own/ray",
    ]
    told = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "--temp-dir=/tmp/own/ray " in told
    assert "rm -r" not in told
