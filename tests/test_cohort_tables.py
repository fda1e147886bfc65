"""Tables 3 and 4 from the phantom's CSVs as written, the protocol check, the funnel and the command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from store_factory import make_record, make_store, pseudonym

from lbp_ray.cohort import CohortError, summarise_cohort
from lbp_ray.cohort.__main__ import main
from lbp_ray.cohort.funnel import funnel_markdown, funnel_svg, losses, read_funnel
from lbp_ray.cohort.protocol import check_protocol
from lbp_ray.config import load_config
from lbp_ray.phantom import PhantomConfig
from lbp_ray.phantom.write import draw_tables, plan_cohort, write_tables
from lbp_ray.study import CohortConfig, ProtocolConfig

CONFIGS = Path(__file__).parents[1] / "configs"

TABLE_3 = {
    "asymptomatic": (413, "29 %"),
    "slightly symptomatic": (363, "25 %"),
    "symptomatic": (113, "8 %"),
    "symptomatic asymptomatic": (527, "37 %"),
    "unclassified": (0, "0 %"),
    "not enough data": (11, "1 %"),
}
"""Counts and percentages as the thesis prints them, and a row of our own for answers that meet no rule."""

TABLE_4 = """
pfirrmann 0: 2, 2, 2, 2, 2
pfirrmann 1: 0, 0, 1, 1, 0
pfirrmann 2: 454 (86 %), 412 (78 %), 332 (63 %), 180 (34 %), 151 (29 %)
pfirrmann 3: 58 (11 %), 91 (17 %), 131 (25 %), 161 (31 %), 126 (24 %)
pfirrmann 4: 11 (2 %), 20 (4 %), 55 (10 %), 153 (29 %), 184 (35 %)
pfirrmann 5: 1, 1, 5 (1 %), 29 (6 %), 63 (12 %)
pfirrmann, all: 526, 526, 526, 526, 526
modic 0: 508 (97 %), 507 (96 %), 485 (92 %), 421 (80 %), 371 (71 %)
modic 1: 7 (1 %), 9 (2 %), 14 (3 %), 20 (4 %), 31 (6 %)
modic 2: 11 (2 %), 9 (2 %), 25 (5 %), 65 (12 %), 92 (17 %)
modic 3: 0, 1, 2, 20 (4 %), 32 (6 %)
modic, all: 526, 526, 526, 526, 526
"""

GE = {"echo_time_ms": 112.7, "repetition_time_ms": 3500.0, "field_strength_t": 1.5, "slice_thickness_mm": 4.0}


@pytest.fixture(scope="module")
def oulu(tmp_path_factory):
    """The Oulu-sized phantom's questionnaire and gradings, as its writer leaves them, and linked ones."""
    root = tmp_path_factory.mktemp("oulu")
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("LBP_RAY_ROOT", str(root))
    config = load_config(PhantomConfig, CONFIGS / "phantom_oulu.yaml")
    monkeypatch.undo()
    exams, identities, _ = plan_cohort(config, root)
    generator = np.random.default_rng(np.random.SeedSequence(config.seed, spawn_key=(1,)).spawn(3)[0])
    write_tables(draw_tables(config, exams, identities, generator), root, generator)
    for name in ("questionnaire", "gradings"):
        table = pd.read_csv(root / f"{name}.csv")
        names = {"AccessionNumber": "study_id", "PatientID": "patient_id"}
        table.rename(columns=names).to_csv(root / f"linked_{name}.csv", index=False)
    return root


def cells(markdown):
    return [[cell.strip() for cell in line.strip("|\n").split("|")] for line in markdown.splitlines()[2:]]


def test_table_3_comes_from_the_questionnaire_as_written(oulu, tmp_path):
    assert len(pd.read_csv(oulu / "questionnaire.csv")) == 1427
    assert main(["--questionnaire", str(oulu / "questionnaire.csv"), "--out", str(tmp_path)]) == 0
    *rows, total = cells((tmp_path / "table3.md").read_text())
    assert {row[0]: (int(row[1]), row[2]) for row in rows} == TABLE_3
    assert total[:2] == ["all", "1427"]
    table = pd.read_csv(tmp_path / "table3.csv").set_index("group")
    assert table["share"].sum() == pytest.approx(1)
    assert (table["share_complete"] * 1416).dropna().tolist() == pytest.approx([413, 363, 113, 527, 0])


def test_table_4_comes_from_the_gradings_as_written(oulu, tmp_path):
    linked = [f"--{name}={oulu / f'linked_{name}.csv'}" for name in ("questionnaire", "gradings")]
    assert len(pd.read_csv(oulu / "gradings.csv")) == 538
    assert main([*linked, "--out", str(tmp_path)]) == 0
    rows = cells((tmp_path / "table4.md").read_text())
    assert [f"{row[0]}: {', '.join(row[1:])}" for row in rows] == TABLE_4.strip().splitlines()
    table = pd.read_csv(tmp_path / "table4.csv").set_index(["scale", "grade"])
    assert table.loc[("pfirrmann", 2), "L1L2":"L5S1"].tolist() == [454, 412, 332, 180, 151]
    graded = pd.read_csv(tmp_path / "graded.csv")
    assert (len(graded), graded["pfirrmann_zero"].sum(), graded["pfirrmann_L1L2"].isna().sum()) == (538, 10, 2)


