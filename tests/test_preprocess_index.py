"""Walking and header reading: every entry is named once, every header gives the rows that pydicom would give."""

from __future__ import annotations

import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pydicom.data
import pytest
from dicom_factory import make_dataset, make_series, save
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.pixels.utils import pixel_array
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from lbp_ray.phantom import PhantomConfig, write_cohort
from preprocess.accounting import state_of
from preprocess.headers import index
from preprocess.headers import reader as header
from preprocess.headers.index import WalkedFile, index_file, index_files, walk
from preprocess.pixels.native import read_native

PYDICOM_FILES = Path(pydicom.data.__file__).parent


def rows_of(*paths):
    root = str(paths[0].parent)
    return index_files(root, [WalkedFile(path.name) for path in paths])


def codes(*paths):
    return [row.fault for row in rows_of(*paths)]


# --- walk ------------------------------------------------------------------------------------------------------------


def test_walk_names_every_entry_once_in_the_order_of_names(tmp_path):
    for name in ("b/2", "b/10", "a/deep/er/x", "z", "a.dcm"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [file.path for file in walk(tmp_path)] == ["a.dcm", "z", "a/deep/er/x", "b/10", "b/2"]


def test_walk_follows_no_link_and_opens_no_pipe(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "loop").symlink_to(tmp_path)
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    found = {file.path: file.fault for file in walk(tmp_path)}
    assert found == {"folder/loop": "symlink", "gone": "symlink", "pipe": "special_file"}
    assert {row.fault for row in index_files(str(tmp_path), list(walk(tmp_path)))} == {"symlink", "special_file"}


def test_walk_lists_a_folder_only_when_it_is_reached(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").touch()
    entries = walk(tmp_path)
    assert next(entries) == WalkedFile("a/x")
    (tmp_path / "b" / "x").unlink()
    (tmp_path / "b").rmdir()
    assert list(entries) == [WalkedFile("b", "unreadable_folder")]


# --- files that change or are none -----------------------------------------------------------------------------------


def _vanish(path):
    path.unlink()


def _pipe(path):
    path.unlink()
    os.mkfifo(path)


def _link(path):
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


@pytest.mark.parametrize(
    ("happens", "code"),
    [
        pytest.param(_vanish, "unreadable_file", id="vanishes"),
        pytest.param(_pipe, "special_file", id="becomes-a-pipe"),
        pytest.param(_link, "unreadable_file", id="becomes-a-link"),
        pytest.param(lambda path: path.write_bytes(b""), "empty_file", id="is-emptied"),
        pytest.param(lambda path: os.truncate(path, 420), "unreadable_header:cut", id="shrinks"),
        pytest.param(lambda path: path.write_bytes(b"PK\x03\x04" + bytes(200)), "archive", id="is-zipped"),
    ],
)
def test_a_file_that_changes_after_the_walk_gets_a_code(tmp_path, happens, code):
    path = save(make_dataset(np.ones((4, 4), np.uint16)), tmp_path / "a.dcm")
    files = list(walk(tmp_path))
    happens(path)
    assert [row.fault for row in index_files(str(tmp_path), files)] == [code]


def test_a_file_that_changes_while_it_is_read_gets_a_code(tmp_path, monkeypatch):
    path = save(make_dataset(np.ones((4, 4), np.uint16)), tmp_path / "a.dcm")
    read = index._reader.read

    class Disturbed:
        def read(self, source):
            with path.open("ab") as stream:
                stream.write(b"more")
            return read(source)

    monkeypatch.setattr(index, "_reader", Disturbed())
    assert codes(path) == ["unreadable_file:changed"]


def test_a_row_says_what_the_file_is(tmp_path):
    image = make_dataset(np.ones((4, 6), np.uint16), StudyDate="20200131", RescaleSlope="2.5")
    (row,) = rows_of(save(image, tmp_path / "a.dcm"))
    found = (tmp_path / "a.dcm").stat()
    assert (row.size_bytes, row.mtime_ns, row.frame) == (found.st_size, found.st_mtime_ns, None)
    assert (row.study_date, row.transfer_syntax) == ("20200131", ExplicitVRLittleEndian)
    assert (row.rows, row.columns, row.rescale_slope, row.rescale_intercept) == (4.0, 6.0, 2.5, None)


# --- enhanced multi-frame --------------------------------------------------------------------------------------------


def item(**elements):
    dataset = Dataset()
    for name, value in elements.items():
        setattr(dataset, name, value)
    return dataset


def groups(**macros):
    return item(**{name: [item(**elements)] for name, elements in macros.items()})


GEOMETRY = {
    "PlaneOrientationSequence": {"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]},
    "PixelMeasuresSequence": {"PixelSpacing": [0.5, 0.75], "SliceThickness": 4},
}


def enhanced(*, shared=None, frames=({}, {}), per_frame=True, **top):
    """An enhanced image; `shared` and each of `frames` map functional groups to their elements."""
    dataset = make_dataset(np.ones((4, 4), np.uint16), ScanningSequence=None, ScanOptions=None, EchoTime=None, **top)
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        del dataset[name]
    dataset.PixelData = dataset.PixelData * len(frames)
    dataset.NumberOfFrames = top.get("NumberOfFrames", len(frames))
    dataset.SharedFunctionalGroupsSequence = [groups(**(GEOMETRY if shared is None else shared))]
    if per_frame:
        dataset.PerFrameFunctionalGroupsSequence = [groups(**frame) for frame in frames]
    return dataset


def positions(*xs):
    return [{"PlanePositionSequence": {"ImagePositionPatient": [x, 0, 0]}} for x in xs]


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian], ids=["explicit", "implicit"])
def test_every_frame_has_its_own_geometry(tmp_path, syntax):
    image = enhanced(frames=positions(8, 0, 4))
    image.file_meta.TransferSyntaxUID = syntax
    rows = rows_of(save(image, tmp_path / "e.dcm"))
    assert [(row.frame, row.position_mm[0], row.fault) for row in rows] == [(0, 8.0, ""), (1, 0.0, ""), (2, 4.0, "")]
    assert {(row.orientation, row.spacing_mm, row.slice_thickness_mm) for row in rows} == {
        ((0.0, 1.0, 0.0, 0.0, 0.0, -1.0), (0.5, 0.75), 4.0)
    }


def test_a_frame_overrides_what_the_frames_share(tmp_path):
    echoes = [{"MREchoSequence": {"EffectiveEchoTime": 20.0}}, {}]
    image = enhanced(shared={**GEOMETRY, "MREchoSequence": {"EffectiveEchoTime": 80.0}}, frames=echoes)
    assert [row.echo_time_ms for row in rows_of(save(image, tmp_path / "e.dcm"))] == [20.0, 80.0]


@pytest.mark.parametrize(
    ("macros", "top", "field", "value"),
    [
        pytest.param({"MREchoSequence": {"EffectiveEchoTime": 97.5}}, {}, "echo_time_ms", 97.5, id="echo"),
        pytest.param(
            {"MRTimingAndRelatedParametersSequence": {"RepetitionTime": 3000}},
            {},
            "repetition_time_ms",
            3000.0,
            id="tr",
        ),
        pytest.param(
            {"MRTimingAndRelatedParametersSequence": {"FlipAngle": 140}}, {}, "flip_angle_deg", 140.0, id="flip"
        ),
        pytest.param(
            {"MRTimingAndRelatedParametersSequence": {"EchoTrainLength": 15, "RFEchoTrainLength": 0}},
            {},
            "echo_train_length",
            15.0,
            id="etl",
        ),
        pytest.param({"MRModifierSequence": {"InversionTimes": [150.0]}}, {}, "inversion_time_ms", 150.0, id="ti"),
        pytest.param({"MRDiffusionSequence": {"DiffusionBValue": 800.0}}, {}, "b_value", 800.0, id="b-value"),
        pytest.param({"FrameContentSequence": {"TemporalPositionIndex": 3}}, {}, "temporal_position", 3.0, id="time"),
        pytest.param(
            {"FrameContentSequence": {"FrameAcquisitionNumber": 2}}, {}, "acquisition_number", 2.0, id="acquisition"
        ),
        pytest.param({"MRAveragesSequence": {"NumberOfAverages": 2}}, {}, "averages", 2.0, id="averages"),
        pytest.param(
            {"PixelValueTransformationSequence": {"RescaleSlope": 4, "RescaleIntercept": -7}},
            {},
            "rescale_intercept",
            -7.0,
            id="rescale",
        ),
        pytest.param(
            {"MRImageFrameTypeSequence": {"FrameType": ["DERIVED", "PRIMARY", "DIXON", "WATER"]}},
            {},
            "image_type",
            ("DERIVED", "PRIMARY", "DIXON", "WATER"),
            id="frame-type",
        ),
        pytest.param(
            {
                "MRImageFrameTypeSequence": {
                    "FrameType": ["ORIGINAL", "PRIMARY", "T1", "NONE"],
                    "ComplexImageComponent": "PHASE",
                }
            },
            {},
            "image_type",
            ("ORIGINAL", "PRIMARY", "T1", "NONE", "PHASE"),
            id="phase",
        ),
        pytest.param({}, {"EchoPulseSequence": "SPIN"}, "scanning_sequence", ("SE",), id="spin"),
        pytest.param({}, {"EchoPulseSequence": "BOTH"}, "scanning_sequence", ("SE", "GR"), id="spin-and-gradient"),
        pytest.param({}, {"MultipleSpinEcho": "YES"}, "scanning_sequence", ("SE",), id="turbo"),
        pytest.param(
            {},
            {"EchoPulseSequence": "GRADIENT", "EchoPlanarPulseSequence": "YES"},
            "scanning_sequence",
            ("GR", "EP"),
            id="echo-planar",
        ),
        pytest.param(
            {"MRModifierSequence": {"InversionRecovery": "YES"}},
            {"EchoPulseSequence": "SPIN"},
            "scanning_sequence",
            ("SE", "IR"),
            id="stir",
        ),
        pytest.param({}, {"SpectrallySelectedSuppression": "FAT"}, "scan_options", ("FS",), id="fat-suppressed"),
        pytest.param({}, {"SpectrallySelectedSuppression": "NONE"}, "scan_options", (), id="not-suppressed"),
        pytest.param(
            {"MRModifierSequence": {"SpectrallySelectedExcitation": "WATER"}}, {}, "scan_options", ("FS",), id="water"
        ),
        pytest.param({}, {"AcquisitionDateTime": "20200131101500.5+0100"}, "acquisition_time", "101500.5", id="moment"),
        pytest.param(
            {"FrameAnatomySequence": {"AnatomicRegionSequence": [item(CodeMeaning="Lumbar spine")]}},
            {},
            "body_part",
            "Lumbar spine",
            id="anatomy",
        ),
        pytest.param(
            {},
            {"ContrastBolusAgentSequence": [item(CodeMeaning="Gadolinium")]},
            "contrast_agent",
            "Gadolinium",
            id="contrast-agent",
        ),
        pytest.param(
            {"ContrastBolusUsageSequence": {"ContrastBolusAgentAdministered": "NO"}},
            {"ContrastBolusAgentSequence": [item(CodeMeaning="Gadolinium")]},
            "contrast_agent",
            "",
            id="before-contrast-agent",
        ),
        pytest.param(
            {"UnassignedSharedConvertedAttributesSequence": {"ScanningSequence": ["SE", "IR"]}},
            {},
            "scanning_sequence",
            ("SE", "IR"),
            id="converted-from-single-frames",
        ),
    ],
)
def test_enhanced_facts_stand_where_single_frames_have_them(tmp_path, macros, top, field, value):
    rows = rows_of(save(enhanced(shared={**GEOMETRY, **macros}, **top), tmp_path / "e.dcm"))
    assert [getattr(row, field) for row in rows] == [value, value]


def test_frames_without_geometry_have_none(tmp_path):
    rows = rows_of(save(enhanced(shared={}), tmp_path / "e.dcm"))
    assert [(row.fault, row.position_mm, row.orientation, row.spacing_mm) for row in rows] == [("", (), (), ())] * 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param({"NumberOfFrames": 10**9}, "unreadable_header:frames", id="a-billion"),
        pytest.param({"NumberOfFrames": 3}, "unreadable_header:frames", id="one-not-described"),
        pytest.param({"NumberOfFrames": 1}, "unreadable_header:frames", id="one-not-promised"),
        pytest.param({"NumberOfFrames": 0}, "unreadable_header:frames", id="none"),
        pytest.param({"NumberOfFrames": -2}, "unreadable_header:frames", id="negative"),
        pytest.param({"per_frame": False}, "unreadable_header:frames", id="none-described"),
        pytest.param({"Modality": "CT"}, "not_mr", id="another-modality-is-one-row"),
    ],
)
def test_frames_that_cannot_be_are_settled_at_once(tmp_path, options, expected):
    path = save(enhanced(**options), tmp_path / "e.dcm")
    tracemalloc.start()
    assert [(row.fault, row.frame) for row in rows_of(path)] == [(expected, None)]
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_frames_without_functional_groups_stay_one_row(tmp_path):
    image = make_dataset(np.ones((4, 4), np.uint16))
    image.NumberOfFrames, image.PixelData = 2, image.PixelData * 2
    assert codes(save(image, tmp_path / "m.dcm")) == ["multiframe"]


