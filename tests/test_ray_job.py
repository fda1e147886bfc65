"""`make head` and `ray job submit` as a user types them: a head of its own, a home folder of its own, free ports."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from chromium import open_page
from river import LIMIT_S, ROOT, environment, prepare_cohort, result_folder, study_arguments

from preprocess.store.read import SliceStore

pytestmark = [pytest.mark.ray, pytest.mark.slow]

BIN = Path(sys.executable).parent
CELLS = {f"k{count}-fold{fold:02d}-seed0" for count in (1, 3) for fold in (0, 1)}
DISCOVERY = "prom_metrics_service_discovery.json"
"""Names every metrics endpoint of the cluster."""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def head(module_folder):
    """Start `make head`; yield where it is and the environment of a second terminal."""
    root = module_folder
    prepare_cohort(root)
    folder = Path(tempfile.mkdtemp(prefix="lbp", dir="/tmp"))  # socket paths must stay short
    url = f"http://127.0.0.1:{free_port()}"
    options = f"--port={free_port()} --dashboard-port={url.rpartition(':')[2]} --num-cpus=2"
    make = ["make", "-o", f"{sys.prefix}/.installed", "head", f"VENV={sys.prefix}"]
    first = environment(root, HOME=str(folder))
    log = folder / "head.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*make, f"HEAD_FOLDER={folder}/ray", f"HEAD_OPTIONS={options}"],
            cwd=ROOT,
            env=first,
            stdout=output,
            stderr=output,
        )
    try:
        wait_for(lambda: "Ray runtime started" in log.read_text(), process, log)
        wait_for((folder / "ray" / DISCOVERY).exists, process, log)  # Ray writes it once its dashboard is up
        second = {**first, "PATH": f"{BIN}:{first['PATH']}", "RAY_AUTH_MODE": "token", "RAY_API_SERVER_ADDRESS": url}
        del second["LBP_RAY_ROOT"], second["PYTHONPATH"]
        yield SimpleNamespace(root=root, folder=folder, url=url, environment=second)
    finally:
        process.terminate()
        wait_for_end(process)
        shutil.rmtree(folder, ignore_errors=True)  # Ray's agents may still write


def wait_for_end(process):
    """Wait for the end of a head that was told to end."""
    try:
        process.wait(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        raise


def wait_for(condition, process, log):
    end_s = time.monotonic() + LIMIT_S
    while not condition():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < end_s, log.read_text()[-3000:]
        time.sleep(0.5)


def submit(head, *command):
    """Submit a job and return its process."""
    return subprocess.Popen(
        ["ray", "job", "submit", "--working-dir", ".", "--", "python", "-m", *command],
        cwd=ROOT,
        env=head.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def listed(head, what):
    """Return the rows of ``ray list tasks`` or ``ray list jobs``."""
    command = ["ray", "list", what, "--format", "json", "--limit", "1000", "--timeout", "300"]
    text = subprocess.run(command, cwd=ROOT, env=head.environment, check=True, capture_output=True, text=True).stdout
    return json.loads(text) if text.lstrip().startswith("[") else []  # it says so in words where there is none yet


def exported_cells(head):
    """Return the cells that the metrics endpoints show a validation AUC of.

    Ray also lists a fixed port of its autoscaler, which another Ray on this machine may have taken, and may leave in
    the middle of an answer.
    """
    (discovery,) = json.loads((head.folder / "ray" / DISCOVERY).read_text())
    found = set()
    for target in discovery["targets"]:
        try:
            page = urllib.request.urlopen(f"http://{target}/metrics", timeout=10).read().decode()
        except (OSError, http.client.HTTPException):
            continue
        found |= set(re.findall(r'^ray_lbp_ray_validation_auc\{.*?\bcell="([^"]+)"', page, flags=re.MULTILINE))
    return found


@pytest.fixture(scope="module")
def study(head):
    """Run a small study as a job, watching the metrics endpoint meanwhile."""
    process = submit(head, "lbp_ray.tune", *study_arguments())
    exported, output = set(), None
    while output is None:
        try:
            output, _ = process.communicate(timeout=1)
        except subprocess.TimeoutExpired:
            exported |= exported_cells(head)
    assert process.returncode == 0, output[-3000:]
    return SimpleNamespace(output=output, exported=exported)


def test_study_succeeds_and_leaves_its_report(head, study):
    page = result_folder(head.root) / "report" / "report.html"
    assert f"report: {page}" in study.output
    assert page.is_file()
    states = [job["status"] for job in listed(head, "jobs") if "lbp_ray.tune" in job["entrypoint"]]
    assert "SUCCEEDED" in states


def test_cells_and_shards_are_named_tasks(head, study):
    states = {task["name"]: task["state"] for task in listed(head, "tasks")}
    assert {name: states.get(name) for name in (*CELLS, "features-0000")} == dict.fromkeys(
        (*CELLS, "features-0000"), "FINISHED"
    )


def test_validation_auc_is_exported_while_a_cell_runs(study):
    assert study.exported
    assert study.exported <= CELLS


def test_upload_is_code_only(head, study):
    (upload,) = (head.folder / "ray").glob("session_2*/runtime_resources/working_dir_files/_ray_pkg_*/")
    assert {"lbp_ray", "preprocess", "configs"} <= {path.name for path in upload.iterdir()}
    assert not {".venv", ".git", "tests", "docs", "demo"} & {path.name for path in upload.iterdir()}
    assert sum(path.stat().st_size for path in upload.rglob("*") if path.suffix != ".pyc") < 5_000_000


def test_preprocess_runs_as_a_job(head, tmp_path):
    dicom, templates = head.root / "phantom" / "dicom", head.root / "phantom" / "templates.csv"
    key = head.root / "phantom" / "pseudonym.key"
    arguments = [
        str(dicom),
        "--out",
        str(tmp_path / "store.zarr"),
        "--templates",
        str(templates),
        "--key-file",
        str(key),
    ]
    process = submit(head, "preprocess", *arguments)
    output, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, output[-3000:]
    again, here = (SliceStore.open(root / "store.zarr") for root in (tmp_path, head.root))
    assert again.content_hash == here.content_hash
    assert any(task["name"].startswith("convert-") for task in listed(head, "tasks"))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ["lbp_ray.tune", *study_arguments("paths.runs=runs")],
            "must be an absolute path on storage",
        ),
        (["preprocess", "dicom", "--out", "store.zarr"], "inside a Ray job paths must be absolute"),
        (["preprocess", "link", "store.zarr", "--out", "linked"], "inside a Ray job paths must be absolute"),
    ],
    ids=["tune", "preprocess", "link"],
)
def test_relative_path_is_refused(head, command, message):
    process = submit(head, *command)
    output, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode != 0
    assert message in output
    assert "Traceback" not in output.partition("Running entrypoint")[2]


def test_stranger_is_refused(head):
    stranger = {**head.environment, "RAY_AUTH_TOKEN": "0" * 64}
    refused = subprocess.run(["ray", "job", "list"], cwd=ROOT, env=stranger, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "AuthenticationError" in refused.stderr
    token = head.folder / ".ray" / "auth_token"
    assert token.stat().st_mode & 0o777 == 0o600


ROWS = "[...document.querySelectorAll('tbody tr')].map(row => row.innerText).join()"

FOLD = """
for (const heading of document.querySelectorAll('h4'))
  if (/^(Logs|Task Timeline|Cluster status)/.test(heading.textContent)) heading.click();
