"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import secrets
import shutil

import pytest

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray reads its token once per process: clusters that tests start one after the other must share it.
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


LONGEST = (
    *("kill", "slurm", "hosts", "segment_run", "presets", "two_studies", "ray_job", "ddp_trial"),
    *("metrics_endpoint", "cluster_job", "river"),
)
"""Files that several processes begin with, so that none of them is left alone with one at the end."""

LAST = "cohort_seeds"
"""Computes in two processes of its own."""

SLOW_LIMIT_S = 2400
"""Seconds within which a slow test and its set-up must end, also on a machine that is far too busy."""


def pytest_collection_modifyitems(items):
    def place(item):
        name = item.path.stem.removeprefix("test_")
        return LONGEST.index(name) if name in LONGEST else len(LONGEST) + (name == LAST)

    items.sort(key=place)
    for item in items:
        if any(item.get_closest_marker(name) for name in ("slow", "slurm", "multihost", "browser")):
            item.add_marker(pytest.mark.timeout(SLOW_LIMIT_S))


@pytest.fixture(scope="session", autouse=True)
def _cohorts(tmp_path_factory) -> None:
    """Name the folder of the cohorts that all processes of this run share."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    os.environ["LBP_RAY_TEST_COHORTS"] = str(shared / "cohorts")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def module_folder(tmp_path_factory, request):
    """A folder that the tests of one module share, deleted after them: trained networks are 90 MB each."""
    folder = tmp_path_factory.mktemp(request.module.__name__)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
