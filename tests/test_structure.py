"""The house itself: import direction, configurations, package names."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PACKAGES = ("preprocess", "lbp_ray", "cluster")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MAY_IMPORT_RAY = {"preprocess/job.py", "lbp_ray/tune.py"}


def imported_packages(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_upstream(path):
    name = str(path.relative_to(ROOT))
    downstream = set(PACKAGES[PACKAGES.index(name.split("/")[0]) + 1 :])
    imported = imported_packages(path)
    assert not imported & downstream
    if name.startswith("preprocess/"):
        assert "torch" not in imported
    if name not in MAY_IMPORT_RAY and not name.startswith(("lbp_ray/distributed/", "cluster/")):
        assert "ray" not in imported


def test_import_check_sees_a_wrong_arrow(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text("def late():\n    from lbp_ray.roi.crops import Box\n    import torch.nn\n")
    assert imported_packages(wrong) == {"lbp_ray", "torch"}


@pytest.mark.parametrize("package", PACKAGES)
def test_package_name_is_ours(package):
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    assert Path(spec.origin).parent == ROOT / package
    assert set(importlib.metadata.packages_distributions().get(package, [])) <= {"lbp-ray", "lbp_ray"}


def test_every_package_is_listed():
    listed = set(re.findall(r'^  "([a-z_.]+)",$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE))
    folders = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in MODULES if path.name == "__init__.py"
    }
    assert folders <= listed


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_have_a_role(path):
    if path.name == "__init__.py":
        if path.parent.name not in PACKAGES:
            assert f"``{path.parent.name}" in (path.parents[1] / "__init__.py").read_text()
    elif path.name != "__main__.py":
        assert f"``{path.stem}``" in (path.parent / "__init__.py").read_text()


CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_config_loads(path, monkeypatch):
    from lbp_ray.config import load_config
    from lbp_ray.phantom.config import PhantomConfig
    from lbp_ray.segment.config import SegmentConfig
    from lbp_ray.study import StudyConfig

    monkeypatch.setenv("LBP_RAY_ROOT", "/data")
    model = {"phantom": PhantomConfig, "roi": SegmentConfig}.get(path.name.split("_")[0], StudyConfig)
    assert load_config(model, path)
    assert path.read_text().startswith("# ")
    assert "Run:" in path.read_text()


def test_configs_were_found():
    assert {"demo.yaml", "oulu.yaml", "oulu_honest.yaml", "phantom_demo.yaml"} <= {path.name for path in CONFIGS}


def test_constraints_have_no_url():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert all(re.fullmatch(r"#.*|[A-Za-z0-9_.\-]+==[A-Za-z0-9_.+!]+", line) for line in lines)


def test_hooks_parse():
    assert yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
