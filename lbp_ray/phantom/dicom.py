"""DICOM files of one exam, as a 1.5 T GE scanner would label them: sagittal T2, sagittal T1, three-plane localizer.

Everything that a model could read a label from (names, UIDs, order, dates, slice numbers) is drawn from a stream that
knows nothing of grades or labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import correct_ambiguous_vr, write_data_element, write_file_meta_info
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

from lbp_ray.phantom.tissue import T1, T2, Contrast

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from lbp_ray.phantom.exam import Imaging, SyntheticExam

LOCALIZER_MATRIX = 128
"""Rows and columns of the localizer's images."""

LOCALIZER_FOV_MM = 440.0
"""Field of view of the localizer."""


@dataclass(frozen=True)
class Identity:
    """Who an exam claims to be of, and when; all invented by a random stream.

    ``folder`` is the exam's folder in the tree and ``token`` the source of its UIDs.
    """

    patient_id: str
    patient_name: str
    accession: str
    sex: str
    age_years: int
    date: str
    time: str
    folder: str
    token: str

    def uid(self, *parts: object) -> str:
        """Return a valid UID that depends on the exam's token and `parts` alone."""
        return str(generate_uid(entropy_srcs=[self.token, *(str(part) for part in parts)]))


@dataclass(frozen=True)
class Written:
    """Where the sagittal T2 series went: SOP Instance UIDs right → left, and whether columns run anterior-wards."""

    uids: tuple[str, ...]
    flipped: bool
    files: int


def write_exam(
    exam: SyntheticExam,
    identity: Identity,
    root: Path,
    rng: np.random.Generator,
    *,
    localizer: bool,
    flipped_share: float,
) -> Written:
    """Write every series of an exam.

    Parameters
    ----------
    exam
        Volumes and geometry.
    identity
        What the headers say.
    root
        The DICOM tree; the exam's files go below ``root / identity.folder``.
    rng
        Stream for file names, instance numbers and table position.
    localizer
        Whether to add a three-plane localizer.
    flipped_share
        Chance that the sagittal series are stored posterior side first.

    Returns
    -------
    Written
        The T2 series' UIDs in slice order.
    """
    table = np.array([rng.normal(0, 8), rng.normal(0, 15), rng.normal(-40, 20)]).round(3)
    flipped = bool(rng.random() < flipped_share)
    namer = _Namer(rng, root / identity.folder)
    series: dict[str, tuple[str, ...]] = {}
    order = rng.permutation(len(exam.volumes))
    for position, index in enumerate(order):
        name, volume = list(exam.volumes.items())[int(index)]
        contrast = {T2.name: T2, T1.name: T1}[name]
        base = _sagittal_header(exam.imaging, contrast, identity, position + 2)
        series[name] = _write_sagittal(base, volume[..., ::-1] if flipped else volume, exam, (table, flipped), namer)
    if localizer:
        _write_localizer(exam, identity, table, namer)
    return Written(series[T2.name], flipped, namer.files)


class _Namer:
    """File names in one of several styles that scanners and exports use; one style per exam."""

    def __init__(self, rng: np.random.Generator, folder: Path) -> None:
        self.rng, self.folder, self.files = rng, folder, 0
        self.style = int(rng.integers(4))
        self.flat = bool(rng.random() < 0.3)
        self.numbers = rng.permutation(90_000)[:400] + 10_000

    def series(self) -> Path:
        """Start a series: its folder."""
        name = f"{int(self.rng.integers(1 << 32)):08x}"
        folder = self.folder if self.flat else self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def file(self, folder: Path, uid: str) -> Path:
        """Return the path of the next file."""
        number = int(self.numbers[self.files])
        self.files += 1
        styles = (f"IM{number:06d}", f"{number}.dcm", f"MR.{uid}.dcm", f"I{number}.img")
        return folder / styles[self.style]


def _set(header: Dataset, values: dict[str, Any]) -> None:
    for keyword, value in values.items():
        setattr(header, keyword, value)


