"""Exports are read back by other programs: nibabel, matplotlib, and dcm2niix as an oracle where it is installed."""

from __future__ import annotations

import gzip
import shutil
import subprocess

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from dicom_factory import make_series
from matplotlib.image import imread
from PIL import Image
from store_factory import make_record, make_store, pseudonym

from lbp_ray.export import export_crops
from lbp_ray.roi.crops import Crops
from preprocess.commit import canonical_json, write_atomic
from preprocess.pipeline import ConvertJob, convert_tree
from preprocess.store.describe import describe_store
from preprocess.store.export import FORMATS, ExportError, Stack, encode_nifti, export_store
from preprocess.store.read import SliceStore
from preprocess.store.schema import IncompleteStoreError, StoreError, series_path

SHAPE = (5, 12, 10)
TILTED = (0.0, 0.984807753, -0.173648178, 0.173648178, -0.171010072, -0.969846310)
"""Image axes of a sagittal plane turned about two axes."""


def landmarks():
    """A sagittal phantom: bright at the left, the front and the top of the patient, in canonical order."""
    pixels_SHW = np.full(SHAPE, 100, np.uint16)
    pixels_SHW[-1, 6, 5], pixels_SHW[2, 6, 0], pixels_SHW[2, 0, 5] = 1000, 2000, 3000
    return pixels_SHW


def place_of(image, value):
    """RAS coordinates, in mm, of the voxel with a value."""
    (voxel,) = np.argwhere(np.asarray(image.dataobj) == value)
    return nib.affines.apply_affine(image.affine, voxel)


def nifti_of(stack):
    return nib.Nifti1Image.from_bytes(gzip.decompress(encode_nifti(stack)))


def converted(tmp_path, pixels_SHW=None, **series):
    """A store of one series made from DICOM, whose files run from the patient's left to right."""
    pixels = landmarks() if pixels_SHW is None else pixels_SHW
    make_series(tmp_path / "dicom", pixels=pixels[::-1], origin=(8.0, -5.0, 9.0), spacing_mm=4.0, **series)
    convert_tree(ConvertJob(tmp_path / "dicom", tmp_path / "x.zarr"))
    return tmp_path / "x.zarr"


def export_one(store, out, format):
    assert export_store(store, out, format) == 1
    return sorted(path for path in out.rglob("*") if path.is_file())


def test_left_front_and_top_are_where_they_should_be(tmp_path):
    (path,) = export_one(converted(tmp_path), tmp_path / "out", "nifti")
    image = nib.load(path)
    (middle,) = np.argwhere(np.asarray(image.dataobj)[..., 2] == 3000)
    centre = nib.affines.apply_affine(image.affine, (5, 6, 2))
    left, front, top = (place_of(image, value) - centre for value in (1000, 2000, 3000))
    np.testing.assert_allclose(left, [-8, 0, 0], atol=1e-4)
    np.testing.assert_allclose(front, [0, 5, 0], atol=1e-4)
    np.testing.assert_allclose(top, [0, 0, 6], atol=1e-4)
    assert nib.aff2axcodes(image.affine) == ("P", "I", "L")
    assert middle.tolist() == [5, 0]
    assert image.header.get_zooms() == pytest.approx((1, 1, 4))
    assert image.get_data_dtype() == np.uint16
    np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-4)


@pytest.mark.skipif(shutil.which("dcm2niix") is None, reason="needs dcm2niix")
@pytest.mark.parametrize("orientation", [(0.0, 1.0, 0.0, 0.0, 0.0, -1.0), TILTED], ids=["straight", "tilted"])
def test_directions_are_those_of_dcm2niix(tmp_path, orientation):
    (path,) = export_one(converted(tmp_path, orientation=orientation), tmp_path / "out", "nifti")
    (tmp_path / "oracle").mkdir()
    command = ["dcm2niix", "-z", "n", "-f", "it", "-o", tmp_path / "oracle", tmp_path / "dicom"]
    subprocess.run(command, check=True, capture_output=True)
    ours, oracle = nib.load(path), nib.load(tmp_path / "oracle" / "it.nii")
    for value in (2000, 3000):
        step, expected = (place_of(image, value) - place_of(image, 1000) for image in (ours, oracle))
        np.testing.assert_allclose(step, expected, atol=1e-3)


