"""Both presets of the Oulu study, whole, at reduced scale: real store, real Ray, real ledger."""

from __future__ import annotations

import io
import json

import pandas as pd
import pytest
from river import expect, prepare_cohort, result_folder, tables

from lbp_ray.result import StudyResult, Unsealed

pytestmark = [pytest.mark.slow, pytest.mark.ray]

FOLDS, SEEDS, COUNTS = 3, 2, (1, 3, 5)

REDUCED = (
    "recipe.weights=random",
    "recipe.frozen_epochs=6",
    "recipe.batch_size=8",
    "recipe.learning_rate=1e-3",
    f"split.folds={FOLDS}",
    "roi.width_px=50",
    "roi.height_px=100",
    "seeds=[0,1]",
    "evaluation.permutations=19",
    "evaluation.bootstrap_resamples=100",
)
"""What the tiny cohort cannot have at full scale; everything that tells the presets apart stays."""


def arguments(preset, *overrides):
    return ("--config", f"configs/{preset}.yaml", *REDUCED, *overrides)


@pytest.fixture(scope="module")
def root(module_folder):
    prepare_cohort(module_folder)
    return module_folder


@pytest.fixture(scope="module")
def literal(root):
    output = expect(root, "lbp_ray.tune", *arguments("oulu"))
    return output, result_folder(root, "oulu")


@pytest.fixture(scope="module")
def honest(root):
    expect(root, "lbp_ray.tune", *arguments("oulu_honest"))
    return StudyResult.load(result_folder(root, "oulu_honest") / "result.json")


def test_every_score_of_the_literal_preset_says_what_was_chosen_on_its_fold(literal):
    table = pd.read_parquet(literal[1] / "out_of_fold.parquet")
    assert set(table["selection"]) == {"same_fold"}
    assert set(table["threshold_source"]) == {"same_fold"}
    assert table["epoch"].between(1, 7).all()
    assert len(table.drop_duplicates(["num_slices", "fold", "seed"])) == len(COUNTS) * FOLDS * SEEDS


def test_literal_result_makes_no_interval_and_no_verdict(literal):
    output, folder = literal
    result = StudyResult.load(folder / "result.json")
    assert result.optimistic
    assert result.comparisons == ()
    for part in result.slice_counts:
        assert all(metric.interval is None for metric in (*part.metrics, *part.other_level, part.separation))
        assert [choice.fold for choice in part.choices] == list(range(FOLDS))
    assert "! Optimistic" in output
    assert "optimistic" in (folder / "report" / "report.html").read_text()


def test_honest_result_has_both(honest):
    assert not honest.optimistic
    assert len(honest.comparisons) == 3
    assert all(metric.interval is not None for part in honest.slice_counts for metric in part.metrics)


def test_presets_share_their_split_crops_and_features(root, literal, honest):
    result = StudyResult.load(literal[1] / "result.json")
    assert {name: result.hashes[name] == honest.hashes[name] for name in ("split", "crops", "recipe")} == {
        "split": True,
        "crops": True,
        "recipe": False,
    }
    assert len([path for path in (root / "runs" / "features").iterdir() if path.suffix != ".shards"]) == 1


def test_literal_study_run_twice_is_bit_equal(root, literal):
    runs = root / "again"
    expect(root, "lbp_ray.tune", *arguments("oulu", f"paths.runs={runs}"))
    (folder,) = (runs / "oulu" / "results").iterdir()
    first = tables(root, "oulu")
    assert folder.name == literal[1].name
    for name, content in first.items():
        assert (folder / name).read_bytes() == content, name


def test_no_table_of_the_runs_holds_a_sealed_label(root, literal, honest):
    (split,) = {path.read_bytes() for path in (root / "runs").glob("*/splits/*/split.parquet")}
    table = pd.read_parquet(io.BytesIO(split))
    sealed = set(table.loc[table["fold"] == -1, "study_id"])
    read = []
    for path in sorted((root / "runs").rglob("*.parquet")):
        rows = pd.read_parquet(path)
        if "study_id" in rows and rows["study_id"].isin(sealed).any():
            read.append(path.name)
            held = rows[rows["study_id"].isin(sealed)]
            assert not {"group", "low_back_pain", "frequency", "intensity", "pain_now"} & set(held), path
            assert "label" not in held or held["label"].isna().all(), path
    assert set(read) == {"crops.parquet", "holdout.parquet", "split.parquet"}
    texts = [path for path in (root / "runs").rglob("*.*") if path.suffix in (".json", ".html", ".csv", ".md", ".txt")]
    assert len(texts) > 50
    assert not [path.name for path in texts if any(study.encode() in path.read_bytes() for study in sealed)]


def test_opening_judges_every_choice_of_fold_and_is_one_ledger_for_both_presets(root, literal, honest):
    output = expect(root, "lbp_ray.unseal", "--config", "configs/oulu.yaml", "--result", str(literal[1]))
    told = Unsealed.model_validate_json((literal[1] / "unsealed-01.json").read_bytes())
    assert told.opening.number == 1
    for part in told.slice_counts:
        assert [choice.fold for choice in part.choices] == list(range(FOLDS))
        assert len(part.metrics[0].per_seed) == FOLDS * SEEDS
        assert all(metric.interval is not None for metric in part.metrics)
    assert "Hold-out" in (literal[1] / "report" / "report.html").read_text()
    folder = result_folder(root, "oulu_honest")
    again = expect(root, "lbp_ray.unseal", "--config", "configs/oulu_honest.yaml", "--result", str(folder))
    assert "opening 1 " in output
    assert "opening 2 " in again
    (path,) = folder.glob("unsealed-*.json")
    assert json.loads(path.read_text())["opening"]["number"] == 2


def test_subjects_outside_the_task_are_scored_afterwards(root, honest):
    folder = result_folder(root, "oulu_honest")
    output = expect(
        root, "lbp_ray.excluded", "--config", "configs/oulu_honest.yaml", "--result", str(folder),
        "roi.width_px=50", "roi.height_px=100",
    )  # fmt: skip
    assert "slightly_symptomatic" in output
    assert "Groups left out" in (folder / "report" / "report.html").read_text()