def test_zero_counts_as_a_grade_only_where_asked(oulu):
    asked, grades = (pd.read_csv(oulu / f"linked_{name}.csv") for name in ("questionnaire", "gradings"))
    missing, grade = (
        summarise_cohort(asked, grades, None, CohortConfig(pfirrmann_zero=rule)) for rule in ("missing", "grade")
    )
    assert missing.grades == grade.grades
    assert missing.num_pfirrmann_zero == grade.num_pfirrmann_zero == 10
    assert (missing.num_subjects, missing.num_complete) == (1427, 1416)
    assert (missing.num_multi_match, missing.num_no_match) == (527, 0)


def test_phantom_does_not_know_the_rules():
    loaded = "import sys, lbp_ray.phantom.__main__; print('lbp_ray.cohort' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def answers(*rows, **more):
    columns = ["low_back_pain", "frequency", "intensity", "previous_episodes", "pain_now"]
    return pd.DataFrame(rows, columns=columns).assign(**more)


MIXED = ((2, 3, 6, 0, 1), (1, None, None, 0, 0), (2, 2, 7, 0, 1), (2, 1, 2, 0, 1), (2, None, 4, 0, 1))


def test_rows_are_named_by_line_or_study(tmp_path):
    answers(*MIXED).to_csv(tmp_path / "asked.csv", index=False)
    assert main(["--questionnaire", str(tmp_path / "asked.csv"), "--out", str(tmp_path / "a")]) == 0
    listed = pd.read_csv(tmp_path / "a" / "rows.csv")
    assert listed.columns.tolist() == ["line", "rules", "group", "why"]
    assert listed[["line", "why", "group"]].to_numpy().tolist() == [
        [4, "no_rule", "unclassified"],
        [5, "several_rules", "asymptomatic"],
    ]
    assert listed["rules"].tolist()[1] == "asymptomatic+slightly_symptomatic"
    answers(*MIXED, study_id=list("abcde"), patient_id=list("vwxyz")).to_csv(tmp_path / "linked.csv", index=False)
    assert main(["--questionnaire", str(tmp_path / "linked.csv"), "--out", str(tmp_path / "b")]) == 0
    assert pd.read_csv(tmp_path / "b" / "rows.csv")["study_id"].tolist() == ["c", "d"]


def test_answers_that_meet_no_rule_have_a_row_of_their_own():
    summary = summarise_cohort(answers(*MIXED), None, None, CohortConfig())
    assert {row.group: row.count for row in summary.groups}["unclassified"] == 1
    assert (summary.num_complete, summary.num_multi_match, summary.num_no_match) == (4, 1, 1)
    assert [row.share_complete for row in summary.groups][-2:] == [0.25, None]
    assert (summary.grades, summary.agreement, summary.protocol) == ((), (), ())


def test_only_what_departs_from_the_protocol_is_listed():
    manifest = pd.DataFrame(
        {
            "study_id": ["a", "b", "c", "d"],
            "echo_time_ms": [112.7, 113.5, 90.0, None],
            "rows": [512, 512, 511, 512],
            "manufacturer": ["ge", "siemens", "", "ge"],
        }
    )
    rows, findings = check_protocol(manifest, ProtocolConfig(echo_time_ms=112.7, rows=512, manufacturer="ge"))
    counted = {row.parameter: (row.found, row.num_out, row.num_unknown) for row in rows}
    assert counted == {
        "echo_time_ms": ("90 to 113.5", 1, 1),
        "rows": ("511 to 512", 1, 0),
        "manufacturer": ("ge, siemens", 1, 1),
    }
    named = findings[["study_id", "parameter", "found", "finding"]].to_numpy().tolist()
    assert ["c", "echo_time_ms", "90", "out"] in named
    assert ["d", "echo_time_ms", "", "unknown"] in named
    assert len(named) == 5


def test_tolerance_widens_measured_values_only():
    manifest = pd.DataFrame({"study_id": ["a"], "echo_time_ms": [113.5], "rows": [511]})
    for tolerance, out in ((0.001, [1, 1]), (0.05, [0, 1])):
        rows, _ = check_protocol(manifest, ProtocolConfig(echo_time_ms=112.7, rows=512, tolerance=tolerance))
        assert [row.num_out for row in rows] == out


def study_yaml(path, **protocol):
    places = {name: f"/data/{name}" for name in ("store", "questionnaire", "annotations", "runs")}
    path.write_text(str({"name": "s", "paths": places, "cohort": {"protocol": protocol} if protocol else {}}))
    return path