def test_one_scaling_goes_into_the_header_and_scalings_per_slice_into_float_values():
    pixels = np.arange(-30, 30, dtype=np.int16).reshape(5, 4, 3)
    even = nifti_of(Stack(pixels, np.eye(4), slope=(2.0,) * 5, intercept=(-1024.0,) * 5))
    assert even.get_data_dtype() == np.int16
    np.testing.assert_array_equal(np.asarray(even.dataobj.get_unscaled()), pixels.transpose(2, 1, 0))
    np.testing.assert_array_equal(even.get_fdata(), pixels.transpose(2, 1, 0) * 2.0 - 1024)
    slope = (1.0, 2.0, 3.0, 4.0, 0.5)
    varied = nifti_of(Stack(pixels, np.eye(4), slope=slope, intercept=(0.0,) * 5))
    assert varied.get_data_dtype() == np.float32
    np.testing.assert_allclose(varied.get_fdata(), pixels.transpose(2, 1, 0) * np.array(slope))


def test_missing_slices_are_no_nifti():
    with pytest.raises(ExportError, match=r"slices are missing.*png"):
        encode_nifti(Stack(landmarks(), np.eye(4), has_gaps=True))


def test_png_keeps_stored_values_or_windows_the_series(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 4000, SHAPE).astype(np.uint16)
    store = make_store(tmp_path / "x.zarr", [(make_record(0, pixels), pixels)])
    exact = export_one(store, tmp_path / "png16", "png16")
    folder = f"{pseudonym('s', 0)}/{pseudonym('t', 0)}"
    names = [path.relative_to(tmp_path / "png16").as_posix() for path in exact]
    assert names == [f"{folder}/{index}.png" for index in range(5)]
    for path, image_HW in zip(exact, pixels, strict=True):
        with Image.open(path) as image:
            np.testing.assert_array_equal(np.asarray(image), image_HW)
    window = np.stack([imread(path) * 255 for path in export_one(store, tmp_path / "png", "png")])
    low, high = np.percentile(pixels, [1, 99])
    np.testing.assert_allclose(window, np.clip((pixels - low) / (high - low), 0, 1) * 255, atol=0.51)


def test_negative_values_are_no_16_bit_png(tmp_path):
    pixels = landmarks().astype(np.int16) - 500
    store = make_store(tmp_path / "x.zarr", [(make_record(0, pixels), pixels)])
    with pytest.raises(ExportError, match=rf"series {pseudonym('t', 0)}: stored values from -400 .* nifti"):
        export_store(store, tmp_path / "out", "png16")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    pixels = landmarks()
    series = [(make_record(number, pixels), pixels) for number in range(3)]
    series.append((make_record(0, pixels, series_id=pseudonym("u", 0), contrast="t1_sagittal"), pixels))
    return make_store(tmp_path_factory.mktemp("store") / "x.zarr", series)


@pytest.mark.parametrize("format", FORMATS)
def test_whole_store_is_exported_the_same_bytes_each_time(store, tmp_path, format):
    written = []
    for run in ("a", "b"):
        assert export_store(store, tmp_path / run, format) == 4
        files = [path for path in (tmp_path / run).rglob("*") if path.is_file()]
        written.append({path.relative_to(tmp_path / run): path.read_bytes() for path in files})
    assert written[0] == written[1]
    if format == "nifti":
        assert all(content[4:8] == bytes(4) for content in written[0].values()), "gzip notes the time"
    assert len(written[0]) == (4 if format == "nifti" else 4 * len(landmarks()))


def test_listed_series_only_and_none_unless_all_are_there(store, tmp_path):
    listed = [pseudonym("t", 1), pseudonym("u", 0)]
    assert export_store(store, tmp_path / "out", "nifti", series_ids=listed) == 2
    assert sorted(path.name for path in (tmp_path / "out").rglob("*.gz")) == sorted(f"{sid}.nii.gz" for sid in listed)
    with pytest.raises(ExportError, match="1 of 3 series are not in"):
        export_store(store, tmp_path / "none", "nifti", series_ids=[*listed, "stranger"])
    with pytest.raises(ExportError, match="inside the store"):
        export_store(store, store / "out", "nifti")
    assert not (tmp_path / "none").exists()


