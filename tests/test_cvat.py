"""CVAT's files in and out: shapes, run lengths, every layout, and what hostile ones may not do."""

from __future__ import annotations

import json
import re
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocess.cvat.document import CvatError
from preprocess.cvat.read import read_cvat
from preprocess.cvat.shapes import (
    LEVELS,
    Box,
    CvatImage,
    Mask,
    Polygon,
    mask_from_rle,
    move,
    rasterise,
    rle_from_mask,
)
from preprocess.cvat.write import write_cvat
from preprocess.geometry import canonical_pixels
from preprocess.store.png import encode_png

# --- drawing at random -----------------------------------------------------------------------------------------------

HEIGHT, WIDTH = 13, 9
LABELS = st.sampled_from((*LEVELS, "lumbar", 'a "quoted" <label> & é', ""))
HUNDREDTHS = st.integers(-200, 1600).map(lambda number: number / 100)
HALVES = st.integers(-2, 30).map(lambda number: number / 2)
COORDINATES = HUNDREDTHS | HALVES
FLIPS = st.tuples(st.booleans(), st.booleans(), st.booleans())
BITMAPS = st.lists(st.booleans(), min_size=HEIGHT * WIDTH, max_size=HEIGHT * WIDTH).map(
    lambda bits: np.reshape(bits, (HEIGHT, WIDTH))
)


@st.composite
def boxes(draw, rotations=(0.0,)):
    left, right = sorted([draw(COORDINATES), draw(COORDINATES)])
    top, bottom = sorted([draw(COORDINATES), draw(COORDINATES)])
    return Box(draw(LABELS), left, top, right, bottom, draw(st.sampled_from(rotations)))


POLYGONS = st.builds(Polygon, LABELS, st.lists(st.tuples(COORDINATES, COORDINATES), min_size=3, max_size=8).map(tuple))


@st.composite
def spots(draw):
    """Pixels in a part of the image only."""
    (top, bottom), (left, right) = (sorted([draw(st.integers(0, size)) for _ in "ab"]) for size in (HEIGHT, WIDTH))
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[top : bottom + 1, left : right + 1] = draw(BITMAPS)[top : bottom + 1, left : right + 1]
    return mask


MASKS = st.builds(Mask.from_pixels, LABELS, spots().filter(np.any))
TURNED = boxes(rotations=[90.0, 180.0, 30.25, 359.99])
SHAPES = boxes() | TURNED | POLYGONS | MASKS


@settings(deadline=None)
@given(BITMAPS)
def test_run_lengths_are_the_mask(mask):
    runs = rle_from_mask(mask)
    assert sum(runs) == mask.size
    assert all(runs[1:])
    np.testing.assert_array_equal(mask_from_rle(runs, mask.shape), mask)


@pytest.mark.parametrize(
    ("rows", "runs"),
    [(["..#", "##."], [2, 3, 1]), (["###"], [0, 3]), (["..."], [3]), (["#.", ".#"], [0, 1, 2, 1])],
)
def test_run_lengths_begin_with_background_and_go_row_by_row(rows, runs):
    mask = np.array([[pixel == "#" for pixel in row] for row in rows])
    assert rle_from_mask(mask) == runs


@pytest.mark.parametrize("runs", [[5], [7], [-1, 7], [2, 2, 1]])
def test_run_lengths_that_do_not_fit_are_refused(runs):
    with pytest.raises(ValueError, match="sum to 2 x 3"):
        mask_from_rle(runs, (2, 3))


@settings(deadline=None)
@given(spots().filter(np.any))
def test_a_mask_shape_is_its_pixels(mask):
    shape = Mask.from_pixels("lumbar", mask)
    np.testing.assert_array_equal(rasterise(shape, mask.shape), mask)
    assert Mask.from_pixels("lumbar", rasterise(shape, mask.shape)) == shape


@settings(deadline=None)
@given(boxes())
def test_box_as_polygon_has_the_same_pixels(box):
    drawn = rasterise(box, (HEIGHT, WIDTH))
    np.testing.assert_array_equal(rasterise(Polygon("", box.corners()), (HEIGHT, WIDTH)), drawn)
    if drawn.any():
        np.testing.assert_array_equal(rasterise(Mask.from_pixels("", drawn), (HEIGHT, WIDTH)), drawn)


