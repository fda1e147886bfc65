"""The page of a regions artefact, its pictures and its console table."""

from __future__ import annotations

import io
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from chromium import open_page
from matplotlib.image import imread

from lbp_ray.roi.contact_sheet import MASK_COLOUR
from lbp_ray.roi.overrides import OverrideTargets, read_overrides
from lbp_ray.roi.regions import COLUMNS, SCORE_COLUMNS, Regions, RegionsMeta
from lbp_ray.segment.page import HISTORY_COLUMNS, render_console, write_page
from lbp_ray.segment.region import describe_mask, flags_of, plausible_ranges
from lbp_ray.segment.review import (
    REVIEW_COLUMNS,
    TRUE_COLOUR,
    WORST_CASES,
    SliceViews,
    mask_sheet,
    outlined,
    review_rows,
    worst_cases,
    write_review,
)
from lbp_ray.segment.scores import mean_box, score_slice
from preprocess.cvat.shapes import rle_from_mask

SIZE, SPACING_MM, FOLDS = 128, (2.0, 2.0), 3


def spine(number, *, levels=5):
    """A leaning column of overlapping rectangles; its place depends on the exam."""
    random = np.random.default_rng(number)
    top, left, lean = random.integers(10, 30), random.integers(40, 60), random.uniform(-1, 1)
    mask_HW = np.zeros((SIZE, SIZE), dtype=bool)
    for level in range(levels):
        start = int(top + 16 * level)
        shift = int(left + 4 * lean * (level - 2) ** 2 / 2)
        mask_HW[start : start + 18, shift : shift + 20] = True
    return mask_HW


def image(number):
    random = np.random.default_rng(number + 1000)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    body = 60 * np.exp(-(((columns - 70) / 55) ** 2) - ((rows - 64) / 80) ** 4)
    return np.round(body + 40 * spine(number) * (1 + 0.4 * np.sin(rows / 2.6)) + random.normal(0, 6, (SIZE, SIZE)) + 40)


def predictions(num_exams):
    """Predicted masks: most are the true one moved a little, the first three fail in different ways."""
    masks = [np.roll(spine(number), (number % 3 - 1, number % 2), (0, 1)) for number in range(num_exams)]
    masks[0] = np.zeros_like(masks[0])
    masks[1] = spine(1, levels=2)
    masks[2][100:125, 100:120] = True
    return masks


def make_regions(folder, *, num_exams=30, num_annotated=18, statements=("Synthetic images.",), apart=0):
    """An artefact whose first exams are annotated; `apart` of them were seen by no network."""
    truth = [spine(number) for number in range(num_exams)]
    masks = predictions(num_exams)
    plausible = plausible_ranges([describe_mask(mask, SPACING_MM) for mask in truth[:num_annotated]])
    box = mean_box((mask, SPACING_MM) for mask in truth[:num_annotated]).mask((SIZE, SIZE), SPACING_MM)
    rows, scores = [], []
    for number, mask in enumerate(masks):
        fold = -1 if number < apart or number >= num_annotated else number % FOLDS
        place = {"study_id": f"s{number:02d}", "patient_id": f"p{number:02d}", "series_id": f"t{number:02d}"}
        place |= {"slice_index": 5, "fold": fold}
        region = describe_mask(mask, SPACING_MM)
        source = "out_of_fold" if fold >= 0 else "model"
        sizes = {name: getattr(region, name) for name in COLUMNS if hasattr(region, name)}
        rows.append(
            place
            | {"rows": SIZE, "columns": SIZE, "source": source, "mask_rle": rle_from_mask(mask)}
            | sizes
            | {"flags": flags_of(region, plausible)}
        )
        if number < num_annotated:
            scores.append(score_slice(place, truth[number], mask, box, SPACING_MM))
    table, scores = pd.DataFrame(rows)[list(COLUMNS)], pd.DataFrame(scores)[list(SCORE_COLUMNS)]
    meta = RegionsMeta(
        version=1,
        store="5" * 64,
        midsagittal="6" * 64,
        annotations="7" * 64,
        weights_hash="8" * 64,
        recipe={"epochs": 20, "learning_rate": 1e-4, "loss": "bce"},
        num_folds=FOLDS,
        nested_in=None,
        trained_patients=tuple(f"p{number:02d}" for number in range(apart, num_annotated)),
        plausible=plausible,
        statements=statements,
        environment={"torch": "2.6", "device": "cpu"},
    ).hashed_with(table, scores)
    return Regions(table, scores, meta, folder)


