"""One exam of a hostile tree: entries without a path yet, what each must end as, and the volumes that must be stored.

Images are drawn in canonical orientation and turned away from it on writing, so the expected volumes owe nothing to
the code under test.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from dicom_factory import make_dataset
from pydicom import dcmwrite
from pydicom.dataset import Dataset
from pydicom.uid import (
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

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
    "too_steep": ((-0.6427876, 0.7660444, 0, 0, 0, -1), lambda image: image),
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


# --- enhanced multi-frame images ---

ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.4.1"


def make_enhanced(pixels_SHW: np.ndarray, order: list[int], *, view="sagittal", offsets_mm=None, **options) -> Dataset:
    """One enhanced MR image; frame k shows slice `order[k]`."""
    echo_ms, repetition_ms = options.pop("echo_ms", 112.7), options.pop("repetition_ms", 3500.0)
    orientation, turned = VIEWS[view]
    frames = np.stack([turned(pixels_SHW[index]) for index in order])
    removed = ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "EchoTime", "RepetitionTime"]
    removed += ["EchoTrainLength", "ScanningSequence", "SequenceVariant", "MRAcquisitionType"]
    dataset = make_dataset(frames[0], SOPClassUID=ENHANCED_MR, **options, **dict.fromkeys(removed))
    dataset.file_meta.MediaStorageSOPClassUID = ENHANCED_MR
    dataset.NumberOfFrames, dataset.PixelData = len(frames), frames.astype("<u2").tobytes()
    dataset.MRAcquisitionType, dataset.ImageType = "2D", ["ORIGINAL", "PRIMARY", "T2", "NONE"]
    dataset.EchoPulseSequence, dataset.InversionRecovery = "SPIN", "NO"
    shared = Dataset()
    shared.PixelMeasuresSequence = [item(PixelSpacing=[1.0, 1.0], SliceThickness=3.5)]
    shared.PlaneOrientationSequence = [item(ImageOrientationPatient=list(orientation))]
    shared.MREchoSequence = [item(EffectiveEchoTime=echo_ms)]
    shared.MRTimingAndRelatedParametersSequence = [item(RepetitionTime=repetition_ms, FlipAngle=90, EchoTrainLength=27)]
    shared.MRImageFrameTypeSequence = [item(FrameType=["ORIGINAL", "PRIMARY", "T2", "NONE"])]
    dataset.SharedFunctionalGroupsSequence = [shared]
    offsets_mm = offsets_mm or [PITCH_MM * index for index in range(len(pixels_SHW))]
    dataset.PerFrameFunctionalGroupsSequence = [
        item(
            PlanePositionSequence=[item(ImagePositionPatient=position_of(orientation, offsets_mm[index]))],
            FrameContentSequence=[item(InStackPositionNumber=frame + 1, StackID="1")],
        )
        for frame, index in enumerate(order)
    ]
    return dataset


def item(**elements) -> Dataset:
    dataset = Dataset()
    for name, value in elements.items():
        setattr(dataset, name, value)
    return dataset
