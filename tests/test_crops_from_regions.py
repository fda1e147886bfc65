"""Crops by predicted masks: provenance, review, overrides, corrections, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
from cohort_factory import (
    NUM_EXAMS,
    TEMPLATES,
    choose_middle,
    commit_trial,
    make_cohort,
    number_of,
    prepared,
    sealed_exams,
    study_config,
)
from regions_factory import make_mask, make_regions
from store_factory import pseudonym

from lbp_ray.aggregate import aggregate
from lbp_ray.association import describe_provenance, segmenter_scores, source_association
from lbp_ray.config import ConfigError, load_config
from lbp_ray.distributed.worker import load_trial_data
from lbp_ray.export import crop_stack
from lbp_ray.predict import describe_predictor
from lbp_ray.prepare import prepare, seal
from lbp_ray.report import write_report
from lbp_ray.result import StudyResult
from lbp_ray.roi.annotations import LEVELS
from lbp_ray.roi.box import resize
from lbp_ray.roi.crops import BOX_OUTSIDE, MAX_LISTED, RoiError
from lbp_ray.roi.overrides import OverrideError
from lbp_ray.roi.provenance import find_regions
from lbp_ray.roi.regions import RegionError, Regions
from lbp_ray.splits import HOLDOUT, SplitError
from lbp_ray.study import StudyConfig
from lbp_ray.tune import plan_trials
from preprocess.mapper import map_here
from preprocess.midsagittal.choose import choose_for_store
from preprocess.store.read import SliceStore

SIZE = {"width_px": 6, "height_px": 8}
BY_MODEL = {**SIZE, "source": "model", "label_blind": True}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """Crops need no weights, and drawing those of a ResNet50 takes a second each time."""
    monkeypatch.setattr("lbp_ray.prepare.load_backbone_weights", lambda *_, **__: {"weight": torch.zeros(1)})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_cohort(tmp_path_factory.mktemp("data"))


@pytest.fixture
def sealed(data, tmp_path):
    """The split that studies below `tmp_path` have, and the numbers of its sealed exams."""
    split = seal(study_config(data, tmp_path)).split
    return split, sealed_exams(split)


@pytest.fixture
def inside(sealed):
    """Numbers of three exams outside the hold-out."""
    return [number for number in range(NUM_EXAMS) if number not in sealed[1]][:3]


@pytest.fixture
def fold_of(sealed):
    """Training folds of a segmenter that saw no sealed patient."""
    return {number: number % 2 for number in range(NUM_EXAMS) if number not in sealed[1] and number % 3 == 0}


def study_by_model(data, runs, *, roi=None, paths=None, **regions):
    """Prepare a study that is cropped by the regions described."""
    make_regions(runs / "regions", data, choose_middle(data, runs), **regions)
    return prepared(data, runs, roi=BY_MODEL | (roi or {}), paths=paths)


def row_of(study, number):
    return study.crops.table.set_index("study_id").loc[pseudonym("s", number)]


def reason_of(study, number):
    return study.crops.excluded.set_index("study_id").loc[pseudonym("s", number), "reason"]


def write(path, text):
    path.write_text(text)
    return path


def overrides(tmp_path, *rows):
    lines = [f"{pseudonym('s', number)},{rest}" for number, rest in rows]
    return {"roi_overrides": write(tmp_path / "o.csv", "\n".join(["study_id,action,centre_row,centre_column", *lines]))}


def corrections(tmp_path, *images):
    """A CVAT file with one box per exam: (number, left, top, right, bottom), or a number alone for an empty image."""
    parts = []
    for number, *edges in images:
        names = zip(("xtl", "ytl", "xbr", "ybr"), edges, strict=False)
        box = f'<box label="lumbar" {" ".join(f"{name}={chr(34)}{edge}{chr(34)}" for name, edge in names)}/>'
        name = f"{pseudonym('s', number)}/{pseudonym('t', number)}/2.png"
        parts.append(f'<image name="{name}" width="12" height="16">{box if edges else ""}</image>')
    return {"roi_corrections": write(tmp_path / "c.xml", f"<annotations>{''.join(parts)}</annotations>")}


# --- where boxes lie -------------------------------------------------------------------------------------------------


def test_boxes_are_centred_on_masks_and_say_who_made_them(data, tmp_path, fold_of, inside):
    moved = make_mask(top=8, left=5, bottom=14, right=11)
    study = study_by_model(data, tmp_path, fold_of=fold_of, masks={inside[1]: moved})
    assert len(study.crops.table) == NUM_EXAMS
    for number in range(NUM_EXAMS):
        assert row_of(study, number)["crop_source"] == ("out_of_fold" if number in fold_of else "model")
    row = row_of(study, inside[1])
    assert (row["centroid_row"], row["centroid_column"]) == (11.0, 8.0)
    assert tuple(row[["box_row", "box_column", "box_height", "box_width"]]) == (7, 5, 8, 6)
    assert row["region_slice"] == 2
    store = SliceStore.open(data / "x.zarr")
    crop_KHW = study.crops.pixels_NKHW[study.crops.table.index[study.crops.table["study_id"] == row_id(inside[1])][0]]
    np.testing.assert_array_equal(crop_KHW[0], store.read(pseudonym("t", inside[1]))[2, 7:15, 5:11])


def row_id(number):
    return pseudonym("s", number)


def test_boxes_lead_back_to_the_pixels_of_the_file(tmp_path):
    flips = {"transpose": True, "flip_rows": True, "flip_columns": False}
    study = prepared(make_cohort(tmp_path, records={3: flips}), tmp_path / "runs")
    row = row_of(study, 3)
    assert tuple(row[["box_row", "box_column", "box_height", "box_width"]]) == (4, 3, 8, 6)
    assert tuple(row[[f"original_{name}" for name in ("row", "column", "height", "width")]]) == (3, 16 - 4 - 8, 6, 8)


def test_annotated_studies_stay_as_they_were(data, tmp_path):
    study = prepared(data, tmp_path)
    assert set(study.crops.table["crop_source"]) == {"annotation"}
    assert study.regions is None
    assert (study.crops.table["centroid_row"] == 8.0).all()
    assert (study.crops.table["centroid_column"] == 6.0).all()
    assert pd.read_csv(study.crops.folder / "review.csv").empty


def annotated_slices(tmp_path, slices_of):
    """A file of the annotated slices of some exams: number → (slice, how many of the five levels are drawn)."""
    images = []
    for number, slices in slices_of.items():
        for index, levels in slices:
            place = f'xtl="3" ytl="{4 + index}" xbr="9" ybr="{8 + index}"'
            boxes = "".join(f'<box label="{level}" {place}/>' for level in LEVELS[:levels])
            name = f"{pseudonym('s', number)}/{pseudonym('t', number)}/{index}.png"
            images.append(f'<image name="{name}" width="12" height="16">{boxes}</image>')
    return {"annotations": write(tmp_path / "several.xml", f"<annotations>{''.join(images)}</annotations>")}


def all_middles(data, tmp_path, middle):
    """Correct the mid-sagittal slice of every exam."""
    rows = [f"{row_id(number)},{middle}" for number in range(NUM_EXAMS)]
    corrected = write(tmp_path / "middles.csv", "\n".join(["study_id,slice_index", *rows]))
    templates = [(pseudonym("t", number), 2) for number in TEMPLATES]
    return {"midsagittal": choose_for_store(data / "x.zarr", tmp_path / "middle", templates, map_here, corrected)}


def test_of_several_annotated_slices_the_sound_one_nearest_the_middle_counts(data, tmp_path):
    """The middle of every exam is slice 2."""
    cases = {
        0: ([(2, 5), (4, 5)], 2),
        1: ([(1, 5), (2, 5), (3, 5)], 2),
        2: ([(4, 5), (3, 5), (1, 5), (0, 5)], 1),
        3: ([(2, 4), (4, 5)], 4),
        4: ([(4, 5), (1, 3)], 4),
        5: ([(2, 5), (2, 5)], 2),
        6: ([(2, 5), (2, 4)], 2),
        7: ([(2, 5), (2, 0)], 2),
        8: ([(2, 0), (2, 5)], 2),
    }
    slices = {number: slices for number, (slices, _) in cases.items()} | {9: [(3, 3), (2, 4)]}
    rest = {number: [(2, 5)] for number in range(10, NUM_EXAMS)}
    paths = {**annotated_slices(tmp_path, slices | rest), **all_middles(data, tmp_path, 2)}
    study = prepared(data, tmp_path, paths=paths)
    for number, (_, chosen) in cases.items():
        row = row_of(study, number)
        assert (row["region_slice"], row["centroid_row"]) == (chosen, 6 + chosen), f"exam {number}"
    excluded = study.crops.excluded.set_index("study_id").loc[row_id(9)]
    assert tuple(excluded[["reason", "detail"]]) == ("faulty_annotation", "missing_L5S1; missing_L4L5+missing_L5S1")
    assert len(study.crops.table) == NUM_EXAMS - 1


# --- by hand only where it is flagged --------------------------------------------------------------------------------


def test_hand_crops_are_never_mixed_with_model_crops(tmp_path):
    data = make_cohort(tmp_path, annotated=range(2, NUM_EXAMS))
    study = prepared(data, tmp_path / "a")
    assert set(study.crops.table["crop_source"]) == {"annotation"}
    assert {reason_of(study, 0), reason_of(study, 1)} == {"no_annotation"}
    chosen = {"roi": {"allow_holdout_training": True}, "masks": dict.fromkeys(range(NUM_EXAMS), make_mask(top=5))}
    study = study_by_model(data, tmp_path / "b", **chosen)
    assert set(study.crops.table["crop_source"]) == {"out_of_fold", "model"}
    files = {"roi_corrections": data / "annotations.xml"}
    with pytest.raises(RoiError, match=rf"^14 exam\(s\).* and {14 - MAX_LISTED} more; hand-placed .*with the label"):
        study_by_model(data, tmp_path / "c", paths=files, **chosen)


def test_a_mask_that_is_not_flagged_is_not_replaced_by_hand(data, tmp_path, inside):
    corrected, flagged, placed = inside
    images = corrections(tmp_path, (corrected, 2, 6, 8, 14), (flagged, 2, 6, 8, 14))
    files = images | overrides(tmp_path, (placed, "centre,9,5"))
    with pytest.raises(RoiError, match=r"^2 exam\(s\) whose predicted mask is not flagged") as caught:
        study_by_model(data, tmp_path, fold_of={}, flags={flagged: "small"}, paths=files)
    assert all(row_id(number) in str(caught.value) for number in (corrected, placed))
    assert row_id(flagged) not in str(caught.value)
    assert not list(tmp_path.rglob("crops.npy"))


def test_crops_by_hand_are_stated(data, tmp_path, inside):
    chosen = {"fold_of": {}, "flags": dict.fromkeys(inside[:2], "small")}
    files = corrections(tmp_path, (inside[0], 2, 6, 8, 14)) | overrides(tmp_path, (inside[1], "centre,9,5"))
    study = study_by_model(data, tmp_path / "a", paths=files, **chosen)
    assert "2 of 16 crops were placed or corrected by hand." in study.statements
    used = overrides(tmp_path, (inside[0], "use,,"), (inside[2], "exclude,,"))
    study = study_by_model(data, tmp_path / "b", paths=used, **chosen)
    assert not any("by hand" in line for line in study.statements)


# --- review ----------------------------------------------------------------------------------------------------------


def test_flagged_masks_are_reviewed_and_never_cropped(data, tmp_path, fold_of, inside):
    empty, two, small = inside
    study = study_by_model(
        data,
        tmp_path,
        fold_of=fold_of,
        masks={empty: make_mask(bottom=0)},
        flags={empty: "empty", two: "several_components", small: "small+at_edge"},
    )
    reasons = {"roi_empty": empty, "roi_several_components": two, "roi_small": small}
    assert {reason_of(study, number): number for number in inside} == reasons
    review = pd.read_csv(study.crops.folder / "review.csv")
    assert dict(zip(review["reason"], review["study_id"].map(number_of), strict=True)) == reasons
    assert set(review["slice_index"]) == {2}
    assert "touches the edge" in review.set_index("reason").loc["roi_small", "detail"]
    assert (study.crops.folder / "review.png").read_bytes().startswith(b"\x89PNG")
    assert len(study.crops.table) == NUM_EXAMS - 3


def test_a_box_that_leaves_the_image_too_far_is_not_believed(tmp_path, monkeypatch):
    monkeypatch.setattr("lbp_ray.roi.crops.MAX_SHIFT_MM", 2.0)
    data = make_cohort(tmp_path)
    at_the_top = make_mask(top=0, bottom=2)
    chosen = {"fold_of": {}, "masks": {5: at_the_top}}
    study = study_by_model(data, tmp_path / "a", **chosen)
    assert reason_of(study, 5) == BOX_OUTSIDE
    assert list(pd.read_csv(study.crops.folder / "review.csv")["reason"]) == [BOX_OUTSIDE]
    study = study_by_model(data, tmp_path / "b", paths=overrides(tmp_path, (5, "use,,")), **chosen)
    row = row_of(study, 5)
    assert (row["box_row"], row["accepted_flags"], row["crop_source"]) == (0, BOX_OUTSIDE, "model")
    study = study_by_model(data, tmp_path / "c", paths=overrides(tmp_path, (5, "centre,1,6")), **chosen)
    assert (row_of(study, 5)["box_row"], row_of(study, 5)["accepted_flags"]) == (0, "")
    study = study_by_model(data, tmp_path / "d", paths=corrections(tmp_path, (5, 2, 0, 8, 2)), **chosen)
    assert (row_of(study, 5)["box_row"], row_of(study, 5)["crop_source"]) == (0, "manual")


def test_a_review_list_with_its_actions_filled_in_is_an_override_file(data, tmp_path, inside):
    chosen = {"fold_of": {}, "flags": {inside[0]: "large"}}
    review = pd.read_csv(study_by_model(data, tmp_path / "a", **chosen).crops.folder / "review.csv")
    review.assign(action="use").to_csv(tmp_path / "o.csv", index=False)
    study = study_by_model(data, tmp_path / "b", paths={"roi_overrides": tmp_path / "o.csv"}, **chosen)
    assert row_of(study, inside[0])["accepted_flags"] == "large"


# --- what a person decides -------------------------------------------------------------------------------------------


def test_overrides_use_exclude_and_place(data, tmp_path, fold_of, inside):
    used, excluded, placed = inside
    rows = overrides(tmp_path, (used, "use,,"), (excluded, "exclude,,"), (placed, "centre,9,5"))
    study = study_by_model(data, tmp_path, fold_of=fold_of, flags={used: "large", placed: "small"}, paths=rows)
    assert row_of(study, used)["accepted_flags"] == "large"
    assert row_of(study, used)["crop_source"] in {"out_of_fold", "model"}
    assert reason_of(study, excluded) == "override_exclude"
    row = row_of(study, placed)
    assert (row["crop_source"], row["box_row"], row["box_column"], row["region_slice"]) == ("manual", 5, 2, -1)
    assert pd.read_csv(study.crops.folder / "review.csv").empty


def test_overrides_of_annotated_studies(data, tmp_path, inside):
    rows = overrides(tmp_path, (inside[0], "exclude,,"), (inside[1], "centre,9,5"))
    study = prepared(data, tmp_path, paths=rows)
    assert reason_of(study, inside[0]) == "override_exclude"
    assert row_of(study, inside[1])["crop_source"] == "manual"
    with pytest.raises(OverrideError, match="there is no predicted mask to use"):
        prepared(data, tmp_path, paths=overrides(tmp_path, (inside[0], "use,,")))


def test_an_empty_mask_cannot_be_used(data, tmp_path, inside):
    chosen = {"masks": {inside[0]: make_mask(bottom=0)}, "flags": {inside[0]: "empty"}, "fold_of": {}}
    with pytest.raises(OverrideError, match="line 2: there is no predicted mask to use: give a centre"):
        study_by_model(data, tmp_path, paths=overrides(tmp_path, (inside[0], "use,,")), **chosen)


def test_corrected_masks_are_manual_and_unchanged_ones_are_not(data, tmp_path, inside):
    moved, same, _ = inside
    files = corrections(tmp_path, (moved, 2, 6, 8, 14), (same, 3, 4, 9, 12))
    study = study_by_model(data, tmp_path, fold_of={}, flags={moved: "large"}, paths=files)
    row = row_of(study, moved)
    assert (row["crop_source"], row["centroid_row"], row["centroid_column"]) == ("manual", 10.0, 5.0)
    assert row_of(study, same)["crop_source"] == "model"


def test_a_correction_and_an_override_of_one_study_are_refused(data, tmp_path, inside):
    files = corrections(tmp_path, (inside[0], 2, 6, 8, 14)) | overrides(tmp_path, (inside[0], "centre,9,5"))
    with pytest.raises(OverrideError, match="line 2: its study also has a corrected mask"):
        study_by_model(data, tmp_path, fold_of={}, paths=files)


def test_an_image_without_a_shape_needs_a_decision(data, tmp_path, inside):
    files = corrections(tmp_path, (inside[0],))
    with pytest.raises(RegionError, match=rf"1 image\(s\) cannot be used, e.g. of study {row_id(inside[0])}.*roi_over"):
        study_by_model(data, tmp_path / "a", fold_of={}, paths=files)
    decided = files | overrides(tmp_path, (inside[0], "exclude,,"))
    study = study_by_model(data, tmp_path / "b", fold_of={}, paths=decided)
    assert reason_of(study, inside[0]) == "override_exclude"


def test_every_input_gives_other_crops(data, tmp_path, inside):
    plain = study_by_model(data, tmp_path, fold_of={}, flags={inside[0]: "large"}).crops.folder
    files = [
        {"paths": overrides(tmp_path, (inside[0], "exclude,,"))},
        {"paths": corrections(tmp_path, (inside[0], 2, 6, 8, 14))},
        {"roi": BY_MODEL | {"width_mm": 6.0, "height_mm": 8.0}},
        {"roi": SIZE},
        {"roi": {**SIZE, "centre": "mean_of_five"}},
    ]
    found = {plain, *(prepared(data, tmp_path, **({"roi": BY_MODEL} | changes)).crops.folder for changes in files)}
    assert len(found) == 6


# --- physical boxes --------------------------------------------------------------------------------------------------


def test_a_physical_box_is_resampled_where_it_has_other_pixels(tmp_path):
    fine = {"spacing_row_mm": 0.5, "spacing_column_mm": 0.5}
    data = make_cohort(tmp_path, records={3: fine})
    size = {"width_px": 4, "height_px": 6, "width_mm": 4.0, "height_mm": 6.0}
    study = prepared(data, tmp_path / "runs", roi=size)
    row = row_of(study, 3)
    assert (row["box_height"], row["box_width"], row["resampled"]) == (12, 8, True)
    assert not row_of(study, 4)["resampled"]
    assert study.crops.pixels_NKHW.shape == (NUM_EXAMS, 1, 6, 4)
    assert study.statements == ("1 of 16 crops were resampled linearly from a box of 6 x 4 mm onto 6 x 4 pixels "
                                "(rows x columns).",)  # fmt: skip


def test_a_resampled_crop_lies_on_its_series(tmp_path):
    """The centre of mass of a bright patch is at the same place, in mm, in the crop and in its series."""
    fine = {"spacing_row_mm": 0.5, "spacing_column_mm": 0.5}
    fine["affine"] = (4.0, 0, 0, 0, 0, 0, 0.5, 0, 0, -0.5, 0, 0, 0, 0, 0, 1)
    data = make_cohort(tmp_path, records={3: fine})
    size = {"width_px": 4, "height_px": 6, "width_mm": 4.0, "height_mm": 6.0}
    study = prepared(data, tmp_path / "runs", roi=size)
    row = row_of(study, 3).to_dict() | {"series_id": pseudonym("t", 3)}
    store = SliceStore.open(data / "x.zarr")
    series_HW = np.zeros((16, 12), np.uint16)
    series_HW[row["box_row"] + 4 : row["box_row"] + 6, row["box_column"] + 2 : row["box_column"] + 6] = 1000
    crop_HW = resize(series_HW[row["box_row"] :, row["box_column"] :][:12, :8], (6, 4))
    stack = crop_stack(store, row, crop_HW[None])
    place = [0, *np.average(np.argwhere(crop_HW), axis=0, weights=crop_HW[crop_HW > 0]), 1]
    series_affine = np.reshape(store.record(row["series_id"]).affine, (4, 4))
    expected = series_affine @ [2, *np.argwhere(series_HW).mean(axis=0), 1]
    np.testing.assert_allclose(stack.affine @ place, expected, atol=1e-9)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_regions_of_other_images_are_refused(data, tmp_path):
    with pytest.raises(RegionError, match=r"0 regions artefacts .*, 1 of other inputs, exactly one is required"):
        study_by_model(data, tmp_path, meta={"store": "0" * 64})
    (folder,) = (tmp_path / "regions").iterdir()
    for name, field in (("store", "store"), ("mid-sagittal choice", "midsagittal")):
        other = make_regions(tmp_path / name, data, choose_middle(data, tmp_path), meta={field: "0" * 64})
        with pytest.raises(RegionError, match=rf"was made from another {name} \(000000000000, the study's is"):
            prepared(data, tmp_path, roi=BY_MODEL, paths={"regions": other})
    with pytest.raises(RegionError, match="no regions artefact"):
        prepared(data, tmp_path, roi=BY_MODEL, paths={"regions": folder.parent})


def test_a_choice_of_regions_is_refused(data, tmp_path):
    middle = choose_middle(data, tmp_path)
    for seed in (0, 1):
        make_regions(tmp_path / "regions", data, middle, meta={"recipe": {"seed": seed}})
    meta = Regions.open(next((tmp_path / "regions").iterdir())).meta
    with pytest.raises(RegionError, match=r"2 regions artefacts .*paths\.regions"):
        find_regions(tmp_path / "regions", store=meta.store, midsagittal=meta.midsagittal)


def test_a_segmenter_that_saw_a_sealed_patient_is_refused_or_stated(data, tmp_path, sealed):
    shown = sealed[1][0]
    chosen = {"fold_of": {shown: 0}}
    with pytest.raises(
        RegionError, match=rf"1 patient\(s\) of the sealed hold-out, e.g. patient {pseudonym('p', shown)}"
    ):
        study_by_model(data, tmp_path, **chosen)
    study = prepared(data, tmp_path, roi=BY_MODEL | {"allow_holdout_training": True})
    assert any("was trained on 1 patient(s) of the sealed hold-out" in line for line in study.statements)


def test_folds_of_its_own_need_a_declaration(data, tmp_path, fold_of):
    with pytest.raises(
        RegionError, match=r"has folds of its own.*Either nest it.*roi\.label_blind=true.*never saw a pain"
    ):
        study_by_model(data, tmp_path, fold_of=fold_of, roi={"label_blind": False})
    study = prepared(data, tmp_path, roi=BY_MODEL)
    assert any("declared to have seen no pain label" in line for line in study.statements)


def test_a_nested_segmenter_needs_no_declaration(data, tmp_path, sealed):
    split, _ = sealed
    inside = split.table[split.table["fold"] != HOLDOUT]
    fold_of = {number_of(study): int(fold) for study, fold in zip(inside["study_id"], inside["fold"], strict=True)}
    meta = {"nested_in": split.split_hash, "statements": ("From a random start.",)}
    nested = {"roi": {"label_blind": False}, "meta": meta}
    study = study_by_model(data, tmp_path / "a", fold_of=fold_of, **nested)
    assert study.statements == ("From a random start.",)
    swapped = {number: 1 - fold for number, fold in fold_of.items()}
    with pytest.raises(RegionError, match=r"12 mask\(s\) come from another fold's network"):
        study_by_model(data, tmp_path / "b", fold_of=swapped, **nested)


def test_a_mask_by_a_network_that_saw_its_patient_is_refused(data, tmp_path, fold_of, inside):
    trained = tuple(pseudonym("p", number) for number in (*fold_of, 1))
    with pytest.raises(RegionError, match=rf"1 mask\(s\) come from a network .* of study {row_id(1)}"):
        study_by_model(
            data, tmp_path, fold_of={k: v for k, v in fold_of.items() if k != 1}, meta={"trained_patients": trained}
        )


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("paths.regions=/d/regions", "paths.regions is read with roi.source: model only"),
        ("paths.roi_corrections=/d/c.xml", "paths.roi_corrections is read with roi.source: model only"),
        ("roi.width_mm=100", "width_mm and height_mm belong together"),
        ("roi={source: model, centre: mean_of_five}", "which a predicted mask has not; use union"),
        ("roi.source=both", "roi.source"),
        ("paths.roi_overrides=o.csv", "absolute path"),
    ],
)
def test_settings_that_contradict_each_other(tmp_path, override, match):
    text = "name: tiny\npaths: {store: /d/s.zarr, questionnaire: /d/q.csv, annotations: /d/a.xml, runs: /d/runs}\n"
    with pytest.raises(ConfigError, match=match):
        load_config(StudyConfig, write(tmp_path / "s.yaml", text), [override])


# --- folds after exclusions ------------------------------------------------------------------------------------------


def test_exams_without_a_crop_leave_their_fold_and_nobody_is_drawn_anew(data, tmp_path, sealed, inside):
    split, (hidden, *_) = sealed
    rows = overrides(tmp_path, (inside[0], "exclude,,"), (hidden, "exclude,,"))
    study = prepared(data, tmp_path, paths=rows)
    assert study.split.split_hash == split.split_hash
    assert set(study.split.table["study_id"]) - set(study.analysed.table["study_id"]) == {
        row_id(inside[0]),
        row_id(hidden),
    }
    steps = {step.name: (step.count, step.reason) for step in study.funnel}
    assert steps["outside the hold-out"] == (12, "4 in the sealed hold-out (without crops there: override_exclude: 1)")
    assert steps["with crops, cross-validated"] == (11, "override_exclude: 1")


def test_a_fold_that_lost_a_class_is_refused(data, tmp_path, sealed):
    table = sealed[0].table
    lost = table[(table["fold"] == 1) & (table["label"] == 1)]["study_id"]
    rows = overrides(tmp_path, *((number_of(study), "exclude,,") for study in lost))
    with pytest.raises(SplitError, match=r"fold 1 has exams of 1 class.*\(override_exclude: 3\).*review"):
        prepared(data, tmp_path, paths=rows)


# --- association -----------------------------------------------------------------------------------------------------


def exams(sources, labels, folds=2):
    number = len(labels)
    return pd.DataFrame(
        {
            "patient_id": [f"p{row:03d}" for row in range(number)],
            "fold": np.arange(number) // 2 % folds,
            "label": labels,
            "crop_source": sources,
        }
    )


def test_sources_that_follow_the_label_are_found():
    labels = np.arange(40) % 2
    told = exams(np.where(labels == 1, "manual", "model"), labels)
    statistic, p_value = source_association(told, seed=0)
    assert statistic == pytest.approx(40.0)
    assert p_value == pytest.approx(1 / 5000)


def test_the_statistic_is_pearsons():
    from scipy.stats import chi2_contingency

    generator = np.random.default_rng(0)
    told = exams(generator.choice(["manual", "model", "out_of_fold"], 60), np.arange(60) % 2)
    statistic, p_value = source_association(told, seed=0)
    table = pd.crosstab(told["crop_source"], told["label"])
    assert statistic == pytest.approx(chi2_contingency(table, correction=False).statistic)
    assert p_value == pytest.approx(chi2_contingency(table, correction=False).pvalue, abs=0.06)
    assert source_association(told, seed=0) == (statistic, p_value)


def test_p_values_are_uniform_where_there_is_nothing_to_find():
    generator = np.random.default_rng(1)
    drawn = [exams(generator.choice(["manual", "model"], 60), np.arange(60) % 2) for _ in range(40)]
    below = np.mean([source_association(told, seed=0)[1] <= 0.2 for told in drawn])
    assert below <= 0.35


def test_one_source_cannot_be_tested():
    assert source_association(exams(["model"] * 8, np.arange(8) % 2), seed=0) == (None, None)


def test_provenance_counts_the_cross_validated_by_class(data, tmp_path, sealed, inside):
    rows = overrides(tmp_path, (inside[0], "exclude,,"), (inside[1], "centre,9,5"), (sealed[1][0], "exclude,,"))
    study = prepared(data, tmp_path, paths=rows)
    found = describe_provenance(study, seed=0)
    counts = {item.name: item.negative + item.positive for item in (*found.sources, *found.excluded)}
    assert counts == {"annotation": 10, "manual": 1, "override_exclude": 1}
    assert found.segmenter is None
    assert found.p_value is not None


def test_segmenter_scores_name_both_standard_errors(data, tmp_path):
    regions = Regions.open(
        make_regions(tmp_path, data, choose_middle(data, tmp_path), fold_of={0: 0, 1: 0, 2: 1, 3: 1})
    )
    found = segmenter_scores(regions.scores)
    assert (found.num_images, found.num_folds) == (4, 2)
    assert found.dice == pytest.approx(0.91)
    assert found.standard_error_images == pytest.approx(0.02 / np.sqrt(3) / 2)
    assert found.standard_error_folds == pytest.approx(0.01)
    assert found.centroid_error_median_mm == 2.5


# --- the result ------------------------------------------------------------------------------------------------------


def test_a_study_with_exams_without_crops_ends_in_a_report_that_says_so(data, tmp_path, fold_of, inside):
    evaluation = {"permutations": 0, "bootstrap_resamples": 20}
    flags = {inside[1]: "large", inside[2]: "small"}
    rows = overrides(tmp_path, (inside[0], "exclude,,"), (inside[1], "centre,9,5"))
    make_regions(tmp_path / "regions", data, choose_middle(data, tmp_path), fold_of=fold_of, flags=flags)
    config = study_config(data, tmp_path, roi=BY_MODEL, paths=rows, seeds=(0,), evaluation=evaluation)
    study = prepare(config)
    hashes = {"crops_hash": study.crops.crops_hash, "split_hash": study.split.split_hash, "weights_hash": "w"}
    specs = plan_trials(config, **hashes)
    folders = [tmp_path / "trials" / spec.cell.name for spec in specs]
    for spec, folder in zip(specs, folders, strict=True):
        commit_trial(spec, folder, study)
    trial_data = load_trial_data(study.crops.folder, study.split.folder, None)
    result = StudyResult.load(aggregate(config, study, specs, folders, trial_data) / "result.json")
    assert (result.num_studies, result.num_holdout_studies) == (10, 4)
    assert {item.name for item in result.crops.sources} == {"manual", "model", "out_of_fold"}
    assert {item.name: item.negative + item.positive for item in result.crops.excluded} == {
        "override_exclude": 1,
        "roi_small": 1,
    }
    assert result.hashes["regions"] == study.regions.meta.regions_hash
    assert not any(pseudonym("s", number) in result.model_dump_json() for number in range(NUM_EXAMS))
    html = write_report(result, tmp_path / "report").read_text()
    assert "declared to have seen no pain label" in html
    assert "no crop: roi_small" in html
    assert "1 of 14 crops were placed or corrected by hand." in html
    assert describe_predictor(config, study, specs, folders).regions == study.regions.folder


@pytest.mark.parametrize("change", [{"trained_patients": []}, {"nested_in": "0" * 64}])
def test_regions_whose_description_was_edited_are_refused(tmp_path, data, change):
    folder = make_regions(tmp_path / "regions", data, choose_middle(data, tmp_path))
    meta = json.loads((folder / "regions.json").read_text())
    (folder / "regions.json").write_text(json.dumps(meta | change))
    with pytest.raises(RegionError, match="was changed after it was made"):
        Regions.open(folder)
