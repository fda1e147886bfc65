"""What MLflow and W&B are told: each committed trial and the result, once, offline; the real ones where installed."""

from __future__ import annotations

import importlib.util

import pandas as pd
import pytest
from result_factory import make_result
from study_factory import make_spec

from lbp_ray.cell import TrialPlace
from lbp_ray.distributed import trackers
from lbp_ray.distributed.trackers import MODULES, TELL, Trackers, flat, require, result_told, trial_told
from lbp_ray.finished import RESULT_FILE
from lbp_ray.result import METRIC_NAMES
from lbp_ray.runs import RunError
from lbp_ray.selection import EpochRecord

SPEC = make_spec(3, fold=1, seed=2)
NAME = SPEC.cell.name


@pytest.fixture
def place(tmp_path):
    """A committed trial of two epochs."""
    place = TrialPlace(tmp_path / f"{NAME}-abc", tmp_path / "checkpoint.pt")
    place.final.mkdir()
    records = [EpochRecord(1, "frozen", 1e-4, 0.7, 0.8, 0.5), EpochRecord(2, "unfrozen", 1e-4, 0.6, 0.7, 0.75)]
    pd.DataFrame(records).to_parquet(place.final / "history.parquet", index=False)
    return place


@pytest.fixture
def result_folder(tmp_path):
    """A folder with the result of a study."""
    folder = tmp_path / "0123456789abcdef"
    make_result().save(folder / RESULT_FILE)
    return folder


@pytest.fixture
def told(monkeypatch):
    """Let MLflow be a list of what it is told."""
    heard = []
    monkeypatch.setitem(TELL, "mlflow", lambda told, folder: heard.append(told))
    return heard


def make_trackers(root, place, *names):
    return Trackers(names, study="small", root=root, cells={NAME: (SPEC, place)})


@pytest.mark.parametrize("name", MODULES)
def test_absent_package_is_refused_with_the_remedy(monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(RunError, match=rf"compute.trackers: {name} needs {MODULES[name][0]}.*pip install"):
        require([name])


def test_no_tracker_needs_no_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    require(())


def test_trial_is_told_with_parameters_and_every_epoch(place):
    told = trial_told("small", SPEC, place)
    assert (told.study, told.kind, told.name) == ("small", "trial", f"{NAME}-abc")
    given = ("num_slices", "fold", "seed", "frozen_epochs", "trial_id")
    assert [told.parameters[name] for name in given] == [3, 1, 2, 3, SPEC.trial_id]
    assert [epoch["validation_auc"] for epoch in told.curve] == [0.5, 0.75]
    assert all(isinstance(value, float) for epoch in told.curve for value in epoch.values())
    assert "selection_loss" not in told.curve[0]  # fixed epochs have none


def test_result_is_told_with_every_metric_and_its_interval(result_folder):
    told, result = result_told(result_folder), make_result()
    (metrics,) = told.curve
    assert {f"k{count}/{name}" for count in (1, 3, 5) for name in METRIC_NAMES} <= set(metrics)
    first = result.slice_counts[0].metrics[0]
    assert metrics[f"k1/{first.name}"] == first.estimate
    assert metrics[f"k1/{first.name}_low"] == first.interval.low
    assert told.parameters["recipe.frozen_epochs"] == result.config["recipe"]["frozen_epochs"]
    assert told.parameters["optimistic"] is False


def test_parameters_have_dotted_names():
    assert flat({"a": {"b": {"c": 1}}, "d": [2]}) == {"a.b.c": 1, "d": [2]}


def test_each_is_told_once_over_all_runs(tmp_path, place, result_folder, told):
    for _ in range(2):
        run = make_trackers(tmp_path, place, "mlflow")
        run.on_trial_complete(0, [], NAME)
        run.tell_result(result_folder)
    assert [item.kind for item in told] == ["trial", "result"]


def test_trial_that_a_killed_run_committed_is_told_by_the_next(tmp_path, place, result_folder, told):
    make_trackers(tmp_path, place, "mlflow").tell_result(result_folder)
    assert [item.name for item in told] == [f"{NAME}-abc", result_folder.name]


def test_trial_that_is_not_committed_is_not_told(tmp_path, told):
    make_trackers(tmp_path, TrialPlace(tmp_path / "absent", tmp_path / "none.pt"), "mlflow").tell_trial(NAME)
    assert told == []


def test_failing_tracker_stops_nothing_and_is_asked_again_by_the_next_run_only(
    tmp_path, place, monkeypatch, capsys, told
):
    def fail(told, folder):
        msg = "no answer of https://me:secret@server"
        raise ConnectionError(msg)

    with monkeypatch.context() as patch:
        patch.setitem(TELL, "mlflow", fail)
        trackers = make_trackers(tmp_path, place, "mlflow")
        trackers.tell_trial(NAME)
        trackers.tell_trial(NAME)
    said = capsys.readouterr().err
    assert said.count(f"mlflow was not told of {NAME}-abc and is left alone, the next run goes on: no answer of") == 1
    assert "secret" not in said
    make_trackers(tmp_path, place, "mlflow").tell_trial(NAME)
    assert len(told) == 1


def test_nobody_is_told_by_default(tmp_path, place, result_folder, told):
    before = set(tmp_path.iterdir())
    make_trackers(tmp_path, place).tell_result(result_folder)
    assert told == []
    assert set(tmp_path.iterdir()) == before


@pytest.mark.slow  # the trackers are installed for the slow tests
@pytest.mark.filterwarnings("ignore")  # of the trackers' own imports
def test_real_mlflow_keeps_runs_below_the_run_folder(tmp_path, place, result_folder, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    for module in MODULES["mlflow"]:
        pytest.importorskip(module)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    make_trackers(tmp_path, place, "mlflow").tell_result(result_folder)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow/mlflow.db")
    studies = [item for item in client.search_experiments() if item.name in ("small", make_result().name)]
    runs = [run for study in studies for run in client.search_runs([study.experiment_id])]
    trial, result = sorted(runs, key=lambda run: run.data.tags["lbp_ray.kind"], reverse=True)
    assert trial.data.params["num_slices"] == "3"
    curve = client.get_metric_history(trial.info.run_id, "validation_auc")
    assert [(point.step, point.value) for point in curve] == [(1, 0.5), (2, 0.75)]
    assert "k1/roc_auc" in result.data.metrics
    assert not (tmp_path / "mlruns").exists()


@pytest.mark.slow  # the trackers are installed for the slow tests
@pytest.mark.filterwarnings("ignore")  # of the trackers' own imports
def test_real_wandb_is_offline_below_the_run_folder(tmp_path, place, result_folder, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    make_trackers(tmp_path, place, "wandb").tell_result(result_folder)
    assert len(list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))) == 2
    assert len(list((tmp_path / "wandb" / "told").iterdir())) == 2


def test_trackers_are_named_alike_everywhere():
    assert set(trackers.TELL) == set(MODULES)