def _header(identity: Identity, number: int, description: str) -> Dataset:
    header = Dataset()
    values: dict[str, Any] = {
        "SpecificCharacterSet": "ISO_IR 100",
        "SOPClassUID": MRImageStorage,
        "StudyDate": identity.date,
        "SeriesDate": identity.date,
        "AcquisitionDate": identity.date,
        "StudyTime": identity.time,
        "SeriesTime": f"{int(identity.time) + 100 * number:06d}",
        "AccessionNumber": identity.accession,
        "Modality": "MR",
        "Manufacturer": "GE MEDICAL SYSTEMS",
        "InstitutionName": "Synthetic cohort",
        "ReferringPhysicianName": "",
        "StationName": "PHANTOM",
        "StudyDescription": "MRI LUMBAR SPINE",
        "SeriesDescription": description,
        "ManufacturerModelName": "Signa HDxt",
        "PatientName": identity.patient_name,
        "PatientID": identity.patient_id,
        "PatientBirthDate": "",
        "PatientSex": identity.sex,
        "PatientAge": f"{identity.age_years:03d}Y",
        "BodyPartExamined": "LSPINE",
        "MagneticFieldStrength": "1.5",
        "ImagingFrequency": "63.86",
        "SoftwareVersions": "synthetic",
        "ProtocolName": "LUMBAR SPINE",
        "PatientPosition": "HFS",
        "StudyInstanceUID": identity.uid("study"),
        "SeriesInstanceUID": identity.uid("series", number),
        "StudyID": identity.accession[-6:],
        "SeriesNumber": number,
        "FrameOfReferenceUID": identity.uid("frame"),
        "PositionReferenceIndicator": "",
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 16,
        "BitsStored": 12,
        "HighBit": 11,
        "PixelRepresentation": 0,
    }
    _set(header, values)
    return header


def _sagittal_header(imaging: Imaging, contrast: Contrast, identity: Identity, number: int) -> Dataset:
    header = _header(identity, number, {T2.name: "SAG T2 FSE", T1.name: "SAG T1 FSE"}[contrast.name])
    size = imaging.matrix
    _set(
        header,
        {
            "ImageType": ["ORIGINAL", "PRIMARY", "OTHER"],
            "ScanningSequence": "SE",
            "SequenceVariant": "SK",
            "ScanOptions": ["FAST_GEMS", "NPW", "TRF_GEMS", "FILTERED_GEMS", "SP"],
            "MRAcquisitionType": "2D",
            "SliceThickness": _ds(imaging.thickness_mm),
            "RepetitionTime": _ds(contrast.repetition_time_ms),
            "EchoTime": _ds(contrast.echo_time_ms),
            "NumberOfAverages": "2",
            "EchoNumbers": 1,
            "SpacingBetweenSlices": _ds(imaging.spacing_mm),
            "EchoTrainLength": contrast.echo_train_length,
            "PixelBandwidth": "162.773",
            "ReconstructionDiameter": _ds(imaging.fov_mm),
            "ReceiveCoilName": "CTLBOT",
            "AcquisitionMatrix": [0, round(size * 0.88), round(size * 0.7), 0],
            "InPlanePhaseEncodingDirection": "COL",
            "FlipAngle": "90",
            "Rows": size,
            "Columns": size,
            "PixelSpacing": [_ds(imaging.pixel_mm)] * 2,
        },
    )
    return header


def _write_sagittal(
    base: Dataset,
    volume: NDArray[np.uint16],
    exam: SyntheticExam,
    placement: tuple[NDArray[np.float64], bool],
    namer: _Namer,
) -> tuple[str, ...]:
    (x0, y0, z0), flipped = placement
    half = (exam.imaging.matrix - 1) / 2 * exam.imaging.pixel_mm
    toward = -1 if flipped else 1
    count = len(volume)
    numbers = _instance_numbers(namer.rng, count)
    uids = tuple(
        str(generate_uid(entropy_srcs=[base.SeriesInstanceUID, str(code)])) for code in namer.rng.permutation(count)
    )
    folder = namer.series()
    base.ImageOrientationPatient = [_ds(c) for c in (0, toward, 0, 0, 0, -1)]
    encoder = _Encoder(base)
    for k in namer.rng.permutation(count).tolist():
        x = x0 + exam.positions_mm[k]
        own = Dataset()
        own.PixelRepresentation = 0
        own.SOPInstanceUID, own.InstanceNumber = uids[k], int(numbers[k])
        own.ImagePositionPatient = [_ds(x), _ds(y0 - toward * half), _ds(z0 + half)]
        own.SliceLocation = _ds(-x)
        encoder.save(own, volume[k], namer.file(folder, uids[k]))
    return uids


def _instance_numbers(rng: np.random.Generator, count: int) -> NDArray[np.int64]:
    """Slices left to right, right to left, or in no order at all."""
    style = rng.random()
    forward = np.arange(1, count + 1)
    if style < 0.5:
        return forward
    return forward[::-1] if style < 0.85 else rng.permutation(forward)


