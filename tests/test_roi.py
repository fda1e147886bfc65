"""Boxes: where they lie, which slices they take, what becomes of their pixels, and what a person may override."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lbp_ray.roi.box import (
    Box,
    Excluded,
    choose_neighbours,
    original_box,
    place_box,
    resize,
    shift_mm,
    size_in_pixels,
)
from lbp_ray.roi.overrides import Override, OverrideError, OverrideTargets, read_overrides
from preprocess.geometry import canonical_pixels, canonical_point


@pytest.mark.parametrize(
    ("centroid", "corner"),
    [((50, 50), (40, 45)), ((2, 2), (0, 0)), ((99, 99), (80, 90)), ((50.4, 49.6), (40, 45))],
)
def test_box_is_centred_then_shifted_inside(centroid, corner):
    box = place_box(centroid, (100, 100), height=20, width=10)
    assert (box.row, box.column, box.height, box.width) == (*corner, 20, 10)
    assert box.cut(np.zeros((3, 100, 100))).shape == (3, 20, 10)


def test_small_image_is_excluded_not_padded():
    with pytest.raises(Excluded, match="image 10 x 10, box 20 x 10") as caught:
        place_box((5, 5), (10, 10), height=20, width=10)
    assert caught.value.reason == "image_smaller_than_box"


OFFSETS = (-4.0, 0.0, 4.0)


@pytest.mark.parametrize(
    ("positions", "middle", "chosen"),
    [
        ([0, 4, 8, 12], 1, [0, 1, 2]),
        ([0, 4.4, 8.8], 1, [0, 1, 2]),
        ([0, 2, 4, 6, 8], 2, [0, 2, 4]),
        ([0, 1, 4, 5, 8], 2, [0, 2, 4]),
    ],
)
def test_neighbours_are_chosen_by_millimetres(positions, middle, chosen):
    assert choose_neighbours(np.array(positions), middle, OFFSETS, tolerance_mm=1).tolist() == chosen


@pytest.mark.parametrize(("positions", "middle"), [([0, 4, 8], 0), ([0, 4, 8], 2), ([0, 6, 12], 1)])
def test_missing_neighbour_excludes_the_study(positions, middle):
    with pytest.raises(Excluded, match=r"no slice within 1 mm of [+-]4 mm") as caught:
        choose_neighbours(np.array(positions), middle, OFFSETS, tolerance_mm=1)
    assert caught.value.reason == "neighbour_missing"


def test_shift_is_measured_in_millimetres():
    box = place_box((2, 50), (100, 100), height=20, width=10)
    assert shift_mm(box, (2, 50), (2.0, 1.0)) == 16.0
    assert shift_mm(place_box((50, 3), (100, 100), height=20, width=10), (50, 3), (2.0, 0.5)) == 1.0


def test_physical_size_becomes_whole_pixels():
    assert size_in_pixels((200.0, 100.0), (0.5, 0.5)) == (400, 200)
    assert size_in_pixels((200.0, 100.0), (0.7, 0.3)) == (286, 333)


# --- the way back to the DICOM pixel grid ----------------------------------------------------------------------------

ALL_FLIPS = [(t, r, c) for t in (False, True) for r in (False, True) for c in (False, True)]


@pytest.mark.parametrize("flips", ALL_FLIPS, ids=str)
def test_the_original_box_holds_the_same_pixels_of_the_file(flips):
    file_HW = np.arange(9 * 14).reshape(9, 14)
    transpose, flip_rows, flip_columns = flips
    stored_HW = canonical_pixels(file_HW, transpose=transpose, flip_rows=flip_rows, flip_columns=flip_columns)
    box = Box(2, 1, 5, 4)
    back = original_box(box, stored_HW.shape, flips)
    again = canonical_pixels(back.cut(file_HW), transpose=transpose, flip_rows=flip_rows, flip_columns=flip_columns)
    np.testing.assert_array_equal(again, box.cut(stored_HW))
    corners = [canonical_point(back.row + r, back.column + c, stored_HW.shape, flips) for r, c in ((0, 0), (back[2:]))]
    assert sorted(corners)[0][0] == box.row
    assert {row for row, _ in corners} == {2, 7}
    assert {column for _, column in corners} == {1, 5}


# --- resampling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 20), (13, 31), (100, 55), (64, 48)], ids=str)
def test_resampling_equals_torch_with_antialiasing(shape):
    pixels = np.random.default_rng(0).integers(0, 4000, (3, 64, 48)).astype(np.uint16)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(pixels.astype(np.float64))[None], size=shape, mode="bilinear", antialias=True
    )[0].numpy()
    resampled = resize(pixels, shape)
    assert resampled.dtype == np.uint16
    assert resampled.shape == (3, *shape)
    assert np.abs(resampled - expected).max() <= 0.5 + 1e-6


def test_resampling_keeps_extreme_values():
    full = np.full((1, 9, 7), 65535, np.uint16)
    assert (resize(full, (20, 3)) == 65535).all()
    low = np.full((1, 9, 7), -32768, np.int16)
    assert (resize(low, (4, 30)) == -32768).all()


# --- overrides -------------------------------------------------------------------------------------------------------

TARGETS = OverrideTargets(shapes=dict.fromkeys("abcd", (16, 12)), masks=frozenset("abd"), corrected=frozenset("d"))


def override_file(tmp_path, *rows, header="study_id,action,centre_row,centre_column"):
    path = tmp_path / "overrides.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def test_overrides_are_read_by_study(tmp_path):
    path = override_file(tmp_path, "a,use,,", "b,exclude,,", "c,centre,7.5,3")
    assert read_overrides(path, TARGETS) == {
        "a": Override("use"),
        "b": Override("exclude"),
        "c": Override("centre", (7.5, 3.0)),
    }


def test_further_columns_are_ignored(tmp_path):
    path = override_file(tmp_path, "note,exclude,a,,", header="note,action,study_id,centre_row,centre_column")
    assert read_overrides(path, TARGETS) == {"a": Override("exclude")}


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ("1.2.840.99,use,,", "line 3: study_id names no study"),
        ("b,crop,,", "line 3: action must be use, exclude or centre"),
        ("c,use,,", "line 3: there is no predicted mask to use: give a centre"),
        ("d,exclude,,", "line 3: its study also has a corrected mask in paths.roi_corrections"),
        ("b,centre,,3", "line 3: centre_row and centre_column must be numbers"),
        ("b,centre,nan,3", "line 3: centre_row and centre_column must be numbers"),
        ("b,centre,17,3", r"line 3: the centre lies outside the image of 16 x 12"),
        ("b,use,4,3", "line 3: centre_row and centre_column belong to the action centre only"),
        ("a,exclude,,", "line 2: its study stands on 2 lines; line 3: its study stands on 2 lines"),
        ("b", "line 3: action must be"),
    ],
)
def test_bad_overrides_are_told_by_line_and_quote_nothing(tmp_path, row, fault):
    with pytest.raises(OverrideError, match=fault) as caught:
        read_overrides(override_file(tmp_path, "a,use,,", row), TARGETS)
    assert "1.2.840" not in str(caught.value)


def test_all_bad_overrides_are_told_at_once(tmp_path):
    with pytest.raises(OverrideError, match=r"2 faulty row\(s\), no override was applied: line 2.*line 3"):
        read_overrides(override_file(tmp_path, "z,use,,", "b,crop,,"), TARGETS)


def test_override_files_that_are_none(tmp_path):
    with pytest.raises(OverrideError, match="FileNotFoundError"):
        read_overrides(tmp_path / "none.csv", TARGETS)
    with pytest.raises(OverrideError, match=r"lacks the column\(s\) centre_row, centre_column"):
        read_overrides(override_file(tmp_path, header="study_id,action"), TARGETS)
