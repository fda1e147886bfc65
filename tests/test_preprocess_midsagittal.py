import io
import json
import re

import numpy as np
import pyarrow as pa
import pytest
from dicom_factory import make_series
from matplotlib.image import imread
from pydicom import dcmread
from scipy import ndimage
from store_factory import make_record, make_store, pseudonym

from preprocess.commit import committed_directory, content_id
from preprocess.mapper import TaskFailure, map_here
from preprocess.midsagittal import contact_sheet
from preprocess.midsagittal.choose import (
    FLAG_BELOW,
    choose_for_store,
    load_midsagittal,
    locate_templates,
    read_template_list,
)
from preprocess.midsagittal.corrections import read_corrections
from preprocess.midsagittal.match import (
    MidsagittalError,
    find_midsagittal,
    load_templates,
    make_templates,
    slice_similarity,
)
from preprocess.pipeline import ConvertJob, convert_tree
from preprocess.store import schema as store_module
from preprocess.store.read import SliceStore


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


def test_what_cannot_be_judged_is_refused(tmp_path):
    with pytest.raises(MidsagittalError, match="another patient"):
        find_midsagittal(spine(0, middle=4), (2.9, 2.9), templates_of(4).without_patient("patient0"))
    with pytest.raises(MidsagittalError, match="--templates"):
        load_templates(tmp_path / "none.npz")
    with pytest.raises(MidsagittalError, match="--templates"):
        load_midsagittal(tmp_path)


# --- the artefact of a store -----------------------------------------------------------------------------------------

MIDDLES = (4, 6, 3, 7, 5, 4)
SPACING_MM = (4.0, 2.9, 2.9)
TEMPLATES = [(pseudonym("t", 0), 4), (pseudonym("t", 1), 6)]


@pytest.fixture(scope="module")
def series():
    """Exams with known middles; the last is noise, and each patient also has a T1 series that must not be judged."""
    pairs = []
    for number, middle in enumerate(MIDDLES):
        pixels = spine(number, middle=middle)
        pairs.append((make_record(number, pixels, spacing_mm=SPACING_MM), pixels))
        t1 = {"contrast": "t1_sagittal", "series_id": pseudonym("u", number)}
        pairs.append((make_record(number, pixels[:5], spacing_mm=SPACING_MM, **t1), pixels[:5]))
    noise = np.random.default_rng(0).integers(0, 999, (11, 96, 96)).astype(np.uint16)
    return [*pairs, (make_record(6, noise, spacing_mm=SPACING_MM), noise)]


@pytest.fixture(scope="module")
def store(tmp_path_factory, series):
    return make_store(tmp_path_factory.mktemp("store") / "x.zarr", series)


@pytest.fixture(scope="module")
def artefact(store):
    return choose_for_store(store, store.with_suffix(".midsagittal"), TEMPLATES, map_here)


def corrected(tmp_path, *lines):
    path = tmp_path / "corrections.csv"
    path.write_text("\n".join(["study_id,slice_index,note", *lines]) + "\n")
    return path


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_t2_series_is_judged_as_it_would_be_alone(store, series, artefact):
    table = load_midsagittal(artefact).set_index("series_id")
    assert table.index.tolist() == SliceStore.open(store, contrast="t2_sagittal").manifest["series_id"].tolist()
    templates = load_templates(artefact / "templates.npz")
    for record, pixels in series:
        if record.contrast == "t2_sagittal":
            alone = find_midsagittal(pixels, SPACING_MM[1:], templates.without_patient(record.patient_id))
            row = table.loc[record.series_id]
            assert (row["slice_index"], row["template_id"]) == (alone.slice_index, alone.template_id)
            numbers = (alone.score, alone.confidence, alone.margin)
            assert (row["score"], row["confidence"], row["margin"]) == numbers


def test_middles_are_found_and_only_noise_is_flagged(artefact):
    table = load_midsagittal(artefact).sort_values("study_id")
    assert table["slice_index"].tolist()[:-1] == list(MIDDLES)
    assert table["found_index"].tolist()[:-1] == list(MIDDLES)
    assert table["flagged"].tolist() == [False] * len(MIDDLES) + [True]
    assert set(table["source"]) == {"template"}


def test_meta_names_templates_owners_thresholds_and_counts(store, artefact):
    meta = json.loads((artefact / "meta.json").read_text())
    assert meta["store"] == SliceStore.open(store, contrast="t2_sagittal").content_hash
    assert [row["template_id"] for row in meta["templates"]] == [f"{sid}/{index}" for sid, index in TEMPLATES]
    assert [row["patient_id"] for row in meta["templates"]] == [pseudonym("p", 0), pseudonym("p", 1)]
    assert (meta["thresholds"], meta["studies"], meta["flagged"], meta["corrections"]) == (FLAG_BELOW, 7, 1, 0)


