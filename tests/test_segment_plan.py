"""Who may train what: folds by patient, sealed patients, nesting in a study's folds, and the training set on disk."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from cohort_factory import choose_middle, make_cohort, sealed_exams, study_config
from pydantic import ValidationError
from store_factory import pseudonym

from lbp_ray.prepare import seal
from lbp_ray.segment.config import RegionCompute, RegionFolds, SegmentConfig
from lbp_ray.segment.fold import lumbar_task
from lbp_ray.segment.masks import mask_shards
from lbp_ray.segment.network import APART, FINAL, SegmentError
from lbp_ray.segment.plan import fold_specs, plan_regions
from lbp_ray.segment.samples import TrainingSet
from lbp_ray.splits import HOLDOUT

TWINS = {3: {"patient_id": pseudonym("p", 2)}, 5: {"patient_id": pseudonym("p", 2)}}
"""Exams 2, 3 and 5 are of one patient."""


def region_config(data, runs, *, folds=None, annotations=None, **recipe):
    """Configure a small region finder of the cohort."""
    paths = {"store": data / "x.zarr", "annotations": annotations or data / "annotations.xml", "runs": runs}
    settings = {
        "name": "roi",
        "paths": {**paths, "midsagittal": choose_middle(data, runs)},
        "folds": {"folds": 3, "allow_holdout": True} if folds is None else folds,
        "recipe": {"weights": "random", "input_px": 32, "batch_size": 4, "epochs": 1, **recipe},
        "compute": {"verbose": False},
    }
    return SegmentConfig.model_validate(settings)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_cohort(tmp_path_factory.mktemp("cohort"), annotated=tuple(range(12)), records=TWINS)


@pytest.mark.parametrize(
    ("folds", "word"),
    [
        ({}, "one of the two is required"),
        ({"study": "a", "allow_holdout": True}, "not both"),
        ({"nested": True, "allow_holdout": True}, "nested needs folds.study"),
    ],
)
def test_sealed_patients_need_a_word(folds, word):
    with pytest.raises(ValidationError, match=word):
        RegionFolds.model_validate(folds)


def test_a_patients_slices_never_straddle_folds(data, tmp_path):
    plan = plan_regions(region_config(data, tmp_path))
    assert plan.annotated.groupby("patient_id")["fold"].nunique().max() == 1
    assert sorted(plan.annotated["fold"].unique()) == [0, 1, 2]
    for spec in fold_specs(region_config(data, tmp_path), plan):
        task = lumbar_task(plan.folder, spec.fold, spec.recipe)
        groups = [set(plan.annotated["patient_id"].iloc[rows]) for rows in (task.training_rows, task.validation_rows)]
        assert not groups[0] & groups[1]
        assert len(task.validation_rows) == (plan.annotated["fold"] == spec.fold).sum()


def test_every_exam_is_segmented_by_a_network_that_never_saw_its_patient(data, tmp_path):
    plan = plan_regions(region_config(data, tmp_path))
    patients = dict(zip(plan.middle["study_id"], plan.middle["patient_id"], strict=True))
    trained = {fold: set(plan.annotated.loc[plan.annotated["fold"] != fold, "patient_id"]) for fold in range(3)}
    trained[FINAL] = set(plan.annotated["patient_id"])
    shards = mask_shards(plan)
    asked = [(item.study_id, shard.fold) for shard in shards for item in shard.slices]
    assert {study for study, _ in asked} == set(patients)
    assert all(patients[study] not in trained[fold] for study, fold in asked)
    assert {fold for _, fold in asked} == {FINAL, 0, 1, 2}
    assert set(plan.trained_patients) == trained[FINAL]


@pytest.mark.parametrize("nested", [False, True])
def test_sealed_patients_train_nothing(tmp_path, nested):
    data = make_cohort(tmp_path, annotated=tuple(range(12)))
    split = seal(study_config(data, tmp_path)).split
    plan = plan_regions(region_config(data, tmp_path, folds={"study": "small", "nested": nested, "folds": 3}))
    sealed = {pseudonym("p", number) for number in sealed_exams(split)}
    assert not sealed & set(plan.trained_patients)
    assert set(plan.annotated.loc[plan.annotated["fold"] == APART, "patient_id"]) <= sealed
    assert all(plan.model_of(patient) == FINAL for patient in sealed)
    assert plan.nested_in == (split.split_hash if nested else None)
    if nested:
        inside = split.table[split.table["fold"] != HOLDOUT]
        assert [plan.model_of(patient) for patient in inside["patient_id"]] == inside["fold"].tolist()


def test_an_unsealed_study_is_refused_and_sealed_ones_are_named(data, tmp_path):
    config = region_config(data, tmp_path, folds={"study": "renamed"})
    with pytest.raises(
        SegmentError, match=r"^folds.study=renamed: 0 sealed splits .*: none\), .* `python -m lbp_ray.seal`"
    ):
        plan_regions(config)
    seal(study_config(data, tmp_path))
    with pytest.raises(SegmentError, match=r"studies with splits under .*: small\), .* as folds.study=…"):
        plan_regions(config)


def test_one_of_several_splits_is_not_guessed_nor_one_with_results_given_up(data, tmp_path):
    for seed in (0, 1):
        seal(study_config(data, tmp_path, split={"folds": 2, "holdout_fraction": 0.25, "seed": seed}))
    with pytest.raises(SegmentError, match=r"2 sealed splits .* a split with trials or results must stay"):
        plan_regions(region_config(data, tmp_path, folds={"study": "small"}))


def test_a_test_fraction_is_apart_from_all_folds(data, tmp_path):
    folds = {"folds": 3, "allow_holdout": True, "test_fraction": 0.3}
    plan = plan_regions(region_config(data, tmp_path, folds=folds))
    apart = plan.annotated[plan.annotated["fold"] == APART]
    assert apart["patient_id"].nunique() == 3
    assert all(plan.model_of(patient) == FINAL for patient in apart["patient_id"])
    final = lumbar_task(plan.folder, FINAL, region_config(data, tmp_path).recipe)
    assert set(final.training_rows) == set(np.flatnonzero(plan.annotated["fold"] != APART))


def test_too_few_patients_for_the_folds(data, tmp_path):
    with pytest.raises(SegmentError, match="20 folds need an annotated patient each, found 10"):
        plan_regions(region_config(data, tmp_path, folds={"folds": 20, "allow_holdout": True}))


def test_training_set_holds_slices_and_masks_of_the_store(data, tmp_path):
    plan = plan_regions(region_config(data, tmp_path))
    found = TrainingSet.open(plan.folder)
    pixels = plan.store.read_slice(str(plan.annotated["series_id"].iloc[0]), 2)  # 16 x 12, doubled onto the grid
    assert found.images_NPP.shape == (12, 32, 32)
    assert found.used_N2.tolist() == [[32, 24]] * 12
    assert abs(found.images_NPP[0, :, 4:28].mean() - pixels.mean()) < 15
    assert found.masks_NPP[0].sum() == 4 * 8 * 6  # rows 4 to 12, columns 3 to 9
    assert (found.images_NPP[0, :, 28:] == 0).all()


def test_faulty_annotations_are_named_and_told(data, tmp_path, capsys):
    text = (data / "annotations.xml").read_text().replace('label="L3L4"', 'label="L2L3"', 1)
    (tmp_path / "annotations.xml").write_text(text)
    plan = plan_regions(region_config(data, tmp_path, annotations=tmp_path / "annotations.xml"))
    assert len(plan.annotated) == 11
    assert plan.statements[0].startswith("1 annotated images were not used; faults.csv names each")
    (fault,) = plan.faults.values()
    assert "repeated_L2L3" in fault
    assert "repeated_L2L3" in capsys.readouterr().err


def test_no_sound_annotation_is_refused(data, tmp_path):
    text = (data / "annotations.xml").read_text().replace('label="L3L4"', 'label="disc"')
    (tmp_path / "annotations.xml").write_text(text)
    with pytest.raises(SegmentError, match="none of 12 annotated image") as caught:
        plan_regions(region_config(data, tmp_path, annotations=tmp_path / "annotations.xml"))
    assert str(caught.value).count("unknown_label") == 12


def test_annotations_of_another_size_are_refused(data, tmp_path):
    text = (data / "annotations.xml").read_text().replace('width="12"', 'width="24"', 1)
    (tmp_path / "annotations.xml").write_text(text)
    with pytest.raises(SegmentError, match="annotated as 16 x 24, stored as 16 x 12"):
        plan_regions(region_config(data, tmp_path, annotations=tmp_path / "annotations.xml"))


def test_what_changes_numbers_changes_the_address(data, tmp_path):
    base = region_config(data, tmp_path)
    plan = plan_regions(base)
    names = {spec.fold_id for spec in fold_specs(base, plan)}
    again = {spec.fold_id for spec in fold_specs(base, plan_regions(base))}
    other = region_config(data, tmp_path, epochs=2)
    assert names == again
    assert len(names) == 4
    assert not names & {spec.fold_id for spec in fold_specs(other, plan_regions(other))}


def test_the_first_state_is_on_disk_for_every_worker(data, tmp_path):
    plan = plan_regions(region_config(data, tmp_path))
    state = torch.load(plan.folder / "initial.pt", weights_only=True)
    assert state["encoder.features.0.weight"].shape[1] == 1
    assert len(pd.read_parquet(plan.folder / "slices.parquet")) == 12


def test_an_image_that_names_another_study_is_refused(data, tmp_path):
    text = (data / "annotations.xml").read_text().replace(f"{pseudonym('s', 7)}/", f"{pseudonym('s', 8)}/", 1)
    (tmp_path / "annotations.xml").write_text(text)
    with pytest.raises(SegmentError, match="names another study than its series has"):
        plan_regions(region_config(data, tmp_path, annotations=tmp_path / "annotations.xml"))


@pytest.mark.parametrize("gpus", [0.5, 2])
def test_several_workers_need_whole_gpus(gpus):
    with pytest.raises(ValidationError, match="one whole GPU each"):
        RegionCompute.model_validate({"workers": 2, "gpus_per_worker": gpus})