# --- the minimal reader ----------------------------------------------------------------------------------------------


class _LeavesAll:
    """A minimal reader that is never sure."""

    def read(self, source):
        return None


def assert_equal_to_pydicom(root: Path) -> int:
    """Check rows and pixels of a tree against pydicom's; return how many files the minimal reader took."""
    files = list(walk(root))
    rows = index_files(str(root), files)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "_reader", _LeavesAll())
        assert index_files(str(root), files) == rows
    for row in rows:
        native = None if row.fault else read_native(str(root / row.path))
        if native is not None:
            expected = pixel_array(pydicom.dcmread(root / row.path), raw=True)
            assert native[1].dtype == expected.dtype
            assert np.array_equal(native[1], expected)
    return sum(is_read_by_minimal_reader(root / file.path) for file in files if not file.fault)


def is_read_by_minimal_reader(path: Path) -> bool:
    with path.open("rb") as stream:
        return index._reader.read(header.Source(stream.fileno())) is not None


@pytest.mark.filterwarnings("ignore")
def test_pydicoms_own_files_give_pydicoms_rows():
    assert assert_equal_to_pydicom(PYDICOM_FILES) > 100


def test_a_synthetic_cohort_gives_pydicoms_rows(tmp_path):
    sizes = {
        "studies": 4,
        "positives": 2,
        "excluded": {"slightly_symptomatic": 1},
        "excluded_imaged": 1,
        "templates": 1,
    }
    write_cohort(PhantomConfig(out=tmp_path / "cohort", seed=3, workers=1, image={"matrix": 64}, cohort=sizes))
    files = sum(not file.fault for file in walk(tmp_path / "cohort" / "dicom"))
    assert assert_equal_to_pydicom(tmp_path / "cohort" / "dicom") > 0.9 * files


