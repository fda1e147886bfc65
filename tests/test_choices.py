"""The thesis's open points: every key exists, documentation and code agree, and the two presets sit at their ends."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from lbp_ray.choices import CHOICES, value_in, written
from lbp_ray.config import load_config
from lbp_ray.study import StudyConfig

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/choices.md").read_text()
KEYS = [choice.key for choice in CHOICES]


def annotation_of(key):
    model = StudyConfig
    for name in key.split("."):
        model = model.model_fields[name].annotation
    return model


def section(key):
    return PAGE.split(f"### `{key}`\n", 1)[1].split("\n#", 1)[0]


def preset(name, monkeypatch):
    monkeypatch.setenv("LBP_RAY_ROOT", "/data")
    return load_config(StudyConfig, ROOT / "configs" / name)


@pytest.mark.parametrize("choice", CHOICES, ids=KEYS)
def test_key_resolves_and_its_default_is_what_a_study_does(choice, tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text("name: x\npaths: {store: /a, questionnaire: /b, annotations: /c, runs: /d}\n")
    resolved = load_config(StudyConfig, file).model_dump(mode="json")
    assert value_in(resolved, choice.key) == choice.default


@pytest.mark.parametrize("choice", CHOICES, ids=KEYS)
def test_options_are_all_that_the_key_allows(choice):
    annotation = annotation_of(choice.key)
    allowed = ("false", "true") if annotation is bool else get_args(annotation)
    if all(isinstance(value, str) for value in allowed) and allowed:
        assert tuple(value for value, _ in choice.options) == allowed


@pytest.mark.parametrize("choice", CHOICES, ids=KEYS)
def test_documentation_holds_question_options_default_and_effect(choice):
    text = section(choice.key)
    assert f"{choice.reference}, thesis {choice.section}. {choice.question}" in text
    for value, meaning in choice.options:
        assert f"| {value if ' ' in value else f'`{value}`'} | {meaning} |" in text
    assert f"Default: `{written(choice.default)}`. Changes: {choice.effect}" in text


def test_documentation_has_no_choice_of_its_own():
    assert re.findall(r"^### `(.+)`$", PAGE, flags=re.MULTILINE) == KEYS
    assert len(set(KEYS)) == len(KEYS)


def test_the_open_points_of_training_and_judging_are_all_there():
    wanted = {"X2", "X4", "X5", "X6", "X8", "X10", "X11", *(f"X{number}" for number in range(12, 19)), "X22", "X23"}
    assert wanted <= {choice.reference for choice in CHOICES}


def test_documentation_lists_where_the_presets_part(monkeypatch):
    literal, honest = preset("oulu.yaml", monkeypatch), preset("oulu_honest.yaml", monkeypatch)
    assert (literal.optimistic, honest.optimistic) == (True, False)
    configs = [config.model_dump(mode="json") for config in (literal, honest)]
    values = {key: [written(value_in(config, key)) for config in configs] for key in KEYS}
    rows = [f"| `{key}` | `{a}` | `{b}` |" for key, (a, b) in values.items() if a != b]
    assert re.findall(r"^\| `[a-z_.]+` \| `\w+` \| `\w+` \|$", PAGE, flags=re.MULTILINE) == rows


def test_value_of_a_configuration_without_the_key_is_not_guessed():
    with pytest.raises(KeyError, match="head"):
        value_in({"recipe": {}}, "recipe.head")