def test_protocol_is_checked_on_exams_of_the_task(tmp_path):
    pixels = np.ones((3, 8, 6), np.uint16)
    found = ({}, {"echo_time_ms": 90.0}, {"echo_time_ms": 80.0})
    store = make_store(tmp_path / "x.zarr", [(make_record(k, pixels, **GE | v), pixels) for k, v in enumerate(found)])
    ids = {"study_id": [pseudonym("s", k) for k in range(3)], "patient_id": [pseudonym("p", k) for k in range(3)]}
    answers(*MIXED[:3], **ids).to_csv(tmp_path / "asked.csv", index=False)  # the third meets no rule
    given = ["--questionnaire", tmp_path / "asked.csv", "--store", store, "--out", tmp_path]
    assert main([*map(str, given), "--config", str(study_yaml(tmp_path / "study.yaml", **GE))]) == 0
    listed = pd.read_csv(tmp_path / "protocol.csv")
    assert listed[["study_id", "parameter", "found"]].to_numpy().tolist() == [[pseudonym("s", 1), "echo_time_ms", 90]]


FUNNEL = (
    "name,count,reason\nchildren,12231,\nquestionnaires sent,10321,lost to follow-up\n"
    "answered,6825,no answer\nanalysed,526,other groups | no images\n"
)


def test_funnel_is_written_as_table_and_drawing(tmp_path):
    (tmp_path / "funnel.csv").write_text(FUNNEL)
    assert main(["--funnel", str(tmp_path / "funnel.csv"), "--out", str(tmp_path)]) == 0
    rows = cells((tmp_path / "funnel.md").read_text())
    assert rows[0] == ["children", "12231", "", "", ""]
    assert rows[2] == ["answered", "6825", "3496", "66 %", "no answer"]
    steps = read_funnel(tmp_path / "funnel.csv")
    assert losses(steps) == [0, 1910, 3496, 6299]
    svg = (tmp_path / "funnel.svg").read_bytes()
    assert svg.startswith(b"<?xml")
    assert svg == funnel_svg(steps)
    assert "other groups / no images" in funnel_markdown(steps)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("name,count,reason\nmothers,12068,\nchildren,12231,\n", r"line 3: .*'children' \(12231\) after 'mothers'"),
        ("name,count,reason\nall,many,\n", "line 2: a step needs a name and a whole count"),
        ("name,count,reason\n,3,\n", "line 2: a step needs a name"),
        ("name,number\nall,3\n", "must have the columns name, count, reason"),
        ("name,count,reason\n", "a row per step"),
    ],
)
def test_funnel_that_cannot_be_is_refused(tmp_path, text, fault):
    (tmp_path / "funnel.csv").write_text(text)
    with pytest.raises(CohortError, match=fault):
        read_funnel(tmp_path / "funnel.csv")


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["--questionnaire", "nowhere.csv"], "nowhere.csv"),
        (["--questionnaire", "empty.csv"], "No columns"),
        (["--questionnaire", "header.csv"], "no rows"),
        (["--questionnaire", "trailing.csv"], "more fields than the header"),
        (["--questionnaire", "unlinked.csv", "--gradings", "gradings.csv"], "lacks study_id, patient_id"),
        (["--questionnaire", "linked.csv", "--gradings", "gradings.csv"], "lack the column(s) reader"),
        (["--questionnaire", "linked.csv", "--store", "x.zarr"], "give --config"),
        (["--questionnaire", "linked.csv", "--store", "x.zarr", "--config", "study.yaml"], "not a slice store"),
        (["--questionnaire", "linked.csv", "--config", "wrong.yaml"], "must hold a mapping"),
        (["--questionnaire", "linked.csv", "--config", "unknown.yaml"], "unknown key"),
        (["--questionnaire", "absent.csv"], "absent.csv not found: give a CSV as collected"),
        (["--questionnaire", "linked.csv", "--out", "linked.csv"], "linked.csv"),
        (["--funnel", "linked.csv"], "must have the columns"),
    ],
)
def test_faults_end_the_command_with_one_line(tmp_path, monkeypatch, capsys, arguments, fault):
    monkeypatch.chdir(tmp_path)
    for name, text in {"empty": "", "header": ",".join(answers().columns) + "\n", "gradings": "study_id\na\n"}.items():
        Path(f"{name}.csv").write_text(text)
    answers(*MIXED).to_csv("unlinked.csv", index=False)
    Path("trailing.csv").write_text(",".join(answers().columns) + "\n2,3,6,0,1,\n")
    answers(*MIXED[:2], study_id=["a", "b"], patient_id=["p", "q"]).to_csv("linked.csv", index=False)
    study_yaml(Path("study.yaml"), **GE)
    study_yaml(Path("unknown.yaml"), echo_time=112.7)
    Path("wrong.yaml").write_text("just text")
    assert main(["--out", "out", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert fault in error
    assert not Path("out").exists()


def test_something_to_do_is_required(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--out", str(tmp_path)])
    assert "--questionnaire is required" in capsys.readouterr().err


def test_an_exam_without_a_patient_is_refused():
    asked = answers(*MIXED[:2], study_id=["a", None], patient_id=[None, None])
    gradings = pd.DataFrame({"study_id": ["a"]})
    with pytest.raises(CohortError, match="study a has no patient_id"):
        summarise_cohort(asked, gradings, None, CohortConfig())
