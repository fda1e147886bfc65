"""The hold-out: opened by one command, recorded before it is judged, and told when it is no longer untouched."""

from __future__ import annotations

import json
import shutil

import pandas as pd
import pytest
import torch
import yaml
from cohort_factory import commit_trial, make_cohort, sealed_exams, study_config
from store_factory import pseudonym

from lbp_ray.aggregate import aggregate
from lbp_ray.distributed.worker import load_trial_data
from lbp_ray.metrics import all_metrics, youden_threshold
from lbp_ray.prepare import prepare, seal
from lbp_ray.result import StudyResult, table_hashes
from lbp_ray.splits import HOLDOUT, LEDGER, LedgerError, read_ledger
from lbp_ray.tune import plan_trials
from lbp_ray.unseal import UnsealError, main, unseal


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


def ledger_of(config):
    return config.paths.runs / config.name / LEDGER


def sealed_studies(split):
    return set(split.table.loc[split.table["fold"] == HOLDOUT, "study_id"])


def edit_result(folder, *, hashes, **changes):
    """Save a result as if it had been made with other hashes."""
    result = StudyResult.load(folder / "result.json")
    changes["hashes"] = result.hashes | hashes
    result.model_copy(update=changes).save(folder / "result.json")


def rewritten(config, tmp_path, change=lambda rows: rows):
    """Return the configuration with a questionnaire file of other bytes."""
    path = tmp_path / "again.csv"
    change(pd.read_csv(config.paths.questionnaire)).assign(note="again").to_csv(path, index=False)
    return config.model_copy(update={"paths": config.paths.model_copy(update={"questionnaire": path})})


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
    outside = pd.read_parquet(folder / "out_of_fold.parquet").groupby("study_id")
    scores, labels = outside["probability"].mean(), outside["label"].first()
    expected = youden_threshold(labels.to_numpy(dtype=int), scores.to_numpy())
    assert unseal(config, folder).slice_counts[0].threshold == expected


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
    openings = read_ledger(ledger_of(config))
    assert [(opening.line, opening.number) for opening in openings] == [(1, 1), (2, 2)]
    assert {opening.split_hash for opening in openings} == {study.split.split_hash}
    assert all(list(opening.studies) == sorted(sealed_studies(study.split)) for opening in openings)
    assert {opening.result_hash for opening in openings} == {StudyResult.load(folder / "result.json").result_hash}
    assert all(opening.user and opening.time for opening in openings)
    assert sorted(item.name for item in folder.glob("unsealed-*")) == ["unsealed-01.json", "unsealed-02.json"]


def test_no_study_is_named_in_what_is_told(finished):
    config, study, folder = finished
    unseal(config, folder)
    text = (folder / "unsealed-01.json").read_text()
    assert not any(name in text for name in study.split.table["study_id"])


@pytest.mark.parametrize("keep", [[1], []], ids=["a line taken out", "a line changed"])
def test_a_changed_ledger_is_refused(finished, keep):
    config, _, folder = finished
    unseal(config, folder)
    unseal(config, folder)
    ledger = ledger_of(config)
    lines = ledger.read_text().splitlines()
    changed = json.dumps(json.loads(lines[0]) | {"user": "nobody"})
    ledger.write_text("\n".join([lines[number] for number in keep] or [changed, lines[1]]))
    for refused in (lambda: unseal(config, folder), lambda: seal(config)):
        with pytest.raises(LedgerError, match="the ledger was changed"):
            refused()


def test_what_an_opening_told_is_never_overwritten(finished):
    config, _, folder = finished
    unseal(config, folder)
    told = (folder / "unsealed-01.json").read_bytes()
    ledger_of(config).unlink()
    with pytest.raises(UnsealError, match=r"unsealed-01.json exists, but the ledger holds 0 line"):
        unseal(config, folder)
    assert (folder / "unsealed-01.json").read_bytes() == told
    assert not ledger_of(config).exists()


def test_a_missing_prediction_is_refused_and_opens_nothing(finished):
    config, _, folder = finished
    predictions = pd.read_parquet(folder / "holdout.parquet")
    predictions.iloc[1:].to_parquet(folder / "holdout.parquet")
    edit_result(folder, hashes=table_hashes(folder))
    with pytest.raises(UnsealError, match=r"predicted by 4 models of each of \[1\] slices, found 3"):
        unseal(config, folder)
    assert not ledger_of(config).exists()


@pytest.mark.parametrize("name", ["holdout", "out_of_fold"])
def test_a_table_that_was_changed_after_the_result_is_refused_and_opens_nothing(finished, name):
    config, _, folder = finished
    table = pd.read_parquet(folder / f"{name}.parquet")
    table.assign(probability=1 - table["probability"]).to_parquet(folder / f"{name}.parquet")
    with pytest.raises(UnsealError, match=rf"{name}.parquet is not the table that result.json was made with"):
        unseal(config, folder)
    assert not ledger_of(config).exists()


