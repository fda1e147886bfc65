"""A real lumbar volume, written as DICOM: orientation and stored values survive the way to a converted exam."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.real_volume import Sagittal, fit_matrix, resample, to_sagittal, to_stored, write_series
from preprocess.exam import convert_exam

VOLUME = Path(__file__).parent / "data" / "sct_lumbar_t2.npz"
MID = 2
"""The slice that shows the spinal canal over the volume's whole height, chosen by eye."""


@pytest.fixture(scope="module")
def real():
    """Voxels with axes to the right, to the front, to the head, and their affine."""
    with np.load(VOLUME) as content:
        return content["voxels"], content["affine"]


def reversed_along(volume, axes):
    affine = volume.affine.copy()
    for axis in axes:
        affine[:3, 3] += affine[:3, axis] * (volume.voxels_SHW.shape[axis] - 1)
        affine[:3, axis] *= -1
    return Sagittal(np.flip(volume.voxels_SHW, axes), affine)


@pytest.mark.parametrize("axes", [(), (0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
def test_stored_values_are_bit_exact_however_the_slices_lie_in_the_files(real, axes, tmp_path):
    voxels, affine = real
    write_series(tmp_path, reversed_along(to_sagittal(voxels, affine), axes))
    exam = convert_exam(tmp_path)
    # Right → left, cranial → caudal, anterior → posterior: every axis runs against the volume's.
    assert exam.pixels_SHW.dtype == np.int16
    np.testing.assert_array_equal(exam.pixels_SHW, voxels[::-1, ::-1, ::-1].transpose(0, 2, 1))
    assert exam.spacing_mm == (2.1875, 2.1875)
    assert exam.record.spacing_slice_mm == 4.0
    assert set(exam.codes.values()) == {"converted"}
    assert exam.record.confidence == "high"


def test_head_is_up_and_back_is_right(real, tmp_path):
    write_series(tmp_path, to_sagittal(*real))
    mid_HW = convert_exam(tmp_path).pixels_SHW[MID].astype(float)
    rows, columns = mid_HW.shape
    lit = mid_HW[:, columns // 2 :]
    # The fluid of the canal is the brightest line through the image; belly in front of it, muscle and skin behind.
    canal = lit.argmax(axis=1) + columns // 2
    assert 0.6 * columns < np.median(canal) < 0.8 * columns
    in_front = np.mean([(mid_HW[row, : canal[row]] > 30).sum() for row in range(rows)])
    behind = np.mean([(mid_HW[row, canal[row] + 4 :] > 30).sum() for row in range(rows)])
    assert in_front > 2 * behind
    # The cord takes up the canal's upper part and ends at L1; below it is almost all fluid.
    fluid = (lit > 0.6 * np.percentile(lit, 99.5)).sum(axis=1)
    assert fluid[2 * rows // 3 :].mean() > fluid[: rows // 3].mean()


@pytest.mark.parametrize(
    ("order", "axes"), [((2, 0, 1), ()), ((1, 2, 0), (0, 2)), ((0, 1, 2), (0, 1))], ids=["SRA", "PSL", "LPS"]
)
def test_axes_of_the_volume_do_not_matter(real, order, axes):
    voxels, affine = real
    other = Sagittal(voxels.transpose(order), affine[:, [*order, 3]])
    found, wanted = to_sagittal(*reversed_along(other, axes)), to_sagittal(voxels, affine)
    np.testing.assert_array_equal(found.voxels_SHW, wanted.voxels_SHW)
    np.testing.assert_allclose(found.affine, wanted.affine, atol=1e-9)


def test_resampling_keeps_places_and_means(real):
    volume = to_sagittal(*real)
    ramp = (volume.affine[:3] @ np.array([*np.indices(volume.voxels_SHW.shape).reshape(3, -1), np.ones(95823)]))[1]
    coarse = resample(Sagittal(ramp.reshape(volume.voxels_SHW.shape), volume.affine), (8.0, 3.0, 5.0))
    row_column = np.indices(coarse.voxels_SHW.shape).reshape(3, -1)
    expected = (coarse.affine[:3] @ np.array([*row_column, np.ones(row_column.shape[1])]))[1]
    np.testing.assert_allclose(coarse.voxels_SHW.ravel(), expected, atol=1e-6)
    np.testing.assert_array_equal(resample(volume, (4.0, 2.1875, 2.1875)).voxels_SHW, volume.voxels_SHW)


def test_matrix_keeps_places(real):
    volume = to_sagittal(*real)
    square = fit_matrix(volume, 128)
    assert square.voxels_SHW.shape == (9, 128, 128)
    top, left = np.argwhere(square.voxels_SHW[MID] == volume.voxels_SHW[MID].max())[0]
    row, column = np.argwhere(volume.voxels_SHW[MID] == volume.voxels_SHW[MID].max())[0]
    np.testing.assert_allclose(square.affine @ [MID, top, left, 1], volume.affine @ [MID, row, column, 1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda voxels, affine: to_sagittal(voxels[0], affine), "three axes"),
        (lambda voxels, affine: to_sagittal(voxels, affine + np.diag([0.0, 9, 0], 1)), "not perpendicular"),
        (lambda voxels, affine: to_stored(Sagittal(voxels / 455, affine)), "rescale the volume"),
        (lambda voxels, affine: fit_matrix(Sagittal(voxels, affine), 100), "--matrix 100"),
    ],
    ids=["plane", "shear", "scale", "matrix"],
)
def test_refuses(real, make, message):
    with pytest.raises(ValueError, match=message):
        make(*real)
