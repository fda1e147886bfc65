from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from lbp_ray.splits import HOLDOUT, SplitError, check_split, holdout_commitment, make_split, split_hash


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