def test_a_result_that_names_no_tables_is_refused(finished):
    """Such as one that was saved before its tables were part of it."""
    config, _, folder = finished
    result = StudyResult.load(folder / "result.json")
    kept = {name: value for name, value in result.hashes.items() if name not in table_hashes(folder)}
    result.model_copy(update={"hashes": kept}).save(folder / "result.json")
    with pytest.raises(UnsealError, match="is not the table"):
        unseal(config, folder)


def test_the_result_decides_how_it_is_judged(finished):
    """Another rule, seed, split or level on the command line changes no figure and draws nothing."""
    config, study, folder = finished
    changes = {
        "recipe": config.recipe.model_copy(update={"study_rule": "mean"}),
        "seeds": (7,),
        "slice_counts": (1, 3),
        "split": config.split.model_copy(update={"seed": 5, "folds": 3}),
        "evaluation": config.evaluation.model_copy(update={"interval_level": 0.6, "seed": 9}),
    }
    first = unseal(config, folder).slice_counts
    assert unseal(config.model_copy(update=changes), folder).slice_counts == first
    assert [path.name for path in study.split.folder.parent.iterdir()] == [study.split.folder.name]


def test_another_rewrite_of_the_questionnaire_is_the_same_holdout(finished, tmp_path):
    """One byte more used to commit the split again, with a ledger that knew of no opening."""
    config, study, folder = finished
    unseal(config, folder)
    told = (folder / "unsealed-01.json").read_bytes()
    again = rewritten(config, tmp_path)
    assert seal(again).split.folder == study.split.folder
    assert unseal(again, folder).opening.number == 2
    assert (folder / "unsealed-01.json").read_bytes() == told
    assert len(list(study.split.folder.parent.iterdir())) == 1


def test_an_overlapping_split_of_the_study_says_that_it_was_opened(finished):
    config, study, folder = finished
    other = config.model_copy(update={"split": config.split.model_copy(update={"seed": 1})})
    assert seal(other).statements == ()
    unseal(config, folder)
    drawn = seal(other)
    shared = sealed_studies(study.split) & sealed_studies(drawn.split)
    assert 0 < len(shared) < len(sealed_studies(study.split))
    assert drawn.statements == (
        f"{len(shared)} sealed exam(s) were opened before, in the hold-out of another split: the hold-out is not "
        "untouched.",
    )
    assert prepare(other).statements == drawn.statements
    assert seal(config).statements == ()


@pytest.mark.parametrize(("seed", "number"), [(1, 2), (None, 1)], ids=["shares exams", "shares none"])
def test_an_opening_counts_those_of_other_splits_that_share_an_exam(finished, seed, number):
    config, study, folder = finished
    unseal(config, folder)
    seeds = range(1, 100) if seed is None else [seed]
    others = (seal(config.model_copy(update={"split": config.split.model_copy(update={"seed": s})})) for s in seeds)
    split = next(
        other.split
        for other in others
        if bool(sealed_studies(other.split) & sealed_studies(study.split)) == (number == 2)
    )
    edit_result(folder, hashes={"split": split.split_hash}, holdout_commitment=split.holdout_commitment)
    predictions = pd.read_parquet(folder / "holdout.parquet")
    names = dict(zip(sorted(sealed_studies(study.split)), sorted(sealed_studies(split)), strict=True))
    predictions.assign(study_id=predictions["study_id"].map(names)).to_parquet(folder / "holdout.parquet")
    edit_result(folder, hashes=table_hashes(folder))
    opening = unseal(config, folder).opening
    assert (opening.line, opening.number) == (2, number)
    assert (folder / "unsealed-02.json").is_file()


def test_a_sealed_exam_without_a_label_is_refused_and_opens_nothing(finished, tmp_path):
    config, study, folder = finished
    lost = min(sealed_studies(study.split))
    changed = rewritten(config, tmp_path, lambda rows: rows[rows["study_id"] != lost])
    with pytest.raises(UnsealError, match=f"labels 3 of 4 sealed exams, all are required, e.g. study {lost}"):
        unseal(changed, folder)
    assert not ledger_of(config).exists()


def test_a_result_whose_split_is_gone_is_refused(finished):
    config, study, folder = finished
    shutil.rmtree(study.split.folder)
    with pytest.raises(UnsealError, match=r"no split under .* is the one that the result was made with"):
        unseal(config, folder)
    assert not study.split.folder.exists()
    assert not ledger_of(config).exists()


def test_a_result_of_another_study_is_refused(finished):
    config, _, folder = finished
    with pytest.raises(UnsealError, match="is a result of study small, the configuration is of other"):
        unseal(config.model_copy(update={"name": "other"}), folder)


def test_a_study_without_holdout_has_nothing_to_open(finished):
    config, _, folder = finished
    bare = config.model_copy(update={"split": config.split.model_copy(update={"holdout_fraction": 0.0})})
    split = seal(bare).split
    edit_result(folder, hashes={"split": split.split_hash}, holdout_commitment=split.holdout_commitment)
    with pytest.raises(UnsealError, match="nothing to open"):
        unseal(bare, folder)
