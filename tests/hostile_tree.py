"""A DICOM tree with every way in which clinical trees break converters, and what must become of each file.

A case is a function that fills one exam with entries; what an entry must end as stands beside it. Content comes first,
names, folders and order of creation afterwards: `build_hostile_tree` lays the same entries out in any number of ways.
Images are drawn in canonical orientation and turned away from it on writing, so the expected volumes owe nothing to
the code under test.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import random
import struct
import tarfile
import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from dicom_factory import make_dataset, transcode, uid
from pydicom import dcmread, dcmwrite
from pydicom.config import disable_value_validation
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import pixel_array
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000,
    JPEG2000Lossless,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SHAPE = (32, 40)
"""Rows (cranial → caudal) and columns (anterior → posterior) of a canonical image; JPEG 2000 needs 32."""

PITCH_MM = 4.0

VIEWS = {
    "sagittal": ((0, 1, 0, 0, 0, -1), lambda image: image),
    "columns_reversed": ((0, -1, 0, 0, 0, -1), lambda image: image[:, ::-1]),
    "rows_reversed": ((0, 1, 0, 0, 0, 1), lambda image: image[::-1]),
    "both_reversed": ((0, -1, 0, 0, 0, 1), lambda image: image[::-1, ::-1]),
    "transposed": ((0, 0, -1, 0, 1, 0), lambda image: image.T),
    "oblique": ((-0.3420201, 0.9396926, 0, 0, 0, -1), lambda image: image),
    "steep": ((-0.5, 0.8660254, 0, 0, 0, -1), lambda image: image),
    "axial": ((1, 0, 0, 0, 1, 0), lambda image: image),
    "coronal": ((1, 0, 0, 0, 0, -1), lambda image: image),
}
"""Name → orientation, and how a canonical image looks in it."""


@dataclass
class Entry:
    """One entry of the tree that has no path yet."""

    content: Dataset | bytes | None
    """None: not a regular file; `make` makes it."""
    code: str
    finish: Callable[[bytes], bytes] = bytes
    """Last change to the bytes of the file."""
    make: Callable[[Path], None] | None = None
    name: bytes = b""
    """File name where it is the point of the case."""
    twins: str = ""
    """Equal files share a name here: the first by path is converted, the others are duplicates."""
    truth_HW: np.ndarray | None = None

    @property
    def dataset(self) -> Dataset:
        assert isinstance(self.content, Dataset)
        return self.content

    def write(self, path: Path) -> None:
        if self.make:
            self.make(path)
        else:
            path.write_bytes(self.finish(to_bytes(self.content)))


def to_bytes(content: Dataset | bytes) -> bytes:
    if isinstance(content, bytes):
        return content
    syntax = content.file_meta.TransferSyntaxUID
    order = {"implicit_vr": syntax == ImplicitVRLittleEndian, "little_endian": syntax != ExplicitVRBigEndian}
    stream = io.BytesIO()
    content.preamble, content.file_meta.FileMetaInformationGroupLength = bytes(128), 0  # filled in on writing
    dcmwrite(stream, content, force_encoding=True, **order)
    return stream.getvalue()


@dataclass
class Exam:
    """One case: a patient, the entries, and the volumes that must be in the store."""

    patient: str
    entries: list[Entry] = field(default_factory=list)
    volumes: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    """(study UID, series UID) → (S, H, W) in canonical orientation."""

    def add(self, content: Dataset | bytes | None, code: str, **options) -> Entry:
        self.entries.append(Entry(content, code, **options))
        return self.entries[-1]

    def stack(self, series="t2", code="converted", *, slices=7, view="sagittal", truth_SHW=None, **header):
        """Add one stack, right → left; `header` as of `make_dataset`, a list gives each slice its own value."""
        study = header.pop("study", "s1")
        pixels_SHW = header.pop("pixels", None)
        if pixels_SHW is None:
            pixels_SHW = draw((self.patient, study, series), (slices, *header.pop("shape", SHAPE)))
        orientation, turned = VIEWS[view]
        offsets_mm = header.pop("offsets_mm", [PITCH_MM * index for index in range(len(pixels_SHW))])
        entries = []
        for index, image_HW in enumerate(pixels_SHW):
            own = {name: value[index] if isinstance(value, list) else value for name, value in header.items()}
            position = position_of(orientation, offsets_mm[index])
            options = {"patient": self.patient, "study": study, "series": series, "number": index}
            options |= {"position": position, "ImageOrientationPatient": list(orientation), **own}
            entry = self.add(make_dataset(np.ascontiguousarray(turned(image_HW)), **options), code)
            entries.append(entry)
        if code == "converted":
            self.expect(entries, pixels_SHW if truth_SHW is None else truth_SHW)
        return entries

    def expect(self, entries: list[Entry], truth_SHW: np.ndarray) -> None:
        header = entries[0].dataset
        key = str(header.get("StudyInstanceUID", "")), str(header.get("SeriesInstanceUID", ""))
        self.volumes[key] = truth_SHW

    def fail(self, entries: list[Entry], code: str, faulty: dict[int, str] | None = None) -> None:
        """Expect `code` of a stack, and other codes of some of its slices; it is not converted then."""
        header = entries[0].dataset
        self.volumes.pop((str(header.StudyInstanceUID), str(header.SeriesInstanceUID)), None)
        for index, entry in enumerate(entries):
            entry.code = (faulty or {}).get(index, code)


def draw(seed: tuple[str, ...], shape: tuple[int, ...], high: int = 4000) -> np.ndarray:
    """Smooth 12-bit images with some noise, different for every seed and slice."""
    generator = np.random.default_rng(list(repr(seed).encode()))
    ramp = np.add.outer(np.arange(shape[-2]), np.arange(shape[-1])) * (high // 2) // (shape[-2] + shape[-1])
    return (ramp + generator.integers(1, high // 2, shape)).astype(np.uint16)


def position_of(orientation: tuple[float, ...], offset_mm: float) -> list[str]:
    """Position at a distance along the normal that points to the left, posterior or head."""
    normal = np.cross(orientation[:3], orientation[3:])
    normal *= np.sign(normal[np.argmax(np.abs(normal))])
    return [f"{value:.6f}" for value in np.array([-12.0, -90.0, 70.0]) + offset_mm * normal]


CASES: dict[str, Callable[[Exam], object]] = {}
"""Name of the case, also its PatientID → what fills the exam."""


def case(function: Callable[[Exam], object]) -> Callable[[Exam], object]:
    CASES[function.__name__] = function
    return function


# --- one stack, one odd header ---------------------------------------------------------------------------------------

T1 = {"EchoTime": 12.0, "RepetitionTime": 600.0}
NO_TIMES = {"EchoTime": None, "RepetitionTime": None}
SECONDARY_CAPTURE, CT_IMAGE = "1.2.840.10008.5.1.4.1.1.7", "1.2.840.10008.5.1.4.1.1.2"

HEADERS = {
    "plain": ("converted", {}),
    "number_missing": ("converted", {"InstanceNumber": None}),
    "number_equal": ("converted", {"InstanceNumber": 1}),
    "number_not_geometric": ("converted", {"InstanceNumber": [3, 1, 7, 2, 6, 4, 900]}),
    "slice_location_lies": ("converted", {"SliceLocation": [5, 1, 5, 0, 9, 9, -4]}),
    "position_missing": ("no_geometry", {"ImagePositionPatient": None}),
    "orientation_missing": ("no_geometry", {"ImageOrientationPatient": None}),
    "orientation_zero": ("no_geometry", {"ImageOrientationPatient": [[0, 0, 0, 0, 0, 0]] * 7}),
    "orientation_not_a_number": ("no_geometry", {"ImageOrientationPatient": [[0, 1, 0, 0, 0, float("nan")]] * 7}),
    "pixel_spacing_missing": ("no_geometry", {"PixelSpacing": None}),
    "pixel_spacing_zero": ("no_geometry", {"PixelSpacing": [[0, 0]] * 7}),
    "pixel_spacing_unequal": ("converted", {"PixelSpacing": [[0.5, 1.25]] * 7}),
    "columns_reversed": ("converted", {"view": "columns_reversed"}),
    "rows_reversed": ("converted", {"view": "rows_reversed"}),
    "both_reversed": ("converted", {"view": "both_reversed"}),
    "transposed": ("converted", {"view": "transposed"}),
    "oblique": ("converted", {"view": "oblique"}),
    "axial": ("not_sagittal", {"view": "axial"}),
    "coronal": ("not_sagittal", {"view": "coronal"}),
    "decimal_noise": ("converted", {"offsets_mm": [4 * k + (-1) ** k * 2e-4 for k in range(7)]}),
    "spacing_slightly_uneven": ("converted", {"offsets_mm": [0, 4, 8.2, 12, 16, 20, 24]}),
    "spacing_very_uneven": ("uneven_spacing", {"offsets_mm": [0, 4, 9.6, 12, 16, 20, 24]}),
    "gap": ("gap", {"offsets_mm": [0, 4, 8, 16, 20, 24, 28]}),
    "gap_of_three": ("gap", {"offsets_mm": [0, 4, 8, 24, 28, 32, 36]}),
    "same_position_twice": ("duplicate_position", {"offsets_mm": [0, 4, 8, 8, 12, 16, 20]}),
    "every_slice_an_acquisition": ("converted", {"AcquisitionNumber": [1, 2, 3, 4, 5, 6, 7]}),
    "numbered_slices_same_position": (
        "duplicate_position",
        {"offsets_mm": [0, 4, 8, 8, 12, 16, 20], "AcquisitionNumber": [1, 2, 3, 4, 5, 6, 7]},
    ),
    "interrupted": ("too_few_slices", {"slices": 4}),
    "multi_frame_flag_of_one": ("converted", {"NumberOfFrames": 1}),
    "phase": ("not_magnitude", {"ImageType": ["ORIGINAL\\PRIMARY\\P\\ND"] * 7}),
    "mosaic": ("mosaic", {"ImageType": ["ORIGINAL\\PRIMARY\\M\\ND\\MOSAIC"] * 7}),
    "derived": ("derived", {"ImageType": ["DERIVED\\PRIMARY\\MPR"] * 7}),
    "derived_ungeometric": (
        "derived",
        {"ImageType": ["DERIVED\\SECONDARY"] * 7, "ImagePositionPatient": None, "ImageOrientationPatient": None},
    ),
    "localizer_by_type": ("localizer", {"ImageType": ["ORIGINAL\\PRIMARY\\LOCALIZER"] * 7}),
    "localizer_by_name": ("localizer", {"SeriesDescription": "3-plane loc"}),
    "diffusion": ("diffusion", {"DiffusionBValue": 800.0}),
    "echo_planar": ("echo_planar", {"ScanningSequence": "EP"}),
    "gradient_echo": ("gradient_echo", {"ScanningSequence": "GR"}),
    "stir": ("inversion_recovery", {"ScanningSequence": "IR", "InversionTime": 160.0}),
    "stir_by_name": ("inversion_recovery", {"SeriesDescription": "Sag T2 TIRM"}),
    "volume_acquisition": ("acquisition_3d", {"MRAcquisitionType": "3D"}),
    "fat_suppressed": ("fat_suppressed", {"ScanOptions": "FS"}),
    "t1": ("t1_weighted", T1),
    "proton_density": ("proton_density", {"EchoTime": 25.0}),
    "unknown_contrast": ("unknown_contrast", {"EchoTime": 60.0}),
    "contrast_unnamed": ("unknown_contrast", NO_TIMES),
    "contrast_by_name": ("converted", {**NO_TIMES, "SeriesDescription": "SAG T2 LSPINE"}),
    "knee": ("body_part", {"BodyPartExamined": "KNEE"}),
    "burned_in": ("burned_in", {"BurnedInAnnotation": "YES"}),
    "not_burned_in": ("converted", {"BurnedInAnnotation": "NO"}),
    "ct": ("not_mr", {"Modality": "CT", "SOPClassUID": CT_IMAGE}),
    "modality_missing": ("converted", {"Modality": None}),
    "modality_other": ("converted", {"Modality": "OT"}),
    "class_missing": ("converted", {"SOPClassUID": None}),
    "class_secondary_capture": ("converted", {"SOPClassUID": SECONDARY_CAPTURE}),
    "class_ct": ("converted", {"SOPClassUID": CT_IMAGE}),
    "class_unknown": ("converted", {"SOPClassUID": "1.2.840.113619.4.27"}),
    "object_id_missing": ("converted", {"SOPInstanceUID": None}),
    "object_id_everywhere_equal": ("conflicting_duplicate", {"SOPInstanceUID": "1.2.3.4"}),
    "study_id_missing": ("no_exam_id", {"StudyInstanceUID": None}),
    "series_id_missing": ("no_exam_id", {"SeriesInstanceUID": None}),
    "patient_id_missing": ("no_patient_id", {"PatientID": None}),
    "patient_id_blank": ("no_patient_id", {"PatientID": "  "}),
    "patient_id_spelled_twice": ("converted", {"PatientID": ["abc 1", "ABC 1", " abc  1"] * 2 + ["abc 1"]}),
    "uid_with_letters": ("converted", {"StudyInstanceUID": "1.2.abc.x"}),
    "uid_with_leading_zero": ("converted", {"StudyInstanceUID": "1.02.003.4"}),
    "uid_padded": ("converted", {"StudyInstanceUID": ["1.2.33.4 ", "1.2.33.4", "1.2.33.4\0"] * 2 + ["1.2.33.4"]}),
    "uid_too_long": ("converted", {"StudyInstanceUID": "1." + "9" * 90}),
    "charset_gb18030": ("converted", {"SpecificCharacterSet": "GB18030", "PatientName": "王^小东"}),
    "charset_iso2022": (
        "converted",
        {"SpecificCharacterSet": [["ISO 2022 IR 6", "ISO 2022 IR 87"]] * 7, "PatientName": "Yamada^Tarou=山田^太郎"},
    ),
    "charset_patient_id": ("converted", {"SpecificCharacterSet": "GB18030", "PatientID": "病人7"}),
    "charset_unknown": ("converted", {"SpecificCharacterSet": "KLINGON 1"}),
    "lossy_flag": ("converted", {"LossyImageCompression": "01"}),
}
"""Case → code of the whole stack, and what makes its header odd (None: the element is absent)."""


def _odd_header(name: str) -> Callable[[Exam], object]:
    def fill(exam: Exam) -> object:
        code, header = HEADERS[name]
        return exam.stack(code=code, **header)

    return fill


CASES |= {name: _odd_header(name) for name in HEADERS}


# --- several stacks under one series id ------------------------------------------------------------------------------


@case
def mixed_orientations(exam):
    shared = {"SeriesInstanceUID": uid(exam.patient)}
    exam.stack(**shared)
    exam.stack("axial", "not_sagittal", view="axial", **shared)
    exam.stack("coronal", "localizer", view="coronal", slices=3, **shared)


@case
def localizer_within_the_series(exam):
    shared = {"SeriesInstanceUID": uid(exam.patient)}
    exam.stack(**shared)
    for view in ("axial", "coronal"):
        exam.stack(view, "localizer", view=view, slices=1, **shared)


@case
def matrix_varies(exam):
    shared = {"SeriesInstanceUID": uid(exam.patient)}
    exam.stack(slices=9, **shared)
    exam.stack("small", "not_best", slices=6, shape=(12, 16), **shared)
    exam.stack("few", "too_few_slices", slices=2, shape=(20, 20), **shared)


@case
def pixel_spacing_varies(exam):
    shared = {"SeriesInstanceUID": uid(exam.patient)}
    exam.stack(slices=9, **shared)
    exam.stack("fine", "not_best", PixelSpacing=[[0.5, 0.5]] * 7, **shared)


@case
def two_echoes(exam):
    shared = {"SeriesInstanceUID": uid(exam.patient), "InstanceNumber": [1, 2, 3, 4, 5, 6, 7]}
    exam.stack(EchoNumbers=2, **shared)
    exam.stack("pd", "proton_density", EchoTime=15.0, EchoNumbers=1, **shared)


@case
def eight_echoes(exam):
    for echo in range(1, 9):
        shared = {"SeriesInstanceUID": uid(exam.patient), "EchoNumbers": echo, "EchoTime": 15.0 * echo}
        exam.stack(f"echo{echo}", "multi_echo", slices=5, shape=(8, 8), **shared)


@case
def parts_of_a_complex_image(exam):
    for part, code in (("M", "converted"), ("P", "not_magnitude"), ("R", "not_magnitude"), ("I", "not_magnitude")):
        exam.stack(part, code, SeriesInstanceUID=uid(exam.patient), ImageType=[f"ORIGINAL\\PRIMARY\\{part}\\SE"] * 7)


@case
def dixon(exam):
    codes = {"WATER": "fat_suppressed", "FAT": "dixon", "IN_PHASE": "converted", "OPP_PHASE": "dixon"}
    for part, code in codes.items():
        exam.stack(part, code, SeriesInstanceUID=uid(exam.patient), ImageType=[f"DERIVED\\PRIMARY\\DIXON\\{part}"] * 7)


@case
def dixon_philips(exam):
    codes = {"W": "fat_suppressed", "F": "dixon", "IP": "converted", "OP": "dixon"}
    for part, code in codes.items():
        image_type = [f"DERIVED\\PRIMARY\\{part}\\{part}\\DERIVED"] * 7
        exam.stack(part, code, SeriesInstanceUID=uid(exam.patient), ImageType=image_type, Manufacturer="Philips")


@case
def repeated_by_temporal_position(exam):
    shared = {"SeriesInstanceUID": uid(exam.patient)}
    exam.stack("one", "not_best", TemporalPositionIdentifier=1, AcquisitionTime="100000", **shared)
    exam.stack("two", TemporalPositionIdentifier=2, AcquisitionTime="100500", **shared)


@case
def repeated_by_acquisition(exam):
    shared = {"SeriesInstanceUID": uid(exam.patient)}
    exam.stack("one", "not_best", AcquisitionNumber=1, AcquisitionTime="100000", **shared)
    exam.stack("two", AcquisitionNumber=2, AcquisitionTime="100500", **shared)


@case
def filtered_and_unfiltered(exam):
    shared = {"SeriesInstanceUID": uid(exam.patient)}
    exam.stack("raw", "not_best", ImageType=["ORIGINAL\\PRIMARY\\M\\ND"] * 7, AcquisitionTime="100000", **shared)
    exam.stack("norm", ImageType=["ORIGINAL\\PRIMARY\\M\\NORM"] * 7, AcquisitionTime="100001", **shared)


@case
def interrupted_and_repeated(exam):
    exam.stack("stopped", "too_few_slices", slices=3)
    exam.stack("half", "not_best", slices=6)
    exam.stack("whole", slices=11)


# --- a faulty slice in a sound stack ---------------------------------------------------------------------------------


@case
def last_slice_without_position(exam):
    entries = exam.stack()
    del entries[6].dataset.ImagePositionPatient
    exam.fail(entries, "series_incomplete", {6: "no_geometry"})


@case
def last_slice_burned_in(exam):
    entries = exam.stack()
    entries[6].dataset.BurnedInAnnotation = "YES"
    exam.fail(entries, "series_incomplete", {6: "burned_in"})


@case
def pixels_truncated(exam):
    entries = exam.stack()
    entries[3].finish = lambda content: content[:-300]
    exam.fail(entries, "series_incomplete", {3: "truncated"})


@case
def pixels_shorter_than_promised(exam):
    entries = exam.stack()
    entries[0].dataset.PixelData = entries[0].dataset.PixelData[:-100]
    exam.fail(entries, "series_incomplete", {0: "truncated"})


@case
def pixels_empty(exam):
    entries = exam.stack()
    entries[0].dataset.PixelData = b""
    exam.fail(entries, "series_incomplete", {0: "truncated"})


@case
def pixels_longer_than_promised(exam):
    for entry in exam.stack():
        entry.dataset.PixelData += bytes(64)


@case
def header_cut(exam):
    entries = exam.stack()
    entries[3].finish = lambda content: content[:420]
    exam.fail(entries, "gap", {3: "unreadable_header"})


@case
def slice_of_zero_bytes(exam):
    entries = exam.stack()
    entries[3].finish = lambda content: b""
    exam.fail(entries, "gap", {3: "empty_file"})


@case
def one_slice_in_an_unknown_syntax(exam):
    entries = exam.stack()
    entries[2].dataset.file_meta.TransferSyntaxUID = "1.2.826.0.1.3680043.8.498.999"
    exam.fail(entries, "series_incomplete", {2: "transfer_syntax"})


def _cut_codestream(exam: Exam, syntax) -> None:
    entries = exam.stack()
    for entry in entries:
        transcode(entry.dataset, syntax)
    stream = entries[4].dataset.PixelData
    cut = stream[8:][8 : 8 + (len(stream) - 24) // 2 // 2 * 2]
    entries[4].dataset.PixelData = stream[:8] + struct.pack("<HHI", 0xFFFE, 0xE000, len(cut)) + cut
    entries[4].dataset.PixelData += struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    exam.fail(entries, "series_incomplete", {4: "decode_error"})


@case
def rle_stream_cut(exam):
    _cut_codestream(exam, RLELossless)


@case
def jpeg_ls_stream_cut(exam):
    _cut_codestream(exam, JPEGLSLossless)


@case
def jpeg_2000_stream_cut(exam):
    _cut_codestream(exam, JPEG2000Lossless)


# --- copies and collisions -------------------------------------------------------------------------------------------


def _copy(dataset: Dataset) -> Dataset:
    """Copy as a file would be: read back from its bytes."""
    return dcmread(io.BytesIO(to_bytes(dataset)))


@case
def identical_copies(exam):
    entries = exam.stack()
    for index in (0, 3):
        twins = exam.add(to_bytes(entries[index].dataset), "duplicate")
        entries[index].content = twins.content
        twins.twins = entries[index].twins = f"{exam.patient}-{index}"


@case
def copies_in_another_syntax(exam):
    entries = exam.stack()
    copy = transcode(_copy(entries[2].dataset), JPEGLSLossless)
    copy.InstanceNumber, copy.StationName = 99, "ARCHIVE"
    exam.add(copy, "duplicate", twins=exam.patient)
    entries[2].twins = exam.patient


@case
def copy_with_other_pixels(exam):
    entries = exam.stack()
    copy = _copy(entries[2].dataset)
    copy.PixelData = bytes(len(copy.PixelData))
    exam.add(copy, "conflicting_duplicate")
    exam.fail(entries, "series_incomplete", {2: "conflicting_duplicate"})


@case
def copy_at_another_position(exam):
    entries = exam.stack()
    copy = _copy(entries[6].dataset)
    copy.ImagePositionPatient = position_of(VIEWS["sagittal"][0], 28.0)
    exam.add(copy, "conflicting_duplicate")
    exam.fail(entries, "series_incomplete", {6: "conflicting_duplicate"})


@case
def copies_of_a_series_not_wanted(exam):
    entries = exam.stack("t1", "t1_weighted", **T1)
    exam.add(to_bytes(entries[0].dataset), "t1_weighted")


@case
def series_id_in_two_studies(exam):
    for study in ("s1", "s2"):
        exam.stack(study=study, SeriesInstanceUID="1.2.3.5", SOPInstanceUID=[f"1.2.3.5.{k}" for k in range(7)])


@case
def series_id_in_two_patients(exam):
    for patient in ("collides A", "collides B"):
        exam.stack(study=patient, PatientID=patient, SeriesInstanceUID="1.2.3.6")


@case
def study_id_in_two_patients(exam):
    for patient in ("shares A", "shares B"):
        exam.stack(patient, "patient_mismatch", PatientID=patient, slices=5)


# --- pixels ----------------------------------------------------------------------------------------------------------


@case
def monochrome1(exam):
    pixels = draw((exam.patient,), (7, *SHAPE))
    header = {"BitsStored": 12, "HighBit": 11, "PhotometricInterpretation": "MONOCHROME1"}
    exam.stack(pixels=pixels, truth_SHW=4095 - pixels, **header)


@case
def signed(exam):
    exam.stack(pixels=draw((exam.patient,), (7, *SHAPE)).astype(np.int16) - 2000)


@case
def padded(exam):
    pixels = draw((exam.patient,), (7, *SHAPE)).astype(np.int16)
    pixels[:, :3], pixels[:, -2:] = -32768, -2000
    entries = exam.stack(pixels=pixels)
    for entry in entries:
        entry.dataset.add_new("PixelPaddingValue", "SS", -32768)


@case
def junk_in_high_bits(exam):
    pixels = draw((exam.patient,), (7, *SHAPE))
    exam.stack(pixels=pixels | 0x9000, truth_SHW=pixels, BitsStored=12, HighBit=11)


@case
def signed_12_bits(exam):
    pixels = draw((exam.patient,), (7, *SHAPE)).astype(np.int16) - 2000
    exam.stack(pixels=pixels & 0x0FFF, truth_SHW=pixels, BitsStored=12, HighBit=11)


@case
def eight_bits(exam):
    exam.stack(pixels=draw((exam.patient,), (7, *SHAPE), high=255).astype(np.uint8))


@case
def thirty_two_bits_that_fit(exam):
    exam.stack(pixels=draw((exam.patient,), (7, *SHAPE)).astype(np.uint32))


@case
def thirty_two_bits_that_do_not(exam):
    pixels = draw((exam.patient,), (7, *SHAPE)).astype(np.uint32) * 100
    exam.stack(code="bit_depth", pixels=pixels)


@case
def signedness_varies(exam):
    entries = exam.stack()
    entries[2].dataset.PixelRepresentation = 1


@case
def signedness_varies_and_does_not_fit(exam):
    entries = exam.stack(code="mixed_pixels", pixels=draw((exam.patient,), (7, *SHAPE)) + 40000)
    entries[2].dataset.PixelRepresentation = 1


@case
def rescale_per_slice(exam):
    exam.stack(RescaleSlope=[1, 2, 3, 4, 5, 6, 7], RescaleIntercept=[-5] * 7)


@case
def rgb(exam):
    for entry in exam.stack(code="rgb"):
        header = entry.dataset
        header.SamplesPerPixel, header.PhotometricInterpretation, header.PlanarConfiguration = 3, "RGB", 0
        header.PixelData *= 3


# --- transfer syntaxes and file format -------------------------------------------------------------------------------

LOSSLESS = {
    "implicit": ImplicitVRLittleEndian,
    "big_endian": ExplicitVRBigEndian,
    "deflated": DeflatedExplicitVRLittleEndian,
    "rle": RLELossless,
    "jpeg_lossless": JPEGLossless,
    "jpeg_lossless_first_order": JPEGLosslessSV1,
    "jpeg_ls": JPEGLSLossless,
    "jpeg_2000": JPEG2000Lossless,
}
LOSSY = {"jpeg_ls_near_lossless": JPEGLSNearLossless, "jpeg_2000_lossy": JPEG2000}


def _in_syntax(syntax) -> Callable[[Exam], object]:
    def fill(exam: Exam) -> None:
        entries = exam.stack()
        for entry in entries:
            transcode(entry.dataset, syntax)
        if syntax in LOSSY.values():
            exam.expect(entries, np.stack([pixel_array(_copy(entry.dataset), raw=True) for entry in entries]))

    return fill


CASES |= {name: _in_syntax(syntax) for name, syntax in {**LOSSLESS, **LOSSY}.items()}


@case
def syntax_without_decoder(exam):
    for entry in exam.stack(code="transfer_syntax"):
        transcode(entry.dataset, JPEGLSLossless)
        entry.dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.100"


@case
def without_preamble(exam):
    for entry in exam.stack():
        entry.finish = lambda content: content[132:]


@case
def without_preamble_and_meta(exam):
    for entry in exam.stack():
        entry.finish = _without_meta


@case
def without_preamble_and_meta_implicit(exam):
    for entry in exam.stack():
        transcode(entry.dataset, ImplicitVRLittleEndian)
        entry.finish = _without_meta


def _without_meta(content: bytes) -> bytes:
    (length,) = struct.unpack("<I", content[140:144])
    return content[144 + length :]


@case
def meta_contradicts(exam):
    for entry in exam.stack():
        entry.dataset.file_meta.MediaStorageSOPClassUID = SECONDARY_CAPTURE
        entry.dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3"


@case
def huge_private_elements(exam):
    for entry in exam.stack(slices=5):
        block = entry.dataset.private_block(0x0029, "SIEMENS CSA HEADER", create=True)
        block.add_new(0x10, "OB", bytes(range(256)) * 2048)


@case
def deeply_nested_private_elements(exam):
    for entry in exam.stack():
        inner = Dataset()
        for _ in range(60):
            outer = Dataset()
            outer.private_block(0x2005, "Philips MR Imaging DD 001", create=True).add_new(0x0E, "SQ", Sequence([inner]))
            inner = outer
        entry.dataset.update(inner)


@case
def bottomless_nesting(exam):
    item = struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
    level = struct.pack("<HH2sHI", 0x0008, 0x1140, b"SQ", 0, 0xFFFFFFFF) + item
    entries = exam.stack("nested", "unreadable_header", slices=1)
    entries[0].finish = lambda content: content[:144] + _without_meta_length(content) + level * 3000


def _without_meta_length(content: bytes) -> bytes:
    (length,) = struct.unpack("<I", content[140:144])
    return content[144 : 144 + length]


# --- enhanced multi-frame --------------------------------------------------------------------------------------------

ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.4.1"


def make_enhanced(pixels_SHW: np.ndarray, order: list[int], *, view="sagittal", offsets_mm=None, **options) -> Dataset:
    """One enhanced MR image; frame k shows slice `order[k]`."""
    echo_ms, repetition_ms = options.pop("echo_ms", 112.7), options.pop("repetition_ms", 3500.0)
    orientation, turned = VIEWS[view]
    frames = np.stack([turned(pixels_SHW[index]) for index in order])
    removed = dict.fromkeys(
        ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "EchoTime", "RepetitionTime")
        + ("EchoTrainLength", "ScanningSequence", "SequenceVariant", "MRAcquisitionType")
    )
    dataset = make_dataset(frames[0], SOPClassUID=ENHANCED_MR, **options, **removed)
    dataset.file_meta.MediaStorageSOPClassUID = ENHANCED_MR
    dataset.NumberOfFrames, dataset.PixelData = len(frames), frames.astype("<u2").tobytes()
    dataset.MRAcquisitionType, dataset.ImageType = "2D", ["ORIGINAL", "PRIMARY", "T2", "NONE"]
    dataset.EchoPulseSequence, dataset.InversionRecovery = "SPIN", "NO"
    shared = Dataset()
    shared.PixelMeasuresSequence = [_item(PixelSpacing=[1.0, 1.0], SliceThickness=3.5)]
    shared.PlaneOrientationSequence = [_item(ImageOrientationPatient=list(orientation))]
    shared.MREchoSequence = [_item(EffectiveEchoTime=echo_ms)]
    shared.MRTimingAndRelatedParametersSequence = [
        _item(RepetitionTime=repetition_ms, FlipAngle=90, EchoTrainLength=27)
    ]
    shared.MRImageFrameTypeSequence = [_item(FrameType=["ORIGINAL", "PRIMARY", "T2", "NONE"])]
    dataset.SharedFunctionalGroupsSequence = [shared]
    offsets_mm = offsets_mm or [PITCH_MM * index for index in range(len(pixels_SHW))]
    dataset.PerFrameFunctionalGroupsSequence = [
        _item(
            PlanePositionSequence=[_item(ImagePositionPatient=position_of(orientation, offsets_mm[index]))],
            FrameContentSequence=[_item(InStackPositionNumber=frame + 1, StackID="1")],
        )
        for frame, index in enumerate(order)
    ]
    return dataset


def _item(**elements) -> Dataset:
    dataset = Dataset()
    for name, value in elements.items():
        setattr(dataset, name, value)
    return dataset


def _enhanced(exam: Exam, series="enhanced", code="converted", **options) -> Entry:
    pixels = draw((exam.patient, series), (7, *SHAPE))
    options = {"order": [4, 0, 6, 2, 5, 1, 3], "patient": exam.patient, "series": series, **options}
    syntax = options.pop("syntax", None)
    dataset = make_enhanced(pixels, **options)
    if syntax:
        transcode(dataset, syntax)
    entry = exam.add(dataset, code)
    if code == "converted":
        exam.expect([entry], pixels)
    return entry


@case
def enhanced(exam):
    _enhanced(exam)
    _enhanced(exam, "t1", "t1_weighted", echo_ms=12.0, repetition_ms=600.0)
    _enhanced(exam, "axial", "not_sagittal", view="axial")


@case
def enhanced_turned(exam):
    _enhanced(exam, view="both_reversed")


@case
def enhanced_rle(exam):
    _enhanced(exam, syntax=RLELossless)


@case
def enhanced_with_a_gap(exam):
    _enhanced(exam, code="gap", offsets_mm=[0, 4, 8, 16, 20, 24, 28])


@case
def enhanced_truncated(exam):
    _enhanced(exam, code="truncated").finish = lambda content: content[:-100]


@case
def enhanced_without_positions(exam):
    entry = _enhanced(exam, code="no_geometry")
    for frame in entry.dataset.PerFrameFunctionalGroupsSequence:
        del frame.PlanePositionSequence


@case
def enhanced_and_its_classic_copies(exam):
    _enhanced(exam, AcquisitionDateTime="20200102100000")
    pixels = draw((exam.patient, "enhanced"), (7, *SHAPE))
    image_type = ["ORIGINAL\\PRIMARY\\M\\MFSPLIT"] * 7
    exam.stack(
        "split", "not_best", pixels=pixels, ImageType=image_type, AcquisitionDate="20200102", AcquisitionTime="095959"
    )


@case
def frames_without_functional_groups(exam):
    entry = exam.stack("cine", "multiframe", slices=1)[0]
    entry.dataset.NumberOfFrames = 3
    entry.dataset.PixelData *= 3


# --- objects and files without an image ------------------------------------------------------------------------------

NON_IMAGES = {
    "report": ("1.2.840.10008.5.1.4.1.1.88.22", "SR"),
    "presentation_state": ("1.2.840.10008.5.1.4.1.1.11.1", "PR"),
    "key_objects": ("1.2.840.10008.5.1.4.1.1.88.59", "KO"),
    "registration": ("1.2.840.10008.5.1.4.1.1.66.1", "REG"),
    "raw_data": ("1.2.840.10008.5.1.4.1.1.66", "MR"),
    "encapsulated_pdf": ("1.2.840.10008.5.1.4.1.1.104.1", "DOC"),
    "ge_private": ("1.2.840.113619.4.27", "MR"),
}


@case
def objects_without_pixels(exam):
    for number, (sop_class, modality) in enumerate(NON_IMAGES.values()):
        header = dict.fromkeys(("Rows", "Columns", "PixelData", "BitsAllocated", "BitsStored", "HighBit"))
        dataset = make_dataset(
            np.zeros((2, 2), np.uint16), patient=exam.patient, series="other", number=number, **header
        )
        dataset.SOPClassUID, dataset.Modality = sop_class, modality
        dataset.file_meta.MediaStorageSOPClassUID = sop_class
        if modality == "DOC":
            dataset.EncapsulatedDocument, dataset.MIMETypeOfEncapsulatedDocument = b"%PDF-1.4\n", "application/pdf"
        exam.add(dataset, "no_pixels")


@case
def spectroscopy(exam):
    for entry in exam.stack("spectrum", "no_pixels", slices=1):
        del entry.dataset.PixelData
        entry.dataset.SpectroscopyData = np.arange(64, dtype="<f4").tobytes()


@case
def segmentation(exam):
    for entry in exam.stack("mask", "not_mr", slices=1, Modality="SEG", SOPClassUID="1.2.840.10008.5.1.4.1.1.66.4"):
        entry.dataset.NumberOfFrames = 1


@case
def screenshots(exam):
    bare = dict.fromkeys(("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"))
    shared = {"SOPClassUID": SECONDARY_CAPTURE, "slices": 2, **bare}
    exam.stack("scan", "secondary_capture", Modality="OT", **shared)
    exam.stack("classless", "secondary_capture", Modality="SC", **{**shared, "SOPClassUID": None})
    exam.stack("mr", "secondary_capture", **shared)


def _archive_bytes() -> dict[str, bytes]:
    payload = to_bytes(make_dataset(np.ones((4, 4), np.uint16), patient="archived"))
    zipped, tarred = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("image.dcm", payload)
    with tarfile.open(fileobj=tarred, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("image.dcm"), io.BytesIO(b""))
    seven_zip = b"7z\xbc\xaf\x27\x1c\0\x04" + bytes(40)
    packed = {"x.gz": gzip.compress(payload), "x.bz2": bz2.compress(payload), "x.xz": lzma.compress(payload)}
    return {"x.zip": zipped.getvalue(), "x.tar": tarred.getvalue(), "x.7z": seven_zip, **packed}


@case
def archives(exam):
    for name, content in _archive_bytes().items():
        exam.add(content, "archive", name=name.encode())


@case
def dicomdir(exam):
    index = Dataset()
    index.FileSetID, index.DirectoryRecordSequence = "DISC", []
    index.file_meta = FileMetaDataset()
    index.file_meta.MediaStorageSOPClassUID, index.file_meta.MediaStorageSOPInstanceUID = "1.2.840.10008.1.3.10", "1.2"
    index.file_meta.TransferSyntaxUID = make_dataset(np.ones((1, 1), np.uint16)).file_meta.TransferSyntaxUID
    exam.add(index, "dicomdir", name=b"DICOMDIR")


JUNK = {
    b"Thumbs.db": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(504),
    b"._IM0001": b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(64),
    b".DS_Store": b"\0\0\0\1Bud1" + bytes(64),
    b"letter.pdf": b"%PDF-1.4\n%%EOF\n",
    b"photo.jpg": b"\xff\xd8\xff\xe0\0\x10JFIF\0" + bytes(64),
    b"list.xml": b"<?xml version='1.0'?><a/>",
    b"one-byte": b"\x08",
    b"notes.txt": b"T2 sag lumbar, repeat\n",
    b"zeros": bytes(4096),
    b"noise.dcm": random.Random(1).randbytes(4096),
    b"plausible-start": b"\x08\0\x05\0" + random.Random(2).randbytes(4096),
}


@case
def other_files(exam):
    for name, content in JUNK.items():
        exam.add(content, "not_dicom", name=name)
    exam.add(b"", "empty_file", name=b"empty.dcm")
    exam.add(b"", "empty_file")


@case
def preamble_only(exam):
    exam.add(bytes(128) + b"DICM", "unreadable_header")


@case
def links_and_pipes(exam):
    exam.stack()
    exam.add(None, "symlink", make=lambda path: path.symlink_to(path.parent))
    exam.add(None, "symlink", make=lambda path: path.symlink_to("/nowhere/at/all"))
    exam.add(None, "symlink", make=lambda path: path.symlink_to(path.name))
    exam.add(None, "special_file", make=os.mkfifo)


@case
def odd_file_names(exam):
    names = [b"\xff\xfe\x80 not utf-8", b"new\nline", b"-rf", b"quote'\".dcm", b" leading and trailing ", b"x" * 255]
    for entry, name in zip(exam.stack(), [*names, "müller=山.dcm".encode()], strict=True):
        entry.name = name


@case
def deep_folders(exam):
    for number, entry in enumerate(exam.stack()):
        entry.name = b"/".join([b"a-rather-long-folder-name"] * 30 + [b"image%d" % number])


# --- laying it out ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HostileTree:
    """A tree on disk, and what must become of it."""

    root: Path
    expected: dict[str, str]
    """Path relative to the root (surrogate-escaped) → code."""
    volumes: dict[tuple[str, str], np.ndarray]
    """(study UID, series UID) → (S, H, W) canonical stored values; nothing else may be in the store."""
    case_of: dict[str, str]
    """Path → name of the case."""


def build_hostile_tree(root: Path, *, shuffle_seed: int | None = None, cases: list[str] | None = None) -> HostileTree:
    """Write the tree.

    Parameters
    ----------
    root
        Made here; must not exist.
    shuffle_seed
        None: a folder per case and files in order. Else: names, folders, instance numbers and the order of creation
        are drawn from this seed, the contents that matter are the same.
    cases
        Names of `CASES`; None writes all.
    """
    with disable_value_validation(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom warns of much that is done here on purpose
        return _build(root, random.Random(shuffle_seed) if shuffle_seed is not None else None, cases or list(CASES))


def _build(root: Path, shuffle: random.Random | None, cases: list[str]) -> HostileTree:
    expected, volumes, case_of = {}, {}, {}
    placed: list[tuple[str, Entry]] = []
    for name in cases:
        exam = Exam(name)
        CASES[name](exam)
        volumes |= exam.volumes
        paths = list(_paths(exam, shuffle))
        placed += zip(paths, exam.entries, strict=True)
        case_of |= dict.fromkeys(paths, name)
        expected |= _codes(paths, exam.entries)
    if shuffle:
        shuffle.shuffle(placed)
    for path, entry in placed:
        if shuffle and isinstance(entry.content, Dataset) and "InstanceNumber" in entry.content:
            entry.content.InstanceNumber = shuffle.randrange(10_000)
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        entry.write(target)
    return HostileTree(root, expected, volumes, case_of)


def _paths(exam: Exam, shuffle: random.Random | None) -> Iterator[str]:
    for number, entry in enumerate(exam.entries):
        name = os.fsdecode(entry.name) or f"IM{number:04d}"
        if shuffle is None:
            yield f"{exam.patient}/{name}"
            continue
        folders = [f"d{shuffle.randrange(6)}" for _ in range(shuffle.randrange(4))]
        yield "/".join([*folders, f"{shuffle.getrandbits(64):016x}{shuffle.choice(['', '.dcm', '.IMA', '.zip'])}"])


def _codes(paths: list[str], entries: list[Entry]) -> dict[str, str]:
    codes = {path: entry.code for path, entry in zip(paths, entries, strict=True)}
    groups: dict[str, list[str]] = {}
    for path, entry in zip(paths, entries, strict=True):
        if entry.twins:
            groups.setdefault(entry.twins, []).append(path)
    for twins in groups.values():
        codes |= {path: "duplicate" if number else "converted" for number, path in enumerate(sorted(twins))}
    return codes