@settings(max_examples=300, deadline=None)
@given(SHAPES, FLIPS)
def test_moving_a_shape_moves_its_pixels(shape, flips):
    before = rasterise(shape, (WIDTH, HEIGHT) if flips[0] else (HEIGHT, WIDTH))
    if isinstance(shape, Mask) and flips[0]:  # drawn on an image of the other format
        shape = move(shape, (WIDTH, HEIGHT), (True, False, False))
        before = rasterise(shape, (WIDTH, HEIGHT))
    transpose, flip_rows, flip_columns = flips
    after = canonical_pixels(before, transpose=transpose, flip_rows=flip_rows, flip_columns=flip_columns)
    np.testing.assert_array_equal(rasterise(move(shape, (HEIGHT, WIDTH), flips), (HEIGHT, WIDTH)), after)


def pixels(shape, size=(5, 5)):
    return ["".join(".#"[pixel] for pixel in row) for row in rasterise(shape, size).astype(int)]


def test_pixels_belong_when_their_centre_is_inside_or_on_the_edge():
    assert pixels(Box("", 0.6, 0.5, 2.5, 1.4)) == [".##..", ".....", ".....", ".....", "....."]
    assert pixels(Polygon("", ((0.5, 0.5), (4.5, 0.5), (0.5, 4.5)))) == ["#####", "####.", "###..", "##...", "#...."]


def test_a_polygon_that_crosses_itself_is_filled_by_the_even_odd_rule():
    frame = ((0, 0), (5, 0), (5, 5), (0, 5), (0, 0), (1, 1), (4, 1), (4, 4), (1, 4), (1, 1))
    assert pixels(Polygon("", frame)) == ["#####", "#...#", "#...#", "#...#", "#####"]


def test_rotation_turns_about_the_centre():
    lying, standing = Box("", 0, 2, 5, 3), Box("", 2, 0, 3, 5)
    assert pixels(Box("", 0, 2, 5, 3, 90.0)) == pixels(standing) != pixels(lying)
    assert pixels(Box("", 0, 2, 5, 3, 45.0)) == [".....", ".#...", "..#..", "...#.", "....."]


@pytest.mark.parametrize(
    "shape",
    [
        Box("", 1.5, 1, 1.5, 4),
        Box("", 3, 1, 2, 4),
        Box("", 3, 1, 2, 4, 30.0),
        Box("", 7, 7, 9, 9),
        Polygon("", ((0.5, 0.5), (4.5, 4.5), (2.5, 2.5))),
        Polygon("", ((1, 1), (1, 1), (1, 1))),
        Mask("", 9, 9, 2, 2, (0, 4)),
    ],
    ids=str,
)
def test_shapes_without_an_area_in_the_image_have_no_pixel(shape):
    assert not rasterise(shape, (5, 5)).any()


# --- writing and reading ---------------------------------------------------------------------------------------------

NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufffe\uffff"), max_size=12)
IMAGES = st.lists(
    st.builds(CvatImage, NAMES, st.just(WIDTH), st.just(HEIGHT), st.lists(SHAPES, max_size=4).map(tuple)), max_size=3
)


@settings(max_examples=100, deadline=None)
@given(images=IMAGES)
def test_what_was_written_is_read(tmp_path_factory, images):
    path = tmp_path_factory.getbasetemp() / "round.xml"
    write_cvat(path, images)
    content = path.read_bytes()
    assert list(read_cvat(path)) == images
    write_cvat(path, read_cvat(path))
    assert path.read_bytes() == content


def test_xml_to_masks_to_xml_is_exact(tmp_path):
    drawn = [Box("L1L2", 1, 2, 6, 7), Polygon("L2L3", ((0, 0), (8.4, 3), (2, 12))), Mask("L3L4", 2, 3, 2, 2, (1, 3))]
    write_cvat(tmp_path / "drawn.xml", [CvatImage("a/b/1.png", WIDTH, HEIGHT, tuple(drawn))])
    (image,) = read_cvat(tmp_path / "drawn.xml")
    masks = [rasterise(shape, (HEIGHT, WIDTH)) for shape in image.shapes]
    as_masks = tuple(Mask.from_pixels(shape.label, mask) for shape, mask in zip(image.shapes, masks, strict=True))
    write_cvat(tmp_path / "masks.xml", [CvatImage("a/b/1.png", WIDTH, HEIGHT, as_masks)])
    (again,) = read_cvat(tmp_path / "masks.xml")
    assert again.shapes == as_masks
    np.testing.assert_array_equal([rasterise(shape, (HEIGHT, WIDTH)) for shape in again.shapes], masks)