@pytest.mark.parametrize(
    ("header_elements", "taken"),
    [
        pytest.param({}, True, id="plain"),
        pytest.param({"SeriesDescription": "a\\b"}, True, id="backslash"),
        pytest.param({"SpecificCharacterSet": "ISO_IR 192", "ProtocolName": "R\u00fccken"}, False, id="not-ascii"),
        pytest.param({"SpecificCharacterSet": "ISO_IR 100"}, True, id="character-set"),
        pytest.param({"EchoTime": None, "RepetitionTime": None}, True, id="absent"),
        pytest.param({"ImageType": [], "EchoNumbers": None, "PatientID": ""}, True, id="empty"),
        pytest.param({"DiffusionBValue": 50.0}, True, id="double"),
        pytest.param({"RequestAttributesSequence": [item(CodeMeaning="x")]}, True, id="sequence"),
        pytest.param({"SharedFunctionalGroupsSequence": [Dataset()]}, False, id="functional-groups"),
    ],
)
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian], ids=["explicit", "implicit"])
def test_minimal_reader_takes_what_it_is_sure_of(tmp_path, header_elements, taken, syntax):
    image = make_dataset(np.arange(12, dtype=np.uint16).reshape(3, 4), **header_elements)
    image.file_meta.TransferSyntaxUID = syntax
    assert assert_equal_to_pydicom(save(image, tmp_path / "a.dcm").parent) == taken


