"""The documentation against the code: commands, configuration keys, columns, dependencies and links."""

from __future__ import annotations

import ast
import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from pydantic_core import PydanticUndefined

from cluster.__main__ import COMMANDS as CLUSTER
from lbp_ray import study
from lbp_ray.config import ConfigError, FrozenModel, load_config
from lbp_ray.out_of_fold import OUT_OF_FOLD_COLUMNS
from lbp_ray.phantom.config import PhantomConfig
from lbp_ray.segment.config import SegmentConfig

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
REFERENCES = {"reference-config.md": study.StudyConfig, "reference-roi.md": SegmentConfig}
"""Page → the configuration that it lists."""


def blocks(text):
    return re.findall(r"^```bash\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def commands(text):
    """Split bash blocks into command lines; heredocs and comments are left out."""
    for block in blocks(text):
        plain = re.sub(r"<< '(\w+)'.*?^\1$", "", block.replace("\\\n", " "), flags=re.MULTILINE | re.DOTALL)
        yield from (line.strip() for line in plain.splitlines() if line.strip() and not line.startswith("#"))


def words_after(line, start):
    """Return the words that follow `start`, up to the end of the simple command."""
    rest = line.split(start, 1)[1]
    return shlex.split(re.split(r" &|\|\|| #", rest)[0])


COMMANDS = [(page.relative_to(ROOT).as_posix(), line) for page in PAGES for line in commands(page.read_text())]
PYTHON = [
    pytest.param(part, id=f"{page}:{part[:60]}")
    for page, line in COMMANDS
    for part in line.split(" -- ")  # a command that is given to another one is checked for itself
    if "python -m " in part
]
MAKE = sorted({line for _, line in COMMANDS if line.startswith("make ")})


READS_ARGUMENTS = {"lbp_ray.unseal": "lbp_ray.finished", "lbp_ray.excluded": "lbp_ray.finished"}
"""Command → where its command line is read, if elsewhere."""


def module_source(name, arguments=()):
    if name == "cluster":
        return (ROOT / Path(*CLUSTER[arguments[0]][0].split("."))).with_suffix(".py").read_text()
    path = ROOT / Path(*READS_ARGUMENTS.get(name, name).split("."))
    return (path / "__main__.py" if path.is_dir() else path.with_suffix(".py")).read_text()


def text_constants(source):
    return {node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)}


def test_commands_were_found():
    modules = {words_after(line, "python -m ")[0] for line in (param.values[0] for param in PYTHON)}
    assert modules == {
        "cluster",
        "lbp_ray.cohort",
        "lbp_ray.excluded",
        "lbp_ray.export",
        "lbp_ray.phantom",
        "lbp_ray.plan",
        "lbp_ray.predict",
        "lbp_ray.report",
        "lbp_ray.seal",
        "lbp_ray.segment",
        "lbp_ray.segment.export",
        "lbp_ray.tune",
        "lbp_ray.unseal",
        "preprocess",
    }
    assert {"make demo", "make test", "make head"} <= set(MAKE)


@pytest.mark.parametrize("line", PYTHON)
def test_module_and_its_options_exist(line):
    module, *arguments = words_after(line, "python -m ")
    known = text_constants(module_source(module, arguments))
    assert {word.partition("=")[0] for word in arguments if word.startswith("--")} <= known
    if module == "preprocess" and re.fullmatch("[a-z]+", arguments[0]):
        assert arguments[0] in known


@pytest.mark.parametrize("line", [param for param in PYTHON if "--config configs/" in param.values[0]])
def test_configuration_and_overrides_load(line, monkeypatch):
    monkeypatch.setenv("LBP_RAY_ROOT", "/data")
    module, *arguments = words_after(line, "python -m ")
    model = {"lbp_ray.phantom": PhantomConfig, "lbp_ray.segment": SegmentConfig}.get(module, study.StudyConfig)
    overrides = [word for word in arguments if re.match(r"[a-z_.]+=", word)]
    assert load_config(model, ROOT / arguments[arguments.index("--config") + 1], overrides)


