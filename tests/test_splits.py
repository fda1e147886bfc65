from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from cohort_factory import make_cohort, prepared, sealed_exams
from store_factory import pseudonym

from lbp_ray.prepare import find_midsagittal_artefact
from lbp_ray.runs import RunError
from lbp_ray.splits import (
    HOLDOUT,
    Opening,
    SplitError,
    check_split,
    holdout_commitment,
    make_split,
    opening_number,
    split_hash,
)
from preprocess.mapper import map_here
from preprocess.midsagittal.choose import choose_for_store
from preprocess.store.read import SliceStore


def cohort(seed, patients=120, share=0.3):
    generator = np.random.default_rng(seed)
    exams = generator.choice([1, 2, 3], patients, p=[0.8, 0.15, 0.05])
    patient = np.repeat([f"p{number:04d}" for number in range(patients)], exams)
    label = (generator.random(len(patient)) < share).astype(int)
    return pd.DataFrame(
        {"study_id": [f"s{row:04d}" for row in range(len(patient))], "patient_id": patient, "label": label}
    )


@pytest.mark.parametrize("seed", range(100))
def test_folds_are_balanced_by_patient_and_never_share_one(seed):
    exams = cohort(seed)
    split = make_split(exams, folds=10, holdout_fraction=0.1, seed=seed)
    joined = split.merge(exams[["study_id", "label"]], on="study_id")
    patients = joined.groupby("patient_id").agg(
        fold=("fold", "first"), label=("label", "max"), folds=("fold", "nunique")
    )
    assert (patients["folds"] == 1).all()
    inside = patients[patients["fold"] != HOLDOUT].groupby("fold")["label"].agg(["sum", "size"])
    assert np.ptp(inside["sum"]) <= 1
    assert np.ptp(inside["size"]) <= 2
    assert (patients["fold"] == HOLDOUT).sum() == 12
    assert len(joined) == len(exams)


def test_holdout_can_be_left_out():
    assert (make_split(cohort(0), folds=5, holdout_fraction=0, seed=0)["fold"] >= 0).all()


def test_same_seed_same_split_whatever_the_row_order():
    exams = cohort(1)
    first = make_split(exams, folds=5, holdout_fraction=0.1, seed=3)
    second = make_split(exams.sample(frac=1, random_state=0), folds=5, holdout_fraction=0.1, seed=3)
    pd.testing.assert_frame_equal(first, second)
    assert holdout_commitment(first) == holdout_commitment(second)
    assert not first.equals(make_split(exams, folds=5, holdout_fraction=0.1, seed=4))


def test_patient_in_two_folds_is_refused():
    split = pd.DataFrame({"study_id": ["a", "b"], "patient_id": ["p", "p"], "fold": [0, 1]})
    with pytest.raises(SplitError, match=r"patient p stands in folds \[0, 1\].*make it again, by patient"):
        check_split(split)


def test_exam_twice_is_refused():
    split = pd.DataFrame({"study_id": ["a", "a"], "patient_id": ["p", "p"], "fold": [0, 0]})
    with pytest.raises(SplitError, match="study a stands 2 times"):
        check_split(split)


def test_too_few_patients_are_refused():
    with pytest.raises(SplitError, match="need at least 11 patients of each class"):
        make_split(cohort(0, patients=20), folds=10, holdout_fraction=0.1, seed=0)


def test_hash_covers_folds_and_labels():
    split = make_split(cohort(2), folds=5, holdout_fraction=0.1, seed=0)
    labels = dict.fromkeys(split["study_id"], 0)
    moved = split.assign(fold=split["fold"].replace({0: 1, 1: 0}))
    hashes = {split_hash(split, labels), split_hash(moved, labels), split_hash(split, labels | {"s0000": 1})}
    assert len(hashes) == 3


