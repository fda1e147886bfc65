from __future__ import annotations

import numpy as np
import pytest

from lbp_ray.annotations import LEVELS, AnnotationError, Rectangle, mask_centroid, read_annotations, union_mask
from lbp_ray.roi import Excluded, choose_neighbours, place_box


def cvat(tmp_path, boxes, name="aaa/bbb/7.png"):
    lines = [f'<box label="{label}" xtl="{a}" ytl="{b}" xbr="{c}" ybr="{d}"/>' for label, a, b, c, d in boxes]
    path = tmp_path / "annotations.xml"
    path.write_text(
        f'<annotations><image id="0" name="{name}" width="64" height="64">{"".join(lines)}</image></annotations>'
    )
    return path


FIVE = [(level, 10, 10 * row, 20, 10 * row + 10) for row, level in enumerate(LEVELS)]


def test_five_rectangles_are_read_in_order(tmp_path):
    (found,) = read_annotations(cvat(tmp_path, FIVE[::-1]))
    assert (found.study_id, found.series_id, found.slice_index, found.fault) == ("aaa", "bbb", 7, "")
    assert found.rectangles[0] == Rectangle(10, 0, 20, 10)


@pytest.mark.parametrize(
    ("boxes", "fault"),
    [
        (FIVE[:4], "missing_L5S1"),
        ([*FIVE, FIVE[0]], "repeated_L1L2"),
        ([*FIVE, ("S1S2", 0, 0, 1, 1)], "unknown_label"),
        ([*FIVE[:4], ("L5S1", 5, 5, 5, 9)], "empty_rectangle"),
        ([], "+".join(f"missing_{level}" for level in LEVELS)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_faulty_images_say_why(tmp_path, boxes, fault):
    (found,) = read_annotations(cvat(tmp_path, boxes))
    assert found.fault == fault
    assert found.rectangles == ()


@pytest.mark.parametrize(
    ("text", "match"),
    [("<annotations>", "not XML"), ("<dataset/>", "root must be <annotations>")],
)
def test_unreadable_file(tmp_path, text, match):
    (tmp_path / "a.xml").write_text(text)
    with pytest.raises(AnnotationError, match=match):
        read_annotations(tmp_path / "a.xml")


def test_unlinked_names_and_absent_file_are_refused(tmp_path):
    with pytest.raises(AnnotationError, match=r"preprocess link"):
        read_annotations(cvat(tmp_path, FIVE, name="1.2.840.1.png"))
    with pytest.raises(AnnotationError, match="annotation file not found"):
        read_annotations(tmp_path / "none.xml")


def test_union_counts_overlap_once():
    mask = union_mask((Rectangle(0, 0, 4, 4), Rectangle(2, 0, 6, 4)), (8, 8))
    assert mask.sum() == 24
    assert mask_centroid(mask) == (2.0, 3.0)


def test_pixel_belongs_when_its_centre_does():
    assert union_mask((Rectangle(0.6, 0.4, 1.6, 1.6),), (3, 3)).nonzero()[0].tolist() == [0, 1]


def test_rectangles_outside_the_image_are_refused():
    with pytest.raises(AnnotationError, match="covers no pixel"):
        mask_centroid(union_mask((Rectangle(90, 90, 99, 99),), (8, 8)))


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