def test_the_file_is_what_cvat_imports(tmp_path):
    shapes = (
        Box("L1L2", 1, 2, 3.5, 4.125, 30.0),
        Polygon("L2L3", ((0, 1), (2, 3), (4, 5.25))),
        Mask("lumbar", 2, 3, 2, 2, (1, 3)),
    )
    write_cvat(tmp_path / "a.xml", [CvatImage("s/t/7.png", WIDTH, HEIGHT, shapes), CvatImage("s/t/8.png", 9, 13, ())])
    text = (tmp_path / "a.xml").read_text()
    head, images = text.split("  </meta>\n")
    assert head.startswith("<?xml version='1.0' encoding='utf-8'?>\n<annotations>\n  <version>1.1</version>\n  <meta>")
    assert re.findall("<name>(.*)</name>", head) == [*LEVELS, "lumbar"]
    assert images == (
        '  <image id="0" name="s/t/7.png" width="9" height="13">\n'
        '    <box label="L1L2" source="manual" occluded="0" xtl="1.00" ytl="2.00" xbr="3.50" ybr="4.125" '
        'rotation="30.00" z_order="0" />\n'
        '    <polygon label="L2L3" source="manual" occluded="0" points="0.00,1.00;2.00,3.00;4.00,5.25" z_order="0" />\n'
        '    <mask label="lumbar" source="manual" occluded="0" rle="1, 3" left="2" top="3" width="2" height="2" '
        'z_order="0" />\n'
        '  </image>\n  <image id="1" name="s/t/8.png" width="9" height="13" />\n</annotations>\n'
    )


# --- CVAT's own layouts ----------------------------------------------------------------------------------------------

TASK = """<?xml version="1.0" encoding="utf-8"?>
<annotations>
  <version>1.1</version>
  <meta>
    <task>
      <id>41</id>
      <name>lumbar spines</name>
      <size>{size}</size>
      <mode>{mode}</mode>
      <overlap>0</overlap>
      <bugtracker></bugtracker>
      <created>2024-03-01 09:12:33.123456+00:00</created>
      <updated>2024-03-02 10:00:00.000000+00:00</updated>
      <subset>default</subset>
      <start_frame>{start}</start_frame>
      <stop_frame>2</stop_frame>
      <frame_filter>{step}</frame_filter>
      <segments>
        <segment>
          <id>44</id>
          <start>0</start>
          <stop>2</stop>
          <url>http://localhost:8080/api/jobs/44</url>
        </segment>
      </segments>
      <owner>
        <username>reader</username>
        <email>reader@example.org</email>
      </owner>
      <assignee></assignee>
      <labels>
        <label>
          <name>L1L2</name>
          <color>#33ddff</color>
          <type>any</type>
          <attributes>
            <attribute>
              <name>sure</name>
              <mutable>False</mutable>
              <input_type>checkbox</input_type>
              <default_value>true</default_value>
              <values>true</values>
            </attribute>
          </attributes>
        </label>
      </labels>
    </task>
    <dumped>2024-03-02 10:05:00.000000+00:00</dumped>
  </meta>
{body}</annotations>
"""

FOR_IMAGES = """  <image id="0" name="one.png" width="9" height="13">
    <box label="L1L2" source="manual" occluded="0" xtl="1.00" ytl="2.50" xbr="6.00" ybr="7.00" z_order="1">
      <attribute name="sure">true</attribute>
    </box>
    <box label="L2L3" source="manual" occluded="1" xtl="1.00" ytl="2.00" xbr="6.00" ybr="4.00" rotation="30.00" \
z_order="0" group_id="3">
    </box>
    <polygon label="L3L4" source="semi-auto" occluded="0" points="0.00,1.00;2.00,3.00;4.00,5.25" z_order="0">
    </polygon>
    <mask label="L4L5" source="manual" occluded="0" rle="1, 3, 2" left="2" top="3" width="3" height="2" z_order="0">
    </mask>
    <skeleton label="spine" source="manual" z_order="0">
      <points label="1" source="manual" outside="0" occluded="0" points="5.00,5.00">
      </points>
    </skeleton>
    <points label="L5S1" source="manual" occluded="0" points="5.00,5.00" z_order="0">
    </points>
    <tag label="good" source="manual">
    </tag>
  </image>
  <image id="1" name="folder/two.png" width="9" height="13">
  </image>
"""
DRAWN = (
    Box("L1L2", 1, 2.5, 6, 7),
    Box("L2L3", 1, 2, 6, 4, 30.0),
    Polygon("L3L4", ((0, 1), (2, 3), (4, 5.25))),
    Mask("L4L5", 2, 3, 3, 2, (1, 3, 2)),
)


