"""A study that is cropped by a segmenter asks it about a new exam too, and refuses the mask that it would review."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from cohort_factory import choose_middle, make_cohort
from regions_factory import make_mask, make_regions
from store_factory import pseudonym

from lbp_ray.predict import PredictError, Predictor, SliceCountPredictor, predict_exam
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
        monkeypatch.setattr("lbp_ray.predict._score", lambda _, crops: seen.append(crops) or np.full(len(crops), 0.5))
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


def test_a_predictor_made_before_there_were_regions_is_read(predictor, tmp_path):
    content = json.loads(predictor.model_dump_json())
    del content["regions"], content["box_mm"]
    (tmp_path / "predictor.json").write_text(json.dumps(content))
    assert Predictor.load(tmp_path).regions is None


def test_a_physical_box_fits_other_spacings(predictor, exam, answer):
    seen = answer(make_mask())
    physical = predictor.model_copy(update={"box_mm": (12.0, 9.0), "spacing_mm": (2.0, 2.0)})
    prediction, _ = predict_exam(physical, exam, num_slices=1)
    assert prediction.box[2:] == (12, 9)
    assert seen[0].shape == (1, 8, 6)
    with pytest.raises(PredictError, match="pixel spacing"):
        predict_exam(predictor.model_copy(update={"spacing_mm": (2.0, 2.0)}), exam, num_slices=1)