document.querySelectorAll('*').forEach(element => { element.scrollTop = 0 });
"""
"""Leaves the job's state and its table of tasks, for a picture."""


@contextmanager
def open_cells(head, job):
    """Open a job's page in the dashboard, its table of tasks filtered for cells."""
    token = (head.folder / ".ray" / "auth_token").read_text()
    heading = "[...document.querySelectorAll('h4')].find(e => e.textContent === 'Task Table')"
    names = "[...document.querySelectorAll('label')].find(e => e.textContent === 'Function or Class Name')"
    cookies = {"ray-authentication-token": token}
    with open_page(f"{head.url}/#/jobs/{job}", cookies, size=(1200, 1450)) as page:
        page.wait_for(f"Boolean({heading})")
        page.evaluate(f"{heading}.click()")
        page.wait_for(f"Boolean({names})")
        page.evaluate(f"{names}.parentElement.querySelector('input').focus()")
        page.type("run_cell")
        yield page


@pytest.mark.browser
def test_dashboard_lists_the_cells_by_name(head, study):
    studies = (job for job in listed(head, "jobs") if "lbp_ray.tune --config" in job["entrypoint"])
    (job,) = (job["job_id"] for job in studies if job["status"] == "SUCCEEDED")
    with open_cells(head, job) as page:
        page.wait_for(f"{ROWS}.match(/k\\d-fold\\d\\d-seed\\d/g)?.length === {len(CELLS)}")
        assert set(re.findall(r"k\d-fold\d\d-seed\d", page.evaluate(ROWS))) == CELLS


@pytest.fixture
def running(head):
    """Submit a study that is long enough to be looked at; yield its job once it runs, and stop it."""
    process = submit(head, "lbp_ray.tune", *study_arguments("name=seen", "recipe.unfrozen_epochs=400"))
    try:
        end_s = time.monotonic() + LIMIT_S
        while not (
            found := [job for job in listed(head, "jobs") if "name=seen" in job["entrypoint"] and job["job_id"]]
        ):
            assert process.poll() is None, process.communicate()[0][-3000:]
            assert time.monotonic() < end_s, "the job never ran"
            time.sleep(1)
        (job,) = found
        yield job
        subprocess.run(["ray", "job", "stop", job["submission_id"]], cwd=ROOT, env=head.environment, check=True)
    finally:
        process.terminate()
        process.communicate(timeout=LIMIT_S)


@pytest.mark.browser
def test_dashboard_shows_a_running_study_with_its_cells(head, running, tmp_path):
    with open_cells(head, running["job_id"]) as page:
        page.wait_for(f"/k\\d-fold\\d\\d-seed\\d[^]*RUNNING/.test({ROWS})")
        assert set(re.findall(r"k\d-fold\d\d-seed\d", page.evaluate(ROWS))) <= CELLS
        assert "RUNNING" in page.evaluate("document.body.innerText").split("Ray Core Overview")[0]
        page.evaluate(FOLD)
        page.wait_for("!document.body.innerText.includes('Timeline view shows')")
        page.picture(tmp_path / "dashboard.png")
    assert (tmp_path / "dashboard.png").stat().st_size < 300_000


@pytest.mark.browser
def test_dashboard_shows_a_stranger_nothing(head, study):
    with open_page(f"{head.url}/#/jobs") as page:
        prompt = page.wait_for("document.body.innerText.includes('oken') && document.body.innerText")
    assert "lbp_ray.tune" not in prompt
