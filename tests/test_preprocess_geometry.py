import numpy as np
import pytest
from dicom_factory import AXIAL, SAGITTAL, make_series

from preprocess.geometry import GeometryError, canonical_pixels, canonical_point, stack_geometry
from preprocess.headers.index import FileRow, index_files, walk
from preprocess.pixels.volume import load_volume
from preprocess.stacks import make_stacks


def rows_at(offsets_mm, *, orientation=SAGITTAL, spacing_mm=(0.5, 0.75), origin=(3.0, -7.0, 11.0)):
    normal = np.cross(orientation[:3], orientation[3:])
    points = [tuple(np.asarray(origin) + offset * normal) for offset in offsets_mm]
    return [
        FileRow(str(i), 1, position_mm=p, orientation=orientation, spacing_mm=spacing_mm) for i, p in enumerate(points)
    ]


def turned(orientation, degrees, axis):
    angle = np.radians(degrees)
    i, j = [k for k in range(3) if k != axis]
    rotation = np.eye(3)
    rotation[i, i] = rotation[j, j] = np.cos(angle)
    rotation[i, j], rotation[j, i] = -np.sin(angle), np.sin(angle)
    return tuple(np.round((rotation @ np.reshape(orientation, (2, 3)).T).T.ravel(), 8))


ORIENTATIONS = {
    "sagittal": SAGITTAL,
    "sagittal-mirrored-columns": (0.0, -1.0, 0.0, 0.0, 0.0, -1.0),
    "sagittal-upside-down": (0.0, 1.0, 0.0, 0.0, 0.0, 1.0),
    "sagittal-transposed": (0.0, 0.0, -1.0, 0.0, 1.0, 0.0),
    "sagittal-transposed-mirrored": (0.0, 0.0, 1.0, 0.0, -1.0, 0.0),
    "sagittal-oblique": turned(turned(SAGITTAL, 20, 2), 10, 0),
    "axial": AXIAL,
    "axial-oblique": turned(AXIAL, 25, 0),
    "coronal": (1.0, 0.0, 0.0, 0.0, 0.0, -1.0),
}


@pytest.mark.parametrize("orientation", ORIENTATIONS.values(), ids=ORIENTATIONS)
@pytest.mark.parametrize("pitch_mm", [4.0, -4.0], ids=["forward", "reversed"])
def test_every_pixel_keeps_its_place_in_the_patient(tmp_path, orientation, pitch_mm):
    pixels = np.arange(5 * 4 * 6, dtype=np.uint16).reshape(5, 4, 6)
    make_series(tmp_path, pixels=pixels, orientation=orientation, spacing_mm=pitch_mm, PixelSpacing=[0.5, 0.75])
    rows = index_files(str(tmp_path), walk(tmp_path))
    (stack,) = make_stacks(rows, {})
    volume = load_volume(tmp_path, stack)
    by_path = {row.path: row for row in rows}
    first = by_path[stack.rows[volume.geometry.order[0]].path]
    affine = np.reshape(volume.geometry.affine, (4, 4))
    # The affine is relative to the first canonical pixel; find where that pixel lies by DICOM's own formula.
    in_patient = {}
    for number, path in enumerate(sorted(by_path)):
        row = by_path[path]
        along_row, along_column = np.reshape(row.orientation, (2, 3))
        for (i, j), value in np.ndenumerate(pixels[number]):
            in_patient[int(value)] = np.asarray(row.position_mm) + along_row * 0.75 * j + along_column * 0.5 * i
    start = in_patient[int(volume.pixels_SHW[0, 0, 0])]
    for index, value in np.ndenumerate(volume.pixels_SHW):
        np.testing.assert_allclose(start + (affine @ [*index, 1])[:3], in_patient[int(value)], atol=1e-4)
    assert first.position_mm


@pytest.mark.parametrize("name", [name for name in ORIENTATIONS if name.startswith("sagittal")])
def test_canonical_sagittal_axes(name):
    geometry = stack_geometry(rows_at([0, 4, 8, 12, 16], orientation=ORIENTATIONS[name]))
    affine = np.reshape(geometry.affine, (4, 4))[:3, :3]
    assert affine[0, 0] > 0  # slices run right → left (+x)
    assert affine[2, 1] < 0  # rows run cranial → caudal (-z)
    assert affine[1, 2] > 0  # columns run anterior → posterior (+y)


def test_spacing_comes_from_positions_and_keeps_its_order():
    geometry = stack_geometry(rows_at([8, 0, 4]))
    assert (geometry.spacing_slice_mm, geometry.spacing_row_mm, geometry.spacing_column_mm) == (4.0, 0.5, 0.75)
    assert geometry.order == (0, 2, 1)  # the normal of this orientation points to the right
    assert geometry.positions_mm == (0.0, 4.0, 8.0)
    transposed = stack_geometry(rows_at([0, 4, 8], orientation=ORIENTATIONS["sagittal-transposed"]))
    assert (transposed.spacing_row_mm, transposed.spacing_column_mm) == (0.75, 0.5)


@pytest.mark.parametrize(
    ("offsets_mm", "code"),
    [
        ([0, 4, 8, 16, 20], "gap"),
        ([0, 4, 8, 8, 12], "duplicate_position"),
        ([0, 4, 8, 13.5, 17.5], "uneven_spacing"),
        ([0, 4, 8, 14, 18], "uneven_spacing"),
    ],
)
def test_broken_stacks_are_refused(offsets_mm, code):
    with pytest.raises(GeometryError, match=code):
        stack_geometry(rows_at(offsets_mm))


@pytest.mark.parametrize(("offsets_mm", "uneven"), [([0, 4, 8.005, 12], False), ([0, 4.2, 8, 12], True)])
def test_tolerance(offsets_mm, uneven):
    assert stack_geometry(rows_at(offsets_mm)).uneven is uneven


@pytest.mark.parametrize("flips", [(t, r, c) for t in (False, True) for r in (False, True) for c in (False, True)])
def test_points_move_with_pixels(flips):
    image = np.zeros((5, 8), int)
    image[1, 6] = 1
    transpose, flip_rows, flip_columns = flips
    moved = canonical_pixels(image, transpose=transpose, flip_rows=flip_rows, flip_columns=flip_columns)
    row, column = canonical_point(1.5, 6.5, moved.shape, flips)
    assert moved[int(row), int(column)] == 1