def task(body, *, mode="annotation", size=3, start=0, step=""):
    return TASK.format(mode=mode, size=size, start=start, step=step, body=body)


def archive(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


@pytest.mark.parametrize("suffix", [".xml", ".zip"])
def test_task_for_images_is_read(tmp_path, suffix):
    path = tmp_path / f"task{suffix}"
    if suffix == ".xml":
        path.write_text(task(FOR_IMAGES))
    else:
        archive(path, {"images/one.png": b"", "images/folder/two.png": b"", "annotations.xml": task(FOR_IMAGES)})
    assert list(read_cvat(path)) == [
        CvatImage("one.png", 9, 13, DRAWN, skipped=("skeleton", "points", "tag")),
        CvatImage("folder/two.png", 9, 13, ()),
    ]


FOR_VIDEO = """  <track id="0" label="L1L2" source="manual">
    <box frame="0" keyframe="1" outside="0" occluded="0" xtl="1.00" ytl="2.50" xbr="6.00" ybr="7.00" z_order="0">
      <attribute name="sure">true</attribute>
    </box>
    <box frame="1" keyframe="0" outside="0" occluded="0" xtl="2.00" ytl="2.50" xbr="6.00" ybr="7.00" z_order="0">
    </box>
    <box frame="2" keyframe="1" outside="1" occluded="0" xtl="3.00" ytl="2.50" xbr="6.00" ybr="7.00" z_order="0">
    </box>
  </track>
  <track id="1" label="L4L5" source="manual" group_id="1">
    <mask frame="2" keyframe="1" outside="0" occluded="0" rle="1, 3, 2" left="2" top="3" width="3" height="2" \
z_order="0">
    </mask>
  </track>
  <track id="2" label="L5S1" source="manual">
    <points frame="1" keyframe="1" outside="0" occluded="0" points="5.00,5.00" z_order="0">
    </points>
  </track>
"""
PNG = encode_png(np.zeros((13, 9), np.uint8))
MANIFEST = "\n".join(
    [
        '{"version":"1.1"}',
        '{"type":"images"}',
        '{"name":"b","extension":".png","width":9,"height":13,"meta":{"related_images":[]},"checksum":"0"}',
        '{"name":"s/a","extension":".png","width":9,"height":13,"meta":{"related_images":[]}}',
        '{"name":"c","extension":".png","width":9,"height":13}\n',
    ]
)


@pytest.mark.parametrize(
    ("members", "names"),
    [
        ({"manifest.jsonl": MANIFEST}, ["b.png", "s/a.png", "c.png"]),
        ({f"images/{name}.png": PNG for name in ("c", "a", "b/1")}, ["a.png", "b/1.png", "c.png"]),
    ],
    ids=["manifest", "pictures"],
)
def test_video_with_named_frames_is_read(tmp_path, members, names):
    path = archive(tmp_path / "v.zip", {"annotations.xml": task(FOR_VIDEO, mode="interpolation"), **members})
    assert list(read_cvat(path)) == [
        CvatImage(names[0], 9, 13, (DRAWN[0],)),
        CvatImage(names[1], 9, 13, (Box("L1L2", 2, 2.5, 6, 7),), skipped=("points",)),
        CvatImage(names[2], 9, 13, (DRAWN[3],)),
    ]


PICTURES = {f"images/{name}.png": PNG for name in "abc"}


@pytest.mark.parametrize(
    ("changes", "members", "message"),
    [
        ({}, {}, "3 frames and 0 images; export 'CVAT for images 1.1'"),
        ({"size": 4}, PICTURES, "4 frames and 3 images"),
        ({}, {f"images/{name}.png": PNG for name in (9, 10, 11)}, "another order by number than by letter"),
        ({"start": 5}, PICTURES, "skips frames"),
        ({"step": "step=2"}, PICTURES, "skips frames"),
        ({}, {"manifest.jsonl": '{"version":"1.1"}\n{"type":"video"}'}, "frames are those of a video file"),
        ({}, {"manifest.jsonl": "no"}, r"manifest\.jsonl lists no images"),
        ({}, {"manifest.jsonl": MANIFEST.rsplit("\n", 2)[0]}, "frame 2, but 2 frames have names"),
    ],
)
def test_video_whose_frames_have_no_sure_names_is_refused(tmp_path, changes, members, message):
    path = archive(tmp_path / "v.zip", {"annotations.xml": task(FOR_VIDEO, **changes), **members})
    with pytest.raises(CvatError, match=message):
        list(read_cvat(path))


def rectangle(frame, points=(1, 2.5, 6, 7), **more):
    kind = {"type": "rectangle", "occluded": False, "outside": False, "z_order": 0, "rotation": 0.0}
    return kind | {"points": list(points), "frame": frame, "group": 0, "source": "manual", "attributes": []} | more


SHAPES_0 = [
    rectangle(0, label="L1L2", attributes=[{"name": "sure", "value": "true"}], z_order=2),
    rectangle(0, (1, 2, 6, 4), label="L2L3", rotation=30.0, occluded=True),
    rectangle(0, (0, 1, 2, 3, 4, 5.25), label="L3L4", type="polygon"),
    rectangle(0, (1.0, 3.0, 2.0, 2.0, 3.0, 4.0, 4.0), label="L4L5", type="mask"),
    rectangle(0, (5, 5), label="L5S1", type="points"),
]


def backup(path, *, jobs=None, data=None, manifest=MANIFEST, prefix="", **content):
    """A task backup; `content` is what is drawn in its only job, `jobs` are (job, content) of several."""
    jobs = jobs or [({"start_frame": 0, "stop_frame": 2}, content)]
    spec = {"chunk_size": 36, "image_quality": 70, "start_frame": 0, "stop_frame": 2, "storage": "local"}
    described = {
        "name": "lumbar spines",
        "labels": [{"name": level, "color": "#33ddff", "type": "any", "attributes": []} for level in LEVELS],
        "version": "1.0",
        "data": {**spec, "sorting_method": "lexicographical", "deleted_frames": [], **(data or {})},
        "jobs": [{"status": "annotation", "type": "annotation", **job} for job, _ in jobs],
    }
    drawn = [{"version": 0, "tags": [], "shapes": [], "tracks": []} | content for _, content in jobs]
    return archive(
        path,
        {
            f"{prefix}data/b.png": PNG,
            f"{prefix}data/manifest.jsonl": manifest,
            f"{prefix}task.json": json.dumps(described),
            f"{prefix}annotations.json": json.dumps(drawn),
        },
    )


def track(*shapes, label="L1L2"):
    return {"label": label, "frame": 0, "group": 0, "source": "manual", "attributes": [], "shapes": list(shapes)}


@pytest.mark.parametrize("prefix", ["", "task_0/"])
def test_task_backup_is_read(tmp_path, prefix):
    tags = [{"label": "good", "frame": 2, "attributes": []}]
    path = backup(tmp_path / "b.zip", shapes=SHAPES_0, tags=tags, prefix=prefix)
    assert list(read_cvat(path)) == [
        CvatImage("b.png", 9, 13, DRAWN, skipped=("other",)),
        CvatImage("s/a.png", 9, 13, ()),
        CvatImage("c.png", 9, 13, (), skipped=("tag",)),
    ]


def shapes_by_frame(path):
    return [image.shapes for image in read_cvat(path)]


def test_tracks_of_a_backup_stand_between_their_keyframes_as_in_cvat(tmp_path):
    moving = track(rectangle(0, (0, 0, 2, 2)), rectangle(2, (2, 4, 4, 6), rotation=350.0))
    ending = track(rectangle(0, (1, 1, 3, 3)), rectangle(1, (1, 1, 3, 3), outside=True), label="L2L3")
    lasting = track(rectangle(1, (0, 1, 2, 3, 4, 5.25), type="polygon"), label="L3L4")
    assert shapes_by_frame(backup(tmp_path / "b.zip", tracks=[moving, ending, lasting])) == [
        (Box("L1L2", 0, 0, 2, 2), Box("L2L3", 1, 1, 3, 3)),
        (Box("L1L2", 1, 2, 3, 4, 355.0), DRAWN[2]),
        (Box("L1L2", 2, 4, 4, 6, 350.0), DRAWN[2]),
    ]


def test_polygon_that_changes_between_keyframes_is_said_to_be_left_behind(tmp_path):
    corners = rectangle(0, (0, 1, 2, 3, 4, 5), type="polygon"), rectangle(2, (0, 1, 2, 3, 4, 6), type="polygon")
    images = list(read_cvat(backup(tmp_path / "b.zip", tracks=[track(*corners)])))
    assert [len(image.shapes) for image in images] == [1, 0, 1]
    assert images[1].skipped == ("interpolated",)


def test_overlapping_jobs_count_once_and_ground_truth_not_at_all(tmp_path):
    shape = rectangle(1, label="L1L2")
    first, second = ({"stop_frame": 1}, {"shapes": [shape]}), ({"start_frame": 1, "stop_frame": 2}, {"shapes": [shape]})
    truth = ({"type": "ground_truth"}, {"shapes": [rectangle(1, (0, 0, 1, 1), label="L1L2")]})
    assert shapes_by_frame(backup(tmp_path / "b.zip", jobs=[first, second, truth])) == [(), (DRAWN[0],), ()]


def test_deleted_frames_are_gone(tmp_path):
    path = backup(tmp_path / "b.zip", data={"deleted_frames": [1]}, shapes=[rectangle(2, label="L1L2")])
    assert [(image.name, len(image.shapes)) for image in read_cvat(path)] == [("b.png", 0), ("c.png", 1)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"start_frame": 3}}, "skips frames"),
        ({"data": {"frame_filter": "step=2"}}, "skips frames"),
        ({"manifest": '{"version":"1.1"}\n{"type":"video"}'}, "frames are those of a video file"),
        ({"manifest": '{"name": 1}'}, "lists no images"),
        ({"shapes": [rectangle(7, label="L1L2")]}, "frame 7, but 3 frames"),
        ({"shapes": [{"type": "rectangle"}]}, r"no task backup.*KeyError"),
        ({"shapes": 5}, "no task backup"),
        ({"tracks": [{}]}, "no task backup"),
    ],
    ids=str,
)
def test_unusable_backup_is_refused(tmp_path, changes, message):
    with pytest.raises(CvatError, match=message):
        list(read_cvat(backup(tmp_path / "b.zip", **changes)))