def test_openings_count_those_before_that_share_an_exam():
    fields = dict.fromkeys(("user", "time", "result_hash", "split_hash", "previous"), "x")
    ledger = [
        Opening(line=line, number=1, studies=tuple(studies), **fields)
        for line, studies in enumerate(("ab", "cd", "bc"), 1)
    ]
    assert [opening_number(ledger, studies) for studies in ("a", "b", "e", "abcd", "")] == [2, 3, 1, 4, 1]


# --- patients with templates -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_template_patients_are_never_sealed_and_balance_and_size_stay(seed):
    exams = cohort(seed)
    free = make_split(exams, folds=10, holdout_fraction=0.1, seed=seed)
    never = frozenset(free.loc[free["fold"] == HOLDOUT, "patient_id"].unique()[:6])
    split = make_split(exams, folds=10, holdout_fraction=0.1, seed=seed, never_holdout=never)
    sealed = set(split.loc[split["fold"] == HOLDOUT, "patient_id"])
    assert not sealed & never
    assert len(sealed) == 12
    patients = split.merge(exams[["study_id", "label"]], on="study_id").groupby("patient_id")
    patients = patients.agg(fold=("fold", "first"), label=("label", "max")).query("fold >= 0")
    assert np.ptp(patients.groupby("fold")["label"].sum()) <= 1
    assert np.ptp(patients.groupby("fold").size()) <= 2


def test_strangers_to_the_cohort_change_no_draw():
    exams = cohort(0)
    free = make_split(exams, folds=5, holdout_fraction=0.1, seed=0)
    kept = make_split(exams, folds=5, holdout_fraction=0.1, seed=0, never_holdout=frozenset({"stranger"}))
    pd.testing.assert_frame_equal(free, kept)


def test_too_few_patients_without_a_template_are_refused():
    exams = cohort(0)
    never = frozenset(exams.loc[exams["label"] == 1, "patient_id"])
    with pytest.raises(SplitError, match=r"hold-out of 12 patients .* choose templates of fewer patients"):
        make_split(exams, folds=5, holdout_fraction=0.1, seed=0, never_holdout=never)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_cohort(tmp_path_factory.mktemp("data"))


def test_a_study_never_seals_its_template_patients(data, tmp_path):
    usual = sealed_exams(prepared(data, tmp_path / "a", midsagittal={"allow_holdout_templates": True}).split)
    study = prepared(data, tmp_path / "b", usual[:2])
    assert not set(sealed_exams(study.split)) & set(usual[:2])
    assert study.statements == ()


def test_templates_of_sealed_patients_are_refused_unless_allowed_and_then_stated(data, tmp_path):
    sealed = sealed_exams(prepared(data, tmp_path).split)
    with pytest.raises(SplitError, match=rf"patient {pseudonym('p', sealed[0])} .*choose templates of other patients"):
        prepared(data, tmp_path, [*sealed[:1], 0, 1])
    study = prepared(data, tmp_path, [*sealed[:1], 0, 1], midsagittal={"allow_holdout_templates": True})
    assert sealed_exams(study.split) == sealed
    assert "1 patient(s) of the sealed hold-out gave template slices" in study.statements[0]


def test_several_artefacts_are_told_apart_and_none_is_guessed(data):
    parent = data / "x.midsagittal"
    first = choose_for_store(data / "x.zarr", parent, [(pseudonym("t", 0), 2), (pseudonym("t", 1), 2)], map_here)
    store_hash = SliceStore.open(data / "x.zarr", contrast="t2_sagittal").content_hash
    assert find_midsagittal_artefact(data / "x.zarr", store_hash) == first
    (data / "c.csv").write_text(f"study_id,slice_index\n{pseudonym('s', 5)},3\n")
    slices = [(pseudonym("t", 0), 2), (pseudonym("t", 1), 2)]
    choose_for_store(data / "x.zarr", parent, slices, map_here, data / "c.csv")
    with pytest.raises(RunError, match=r"2 mid-sagittal artefacts .*with 1 correction\(s\).*paths\.midsagittal"):
        find_midsagittal_artefact(data / "x.zarr", store_hash)
