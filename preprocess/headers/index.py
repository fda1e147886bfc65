"""Walk a messy tree and read headers only: one row per file, whatever the file is.

Nothing raised by a file crosses this module: a file that cannot be read becomes a row with a code. Rows hold raw
identifiers, so they stay in memory or in the private folder.
"""

from __future__ import annotations

import logging
import os
import re
import stat
import struct
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import pydicom
from pydicom import config as pydicom_config
from pydicom.tag import Tag

from preprocess.headers.enhanced import PER_FRAME, SHARED, TOP_TAGS, FrameError, frame_values, is_enhanced
from preprocess.headers.reader import BoundedReader, Header, HeaderLimitError, Reader, Source, read_with_pydicom

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

TAGS = {
    "SOPClassUID": "sop_class",
    "SOPInstanceUID": "sop_uid",
    "StudyInstanceUID": "study_uid",
    "SeriesInstanceUID": "series_uid",
    "PatientID": "patient_id",
    "IssuerOfPatientID": "issuer",
    "AccessionNumber": "accession",
    "StudyDate": "study_date",
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
    "RescaleSlope": "rescale_slope",
    "RescaleIntercept": "rescale_intercept",
}
"""Numbers → field; absent or malformed ones are None."""

VECTOR_TAGS = {
    "ImagePositionPatient": ("position_mm", 3),
    "ImageOrientationPatient": ("orientation", 6),
    "PixelSpacing": ("spacing_mm", 2),
}
"""Geometry vectors → field and length."""

_TEXTS: list[tuple[int, str]] = [(int(Tag(name)), field) for name, field in TAGS.items()]
_LISTS: list[tuple[int, str]] = [(int(Tag(name)), field) for name, field in LIST_TAGS.items()]
_NUMBERS: list[tuple[int, str]] = [(int(Tag(name)), field) for name, field in NUMBER_TAGS.items()]
_VECTORS: list[tuple[int, str, int]] = [
    (int(Tag(name)), field, length) for name, (field, length) in VECTOR_TAGS.items()
]
_ROW_TAGS: list[int] = [tag for tag, _ in (*_TEXTS, *_LISTS, *_NUMBERS)] + [tag for tag, _, _ in _VECTORS]

_SOP_UID, _MATRIX_ROWS = int(Tag("SOPInstanceUID")), int(Tag("Rows"))
_reader = Reader(_ROW_TAGS, leave=(SHARED, PER_FRAME))
_ARCHIVES = (
    (0, b"PK\x03\x04"),
    (0, b"\x1f\x8b"),
    (0, b"BZh"),
    (0, b"7z\xbc\xaf"),
    (0, b"\xfd7zXZ\0"),
    (0, b"Rar!\x1a\x07"),
    (0, b"\x28\xb5\x2f\xfd"),
    (257, b"ustar"),
)
"""Offset and bytes by which zip, gzip, bzip2, 7z, xz, rar, zstd and tar are known."""

_STANDARD_UID = b"1.2.840.10008."
"""Starts the UIDs of the standard; a broken file without preamble and without any is taken for something else."""

_UID = re.compile(r"[0-9.]{1,64}\Z")
_MIN_FORCED_ELEMENT = 8
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_DICOMDIR = "1.2.840.10008.1.3.10"


@dataclass(frozen=True, slots=True)
class WalkedFile:
    """One entry of the tree."""

    path: str
    """Relative to the tree, surrogate-escaped."""
    fault: str = ""
    """Code when the entry is not even opened (link, pipe, unlistable folder)."""


@dataclass(frozen=True, slots=True)
class FileRow:
    """What the header says of one image. Numbers are None and texts empty when absent."""

    path: str
    size_bytes: int
    fault: str = ""
    """Code that settles the file by itself, or empty for an image that selection decides on."""
    mtime_ns: int = 0
    """Modification time when the header was read; 0 for what is not opened."""
    frame: int | None = None
    """Index of the frame within the file's pixel data, from 0; None for the only image of a file."""
    transfer_syntax: str = ""
    """UID of the pixel encoding as the file's meta header has it; empty if it has none, or no UID."""
    sop_class: str = ""
    sop_uid: str = ""
    study_uid: str = ""
    series_uid: str = ""
    patient_id: str = ""
    issuer: str = ""
    accession: str = ""
    study_date: str = ""
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
    rescale_slope: float | None = None
    """Per image; enhanced images have it per frame. Value = slope x stored + intercept."""
    rescale_intercept: float | None = None
    position_mm: tuple[float, ...] = ()
    """Image position (x, y, z) in patient LPS, mm: centre of the first pixel. Empty when absent."""
    orientation: tuple[float, ...] = ()
    """Unit vectors along increasing column index, then along increasing row index. Empty when absent."""
    spacing_mm: tuple[float, ...] = ()
    """Pixel spacing: between rows first, then between columns (DICOM's order). Empty when absent."""