def test_address_of_the_store_is_hashed_in_pieces(monkeypatch):
    ids = [pseudonym("t", number) for number in (3, 1, 2, 0, 4)]
    table = pa.table({"series_id": ids, "content_hash": [series_id[::-1] for series_id in ids]})
    monkeypatch.setattr(store_module, "HASHED_ROWS", 2)
    assert store_module.hash_contents(table) == content_id(sorted((name, name[::-1]) for name in ids))


def test_correction_moves_the_slice_keeps_what_was_found_and_settles_the_flag(store, artefact, tmp_path):
    lines = [f"{pseudonym('s', 6)},2,noise only", f"{pseudonym('s', 3)}, 7 ,right already"]
    again = choose_for_store(store, tmp_path, TEMPLATES, map_here, corrected(tmp_path, *lines))
    before, after = (load_midsagittal(folder).set_index("study_id") for folder in (artefact, again))
    noise, right = pseudonym("s", 6), pseudonym("s", 3)
    assert after.loc[noise, "slice_index"] == 2
    assert after.loc[[noise, right], "source"].tolist() == ["correction"] * 2
    assert not after["flagged"].any()
    unchanged = ["found_index", "score", "confidence", "margin", "template_id"]
    assert after[unchanged].equals(before[unchanged])
    rest = after.index.difference([noise, right])
    assert after.loc[rest].equals(before.loc[rest])
    meta = json.loads((again / "meta.json").read_text())
    assert (meta["corrections"], meta["corrections_that_moved"]) == (2, 1)
    assert again.name != artefact.name
    assert not any(b"noise only" in content for content in files_of(again).values())


def test_artefact_is_made_once_and_is_the_same_bytes_anywhere(store, artefact, tmp_path):
    def backwards(function, items, **_):
        return [(item, function(item)) for _, item in reversed(list(items))]

    def never(*_, **__):
        pytest.fail("it exists")

    assert choose_for_store(store, artefact.parent, TEMPLATES, never) == artefact
    again = choose_for_store(store, tmp_path, TEMPLATES[::-1] + TEMPLATES, backwards)
    assert again.name == artefact.name
    assert files_of(again) == files_of(artefact)


def test_each_task_opens_its_part_only(store, tmp_path, monkeypatch):
    opened = []

    def open_part(path, *, partition=None, contrast=None):
        opened.append(partition)
        return original(path, partition=partition, contrast=contrast)

    original = SliceStore.open
    monkeypatch.setattr(SliceStore, "open", open_part)
    choose_for_store(store, tmp_path, TEMPLATES, map_here)
    assert set(opened) == set("abcdefg")


@pytest.mark.parametrize(
    ("lines", "faults"),
    [
        (["{s0},4", "PAT-7,3"], ["line 3: study_id names no study"]),
        (["{s0},11"], ["line 2: slice_index is out of range, the series has slices 0 to 10"]),
        (["{s0},-1", "{s1},4.0", "{s2},"], [f"line {line}: slice_index is not an integer" for line in (2, 3, 4)]),
        (["{s0},4", "{s1},3", "{s0},4"], [f"line {line}: its study stands on 2 lines" for line in (2, 4)]),
        (["PAT-7,x"], ["line 2: study_id names no study", "slice_index is not an integer"]),
    ],
    ids=["unknown", "range", "integer", "duplicate", "two faults"],
)
def test_faulty_corrections_are_refused_whole(store, tmp_path, lines, faults):
    ids = {f"s{number}": pseudonym("s", number) for number in range(3)}
    given = corrected(tmp_path, *(line.format(**ids) for line in lines))
    with pytest.raises(MidsagittalError) as caught:
        choose_for_store(store, tmp_path / "out", TEMPLATES, map_here, given)
    assert all(fault in str(caught.value) for fault in faults)
    assert "PAT-7" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_correction_file_without_its_columns_is_refused(tmp_path):
    (tmp_path / "c.csv").write_text("study;slice\n")
    with pytest.raises(MidsagittalError, match="lacks the column"):
        read_corrections(tmp_path / "c.csv")
    with pytest.raises(MidsagittalError, match="cannot be read"):
        read_corrections(tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("slices", "match"),
    [
        ([(pseudonym("t", 0), 11), (pseudonym("t", 1), 6), ("stranger", 0)], "line 2: no slice 11.*line 4: no slice 0"),
        ([(pseudonym("u", 0), 2)], "line 2: no slice 2 of a sagittal T2 series"),
        ([TEMPLATES[0]], "no template of another patient"),
    ],
    ids=["unknown", "other contrast", "own only"],
)
def test_templates_that_do_not_fit_are_refused(store, tmp_path, slices, match):
    with pytest.raises(MidsagittalError, match=match):
        choose_for_store(store, tmp_path, slices, map_here)


def test_a_task_that_died_is_no_artefact(store, tmp_path):
    def dying(function, items, **_):
        return [(item, TaskFailure()) for _, item in items]

    with pytest.raises(MidsagittalError, match="died on every attempt"):
        choose_for_store(store, tmp_path / "out", TEMPLATES, dying)
    assert not (tmp_path / "out").exists()


