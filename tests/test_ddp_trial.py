"""A trial that several workers share, against the same trial of one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
import torch
from river import expect, prepare_cohort, run, study_arguments
from study_factory import make_data, make_spec, random_backbone, with_features
from torch import multiprocessing as mp

from lbp_ray.cell import TrialError, TrialPlace
from lbp_ray.resident import Resident
from lbp_ray.sharing import part_of
from lbp_ray.training import Training
from lbp_ray.trial import run_trial

if TYPE_CHECKING:
    from pathlib import Path

FOLDS = [0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0, -1, -1]
"""7 studies to train on: batches of 4 and 3, or of 3, 3 and 1."""

TOLERANCES = {"selection": 2e-3, "batch-statistics": 2e-2}
"""Differences of rounding grow with every step of Adam, and with batch statistics of few values; elsewhere 1e-4."""

CASES: dict[str, dict[str, Any]] = {
    "uneven-last-batch": {"frozen_epochs": 2},
    "empty-part": {"frozen_epochs": 1, "batch_size": 3},
    "selection": {"frozen_epochs": 2, "unfrozen_epochs": 2, "selection": "same_fold", "checkpoint_top_k": 3},
    "batch-statistics": {"frozen_epochs": 1, "unfrozen_batchnorm": "train", "batch_size": 7},
}


def place_of(folder: Path, name: str, workers: int) -> TrialPlace:
    return TrialPlace(folder / f"{name}-{workers}", folder / f"{name}-{workers}.pt", keep_model=True)


def train_all(folder: Path, workers: int) -> None:
    """Train every case as one of its workers; the first commits below `folder`."""
    torch.set_num_threads(1)
    resident = Resident(random_backbone())
    data = with_features(make_data(FOLDS), resident.backbone)
    for name, recipe in CASES.items():
        spec = make_spec(**recipe).model_copy(update={"workers": workers})
        list(run_trial(spec, data, resident, place_of(folder, name, workers)))
    training = Training(make_spec(batch_size=7), data, resident)
    training.unfreeze()
    training.rehearse(1)
    if training.rank == 0:
        whole = torch.nn.Sequential(training.backbone, training.head)
        torch.save([parameter.grad for parameter in whole.parameters()], folder / f"gradients-{workers}")


def worker(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    train_all(folder, 2)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def trained(module_folder):
    train_all(module_folder, 1)
    mp.spawn(worker, args=(module_folder,), nprocs=2)
    return module_folder


def table(folder: Path, name: str, workers: int, part: str) -> pd.DataFrame:
    return pd.read_parquet(place_of(folder, name, workers).final / f"{part}.parquet")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_workers_give_what_one_gives(trained, name):
    """Equal global batches, however they divide: the same curve and scores but for rounding."""
    one, two = (table(trained, name, workers, "history") for workers in (1, 2))
    np.testing.assert_allclose(two["train_loss"], one["train_loss"], rtol=1e-3)
    tolerance = TOLERANCES.get(name, 1e-4)
    for part in ("out_of_fold", "holdout"):
        one, two = (table(trained, name, workers, part)["probability"] for workers in (1, 2))
        np.testing.assert_allclose(two, one, atol=tolerance, err_msg=part)
    assert not list(trained.glob("*.pt"))


@pytest.mark.slow
def test_gradients_are_those_of_the_whole_batch(trained):
    """Seven samples as three and four; Adam would hide a wrong scale."""
    one, two = (torch.load(trained / f"gradients-{workers}", weights_only=True) for workers in (1, 2))
    for mine, expected in zip(two, one, strict=True):
        assert float((mine - expected).norm() / expected.norm()) < 1e-3


@pytest.mark.slow
def test_a_kept_network_of_two_workers_is_one_of_one(trained):
    one, two = (torch.load(place_of(trained, "batch-statistics", n).model, weights_only=True) for n in (1, 2))
    assert one["backbone"].keys() == two["backbone"].keys()


def test_another_number_of_workers_than_planned_is_refused(tmp_path):
    spec = make_spec().model_copy(update={"workers": 2})
    with pytest.raises(TrialError, match=r"k1-fold00-seed0 was planned for 2 worker\(s\), 1 run\(s\)"):
        list(run_trial(spec, make_data(FOLDS), Resident(torch.nn.Identity()), place_of(tmp_path, "x", 2)))


def test_the_number_of_workers_is_part_of_a_trials_address():
    assert make_spec().trial_id != make_spec().model_copy(update={"workers": 2}).trial_id


def test_parts_cover_a_batch_in_order(monkeypatch):
    for size in (0, 1, 3, 32):
        parts = []
        for rank in range(4):
            monkeypatch.setattr("lbp_ray.sharing.rank_and_world", lambda rank=rank: (rank, 4))
            parts += range(size)[part_of(size)]
        assert parts == list(range(size))


# --- Ray Train inside Ray Tune ---------------------------------------------------------------------------------------

STUDY = study_arguments("recipe.frozen_epochs=2", "slice_counts=[1]", "evaluation.permutations=0")


LOSSES = ["train_loss", "validation_loss"]


def curves(study: Path) -> pd.DataFrame:
    """Learning curves of a study's trials, by cell; a random start's probabilities are all 0 or 1."""
    return pd.concat(pd.read_parquet(path) for path in sorted(study.glob("trials/k*/history.parquet")))


@pytest.mark.slow
@pytest.mark.ray
def test_a_shared_study_gives_what_one_worker_gives_though_one_dies(tmp_path):
    prepare_cohort(tmp_path)
    expect(tmp_path, "lbp_ray.tune", *STUDY, "recipe.unfrozen_dtype=float32")
    shared = (*STUDY, "recipe.unfrozen_dtype=float32", "compute.workers_per_trial=2", "name=shared")
    marker = tmp_path / "marker"
    status, output = run(tmp_path, "lbp_ray.tune", *shared, LBP_RAY_KILL_AT=f"trial:checkpoint@{marker}")
    assert status == 0, output[-3000:]
    assert marker.exists(), "no worker was killed"
    one, two = (curves(tmp_path / "runs" / name) for name in ("small", "shared"))
    assert set(one["stage"]) == {"frozen", "unfrozen"}
    np.testing.assert_allclose(two[LOSSES], one[LOSSES], rtol=1e-4)
    assert not list((tmp_path / "runs" / "shared").rglob("in_progress/*.pt"))
