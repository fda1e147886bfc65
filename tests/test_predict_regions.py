"""A study that is cropped by a segmenter asks it about a new exam too, and refuses the mask that it would review."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cohort_factory import choose_middle, commit_trial, make_cohort, study_config
from regions_factory import make_mask, make_regions
from store_factory import pseudonym

from lbp_ray.out_of_fold import collect
from lbp_ray.predict import PredictError, Predictor, SliceCountPredictor, describe_predictor, predict_exam
from lbp_ray.prepare import prepare
from lbp_ray.tune import plan_trials
from preprocess.exam import ConvertedExam
from preprocess.store.read import SliceStore


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_cohort(tmp_path_factory.mktemp("data"))


@pytest.fixture
def exam(data):
    store = SliceStore.open(data / "x.zarr")
    return ConvertedExam(store.read(pseudonym("t", 7)), store.record(pseudonym("t", 7)), {"a": "converted"})


@pytest.fixture
def predictor(data, tmp_path):
    """Of a study with regions whose final network answers with a mask that a test sets."""
    middle = choose_middle(data, tmp_path)
    plausible = {"area_mm2": (30, 90), "height_mm": (6, 12), "width_mm": (4, 8)}
    folder = make_regions(tmp_path / "regions", data, middle, meta={"plausible": plausible})
    (folder / "final.pt").write_bytes(b"")
    return Predictor(
        name="small",
        statements=(),
        templates=middle / "templates.npz",
        box_height_px=8,
        box_width_px=6,
        spacing_mm=(1.0, 1.0),
        centroid_mm=(0.0, 0.0),
        slice_pitch_mm=4.0,
        tolerance_mm=1.0,
        lowest_mid_score=-1.0,
        lowest_mid_margin=-1.0,
        study_rule="mean",
        study_rule_k=2,
        by_slice_count={1: SliceCountPredictor(models=(middle,), threshold=0.5)},
        regions=folder,
    )


@pytest.fixture
def answer(monkeypatch):
    """Let the segmenter answer with a mask, and every network with 0.5; returns the crops that networks saw."""
    seen = []

    def give(mask):
        segmenter = SimpleNamespace(masks=lambda images: [mask for _ in images])
        monkeypatch.setattr("lbp_ray.segment.infer.Segmenter.load", lambda *_, **__: segmenter)
        half = lambda _, crops: seen.append(crops) or np.full(len(crops), 0.5)  # noqa: E731
        monkeypatch.setattr("lbp_ray.predict.slice_probabilities", half)
        return seen

    return give


def test_the_box_is_where_the_segmenter_sees_the_spine(predictor, exam, answer):
    seen = answer(make_mask(top=7, left=5, bottom=15, right=11))
    prediction, picture = predict_exam(predictor, exam, num_slices=1)
    assert (prediction.box, prediction.crop_source) == ((7, 5, 8, 6), "model")
    np.testing.assert_array_equal(seen[0][0], exam.pixels_SHW[prediction.mid_slice, 7:15, 5:11])
    assert (picture == (86, 180, 233)).all(axis=2).any()


@pytest.mark.parametrize(
    ("mask", "code"),
    [(make_mask(bottom=0), "roi_empty"), (make_mask(left=5, right=7), "roi_small"), (make_mask(top=0), "roi_at_edge")],
    ids=["empty", "small", "edge"],
)
def test_a_mask_for_review_is_no_prediction_unless_the_centre_is_given(predictor, exam, answer, mask, code):
    answer(mask)
    with pytest.raises(PredictError, match=rf"\({code}\).*give the centre of its lumbar region"):
        predict_exam(predictor, exam, num_slices=1)
    assert predict_exam(predictor, exam, num_slices=1, centroid=(8, 6))[0].crop_source == "given"


def test_a_lost_segmenter_is_said(predictor, exam):
    (predictor.regions / "final.pt").unlink()
    with pytest.raises(PredictError, match="is gone; make the regions again"):
        predict_exam(predictor, exam, num_slices=1)


def test_a_predictor_of_another_version_is_refused_with_the_way_out(predictor, tmp_path):
    content = json.loads(predictor.model_dump_json()) | {"study_rule": "max"}
    (tmp_path / "predictor.json").write_text(json.dumps(content))
    with pytest.raises(PredictError, match=r"another version of this program; run the study again"):
        Predictor.load(tmp_path)


@pytest.mark.parametrize(
    ("rule", "expected"), [("any", 0.8), ("mean", 0.45), ("top_k", 0.6), ("noisy_or", 0.8935)], ids=str
)
def test_an_exam_is_scored_by_each_network_before_they_are_averaged(predictor, exam, monkeypatch, rule, expected):
    """As the scores were that the threshold was fitted on."""
    answers = {"a": [0.9, 0.1, 0.5], "b": [0.2, 0.3, 0.7]}
    monkeypatch.setattr("lbp_ray.predict.slice_probabilities", lambda path, _: np.array(answers[path.name]))
    monkeypatch.setattr("lbp_ray.predict._cut", lambda *_: ((0, 0, 8, 6), np.ones((3, 8, 6)), np.array([1, 2, 3])))
    networks = SliceCountPredictor(models=(predictor.regions / "a", predictor.regions / "b"), threshold=expected)
    study = predictor.model_copy(update={"study_rule": rule, "by_slice_count": {3: networks}})
    prediction, _ = predict_exam(study, exam, num_slices=3, centroid=(8, 6))
    assert prediction.probability == pytest.approx(expected, abs=1e-9)
    assert prediction.slice_probabilities == pytest.approx((0.55, 0.2, 0.6))


@pytest.fixture
def finish(data, tmp_path, monkeypatch):
    """Prepares a study of this configuration and commits its trials."""
    monkeypatch.setattr("lbp_ray.prepare.load_backbone_weights", lambda *_, **__: {"weight": torch.zeros(1)})

    def finished(**changes):
        config = study_config(data, tmp_path, **changes)
        study = prepare(config)
        specs = plan_trials(config, crops_hash="c", split_hash="s", weights_hash="w")
        folders = [tmp_path / spec.cell.name for spec in specs]
        for spec, folder in zip(specs, folders, strict=True):
            commit_trial(spec, folder, study)
            (folder / "model.pt").touch()
        return config, study, specs, folders

    return finished


@pytest.mark.parametrize(
    ("selection", "source", "told"),
    [
        ("same_fold", "cross_fitted", "The epochs of the study were chosen on the folds that judged them"),
        ("fixed_epochs", "same_fold", "The thresholds of the study were chosen on the folds that judged them"),
        ("same_fold", "same_fold", "The epochs and thresholds of the study were chosen on the folds that judged them"),
        ("fixed_epochs", "cross_fitted", None),
    ],
)
def test_a_predictor_says_what_was_chosen_on_the_folds_that_judged_it_and_nothing_else(finish, selection, source, told):
    recipe = {"weights": "random", "selection": selection}
    found = describe_predictor(*finish(recipe=recipe, evaluation={"threshold_source": source})).statements
    held = [line for line in found if "folds that judged them" in line]
    assert [line.startswith(told) for line in held] == ([True] if told else [])


def test_the_threshold_of_a_predictor_is_that_of_the_study_s_averages(finish):
    """As evaluation says, not always Youden's."""
    config, study, specs, folders = finish(seeds=(0, 1), evaluation={"ensemble_threshold": "mean_of_seeds"})
    found = describe_predictor(config, study, specs, folders).by_slice_count[1]
    table = collect(specs, folders, study.analysed, config.evaluation)
    assert found.threshold == pytest.approx(table.drop_duplicates(["fold", "seed"])["threshold"].mean())
    assert found.models == tuple(folder / "model.pt" for folder in folders)


def test_a_physical_box_fits_other_spacings(predictor, exam, answer):
    seen = answer(make_mask())
    physical = predictor.model_copy(update={"box_mm": (12.0, 9.0), "spacing_mm": (2.0, 2.0)})
    prediction, _ = predict_exam(physical, exam, num_slices=1)
    assert prediction.box[2:] == (12, 9)
    assert seen[0].shape == (1, 8, 6)
    with pytest.raises(PredictError, match="pixel spacing"):
        predict_exam(predictor.model_copy(update={"spacing_mm": (2.0, 2.0)}), exam, num_slices=1)
