from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from study_factory import make_spec

from lbp_ray.metrics import MetricError
from lbp_ray.out_of_fold import (
    OUT_OF_FOLD_COLUMNS,
    IncompleteStudyError,
    check_environments,
    collect,
    collect_holdout,
    fold_thresholds,
    seed_means,
)
from lbp_ray.splits import Split
from lbp_ray.study import EvaluationConfig

HONEST = EvaluationConfig()

FOLD_OF = {"a": 0, "b": 0, "c": 1, "d": 1, "h": -1}
LABEL_OF = {"a": 0, "b": 1, "c": 0, "d": 1, "h": pd.NA}


@pytest.fixture
def split(tmp_path):
    table = pd.DataFrame({"study_id": list(FOLD_OF), "patient_id": list("pqrst"), "fold": list(FOLD_OF.values())})
    return Split(table.assign(label=pd.array(list(LABEL_OF.values()), "Int64")), "split", "sealed", tmp_path)


@pytest.fixture
def study(tmp_path):
    """Two folds x two seeds x one and three slices, committed as trials leave them."""
    specs = [make_spec(count, fold, seed) for count in (1, 3) for fold in (0, 1) for seed in (0, 1)]
    folders = [tmp_path / "trials" / spec.cell.name for spec in specs]
    for spec, folder in zip(specs, folders, strict=True):
        folder.mkdir(parents=True)
        reach = spec.cell.num_slices // 2
        rows = [
            {
                "study_id": study,
                "slice_index": 5 + step,
                "slice_offset_mm": 4.0 * step,
                "probability": 0.1 * (place + 1),
            }
            for place, (study, fold) in enumerate(FOLD_OF.items())
            if fold == spec.cell.fold
            for step in range(-reach, reach + 1)
        ]
        pd.DataFrame(rows).to_parquet(folder / "out_of_fold.parquet")
        sealed = pd.DataFrame(rows).drop_duplicates("slice_index").assign(study_id="h")
        sealed.to_parquet(folder / "holdout.parquet")
        record = {"trial_id": spec.trial_id, "epochs": [4], "environment": {"torch": "2", "device": "cpu"}}
        (folder / "trial.json").write_text(json.dumps(record))
    return specs, folders


def edit(folder, change):
    path = folder / "out_of_fold.parquet"
    change(pd.read_parquet(path)).to_parquet(path)


def test_complete_study_gives_one_row_per_slice(study, split):
    table = collect(*study, split, HONEST)
    assert tuple(table.columns) == OUT_OF_FOLD_COLUMNS
    assert len(table) == 2 * (4 * 1 + 4 * 3)
    assert set(table["study_id"]) == set("abcd")
    assert (table["threshold_source"] == "cross_fitted").all()
    assert (table["selection"] == "fixed_epochs").all()
    assert (table["epoch"] == 4).all()
    assert table["threshold"].notna().all()


def test_threshold_comes_from_the_other_fold(study, split):
    table = collect(*study, split, HONEST)
    one = table[(table["num_slices"] == 1) & (table["seed"] == 0)].set_index("study_id")
    assert one.loc["a", "threshold"] == one.loc["d", "study_probability"]
    assert one.loc["c", "threshold"] == one.loc["b", "study_probability"]


def test_same_fold_thresholds_come_from_the_fold_itself_and_say_so(study, split):
    literal = EvaluationConfig(threshold_source="same_fold")
    table = collect(*study, split, literal)
    one = table[(table["num_slices"] == 1) & (table["seed"] == 0)].set_index("study_id")
    assert one.loc["a", "threshold"] == one.loc["b", "study_probability"]
    assert (one["threshold_source"] == "same_fold").all()


def test_slice_level_thresholds_are_fitted_on_slices():
    slices = pd.DataFrame(
        {
            "study_id": ["a", "a", "b", "b", "c", "c", "d", "d"],
            "fold": [0] * 4 + [1] * 4,
            "label": [0, 0, 1, 1] * 2,
            "probability": [0.1, 0.4, 0.5, 0.6] * 2,
            "study_probability": [0.4, 0.4, 0.6, 0.6] * 2,
        }
    )
    assert fold_thresholds(slices, HONEST, "study") == {0: 0.6, 1: 0.6}
    assert fold_thresholds(slices, HONEST, "slice") == {0: 0.5, 1: 0.5}
    assert fold_thresholds(slices, EvaluationConfig(threshold_level="slice"), "study") == {0: 0.5, 1: 0.5}


