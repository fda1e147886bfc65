"""Every way in which clinical trees break converters, one case each, and what must become of its files.

A case fills one exam with entries; the code that an entry must end as stands beside it.
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
import zipfile
from typing import TYPE_CHECKING

import numpy as np
from dicom_factory import make_dataset, transcode, uid
from hostile_exam import (
    SHAPE,
    VIEWS,
    Entry,
    Exam,
    draw,
    item,
    make_enhanced,
    position_of,
    to_bytes,
)
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.pixels import pixel_array
from pydicom.sequence import Sequence
from pydicom.uid import (
    JPEG2000,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

if TYPE_CHECKING:
    from collections.abc import Callable

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
    "steep": ("converted", {"view": "steep"}),
    "too_steep": ("not_sagittal", {"view": "too_steep"}),
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
def one_slice_of_another_matrix(exam):
    pixels = draw((exam.patient,), (7, *SHAPE))
    entries = exam.stack("t2", "gap", pixels=pixels)
    entry = entries[3]
    entry.code, entry.dataset.Rows = "too_few_slices", 30
    entry.dataset.PixelData = pixels[3, :30].tobytes()


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
def middle_slice_without_position(exam):
    entries = exam.stack()
    del entries[3].dataset.ImagePositionPatient
    exam.fail(entries, "series_incomplete", {3: "no_geometry"})


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


@case
def absurd_matrix(exam):
    exam.stack(code="truncated", Rows=65535, Columns=65535)


def _other_size(syntax, shape: tuple[int, int]) -> Callable[[Exam], object]:
    def fill(exam: Exam) -> None:
        entries = exam.stack()
        for entry in entries:
            transcode(entry.dataset, syntax)
        other = make_dataset(draw((exam.patient,), shape))
        entries[2].dataset.PixelData = transcode(other, syntax).PixelData
        exam.fail(entries, "series_incomplete", {2: "decode_error"})

    return fill


CASES |= {
    f"{name}_of_{shape[0]}_rows": _other_size(syntax, shape)
    for name, syntax in (("rle", RLELossless), ("jpeg_ls", JPEGLSLossless), ("jpeg_2000", JPEG2000Lossless))
    for shape in ((16 if syntax != JPEG2000Lossless else 32, 32), (64, 64))
}


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
def float_pixels(exam):
    for entry in exam.stack(code="bit_depth"):
        values = np.frombuffer(entry.dataset.PixelData, "<u2").astype("<f4")
        del entry.dataset.PixelData, entry.dataset.BitsStored, entry.dataset.HighBit
        entry.dataset.FloatPixelData, entry.dataset.BitsAllocated = values.tobytes(), 32


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
def frame_in_three_fragments(exam):
    for entry in exam.stack():
        frame = next(generate_frames(transcode(entry.dataset, JPEGLSLossless).PixelData, number_of_frames=1))
        entry.dataset.PixelData = encapsulate([frame], fragments_per_frame=3, has_bot=False)


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


# --- enhanced multi-frame images ---


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
def enhanced_twice(exam):
    entry = _enhanced(exam)
    copy = exam.add(to_bytes(entry.dataset), "duplicate", twins=exam.patient)
    entry.content, entry.twins = copy.content, exam.patient


@case
def enhanced_rescale_per_frame(exam):
    entry = _enhanced(exam, order=list(range(7)))
    for number, frame in enumerate(entry.dataset.PerFrameFunctionalGroupsSequence):
        frame.PixelValueTransformationSequence = [item(RescaleSlope=number + 1, RescaleIntercept=-5)]


@case
def enhanced_with_a_scout_frame(exam):
    dataset = _enhanced(exam).dataset
    scout = item(
        PlanePositionSequence=[item(ImagePositionPatient=position_of(VIEWS["axial"][0], 0.0))],
        PlaneOrientationSequence=[item(ImageOrientationPatient=list(VIEWS["axial"][0]))],
    )
    dataset.PerFrameFunctionalGroupsSequence.append(scout)
    dataset.NumberOfFrames, dataset.PixelData = 8, dataset.PixelData + dataset.PixelData[: 2 * SHAPE[0] * SHAPE[1]]


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
