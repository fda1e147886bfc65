"""Annotated slices: five levels or one region, of any shape; every fault by image; centres by rule."""

from __future__ import annotations

import re
import zipfile

import numpy as np
import pytest

from lbp_ray.roi.annotations import (
    LEVELS,
    REGION,
    AnnotationError,
    faults_by_image,
    mask_centroid,
    read_annotations,
)
from preprocess.cvat.shapes import Box, CvatImage, Mask, Polygon, rasterise
from preprocess.cvat.write import write_cvat

SIZE = 64
NAME = "aaa/bbb/7.png"
BOXES = tuple(Box(level, 10, 10 * row, 20, 10 * row + 10) for row, level in enumerate(LEVELS))
POLYGONS = tuple(Polygon(box.label, box.corners()) for box in BOXES)
MASKS = tuple(Mask.from_pixels(box.label, rasterise(box, (SIZE, SIZE))) for box in BOXES)
WHOLE = Box(REGION, 10, 0, 20, 50)


def written(tmp_path, *images):
    """A file with images of (shapes, name)."""
    path = tmp_path / "annotations.xml"
    write_cvat(path, [CvatImage(name, SIZE, SIZE, tuple(shapes)) for shapes, name in images])
    return path


def annotated(tmp_path, shapes):
    (found,) = read_annotations(written(tmp_path, (shapes, NAME)), keep_empty=True)
    return found


@pytest.mark.parametrize("shapes", [BOXES, POLYGONS, MASKS], ids=["boxes", "polygons", "masks"])
def test_five_shapes_are_read_in_order_whatever_they_are(tmp_path, shapes):
    found = annotated(tmp_path, shapes[::-1])
    assert (found.study_id, found.series_id, found.slice_index, found.fault) == ("aaa", "bbb", 7, "")
    assert found.shapes == shapes
    assert (found.rows, found.columns) == (SIZE, SIZE)
    np.testing.assert_array_equal(found.mask(), rasterise(WHOLE, (SIZE, SIZE)))


def test_region_alone_is_sound_and_its_parts_are_united(tmp_path):
    upper, lower = (
        Box(REGION, 10, 0, 20, 30),
        Mask.from_pixels(REGION, rasterise(Box("", 10, 20, 20, 50), (SIZE, SIZE))),
    )
    for shapes in ([WHOLE], [upper, lower]):
        found = annotated(tmp_path, shapes)
        np.testing.assert_array_equal(found.mask(), rasterise(WHOLE, (SIZE, SIZE)))


