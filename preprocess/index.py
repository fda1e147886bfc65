"""Walk a messy tree and read headers only: one row per file, whatever the file is.

Nothing raised by a file crosses this module: a file that cannot be read becomes a row with a code. Rows hold raw
identifiers, so they stay in memory or in the private folder.
"""

from __future__ import annotations

import os
import struct
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import pydicom
from pydicom import config as pydicom_config
from pydicom.tag import Tag
from pydicom.uid import DeflatedExplicitVRLittleEndian

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydicom.tag import BaseTag

TAGS = {
    "SOPClassUID": "sop_class",
    "SOPInstanceUID": "sop_uid",
    "StudyInstanceUID": "study_uid",
    "SeriesInstanceUID": "series_uid",
    "PatientID": "patient_id",
    "IssuerOfPatientID": "issuer",
    "AccessionNumber": "accession",
    "AcquisitionDate": "acquisition_date",
    "AcquisitionTime": "acquisition_time",
    "Modality": "modality",
    "Manufacturer": "manufacturer",
    "ManufacturerModelName": "model",
    "SeriesDescription": "series_description",
    "ProtocolName": "protocol",
    "StudyDescription": "study_description",
    "BodyPartExamined": "body_part",
    "BurnedInAnnotation": "burned_in",
    "ContrastBolusAgent": "contrast_agent",
    "PhotometricInterpretation": "photometric",
    "MRAcquisitionType": "acquisition_type",
    "PatientPosition": "patient_position",
    "LossyImageCompression": "lossy",
}
"""Text elements read from every header → field of `FileRow`."""

LIST_TAGS = {
    "ImageType": "image_type",
    "ScanningSequence": "scanning_sequence",
    "SequenceVariant": "sequence_variant",
    "ScanOptions": "scan_options",
}
"""Multi-valued code strings → field."""

NUMBER_TAGS = {
    "Rows": "rows",
    "Columns": "columns",
    "NumberOfFrames": "num_frames",
    "SamplesPerPixel": "samples",
    "BitsStored": "bits_stored",
    "EchoTime": "echo_time_ms",
    "RepetitionTime": "repetition_time_ms",
    "InversionTime": "inversion_time_ms",
    "EchoTrainLength": "echo_train_length",
    "EchoNumbers": "echo_number",
    "FlipAngle": "flip_angle_deg",
    "MagneticFieldStrength": "field_strength_t",
    "SliceThickness": "slice_thickness_mm",
    "NumberOfAverages": "averages",
    "PixelBandwidth": "bandwidth_hz",
    "DiffusionBValue": "b_value",
    "AcquisitionNumber": "acquisition_number",
    "TemporalPositionIdentifier": "temporal_position",
}
"""Numbers → field; absent or malformed ones are None."""

VECTOR_TAGS = {"ImagePositionPatient": 3, "ImageOrientationPatient": 6, "PixelSpacing": 2}
"""Geometry vectors → their length."""

_TEXTS = [(Tag(name), field) for name, field in TAGS.items()]
_LISTS = [(Tag(name), field) for name, field in LIST_TAGS.items()]
_NUMBERS = [(Tag(name), field) for name, field in NUMBER_TAGS.items()]
_VECTORS = [(Tag(name), length) for name, length in VECTOR_TAGS.items()]
_FUNCTIONAL_GROUPS = Tag("SharedFunctionalGroupsSequence")
_ALL_TAGS: list[BaseTag] = [
    *(tag for tag, _ in (*_TEXTS, *_LISTS, *_NUMBERS, *_VECTORS)),
    _FUNCTIONAL_GROUPS,
]
_ASCII_TEXT = {"UI", "CS", "DS", "IS", "DA", "TM", "LO", "SH", "AE"}
"""Value representations whose ASCII bytes are their text. Implicit VR has none and takes pydicom's way."""

_SIGNATURES = ((b"PK\x03\x04", "zip"), (b"\x1f\x8b", "gzip"), (b"BZh", "bzip2"), (b"7z\xbc\xaf", "7z"))
_MIN_FORCED_ELEMENT = 8
_PIXEL_ELEMENTS = (0x0008, 0x0009, 0x0010)
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_DICOMDIR = "1.2.840.10008.1.3.10"


@dataclass(frozen=True, slots=True)
class WalkedFile:
    """One entry of the tree."""

    path: str
    """Relative to the tree, surrogate-escaped."""
    size_bytes: int
    fault: str = ""
    """Code when the entry is not even opened (link, pipe, unlistable folder)."""


