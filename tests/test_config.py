from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lbp_ray.config import ConfigError, load_config
from lbp_ray.study import StudyConfig

YAML = """\
name: tiny
paths: {store: /d/store.zarr, questionnaire: /d/q.csv, annotations: /d/a.xml, runs: /d/runs}
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(YAML)
    return path


def test_defaults_are_the_oulu_recipe(config_file):
    config = load_config(StudyConfig, config_file)
    assert (config.recipe.frozen_epochs, config.recipe.unfrozen_epochs) == (40, 1)
    assert config.offsets_mm == (-8.0, -4.0, 0.0, 4.0, 8.0)


def test_override_replaces_one_value(config_file):
    config = load_config(StudyConfig, config_file, ["recipe.batch_size=8", "slice_counts=[1]"])
    assert (config.recipe.batch_size, config.slice_counts) == (8, (1,))


def test_all_faults_are_listed_at_once(config_file):
    overrides = ["recipe.bach_size=8", "split.folds=1", "slice_counts=[2]", "paths.runs=runs"]
    with pytest.raises(ConfigError) as caught:
        load_config(StudyConfig, config_file, overrides)
    message = str(caught.value)
    assert "recipe.bach_size: unknown key; did you mean 'batch_size'?" in message
    assert "split.folds" in message
    assert "slice counts must be odd" in message
    assert "absolute path" in message
    assert "4 fault(s)" in message


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("name: [", "not valid YAML"),
        ("- a", "must hold a mapping"),
        ("name: ${LBP_RAY_NOT_SET}", "LBP_RAY_NOT_SET is not set"),
    ],
)
def test_unusable_files(tmp_path, text, match):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=match):
        load_config(StudyConfig, path)


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="not found"):
        load_config(StudyConfig, tmp_path / "none.yaml")


@pytest.mark.parametrize("override", ["recipe", "=1", "name.x=1"])
def test_malformed_override(config_file, override):
    with pytest.raises(ConfigError, match="override"):
        load_config(StudyConfig, config_file, [override])


def test_environment_is_expanded(config_file, monkeypatch):
    monkeypatch.setenv("LBP_RAY_ROOT", "/data")
    config = load_config(StudyConfig, config_file, ["paths.store=${LBP_RAY_ROOT}/s.zarr"])
    assert str(config.paths.store) == "/data/s.zarr"


def test_cache_refuses_drifting_batchnorm(config_file):
    with pytest.raises(ConfigError, match="feature_cache needs frozen_batchnorm: eval"):
        load_config(StudyConfig, config_file, ["recipe.frozen_batchnorm=train"])


@pytest.mark.parametrize(
    ("wanted", "flags", "gpus", "found"),
    [
        ("auto", {"avx512_bf16": True}, 0, "bfloat16"),
        ("auto", {"amx_bf16": False}, 0, "float32"),
        ("auto", {}, 1, "bfloat16"),
        ("float32", {"amx_bf16": True}, 1, "float32"),
    ],
)
def test_auto_becomes_the_type_that_the_device_computes(config_file, monkeypatch, wanted, flags, gpus, found):
    import torch

    from lbp_ray.native import for_device

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags, raising=False)
    overrides = [f"recipe.unfrozen_dtype={wanted}", f"compute.gpus_per_trial={gpus}"]
    config = load_config(StudyConfig, config_file, overrides)
    assert for_device(config, gpu=bool(gpus)).recipe.unfrozen_dtype == found


@pytest.mark.parametrize(
    ("overrides", "gpu", "found"),
    [
        ([], False, 4),
        (["recipe.unfrozen_dtype=bfloat16"], False, 8),
        (["recipe.fold_training=false"], False, 2),
        (["roi.width_px=2000", "roi.height_px=4000"], False, 1),
        (["recipe.images_per_pass=7"], False, 7),
        ([], True, None),
        (["compute.workers_per_trial=2"], False, None),
        (["recipe.unfrozen_batchnorm=train"], False, None),
    ],
)
def test_a_cpu_takes_a_batch_in_passes(config_file, overrides, gpu, found):
    from lbp_ray.native import for_device

    size = ["roi.width_px=200", "roi.height_px=400", "recipe.unfrozen_dtype=float32"]
    config = load_config(StudyConfig, config_file, [*size, *overrides])
    assert for_device(config, gpu=gpu).recipe.images_per_pass == found


@pytest.mark.parametrize(
    ("other", "words"),
    [("recipe.unfrozen_batchnorm=train", "looks at as a whole"), ("compute.workers_per_trial=2", "is for one worker")],
)
def test_a_batch_that_cannot_be_divided_is_refused(config_file, other, words):
    with pytest.raises(ConfigError, match=words):
        load_config(StudyConfig, config_file, ["recipe.images_per_pass=4", other])


FAULTS = """
import resource, sys, torch
from lbp_ray.native import keep_freed_memory
assert keep_freed_memory() if sys.argv[1] == "keep" else True
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 * 2**20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_kept_memory_is_not_faulted_in_again():
    kept, given_back = (
        int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True).stdout)
        for how in ("keep", "give")
    )
    assert kept < given_back / 10


UNREAD = {
    "recipe.checkpoint=min_loss": "checkpoint is read with a selection",
    "recipe.checkpoint_top_k=3": "checkpoint_top_k is read with a selection",
    "recipe.stop_patience=1": "stop_patience 1 cannot stop 1 unfrozen",
    "recipe.inner_fraction=0.2": "inner_fraction is read with selection: inner_validation",
    "recipe.study_rule_k=3": "study_rule_k is read with study_rule: top_k",
    "evaluation.threshold_target=0.9": "threshold_target belongs to threshold_criterion",
    "evaluation.threshold_criterion=npv": "threshold_target belongs to threshold_criterion",
}


@pytest.mark.parametrize("override", UNREAD)
def test_a_key_that_would_change_nothing_is_refused(config_file, override):
    with pytest.raises(ConfigError, match=UNREAD[override]):
        load_config(StudyConfig, config_file, [override])


def test_slice_thresholds_judge_studies_by_the_any_rule_only(config_file):
    overrides = ["evaluation.threshold_level=slice", "recipe.study_rule=mean"]
    with pytest.raises(ConfigError, match="threshold_level: slice judges a study by whether any slice"):
        load_config(StudyConfig, config_file, overrides)
    averaged = "evaluation.ensemble_threshold=mean_of_seeds"
    assert load_config(StudyConfig, config_file, [overrides[0], averaged]).evaluation.threshold_level == "slice"


def test_a_threshold_of_averaged_slices_is_not_held_against_averaged_largest_ones(config_file):
    with pytest.raises(ConfigError, match=r"which are larger: use evaluation.ensemble_threshold: mean_of_seeds"):
        load_config(StudyConfig, config_file, ["evaluation.threshold_level=slice"])


def test_an_unset_variable_is_one_fault_not_two(monkeypatch):
    monkeypatch.delenv("LBP_RAY_ROOT", raising=False)
    with pytest.raises(ConfigError, match="1 fault") as caught:
        load_config(StudyConfig, Path(__file__).parents[1] / "configs" / "demo.yaml")
    assert "export LBP_RAY_ROOT=" in str(caught.value)
