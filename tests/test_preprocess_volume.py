import numpy as np
import pytest
from dicom_factory import SAGITTAL, make_dataset, make_series, save
from pydicom import Dataset, Sequence, dcmread, dcmwrite
from pydicom.pixels import pixel_array
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLSLossless,
    RLELossless,
)

from preprocess.geometry import GeometryError
from preprocess.headers.index import index_files, walk
from preprocess.pixels.volume import VolumeError, load_volume
from preprocess.stacks import make_stacks


def load(folder, **options):
    rows = index_files(str(folder), list(walk(folder)))
    (stack,) = make_stacks(rows, [])
    return load_volume(folder, stack, **options)


def rewrite(path, change):
    dataset = dcmread(path)
    change(dataset)
    dataset.save_as(path)


@pytest.mark.parametrize("dtype", [np.uint16, np.int16])
def test_values_equal_pydicoms(tmp_path, dtype):
    pixels = np.random.default_rng(0).integers(np.iinfo(dtype).min, np.iinfo(dtype).max, (5, 6, 7)).astype(dtype)
    paths, _ = make_series(tmp_path, pixels=pixels)
    volume = load(tmp_path)
    # The factory's sagittal normal points to the right: file order is left → right.
    expected = [pixel_array(path) for path in reversed(paths)]
    np.testing.assert_array_equal(volume.pixels_SHW, expected)
    assert volume.pixels_SHW.dtype == dtype


@pytest.mark.parametrize(
    "syntax",
    [
        ImplicitVRLittleEndian,
        ExplicitVRLittleEndian,
        ExplicitVRBigEndian,
        DeflatedExplicitVRLittleEndian,
        RLELossless,
        JPEGLSLossless,
    ],
    ids=lambda syntax: syntax.name,
)
def test_every_transfer_syntax_gives_native_values(tmp_path, syntax):
    paths, pixels = make_series(tmp_path, shape=(5, 16, 16))
    for path in paths:
        dataset = dcmread(path)
        if syntax.is_encapsulated:
            dataset.compress(syntax, generate_instance_uid=False)
        elif not syntax.is_little_endian:
            dataset.PixelData = dataset.pixel_array.astype(">u2").tobytes()
        dataset.file_meta.TransferSyntaxUID = syntax
        list(dataset.iterall())  # else raw elements keep their byte order
        order = {"implicit_vr": syntax.is_implicit_VR, "little_endian": syntax.is_little_endian}
        dcmwrite(path, dataset, **order, force_encoding=True)
    volume = load(tmp_path)
    np.testing.assert_array_equal(volume.pixels_SHW, pixels[::-1])
    assert volume.pixels_SHW.dtype == np.uint16
    assert volume.pixels_SHW.dtype.isnative


@pytest.mark.parametrize(("signed", "stored", "value"), [(0, 0x0ABC, 0x0ABC), (1, 0x0FFF, -1), (1, 0x07FF, 2047)])
def test_junk_above_the_stored_bits_is_cut_off(tmp_path, signed, stored, value):
    pixels = np.full((5, 4, 4), stored | 0x9000, np.uint16)
    make_series(tmp_path, pixels=pixels, BitsStored=12, HighBit=11, PixelRepresentation=signed)
    assert np.unique(load(tmp_path).pixels_SHW).tolist() == [value]


def test_monochrome1_is_turned_over(tmp_path):
    pixels = np.full((5, 4, 4), 1000, np.uint16)
    make_series(tmp_path, pixels=pixels, BitsStored=12, HighBit=11, PhotometricInterpretation="MONOCHROME1")
    volume = load(tmp_path)
    assert np.unique(volume.pixels_SHW).tolist() == [4095 - 1000]
    assert volume.inverted


def test_narrow_and_mixed_types_meet_in_16_bits(tmp_path):
    make_series(tmp_path / "a", pixels=np.full((5, 4, 4), 200, np.uint8), BitsStored=8, HighBit=7)
    assert load(tmp_path / "a").pixels_SHW.dtype == np.uint16
    paths, _ = make_series(tmp_path / "b")
    rewrite(paths[2], lambda dataset: setattr(dataset, "PixelRepresentation", 1))
    assert load(tmp_path / "b").pixels_SHW.dtype == np.int16


def test_mixed_types_that_do_not_fit_are_refused(tmp_path):
    paths, _ = make_series(tmp_path, pixels=np.full((5, 4, 4), 60000, np.uint16))
    rewrite(paths[2], lambda dataset: setattr(dataset, "PixelRepresentation", 1))
    with pytest.raises(VolumeError, match="mixed_pixels"):
        load(tmp_path)


def test_rescale_is_recorded_per_slice_not_applied(tmp_path):
    paths, pixels = make_series(tmp_path)
    for number, path in enumerate(paths):
        rewrite(path, lambda dataset, slope=number + 1: setattr(dataset, "RescaleSlope", slope))
    volume = load(tmp_path)
    np.testing.assert_array_equal(volume.pixels_SHW, pixels[::-1])
    assert volume.rescale_slope == (5.0, 4.0, 3.0, 2.0, 1.0)


def shorten(path):
    path.write_bytes(path.read_bytes()[:-50])


def drop_half(path):
    rewrite(path, lambda dataset: setattr(dataset, "PixelData", dataset.PixelData[:100]))