def test_huge_private_elements_and_open_sequences_are_skipped(tmp_path):
    image = make_dataset(np.ones((4, 4), np.uint16))
    block = image.private_block(0x0029, "VENDOR", create=True)
    block.add_new(1, "OB", bytes(5 * header.CHUNK_BYTES))
    block.add_new(2, "UN", b"x" * (header.CHUNK_BYTES - 7))
    image.RequestAttributesSequence = Sequence([item(ReferencedStudySequence=[item(CodeMeaning="y" * 60)] * 400)])
    image["RequestAttributesSequence"].is_undefined_length = True
    image.RequestAttributesSequence[0].is_undefined_length_sequence_item = True
    assert assert_equal_to_pydicom(save(image, tmp_path / "a.dcm").parent) == 1


TEXTS = st.text(st.characters(codec="latin-1", exclude_characters="\r\n\f\v"), max_size=12)
CODES = st.lists(st.text("ABC_ 12", max_size=6), max_size=4)
NUMBERS = st.one_of(st.just(""), st.integers(-9, 9999), st.floats(-1e4, 1e4).map(lambda number: f"{number:.6g}"))
ELEMENTS = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("PatientID", "SeriesDescription", "ProtocolName", "AccessionNumber"), TEXTS),
        **dict.fromkeys(("ImageType", "ScanningSequence", "ScanOptions"), CODES),
        **dict.fromkeys(("EchoTime", "RepetitionTime", "InversionTime", "RescaleSlope"), NUMBERS),
        "PixelSpacing": st.lists(NUMBERS, max_size=3),
        "DiffusionBValue": st.floats(),
        "Rows": st.integers(0, 65535),
        "BurnedInAnnotation": st.sampled_from(["YES", "NO", ""]),
        "Modality": st.sampled_from(["MR", "CT", " MR ", ""]),
        "RequestAttributesSequence": st.lists(CODES.map(lambda codes: item(ImageType=codes)), max_size=3),
    },
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(ELEMENTS, st.sampled_from([ExplicitVRLittleEndian, ImplicitVRLittleEndian]), st.booleans(), st.integers(0, 400))
@pytest.mark.filterwarnings("ignore")
def test_any_header_gives_pydicoms_rows(tmp_path, elements, syntax, open_sequences, cut):
    image = make_dataset(np.ones((4, 4), np.uint16), SpecificCharacterSet="ISO_IR 100", **elements)
    image.file_meta.TransferSyntaxUID = syntax
    if open_sequences and "RequestAttributesSequence" in image:
        image["RequestAttributesSequence"].is_undefined_length = True
    path = save(image, tmp_path / "a.dcm")
    if cut > 200:  # half of the files end early
        os.truncate(path, max(path.stat().st_size - (cut - 200) * 4, 1))
    assert_equal_to_pydicom(tmp_path)