def test_crop_lies_on_its_series(store, tmp_path):
    row = {"study_id": pseudonym("s", 1), "series_id": pseudonym("t", 1), "slice_index": [0, 2, 4]}
    row |= {"box_row": 3, "box_column": 2, "box_height": 6, "box_width": 6}
    pixels = SliceStore.open(store).read(row["series_id"])[[0, 2, 4], 3:9, 2:8]
    crops = Crops(pixels[None], pd.DataFrame([row]), pd.DataFrame(), "hash", tmp_path)
    assert export_crops(SliceStore.open(store), crops, tmp_path / "crops", "nifti") == 1
    export_store(store, tmp_path / "series", "nifti", series_ids=[row["series_id"]])
    name = f"{row['study_id']}/{row['series_id']}"
    crop, whole = (nib.load(tmp_path / kind / f"{name}.nii.gz") for kind in ("crops", "series"))
    np.testing.assert_allclose(place_of(crop, 1000), place_of(whole, 1000), atol=1e-4)
    assert crop.header.get_zooms() == pytest.approx((1, 1, 8))
    export_crops(SliceStore.open(store), crops, tmp_path / "crops", "png")
    assert sorted(path.stem for path in (tmp_path / "crops" / name).iterdir()) == ["0", "2", "4"]


# --- inspect ---------------------------------------------------------------------------------------------------------


def test_description_counts_what_the_store_holds(tmp_path):
    pixels = landmarks()
    owner, gaps = {"patient_id": pseudonym("p", 0)}, {"missing_mm": (8.0,), "lossy": True}
    odd = {"confidence": "flagged", "evidence": "se;oblique", "uneven_spacing": True, "echo_time_ms": 102.0}
    t1 = {"series_id": pseudonym("u", 1), "contrast": "t1_sagittal"}
    series = [
        (make_record(0, pixels, echo_time_ms=98.0), pixels),
        (make_record(1, pixels[:4], **owner, **gaps), pixels[:4]),
        (make_record(1, pixels, **owner, **t1, **odd), pixels),
    ]
    text = describe_store(make_store(tmp_path / "x.zarr", series))
    for line in (
        "1 patients, 2 exams, 3 series",
        "contrast: t1_sagittal 1, t2_sagittal 2",
        "confidence: flagged 1, high 2",
        "slices: 4 to 5",
        "echo time (ms): 98 to 102",
        "flagged 1, oblique 1, uneven 1, with gaps 1, lossy 1",
    ):
        assert line in text.splitlines()
    assert SliceStore.open(tmp_path / "x.zarr").content_hash in text
    assert pseudonym("s", 0) not in text


def test_description_names_candidates_and_artefacts(store, tmp_path):
    copy = shutil.copytree(store, tmp_path / "x.zarr")
    (copy / "candidates").mkdir()
    pd.DataFrame({"code": ["converted", "not_best", "localizer"]}).to_parquet(copy / "candidates" / "a.parquet")
    pd.DataFrame({"code": ["localizer"]}).to_parquet(copy / "candidates" / "b.parquet")
    meta = {"studies": 3, "templates": [1, 2], "flagged": 1, "corrections": 0}
    write_atomic(tmp_path / "x.midsagittal" / "abc" / "meta.json", canonical_json(meta).encode())
    lines = describe_store(copy).splitlines()
    assert "candidates not taken: localizer 2, not_best 1" in lines
    assert any(line.startswith("mid-sagittal abc: 3 studies, 2 templates, 1 flagged, 0 corrected") for line in lines)


def test_description_opens_one_part_at_a_time_and_refuses_what_is_incomplete(store, tmp_path, monkeypatch):
    copy = shutil.copytree(store, tmp_path / "x.zarr")
    shutil.rmtree(series_path(copy, pseudonym("s", 2), pseudonym("t", 2)))
    with pytest.raises(IncompleteStoreError, match=pseudonym("t", 2)):
        describe_store(copy)
    with pytest.raises(StoreError, match="not a slice store"):
        describe_store(tmp_path)
    opened = []
    original = SliceStore.open
    monkeypatch.setattr(SliceStore, "open", lambda path, **given: opened.append(given) or original(path, **given))
    describe_store(store)
    assert opened == [{"partition": part} for part in "abc"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("x.zarr", "in no part of the manifest"), ("absent.zarr", "is not a slice store")],
    ids=["part-lost", "absent"],
)
@pytest.mark.parametrize(
    "reader", [lambda store, out: export_store(store, out, "nifti"), lambda s, _: describe_store(s)]
)
def test_what_is_missing_is_refused_not_passed_over(tmp_path, name, message, reader):
    for patient in range(6):
        make_series(tmp_path / "dicom" / str(patient), patient=f"P{patient}")
    convert_tree(ConvertJob(tmp_path / "dicom", tmp_path / "x.zarr"))
    next((tmp_path / "x.zarr" / "manifest").glob("*.parquet")).unlink()
    with pytest.raises(StoreError, match=message):
        reader(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()