def test_templates_by_pseudonym_need_no_private_index(tmp_path):
    (tmp_path / "t.csv").write_text("series_id,slice_index\nabc,4\ndef,06\n")
    names = read_template_list(tmp_path / "t.csv")
    assert locate_templates(names, lambda _: pytest.fail("no UID")) == [("abc", 4), ("def", 6)]


@pytest.mark.parametrize("text", ["series_id,slice_index\nabc,4\ndef,x\n", "SOPInstanceUID\n1.2\n \n"], ids=str)
def test_template_rows_without_a_name_are_refused(tmp_path, text):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(MidsagittalError, match=r"faulty line\(s\): 3"):
        read_template_list(tmp_path / "t.csv")


# --- the contact sheet -----------------------------------------------------------------------------------------------


def shown_studies(page):
    return re.findall(r'<span class="id">(\w+)</span>', page)


def test_sheet_shows_flagged_studies_first_and_needs_no_other_file(artefact):
    page = (artefact / "contact_sheet.html").read_text()
    assert shown_studies(page) == [pseudonym("s", number) for number in (6, 0, 1, 2, 3, 4, 5)]
    assert page.count('class="badge">flagged') == 1
    assert page.count("data:image/png;base64,") == 7
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert imread(io.BytesIO((artefact / "contact_sheet.png").read_bytes())).shape[:2] == (160, 7 * 160)


def test_sheet_says_what_was_corrected(store, tmp_path):
    line = f"{pseudonym('s', 2)},5"
    again = choose_for_store(store, tmp_path, TEMPLATES, map_here, corrected(tmp_path, line))
    page = (again / "contact_sheet.html").read_text()
    assert shown_studies(page)[:2] == [pseudonym("s", 6), pseudonym("s", 2)]
    assert "corrected, found 3" in page


def test_sheet_of_a_large_cohort_is_bounded_and_paged(store, tmp_path, monkeypatch):
    monkeypatch.setattr(contact_sheet, "MAX_STUDIES", 5)
    monkeypatch.setattr(contact_sheet, "PAGE_STUDIES", 2)
    folder = choose_for_store(store, tmp_path, TEMPLATES, map_here)
    pages = [(folder / f"contact_sheet{suffix}.html").read_text() for suffix in ("", "_2", "_3")]
    counts = [len(shown_studies(page)) for page in pages]
    assert counts == [2, 2, 1]
    assert shown_studies(pages[0])[0] == pseudonym("s", 6)
    assert 'href="contact_sheet_3.html"' in pages[0]
    assert "random sample" in pages[0]


def choices(flagged, sources, margins):
    size = len(flagged)
    ids = [pseudonym("s", number) for number in range(size)]
    columns = {"study_id": ids, "series_id": ids, "source": sources, "flagged": flagged, "margin": margins}
    numbers = dict.fromkeys(["slice_index", "found_index", "num_slices"], [1] * size)
    return pa.table({**columns, **numbers, "score": [0.5] * size, "confidence": [1.0] * size})


@pytest.mark.parametrize(
    ("flagged", "sources", "margins", "order"),
    [
        ([True] * 3, ["template"] * 3, [0.01, 0.0, 0.005], [1, 2, 0]),
        ([False, False, True], ["template", "correction", "template"], [0.1, 0.2, 0.0], [2, 1, 0]),
        ([False] * 3, ["template"] * 3, [0.1] * 3, [0, 1, 2]),
    ],
    ids=["flagged only", "each kind", "none flagged"],
)
def test_order_of_the_sheet(flagged, sources, margins, order):
    cards = contact_sheet.choose_cards(choices(flagged, sources, margins))
    assert [card.study_id for card in cards] == [pseudonym("s", number) for number in order]


def test_sample_is_spread_and_a_study_more_changes_one_place_at_most(monkeypatch):
    monkeypatch.setattr(contact_sheet, "MAX_STUDIES", 20)
    fewer, more = (
        {card.study_id for card in contact_sheet.choose_cards(choices([False] * n, ["template"] * n, [0.1] * n))}
        for n in (299, 300)
    )
    assert len(fewer) == len(more) == 20
    assert len(fewer - more) <= 1
    assert len({study_id[0] for study_id in fewer}) > 8


def test_strip_shows_the_slice_between_its_neighbours_in_the_proportions_of_the_body():
    volume = np.zeros((3, 20, 10), np.uint16)
    volume[0, :, :5] = volume[1, :10] = 100
    strip = contact_sheet.make_strip(volume, 1, (1.0, 1.0))
    right, middle, left = strip[:, :160], strip[:, 160:320], strip[:, 320:]
    assert (right[:, 40:80].min(), right[:, 80:].max()) == (255, 0)
    assert (middle[:80, 40:120].min(), middle[80:].max(), middle[:, :40].max()) == (255, 0, 0)
    assert left.max() == 0
    assert not contact_sheet.make_strip(volume, 0, (1.0, 1.0))[:, :160].any()


# --- from DICOM ------------------------------------------------------------------------------------------------------


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
    assert not table["flagged"].any()
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