@pytest.mark.parametrize(
    ("finder", "study_name", "guide"),
    [("roi_oulu", "oulu_honest", "docs/howto-roi.md"), ("roi_demo", "demo", "Makefile")],
)
def test_the_study_that_is_sealed_is_the_one_a_region_finder_asks_for(finder, study_name, guide, monkeypatch):
    monkeypatch.setenv("LBP_RAY_ROOT", "/data")
    header = (ROOT / f"configs/{finder}.yaml").read_text().split("\nname:")[0]
    (sealed,) = re.findall(r"lbp_ray\.seal --config (\S+?\.yaml)", re.sub(r"\n# *", " ", header))
    asked = load_config(SegmentConfig, ROOT / f"configs/{finder}.yaml").folds.study
    assert asked == load_config(study.StudyConfig, ROOT / sealed).name == study_name
    assert f"lbp_ray.seal --config {sealed}" in (ROOT / guide).read_text()


def test_a_wrong_override_would_be_seen(monkeypatch):
    monkeypatch.setenv("LBP_RAY_ROOT", "/data")
    with pytest.raises(ConfigError, match="unknown key"):
        load_config(study.StudyConfig, ROOT / "configs/demo.yaml", ["compute.gpu_per_trial=1"])


@pytest.mark.parametrize("line", MAKE)
def test_make_target_exists(line):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {word for word in line.split()[1:] if "=" not in word} <= targets


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_shell_blocks_parse(page):
    for block in blocks(page.read_text()):
        checked = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True, check=False)
        assert checked.returncode == 0, checked.stderr


def documented_keys(page):
    text = (ROOT / "docs" / page).read_text()
    return dict(re.findall(r"^\| `([a-z0-9_.]+)` \| .*? \| (.*?) \| ", text, flags=re.MULTILINE))


def real_keys(whole):
    sections = {
        name: field.annotation
        for name, field in whole.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, FrozenModel)
    }
    for section, model in {"": whole, **sections}.items():
        for name, field in model.model_fields.items():
            if section or name not in sections:
                default = field.default if isinstance(field.default, str) else json.dumps(field.default, default=str)
                shown = "required" if field.default is PydanticUndefined else f"`{default}`"
                yield (f"{section}.{name}" if section else name), shown


@pytest.mark.parametrize("page", REFERENCES)
def test_every_key_is_documented_with_its_default(page):
    assert documented_keys(page) == dict(real_keys(REFERENCES[page]))


def test_out_of_fold_columns_are_documented_in_order():
    text = (ROOT / "docs/reference-files.md").read_text().split("## The out-of-fold table")[1].split("\n## ")[0]
    assert tuple(re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE)) == OUT_OF_FOLD_COLUMNS


def test_every_dependency_is_explained():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {(extra, item) for extra, items in project["optional-dependencies"].items() for item in items}
    wanted = {("", item) for item in project["dependencies"]} | extras
    needed, rest = (ROOT / "docs/dependencies.md").read_text().split("## Left aside")[0].split("## Extras")
    explained = {("", name) for name in re.findall(r"^\| `([a-z0-9-]+)`", needed, flags=re.MULTILINE)}
    for extra, cell in re.findall(r"^\| `(\w+)` \| (.*?) \|", rest, flags=re.MULTILINE):
        explained |= {(extra, name) for name in re.findall(r"`([a-z0-9-]+)`", cell)}
    assert explained == {(extra, re.match(r"[A-Za-z0-9-]+", item)[0]) for extra, item in wanted}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not missing


def test_every_page_is_on_the_map():
    linked = set(re.findall(r"\]\(([^)/\s]+\.md)\)", (ROOT / "docs/index.md").read_text()))
    assert linked == {page.name for page in PAGES if page.parent.name == "docs"} - {"index.md"}


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_symptoms_of_the_guide_are_words_of_this_project_or_of_a_full_disk():
    guide = (ROOT / "docs" / "howto-when-it-fails.md").read_text()
    table = guide.split("## What this project says")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \| ", table, re.MULTILINE)
    symptoms = [words for row in rows for words in re.findall("`(.*?)`", row)]
    sources = [path for package in ("preprocess", "lbp_ray") for path in (ROOT / package).rglob("*.py")]
    said = "\n".join(str(text) for path in sources for text in text_constants(path.read_text()))
    assert len(symptoms) > 9
    assert [words for words in symptoms if words not in f"{said}\n{os.strerror(errno.ENOSPC)}"] == []
