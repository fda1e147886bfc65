"""Nothing is fitted on sealed exams: a planted use of the hold-out, one for each purpose, is refused or flagged."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
from cohort_factory import choose_middle, commit_trial, make_cohort, prepared, sealed_exams, study_config
from regions_factory import make_regions
from store_factory import pseudonym
from study_factory import make_data, make_spec
from test_segment_plan import region_config

from lbp_ray.cell import TrialError
from lbp_ray.duplicates import fit_lookup
from lbp_ray.out_of_fold import IncompleteStudyError, collect
from lbp_ray.prepare import prepare, seal
from lbp_ray.resident import Resident
from lbp_ray.roi.regions import RegionError
from lbp_ray.segment import plan
from lbp_ray.splits import HOLDOUT, PURPOSES, SplitError, require_no_holdout, sealed_among
from lbp_ray.training import Training
from lbp_ray.tune import plan_trials

BY_MODEL = {"width_px": 6, "height_px": 8, "source": "model", "label_blind": True}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """No weights are needed."""
    monkeypatch.setattr("lbp_ray.prepare.load_backbone_weights", lambda *_, **__: {"weight": torch.zeros(1)})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_cohort(tmp_path_factory.mktemp("data"))


@pytest.fixture
def split():
    exams = {"study_id": list("abcdef"), "patient_id": list("ppqrst"), "fold": [HOLDOUT, HOLDOUT, HOLDOUT, 0, 1, 0]}
    return pd.DataFrame(exams)


# --- the gate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("purpose", PURPOSES)
def test_every_purpose_is_refused_by_name_with_what_to_do(split, purpose):
    would, instead = PURPOSES[purpose]
    with pytest.raises(SplitError) as caught:
        require_no_holdout(split, iter("dbca"), purpose)
    assert str(caught.value).startswith(
        f"{would} 2 patient(s) of the sealed hold-out, e.g. patient p (study a; 3 sealed"
    )
    assert str(caught.value).endswith(instead)


@pytest.mark.parametrize("purpose", PURPOSES)
def test_exams_of_the_folds_and_strangers_pass(split, purpose):
    names = ["d", "e", "f", "stranger"]
    assert sealed_among(split, names).empty
    require_no_holdout(split, names, purpose)  # a refusal would raise


def test_the_named_purposes_are_all_there():
    named = {"templates", "region_finder", "oversampling", "smote", "scaling", "pca", "duplicates", "sweep"}
    assert named | {"training", "threshold", "epoch"} == set(PURPOSES)


# --- templates -------------------------------------------------------------------------------------------------------


def test_templates_are_refused_or_flagged(data, tmp_path):
    sealed = sealed_exams(prepared(data, tmp_path).split)
    with pytest.raises(
        SplitError, match=r"templates of the mid-sagittal choice.* would show 1 patient.*choose templates"
    ):
        prepared(data, tmp_path, [sealed[0], 0])
    study = prepared(data, tmp_path, [sealed[0], 0], midsagittal={"allow_holdout_templates": True})
    assert "gave template slices for the mid-sagittal choice: the hold-out is not untouched" in study.statements[0]


def test_templates_are_known_by_their_exams_whatever_the_questionnaire_calls_the_patient(data, tmp_path):
    rows = pd.read_csv(data / "questionnaire.csv")
    rows.assign(patient_id="renamed" + rows["patient_id"]).to_csv(tmp_path / "renamed.csv", index=False)
    paths = {"questionnaire": tmp_path / "renamed.csv"}
    usual = sealed_exams(seal(study_config(data, tmp_path / "a", paths=paths)).split)
    again = seal(study_config(data, tmp_path / "b", usual[:2], paths=paths)).split
    assert not set(sealed_exams(again)) & set(usual[:2])


# --- the region finder -----------------------------------------------------------------------------------------------


def test_a_region_finder_is_not_trained_on_sealed_exams(data, tmp_path, monkeypatch):
    seal(study_config(data, tmp_path))
    config = region_config(data, tmp_path, folds={"study": "small", "folds": 3})
    everyone = {pseudonym("p", number): number % 3 for number in range(16)}
    monkeypatch.setattr(plan, "assign_folds", lambda *_: everyone)
    with pytest.raises(SplitError, match=r"segmenter that places the crops would be trained on 4 patient\(s\)"):
        plan.plan_regions(config)


@pytest.mark.parametrize("known_as", ["in the store", "in the questionnaire"])
def test_regions_by_a_network_that_saw_sealed_exams_are_refused_or_flagged(data, tmp_path, known_as):
    paths = {}
    if known_as == "in the questionnaire":
        rows = pd.read_csv(data / "questionnaire.csv")
        rows.assign(patient_id="renamed" + rows["patient_id"]).to_csv(tmp_path / "renamed.csv", index=False)
        paths = {"questionnaire": tmp_path / "renamed.csv"}
    sealed = sealed_exams(seal(study_config(data, tmp_path, paths=paths)).split)
    make_regions(tmp_path / "regions", data, choose_middle(data, tmp_path), fold_of={sealed[0]: 0})
    with pytest.raises(RegionError, match=r"would be trained on 1 patient\(s\) of the sealed hold-out"):
        prepared(data, tmp_path, roi=BY_MODEL, paths=paths)
    study = prepared(data, tmp_path, roi=BY_MODEL | {"allow_holdout_training": True}, paths=paths)
    assert any("trained on 1 patient(s) of the sealed hold-out" in line for line in study.statements)


# --- near duplicates -------------------------------------------------------------------------------------------------


def test_the_lookup_of_near_duplicates_is_not_fitted_on_sealed_exams(split):
    crops = np.random.default_rng(0).integers(0, 99, (6, 16, 8))
    fit_lookup(crops, split, np.array([3, 4, 5]), bits=48)
    with pytest.raises(SplitError, match=r"looked up by would be fitted on 1 patient\(s\).*patient q \(study c"):
        fit_lookup(crops, split, np.array([2, 3, 4]), bits=48)


# --- training, epochs, thresholds ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("selection", "fold"), [("fixed_epochs", 1), ("inner_validation", 1), ("same_fold", 0)])
def test_a_sealed_exam_that_strays_into_the_folds_is_refused_by_its_missing_label(selection, fold):
    """Training, an inner validation and the evaluated fold; a sealed exam is written into each."""
    planted = make_data([-1, -1, *([0] * 6), *([1] * 10)])
    planted.folds_N[0] = fold
    resident = Resident(torch.nn.Identity())
    with pytest.raises((TrialError, ValueError), match=r"labels 0 and 1, found|NaN"):
        Training(make_spec(selection=selection, feature_cache=False), planted, resident)


def test_sealed_scores_fit_no_threshold(data, tmp_path):
    config = study_config(data, tmp_path)
    study = prepare(config)
    hashes = {"crops_hash": study.crops.crops_hash, "split_hash": study.split.split_hash, "weights_hash": "w"}
    specs = plan_trials(config.model_copy(update={"seeds": (0,)}), **hashes)
    folders = [tmp_path / spec.cell.name for spec in specs]
    for spec, folder in zip(specs, folders, strict=True):
        commit_trial(spec, folder, study)
        record = json.loads((folder / "trial.json").read_text())
        (folder / "trial.json").write_text(json.dumps({"epochs": [41], **record}))
    assert collect(specs, folders, study.analysed, config.evaluation)["threshold"].notna().all()
    scores = [pd.read_parquet(folders[0] / f"{name}.parquet") for name in ("out_of_fold", "holdout")]
    pd.concat(scores).to_parquet(folders[0] / "out_of_fold.parquet")
    with pytest.raises(IncompleteStudyError, match="is predicted by fold 0, which trained on it or never held it out"):
        collect(specs, folders, study.analysed, config.evaluation)