# --- what is no annotation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('ytl="2.50"', 'ytl="nan"'),
        ('ytl="2.50"', 'ytl="1e999"'),
        ('ytl="2.50"', ""),
        ('rotation="30.00"', 'rotation="left"'),
        ("4.00,5.25", "4.00"),
        (";4.00,5.25", ""),
        ('rle="1, 3, 2"', 'rle="1, 3, 3"'),
        ('rle="1, 3, 2"', 'rle="1, 3, 1"'),
        ('rle="1, 3, 2"', 'rle="-1, 5, 2"'),
        ('rle="1, 3, 2"', 'rle=""'),
        ('rle="1, 3, 2"', 'rle="1, 3.5, 1.5"'),
        ('left="2"', 'left="7"'),
        ('left="2"', 'left="-1"'),
        ('width="3"', 'width="3000000000"'),
        ('width="3" height="2"', 'width="1000000" height="1000000"'),
    ],
)
def test_shape_that_cannot_be_is_a_fault_of_its_image(tmp_path, old, new):
    assert old in FOR_IMAGES
    (tmp_path / "a.xml").write_text(task(FOR_IMAGES.replace(old, new)))
    images = list(read_cvat(tmp_path / "a.xml"))
    assert [image.fault for image in images] == ["bad_coordinates", ""]
    assert [image.name for image in images] == ["one.png", "folder/two.png"]


