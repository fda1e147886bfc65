"""The synthetic cohort: its tree, its truth, its labels, and that nothing but the spine tells the label."""

from __future__ import annotations

import json
import math
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pydicom
import pytest
from pydicom.errors import InvalidDicomError
from scipy.ndimage import gaussian_filter
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lbp_ray.cohort import classify
from lbp_ray.config import load_config
from lbp_ray.phantom import ExamSpec, PhantomConfig, simulate_exam, write_cohort
from lbp_ray.phantom.__main__ import main
from lbp_ray.phantom.anatomy import DISC_LEVELS, FIRST_LUMBAR, SACRUM
from lbp_ray.phantom.cohort import (
    OULU_MODIC,
    OULU_PFIRRMANN,
    calibrate,
    draw_exams,
    draw_positives,
    expected_auc,
    roc_auc,
)
from lbp_ray.phantom.column import DISC_CODE
from lbp_ray.phantom.exam import Imaging, union_centroid
from lbp_ray.phantom.histories import DISPOSITIONS, answer, draw_histories, draw_questionnaire, latent_group, pain_year
from lbp_ray.phantom.tissue import T1, T2, T2_FAT_SUPPRESSED, TISSUES, signal
from lbp_ray.phantom.write import plan_cohort

CONFIGS = Path(__file__).parents[1] / "configs"
HEALTHY, WORN = ((2,) * 5, (0,) * 5), ((5,) * 5, (0, 2, 1, 2, 2))


def load(name, root, monkeypatch, *overrides):
    monkeypatch.setenv("LBP_RAY_ROOT", str(root))
    return load_config(PhantomConfig, CONFIGS / f"phantom_{name}.yaml", overrides)


