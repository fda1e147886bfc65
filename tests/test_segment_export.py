"""Predicted masks to CVAT and back."""

from __future__ import annotations

import re
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread
from store_factory import make_record, make_store, pseudonym

from lbp_ray.roi.annotations import REGION, read_annotations
from lbp_ray.roi.regions import COLUMNS, Plausible, RegionError, Regions, RegionsMeta, mask_of
from lbp_ray.segment.export import ANNOTATIONS, IMAGES, export_regions, main
from lbp_ray.segment.region import describe_mask
from preprocess.cvat.shapes import rle_from_mask
from preprocess.store.read import SliceStore

SHAPE, MIDDLE, NUM_EXAMS = (40, 32), 2, 6
EMPTY, FLAGGED = 3, 4
"""Exams whose mask is empty, and whose mask touches the edge."""


def pixels_of(number):
    return np.random.default_rng(number).integers(0, 900, (5, *SHAPE)).astype(np.int16)


def mask_for(number):
    """A blob with a hole and a jagged edge; some in corners of the image."""
    mask_HW = np.random.default_rng(number + 50).random(SHAPE) < 0.6
    mask_HW[:, : number % 5] = False
    mask_HW[34 if number != FLAGGED else 40 :] = False
    return mask_HW & (number != EMPTY)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "x.zarr"
    scaled = {"rescale_slope": (2.0,) * 5, "rescale_intercept": (-7.0,) * 5}
    series = [(make_record(n, pixels_of(n), **(scaled if n == 1 else {})), pixels_of(n)) for n in range(NUM_EXAMS)]
    beside = (make_record(20, pixels_of(0), contrast="t1_sagittal"), pixels_of(0))
    return SliceStore.open(make_store(path, [*series, beside]), contrast="t2_sagittal")


@pytest.fixture(scope="module")
def regions(store, tmp_path_factory):
    rows = []
    for number in range(NUM_EXAMS):
        ids = {
            name: pseudonym(kind, number) for name, kind in (("study_id", "s"), ("patient_id", "p"), ("series_id", "t"))
        }
        place = {"slice_index": MIDDLE, "rows": SHAPE[0], "columns": SHAPE[1], "source": "model", "fold": -1}
        flags = {EMPTY: "empty", FLAGGED: "at_edge"}.get(number, "")
        sizes = asdict(describe_mask(mask_for(number), (1.0, 1.0)))
        rows.append(ids | place | sizes | {"mask_rle": rle_from_mask(mask_for(number)), "flags": flags})
    table = pd.DataFrame(rows)[list(COLUMNS)].sort_values("study_id", ignore_index=True)
    scores, wide = pd.DataFrame({"dice": [0.9]}), (0.0, 1e9)
    meta = RegionsMeta(
        version=1,
        store=store.content_hash,
        midsagittal="",
        annotations="",
        weights_hash="",
        recipe={},
        num_folds=2,
        nested_in=None,
        trained_patients=(),
        plausible=Plausible(area_mm2=wide, height_mm=wide, width_mm=wide),
        statements=(),
        environment={},
    ).hashed_with(table, scores)
    folder = tmp_path_factory.mktemp("regions")
    (folder / "regions.json").write_text(meta.model_dump_json())
    table.to_parquet(folder / "regions.parquet")
    scores.to_parquet(folder / "scores.parquet")
    return Regions.open(folder)


def test_what_is_read_again_is_exactly_the_masks(store, regions, tmp_path):
    assert export_regions(store, regions, tmp_path / "out") == NUM_EXAMS
    read = {
        annotated.study_id: annotated for annotated in read_annotations(tmp_path / "out" / ANNOTATIONS, keep_empty=True)
    }
    for row in regions.table.to_dict("records"):
        annotated = read.pop(row["study_id"])
        assert (annotated.series_id, annotated.slice_index) == (row["series_id"], MIDDLE)
        if "empty" in row["flags"]:
            assert annotated.fault
        else:
            assert {shape.label for shape in annotated.shapes} == {REGION}
            assert np.array_equal(annotated.mask(), mask_of(row))
    assert not read