def claim_unknown_syntax(path):
    path.write_bytes(path.read_bytes().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.9\0"))


@pytest.mark.parametrize(
    ("damage", "codes"),
    [
        (shorten, {"truncated"}),
        (drop_half, {"truncated"}),
        (claim_unknown_syntax, {"transfer_syntax", "decode_error"}),
    ],
)
def test_the_damaged_file_is_named(tmp_path, damage, codes):
    paths, _ = make_series(tmp_path)
    damage(paths[3])
    with pytest.raises(VolumeError) as caught:
        load(tmp_path)
    assert caught.value.code in codes
    assert caught.value.faults == {paths[3].name: caught.value.code}


def test_equal_copies_are_dropped_and_unequal_ones_refused(tmp_path):
    paths, pixels = make_series(tmp_path)
    copy = tmp_path / "copy.dcm"
    copy.write_bytes(paths[1].read_bytes())
    np.testing.assert_array_equal(load(tmp_path).pixels_SHW, pixels[::-1])
    rewrite(copy, lambda dataset: setattr(dataset, "PixelData", bytes(len(dataset.PixelData))))
    with pytest.raises(VolumeError, match="conflicting_duplicate") as caught:
        load(tmp_path)
    assert set(caught.value.faults) == {paths[1].name, "copy.dcm"}


def test_a_missing_slice_is_refused(tmp_path):
    paths, _ = make_series(tmp_path, shape=(7, 6, 6))
    paths[3].unlink()
    with pytest.raises(GeometryError, match="gap"):
        load(tmp_path)


def test_error_survives_pickling():
    import pickle

    error = pickle.loads(pickle.dumps(VolumeError("truncated", {"a": "truncated"})))
    assert (error.code, error.faults, str(error)) == ("truncated", {"a": "truncated"}, "truncated")


def test_single_image_without_meta_is_read(tmp_path):
    dataset = make_dataset(np.arange(16, dtype=np.uint16).reshape(4, 4))
    path = save(dataset, tmp_path / "image")
    path.write_bytes(path.read_bytes()[132 + 12 + dcmread(path).file_meta.FileMetaInformationGroupLength :])
    (row,) = index_files(str(tmp_path), list(walk(tmp_path)))
    assert (row.fault, row.rows) == ("", 4.0)


def frames_of(folder, order):
    """Write one enhanced multi-frame object whose frames lie in the given order of positions."""
    pixels = np.random.default_rng(3).integers(0, 4000, (len(order), 6, 7)).astype(np.uint16)
    dataset = make_dataset(pixels[0], ImagePositionPatient=None, ImageOrientationPatient=None, PixelSpacing=None)
    dataset.NumberOfFrames, dataset.PixelData = len(order), pixels.tobytes()
    shared, plane, measures = Dataset(), Dataset(), Dataset()
    plane.ImageOrientationPatient, measures.PixelSpacing = list(SAGITTAL), [1.0, 1.0]
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = Sequence([plane]), Sequence([measures])
    dataset.SharedFunctionalGroupsSequence = Sequence([shared])
    frames = []
    for number, place in enumerate(order):
        frame, position, scale = Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = [4.0 * place, 0.0, 0.0]
        scale.RescaleSlope, scale.RescaleIntercept = number + 1, 0
        frame.PlanePositionSequence, frame.PixelValueTransformationSequence = Sequence([position]), Sequence([scale])
        frames.append(frame)
    dataset.PerFrameFunctionalGroupsSequence = Sequence(frames)
    save(dataset, folder / "enhanced.dcm")
    return pixels


def test_frames_are_ordered_by_their_positions(tmp_path):
    order = [3, 0, 5, 1, 4, 2]
    pixels = frames_of(tmp_path, order)
    volume = load(tmp_path)
    places = np.argsort(order)
    np.testing.assert_array_equal(volume.pixels_SHW, pixels[places])
    assert volume.rescale_slope == tuple(float(place + 1) for place in places)


@pytest.mark.parametrize(
    ("header", "padding"),
    [
        ({"PixelPaddingValue": 7}, 7),
        ({"PixelPaddingValue": 7, "PhotometricInterpretation": "MONOCHROME1"}, 65528),
        ({"PixelPaddingValue": -2000, "PixelRepresentation": 1}, -2000),
        ({}, None),
    ],
    ids=["unsigned", "turned-over", "signed", "none"],
)
def test_padding_is_recorded_as_it_is_stored(tmp_path, header, padding):
    make_series(tmp_path, **header)
    assert load(tmp_path).padding == padding


def test_negative_padding_may_be_spelt_unsigned(tmp_path):
    paths, _ = make_series(tmp_path, PixelRepresentation=1)
    for path in paths:
        rewrite(path, lambda dataset: dataset.add_new("PixelPaddingValue", "US", 63536))
    assert load(tmp_path).padding == -2000


def test_gaps_are_recorded_where_they_are_allowed(tmp_path):
    paths, pixels = make_series(tmp_path, shape=(9, 6, 6))
    paths[3].unlink()
    rewrite(paths[6], lambda dataset: setattr(dataset, "PixelData", bytes(10)))
    volume = load(tmp_path, allow_gaps=True)
    np.testing.assert_array_equal(volume.pixels_SHW, pixels[[8, 7, 5, 4, 2, 1, 0]])
    assert volume.faults == {paths[6].name: "truncated"}
    assert volume.geometry.missing_mm == (8.0, 20.0)
    assert volume.geometry.positions_mm == (0.0, 4.0, 12.0, 16.0, 24.0, 28.0, 32.0)
    assert volume.geometry.spacing_slice_mm == 4.0
