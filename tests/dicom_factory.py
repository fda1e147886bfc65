"""Synthetic DICOM files for tests: a series of slices with any geometry, contrast and identifiers."""

from __future__ import annotations

import hashlib
import tempfile
from typing import TYPE_CHECKING

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    JPEG2000,
    ExplicitVRLittleEndian,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSNearLossless,
)

if TYPE_CHECKING:
    from pathlib import Path

SAGITTAL = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
MR_IMAGE = "1.2.840.10008.5.1.4.1.1.4"

T2 = {
    "EchoTime": 112.7,
    "RepetitionTime": 3500.0,
    "EchoTrainLength": 27,
    "ScanningSequence": ["SE"],
    "SequenceVariant": ["SK"],
    "MRAcquisitionType": "2D",
    "ImageType": ["ORIGINAL", "PRIMARY", "OTHER"],
}


def uid(*parts):
    """A valid UID that depends on the parts only."""
    number = int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:12], "big")
    return f"1.2.826.0.1.3680043.8.498.{number}"


def make_dataset(pixels, *, patient="P1", study="s1", series="t2", number=0, position=(0.0, 0.0, 0.0), **header):
    """One image; `header` overrides any element, None deletes it."""
    pixels = np.asarray(pixels)
    dataset = Dataset()
    dataset.SOPClassUID = MR_IMAGE
    dataset.SOPInstanceUID = uid(patient, study, series, number)
    dataset.StudyInstanceUID = uid(patient, study)
    dataset.SeriesInstanceUID = uid(patient, study, series)
    dataset.PatientID, dataset.AccessionNumber = patient, f"A-{patient}-{study}"
    dataset.PatientName, dataset.Modality, dataset.Manufacturer = "Canary^Name", "MR", "GE MEDICAL SYSTEMS"
    dataset.InstanceNumber = number + 1
    dataset.ImagePositionPatient, dataset.ImageOrientationPatient = list(position), list(SAGITTAL)
    dataset.PixelSpacing = [1.0, 1.0]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.BitsAllocated = dataset.BitsStored = pixels.dtype.itemsize * 8
    dataset.HighBit, dataset.PixelRepresentation = dataset.BitsStored - 1, int(pixels.dtype.kind == "i")
    dataset.PixelData = pixels.astype(pixels.dtype.newbyteorder("<")).tobytes()
    for name, value in {**T2, **header}.items():
        if value is None:
            dataset.pop(name, None)
        else:
            setattr(dataset, name, value)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID = MR_IMAGE
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.get("SOPInstanceUID", "1.2.3")
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return dataset


def save(dataset, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def make_series(
    folder: Path, shape=(5, 12, 10), *, orientation=SAGITTAL, spacing_mm=4.0, origin=(-8.0, 5.0, 9.0), **kw
):
    """Write a series along its normal; returns paths and the (S, H, W) pixels in file order."""
    seed = int.from_bytes(
        hashlib.sha256(repr((kw.get("patient"), kw.get("study"), kw.get("series"))).encode()).digest()[:4]
    )
    pixels = kw.pop("pixels", np.random.default_rng(seed).integers(1, 4000, shape).astype(np.uint16))
    normal = np.cross(orientation[:3], orientation[3:])
    paths = []
    for number, image in enumerate(pixels):
        position = np.asarray(origin) + number * spacing_mm * normal
        dataset = make_dataset(
            image,
            number=number,
            position=[f"{value:.6f}" for value in position],
            **{"ImageOrientationPatient": [f"{value:.8f}" for value in orientation], **kw},
        )
        paths.append(save(dataset, folder / f"{kw.get('series', 't2')}-{number:03d}.dcm"))
    return paths, pixels


def transcode(dataset, syntax):
    """Bring a dataset with native pixels to another transfer syntax, in place; lossy ones lose up to two grey levels.

    JPEG lossless is encoded by gdcm, JPEG-LS and RLE by pydicom's plugins.
    """
    if syntax in (JPEGLossless, JPEGLosslessSV1):
        dataset.PixelData = encapsulate([_jpeg_lossless(dataset, syntax)])
        dataset["PixelData"].VR = "OB"
    elif syntax.is_encapsulated:
        options = {JPEGLSNearLossless: {"jls_error": 2}, JPEG2000: {"j2k_cr": [4.0]}}.get(syntax, {})
        dataset.compress(syntax, generate_instance_uid=False, **options)
        if options:
            dataset.LossyImageCompression = "01"
    elif not syntax.is_little_endian:
        width = dataset.BitsAllocated // 8
        dataset.PixelData = np.frombuffer(dataset.PixelData, f"<u{width}").astype(f">u{width}").tobytes()
    dataset.file_meta.TransferSyntaxUID = syntax
    return dataset


def _jpeg_lossless(dataset, syntax) -> bytes:
    """Codestream of a single-frame image by gdcm, which wants a file."""
    import gdcm

    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(str(syntax))))
    with tempfile.NamedTemporaryFile() as file:
        dataset.save_as(file.name, enforce_file_format=True)
        reader = gdcm.ImageReader()
        reader.SetFileName(file.name)
        reader.Read()
    change.SetInput(reader.GetImage())
    if not change.Change():
        msg = f"gdcm cannot encode {syntax.name}"
        raise RuntimeError(msg)
    fragments = change.GetOutput().GetDataElement().GetSequenceOfFragments()
    return fragments.GetFragment(0).GetByteValue().GetBuffer().encode("utf-8", "surrogateescape")
