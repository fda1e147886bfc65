"""What Ray's Prometheus endpoint shows of a running study, and the Grafana dashboard that is made of it."""

from __future__ import annotations

import http.client
import json
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from pathlib import Path

import pandas as pd
import pytest
from prometheus_client.parser import text_string_to_metric_families
from river import LIMIT_S, ROOT, environment, prepare_cohort, result_folder, start, study_arguments

pytestmark = [pytest.mark.ray, pytest.mark.slow]

DASHBOARD = json.loads((ROOT / "configs/cluster/grafana.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]

ARGUMENTS = ("slice_counts=[1]", "recipe.unfrozen_epochs=6", "evaluation.permutations=0", "compute.keep_models=none")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def read(port):
    """Return the samples of an endpoint: name → sets of labels → value; nothing while it does not answer."""
    try:
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    except (OSError, http.client.HTTPException):
        return {}
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture(scope="module")
def head():
    """Start a Ray head; yield the environment of its clients and the port of its metrics."""
    folder = Path(tempfile.mkdtemp(prefix="lbp", dir="/tmp"))  # socket paths must stay short
    port, metrics = free_port(), free_port()
    secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={port}"]
    given = [f"--metrics-export-port={metrics}", f"--temp-dir={folder}", "--num-cpus=2", "--include-dashboard=false"]
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(
            [*command, *given, "--dashboard-agent-listen-port=0"],
            env=environment(folder, RAY_metrics_report_interval_ms="1000", **secret),
            stdout=log,
            stderr=log,
        )
    try:
        end = time.monotonic() + LIMIT_S
        while not read(metrics):
            assert process.poll() is None, (folder / "head.log").read_text()[-3000:]
            assert time.monotonic() < end, (folder / "head.log").read_text()[-3000:]
            time.sleep(0.5)
        yield {**secret, "RAY_ADDRESS": f"127.0.0.1:{port}"}, metrics
    finally:
        process.terminate()
        process.wait(timeout=LIMIT_S)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def seen(module_folder, head):
    """Run a small study and return every sample that its endpoint showed: (name, labels) → its values in order."""
    clients, metrics = head
    prepare_cohort(module_folder)
    process = start(module_folder, "lbp_ray.tune", *study_arguments(*ARGUMENTS), **clients)
    samples, end = defaultdict(list), time.monotonic() + LIMIT_S
    while process.poll() is None and time.monotonic() < end:
        for key, value in read(metrics).items():
            samples[key].append(value)
        time.sleep(0.3)
    process.kill()  # which changes nothing where it has ended
    output = process.communicate()[0]
    assert process.returncode == 0, output[-3000:]
    return samples


def of(seen, name):
    """Return labels → values in order of one metric."""
    return [(dict(labels), values) for (metric, labels), values in seen.items() if metric == name]


def names_in(expression):
    """Return the metrics that a PromQL expression or a variable's query reads."""
    return set(re.findall(r"\bray_\w+", expression))


def grouped_by(expression):
    """Return the labels that an expression groups by, and those that it selects by."""
    groups = re.findall(r"\bby \(([^)]*)\)", expression)
    return {label.strip() for group in groups for label in group.split(",")} | set(re.findall(r"(\w+)=~", expression))


def test_states_of_the_trials_are_exported_and_sum_to_the_study(seen):
    states = {labels["state"]: values for labels, values in of(seen, "ray_lbp_ray_trials")}
    assert set(states) == {"done", "failed", "running", "to do"}
    assert set(states["to do"]) <= {0, 1, 2}  # trials may have started before the first look
    assert min(states["done"]) == 0
    assert max(states["running"]) == 2
    assert set(states["failed"]) == {0}


def test_speed_and_time_left_are_exported(seen):
    speeds = {labels["stage"]: max(values) for labels, values in of(seen, "ray_lbp_ray_slices_per_second")}
    assert set(speeds) == {"frozen", "unfrozen"}
    assert speeds["unfrozen"] > 0  # the frozen epochs of so small a study may pass between two looks
    ((labels, left),) = of(seen, "ray_lbp_ray_seconds_left")
    assert labels["study"] == "small"
    assert 0 <= min(left) <= max(left) < float("inf")


def test_every_slice_is_counted_once_by_stage(seen, module_folder):
    counted = defaultdict(float)
    for labels, values in of(seen, "ray_lbp_ray_slices_total"):
        counted[labels["stage"]] += max(values)
    table = pd.read_parquet(result_folder(module_folder) / "out_of_fold.parquet")
    epoch = table["study_id"].nunique()  # one slice each, trained on or scored by each of two trials
    assert counted["frozen"] == 2 * 3 * epoch
    assert epoch <= counted["unfrozen"] <= 2 * 6 * epoch  # the last may come between the last look and the end
    assert counted["extraction"] > epoch  # the sealed ones too


def test_gpu_memory_of_a_study_on_cpus_is_nothing(seen):
    samples = of(seen, "ray_lbp_ray_gpu_memory_bytes")
    assert samples
    assert {value for _, values in samples for value in values} == {0}


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_dashboard_reads_what_is_exported(seen, expression):
    exported = defaultdict(set)
    for name, labels in seen:
        exported[name] |= {key for key, _ in labels}
    assert names_in(expression)
    for name in names_in(expression):
        assert name in exported
        assert grouped_by(expression) <= exported[name]


def test_dashboard_offers_the_studies_that_are_exported(seen):
    (variable,) = (item for item in DASHBOARD["templating"]["list"] if item["type"] == "query")
    metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["definition"]).groups()
    assert {labels[label] for labels, _ in of(seen, metric)} == {"small"}
    assert variable["query"]["query"] == variable["definition"]


def test_no_label_holds_anything_of_a_patient(seen, module_folder):
    (split,) = (module_folder / "runs" / "small" / "splits").glob("*/split.parquet")
    private = set(pd.read_parquet(split, columns=["study_id", "patient_id"]).to_numpy().ravel())
    assert len(private) > 10
    shown = " ".join(value for name, labels in seen if "lbp_ray" in name for _, value in labels)
    assert "small" in shown
    assert not [pseudonym for pseudonym in private if pseudonym in shown]


def test_panels_have_room_and_numbers_of_their_own():
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"]) > 0
    cells = [
        (column, row)
        for place in (panel["gridPos"] for panel in PANELS)
        for column in range(place["x"], place["x"] + place["w"])
        for row in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(column for column, _ in cells) < 24