def small(root, **cohort):
    sizes = {
        "studies": 4,
        "positives": 2,
        "excluded": {"slightly_symptomatic": 2},
        "excluded_imaged": 2,
        "templates": 1,
    }
    return PhantomConfig(
        out=root, seed=3, workers=1, image={"matrix": 64}, cohort=sizes | cohort, tree={"junk_files": 9}
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The tiny cohort at a quarter of its pixels, its headers, and its tables."""
    monkeypatch = pytest.MonkeyPatch()
    root = tmp_path_factory.mktemp("cohort")
    config = load("tiny", root, monkeypatch, "image.matrix=64", "tree.flipped_share=0.3", "workers=2")
    monkeypatch.undo()
    write_cohort(config)
    return config.out


@pytest.fixture(scope="module")
def headers(tiny):
    rows = []
    for path in sorted((tiny / "dicom").rglob("*")):
        try:
            header = pydicom.dcmread(path) if path.is_file() else None
        except (InvalidDicomError, EOFError):
            header = None
        if header is not None:
            rows.append(header)
    return {header.SOPInstanceUID: header for header in rows}


def series_of(headers, uid):
    wanted = headers[uid].SeriesInstanceUID
    return sorted(
        (h for h in headers.values() if h.SeriesInstanceUID == wanted), key=lambda h: h.ImagePositionPatient[0]
    )


def interval(label, score):
    """95 % interval of the ROC-AUC after Hanley and McNeil."""
    auc, m, n = roc_auc(label, score), int(label.sum()), int((1 - label).sum())
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    half = 1.96 * math.sqrt((auc * (1 - auc) + (m - 1) * (q1 - auc**2) + (n - 1) * (q2 - auc**2)) / (m * n))
    return auc - half, auc + half


def out_of_fold(features, label):
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    return cross_val_predict(model, features, label, cv=folds, method="predict_proba")[:, 1]


def test_same_configuration_gives_the_same_bytes_whatever_the_workers(tmp_path):
    trees = []
    for workers in (1, 2):
        config = small(tmp_path / str(workers)).model_copy(update={"workers": workers})
        write_cohort(config)
        trees.append({p.relative_to(config.out): p.read_bytes() for p in config.out.rglob("*") if p.is_file()})
    assert len(trees[0]) > 100
    assert trees[0] == trees[1]


def test_another_cohort_is_not_overwritten_and_the_same_is_not_repeated(tmp_path):
    config = small(tmp_path / "cohort")
    first = write_cohort(config)
    before = (config.out / "cohort.json").stat().st_mtime_ns
    assert write_cohort(config) == first
    assert (config.out / "cohort.json").stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match="remove it or choose another out="):
        write_cohort(config.model_copy(update={"seed": 4}))


def test_every_configuration_loads(tmp_path, monkeypatch):
    studies = {
        path.stem: load(path.stem.removeprefix("phantom_"), tmp_path, monkeypatch).cohort.studies
        for path in CONFIGS.glob("phantom_*.yaml")
    }
    assert studies == {"phantom_demo": 160, "phantom_tiny": 24, "phantom_roi": 400, "phantom_oulu": 526}


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("cohort.positives=200", "fewer than cohort.studies"),
        ("cohort.grades=oulu", "needs cohort.studies=526"),
        ("image.slices_min=7", "must exceed twice image.mid_shift"),
        ("out=relative", "absolute path"),
        ("cohort.study=3", "did you mean 'studies'"),
    ],
)
def test_command_line_refuses(override, fault, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LBP_RAY_ROOT", str(tmp_path))
    assert main(["--config", str(CONFIGS / "phantom_demo.yaml"), override]) == 2
    assert fault in capsys.readouterr().err


def test_headers_are_those_of_the_protocol(tiny, headers):
    truth = pd.read_csv(tiny / "truth.csv")
    for uid in truth["SOPInstanceUID"]:
        header = headers[uid]
        assert (header.EchoTime, header.RepetitionTime, header.EchoTrainLength) == (112.7, 3500, 27)
        assert (header.SliceThickness, header.SpacingBetweenSlices, header.Rows) == (4, 4, 64)
        assert [abs(c) for c in header.ImageOrientationPatient] == [0, 1, 0, 0, 0, 1]
        assert pydicom.uid.UID(uid).is_valid
        assert header.pixel_array.max() < 4096
    described = pd.Series([h.SeriesDescription for h in headers.values()])
    assert set(described) == {"SAG T2 FSE", "SAG T1 FSE", "3-PLANE LOC"}
    assert (described == "3-PLANE LOC").sum() == 3 * len(truth)


def test_instance_numbers_and_file_order_vary(headers, tiny):
    truth = pd.read_csv(tiny / "truth.csv")
    steps = {
        tuple(np.sign(np.diff([h.InstanceNumber for h in series_of(headers, uid)]))) for uid in truth["SOPInstanceUID"]
    }
    assert any(set(step) == {1} for step in steps)
    assert any(set(step) == {-1} for step in steps)


def test_truth_names_the_slice_nearest_the_mid_plane(tiny, headers):
    truth = pd.read_csv(tiny / "truth.csv", dtype={"acceptable_indices": str})
    for row in truth.itertuples():
        stack = series_of(headers, row.SOPInstanceUID)
        assert [h.SOPInstanceUID for h in stack].index(row.SOPInstanceUID) == row.mid_index
        assert len(stack) == row.num_slices
        assert np.allclose(np.diff([h.ImagePositionPatient[0] for h in stack]), 4)
        assert abs(row.mid_offset_mm) <= 2
        other = row.mid_index + (1 if row.mid_offset_mm > 0 else -1)
        wanted = {row.mid_index, other} if abs(row.mid_offset_mm) >= 1 else {row.mid_index}
        assert {int(k) for k in row.acceptable_indices.split(";")} == wanted


def test_rectangles_agree_with_truth_also_on_flipped_images(tiny):
    truth = pd.read_csv(tiny / "truth.csv").set_index("SOPInstanceUID")
    images = ElementTree.parse(tiny / "annotations.xml").findall("image")
    assert truth["flipped_columns"].nunique() == 2
    assert len(images) == 28  # of the task 24, outside it 4
    for image in images:
        boxes = {box.get("label"): [float(box.get(k)) for k in ("xtl", "ytl", "xbr", "ybr")] for box in image}
        assert tuple(boxes) == DISC_LEVELS
        row = truth.loc[image.get("name").removesuffix(".png")]
        assert union_centroid(np.array(list(boxes.values())), 64) == pytest.approx(
            (row["roi_row"], row["roi_column"]), abs=0.6
        )


def test_answers_lead_to_the_labels_that_were_drawn(tiny):
    asked, truth = pd.read_csv(tiny / "questionnaire.csv"), pd.read_csv(tiny / "truth.csv")
    group = classify(asked).groupby(asked["AccessionNumber"]).first()
    named = truth["label"].map({1: "symptomatic", 0: "asymptomatic"})
    task = truth["label"].notna()
    assert (group[truth.loc[task, "AccessionNumber"]].to_numpy() == named[task].to_numpy()).all()
    assert not set(group[truth.loc[~task, "AccessionNumber"]]) & {"symptomatic", "asymptomatic"}
    assert truth["label"].sum() == 10


def test_templates_come_from_outside_the_task(tiny):
    truth = pd.read_csv(tiny / "truth.csv").set_index("SOPInstanceUID")
    assert truth.loc[pd.read_csv(tiny / "templates.csv")["SOPInstanceUID"], "label"].isna().all()


def test_realised_auc_is_that_of_the_truth_table(tiny):
    truth = pd.read_csv(tiny / "truth.csv").dropna(subset="label")
    realised = json.loads((tiny / "cohort.json").read_text())["bayes_auc"]["realised"]
    assert roc_auc(truth["label"].to_numpy(int), truth["probability"].to_numpy()) == pytest.approx(realised, abs=1e-3)


def test_junk_lies_in_the_tree(tiny):
    names = {path.name for path in (tiny / "dicom").rglob("*")}
    assert {"README.txt", ".DS_Store", "Thumbs.db", "empty.dcm"} <= names


def test_oulu_grades_are_counted_exactly(tmp_path, monkeypatch):
    config = load("oulu", tmp_path, monkeypatch)
    exams = draw_exams(config.cohort, np.random.SeedSequence(1))
    task = exams.label >= 0
    for level in range(5):
        assert np.bincount(exams.pfirrmann[task, level], minlength=6).tolist() == OULU_PFIRRMANN[level].tolist()
        assert np.bincount(exams.modic[task, level], minlength=4).tolist() == OULU_MODIC[level].tolist()
    assert np.bincount(exams.label[task]).tolist() == [413, 113]
    assert exams.expected_auc == pytest.approx(0.80, abs=0.005)


def test_oulu_questionnaires_give_table_3():
    counts = {"asymptomatic": 413, "slightly_symptomatic": 363, "symptomatic": 113, "symptomatic_asymptomatic": 527}
    groups = [name for name, count in counts.items() for _ in range(count)] + ["not_enough_data"] * 11
    answers = draw_questionnaire(groups, np.random.default_rng(0)).astype(float)
    assert classify(answers).tolist() == groups
    assert len(answers.drop_duplicates()) > 60


def history(*episodes):
    """One person's (start, end, intensity) episodes."""
    return pain_year(*(np.array([values], float) for values in zip(*episodes, strict=True)))


@pytest.mark.parametrize(
    ("episodes", "group"),
    [
        ([(-31, 0, 6)], "symptomatic"),
        ([(-30, 0, 6)], "other"),
        ([(-100, -69, 6)], "symptomatic_asymptomatic"),
        ([(-100, -80, 9), (-40, -20, 2)], "symptomatic_asymptomatic"),
        ([(-400, -380, 2)], "other"),
        ([(-7, 0, 3)], "asymptomatic"),
        ([(-8, 0, 3)], "slightly_symptomatic"),
        ([(-900, -890, 9), (-3, 0, 2)], "slightly_symptomatic"),
        ([(-300, 0, 5)], "slightly_symptomatic"),
        ([(-20, 0, 6)], "other"),
    ],
)
def test_people_are_what_their_histories_say(episodes, group):
    assert latent_group(history(*episodes)).tolist() == [group]


def test_rules_find_the_truth_behind_answers_that_nobody_chose():
    """Not one history is rejected: what the rules make of everybody's answers is what everybody is."""
    met = set()
    for number, disposition in enumerate(DISPOSITIONS):
        year = pain_year(*draw_histories(disposition, 3000, np.random.default_rng(number)))
        truth = pd.Series(latent_group(year)).replace("other", "unclassified")
        assert (classify(answer(year)).to_numpy() == truth.to_numpy()).all()
        met |= set(truth)
    assert met == {*DISPOSITIONS, "unclassified"} - {"not_enough_data"}


def test_exam_counts_and_grades_of_a_patient_are_shared(tmp_path, monkeypatch):
    exams = draw_exams(load("demo", tmp_path, monkeypatch).cohort, np.random.SeedSequence(2))
    sizes = np.bincount(np.bincount(exams.patient))
    assert sizes[1:].tolist() == pytest.approx([140, 13, 3], abs=12)
    grades = exams.pfirrmann.mean(axis=1)
    pairs = [(a, b) for a in range(172) for b in range(a) if exams.patient[a] == exams.patient[b]]
    assert np.corrcoef([grades[a] for a, _ in pairs], [grades[b] for _, b in pairs])[0, 1] > 0.4


def test_expected_auc_is_the_mean_of_realised_ones():
    rng = np.random.default_rng(0)
    probability = expit(rng.normal(-0.5, 2, 2000))
    realised = [roc_auc((rng.random(2000) < probability).astype(int), probability) for _ in range(50)]
    assert expected_auc(probability) == pytest.approx(np.mean(realised), abs=0.003)


def test_calibration_reaches_prevalence_and_auc():
    severity = np.random.default_rng(0).normal(3, 2, 5000)
    slope, intercept, auc = calibrate(severity, 0.4, 0.9)
    probability = expit(slope * (severity - severity.mean()) / severity.std() + intercept)
    assert (probability.mean(), auc) == pytest.approx((0.4, 0.9), abs=1e-3)


def test_positives_are_drawn_in_proportion_to_their_likelihood():
    p, rng = np.array([0.9, 0.5, 0.2]), np.random.default_rng(0)
    odds = p / (1 - p)
    draws = np.mean([draw_positives(p, 1, rng) for _ in range(4000)], axis=0)
    assert draws == pytest.approx(odds / odds.sum(), abs=0.03)


def test_one_anatomy_gives_contrasts_that_agree():
    fluid, fat = TISSUES["csf"], TISSUES["fat"]
    assert signal(fluid, T2) > signal(fat, T2) > signal(TISSUES["muscle"], T2)
    assert signal(fat, T1) > signal(TISSUES["muscle"], T1) > signal(fluid, T1)
    assert signal(fat, T2_FAT_SUPPRESSED) < 0.3 * signal(fat, T2)
    volumes = simulate_exam(ExamSpec(), Imaging(matrix=64), (T2, T1, T2_FAT_SUPPRESSED)).volumes
    assert {name: v.shape[1:] for name, v in volumes.items()} == dict.fromkeys(("t2", "t1", "t2fs"), (64, 64))


def test_worn_discs_are_darker_and_lower():
    imaging = Imaging(matrix=256, noise=0.0)
    signals, heights = [], []
    for grades in (HEALTHY, WORN):
        exam = simulate_exam(ExamSpec(*grades), imaging, (T2,))
        mid = exam.truth.mid_index
        labels = exam.label_map(mid)
        discs = [labels == DISC_CODE + k + 1 for k in range(FIRST_LUMBAR, SACRUM)]
        signals.append(np.mean([exam.volumes["t2"][mid][disc].mean() for disc in discs]))
        heights.append(np.mean([disc.sum() / np.ptp(np.nonzero(disc)[1]) for disc in discs]))
        assert all((labels == k + 1).any() for k in range(FIRST_LUMBAR, SACRUM + 1))
    assert signals[1] < 0.6 * signals[0]
    assert heights[1] < 0.75 * heights[0]


def test_grades_change_nothing_but_the_spine():
    """Pose, slices, noise and coil come from streams of their own: only discs and endplates may differ."""
    healthy, worn = (
        simulate_exam(ExamSpec(*grades, exam_seed=(9,)), Imaging(matrix=64), (T2,)) for grades in (HEALTHY, WORN)
    )
    assert (healthy.positions_mm == worn.positions_mm).all()
    assert (healthy.truth.tilt_deg, healthy.truth.scale) == (worn.truth.tilt_deg, worn.truth.scale)
    assert healthy.truth.mid_index == worn.truth.mid_index
    assert healthy.truth.roi_row == pytest.approx(worn.truth.roi_row, abs=1.5)


def test_texture_differs_between_slices():
    exam = simulate_exam(ExamSpec(), Imaging(matrix=256, noise=0.0), (T2,))
    around, mid = exam.scene.surround, exam.truth.mid_index
    column = int(np.searchsorted(around.plane.u, (around.fascia[120] + around.skin[120]) / 2))
    fat = exam.volumes["t2"][mid - 2 : mid + 3, 110:130, column - 3 : column + 3].astype(float)
    grain = (fat - gaussian_filter(fat, (0, 2, 2))).reshape(5, -1)
    assert np.abs(np.corrcoef(grain)[np.triu_indices(5, 1)]).max() < 0.7


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """Demo-sized plans of four seeds: everything but pixels."""
    monkeypatch = pytest.MonkeyPatch()
    config = load("demo", tmp_path_factory.mktemp("planned"), monkeypatch)
    monkeypatch.undo()
    return [plan_cohort(config.model_copy(update={"seed": seed}), config.out) for seed in range(4)]


def test_metadata_does_not_tell_the_label(planned):
    features, labels = [], []
    for exams, identities, jobs in planned:
        for k in np.flatnonzero(exams.label >= 0):
            person = identities[k]
            uid = int(person.uid("study").rsplit(".", 1)[1]) % 10**6
            names = (int(person.patient_id[1:]), int(person.accession[1:]), int(person.date), int(person.time), uid)
            files = jobs[k].file_seed.generate_state(2).tolist()
            features.append([k, *names, person.age_years, person.sex == "F", int(person.folder[-6:], 16), *files])
            labels.append(exams.label[k])
    label = np.array(labels)
    low, high = interval(label, out_of_fold(np.array(features, float), label))
    assert low < 0.5 < high


def test_number_of_exams_does_not_tell_the_label(planned):
    sizes, labels = [], []
    for exams, _, _ in planned:
        task = exams.label >= 0
        patients, first, size = np.unique(exams.patient[task], return_index=True, return_counts=True)
        sizes += size.tolist()
        labels += exams.label[task][first].tolist()
        assert len(patients) < task.sum()
    low, high = interval(np.array(labels), np.array(sizes, float))
    assert low < 0.5 < high


@pytest.fixture(scope="module")
def population():
    """Eighty exams of both kinds, alternately healthy and worn, seen at 64 x 64."""
    imaging = Imaging(matrix=64, subslices=1)
    return [simulate_exam(ExamSpec(*(HEALTHY, WORN)[k % 2], (1, k), (2, k)), imaging, (T2,)) for k in range(80)]


def test_image_border_does_not_tell_the_grades(population):
    features = []
    for exam in population:
        image = exam.volumes["t2"][exam.truth.mid_index].astype(float)
        sides = (image[:4], image[-4:], image[:, :4], image[:, -4:])
        features.append(
            [part.mean() for side in sides for part in np.array_split(side, 4, axis=int(side.shape[1] > 4))]
        )
    label = np.arange(len(features)) % 2
    low, high = interval(label, out_of_fold(np.array(features), label))
    assert low < 0.5 < high


def test_stack_and_pose_do_not_tell_the_grades(population):
    features = [[len(e.positions_mm), e.truth.mid_index, e.truth.mid_offset_mm, e.truth.tilt_deg, e.truth.scale,
                 e.truth.roi_row, e.truth.roi_column] for e in population]  # fmt: skip
    label = np.arange(len(features)) % 2
    low, high = interval(label, out_of_fold(np.array(features), label))
    assert low < 0.5 < high


def test_pose_varies_and_the_centre_guess_fails(population):
    truth = [exam.truth for exam in population]
    pixel_mm = 280 / 64
    spread = pixel_mm * np.std([(t.roi_row, t.roi_column) for t in truth], axis=0)
    assert (spread > 9).all()
    assert np.hypot(*spread) >= 10
    assert np.ptp([t.tilt_deg for t in truth]) > 16
    assert np.ptp([t.scale for t in truth]) > 0.16
    centre = [len(e.positions_mm) // 2 in e.truth.acceptable_indices for e in population]
    shifts = [e.truth.mid_index - len(e.positions_mm) // 2 for e in population]
    assert np.mean(centre) <= 0.4
    assert (min(shifts), max(shifts)) == (-3, 3)