@dataclass(frozen=True, slots=True)
class FileRow:
    """What the header of one file says. Numbers are None and texts empty when absent."""

    path: str
    size_bytes: int
    fault: str = ""
    """Code that settles the file by itself, or empty for an image that selection decides on."""
    sop_class: str = ""
    sop_uid: str = ""
    study_uid: str = ""
    series_uid: str = ""
    patient_id: str = ""
    issuer: str = ""
    accession: str = ""
    acquisition_date: str = ""
    acquisition_time: str = ""
    modality: str = ""
    manufacturer: str = ""
    model: str = ""
    series_description: str = ""
    protocol: str = ""
    study_description: str = ""
    body_part: str = ""
    burned_in: str = ""
    contrast_agent: str = ""
    photometric: str = ""
    acquisition_type: str = ""
    patient_position: str = ""
    lossy: str = ""
    image_type: tuple[str, ...] = ()
    scanning_sequence: tuple[str, ...] = ()
    sequence_variant: tuple[str, ...] = ()
    scan_options: tuple[str, ...] = ()
    rows: float | None = None
    columns: float | None = None
    num_frames: float | None = None
    samples: float | None = None
    bits_stored: float | None = None
    echo_time_ms: float | None = None
    repetition_time_ms: float | None = None
    inversion_time_ms: float | None = None
    echo_train_length: float | None = None
    echo_number: float | None = None
    flip_angle_deg: float | None = None
    field_strength_t: float | None = None
    slice_thickness_mm: float | None = None
    averages: float | None = None
    bandwidth_hz: float | None = None
    b_value: float | None = None
    acquisition_number: float | None = None
    temporal_position: float | None = None
    position_mm: tuple[float, ...] = ()
    """Image position (x, y, z) in patient LPS, mm: centre of the first pixel. Empty when absent."""
    orientation: tuple[float, ...] = ()
    """Unit vectors along increasing column index, then along increasing row index. Empty when absent."""
    spacing_mm: tuple[float, ...] = ()
    """Pixel spacing: between rows first, then between columns (DICOM's order). Empty when absent."""


def walk(root: Path) -> list[WalkedFile]:
    """List every entry below a folder that is not itself a listable folder, sorted by path.

    Symbolic links are listed, never followed: a loop ends there.
    """
    return sorted(_walk(root, ""), key=lambda entry: entry.path)


def _walk(root: Path, prefix: str) -> Iterator[WalkedFile]:
    pending = [prefix]
    while pending:
        folder = pending.pop()
        try:
            entries = list(os.scandir(root / folder))
        except OSError:
            yield WalkedFile(folder or ".", 0, "unreadable_folder")
            continue
        for entry in entries:
            path = os.path.join(folder, entry.name)  # a relative string, ten times faster
            if entry.is_symlink():
                yield WalkedFile(path, 0, "symlink")
            elif entry.is_dir():
                pending.append(path)
            elif entry.is_file():
                yield WalkedFile(path, _size(entry))
            else:
                yield WalkedFile(path, 0, "special_file")


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except OSError:
        return 0


def index_files(root: str, files: list[WalkedFile]) -> list[FileRow]:
    """Read the headers of a batch of files.

    Parameters
    ----------
    root
        The tree.
    files
        Entries of `walk`.

    Returns
    -------
    list of FileRow
        One per entry, in order. No error is raised for any content.
    """
    pydicom_config.settings.reading_validation_mode = pydicom_config.IGNORE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [index_file(root, file) for file in files]


def index_file(root: str, file: WalkedFile) -> FileRow:
    """Read one header; see `index_files`."""
    if file.fault or not file.size_bytes:
        return FileRow(file.path, file.size_bytes, file.fault or "empty_file")
    try:
        with Path(root, file.path).open("rb") as stream:
            return _read(stream, file)
    except OSError:
        return FileRow(file.path, file.size_bytes, "unreadable_file")
    except Exception as error:  # a hostile header may raise anything
        return FileRow(file.path, file.size_bytes, f"unreadable_header:{type(error).__name__}")


def _read(stream: BinaryIO, file: WalkedFile) -> FileRow:
    kind = _sniff(stream)
    if kind not in {"dicom", "bare"}:
        code = "archive" if kind in {name for _, name in _SIGNATURES} else "not_dicom"
        return FileRow(file.path, file.size_bytes, code)
    stream.seek(0)
    header = pydicom.dcmread(stream, stop_before_pixels=True, specific_tags=_ALL_TAGS, force=kind == "bare")
    meta = header.file_meta
    if str(meta.get("MediaStorageSOPClassUID", "")) == _DICOMDIR:
        return FileRow(file.path, file.size_bytes, "dicomdir")
    if kind == "bare" and "SOPInstanceUID" not in header and "Rows" not in header:
        return FileRow(file.path, file.size_bytes, "not_dicom")
    deflated = str(meta.get("TransferSyntaxUID", "")) == DeflatedExplicitVRLittleEndian
    has_pixels = "Rows" in header and (deflated or _at_pixels(stream, header))
    return _row(header, file, has_pixels=has_pixels)