def make_history(epochs=20):
    rows = [
        (fold, epoch, 1e-4 if epoch < 12 else 1e-5, 0.6 / epoch + 0.01 * fold, *validation)
        for fold in (*range(FOLDS), -1)
        for epoch in range(1, epochs + 1)
        for validation in [(0.65 / epoch + 0.02, 1 - 0.5 / epoch - 0.01 * fold) if fold >= 0 else (np.nan, np.nan)]
    ]
    return pd.DataFrame(rows, columns=list(HISTORY_COLUMNS))


VIEWS = SliceViews(
    image=lambda series, _: image(int(series[1:])),
    truth=lambda series, _: spine(int(series[1:])),
    predicted=lambda series, _: predictions(40)[int(series[1:])],
)


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("regions")
    regions = make_regions(folder)
    write_review(folder, regions.table, regions.scores, VIEWS)
    write_page(folder, regions, make_history())
    return regions


# --- pictures and list


def colour(picture, rgb):
    return (picture == rgb).all(axis=2)


def test_outlines_lie_on_the_masks():
    truth, mask = spine(3), np.roll(spine(3), 4, 1)
    picture = outlined(image(3), mask=mask, truth=truth, edge_px=SIZE)
    assert not (colour(picture, TRUE_COLOUR) & truth).any()
    assert not (colour(picture, MASK_COLOUR) & ~mask).any()
    rows, columns = np.nonzero(colour(picture, MASK_COLOUR))
    found_rows, found_columns = np.nonzero(mask)
    assert (rows.min(), columns.min()) == (found_rows.min(), found_columns.min())
    assert (rows.max(), columns.max()) == (found_rows.max(), found_columns.max())


def test_equal_masks_show_both_outlines():
    picture = outlined(image(3), mask=spine(3), truth=spine(3), edge_px=384)
    assert colour(picture, TRUE_COLOUR).sum() > 200
    assert colour(picture, MASK_COLOUR).sum() > 200


