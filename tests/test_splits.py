from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
from cohort_factory import make_cohort, prepared, sealed_exams, study_config
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier
from store_factory import pseudonym

from lbp_ray.cohort import label_exams
from lbp_ray.phantom.exam import ExamSpec, Imaging, simulate_exam
from lbp_ray.phantom.tissue import T2
from lbp_ray.prepare import find_midsagittal_artefact, seal
from lbp_ray.runs import RunError
from lbp_ray.splits import (
    HOLDOUT,
    Opening,
    Split,
    SplitError,
    check_split,
    holdout_commitment,
    make_split,
    opening_number,
    split_hash,
    training_labels,
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


def patients_of(exams, split):
    """One row per patient: fold, label, number of folds, number of exams."""
    rows = split.merge(exams[["study_id", "label"]], on="study_id").groupby("patient_id")
    return rows.agg(
        fold=("fold", "first"), label=("label", "max"), folds=("fold", "nunique"), exams=("study_id", "size")
    )


@pytest.mark.parametrize("seed", range(200))
def test_folds_are_balanced_by_patient_and_never_share_one(seed):
    exams = cohort(seed, patients=100 + seed, share=0.2 + seed / 1000)
    split = make_split(exams, folds=10, holdout_fraction=0.1, seed=seed)
    assert split["study_id"].tolist() == exams["study_id"].tolist()
    patients = patients_of(exams, split)
    assert (patients["folds"] == 1).all()
    inside = patients[patients["fold"] != HOLDOUT].groupby("fold").agg({"label": ["sum", "size"], "exams": "sum"})
    assert np.ptp(inside["label", "sum"]) <= 1
    assert np.ptp(inside["label", "size"]) <= 2
    assert np.ptp(inside["exams", "sum"]) <= 5
    sealed = patients[patients["fold"] == HOLDOUT]
    assert len(sealed) == math.ceil((100 + seed) / 10)
    assert abs(sealed["label"].sum() - len(sealed) * patients["label"].mean()) <= 0.5


def test_a_patient_is_positive_by_any_exam():
    exams = pd.DataFrame(
        {"study_id": [f"s{row:03d}" for row in range(80)], "patient_id": [f"p{row // 2:02d}" for row in range(80)]}
    )
    exams["label"] = [int(row % 8 == 0) for row in range(80)]  # one exam of every fourth patient
    patients = patients_of(exams, make_split(exams, folds=5, holdout_fraction=0, seed=0))
    assert patients.groupby("fold")["label"].sum().tolist() == [2] * 5


def test_many_patients_are_split_at_once():
    exams = cohort(0, patients=200_000)
    patients = patients_of(exams, make_split(exams, folds=10, holdout_fraction=0.1, seed=0))
    inside = patients[patients["fold"] != HOLDOUT].groupby("fold").agg({"label": ["sum", "size"], "exams": "sum"})
    assert np.ptp(inside, axis=0).max() <= 5


@pytest.fixture(scope="module")
def phantom_slices():
    """Standardised pixels of 30 synthetic patients' slices, shape (30, 5, pixels)."""
    imaging = Imaging(matrix=32, slices=(5, 5), mid_shift=0)
    exams = [simulate_exam(ExamSpec(patient_seed=(row,), exam_seed=(row,)), imaging, (T2,)) for row in range(30)]
    pixels = np.stack([exam.volumes[T2.name] for exam in exams]).reshape(30, 5, -1).astype(float)
    return (pixels - pixels.mean(axis=2, keepdims=True)) / pixels.std(axis=2, keepdims=True)


def nearest_neighbour_auc(slices, labels, folds):
    """Score each slice by the nearest slices of the other folds."""
    scores = np.empty(len(slices))
    for fold in range(5):
        model = KNeighborsClassifier(3, weights="distance").fit(slices[folds != fold], labels[folds != fold])
        scores[folds == fold] = model.predict_proba(slices[folds == fold])[:, 1]
    return roc_auc_score(labels, scores)


def test_slices_of_one_patient_in_two_folds_fake_a_score_that_patient_folds_do_not(phantom_slices):
    """Labels are drawn at random: nothing can be learnt but whose slice it is."""
    slices = phantom_slices.reshape(150, -1)
    by_slice, by_patient = [], []
    for seed in range(10):
        labels = np.random.default_rng(seed).permutation(np.arange(30) % 2)
        names = [f"{row:02d}" for row in range(30)]
        exams = pd.DataFrame({"study_id": names, "patient_id": names, "label": labels})
        folds = np.repeat(make_split(exams, folds=5, holdout_fraction=0, seed=seed)["fold"].to_numpy(), 5)
        by_patient.append(nearest_neighbour_auc(slices, np.repeat(labels, 5), folds))
        mixed = np.random.default_rng(seed).permutation(np.arange(150) % 5)
        by_slice.append(nearest_neighbour_auc(slices, np.repeat(labels, 5), mixed))
    assert np.min(by_slice) > 0.95
    assert abs(np.mean(by_patient) - 0.5) < 0.1


def test_holdout_can_be_left_out():
    assert (make_split(cohort(0), folds=5, holdout_fraction=0, seed=0)["fold"] >= 0).all()


def test_same_seed_same_split_whatever_the_row_order():
    exams = cohort(1)
    first = make_split(exams, folds=5, holdout_fraction=0.1, seed=3)
    second = make_split(exams.sample(frac=1, random_state=0), folds=5, holdout_fraction=0.1, seed=3)
    pd.testing.assert_frame_equal(first, second)
    assert holdout_commitment(first) == holdout_commitment(second)
    assert not first.equals(make_split(exams, folds=5, holdout_fraction=0.1, seed=4))


def replayed(table, seed):
    """Deduce sealed labels from what a run tells: exams, folds, labels outside the hold-out, and the seed.

    If patients were drawn in an order that the seed alone gives, who is sealed behind a negative patient that is not
    would have to be positive, and the reverse.
    """
    order = np.random.Generator(np.random.Philox(key=[seed, len(table)])).permutation(len(table))
    place = np.argsort(order)
    fold, label = table["fold"].to_numpy(), table["label"].to_numpy()
    first = {value: place[(fold != HOLDOUT) & (label == value)].min() for value in (0, 1)}
    behind = {value: (fold == HOLDOUT) & (place > first[1 - value]) for value in (0, 1)}
    return {patient: value for value in (0, 1) for patient in np.flatnonzero(behind[value] & ~behind[1 - value])}


def test_sealed_labels_cannot_be_deduced_from_the_seed():
    right = 0
    for seed in range(50):
        labels = np.random.default_rng(seed).permutation(np.repeat([1, 0], [113, 413]))
        names = [f"{row:04d}" for row in range(526)]
        exams = pd.DataFrame({"study_id": names, "patient_id": names, "label": labels})
        split = make_split(exams, folds=10, holdout_fraction=0.1, seed=seed)
        table = split.assign(label=np.where(split["fold"] == HOLDOUT, np.nan, labels))
        right += sum(labels[patient] == value for patient, value in replayed(table, seed).items())
    assert right < 50  # of 2,650; an order that the seed gives tells some 260


def test_other_labels_of_the_sealed_seal_others():
    """Folds that fit only the true labels would tell them to whoever tries a few."""
    for seed in range(20):
        exams = cohort(seed)
        split = make_split(exams, folds=10, holdout_fraction=0.1, seed=seed)
        sealed = exams[split["fold"] == HOLDOUT].groupby("patient_id")["label"].max()
        swapped = [sealed.index[sealed == value][0] for value in (0, 1)]
        others = exams.assign(label=exams["label"].mask(exams["patient_id"].isin(swapped), 1 - exams["label"]))
        again = make_split(others, folds=10, holdout_fraction=0.1, seed=seed)
        assert not again["fold"].equals(split["fold"])


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


def test_folds_that_would_lack_a_class_are_refused():
    """11 positive patients: one is due in a hold-out of a tenth, two in one of a fifth."""
    exams = pd.DataFrame({"study_id": [f"s{row:03d}" for row in range(110)]}).assign(
        patient_id=lambda rows: rows["study_id"]
    )
    exams["label"] = (np.arange(110) < 11).astype(int)
    make_split(exams, folds=10, holdout_fraction=0.1, seed=0)
    with pytest.raises(
        SplitError, match="10 folds and a hold-out need at least 12 patients of each class, found 11 symp"
    ):
        make_split(exams, folds=10, holdout_fraction=0.2, seed=0)


def test_an_exam_without_a_patient_is_refused():
    exams = cohort(0)
    exams.loc[3, "patient_id"] = None
    with pytest.raises(SplitError, match=r"study s0003 has no patient_id \(1 such"):
        make_split(exams, folds=5, holdout_fraction=0, seed=0)


def test_hash_covers_folds_and_labels():
    split = make_split(cohort(2), folds=5, holdout_fraction=0.1, seed=0)
    labels = dict.fromkeys(split["study_id"], 0)
    moved = split.assign(fold=split["fold"].replace({0: 1, 1: 0}))
    hashes = {split_hash(split, labels), split_hash(moved, labels), split_hash(split, labels | {"s0000": 1})}
    assert len(hashes) == 3


def test_openings_count_those_before_that_share_an_exam():
    fields = dict.fromkeys(("study", "user", "time", "result_hash", "split_hash", "previous"), "x")
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


# --- committed splits ------------------------------------------------------------------------------------------------


def commit(folder, table, **changes):
    """Leave a committed split as any version of the code has left it."""
    folder.mkdir(parents=True, exist_ok=True)
    table.to_parquet(folder / "split.parquet", index=False)
    meta = {"split_hash": split_hash(table, training_labels(table)), "holdout_commitment": holdout_commitment(table)}
    (folder / "split.json").write_text(json.dumps(meta | changes))
    return folder


def small_table(**columns):
    table = pd.DataFrame({"study_id": list("abcd"), "patient_id": list("pqrs"), "fold": [-1, 0, 1, 0], **columns})
    return table.assign(label=pd.array(table.get("label", [None, 1, 0, 1]), dtype="Int64"))


def test_addresses_of_committed_splits_stay():
    table = small_table()
    assert split_hash(table, training_labels(table))[:16] == "33cb7013ca534678"
    assert holdout_commitment(table)[:16] == "0eb5b8d6f81bc677"


def test_a_sealed_label_in_the_table_is_refused(tmp_path):
    folder = commit(tmp_path / "x", small_table(label=[1, 1, 0, 1]))
    with pytest.raises(SplitError, match=r"holds labels of 1 sealed exam\(s\), e.g. of study a"):
        Split.open(folder)


@pytest.mark.parametrize(
    "changes", [{"split_hash": "0"}, {"holdout_commitment": "0"}], ids=["other table", "other hold-out"]
)
def test_an_edited_split_is_refused(tmp_path, changes):
    with pytest.raises(SplitError, match=r"split\.parquet was changed after it was made"):
        Split.open(commit(tmp_path / "x", small_table(), **changes))


def test_a_split_of_an_earlier_draw_goes_on_opening(data, tmp_path):
    config = study_config(data, tmp_path)
    drawn = seal(config).split
    earlier = drawn.table.assign(fold=drawn.table["fold"].replace({0: 1, 1: 0}))
    commit(drawn.folder, earlier)
    reporting = config.split.model_copy(update={"near_duplicates": "report"})
    for chosen in (config, config.model_copy(update={"split": reporting})):
        pd.testing.assert_frame_equal(seal(chosen).split.table, earlier)


def test_a_split_of_other_labels_is_refused(data, tmp_path, monkeypatch):
    config = study_config(data, tmp_path)
    inside = training_labels(seal(config).split.table)
    first = next(iter(inside))
    monkeypatch.setattr(
        "lbp_ray.prepare.label_exams",
        lambda rows, **_: label_exams(rows).assign(
            label=lambda exams: exams["label"].mask(exams["study_id"] == first, 1 - inside[first])
        ),
    )
    with pytest.raises(SplitError, match=rf"committed with other labels .* of study {first} \(1 such"):
        seal(config)
