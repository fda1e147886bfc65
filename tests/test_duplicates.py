"""The same image under two patients' names: found whatever was done to it, refused across folds, bounded in work."""

from __future__ import annotations

import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from cohort_factory import NUM_EXAMS, SHAPE, make_cohort, prepared, sealed_exams, study_config
from scipy import ndimage
from store_factory import make_record, make_store, pseudonym

from lbp_ray import duplicates
from lbp_ray.duplicates import COLUMNS, LOWEST_CORRELATION, find_duplicates
from lbp_ray.prepare import seal
from lbp_ray.splits import HOLDOUT, SplitError

NUM = 60


def spines(number=NUM, shape=(200, 100), seed=0):
    """Crops (number, 3, *shape) of one anatomy that differ by smooth fields and fine grain, noise beside the middle."""
    generator = np.random.default_rng(seed)
    anatomy = 300 * ndimage.gaussian_filter(np.random.default_rng(99).standard_normal(shape), 8) * 8
    own = ndimage.gaussian_filter(generator.standard_normal((number, *shape)), (0, 6, 6)) * 12 * 200
    middle = 1000 + anatomy + own + 20 * generator.standard_normal((number, *shape))
    crops = generator.integers(0, 2000, (number, 3, *shape)).astype(np.uint16)
    crops[:, 1] = middle
    return crops


def exams_of(number, patients=None, folds=None):
    """One exam per crop, of a patient and in a fold of its own unless told."""
    names = [f"p{row:04d}" for row in range(number)] if patients is None else patients
    ids = [f"s{row:04d}" for row in range(number)]
    return pd.DataFrame({"study_id": ids, "patient_id": names, "fold": np.arange(number) if folds is None else folds})


def noisy(crop):
    return crop + np.random.default_rng(1).normal(0, 0.15 * crop.std(), crop.shape)


def halved(crop):
    return ndimage.zoom(ndimage.zoom(crop, 0.5, order=1), 2, order=1)


COPIES = {
    "as it is": lambda crop: crop,
    "other gain and offset": lambda crop: 3 * crop + 500,
    "8 bits": lambda crop: np.round(crop / crop.max() * 255),
    "windowed": lambda crop: crop.clip(*np.percentile(crop, [2, 98])),
    "noisier": noisy,
    "halved and enlarged": halved,
    "one pixel down": lambda crop: np.roll(crop, 1, axis=0),
    "one pixel up and right": lambda crop: np.roll(crop, (-1, 1), axis=(0, 1)),
    "two pixels down and left": lambda crop: np.roll(crop, (2, -2), axis=(0, 1)),
}