@pytest.mark.parametrize(("edge_px", "line_px"), [(192, 1), (384, 2)])
def test_outlines_stay_thin(edge_px, line_px):
    mask_HW = np.zeros((SIZE, SIZE), dtype=bool)
    mask_HW[32:96, 32:64] = True
    drawn = colour(outlined(image(3), mask=mask_HW, edge_px=edge_px), MASK_COLOUR)
    assert (drawn[edge_px // 2].sum(), drawn[:, 3 * edge_px // 8].sum()) == (2 * line_px, 2 * line_px)


def test_images_that_are_not_square_keep_their_proportions():
    picture = outlined(np.arange(128.0 * 64).reshape(128, 64), mask=np.zeros((128, 64), dtype=bool))
    assert picture[:, :96].any()
    assert not picture[:, 96:].any()


def test_the_worst_are_the_lowest_dice_first(artefact):
    worst = worst_cases(artefact.scores)
    assert len(worst) == WORST_CASES
    assert list(worst["study_id"][:1]) == ["s00"]  # the empty mask
    assert worst["dice"].is_monotonic_increasing
    assert worst["dice"].max() <= artefact.scores.drop(artefact.scores.index[worst.index])["dice"].max()


def test_only_the_worst_masks_are_asked_for(artefact, tmp_path):
    asked = []
    truth = lambda series, index: (asked.append(series), VIEWS.truth(series, index))[1]  # noqa: E731
    views = SliceViews(VIEWS.image, truth, VIEWS.predicted)
    write_review(tmp_path, artefact.table, artefact.scores, views)
    assert len(asked) == WORST_CASES


def test_sheets_are_large_enough_to_read_and_the_same_every_time(artefact):
    worst = imread(artefact.folder / "worst.png")
    assert worst.shape[1] == 4 * 384
    assert worst.shape[0] > 3 * 384
    sheet = mask_sheet(artefact.table.head(9), VIEWS.image)
    assert imread(io.BytesIO(sheet)).shape[1] == 6 * 192
    assert sheet == mask_sheet(artefact.table.head(9), VIEWS.image)


def test_review_list_has_every_flagged_exam_with_reasons(artefact):
    rows = review_rows(artefact.table)
    assert tuple(rows.columns) == REVIEW_COLUMNS
    assert dict(zip(rows["study_id"], rows["flags"], strict=True)) == {
        "s00": "empty",
        "s01": "small",
        "s02": "several_components+large",
    }
    assert rows["reasons"].iloc[0] == "the mask holds no pixel"


def test_review_list_filled_in_is_an_override_file(artefact, tmp_path):
    rows = pd.read_csv(artefact.folder / "review.csv", dtype=str, keep_default_na=False)
    rows["action"] = ["centre", "use", "exclude"]
    rows.loc[0, ["centre_row", "centre_column"]] = ["60.5", "70"]
    rows.to_csv(tmp_path / "overrides.csv", index=False)
    known = frozenset(artefact.table["study_id"])
    targets = OverrideTargets(dict.fromkeys(known, (SIZE, SIZE)), known - {"s00"}, frozenset())
    read = read_overrides(tmp_path / "overrides.csv", targets)
    assert {study: override.action for study, override in read.items()} == {
        "s00": "centre",
        "s01": "use",
        "s02": "exclude",
    }
    assert read["s00"].centre == (60.5, 70.0)


def test_nothing_flagged_leaves_an_empty_list_and_no_sheet(artefact, tmp_path):
    table = artefact.table.assign(flags="")
    write_review(tmp_path, table, artefact.scores, VIEWS)
    assert not (tmp_path / "flagged.png").exists()
    assert (tmp_path / "review.csv").read_text() == ",".join(REVIEW_COLUMNS) + "\n"


# --- page


class Elements(HTMLParser):
    """Tags, attributes and text of a page; complains of tags that do not close."""

    def __init__(self, text):
        super().__init__()
        self.open, self.found, self.words = [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in {"meta", "img"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def page(artefact):
    return Elements((artefact.folder / "report.html").read_text())


def test_page_is_self_contained(page, artefact):
    for _, attributes in page.found:
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:image/png;base64,"))
    assert "://" not in (artefact.folder / "report.html").read_text()
    assert sum(tag == "img" for tag, _ in page.found) == 3
    ids = [attributes["id"] for _, attributes in page.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {attributes["href"][1:] for tag, attributes in page.found if tag == "a"}
    assert targets <= set(ids)


def test_page_says_the_score_beside_the_box_first(page, artefact):
    mean, box = artefact.scores["dice"].mean(), artefact.scores["baseline_dice"].mean()
    assert re.search(rf"Verdict Out-of-fold Dice {mean:.3f} \(± 0\.\d{{3}} standard error over folds\)", page.text)
    assert f"beside {box:.3f} of a fixed mean box" in page.text
    assert f"{artefact.scores['centroid_error_mm'].median():.1f} mm off in the median" in page.text
    assert "3 of 30 masks are flagged for review: they are not cropped unless a person decides so." in page.text


def test_page_has_every_fold_flag_and_fact(page, artefact):
    for fold, part in artefact.scores.groupby("fold"):
        assert f"fold {fold} {len(part)} {len(part)} {part['dice'].mean():.3f}" in page.text
    for words in (
        "Read this first Synthetic images.",
        "empty 1: the mask holds no pixel",
        "several_components 1: the mask falls into several parts",
        "s02 several_components, large",
        "epochs 20",
        "18 masks by the fold network that never saw the patient, 12 masks by the final network.",
        "3 folds (folds of their own by patient), 18 patients trained on",
        "Standard error over patients ± 0.0",
    ):
        assert words in page.text


def test_page_is_the_same_every_time(artefact, tmp_path):
    for name in ("worst.png", "contact_sheet.png", "flagged.png"):
        shutil.copyfile(artefact.folder / name, tmp_path / name)
    again = write_page(tmp_path, artefact, make_history())
    assert again.read_bytes() == (artefact.folder / "report.html").read_bytes()


def test_page_escapes_what_a_configuration_says(tmp_path):
    regions = make_regions(tmp_path, statements=("<script>alert(1)</script>",))
    text = write_page(tmp_path, regions, make_history()).read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_page_without_pictures_or_flags(tmp_path):
    regions = make_regions(tmp_path)
    calm = Regions(regions.table.assign(flags=""), regions.scores, regions.meta, tmp_path)
    found = Elements(write_page(tmp_path, calm, make_history(epochs=1)).read_text())
    assert "No mask is flagged." in found.text
    assert not any(tag == "img" for tag, _ in found.found)


def test_patients_no_network_saw_are_summarised_apart(tmp_path):
    regions = make_regions(tmp_path, num_annotated=20, apart=5)
    of_folds = regions.scores[regions.scores["fold"] >= 0]
    found = Elements(write_page(tmp_path, regions, make_history()).read_text())
    assert f"Out-of-fold Dice {of_folds['dice'].mean():.3f}" in found.text
    assert "Patients that no network was trained on by the final network 5 5" in found.text
    assert "5 annotated images of 5 patients that no network was trained on" in " ".join(
        render_console(regions).split()
    )


def test_missing_curves_are_refused(artefact, tmp_path):
    with pytest.raises(ValueError, match=r"missing: \['train_loss'\]"):
        write_page(tmp_path, artefact, make_history().drop(columns="train_loss"))


# --- words


@pytest.mark.parametrize(
    ("dice", "box", "told"),
    [
        (0.7, 0.7, "no better than a box that never looks"),
        (0.95, 0.85, "scores above 0.80 here"),
        (0.95, 0.7, ""),
    ],
    ids=["useless", "easy", "fine"],
)
def test_verdict_warns_of_scores_that_mean_little(artefact, dice, box, told):
    scores = artefact.scores.assign(dice=dice, baseline_dice=box)
    text = " ".join(render_console(Regions(artefact.table, scores, artefact.meta, artefact.folder)).split())
    assert told in text
    assert ("that never looks" in text) == bool(told)


def test_console_table(artefact):
    text = render_console(artefact)
    assert max(map(len, text.splitlines())) <= 100
    assert re.search(rf"^Dice, mean +{artefact.scores['dice'].mean():.3f} +0\.\d+$", text, flags=re.MULTILINE)
    assert re.search(r"^  SE over folds +± 0\.\d{3} +± 0\.\d{3}$", text, flags=re.MULTILINE)
    assert re.search(r"^  fold 2 \(n = 6\) +0\.\d+ +0\.\d+$", text, flags=re.MULTILINE)
    assert re.search(r"^  95th percentile +\d+\.\d mm +\d+\.\d mm$", text, flags=re.MULTILINE)
    assert "1  empty: the mask holds no pixel" in text
    assert "- Synthetic images." in text


@pytest.mark.browser
@pytest.mark.parametrize("width", [1400, 420])
def test_page_opens_in_a_browser_without_overflow(artefact, width):
    with open_page(f"file://{artefact.folder / 'report.html'}", size=(width, 1000)) as tab:
        tab.wait_for("document.readyState === 'complete' && document.images.length === 3")
        assert tab.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        assert tab.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