def test_last_background_may_be_left_out(tmp_path):
    (tmp_path / "a.xml").write_text(task(FOR_IMAGES.replace('rle="1, 3, 2"', 'rle="1, 3"')))
    assert next(read_cvat(tmp_path / "a.xml")).shapes == DRAWN


@pytest.mark.parametrize("size", ['width="9"', 'width="x" height="13"', 'width="9999999" height="9999999"'])
def test_image_of_unknown_or_absurd_size_has_none(tmp_path, size):
    (tmp_path / "a.xml").write_text(task(FOR_IMAGES.replace('width="9" height="13"', size)))
    assert {(image.width, image.height) for image in read_cvat(tmp_path / "a.xml")} == {(0, 0)}


LAUGHS = '<!DOCTYPE a [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]><annotations><image name="&b;"/></annotations>'
OUTSIDE = '<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotations/>'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LAUGHS, "declares a document type"),
        (OUTSIDE, "declares a document type"),
        ("<dataset/>", "root must be <annotations>"),
        ("<annotations>", "not XML"),
        ("", "not XML"),
        ("<annotations><image name='&x;'/></annotations>", "not XML"),
        ('<?xml version="1.0" encoding="utf-7"?><annotations/>', "not XML"),
        ('<?xml version="1.0" encoding="idna"?><annotations/>', "not XML"),
        ('<annotations><track label="a"><box/></track></annotations>', "tracks of a video"),
        (b"PK\x03\x04 and no more", "archive is damaged"),
        (b"\x00" * 99, "not XML"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    (tmp_path / "a.xml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CvatError, match=message):
        list(read_cvat(tmp_path / "a.xml"))


def test_absent_file_is_refused(tmp_path):
    with pytest.raises(CvatError, match=r"none\.xml cannot be read \(FileNotFoundError\)"):
        list(read_cvat(tmp_path / "none.xml"))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.txt": "x"}, "0 XML files and no task.json"),
        ({"a.xml": "x", "b.xml": "x"}, "2 XML files"),
        ({"task.json": "{}"}, r"no annotations\.json"),
        ({"annotations.xml": task(FOR_VIDEO.replace('frame="0" ', ""))}, "no frame number"),
        ({"task.json": "[" * 100_000, "annotations.json": "[]"}, "no task backup"),
    ],
)
def test_other_archives_are_refused(tmp_path, members, message):
    with pytest.raises(CvatError, match=message):
        list(read_cvat(archive(tmp_path / "a.zip", members)))