def _sniff(stream: BinaryIO) -> str:
    """Tell DICOM with preamble, DICOM without one (``bare``), an archive's name, or ``other``."""
    head = stream.read(132)
    if head[128:] == b"DICM":
        return "dicom"
    for signature, name in _SIGNATURES:
        if head.startswith(signature):
            return name
    if len(head) < _MIN_FORCED_ELEMENT:
        return "other"
    little, big = struct.unpack("<HH", head[:4]), struct.unpack(">HH", head[:4])
    # Without a preamble only a first element of group 2 or 8 with a small element number is plausible.
    plausible = any(group in {0x0002, 0x0008} and element <= 0x0100 for group, element in (little, big))
    return "bare" if plausible else "other"


def _at_pixels(stream: BinaryIO, header: pydicom.Dataset) -> bool:
    """Whether the parser stopped in front of pixel data."""
    tag = stream.read(4)
    order = "<HH" if header.original_encoding[1] is not False else ">HH"
    if len(tag) < 4:
        return False
    group, element = struct.unpack(order, tag)
    return group == 0x7FE0 and element in _PIXEL_ELEMENTS


def _row(header: pydicom.Dataset, file: WalkedFile, *, has_pixels: bool) -> FileRow:
    values: dict[str, Any] = {field: _text(header, tag) for tag, field in _TEXTS}
    values |= {field: _texts(header, tag) for tag, field in _LISTS}
    values |= {field: _number(header, tag) for tag, field in _NUMBERS}
    position, orientation, spacing = (_vector(header, tag, length) for tag, length in _VECTORS)
    row = FileRow(
        file.path,
        file.size_bytes,
        **values,
        position_mm=position,
        orientation=orientation,
        spacing_mm=spacing,
        fault="" if has_pixels else "no_pixels",
    )
    return row if row.fault else _with_fault(row, enhanced=_FUNCTIONAL_GROUPS in header)


def _with_fault(row: FileRow, *, enhanced: bool) -> FileRow:
    """Settle what the file alone decides; the first rule that fires names the code."""
    rules = (
        (row.burned_in == "YES", "burned_in"),
        (row.modality not in {"", "MR", "OT", "SC"}, "not_mr"),
        (row.samples not in {None, 1} or not (row.photometric or "MONOCHROME").startswith("MONOCHROME"), "rgb"),
        (enhanced or (row.num_frames or 1) > 1, "multiframe"),
        (row.sop_class.startswith(_SECONDARY_CAPTURE) and not row.position_mm, "secondary_capture"),
        (not (row.study_uid and row.series_uid), "no_exam_id"),
        (not row.patient_id, "no_patient_id"),
    )
    code = next((code for fired, code in rules if fired), "")
    return replace(row, fault=code) if code else row


def _value(header: pydicom.Dataset, tag: BaseTag) -> Any:  # noqa: ANN401  (text, or pydicom's value)
    """Value of an element; plain ASCII text without pydicom's conversion, which costs half of an index's time."""
    try:
        element = header.get_item(tag)
        if element is None:
            return None
        raw = element.value
        if isinstance(raw, bytes) and raw.isascii() and b"\x1b" not in raw and element.VR in _ASCII_TEXT:
            return raw.decode("ascii")
        return header[tag].value
    except Exception:  # one malformed element must not lose the others
        return None


def _text(header: pydicom.Dataset, tag: BaseTag) -> str:
    value = _value(header, tag)
    return "" if value is None else str(value).strip(" \0")


def _texts(header: pydicom.Dataset, tag: BaseTag) -> tuple[str, ...]:
    value = _value(header, tag)
    if value is None:
        return ()
    parts = value.split("\\") if isinstance(value, str) else list(value)
    return tuple(text for part in parts if (text := str(part).strip(" \0").upper()))


def _number(header: pydicom.Dataset, tag: BaseTag) -> float | None:
    value = _value(header, tag)
    if isinstance(value, str):
        value = value.partition("\\")[0]
    elif isinstance(value, pydicom.multival.MultiValue):
        value = value[0] if len(value) else None
    return _finite(value)


def _vector(header: pydicom.Dataset, tag: BaseTag, length: int) -> tuple[float, ...]:
    value = _value(header, tag)
    parts = value.split("\\") if isinstance(value, str) else value
    if parts is None or len(parts) != length:
        return ()
    numbers = [_finite(part) for part in parts]
    return tuple(number for number in numbers if number is not None) if None not in numbers else ()


def _finite(value: Any) -> float | None:  # noqa: ANN401  (pydicom's value, or text)
    try:
        number = float(value.strip(" \0") if isinstance(value, str) else value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if abs(number) < float("inf") else None
