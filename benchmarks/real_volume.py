"""A NIfTI volume of a real spine → a sagittal T2 series in DICOM, for tests of the whole path on real anatomy.

It makes a test series, not clinical data: the pixels are resampled, and every header value that NIfTI does not carry
(echo time, scanner, identifiers, even ORIGINAL) is invented, in the pattern of a 1.5 T GE lumbar protocol.

``python -m benchmarks.real_volume t2_lumbar.nii.gz /data/real_dicom --spacing 2.1875 --matrix 128``

The volume keeps its own axes: they are exchanged and flipped, never rotated, so an oblique scan stays oblique. Shape
suffixes: I, J, K voxels as in the file; S slices right → left, H rows cranial → caudal, W columns anterior → posterior.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

SLICE_MM = 4.0
"""Default distance of the slices: 3 mm thick with a gap of 1 mm, as in the reference protocol."""

SHEAR_TOLERANCE = 1e-3
"""Largest cosine between two voxel axes; DICOM knows no sheared images."""

MIN_LEVELS = 32
"""Fewer different values after rounding to integers mean that the volume's scale was lost."""

HEADER = {
    "ImageType": ["ORIGINAL", "PRIMARY", "OTHER"],
    "Modality": "MR",
    "Manufacturer": "GE MEDICAL SYSTEMS",
    "ManufacturerModelName": "Signa HDxt",
    "StudyDescription": "TEST SERIES, NOT CLINICAL",
    "SeriesDescription": "SAG T2 FSE",
    "ImageComments": "Test series resampled from a NIfTI volume; header values are invented; not clinical data",
    "PatientName": "Test^Series",
    "PatientID": "TEST-SERIES",
    "PatientPosition": "HFS",
    "BodyPartExamined": "LSPINE",
    "ScanningSequence": "SE",
    "SequenceVariant": "SK",
    "ScanOptions": ["FAST_GEMS", "NPW", "TRF_GEMS", "FILTERED_GEMS", "SP"],
    "MRAcquisitionType": "2D",
    "RepetitionTime": "3500",
    "EchoTime": "112.7",
    "EchoTrainLength": 27,
    "EchoNumbers": 1,
    "MagneticFieldStrength": "1.5",
    "SeriesNumber": 2,
    "SamplesPerPixel": 1,
    "PhotometricInterpretation": "MONOCHROME2",
    "BitsAllocated": 16,
    "BitsStored": 16,
    "HighBit": 15,
    "PixelRepresentation": 1,
}
"""What every image says; none of it is known of the volume. GE stores signed 16-bit values."""


class Sagittal(NamedTuple):
    """A volume in sagittal slices."""

    voxels_SHW: np.ndarray
    affine: np.ndarray
    """(4, 4): slice, row, column, 1 → centre of the voxel in patient LPS, mm."""

    @property
    def spacing_mm(self) -> np.ndarray:
        """Distance of slices, of rows, of columns, (3,)."""
        return np.asarray(np.linalg.norm(self.affine[:3, :3], axis=0))


def to_sagittal(voxels_IJK: np.ndarray, affine_ras: np.ndarray) -> Sagittal:
    """Exchange and flip the axes of a volume; no value changes.

    Parameters
    ----------
    voxels_IJK
        Voxels in the order of the file.
    affine_ras
        (4, 4) i, j, k, 1 → mm in RAS, as NIfTI has it.

    Raises
    ------
    ValueError
        If the axes are sheared or the volume is not three-dimensional.
    """
    if voxels_IJK.ndim != 3:
        msg = f"a volume with three axes is required, this one has shape {voxels_IJK.shape}"
        raise ValueError(msg)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine_ras
    cosines = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    if np.abs(cosines.T @ cosines - np.eye(3)).max() > SHEAR_TOLERANCE:
        msg = "the voxel axes are not perpendicular: resample the volume to an unsheared grid first"
        raise ValueError(msg)
    wanted = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]])  # left, caudal, posterior in LPS
    along = wanted @ cosines
    order = max(permutations(range(3)), key=lambda axes: sum(abs(along[row, axis]) for row, axis in enumerate(axes)))
    voxels, affine = voxels_IJK.transpose(order), affine[:, [*order, 3]]
    for row, axis in enumerate(order):
        if along[row, axis] < 0:
            affine[:3, 3] += affine[:3, row] * (voxels.shape[row] - 1)
            affine[:3, row] *= -1
            voxels = np.flip(voxels, row)
    return Sagittal(voxels, affine)