def test_ensemble_threshold_is_refitted_or_the_mean_of_the_seeds(study, split):
    specs, folders = study
    edit(folders[1], lambda table: table.assign(probability=[0.3, 0.9]))  # k1, fold 0, seed 1: studies a and b
    table = collect(specs, folders, split, HONEST).query("num_slices == 1")
    refit = seed_means(table, HONEST).set_index("study_id")
    assert refit["study_probability"].round(3).to_dict() == {"a": 0.2, "b": 0.55, "c": 0.3, "d": 0.4}
    assert refit.loc["c", "threshold"] == pytest.approx(0.55)
    mean = seed_means(table, EvaluationConfig(ensemble_threshold="mean_of_seeds")).set_index("study_id")
    assert mean.loc["c", "threshold"] == pytest.approx((0.2 + 0.9) / 2)


def test_study_score_is_the_rule_over_its_slices(study, split):
    edit(study[1][4], lambda table: table.assign(probability=np.linspace(0, 1, len(table))))
    table = collect(*study, split, HONEST)
    rows = table[(table["num_slices"] == 3) & (table["seed"] == 0) & (table["study_id"] == "a")]
    assert (rows["study_probability"] == rows["probability"].max()).all()


def test_missing_trial_is_named(study, split):
    specs, folders = study
    folders[2].rename(folders[2].with_suffix(".gone"))
    with pytest.raises(
        IncompleteStudyError, match=r"1 of 8 trial\(s\) are missing, e.g. k1-fold01-seed0.*run the study again"
    ):
        collect(specs, folders, split, HONEST)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda table: pd.concat([table, table[:1]]), "is predicted twice"),
        (lambda table: table[1:], "predicts 3 slices, 4 are due"),
        (lambda table: table.assign(probability=np.nan), "not numbers in"),
        (lambda table: table.assign(probability=1.5), "not numbers in"),
        (lambda table: table.assign(study_id="c"), "predicted by fold 0, which trained on it"),
        (lambda table: table.assign(study_id="h"), "predicted by fold 0, which trained on it or never held it out"),
    ],
    ids=["duplicate", "gap", "nan", "range", "trained-on", "hold-out"],
)
def test_spoilt_tables_are_refused(study, split, change, match):
    edit(study[1][0], change)
    with pytest.raises(IncompleteStudyError, match=match):
        collect(*study, split, HONEST)


def test_trial_of_another_recipe_is_refused(study, split):
    specs, folders = study
    record = json.loads((folders[0] / "trial.json").read_text()) | {"trial_id": "other"}
    (folders[0] / "trial.json").write_text(json.dumps(record))
    with pytest.raises(IncompleteStudyError, match="holds trial other"):
        collect(specs, folders, split, HONEST)


def test_mixed_environments_are_refused_unless_told(study):
    _, folders = study
    assert check_environments(folders)["torch"] == "2"
    record = json.loads((folders[0] / "trial.json").read_text())
    record["environment"]["torch"] = "3"
    (folders[0] / "trial.json").write_text(json.dumps(record))
    with pytest.raises(IncompleteStudyError, match=r"different environments.*torch"):
        check_environments(folders)
    assert check_environments(folders, allow_mixed=True)["torch"] == "2 and 3"


def test_exams_without_a_crop_are_not_due(study, split):
    uncropped = pd.DataFrame({"study_id": ["e"], "patient_id": ["u"], "fold": [1], "label": pd.array([0], "Int64")})
    sealed = replace(split, table=pd.concat([split.table, uncropped], ignore_index=True))
    with pytest.raises(IncompleteStudyError, match="4 slices, 5 are due"):
        collect(*study, sealed, HONEST)
    analysed = sealed.of_studies(split.table["study_id"])
    assert analysed.split_hash == sealed.split_hash
    assert set(collect(*study, analysed, HONEST)["study_id"]) == set("abcd")


def test_a_target_that_a_fold_cannot_reach_names_network_level_and_fold(study, split):
    specs, folders = study
    for spec, folder in zip(specs, folders, strict=True):
        if (spec.cell.fold, spec.cell.seed) == (0, 1):
            edit(folder, lambda table: table.assign(probability=1 - table["probability"]))
    wanted = EvaluationConfig(threshold_source="same_fold", threshold_criterion="npv", threshold_target=0.9)
    message = "k1 seed1, thresholds for study scores, fold 0, by its own scores: no threshold reaches npv 0.9"
    with pytest.raises(MetricError, match=message) as refused:
        collect(specs, folders, split, wanted)
    assert "Trained networks are kept" in str(refused.value)


def test_holdout_table_has_no_label_and_one_row_per_model(study):
    table = collect_holdout(*study, HONEST)
    assert "label" not in table
    assert set(table["study_id"]) == {"h"}
    assert set(table["threshold_source"]) == {"cross_fitted"}
    assert not table.duplicated(["num_slices", "fold", "seed", "study_id", "slice_index"]).any()
