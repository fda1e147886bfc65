"""The whole river on the tiny cohort: commands as a user types them, in processes of their own."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

LIMIT_S = 1200
"""Seconds within which any command of these tests must end, also on a busy machine."""

SMALL = (
    "name=small",
    "split.seed=0",
    "split.folds=2",
    "recipe.frozen_epochs=3",
    "evaluation.permutations=19",
    "evaluation.bootstrap_resamples=100",
    "seeds=[0]",
)
"""Overrides that shrink configs/demo.yaml to seconds on the tiny cohort."""


def environment(root: Path, **extra: str) -> dict[str, str]:
    """Return a clean environment: what a new shell has, plus the root of data and runs."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    # Ray's workers are nice by default: a busy neighbour on the same cores would starve them past every limit here.
    threads = {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    return {**kept, **threads, "LBP_RAY_ROOT": str(root), "PYTHONPATH": str(ROOT), **extra}


def start(root: Path, module: str, *arguments: str, **extra: str) -> subprocess.Popen[str]:
    """Start ``python -m module`` and return its process."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=environment(root, **extra),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(root: Path, module: str, *arguments: str, **extra: str) -> tuple[int, str]:
    """Run ``python -m module`` to its end; return exit status and output."""
    process = start(root, module, *arguments, **extra)
    try:
        output, _ = process.communicate(timeout=LIMIT_S)
    except BaseException:  # or it runs on beside all other tests
        process.kill()
        process.communicate()
        raise
    return process.returncode, output


def expect(root: Path, module: str, *arguments: str) -> str:
    """Run a command that must succeed; return its output."""
    status, output = run(root, module, *arguments)
    assert status == 0, output[-3000:]
    return output


def prepare_cohort(root: Path, config: str = "phantom_tiny", *overrides: str) -> None:
    """Put a synthetic cohort, its store and its linked tables below `root`; one that several ask for is made once."""
    made = Path(os.environ["LBP_RAY_TEST_COHORTS"]) / "-".join((config, *overrides)).replace("/", "_")
    made.parent.mkdir(exist_ok=True)
    with made.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.is_dir():
            partial = made.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            make_cohort(partial, config, *overrides)
            partial.rename(made)
    root.mkdir(parents=True, exist_ok=True)
    mode = root.stat().st_mode
    shutil.copytree(made, root, dirs_exist_ok=True)
    root.chmod(mode)


def make_cohort(root: Path, config: str, *overrides: str) -> None:
    """Make a synthetic cohort as a user does."""
    phantom = root / "phantom"
    expect(root, "lbp_ray.phantom", "--config", f"configs/{config}.yaml", *overrides)
    given = ["--templates", str(phantom / "templates.csv"), "--key-file", str(phantom / "pseudonym.key")]
    expect(root, "preprocess", str(phantom / "dicom"), "--out", str(root / "store.zarr"), *given)
    tables = [
        part for name in ("questionnaire", "gradings", "truth") for part in ("--csv", str(phantom / f"{name}.csv"))
    ]
    link = ["link", str(root / "store.zarr"), "--out", str(root / "linked"), *tables]
    expect(root, "preprocess", *link, "--cvat", str(phantom / "annotations.xml"))


def study_arguments(*overrides: str) -> tuple[str, ...]:
    """Return the arguments of a small study; later overrides win."""
    return ("--config", "configs/demo.yaml", *SMALL, *overrides)


def result_folder(root: Path, name: str = "small") -> Path:
    """Return the only result of a study."""
    (folder,) = (root / "runs" / name / "results").iterdir()  # a partial one left behind would be a second
    return folder


def tables(root: Path, name: str = "small") -> dict[str, bytes]:
    """Return the bytes of every table of a study's only result."""
    folder = result_folder(root, name)
    names = ("out_of_fold.parquet", "holdout.parquet", "result.json", "report/report.html", "report/tables/metrics.csv")
    return {item: (folder / item).read_bytes() for item in names}
