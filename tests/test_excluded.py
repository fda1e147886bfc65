"""Subjects outside the task are scored by networks that never met them, and described by group without a name."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from cohort_factory import NUM_EXAMS, make_cohort, study_config
from finished_factory import chance, commit_result, holdout_rows, out_of_fold_rows
from store_factory import pseudonym
from study_factory import random_backbone

from lbp_ray.excluded import ExcludedError, describe, describe_group, main, score_excluded
from lbp_ray.intervals import metric_intervals
from lbp_ray.nets.resnet import build_head, standardise
from lbp_ray.out_of_fold import seed_means
from lbp_ray.predict import Predictor, SliceCountPredictor
from lbp_ray.prepare import prepare
from lbp_ray.result import ExcludedScores, StudyResult
from lbp_ray.splits import HOLDOUT
from lbp_ray.study import EvaluationConfig
from preprocess.mapper import map_here
from preprocess.midsagittal.choose import choose_for_store
from preprocess.store.read import SliceStore

SLIGHTLY, MIXED = (10, 11, 12, 13), (14, 15)
"""Exams that are slightly symptomatic, and symptomatic with a year of pain but none now."""

KNOWN_PATIENT, NOT_ANNOTATED = 13, 12
"""One exam of a patient whose other exam is in the study, and one without an annotation."""

SCORED = (10, 11)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = make_cohort(
        tmp_path_factory.mktemp("data"),
        annotated=[number for number in range(NUM_EXAMS) if number != NOT_ANNOTATED],
        records={KNOWN_PATIENT: {"patient_id": pseudonym("p", 2)}},
    )
    rows = pd.read_csv(root / "questionnaire.csv")
    answers = ["low_back_pain", "frequency", "intensity", "previous_episodes", "pain_now"]
    rows.loc[list(SLIGHTLY), answers] = (2, 2, 4, 1, 1)
    rows.loc[list(MIXED), answers] = (2, 4, 8, 1, 0)
    rows.loc[KNOWN_PATIENT, "patient_id"] = pseudonym("p", 2)
    rows.to_csv(root / "questionnaire.csv", index=False)
    rows[["study_id"]].assign(slice_index=2).to_csv(root / "middle.csv", index=False)
    return root


@pytest.fixture(scope="module")
def networks(module_folder):
    """Two kept networks: their files and what they say of images."""
    files, scores = [], []
    for seed in range(2):
        backbone, head = random_backbone(seed), build_head(seed=seed)
        files.append(module_folder / f"{seed}.pt")
        torch.save({"backbone": backbone.state_dict(), "head": head.state_dict()}, files[-1])
        scores.append(lambda images, b=backbone, h=head: torch.sigmoid(h(b(standardise(images))))[:, 0])
    return files, lambda images: torch.stack([score(images) for score in scores]).detach().numpy()


@pytest.fixture
def finished(data, networks, tmp_path, monkeypatch):
    """A finished study of random scores and kept networks: configuration, preparation, result folder."""
    monkeypatch.setattr("lbp_ray.prepare.load_backbone_weights", lambda *_, **__: {"weight": torch.zeros(1)})
    changes = {"seeds": (0, 1), "slice_counts": (1, 3), "evaluation": {"bootstrap_resamples": 50}}
    templates = [(pseudonym("t", 0), 2), (pseudonym("t", 1), 2)]
    middle = choose_for_store(data / "x.zarr", data / "middle", templates, map_here, data / "middle.csv")
    config = study_config(data, tmp_path, paths={"midsagittal": middle}, **changes)
    study = prepare(config)
    sealed = study.split.table["study_id"][study.split.table["fold"] == HOLDOUT].tolist()
    tables = {"outside": out_of_fold_rows(config, study.split, chance(1))}
    tables["holdout"] = holdout_rows(config, sealed, chance(2))
    crops_hash = study.crops.crops_hash
    folder = commit_result(tmp_path / "result", config, study.split, **tables, crops_hash=crops_hash)
    keep(folder, {count: SliceCountPredictor(models=tuple(networks[0]), threshold=0.5) for count in (1, 3)})
    return config, study, folder


def keep(folder, by_slice_count):
    """Leave a predictor as a study does."""
    boxes = {"box_height_px": 8, "box_width_px": 6, "spacing_mm": (1, 1), "centroid_mm": (0, 0)}
    limits = {"slice_pitch_mm": 4, "tolerance_mm": 1, "lowest_mid_score": 0, "lowest_mid_margin": 0}
    rule = {"study_rule": "any", "study_rule_k": 2}
    names = {"name": "small", "statements": (), "templates": folder}
    predictor = Predictor(**names, **boxes, **limits, **rule, by_slice_count=by_slice_count)
    (folder / "predictor.json").write_text(predictor.model_dump_json())


def group_of(scores, place, name):
    return next(group for group in scores.slice_counts[place].groups if group.group == name)


@pytest.mark.parametrize(("place", "count"), [(0, 1), (1, 3)])
def test_a_group_is_scored_by_the_mean_of_networks_on_the_study_s_own_crops(finished, networks, place, count):
    config, study, folder = finished
    rows = study.crops.table.reset_index().set_index("study_id")
    expected = []
    for number in SCORED:
        crops_KHW = study.crops.pixels_NKHW[rows.loc[pseudonym("s", number), "index"]]
        middle = len(crops_KHW) // 2
        images = torch.from_numpy(crops_KHW[middle - count // 2 : middle + count // 2 + 1].astype(np.float32))
        expected.append(networks[1](images).max(axis=1).mean())
    found = score_excluded(config, folder)
    group = group_of(found, place, "slightly_symptomatic")
    assert (found.slice_counts[place].num_slices, group.num_studies, found.num_models) == (count, 2, 2)
    assert group.mean == pytest.approx(np.mean(expected), abs=1e-5)
    assert group.quartiles == pytest.approx(np.quantile(expected, (0.25, 0.5, 0.75)), abs=1e-5)
    assert group.share_positive == np.mean(np.array(expected) >= found.slice_counts[place].threshold)


def test_the_task_s_own_groups_stand_beside_them_as_they_were_judged_out_of_fold(finished):
    config, _, folder = finished
    found = score_excluded(config, folder)
    means = seed_means(pd.read_parquet(folder / "out_of_fold.parquet").query("num_slices == 3"), config.evaluation)
    means = means.drop_duplicates("study_id").assign(called=lambda rows: rows["study_probability"] >= rows["threshold"])
    for label, name in ((0, "asymptomatic"), (1, "symptomatic")):
        group, rows = group_of(found, 1, name), means[means["label"] == label]
        assert (group.num_studies, group.share_positive) == (len(rows), rows["called"].mean())
        assert group.mean == pytest.approx(rows["study_probability"].mean())
    assert [group.group for group in found.slice_counts[1].groups] == [
        "asymptomatic", "symptomatic", "slightly_symptomatic", "symptomatic_asymptomatic",
    ]  # fmt: skip


def test_own_groups_have_the_interval_that_their_recall_has(finished):
    config, _, folder = finished
    found, made = score_excluded(config, folder), StudyResult.load(folder / "result.json")
    rows = seed_means(pd.read_parquet(folder / "out_of_fold.parquet").query("num_slices == 3"), config.evaluation)
    rows = rows.drop_duplicates("study_id")
    called = rows["study_probability"] >= rows["threshold"]
    arrays = (rows["label"], rows["study_probability"], called, rows["study_id"])  # an exam of each patient
    wanted = metric_intervals(
        *(values.to_numpy() for values in arrays), evaluation=config.evaluation, inflation=1 + made.num_folds
    )["recall"]  # 1 + K / (K - 1) of two folds is 3
    assert made.num_folds == 2
    interval = group_of(found, 1, "symptomatic").interval
    assert (interval.low, interval.high) == (wanted.low, wanted.high)
    assert interval.method == "Wilson over 3 patients, widened for cross-validation"
    assert group_of(found, 1, "slightly_symptomatic").interval.method == "Wilson over 2 patients"


def test_an_optimistic_study_s_own_groups_have_no_interval(finished):
    config, _, folder = finished
    result = StudyResult.load(folder / "result.json")
    told = result.config | {"evaluation": result.config["evaluation"] | {"threshold_source": "same_fold"}}
    result.model_copy(update={"config": told}).save(folder / "result.json")
    found = score_excluded(config, folder)
    assert [group.interval is None for group in found.slice_counts[0].groups] == [True, True, False, False]
    told = "are recall and 1 − specificity, judged by what was chosen on the very same fold, and have no interval"
    assert "slightly_symptomatic" in describe(found)
    assert told in describe(found)
    honest = tuple(
        part.model_copy(update={"groups": tuple(group.model_copy(update={"interval": ends}) for group in part.groups)})
        for part in found.slice_counts
        for ends in [part.groups[-1].interval]
    )
    assert told not in describe(found.model_copy(update={"slice_counts": honest}))


def test_whoever_is_in_the_study_or_has_no_crop_is_left_out_with_the_reason(finished):
    config, _, folder = finished
    found = score_excluded(config, folder)
    assert found.left_out == {"patient_in_split": 1, "no_annotation": 1}
    assert "patient_in_split: 1" in describe(found)


def test_no_subject_is_named_in_what_is_written(finished, data):
    config, _, folder = finished
    found = score_excluded(config, folder)
    text = (folder / "excluded.json").read_text()
    manifest = SliceStore.open(data / "x.zarr").manifest
    assert not any(name in text for column in ("study_id", "patient_id") for name in manifest[column])
    assert ExcludedScores.load(folder / "excluded.json") == found


def test_the_command_prints_the_groups_and_renders_the_report(finished, tmp_path, capsys):
    config, _, folder = finished
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert main(["--config", str(tmp_path / "study.yaml"), "--result", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "slightly_symptomatic          2" in printed
    assert "mean of 2 fold networks" in printed
    assert f"report: {folder / 'report' / 'report.html'}" in printed
    assert "the mean of 2 networks per slice count" in (folder / "report" / "report.html").read_text()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder, _: keep(folder, {}), "kept no network; run it again with compute.keep_models"),
        (lambda folder, _: keep(folder, {1: SliceCountPredictor(models=(folder / "x",), threshold=0.5)}), "x is gone"),
        (lambda _, crops: (crops / "crops.json").write_text('{"crops_hash": ""}'), "the crops of .* are gone"),
    ],
    ids=["no network", "a lost network", "lost crops"],
)
def test_nothing_is_scored_without_networks_and_crops(finished, tmp_path, capsys, spoil, message):
    config, study, folder = finished
    spoil(folder, study.crops.folder)
    with pytest.raises(ValueError, match=message):
        score_excluded(config, folder)
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert main(["--config", str(tmp_path / "study.yaml"), "--result", str(folder)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (folder / "excluded.json").exists()


def test_a_cohort_without_others_is_refused(finished, tmp_path):
    config, study, folder = finished
    rows = pd.read_csv(config.paths.questionnaire)
    rows[rows["study_id"].isin(study.split.table["study_id"])].to_csv(tmp_path / "answers.csv", index=False)
    paths = config.paths.model_copy(update={"questionnaire": tmp_path / "answers.csv"})
    with pytest.raises(ExcludedError, match=r"none of 0 exams outside the task can be scored"):
        score_excluded(config.model_copy(update={"paths": paths}), folder)


@pytest.mark.parametrize(
    ("threshold", "patients", "method", "bounds"),
    [
        (0.5, "abcdefgh", "Wilson over 8 patients", (0.3057, 0.8632)),
        (0.9, "aabbccdd", "Wilson over 4 patients", (0.0, 0.4899)),
        (0.5, "aabbccdd", "percentile bootstrap over patients", (0.5, 0.875)),
    ],
    ids=["one exam each", "nobody called", "several exams"],
)
def test_the_interval_of_a_share_counts_patients(threshold, patients, method, bounds):
    exams = pd.DataFrame({"study_id": list("stuvwxyz"), "patient_id": list(patients), "group": "x"})
    scores = exams.assign(study_probability=[0.6, 0.7, 0.1, 0.6, 0.6, 0.2, 0.6, 0.3], threshold=threshold)
    group = describe_group(scores, EvaluationConfig(bootstrap_resamples=500))
    assert group.interval.method.startswith(method)
    assert (group.interval.low, group.interval.high) == pytest.approx(bounds, abs=1e-4)
