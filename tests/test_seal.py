"""The split alone: drawn before anything is cropped, described without a sealed label, and found again."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
import yaml
from cohort_factory import NUM_EXAMS, TEMPLATES, choose_middle, make_cohort, prepared, sealed_exams, study_config
from sklearn.metrics import roc_auc_score
from store_factory import pseudonym

from lbp_ray.cohort import CohortError
from lbp_ray.prepare import seal
from lbp_ray.seal import main
from lbp_ray.splits import HOLDOUT, LEDGER, make_split
from lbp_ray.unseal import record_opening


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_cohort(tmp_path_factory.mktemp("data"))


def config_file(data, tmp_path, **paths):
    config = study_config(data, tmp_path)
    path = tmp_path / "study.yaml"
    content = config.model_dump(mode="json", include={"name", "paths", "roi", "split", "slice_counts"})
    content["paths"] |= paths
    path.write_text(yaml.safe_dump(content))
    return path


def test_command_prints_folder_and_folds_and_no_sealed_label(data, tmp_path, capsys):
    arguments = ["--config", str(config_file(data, tmp_path))]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    (folder,) = (tmp_path / "small" / "splits").iterdir()
    assert str(folder) in printed
    assert "  hold-out: 4 studies of 4 patients, sealed by " in printed
    assert "  fold 0: 6 studies of 6 patients, 3 symptomatic\n  fold 1: 6 studies" in printed
    assert len([line for line in printed.splitlines() if "symptomatic" in line]) == 2
    assert pd.read_parquet(folder / "split.parquet").query("fold == -1")["label"].isna().all()
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert main(arguments) == 0
    assert capsys.readouterr().out == printed
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_nothing_else_is_made_and_no_crop_is_needed(data, tmp_path):
    path = config_file(data, tmp_path, annotations=str(tmp_path / "not_drawn_yet.xml"))
    assert main(["--config", str(path), "recipe.weights=/nowhere.pt"]) == 0
    assert sorted(item.name for item in tmp_path.iterdir()) == ["small", "study.yaml"]


def test_command_explains_what_it_cannot_do(data, tmp_path, capsys):
    assert main(["--config", str(config_file(data, tmp_path)), "split.folds=9"]) == 2
    assert capsys.readouterr().err.startswith("error: 9 folds and a hold-out need at least 11 patients of each class")


def test_a_study_finds_the_split_that_was_sealed(data, tmp_path, monkeypatch):
    monkeypatch.setattr("lbp_ray.prepare.load_backbone_weights", lambda *_, **__: {"weight": torch.zeros(1)})
    sealed = seal(study_config(data, tmp_path)).split
    study = prepared(data, tmp_path)
    assert study.split.folder == sealed.folder
    pd.testing.assert_frame_equal(study.analysed.table, sealed.table)


def test_absent_gradings_are_told_before_anything_is_cropped(data, tmp_path, monkeypatch):
    monkeypatch.setattr("lbp_ray.prepare.build_crops", lambda *_, **__: pytest.fail("cropped"))
    with pytest.raises(CohortError, match=r"gradings not found: .*none.csv; .* link.*, and paths.gradings=null goes"):
        prepared(data, tmp_path, paths={"gradings": tmp_path / "none.csv"})


def test_an_equal_split_is_one_split_whatever_the_bytes_of_the_questionnaire(data, tmp_path):
    config = study_config(data, tmp_path)
    first = seal(config).split
    (tmp_path / "again.csv").write_text((data / "questionnaire.csv").read_text() + "\n")
    paths = config.paths.model_copy(update={"questionnaire": tmp_path / "again.csv"})
    assert seal(config.model_copy(update={"paths": paths})).split.folder == first.folder
    assert [path.name for path in first.folder.parent.iterdir()] == [first.folder.name]


def test_command_says_where_exams_were_opened_before(data, tmp_path, capsys):
    path = config_file(data, tmp_path)
    split = seal(study_config(data, tmp_path)).split
    sealed = split.table.loc[split.table["fold"] == HOLDOUT, "study_id"].tolist()
    record_opening(tmp_path / LEDGER, study="small", result_hash="r", split_hash="other", studies=sealed[1:])
    assert main(["--config", str(path)]) == 0
    assert "\n3 sealed exam(s) were opened before, for another study or in another split" in capsys.readouterr().out


def test_the_split_is_drawn_whatever_can_be_cropped(tmp_path, monkeypatch):
    """Annotations come and go; who is sealed stays, and is who would be sealed if every exam had a crop."""
    monkeypatch.setattr("lbp_ray.prepare.load_backbone_weights", lambda *_, **__: {"weight": torch.zeros(1)})
    data = make_cohort(tmp_path / "data", annotated=range(12))
    study = prepared(data, tmp_path)
    questionnaire = pd.read_csv(data / "questionnaire.csv").sort_values("study_id", ignore_index=True)
    exams = questionnaire[["study_id", "patient_id"]].assign(label=questionnaire["pain_now"])
    templates = frozenset(pseudonym("p", number) for number in TEMPLATES)
    expected = make_split(exams, folds=2, holdout_fraction=0.25, seed=0, never_holdout=templates)
    pd.testing.assert_frame_equal(study.split.table[["study_id", "patient_id", "fold"]], expected)
    assert len(study.analysed.table) == 12 < len(study.split.table) == NUM_EXAMS


def test_exams_without_a_middle_slice_are_in_no_split(data, tmp_path):
    config = study_config(data, tmp_path)
    middle = choose_middle(data, tmp_path)
    copy = tmp_path / "middle"
    copy.mkdir()
    for path in middle.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    table = pd.read_parquet(copy / "midsagittal.parquet")
    table[3:].to_parquet(copy / "midsagittal.parquet")
    paths = config.paths.model_copy(update={"midsagittal": copy})
    split = seal(config.model_copy(update={"paths": paths})).split
    assert set(split.table["study_id"]) == set(table["study_id"][3:])
    assert (split.table["fold"] == HOLDOUT).sum() == len(sealed_exams(split)) == 4


# --- no sealed label in any file -------------------------------------------------------------------------------------


def tables_below(root):
    """Every table of a run and its path."""
    readers = {".parquet": pd.read_parquet, ".csv": pd.read_csv}
    for path in sorted(root.rglob("*.*")):
        if path.suffix in readers and path.stat().st_size > 1:
            yield path, readers[path.suffix](path)


def told_by(values, labels):
    """Whether a column separates the labels, or some of its values occur twice and each with one label only."""
    known = pd.DataFrame({"value": values.to_numpy(), "label": labels.to_numpy()}).dropna()
    if len(known) < 4:
        return False
    groups = known.groupby(known["value"].astype(str))["label"]
    if groups.nunique().max() == 1 and groups.ngroups < len(known):
        return True
    numbers = pd.to_numeric(known["value"], errors="coerce")
    return bool(numbers.notna().all()) and roc_auc_score(known["label"], numbers) in (0, 1)


def test_no_table_of_a_run_tells_a_sealed_label(data, tmp_path, monkeypatch):
    """Half of the cohort is sealed, so that no column separates its labels by chance."""
    monkeypatch.setattr("lbp_ray.prepare.load_backbone_weights", lambda *_, **__: {"weight": torch.zeros(1)})
    study = prepared(data, tmp_path, split={"folds": 2, "holdout_fraction": 0.49})
    labels = pd.read_csv(data / "questionnaire.csv").set_index("study_id")["pain_now"]
    sealed = study.split.table.loc[study.split.table["fold"] == HOLDOUT, "study_id"]
    assert labels[sealed].value_counts().tolist() == [4, 4]
    read, told = [], []
    for path, table in tables_below(tmp_path):
        if "study_id" in table:
            rows = table[table["study_id"].isin(sealed)]
            read += [path.name] if len(rows) else []
            told += [(path.name, name) for name in rows if told_by(rows[name], labels[rows["study_id"]])]
    assert {"split.parquet", "crops.parquet"} <= set(read)
    assert told == []
    assert {path.name for path in tmp_path.rglob("*.np[yz]")} == {"crops.npy"}  # pixels alone
    planted = study.split.table.assign(label=labels[study.split.table["study_id"]].to_numpy())
    rows = planted[planted["fold"] == HOLDOUT]
    assert told_by(rows["label"], labels[rows["study_id"]])


def test_no_text_of_a_run_speaks_of_a_sealed_exam_and_none_is_the_questionnaire(data, tmp_path, monkeypatch):
    monkeypatch.setattr("lbp_ray.prepare.load_backbone_weights", lambda *_, **__: {"weight": torch.zeros(1)})
    sealed = [pseudonym("s", number) for number in sealed_exams(prepared(data, tmp_path).split)]
    texts = [path for path in tmp_path.rglob("*.*") if path.suffix in (".json", ".jsonl", ".html", ".csv", ".txt")]
    assert {path.name for path in texts} >= {"split.json", "crops.json"}
    assert not any(study in path.read_text() for path in texts for study in sealed)