# --- pixels without pydicom ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian], ids=["explicit", "implicit"])
def test_native_pixels_equal_pydicoms(tmp_path, dtype, syntax):
    pixels = np.random.default_rng(0).integers(0, 120, (5, 7)).astype(dtype)
    image = make_dataset(pixels, BitsStored=7, RescaleSlope="2", RescaleIntercept="-3", ContentLabel="PADDING")
    image.file_meta.TransferSyntaxUID = syntax
    found = read_native(str(save(image, tmp_path / "a.dcm")))
    assert found is not None
    assert np.array_equal(found[1], pixels)
    assert found[1].dtype == np.dtype(dtype)
    assert (found[0].bits_stored, found[0].rescale_slope, found[0].rescale_intercept) == (7, 2.0, -3.0)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"Rows": 6}, id="more-rows-than-pixels"),
        pytest.param({"Rows": 2}, id="pixels-for-two-images"),
        pytest.param({"BitsStored": 17}, id="more-bits-than-allocated"),
        pytest.param({"PixelRepresentation": 2}, id="no-such-representation"),
        pytest.param({"SamplesPerPixel": 3}, id="colour"),
        pytest.param({"NumberOfFrames": 2}, id="frames"),
        pytest.param({"RescaleSlope": None, "Columns": None}, id="no-columns"),
        pytest.param({"Rows": 0}, id="no-rows"),
    ],
)
def test_odd_images_are_left_to_pydicom(tmp_path, change):
    assert read_native(str(save(make_dataset(np.ones((5, 7), np.uint16), **change), tmp_path / "a.dcm"))) is None


def test_truncated_and_big_endian_pixels_are_left_to_pydicom(tmp_path):
    path = save(make_dataset(np.ones((5, 7), np.uint16)), tmp_path / "a.dcm")
    os.truncate(path, path.stat().st_size - 1)
    assert read_native(str(path)) is None
    assert read_native(str(PYDICOM_FILES / "test_files" / "ExplVR_BigEnd.dcm")) is None


# --- headers that end early ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Protocol", "Non-ASCII Protocol \u00fc"], ids=["minimal-reader", "pydicom"])
def test_a_header_that_ends_within_an_element_is_an_error(tmp_path, name):
    image = make_dataset(np.ones((4, 4), np.uint16), ProtocolName=name, SpecificCharacterSet="ISO_IR 192")
    del image.PixelData
    path = save(image, tmp_path / "a.dcm")
    content, starts = path.read_bytes(), [132]
    for tag in sorted(image.keys()):
        starts.append(content.find(struct.pack("<HH", tag.group, tag.element), starts[-1]))
    assert codes(path) == ["no_pixels"]
    whole = []
    for end in range(len(content) - 1, starts[1], -1):
        os.truncate(path, end)
        whole += [end] if codes(path) == ["no_pixels"] else []
    assert whole == starts[:1:-1]  # between two elements nothing shows