def test_member_that_is_huge_unpacked_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("preprocess.cvat.read.MAX_MEMBER_BYTES", 100)
    with pytest.raises(CvatError, match="at most 100 are read"):
        list(read_cvat(archive(tmp_path / "a.zip", {"annotations.xml": task(FOR_IMAGES)})))


def test_archive_is_never_unpacked(tmp_path):
    members = {"../../evil.png": PNG, "/tmp/evil.png": PNG, "annotations.xml": task(FOR_VIDEO, size=2)}
    inside = tmp_path / "deep" / "er"
    inside.mkdir(parents=True)
    path = archive(inside / "a.zip", members)
    with pytest.raises(CvatError, match="frame 2, but 2 frames"):
        list(read_cvat(path))
    assert [found.name for found in tmp_path.rglob("*") if found.is_file()] == ["a.zip"]


def test_damaged_archive_is_refused_wherever_it_is_damaged(tmp_path):
    content = archive(tmp_path / "a.zip", {"annotations.xml": task(FOR_IMAGES)}).read_bytes()
    for place in range(0, len(content), 7):
        damaged = content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]
        (tmp_path / "b.zip").write_bytes(damaged)
        try:
            images = list(read_cvat(tmp_path / "b.zip"))
        except CvatError:
            continue
        assert len(images) == 2
    for length in range(2, len(content), 53):
        (tmp_path / "b.zip").write_bytes(content[:length])
        with pytest.raises(CvatError):
            list(read_cvat(tmp_path / "b.zip"))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=40), st.integers(0, 2000))
def test_no_damage_is_a_crash(tmp_path_factory, junk, place):
    path = tmp_path_factory.getbasetemp() / "junk.xml"
    content = task(FOR_IMAGES).encode()
    place = len(content) - 1500 + place if place < 1500 else place
    path.write_bytes(content[:place] + junk + content[place + len(junk) :])
    try:
        images = list(read_cvat(path))
    except CvatError:
        return
    for image in images:
        for shape in image.shapes:
            rasterise(shape, (13, 9))


def test_images_are_streamed(tmp_path):
    """Reading ends with the image that is asked for, long before the end of the file."""
    (tmp_path / "a.xml").write_text(task(FOR_IMAGES * 1000)[:-20])
    images = read_cvat(tmp_path / "a.xml")
    assert next(images).shapes == DRAWN
    with pytest.raises(CvatError, match="not XML"):
        list(images)
