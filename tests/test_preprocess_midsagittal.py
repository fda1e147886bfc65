import numpy as np
import pytest
from dicom_factory import make_series
from pydicom import dcmread
from scipy import ndimage

from preprocess.commit import committed_directory
from preprocess.midsagittal import (
    MidsagittalError,
    find_midsagittal,
    load_midsagittal,
    load_templates,
    make_templates,
    slice_similarity,
)
from preprocess.pipeline import ConvertJob, convert_tree
from preprocess.store import SliceStore


def spine(seed, *, middle, shape=(11, 96, 96), shift=(0, 0), scale=1.0, tilt_deg=0.0, noise=30.0):
    """A toy volume: vertebrae everywhere, canal and spinous processes near the mid plane, foramina away from it."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[1], : shape[2]].astype(float)
    angle = np.radians(tilt_deg)
    v, u = (y - shape[1] / 2 - shift[0]) / scale, (x - shape[2] / 2 - shift[1]) / scale
    v, u = v * np.cos(angle) + u * np.sin(angle), u * np.cos(angle) - v * np.sin(angle)
    level = np.abs((v + 6) % 18 - 9)
    chain = ((np.abs(u) < 9) & (level < 7) & (np.abs(v) < 40)).astype(float)
    tissue = 300 * np.exp(-((v / 60) ** 2) - ((u / 30) ** 2))
    slices = []
    for index in range(shape[0]):
        off = abs(index - middle)
        canal = (np.abs(u - 16) < 6 - 2 * off) & (np.abs(v) < 42)
        processes = (np.abs(u - 29) < 8 - 4 * off) & (level < 5) & (np.abs(v) < 36)
        foramina = (np.hypot(u - 15, level - 9) < 2 + 1.5 * off) & (np.abs(v) < 40) & (off > 0)
        image = tissue + 500 * chain + 700 * canal + 500 * processes + 600 * foramina
        slices.append(ndimage.gaussian_filter(image, 1.0) + rng.normal(0, noise, image.shape))
    return np.clip(slices, 0, 4000).astype(np.uint16)


def templates_of(*middles):
    """Hand-picked slices of as many patients, in different poses."""
    tilts_deg = np.linspace(-8, 8, len(middles)) if len(middles) > 2 else np.zeros(len(middles))
    volumes = [spine(1000 + n, middle=m, tilt_deg=t) for n, (m, t) in enumerate(zip(middles, tilts_deg, strict=True))]
    return make_templates(
        [(f"s{n}/{m}", f"patient{n}", v[m], (2.9, 2.9)) for n, (v, m) in enumerate(zip(volumes, middles, strict=True))]
    )


@pytest.mark.parametrize(
    "pose",
    [
        {},
        {"shift": (6, -5)},
        {"scale": 1.1},
        {"scale": 0.9},
        {"tilt_deg": 10.0},
        {"tilt_deg": -10.0, "scale": 0.9, "shift": (4, 4)},
    ],
    ids=["plain", "moved", "large", "small", "tilted", "all"],
)
@pytest.mark.parametrize("middle", [3, 5, 8])
def test_the_middle_is_found_in_any_pose(pose, middle):
    choice = find_midsagittal(spine(middle, middle=middle, **pose), (2.9, 2.9), templates_of(4, 6, 5))
    assert choice.slice_index == middle
    assert choice.margin > 0
    assert choice.confidence > 0.5


def test_matrix_and_spacing_do_not_matter():
    volume = spine(7, middle=4)
    fine = np.repeat(np.repeat(volume, 2, axis=1), 2, axis=2)
    templates = templates_of(5, 6)
    coarse_ST = slice_similarity(volume, (2.9, 2.9), templates)
    np.testing.assert_allclose(slice_similarity(fine, (1.45, 1.45), templates), coarse_ST, atol=1e-5)


def test_brightness_does_not_matter():
    volume = spine(7, middle=4)
    templates = templates_of(5, 6)
    dim_ST = slice_similarity(volume, (2.9, 2.9), templates)
    np.testing.assert_allclose(slice_similarity(volume * 3, (2.9, 2.9), templates), dim_ST, atol=1e-5)


def test_a_template_resembles_itself_most():
    volume = spine(1000, middle=4)
    similarity_ST = slice_similarity(volume, (2.9, 2.9), templates_of(4))
    assert similarity_ST[:, 0].argmax() == 4
    assert similarity_ST[4, 0] == pytest.approx(1.0, abs=1e-5)


def test_templates_survive_a_file(tmp_path):
    templates = templates_of(4, 6)
    templates.save(tmp_path / "templates.npz")
    again = load_templates(tmp_path / "templates.npz")
    assert again.ids == templates.ids
    np.testing.assert_array_equal(again.spectra_TGK, templates.spectra_TGK)


def test_refusals(tmp_path):
    with pytest.raises(MidsagittalError, match="another patient"):
        find_midsagittal(spine(0, middle=4), (2.9, 2.9), templates_of(4).without_patient("patient0"))
    with pytest.raises(MidsagittalError, match="--templates"):
        load_templates(tmp_path / "none.npz")
    with pytest.raises(MidsagittalError, match="--templates"):
        load_midsagittal(tmp_path)


@pytest.fixture
def cohort(tmp_path):
    """Four exams with known middles; the first two patients give the templates."""
    middles = {f"P{number}": middle for number, middle in enumerate((4, 6, 3, 7))}
    for number, (patient, middle) in enumerate(middles.items()):
        pixels = spine(number, middle=middle)[::-1]  # file order is left → right
        make_series(tmp_path / "dicom" / patient, pixels=pixels, patient=patient, PixelSpacing=[2.9, 2.9])
    uids = [dcmread(tmp_path / f"dicom/P{n}/t2-{10 - middles[f'P{n}']:03d}.dcm").SOPInstanceUID for n in (0, 1)]
    (tmp_path / "templates.csv").write_text("SOPInstanceUID\n" + "\n".join(map(str, uids)) + "\n")
    return tmp_path, middles


def test_the_artefact_names_the_middle_of_every_series(cohort):
    root, middles = cohort
    outcome = convert_tree(ConvertJob(root / "dicom", root / "x.zarr", root / "templates.csv"))
    table = load_midsagittal(outcome.midsagittal)
    assert sorted(table["slice_index"]) == sorted(middles.values())
    assert table["series_id"].tolist() == SliceStore.open(root / "x.zarr").manifest["series_id"].tolist()
    own = table["template_id"].str.partition("/")[0] == table["series_id"]
    assert not own.any(), "a patient was judged by their own slice"


def test_unknown_template_is_refused_by_its_line(cohort):
    root, _ = cohort
    (root / "templates.csv").write_text("SOPInstanceUID\n1.2.3\n")
    with pytest.raises(ValueError, match=r"line\(s\) 2") as caught:
        convert_tree(ConvertJob(root / "dicom", root / "x.zarr", root / "templates.csv"))
    assert "1.2.3" not in str(caught.value)


def test_a_half_written_directory_is_never_seen(tmp_path):
    def fail():
        with committed_directory(tmp_path / "artefact", point="test") as folder:
            (folder / "file").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []
