"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import secrets
import shutil

import pytest

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray reads its token once per process: clusters that tests start one after the other must share it.
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


LONGEST = ("cohort_seeds", "kill", "slurm", "hosts", "segment_run", "presets", "river")
"""Files that several processes begin with, so that none of them is left alone with one at the end."""


def pytest_collection_modifyitems(items):
    def place(item):
        name = item.path.stem.removeprefix("test_")
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=place)


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
