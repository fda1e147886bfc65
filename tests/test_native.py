"""What ``auto`` became when a study first ran stays with it, whatever CPU it goes on from."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lbp_ray.native import KEPT_TYPE, kept_dtype
from lbp_ray.runs import RunError, RunPaths
from lbp_ray.segment.__main__ import run_regions
from lbp_ray.segment.config import SegmentConfig
from lbp_ray.study import StudyConfig
from lbp_ray.tune import plan_trials, run_study

WITH, WITHOUT = {"amx_bf16": True}, {"amx_bf16": False}
"""Flags of a CPU that computes bfloat16, and of one that does not."""


class PlannedError(Exception):
    """Ends a study once its trials are planned."""


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Start a study on a CPU, up to the plan of its trials, and return their addresses and types."""
    prepared = SimpleNamespace(
        paths=RunPaths(tmp_path, "tiny"),
        crops=SimpleNamespace(crops_hash="c"),
        split=SimpleNamespace(split_hash="s"),
        weights_hash="w",
    )
    planned = []

    def plan_and_end(*given, **hashes):
        planned.append(plan_trials(*given, **hashes))
        raise PlannedError

    monkeypatch.setattr("lbp_ray.tune.prepare", lambda _: prepared)
    monkeypatch.setattr("lbp_ray.tune.plan_trials", plan_and_end)

    def start(flags, *, gpus=0.0, **recipe):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags, raising=False)
        with pytest.raises(PlannedError):
            run_study(make_config(tmp_path, gpus=gpus, **recipe))
        (found,) = {(spec.recipe.unfrozen_dtype, spec.recipe.images_per_pass) for spec in planned[-1]}
        return [spec.trial_id for spec in planned[-1]], *found

    return start


def make_config(folder, *, gpus=0.0, **recipe):
    paths = dict.fromkeys(("store", "questionnaire", "annotations"), "/nowhere") | {"runs": folder}
    chosen = {"recipe": {"unfrozen_dtype": "auto"} | recipe, "compute": {"gpus_per_trial": gpus}}
    return StudyConfig.model_validate({"name": "tiny", "paths": paths, **chosen})


@pytest.mark.parametrize(
    ("first", "then", "decided"), [(WITH, WITHOUT, ("bfloat16", 8)), (WITHOUT, WITH, ("float32", 4))]
)
def test_a_study_that_goes_on_from_another_cpu_has_the_same_trials(started, first, then, decided):
    begun = started(first)
    assert begun[1:] == decided
    assert started(then) == begun


def test_the_log_says_which_type_and_why(started, tmp_path, capsys):
    file = str(tmp_path / "tiny" / KEPT_TYPE)
    for flags, words in (
        (WITH, "this node's CPU computes bfloat16 natively"),
        (WITHOUT, "as when it first ran"),
    ):
        started(flags)
        said = capsys.readouterr().out
        assert f"recipe.unfrozen_dtype: auto is bfloat16: {words}" in said
        assert file in said
        assert ("warning: this node's CPU only emulates bfloat16" in said) == (flags is WITHOUT)


def test_a_type_that_is_asked_for_is_taken_and_leaves_the_first_one(started, capsys):
    begun = started(WITH)
    capsys.readouterr()
    trials, *asked = started(WITHOUT, unfrozen_dtype="float32")
    assert asked == ["float32", 4]
    assert not set(trials) & set(begun[0])
    assert not capsys.readouterr().out
    assert started(WITHOUT) == begun


def test_what_is_kept_of_cpus_is_not_for_gpus(started, tmp_path):
    assert started(WITHOUT, gpus=1.0)[1:] == ("bfloat16", None)
    assert not (tmp_path / "tiny").exists()
    assert started(WITHOUT)[1:] == ("float32", 4)
    assert started(WITHOUT, gpus=1.0)[1:] == ("bfloat16", None)


def test_a_changed_recipe_is_planned_with_the_type_that_is_kept(started):
    assert started(WITH)[1:] == ("bfloat16", 8)
    assert started(WITHOUT, images_per_pass=3)[1:] == ("bfloat16", 3)


def test_a_region_finder_keeps_its_first_type_too(tmp_path, monkeypatch):
    planned = []

    def plan_and_end(config, _):
        planned.append(config.recipe.dtype)
        raise PlannedError

    monkeypatch.setattr("lbp_ray.segment.__main__.plan_regions", lambda _: None)
    monkeypatch.setattr("lbp_ray.segment.__main__.fold_specs", plan_and_end)
    paths = {"store": "/nowhere", "annotations": "/nowhere", "runs": tmp_path}
    settings = {
        "name": "roi",
        "paths": paths,
        "folds": {"folds": 3, "allow_holdout": True},
        "recipe": {"dtype": "auto"},
    }
    for flags in (WITH, WITHOUT):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flags=flags: flags, raising=False)
        with pytest.raises(PlannedError):
            run_regions(SegmentConfig.model_validate(settings))
    assert planned == ["bfloat16", "bfloat16"]


@pytest.mark.parametrize("text", ["", '{"cpu": "auto"}', "[]"])
def test_a_file_that_names_no_type_is_refused(tmp_path, text):
    (tmp_path / KEPT_TYPE).write_text(text)
    with pytest.raises(RunError, match=r"dtype\.json must hold .*delete it"):
        kept_dtype("auto", tmp_path, gpu=False, option="recipe.dtype")
