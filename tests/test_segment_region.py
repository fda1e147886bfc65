"""What is measured of a mask, which are flagged, and the scores of the annotated slices."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays

from lbp_ray.roi.regions import FLAGS, SCORE_COLUMNS, RegionError
from lbp_ray.segment.region import SPECK_SHARE, describe_mask, flags_of, plausible_ranges, without_specks
from lbp_ray.segment.scores import MeanBox, centroid_error_mm, dice, mean_box, score_slice, summarise

SHAPE = (100, 80)
SPACING_MM = (0.5, 2.0)


def box(top, left, bottom, right, shape=SHAPE):
    mask_HW = np.zeros(shape, dtype=bool)
    mask_HW[top:bottom, left:right] = True
    return mask_HW


SPINE = box(20, 30, 60, 40)


# --- region


def test_sizes_are_in_mm_of_each_direction():
    region = describe_mask(SPINE, SPACING_MM)
    assert (region.height_mm, region.width_mm, region.area_mm2) == (40 * 0.5, 10 * 2.0, 400 * 0.5 * 2.0)
    assert (region.components, region.touches_edge) == (1, False)


def test_centroid_is_the_annotations_one():
    from lbp_ray.roi.annotations import mask_centroid

    region = describe_mask(SPINE, SPACING_MM)
    assert (region.centroid_row, region.centroid_column) == mask_centroid(SPINE) == (40.0, 35.0)


def test_a_speck_far_away_changes_nothing():
    assert describe_mask(SPINE | box(90, 70, 92, 73), SPACING_MM) == describe_mask(SPINE, SPACING_MM)


def test_a_part_above_the_share_is_a_component():
    part = box(90, 60, 92, 60 + int(SPECK_SHARE * SPINE.sum()))
    region = describe_mask(SPINE | part, SPACING_MM)
    assert region.components == 2
    assert region.height_mm == 72 * 0.5


def test_rectangles_that_meet_in_a_corner_are_one_region():
    assert describe_mask(box(20, 30, 40, 40) | box(40, 40, 60, 50), SPACING_MM).components == 1


@pytest.mark.parametrize(
    ("mask_HW", "touches"),
    [
        (box(0, 30, 60, 40), True),
        (box(20, 30, 100, 40), True),
        (box(20, 0, 60, 40), True),
        (box(20, 30, 60, 80), True),
        (box(1, 1, 99, 79), False),
    ],
    ids=["top", "bottom", "left", "right", "one pixel off"],
)
def test_edges(mask_HW, touches):
    assert describe_mask(mask_HW, SPACING_MM).touches_edge is touches


def test_an_empty_mask_has_no_centroid():
    region = describe_mask(box(0, 0, 0, 0), SPACING_MM)
    assert (region.area_mm2, region.components, region.touches_edge) == (0, 0, False)
    assert np.isnan([region.centroid_row, region.centroid_column]).all()


@settings(deadline=None, max_examples=60)
@given(arrays(bool, (12, 9)))
def test_dropping_specks_twice_is_dropping_them_once(mask_HW):
    once = without_specks(mask_HW)
    assert np.array_equal(without_specks(once), once)
    assert not (once & ~mask_HW).any()
    assert once.any() == mask_HW.any()


# --- what is plausible


def regions(heights_mm):
    plain = describe_mask(SPINE, (1.0, 1.0))
    return [replace(plain, height_mm=value, area_mm2=value * 40.0) for value in heights_mm]


def test_bounds_of_equal_regions():
    plausible = plausible_ranges(regions([200.0] * 3))
    assert plausible.height_mm == (150.0, 250.0)
    assert plausible.area_mm2 == (8000 * 0.75**2, 8000 * 1.25**2)


def test_one_wrong_annotation_of_many_sets_no_bound():
    heights_mm = np.linspace(180, 220, 21)
    wrong = [*heights_mm[:-1], 2000.0]
    assert plausible_ranges(regions(wrong)).height_mm == plausible_ranges(regions(heights_mm)).height_mm


@pytest.mark.parametrize("num_annotated", [5, 30, 331])
def test_bounds_keep_true_regions_and_catch_a_spine_without_two_levels(num_annotated):
    """Lumbar heights of 200 mm with 7 % spread, drawn again and again."""
    random = np.random.default_rng(num_annotated)
    for _ in range(50):
        low, high = plausible_ranges(regions(random.normal(200, 14, num_annotated))).height_mm
        unseen = random.normal(200, 14, 200)
        assert np.mean((unseen < low) | (unseen > high)) <= 0.01
        assert low > 0.6 * 200


@pytest.mark.parametrize("faulty", [[], [describe_mask(box(0, 0, 0, 0), SPACING_MM)]], ids=["none", "empty"])
def test_no_range_without_annotated_regions(faulty):
    with pytest.raises(RegionError, match="annotated regions with pixels"):
        plausible_ranges(faulty)


# --- flags

PLAUSIBLE = plausible_ranges([describe_mask(SPINE, SPACING_MM)])


@pytest.mark.parametrize(
    ("mask_HW", "flags"),
    [
        (SPINE, ""),
        (box(0, 0, 0, 0), "empty"),
        (box(20, 30, 40, 40) | box(45, 30, 60, 40), "several_components"),
        (box(20, 30, 45, 40), "small"),
        (box(20, 30, 60, 45), "large"),
        (box(20, 70, 60, 80), "at_edge"),
        (box(0, 30, 10, 40) | box(90, 60, 100, 70), "several_components+small+large+at_edge"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_flags(mask_HW, flags):
    assert flags_of(describe_mask(mask_HW, SPACING_MM), PLAUSIBLE) == flags
    assert set(filter(None, flags.split("+"))) <= set(FLAGS)


def test_the_ends_of_a_range_are_plausible():
    region = describe_mask(SPINE, SPACING_MM)
    exact = PLAUSIBLE.model_copy(update={"height_mm": (region.height_mm, region.height_mm)})
    assert flags_of(region, exact) == ""


# --- scores


@pytest.mark.parametrize(
    ("predicted_HW", "expected"),
    [
        (SPINE, 1.0),
        (box(0, 0, 0, 0), 0.0),
        (box(20, 30, 40, 40), 2 * 200 / 600),
        (box(70, 30, 90, 40), 0.0),
    ],
    ids=["same", "empty", "half", "elsewhere"],
)
def test_dice(predicted_HW, expected):
    assert dice(SPINE, predicted_HW) == dice(predicted_HW, SPINE) == expected


def test_two_empty_masks_agree():
    assert dice(box(0, 0, 0, 0), box(0, 0, 0, 0)) == 1.0


def test_masks_of_different_images_are_refused():
    with pytest.raises(ValueError, match=r"\(100, 80\) and \(10, 10\)"):
        dice(SPINE, box(0, 0, 1, 1, (10, 10)))


def test_centroid_error_counts_rows_and_columns_in_their_own_mm():
    assert centroid_error_mm(SPINE, np.roll(SPINE, (6, 2), (0, 1)), SPACING_MM) == pytest.approx(5.0)  # 3 and 4 mm


def test_finding_nothing_counts_as_the_furthest_corner():
    corner_mm = np.hypot(60 * 0.5, 45 * 2.0)  # the centroid is at row 40, column 35 of 100 x 80
    assert centroid_error_mm(SPINE, box(0, 0, 0, 0), SPACING_MM) == pytest.approx(corner_mm)


def test_an_empty_annotation_is_refused():
    with pytest.raises(ValueError, match="annotated mask holds no pixel"):
        centroid_error_mm(box(0, 0, 0, 0), SPINE, SPACING_MM)


def test_mean_box_of_one_mask_is_that_mask():
    assert np.array_equal(mean_box([(SPINE, SPACING_MM)]).mask(SHAPE, SPACING_MM), SPINE)


def test_mean_box_averages_edges_in_mm_about_the_image_centre():
    small = box(10, 20, 50, 30), (1.0, 1.0)
    large = np.kron(box(14, 20, 54, 30), np.ones((2, 2), dtype=bool)), (0.5, 0.5)  # 4 mm lower, on a finer grid
    assert mean_box([small, large]) == MeanBox(top_mm=-38.0, left_mm=-20.0, bottom_mm=2.0, right_mm=-10.0)


@pytest.mark.parametrize("masks", [[], [(box(0, 0, 0, 0), SPACING_MM)]], ids=["none", "empty"])
def test_no_mean_box_without_pixels(masks):
    with pytest.raises(ValueError, match=r"found none|without a pixel"):
        mean_box(masks)


def test_score_row_has_the_columns_of_the_table():
    place = {"study_id": "s", "patient_id": "p", "series_id": "t", "slice_index": 7, "fold": 2, "more": 1}
    row = score_slice(place, SPINE, SPINE, box(20, 30, 40, 40), SPACING_MM)
    assert tuple(row) == SCORE_COLUMNS
    assert [row[name] for name in SCORE_COLUMNS[5:]] == [1.0, 2 * 200 / 600, 0.0, 5.0]


# --- summary


def scores(dice_of_patient, folds, *, slices=1):
    rows = [
        (f"s{patient}", f"p{patient}", f"t{patient}", index, fold, value, value / 2, 10 * (1 - value), 40 * (1 - value))
        for patient, (value, fold) in enumerate(zip(dice_of_patient, folds, strict=True))
        for index in range(slices)
    ]
    return pd.DataFrame(rows, columns=list(SCORE_COLUMNS))


DICE = (0.9, 0.8, 0.95, 0.85)


def test_summary_by_hand():
    summary = summarise(scores(DICE, (0, 0, 1, 1)))
    assert (summary.num_images, summary.num_patients, summary.num_folds) == (4, 4, 2)
    assert summary.dice.mean == pytest.approx(0.875)
    assert summary.dice.se_images == pytest.approx(np.std(DICE, ddof=1) / 2)
    assert summary.dice.se_folds == pytest.approx(0.025)  # fold means 0.85 and 0.90
    assert summary.baseline_dice.mean == pytest.approx(0.875 / 2)
    assert [(fold.fold, fold.num_images, fold.dice) for fold in summary.folds] == [
        (0, 2, pytest.approx(0.85)),
        (1, 2, pytest.approx(0.90)),
    ]
    assert summary.centroid_error.median_mm == pytest.approx(1.25)
    assert summary.centroid_error.tail_mm == pytest.approx(np.percentile([1.0, 2.0, 0.5, 1.5], 95))
    assert summary.baseline_error.largest_mm == pytest.approx(8.0)


def test_error_over_patients_is_the_one_over_images_when_each_has_one():
    summary = summarise(scores(DICE, (0, 0, 1, 1)))
    assert summary.dice.se_patients == pytest.approx(summary.dice.se_images)


def test_repeating_a_patients_slices_makes_the_mean_no_surer():
    once, often = (summarise(scores(DICE, (0, 0, 1, 1), slices=count)) for count in (1, 5))
    assert often.dice.se_patients == pytest.approx(once.dice.se_patients)
    assert often.dice.se_images < 0.5 * once.dice.se_images


def test_one_fold_has_no_error_over_folds():
    assert summarise(scores(DICE, (0,) * 4)).dice.se_folds is None


def broken(column, value):
    return scores(DICE, (0, 0, 1, 1)).assign(**{column: [value, *scores(DICE, (0, 0, 1, 1))[column][1:]]})


@pytest.mark.parametrize(
    ("faulty", "message"),
    [
        (scores((), ()), "found 0 rows"),
        (scores(DICE, (0, 0, 1, 1)).drop(columns="baseline_dice"), r"missing: \['baseline_dice'\]"),
        (broken("dice", np.nan), "dice: finite values from 0 to 1 are required, 1 of 4 are not"),
        (broken("dice", 1.01), "dice: finite values from 0 to 1"),
        (broken("centroid_error_mm", np.inf), "centroid_error_mm: finite values"),
        (broken("baseline_error_mm", -1.0), "baseline_error_mm: finite values"),
        (pd.concat([scores(DICE, (0, 0, 1, 1))] * 2), "study s2: a slice was scored more than once"),
        (broken("fold", -1), "no network was trained on have a summary of their own"),
        (broken("patient_id", "p3"), "patient p3 stands in 2 folds"),
    ],
)
def test_faulty_scores_are_refused(faulty, message):
    with pytest.raises(ValueError, match=message):
        summarise(faulty)
