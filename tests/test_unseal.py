"""The hold-out: opened by one command, recorded before it is judged, and told when it is no longer untouched."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import torch
import yaml
from cohort_factory import commit_trial, make_cohort, sealed_exams, study_config
from store_factory import pseudonym

from lbp_ray.aggregate import aggregate
from lbp_ray.distributed.worker import load_trial_data
from lbp_ray.metrics import all_metrics
from lbp_ray.prepare import prepare
from lbp_ray.result import StudyResult
from lbp_ray.tune import plan_trials
from lbp_ray.unseal import UnsealError, ledger_of, main, read_ledger, unseal


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """No weights are needed."""
    monkeypatch.setattr("lbp_ray.prepare.load_backbone_weights", lambda *_, **__: {"weight": torch.zeros(1)})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_cohort(tmp_path_factory.mktemp("data"))


@pytest.fixture
def finished(data, tmp_path):
    """A finished study of random scores: configuration, preparation and result folder."""
    evaluation = {"permutations": 0, "bootstrap_resamples": 20}
    config = study_config(data, tmp_path, seeds=(0, 1), slice_counts=(1,), evaluation=evaluation)
    study = prepare(config)
    hashes = {"crops_hash": study.crops.crops_hash, "split_hash": study.split.split_hash, "weights_hash": "w"}
    specs = plan_trials(config, **hashes)
    folders = [tmp_path / "trials" / spec.cell.name for spec in specs]
    for spec, folder in zip(specs, folders, strict=True):
        commit_trial(spec, folder, study)
    trial_data = load_trial_data(study.crops.folder, study.split.folder, None)
    return config, study, aggregate(config, study, specs, folders, trial_data)


def test_the_holdout_is_judged_by_the_mean_of_all_models(finished):
    config, study, folder = finished
    told = unseal(config, folder)
    (part,) = told.slice_counts
    predictions = pd.read_parquet(folder / "holdout.parquet")
    mean = predictions.groupby("study_id")["probability"].mean()
    labels = [number % 2 for number in sorted(sealed_exams(study.split), key=lambda number: pseudonym("s", number))]
    expected = all_metrics(pd.Series(labels).to_numpy(), mean.to_numpy(), (mean >= part.threshold).to_numpy() * 1)
    assert {name: value.estimate for name, value in part.metrics.items()}.items() <= expected.items()
    assert (part.num_studies, part.num_positive, told.num_lost) == (4, sum(labels), 0)
    assert part.metrics["roc_auc"].method.startswith("DeLong")


def test_the_threshold_comes_from_outside_the_holdout(finished):
    config, _, folder = finished
    before = unseal(config, folder).slice_counts[0].threshold
    predictions = pd.read_parquet(folder / "holdout.parquet")
    predictions.assign(probability=1 - predictions["probability"]).to_parquet(folder / "holdout.parquet")
    assert unseal(config, folder).slice_counts[0].threshold == before


def test_every_opening_is_recorded_and_the_second_is_told_as_the_second(finished, tmp_path, capsys):
    config, study, folder = finished
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    arguments = ["--config", str(path), "--result", str(folder)]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    assert "opening 1 of this hold-out" in first
    assert "roc_auc" in first
    assert main(arguments) == 0
    assert "It had been opened before" in capsys.readouterr().out
    openings = read_ledger(ledger_of(study.split))
    assert [opening.number for opening in openings] == [1, 2]
    assert {opening.result_hash for opening in openings} == {StudyResult.load(folder / "result.json").result_hash}
    assert all(opening.user and opening.time for opening in openings)
    assert sorted(item.name for item in folder.glob("unsealed-*")) == ["unsealed-01.json", "unsealed-02.json"]


def test_no_study_is_named_in_what_is_told(finished):
    config, study, folder = finished
    unseal(config, folder)
    text = (folder / "unsealed-01.json").read_text() + ledger_of(study.split).read_text()
    assert not any(name in text for name in study.split.table["study_id"])


@pytest.mark.parametrize("keep", [[1], []], ids=["a line taken out", "a line changed"])
def test_a_changed_ledger_is_refused(finished, keep):
    config, study, folder = finished
    unseal(config, folder)
    unseal(config, folder)
    ledger = ledger_of(study.split)
    lines = ledger.read_text().splitlines()
    changed = json.dumps(json.loads(lines[0]) | {"user": "nobody"})
    ledger.write_text("\n".join([lines[number] for number in keep] or [changed, lines[1]]))
    with pytest.raises(UnsealError, match="the ledger was changed"):
        unseal(config, folder)


def test_a_missing_prediction_is_refused_and_opens_nothing(finished):
    config, study, folder = finished
    predictions = pd.read_parquet(folder / "holdout.parquet")
    predictions.iloc[1:].to_parquet(folder / "holdout.parquet")
    with pytest.raises(UnsealError, match=r"predicted by 4 models of each of \[1\] slices, found 3"):
        unseal(config, folder)
    assert not ledger_of(study.split).exists()


def test_a_result_of_another_split_is_refused(finished):
    config, study, folder = finished
    other = config.model_copy(update={"split": config.split.model_copy(update={"seed": 5})})
    with pytest.raises(UnsealError, match="give the configuration and data that the result was made with"):
        unseal(other, folder)
    assert not ledger_of(study.split).exists()


def test_a_study_without_holdout_has_nothing_to_open(finished):
    config, _, folder = finished
    bare = config.model_copy(update={"split": config.split.model_copy(update={"holdout_fraction": 0.0})})
    study = prepare(bare)
    result = StudyResult.load(folder / "result.json")
    hashes = result.hashes | {"split": study.split.split_hash}
    result.model_copy(update={"hashes": hashes, "holdout_commitment": study.split.holdout_commitment}).save(
        folder / "result.json"
    )
    with pytest.raises(UnsealError, match="nothing to open"):
        unseal(bare, folder)