def resample(volume: Sagittal, spacing_mm: tuple[float, float, float]) -> Sagittal:
    """Give a volume another voxel size about the same centre: linear interpolation, averaged over the new voxel.

    Parameters
    ----------
    volume
        The volume.
    spacing_mm
        New distance of slices, rows and columns. An unchanged distance leaves its axis bit for bit.
    """
    voxels, affine = volume.voxels_SHW.astype(np.float64), volume.affine.copy()
    for axis, (old_mm, new_mm) in enumerate(zip(volume.spacing_mm, spacing_mm, strict=True)):
        ratio = new_mm / old_mm
        if abs(ratio - 1) < 1e-6:
            continue
        weights_NM, first = _averager(voxels.shape[axis], ratio)
        voxels = np.moveaxis(np.tensordot(weights_NM, voxels, axes=(1, axis)), 0, axis)
        affine[:3, 3] += affine[:3, axis] * first
        affine[:3, axis] *= ratio
    return Sagittal(voxels, affine)


def _averager(count: int, ratio: float) -> tuple[np.ndarray, float]:
    """Weights (new, old) of one axis, and the first new voxel's centre in old voxels."""
    number, parts = int(count / ratio + 1e-6), int(np.ceil(ratio))
    first = (count - 1) / 2 - ratio * (number - 1) / 2
    within = ((np.arange(parts) + 0.5) / parts - 0.5) * ratio
    samples_NP = np.clip(first + ratio * np.arange(number)[:, None] + within, 0, count - 1)
    return np.clip(1 - np.abs(samples_NP[..., None] - np.arange(count)), 0, None).mean(axis=1), first