def walk(root: Path) -> Iterator[WalkedFile]:
    """Name every entry below a folder that is not itself a listable folder; no file is opened or asked for its size.

    The order is that of the names: a folder's own entries first, then its folders, depth first. One listing is held at
    a time. Symbolic links are listed, never followed: a loop ends there.

    Parameters
    ----------
    root
        The tree.

    Yields
    ------
    WalkedFile
        Entries with paths relative to `root`.
    """
    pending = [""]
    while pending:
        folder = pending.pop()
        try:
            with os.scandir(root / folder) as listing:
                entries = sorted((entry.name, _kind(entry)) for entry in listing)
        except OSError:
            yield WalkedFile(folder or ".", "unreadable_folder")
            continue
        for name, kind in entries:
            if kind != "folder":
                yield WalkedFile(os.path.join(folder, name), kind)  # a relative string, ten times faster
        pending += [os.path.join(folder, name) for name, kind in reversed(entries) if kind == "folder"]


def _kind(entry: os.DirEntry[str]) -> str:
    """Tell ``folder``, empty for a file, or the code of what is neither; a stat only where the file system needs it."""
    try:
        if entry.is_symlink():
            return "symlink"
        if entry.is_dir(follow_symlinks=False):
            return "folder"
        return "" if entry.is_file(follow_symlinks=False) else "special_file"
    except OSError:
        return "unreadable_file"


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
        At least one per entry, in order; one per frame for enhanced multi-frame images. No error is raised for any
        content.
    """
    pydicom_config.settings.reading_validation_mode = pydicom_config.IGNORE
    logging.getLogger("pydicom").disabled = True  # its messages quote headers
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [row for file in files for row in index_file(root, file)]


def index_file(root: str, file: WalkedFile) -> list[FileRow]:
    """Read one header; see `index_files`."""
    if file.fault:
        return [FileRow(file.path, 0, file.fault)]
    try:
        # Neither a link nor a pipe that took the file's place since the walk may lead away or block.
        descriptor = os.open(f"{root}/{file.path}", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError):  # ValueError: a path with a null byte
        return [FileRow(file.path, 0, "unreadable_file")]
    try:
        found = os.fstat(descriptor)
        opened = _OpenedFile(file.path, found.st_size, found.st_mtime_ns)
        rows = _read_open(descriptor, opened, found.st_mode)
        now = os.fstat(descriptor)
    except OSError:
        return [FileRow(file.path, 0, "unreadable_file")]
    finally:
        os.close(descriptor)
    changed = (now.st_size, now.st_mtime_ns) != (found.st_size, found.st_mtime_ns)
    return [opened.settled("unreadable_file:changed")] if changed else rows


class _OpenedFile(NamedTuple):
    """What the system says of a file."""

    path: str
    size_bytes: int
    mtime_ns: int

    def settled(self, code: str) -> FileRow:
        return FileRow(self.path, self.size_bytes, code, self.mtime_ns)


def _read_open(descriptor: int, file: _OpenedFile, mode: int) -> list[FileRow]:
    if not stat.S_ISREG(mode):
        return [file.settled("special_file")]
    if not file.size_bytes:
        return [file.settled("empty_file")]
    try:
        return _read(descriptor, file)
    except OSError as error:  # pydicom raises it too, without a number, for sequences that end early
        return [file.settled("unreadable_header:OSError" if error.errno is None else "unreadable_file")]
    except FrameError:
        return [file.settled("unreadable_header:frames")]
    except HeaderLimitError:
        return [file.settled("unreadable_header:limit")]
    except Exception as error:  # a hostile header may raise anything
        return [file.settled(f"unreadable_header:{type(error).__name__}")]


def _read(descriptor: int, file: _OpenedFile) -> list[FileRow]:
    source = Source(descriptor)
    kind = _sniff(source.buffer)
    if kind not in {"dicom", "bare"}:
        return [file.settled(kind)]
    bare = kind == "bare"
    header = None if bare else _reader.read(source)
    try:
        header = header or read_with_pydicom(BoundedReader(descriptor), _ROW_TAGS, TOP_TAGS, force=bare)
    except Exception:
        if bare and _STANDARD_UID not in source.buffer:
            return [file.settled("not_dicom")]
        raise
    if header.media_class == _DICOMDIR:
        return [file.settled("dicomdir")]
    if bare and not {_SOP_UID, _MATRIX_ROWS} & header.values.keys():
        return [file.settled("not_dicom")]
    if not header.is_whole:
        return [file.settled("unreadable_header:cut")]
    if not header.at_pixels:
        return [_row(header.values, file, header, fault="no_pixels")]
    if _MATRIX_ROWS not in header.values:
        return [_row(header.values, file, header, fault="no_geometry")]
    if header.dataset is None or not is_enhanced(header.dataset):
        return [_row(header.values, file, header)]
    row = _row(header.values, file, header, frame=0)
    if row.fault not in {"", "secondary_capture"}:  # the groups may yet give a screenshot a position
        return [replace(row, frame=None)]
    frames = frame_values(header.dataset, header.values)
    rows = [_row(frame, file, header, frame=number) for number, frame in enumerate(frames)]
    return rows if not all(row.fault for row in rows) else [replace(rows[0], frame=None)]


def _sniff(head: bytes) -> str:
    """Tell DICOM with preamble (``dicom``), perhaps DICOM without one (``bare``), or the code of what is neither."""
    if head[128:132] == b"DICM":
        return "dicom"
    if any(head.startswith(signature, offset) for offset, signature in _ARCHIVES):
        return "archive"
    if len(head) < _MIN_FORCED_ELEMENT:
        return "not_dicom"
    little, big = struct.unpack("<HH", head[:4]), struct.unpack(">HH", head[:4])
    # Without a preamble only a first element of group 2 or 8 with a small element number is plausible.
    plausible = any(group in {0x0002, 0x0008} and element <= 0x0100 for group, element in (little, big))
    return "bare" if plausible else "not_dicom"


def _row(
    values: Mapping[int, Any], file: _OpenedFile, header: Header, *, fault: str = "", frame: int | None = None
) -> FileRow:
    fields: dict[str, Any] = {field: _text(value) for tag, field in _TEXTS if (value := values.get(tag))}
    fields |= {field: _texts(value) for tag, field in _LISTS if (value := values.get(tag))}
    fields |= {field: _number(value) for tag, field in _NUMBERS if (value := values.get(tag)) is not None}
    fields |= {field: _vector(value, length) for tag, field, length in _VECTORS if (value := values.get(tag))}
    syntax = header.transfer_syntax if _UID.match(header.transfer_syntax) else ""
    row = FileRow(file.path, file.size_bytes, fault, file.mtime_ns, frame, syntax, **fields)
    return row if row.fault else _with_fault(row)


def _with_fault(row: FileRow) -> FileRow:
    """Settle what the file alone decides; the first rule that fires names the code."""
    rules = (
        (row.burned_in == "YES", "burned_in"),
        (row.modality not in {"", "MR", "OT", "SC"}, "not_mr"),
        (row.samples not in {None, 1} or not (row.photometric or "MONOCHROME").startswith("MONOCHROME"), "rgb"),
        (row.frame is None and (row.num_frames or 1) > 1, "multiframe"),
        (row.sop_class.startswith(_SECONDARY_CAPTURE) and not row.position_mm, "secondary_capture"),
        (not (row.study_uid and row.series_uid), "no_exam_id"),
        (not row.patient_id, "no_patient_id"),
    )
    code = next((code for fired, code in rules if fired), "")
    return replace(row, fault=code) if code else row


def _text(value: Any) -> str:  # noqa: ANN401  (text, or pydicom's value)
    joined = "\\".join(map(str, value)) if isinstance(value, pydicom.multival.MultiValue) else str(value)
    return joined.strip(" \0")


def _texts(value: Any) -> tuple[str, ...]:  # noqa: ANN401
    parts = value.split("\\") if isinstance(value, str) else [value] if isinstance(value, (int, float)) else list(value)
    return tuple(text for part in parts if (text := str(part).strip(" \0").upper()))


def _number(value: Any) -> float | None:  # noqa: ANN401
    if isinstance(value, str):
        value = value.partition("\\")[0]
    elif isinstance(value, pydicom.multival.MultiValue):
        value = value[0] if len(value) else None
    return _finite(value)


def _vector(value: Any, length: int) -> tuple[float, ...]:  # noqa: ANN401
    parts = value.split("\\") if isinstance(value, str) else value
    if not hasattr(parts, "__len__") or len(parts) != length:
        return ()
    numbers = [_finite(part) for part in parts]
    return tuple(number for number in numbers if number is not None) if None not in numbers else ()


def _finite(value: Any) -> float | None:  # noqa: ANN401  (pydicom's value, or text)
    try:
        number = float(value.strip(" \0") if isinstance(value, str) else value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if abs(number) < float("inf") else None