def _write_localizer(exam: SyntheticExam, identity: Identity, table: NDArray[np.float64], namer: _Namer) -> None:
    base = _header(identity, 1, "3-PLANE LOC")
    _set(
        base,
        {
            "ImageType": ["ORIGINAL", "PRIMARY", "OTHER"],
            "ScanningSequence": "GR",
            "SequenceVariant": ["SS", "SP"],
            "ScanOptions": ["FAST_GEMS", "SEQ_GEMS"],
            "MRAcquisitionType": "2D",
            "SliceThickness": "8",
            "RepetitionTime": "5.4",
            "EchoTime": "1.6",
            "EchoNumbers": 1,
            "SpacingBetweenSlices": "10",
            "EchoTrainLength": 1,
            "FlipAngle": "30",
            "Rows": LOCALIZER_MATRIX,
            "Columns": LOCALIZER_MATRIX,
            "PixelSpacing": [_ds(LOCALIZER_FOV_MM / LOCALIZER_MATRIX)] * 2,
        },
    )
    folder, encoder = namer.series(), _Encoder(base)
    half = LOCALIZER_FOV_MM / 2 * (1 - 1 / LOCALIZER_MATRIX)
    for number, (rows, columns, pixels) in enumerate(_localizer_images(exam, namer.rng), start=1):
        corner = table - half * (np.array(rows) + np.array(columns))
        own = Dataset()
        own.PixelRepresentation = 0
        own.SOPInstanceUID, own.InstanceNumber = identity.uid("localizer", number), number
        own.ImageOrientationPatient = [_ds(c) for c in (*columns, *rows)]
        own.ImagePositionPatient = [_ds(c) for c in corner]
        encoder.save(own, pixels, namer.file(folder, own.SOPInstanceUID))


_PLANES = (((0, 0, -1), (0, 1, 0)), ((0, 0, -1), (1, 0, 0)), ((0, 1, 0), (1, 0, 0)))
"""Sagittal, coronal, axial: direction of increasing row, direction of increasing column."""


def _localizer_images(
    exam: SyntheticExam, rng: np.random.Generator
) -> list[tuple[tuple[int, ...], tuple[int, ...], NDArray[np.uint16]]]:
    """Three rough planes: a body outline, and where the sagittal stack was taken, its own T2 signal."""
    axis = (np.arange(LOCALIZER_MATRIX) - (LOCALIZER_MATRIX - 1) / 2) * (LOCALIZER_FOV_MM / LOCALIZER_MATRIX)
    stack = exam.volumes[T2.name].astype(np.float32)
    half = exam.imaging.fov_mm / 2
    images: list[tuple[tuple[int, ...], tuple[int, ...], NDArray[np.uint16]]] = []
    for rows, columns in _PLANES:
        point = (
            np.multiply.outer(np.array(rows, float), axis)[:, :, None]
            + np.multiply.outer(np.array(columns, float), axis)[:, None, :]
        )
        x, y, z = point
        body = 420.0 * (((x / 185) ** 4 + (y / 112) ** 4) < 1)
        k = np.rint((x - exam.positions_mm[0]) / exam.imaging.spacing_mm).astype(int)
        r = np.floor((half - z) / exam.imaging.pixel_mm).astype(int)
        c = np.floor((y + half) / exam.imaging.pixel_mm).astype(int)
        inside = (k >= 0) & (k < len(stack)) & (r >= 0) & (r < stack.shape[1]) & (c >= 0) & (c < stack.shape[2])
        body[inside] = 0.5 * body[inside] + 0.4 * stack[k[inside], r[inside], c[inside]]
        noisy = np.hypot(body + rng.normal(0, 22, body.shape), rng.normal(0, 22, body.shape))
        images.append((rows, columns, noisy.clip(0, 4095).astype(np.uint16)))
    return images


class _Encoder:
    """Writes the files of one series: what its slices share is encoded once."""

    def __init__(self, shared: Dataset) -> None:
        self.shared = _encode(shared)

    def save(self, own: Dataset, pixels: NDArray[np.uint16], path: Path) -> None:
        """Write one slice with its `own` elements."""
        low, high = int(pixels.min()), int(pixels.max())
        own.SmallestImagePixelValue, own.LargestImagePixelValue = low, high
        own.WindowCenter, own.WindowWidth = str(high // 3), str(high * 2 // 3)
        own["PixelData"] = DataElement("PixelData", "OW", np.ascontiguousarray(pixels, "<u2").tobytes())
        elements = self.shared | _encode(own)
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = MRImageStorage
        meta.MediaStorageSOPInstanceUID = own.SOPInstanceUID
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        buffer = DicomBytesIO()
        buffer.write(b"\0" * 128 + b"DICM")
        write_file_meta_info(buffer, meta)
        path.write_bytes(buffer.getvalue() + b"".join(elements[tag] for tag in sorted(elements)))


def _encode(dataset: Dataset) -> dict[int, bytes]:
    """Explicit little-endian bytes of each element, by tag."""
    encoded = {}
    for element in correct_ambiguous_vr(dataset, is_little_endian=True):
        buffer = DicomBytesIO()
        buffer.is_little_endian, buffer.is_implicit_VR = True, False
        write_data_element(buffer, element, encodings=["iso8859"])
        encoded[int(element.tag)] = buffer.getvalue()
    return encoded


def _ds(value: float) -> str:
    """Decimal string of at most 16 characters."""
    return f"{value:.6f}".rstrip("0").rstrip(".") if value else "0"