def fit_matrix(volume: Sagittal, size: int) -> Sagittal:
    """Centre every slice in a square of zeros, as a scanner's larger field of view would hold it.

    Raises
    ------
    ValueError
        If a slice is larger than the square.
    """
    before = [(size - count) // 2 for count in volume.voxels_SHW.shape[1:]]
    after = [size - count - first for count, first in zip(volume.voxels_SHW.shape[1:], before, strict=True)]
    if min(before) < 0:
        rows, columns = volume.voxels_SHW.shape[1:]
        msg = f"--matrix {size} is smaller than the slices, {rows} x {columns} pixels; leave it out or make it larger"
        raise ValueError(msg)
    affine = volume.affine.copy()
    affine[:3, 3] -= affine[:3, 1:3] @ before
    return Sagittal(np.pad(volume.voxels_SHW, [(0, 0), *zip(before, after, strict=True)]), affine)


def to_stored(volume: Sagittal) -> Sagittal:
    """Round to the int16 values that are written.

    Raises
    ------
    ValueError
        If the values do not fit or their scale is too small for integers.
    """
    rounded = np.rint(volume.voxels_SHW)
    limits = np.iinfo(np.int16)
    if rounded.min() < limits.min or rounded.max() > limits.max or len(np.unique(rounded)) < MIN_LEVELS:
        low, high = volume.voxels_SHW.min(), volume.voxels_SHW.max()
        msg = f"values from {low:g} to {high:g} do not make 16-bit integers of {MIN_LEVELS} levels: rescale the volume"
        raise ValueError(msg)
    return Sagittal(rounded.astype(np.int16), volume.affine)


def write_series(folder: Path, volume: Sagittal) -> list[Path]:
    """Write one file per slice, right → left; the same volume gives the same bytes.

    Parameters
    ----------
    folder
        Where to; made if it is missing.
    volume
        int16 voxels.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = hashlib.sha256(volume.voxels_SHW.tobytes() + volume.affine.tobytes()).hexdigest()
    paths = []
    for index, pixels_HW in enumerate(volume.voxels_SHW):
        image = _image(volume, index, content)
        image.PixelData = np.ascontiguousarray(pixels_HW, "<i2").tobytes()
        paths.append(folder / f"IM{index + 1:04d}.dcm")
        image.save_as(paths[-1], enforce_file_format=True)
    return paths


def _image(volume: Sagittal, index: int, content: str) -> Dataset:
    slice_mm, row_mm, column_mm = volume.spacing_mm
    image = Dataset()
    for keyword, value in HEADER.items():
        setattr(image, keyword, value)
    image.SOPClassUID, image.SOPInstanceUID = MRImageStorage, _uid(content, "image", index)
    image.StudyInstanceUID, image.SeriesInstanceUID = _uid(content, "study"), _uid(content, "series")
    image.FrameOfReferenceUID = _uid(content, "frame")
    image.InstanceNumber = index + 1
    image.Rows, image.Columns = volume.voxels_SHW.shape[1:]
    image.SpacingBetweenSlices = image.SliceThickness = _ds(slice_mm)
    image.PixelSpacing = [_ds(row_mm), _ds(column_mm)]
    # Along increasing column index first, then along increasing row index.
    along = (volume.affine[:3, 2] / column_mm, volume.affine[:3, 1] / row_mm)
    image.ImageOrientationPatient = [_ds(cosine) for cosine in np.concatenate(along)]
    image.ImagePositionPatient = [_ds(value) for value in volume.affine[:3] @ [index, 0, 0, 1]]
    image.file_meta = FileMetaDataset()
    image.file_meta.MediaStorageSOPClassUID = image.SOPClassUID
    image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return image


def _uid(*parts: object) -> str:
    return str(generate_uid(entropy_srcs=[str(part) for part in parts]))


def _ds(value: float) -> str:
    """Decimal string of at most 16 characters."""
    return f"{value + 0.0:.8f}"[:16]


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, write the series and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_volume", description=__doc__.split("\n\n")[0])
    parser.add_argument("nifti", type=Path)
    parser.add_argument("out", type=Path, help="folder for the series; must be empty or missing")
    parser.add_argument("--spacing", type=float, metavar="MM", help="pixel spacing in the slice; default: as it is")
    parser.add_argument("--slice-spacing", type=float, default=SLICE_MM, metavar="MM")
    parser.add_argument("--matrix", type=int, metavar="PIXELS", help="centre the slices in a square of zeros")
    options = parser.parse_args(arguments)
    import nibabel

    try:
        if options.out.is_dir() and any(options.out.iterdir()):
            msg = f"{options.out} is not empty, and the folder of an exam may hold one series only: give a new folder"
            raise ValueError(msg)
        image: Any = nibabel.load(options.nifti)
        volume = to_sagittal(np.asanyarray(image.dataobj), image.affine)
        _, row_mm, column_mm = volume.spacing_mm
        volume = resample(volume, (options.slice_spacing, options.spacing or row_mm, options.spacing or column_mm))
        volume = to_stored(fit_matrix(volume, options.matrix) if options.matrix else volume)
    except (ValueError, OSError, nibabel.filebasedimages.ImageFileError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    paths = write_series(options.out, volume)
    sizes = " x ".join(str(count) for count in volume.voxels_SHW.shape)
    spacings = " x ".join(f"{value:g}" for value in volume.spacing_mm)
    sys.stdout.write(f"{len(paths)} slices in {options.out}: {sizes} voxels of {spacings} mm (slice, row, column)\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
