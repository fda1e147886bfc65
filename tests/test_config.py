from __future__ import annotations

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

    from lbp_ray.tune import with_native_dtype

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags, raising=False)
    overrides = [f"recipe.unfrozen_dtype={wanted}", f"compute.gpus_per_trial={gpus}"]
    config = load_config(StudyConfig, config_file, overrides)
    assert with_native_dtype(config).recipe.unfrozen_dtype == found