def test_images_lie_where_their_names_say(store, regions, tmp_path):
    export_regions(store, regions, tmp_path / "out")
    named = re.findall(r'<image id="\d+" name="([^"]+)"', (tmp_path / "out" / ANNOTATIONS).read_text())
    found = sorted(path.relative_to(tmp_path / "out" / IMAGES).as_posix() for path in tmp_path.rglob("*.png"))
    assert sorted(named) == found
    assert len(found) == NUM_EXAMS


@pytest.mark.parametrize("number", [0, 1], ids=["plain", "rescaled"])
def test_an_image_is_the_segmented_slice(store, regions, tmp_path, number):
    export_regions(store, regions, tmp_path / "out")
    path = tmp_path / "out" / IMAGES / pseudonym("s", number) / pseudonym("t", number) / f"{MIDDLE}.png"
    shown = imread(path) * 255
    low, high = np.percentile(pixels_of(number)[MIDDLE], [1, 99])
    expected = np.clip((pixels_of(number)[MIDDLE] - low) / (high - low), 0, 1) * 255
    assert np.abs(shown - expected).max() <= 0.51


def test_only_the_flagged_when_asked(store, regions, tmp_path):
    assert export_regions(store, regions, tmp_path / "out", flagged=True) == 2
    studies = {annotated.study_id for annotated in read_annotations(tmp_path / "out" / ANNOTATIONS, keep_empty=True)}
    assert studies == {pseudonym("s", EMPTY), pseudonym("s", FLAGGED)}


def test_nothing_names_a_patient(store, regions, tmp_path):
    export_regions(store, regions, tmp_path / "out")
    names = "\n".join(map(str, tmp_path.rglob("*"))) + (tmp_path / "out" / ANNOTATIONS).read_text()
    assert not any(patient in names for patient in regions.table["patient_id"])


def test_the_same_export_has_the_same_bytes(store, regions, tmp_path):
    for name in ("one", "two"):
        export_regions(store, regions, tmp_path / name)
    assert (tmp_path / "one" / ANNOTATIONS).read_bytes() == (tmp_path / "two" / ANNOTATIONS).read_bytes()


def test_corrections_are_never_overwritten(store, regions, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RegionError, match="is not an empty folder"):
        export_regions(store, regions, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_empty_folder_is_filled(store, regions, tmp_path):
    (tmp_path / "out").mkdir()
    export_regions(store, regions, tmp_path / "out")
    assert (tmp_path / "out" / ANNOTATIONS).is_file()


def test_a_failure_leaves_nothing(store, regions, tmp_path):
    table = regions.table.assign(slice_index=99)
    with pytest.raises(ValueError, match="99"):
        export_regions(store, Regions(table, regions.scores, regions.meta, regions.folder), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("inside", ["store", "regions"])
def test_a_folder_inside_the_inputs_is_refused(store, regions, inside):
    where = store.path if inside == "store" else regions.folder
    with pytest.raises(RegionError, match="lies inside the store or the regions"):
        export_regions(store, regions, where / "out")


def test_another_store_is_refused(store, regions, tmp_path):
    other = SliceStore.open(make_store(tmp_path / "y.zarr", [(make_record(9, pixels_of(9)), pixels_of(9))]))
    with pytest.raises(RegionError, match="give the store that"):
        export_regions(other, regions, tmp_path / "out")


def test_nothing_flagged_is_said(store, regions, tmp_path):
    calm = Regions(regions.table.assign(flags=""), regions.scores, regions.meta, regions.folder)
    with pytest.raises(RegionError, match=r"no mask of .* is flagged"):
        export_regions(store, calm, tmp_path / "out", flagged=True)


# --- command


def test_command_says_what_to_do_next(store, regions, tmp_path, capsys):
    arguments = [str(regions.folder), "--store", str(store.path), "--out", str(tmp_path / "out"), "--flagged"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert said.startswith("2 masks written to ")
    assert "paths.roi_corrections" in said
    assert main(arguments) == 2
    assert "is not an empty folder" in capsys.readouterr().err


def test_command_refuses_what_is_no_artefact(store, tmp_path, capsys):
    assert main([str(tmp_path), "--store", str(store.path), "--out", str(tmp_path / "out")]) == 2
    assert "is no regions artefact" in capsys.readouterr().err
