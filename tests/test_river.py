"""From DICOM files to the report on the tiny cohort, through the commands of `make demo`."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from river import ROOT, expect, prepare_cohort, result_folder, run, study_arguments, tables

from lbp_ray import tune
from lbp_ray.aggregate import compare_slice_counts
from lbp_ray.intervals import WIDENED
from lbp_ray.out_of_fold import seed_means
from lbp_ray.predict import PredictError, Predictor, predict_exam
from lbp_ray.result import METRIC_NAMES, StudyResult
from lbp_ray.study import EvaluationConfig
from preprocess.exam import convert_exam

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def root(module_folder):
    prepare_cohort(module_folder)
    return module_folder


@pytest.fixture(scope="module")
def output(root):
    return expect(root, "lbp_ray.tune", *study_arguments())


@pytest.fixture
def refusal(root, monkeypatch, capsys):
    """Run a study that must be refused; return the message."""
    monkeypatch.setenv("LBP_RAY_ROOT", str(root))
    monkeypatch.chdir(ROOT)

    def refused(*overrides):
        assert tune.main(list(study_arguments(*overrides))) == 2
        message = capsys.readouterr().err
        assert "Traceback" not in message
        return message

    return refused


def test_ends_with_the_table_and_the_report(root, output):
    page = result_folder(root) / "report" / "report.html"
    assert output.rstrip().endswith(f"report: {page}")
    assert "ROC-AUC" in output
    assert "k3-fold01-seed0 done after 4 epochs" in output
    assert page.stat().st_size > 50_000


def test_every_cell_is_in_the_table_once(root, output):
    table = pd.read_parquet(result_folder(root) / "out_of_fold.parquet")
    cells = table.groupby(["num_slices", "fold", "seed"]).size()
    assert set(cells.index) == {(count, fold, 0) for count in (1, 3) for fold in (0, 1)}
    assert table.groupby("num_slices")["study_id"].nunique().nunique() == 1
    assert set(table["selection"]) == {"fixed_epochs"}


def test_result_holds_what_the_report_needs(root, output):
    result = StudyResult.load(result_folder(root) / "result.json")
    assert [item.num_slices for item in result.slice_counts] == [1, 3]
    assert [metric.name for metric in result.slice_counts[0].metrics] == list(METRIC_NAMES)
    assert result.bayes is not None
    assert 0.5 < result.bayes.realised_auc <= 1
    assert result.slice_counts[0].permutation is not None
    assert result.num_holdout_studies > 0


def test_every_out_of_fold_interval_is_widened_for_cross_validation(root, output):
    result = StudyResult.load(result_folder(root) / "result.json")
    intervals = [
        metric.interval
        for part in result.slice_counts
        for metric in (*part.metrics, *part.other_level, part.accuracy, part.separation)
    ]
    intervals += [row.interval for row in result.rules]
    intervals += [at.interval for row in result.rules for at in row.recall_at]
    assert intervals
    assert all(interval.method.endswith(WIDENED) for interval in intervals)
    table = pd.read_parquet(result_folder(root) / "out_of_fold.parquet")
    (split,) = (root / "runs" / "small" / "splits").glob("*/split.parquet")
    patient_of = pd.read_parquet(split).set_index("study_id")["patient_id"].to_dict()
    means = {count: seed_means(rows, EvaluationConfig()) for count, rows in table.groupby("num_slices")}
    assert result.comparisons == compare_slice_counts(means, patient_of, 0.95, inflation=3.0)  # two folds


def test_no_file_of_the_run_holds_a_holdout_label(root, output):
    (split,) = (root / "runs" / "small" / "splits").glob("*/split.parquet")
    sealed = pd.read_parquet(split).query("fold == -1")
    assert len(sealed) > 0
    assert sealed["label"].isna().all()
    for path in (root / "runs" / "small").rglob("*.parquet"):
        table = pd.read_parquet(path)
        if {"label", "study_id"} <= set(table):
            assert table[table["study_id"].isin(sealed["study_id"])]["label"].isna().all(), path


def test_rerun_trains_nothing_and_changes_nothing(root, output):
    before = tables(root)
    again = expect(root, "lbp_ray.tune", *study_arguments())
    assert "done after" not in again
    assert tables(root) == before


def test_same_study_elsewhere_is_bit_equal(root, output, tmp_path):
    expect(root, "lbp_ray.tune", *study_arguments(f"paths.runs={tmp_path / 'runs'}"))
    assert tables(tmp_path) == tables(root)


def test_lost_trial_is_the_only_one_run_again(root, output):
    before = tables(root)
    (lost,) = (root / "runs" / "small" / "trials").glob("k3-fold01-seed0-*")
    shutil.rmtree(lost)
    shutil.rmtree(result_folder(root))
    again = expect(root, "lbp_ray.tune", *study_arguments())
    assert again.count("done after") == 1
    assert tables(root) == before


def test_tensorboard_has_every_epoch(root, output):
    events = list((root / "runs" / "small" / "tune").rglob("k1-fold00-seed0*/events.out.tfevents.*"))
    assert events


def test_patient_in_two_folds_is_refused(root, output, refusal, tmp_path):
    runs = tmp_path / "runs"
    shutil.copytree(root / "runs", runs)
    (path,) = (runs / "small" / "splits").glob("*/split.parquet")
    split = pd.read_parquet(path)
    split.loc[split["fold"] == 1, "patient_id"] = split.loc[split["fold"] == 0, "patient_id"].iloc[0]
    split.to_parquet(path)
    assert "stands in folds [0, 1]" in refusal(f"paths.runs={runs}")


def test_edited_split_is_refused(root, output, refusal, tmp_path):
    runs = tmp_path / "runs"
    shutil.copytree(root / "runs", runs)
    (path,) = (runs / "small" / "splits").glob("*/split.parquet")
    split = pd.read_parquet(path)
    split.loc[split["fold"] >= 0, "label"] = 1 - split.loc[split["fold"] >= 0, "label"]
    split.to_parquet(path)
    assert "was changed after it was made" in refusal(f"paths.runs={runs}")


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("recipe.bach_size=1", "did you mean 'batch_size'?"),
        ("recipe.weights=/nowhere/weights.pt", "weights file not found: /nowhere/weights.pt"),
        ("paths.store=/nowhere/store.zarr", "/nowhere/store.zarr"),
        ("paths.questionnaire=/nowhere/q.csv", "preprocess link"),
        ("paths.annotations=/nowhere/a.xml", "annotation file not found"),
        ("paths.runs=runs", "absolute path"),
        ("recipe.threads=64", "lower recipe.threads"),
        ("slice_counts=[1,21]", "no study of the store yields a crop"),
        ("split.folds=12", "patients of each class"),
    ],
)
def test_likely_mistakes_get_one_clear_line(root, refusal, tmp_path, override, match):
    assert match in refusal(f"paths.runs={tmp_path}", override)


def test_questionnaire_row_without_exam_is_refused(root, refusal, tmp_path):
    rows = pd.read_csv(root / "linked" / "questionnaire.csv")
    rows.loc[3, "study_id"] = "stranger"
    rows.to_csv(tmp_path / "q.csv", index=False)
    message = refusal(f"paths.questionnaire={tmp_path / 'q.csv'}")
    assert "1 row(s) match no exam of the store, e.g. line 5 (study stranger)" in message


def test_incomplete_store_is_refused(root, refusal, tmp_path):
    store = tmp_path / "store.zarr"
    shutil.copytree(root / "store.zarr", store)
    shutil.copytree(root / "store.midsagittal", tmp_path / "store.midsagittal")
    shard = max((path for path in store.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    shard.unlink()
    assert shard.relative_to(store).parts[1] in refusal(f"paths.store={store}", f"paths.runs={tmp_path}")


def test_prediction_of_one_exam(root, output, tmp_path):
    exam = sorted(path for path in (root / "phantom" / "dicom").glob("*/*") if path.is_dir())[0]
    arguments = [str(exam), "--result", str(result_folder(root)), "--out", str(tmp_path)]
    printed = expect(root, "lbp_ray.predict", *arguments)
    prediction = json.loads((tmp_path / "prediction.json").read_text())
    assert 0 <= prediction["probability"] <= 1
    assert len(prediction["slice_probabilities"]) == 3
    assert prediction["num_models"] == 2
    assert "random weights" in printed
    assert (tmp_path / "prediction.png").stat().st_size > 1000


def test_prediction_of_another_protocol_is_refused(root, output, tmp_path):
    expect(
        root, "lbp_ray.phantom", "--config", "configs/phantom_tiny.yaml", "image.matrix=160", f"out={tmp_path / 'p'}"
    )
    exam = sorted(path for path in (tmp_path / "p" / "dicom").glob("*/*") if path.is_dir())[0]
    arguments = [str(exam), "--result", str(result_folder(root)), "--out", str(tmp_path)]
    status, message = run(root, "lbp_ray.predict", *arguments)
    assert status == 2
    assert "pixel spacing is 1.750 x 1.750 mm" in message


def test_prediction_refuses_a_centre_outside_the_image_and_warns_of_strange_exams(root, output, tmp_path):
    exam_folder = sorted(path for path in (root / "phantom" / "dicom").glob("*/*") if path.is_dir())[0]
    predictor, exam = Predictor.load(result_folder(root)), convert_exam(exam_folder)
    assert predict_exam(predictor, exam, num_slices=1)[0].warnings == ()
    with pytest.raises(PredictError, match="outside the image of 128 x 128 pixels"):
        predict_exam(predictor, exam, num_slices=1, centroid=(999, 5))
    noise = np.random.default_rng(0).integers(0, 999, exam.pixels_SHW.shape).astype(exam.pixels_SHW.dtype)
    prediction, picture = predict_exam(predictor, replace(exam, pixels_SHW=noise), num_slices=1, centroid=(64, 64))
    assert "below the study's lowest" in prediction.warnings[0]
    assert picture.shape[1] == 2 * picture.shape[0]