@pytest.mark.parametrize(
    ("shapes", "fault"),
    [
        (BOXES[:4], "missing_L5S1"),
        (BOXES[1:3], "missing_L1L2+missing_L4L5+missing_L5S1"),
        ([*BOXES, MASKS[0]], "repeated_L1L2"),
        ([*BOXES[:4], BOXES[0]], "missing_L5S1+repeated_L1L2"),
        ([*BOXES, Box("unnamed", 0, 0, 1, 1)], "unknown_label"),
        ([*BOXES[:4], Box("l5s1", 0, 0, 1, 1)], "missing_L5S1+unknown_label"),
        ([*BOXES[:4], Box("L5S1", 5, 5, 5, 9)], "empty_shape"),
        ([*BOXES[:4], Box("L5S1", 9, 9, 5, 5)], "empty_shape"),
        ([*BOXES[:4], Box("L5S1", 90, 90, 99, 99)], "empty_shape"),
        ([*BOXES[:4], Polygon("L5S1", ((1, 1), (9, 9), (5, 5)))], "empty_shape"),
        ([*BOXES[:4], Mask("L5S1", 3, 3, 2, 2, (4,))], "empty_shape"),
        ([*BOXES, WHOLE], "levels_and_lumbar"),
        ([BOXES[0], WHOLE], "levels_and_lumbar"),
        ([WHOLE, Box("", 0, 0, 1, 1)], "unknown_label"),
        ([], "+".join(f"missing_{level}" for level in LEVELS)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_faulty_images_say_why_and_are_not_used(tmp_path, shapes, fault):
    found = annotated(tmp_path, shapes)
    assert found.fault == fault
    assert found.shapes == ()
    for use in (found.mask, found.centre):
        with pytest.raises(AnnotationError, match=r"aaa/bbb/7 cannot be used: .*correct it"):
            use()


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ('xtl="10.00"', 'xtl="nan"', "bad_coordinates"),
        ('width="64"', "", "bad_size"),
        ('height="64"', 'height="0"', "bad_size"),
    ],
)
def test_what_is_no_number_is_a_fault_of_its_image(tmp_path, old, new, fault):
    path = written(tmp_path, (BOXES, NAME), (BOXES, "aaa/bbb/8.png"))
    path.write_text(path.read_text().replace(old, new, 1))
    broken, sound = read_annotations(path)
    assert broken.fault.split("+")[0] == fault
    assert sound.fault == ""


def test_faults_are_listed_by_image(tmp_path):
    path = written(tmp_path, (BOXES, NAME), (BOXES[1:], "aaa/bbb/8.png"), (BOXES, "aaa/ccc/8.png"), (BOXES, NAME))
    found = read_annotations(path)
    assert [item.fault for item in found] == ["", "missing_L1L2", "", "repeated_image"]
    assert faults_by_image(found) == {"aaa/bbb/8": "missing_L1L2", "aaa/bbb/7": "repeated_image"}


def test_images_on_which_nothing_is_drawn_are_no_annotations(tmp_path):
    """CVAT lists every image of a task; a tag on one is no drawing, a shape that cannot be used is."""
    path = written(tmp_path, ([], NAME), (BOXES, "aaa/bbb/8.png"), ([], "aaa/bbb/9.png"), ([], "aaa/bbb/10.png"))
    for name, drawn in (("9", '<tag label="checked"/>'), ("10", '<points label="L1L2" points="1,1"/>')):
        text = re.sub(
            rf'(<image [^>]*name="aaa/bbb/{name}.png"[^>]*?) */?>(</image>)?', rf"\1>{drawn}</image>", path.read_text()
        )
        path.write_text(text)
    assert [(item.slice_index, bool(item.fault)) for item in read_annotations(path)] == [(8, False), (10, True)]
    assert [item.slice_index for item in read_annotations(path, keep_empty=True)] == [7, 8, 9, 10]


def test_an_image_is_not_repeated_by_an_empty_one(tmp_path):
    """Two tasks of one project may list the same image."""
    path = written(tmp_path, ([], NAME), (BOXES, NAME))
    assert [item.fault for item in read_annotations(path)] == [""]


def test_centre_of_the_union_counts_overlap_once_and_the_mean_counts_discs_alike(tmp_path):
    shapes = [Box(level, 0, 0, 4, 4) for level in LEVELS[:4]] + [Box("L5S1", 2, 0, 6, 4)]
    found = annotated(tmp_path, shapes)
    assert found.mask().sum() == 24
    assert found.centre() == found.centre("union") == (2.0, 3.0)
    assert found.centre("mean_of_five") == (2.0, pytest.approx((4 * 2 + 4) / 5))


def test_mean_of_five_needs_five(tmp_path):
    with pytest.raises(AnnotationError, match=r"no five levels.*use the rule 'union'"):
        annotated(tmp_path, [WHOLE]).centre("mean_of_five")


def test_empty_mask_has_no_centroid():
    with pytest.raises(AnnotationError, match="holds no pixel"):
        mask_centroid(np.zeros((8, 8), bool))


def test_what_comes_back_from_cvat_is_read_as_it_is(tmp_path):
    """CVAT's archive of a corrected task, in which images may lie below a folder."""
    path = written(tmp_path, (BOXES, f"images/{NAME}"))
    with zipfile.ZipFile(tmp_path / "corrected.zip", "w") as archive:
        archive.write(path, "annotations.xml")
    assert read_annotations(tmp_path / "corrected.zip") == read_annotations(path)
    assert read_annotations(path)[0].name == "aaa/bbb/7"


@pytest.mark.parametrize(
    ("text", "match"),
    [("<annotations>", "not XML"), ("<dataset/>", "root must be <annotations>")],
)
def test_unreadable_file(tmp_path, text, match):
    (tmp_path / "a.xml").write_text(text)
    with pytest.raises(AnnotationError, match=match):
        read_annotations(tmp_path / "a.xml")


def test_unlinked_names_and_absent_file_are_refused(tmp_path):
    with pytest.raises(AnnotationError, match=r"image 1 is not named .* run `python -m preprocess link`"):
        read_annotations(written(tmp_path, (BOXES, NAME), (BOXES, "1.2.840.1.png")))
    with pytest.raises(AnnotationError, match=r"image 0 is not named"):
        read_annotations(written(tmp_path, ([], "1.2.840.1.png"), (BOXES, NAME)))
    with pytest.raises(AnnotationError, match="annotation file not found"):
        read_annotations(tmp_path / "none.xml")