@pytest.mark.parametrize("change", COPIES.values(), ids=COPIES.keys())
def test_copies_are_found_and_nothing_else(change):
    crops = spines()
    crops[NUM // 2 :, 1] = [change(crop.astype(float)) for crop in crops[: NUM // 2, 1]]
    found, pairs = find_duplicates(crops, exams_of(NUM))
    assert (found.num_exams, found.num_pairs, found.num_across_folds) == (NUM, NUM // 2, NUM // 2)
    assert tuple(pairs) == COLUMNS
    partners = {f"s{row:04d}": f"s{row + NUM // 2:04d}" for row in range(NUM // 2)}
    assert dict(zip(pairs["study_id_1"], pairs["study_id_2"], strict=True)) == partners
    assert pairs["correlation"].between(LOWEST_CORRELATION, 1).all()


def test_different_patients_are_no_pair():
    found, pairs = find_duplicates(spines(300), exams_of(300))
    assert (found.num_pairs, len(pairs), found.lowest_correlation) == (0, 0, LOWEST_CORRELATION)


def test_only_the_middle_slice_counts():
    crops = spines()
    crops[1, [0, 2]] = crops[0, [0, 2]]
    assert find_duplicates(crops, exams_of(NUM))[0].num_pairs == 0


def test_what_is_alike_from_afar_is_compared_pixel_by_pixel():
    crops = spines()
    coarse = ndimage.gaussian_filter(crops[0, 1].astype(float), 3)
    grain = np.random.default_rng(1).normal(0, 0.5 * coarse.std(), (2, *coarse.shape))
    crops[:2, 1] = (coarse + grain).clip(0)
    assert find_duplicates(crops, exams_of(NUM))[0].num_pairs == 0


@pytest.mark.parametrize(
    ("folds", "across"), [((3, 3), 0), ((3, 4), 1), ((HOLDOUT, 4), 1), ((HOLDOUT, HOLDOUT), 0)], ids=str
)
def test_pairs_across_folds_are_told_from_those_within(folds, across):
    crops = spines()
    crops[7] = crops[40]
    placed = np.arange(NUM) % 5
    placed[[7, 40]] = folds
    found, pairs = find_duplicates(crops, exams_of(NUM, folds=placed))
    assert (found.num_pairs, found.num_across_folds) == (1, across)
    assert pairs.iloc[0][["study_id_1", "fold_1", "study_id_2", "fold_2"]].tolist() == [
        "s0007", folds[0], "s0040", folds[1],
    ]  # fmt: skip


def test_exams_of_one_patient_are_no_pair():
    crops = spines()
    crops[7] = crops[40]
    patients = [f"p{row}" for row in range(NUM)]
    patients[7] = patients[40]
    assert find_duplicates(crops, exams_of(NUM, patients))[0].num_pairs == 0


def test_rows_of_the_crops_may_be_left_out_and_chunks_change_nothing(monkeypatch, tmp_path):
    crops = spines()
    crops[7], crops[50] = crops[40], crops[3]
    np.save(tmp_path / "crops.npy", crops)
    mapped = np.load(tmp_path / "crops.npy", mmap_mode="r")
    exams = exams_of(NUM).drop(index=[3, 11])
    _, whole = find_duplicates(mapped, exams)
    monkeypatch.setattr(duplicates, "CHUNK", 7)
    _, parts = find_duplicates(mapped, exams.sample(frac=1, random_state=0))
    pd.testing.assert_frame_equal(whole, parts)
    assert whole[["study_id_1", "study_id_2"]].values.tolist() == [["s0007", "s0040"]]


def test_work_is_bounded_where_all_images_are_one():
    crops = np.repeat(spines(1, shape=(20, 10)), 400, axis=0)
    found, _ = find_duplicates(crops, exams_of(400))
    assert 400 <= found.num_pairs <= 400 * duplicates.MAX_NEIGHBOURS


def test_sealed_images_change_no_signature():
    crops, folds = spines(), np.arange(NUM) % 5 - 1
    changed = np.where((folds == HOLDOUT)[:, None, None, None], 7, crops)
    inside = np.flatnonzero(folds != HOLDOUT)
    first, second = (
        duplicates.fit_lookup(images[:, 1], exams_of(NUM, folds=folds), inside, bits=48) for images in (crops, changed)
    )
    np.testing.assert_array_equal(first.planes_FD, second.planes_FD)


# --- a study ---------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """No weights are needed."""
    monkeypatch.setattr("lbp_ray.prepare.load_backbone_weights", lambda *_, **__: {"weight": torch.zeros(1)})


def make_twins(root, first, second):
    """Write the cohort anew with the image of one exam, brighter, under another patient's name."""
    data = make_cohort(root)
    generator = np.random.default_rng(0)
    pixels = [generator.integers(1, 999, SHAPE).astype(np.uint16) for _ in range(NUM_EXAMS)]
    pixels[second] = 2 * pixels[first] + 5
    shutil.rmtree(data / "x.zarr")
    make_store(data / "x.zarr", [(make_record(number, image), image) for number, image in enumerate(pixels)])
    return data


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """A cohort of two exams with one image, one of them sealed, and those exams."""
    root = tmp_path_factory.mktemp("cohort")
    apart = sealed_exams(seal(study_config(make_cohort(root / "plain"), root / "runs")).split)
    pair = apart[0], next(number for number in range(2, NUM_EXAMS) if number not in apart)
    return make_twins(root / "twins", *pair), pair


def test_one_image_in_two_folds_is_refused_with_what_to_do(twins, tmp_path):
    data, pair = twins
    first, second = sorted(pseudonym("s", number) for number in pair)
    with pytest.raises(
        SplitError,
        match=rf"study {first} .* and study {second} .*the hold-out.*correlation 1\.000.*1 such pair\(s\).*patient_id "
        r"in the linked questionnaire .*paths\.roi_overrides.*split\.near_duplicates=report",
    ):
        prepared(data, tmp_path)
    (table,) = tmp_path.glob("small/splits/*/duplicates/*/pairs.parquet")
    assert pd.read_parquet(table)[["study_id_1", "study_id_2"]].values.tolist() == [[first, second]]


def test_or_reported(twins, tmp_path):
    data, _ = twins
    study = prepared(data, tmp_path, split={"folds": 2, "holdout_fraction": 0.25, "near_duplicates": "report"})
    assert study.duplicates.num_across_folds == 1
    assert study.statements[-1].startswith("1 pair(s) of exams of different patients in different folds")


def test_one_excluded_settles_it(twins, tmp_path):
    data, (sealed, _) = twins
    path = tmp_path / "overrides.csv"
    path.write_text(f"study_id,action,centre_row,centre_column\n{pseudonym('s', sealed)},exclude,,\n")
    study = prepared(data, tmp_path, paths={"roi_overrides": path})
    assert (study.duplicates.num_exams, study.duplicates.num_pairs) == (NUM_EXAMS - 1, 0)


def test_one_patient_settles_it(twins, tmp_path):
    data, (sealed, inside) = twins
    path = tmp_path / "questionnaire.csv"
    names = {pseudonym("p", inside): pseudonym("p", sealed)}
    pd.read_csv(data / "questionnaire.csv").replace({"patient_id": names}).to_csv(path, index=False)
    study = prepared(data, tmp_path, paths={"questionnaire": path})
    assert study.duplicates.num_pairs == 0
    assert study.statements == ()


def test_a_search_is_made_once(twins, tmp_path, monkeypatch):
    data, _ = twins
    report = {"folds": 2, "holdout_fraction": 0.25, "near_duplicates": "report"}
    first = prepared(data, tmp_path, split=report).duplicates
    monkeypatch.setattr(duplicates, "find_duplicates", lambda *_: pytest.fail("searched again"))
    assert prepared(data, tmp_path, split=report).duplicates == first