def test_pixels_without_a_matrix_are_an_error(tmp_path):
    assert codes(save(make_dataset(np.ones((4, 4), np.uint16), Rows=None), tmp_path / "a.dcm")) == ["no_geometry"]


def test_zeros_that_fill_up_a_block_are_no_error(tmp_path):
    image = make_dataset(np.ones((4, 4), np.uint16))
    del image.PixelData
    path = save(image, tmp_path / "a.dcm")
    for number in (1, 7, 8, 13, 500):
        path.write_bytes(path.read_bytes() + bytes(number))
        assert codes(path) == ["no_pixels"]


# --- limits ----------------------------------------------------------------------------------------------------------


def test_a_deflated_bomb_is_settled_without_inflating_it(tmp_path, monkeypatch):
    monkeypatch.setattr(header, "MAX_INFLATED_BYTES", 2**22)
    image = make_dataset(np.ones((4, 4), np.uint16))
    image.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    path = save(image, tmp_path / "a.dcm")
    assert codes(path) == [""]
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    bomb = packer.compress(struct.pack("<HH2sHL", 0x0009, 0x0001, b"OB", 0, 2**25) + bytes(2**25)) + packer.flush()
    meta_end = path.read_bytes().index(DeflatedExplicitVRLittleEndian.encode()) + 22
    path.write_bytes(path.read_bytes()[:meta_end] + bomb)
    assert codes(path) == ["unreadable_header:limit"]


def test_a_header_without_end_is_settled(tmp_path, monkeypatch):
    monkeypatch.setattr(header, "MAX_READS", 50_000)
    path = save(make_dataset(np.ones((4, 4), np.uint16)), tmp_path / "a.dcm")
    content = path.read_bytes()
    start = content.index(struct.pack("<HH", 0x0008, 0x0008))
    path.write_bytes(content[:start] + struct.pack("<HH2sH", 0x0009, 0x0001, b"LO", 0) * 60_000 + content[start:])
    assert codes(path) == ["unreadable_header:limit"]


@pytest.mark.parametrize("syntax", [ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian], ids=["big", "deflated"])
def test_rare_encodings_give_the_same_row(tmp_path, syntax):
    image = make_dataset(np.ones((4, 4), np.uint16), series="s")
    (plain,) = rows_of(save(image, tmp_path / "a.dcm"))
    image = make_dataset(np.ones((4, 4), np.uint16), series="s")
    image.file_meta.TransferSyntaxUID = syntax
    (row,) = rows_of(save(image, tmp_path / "b.dcm"))
    kept = [name for name in row.__slots__ if name not in {"path", "size_bytes", "mtime_ns", "transfer_syntax"}]
    assert [getattr(row, name) for name in kept] == [getattr(plain, name) for name in kept]


def test_every_code_is_a_known_one(tmp_path):
    paths, _ = make_series(tmp_path, (3, 4, 4))
    paths[0].write_bytes(b"")
    os.truncate(paths[1], 180)
    assert {state_of(row.fault or "converted") for row in rows_of(*paths)} == {"converted", "skipped", "quarantined"}


@pytest.mark.parametrize(
    "header_elements",
    [
        pytest.param({"SpecificCharacterSet": "CANARY", "PatientID": "\xe9"}, id="character-set"),
        pytest.param({"EchoTime": "CANARY", "ProtocolName": "\xe9"}, id="number"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_a_header_says_is_not_logged(tmp_path, caplog, capfd, header_elements):
    image = make_dataset(np.ones((4, 4), np.uint16))
    with pydicom.config.disable_value_validation():
        for name, value in header_elements.items():
            setattr(image, name, value) if name != "EchoTime" else image.add_new(name, "LO", value)
    path = save(image, tmp_path / "a.dcm")
    caplog.clear()
    capfd.readouterr()
    assert codes(path) == [""]
    assert "CANARY" not in caplog.text + "".join(capfd.readouterr())


def test_a_path_that_cannot_be_opened_is_no_error(tmp_path):
    (row,) = index_file(str(tmp_path), WalkedFile("nul\0byte"))
    assert row.fault == "unreadable_file"
