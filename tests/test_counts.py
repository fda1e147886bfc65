"""How often the expensive things happen: forward passes, reads of images, processes."""

from __future__ import annotations

import itertools
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from finished_factory import commit_split
from study_factory import make_data, make_spec, random_backbone
from torch.nn.modules.module import register_module_forward_pre_hook
from torchvision.models import ResNet

from lbp_ray import tune
from lbp_ray.cell import TrialPlace
from lbp_ray.features import extract
from lbp_ray.nets.folding import fold
from lbp_ray.nets.weights import load_backbone_weights, weights_sha256
from lbp_ray.resident import Resident
from lbp_ray.roi.crops import EXCLUDED_COLUMNS, Crops
from lbp_ray.runs import RunPaths
from lbp_ray.study import StudyConfig
from lbp_ray.trial import run_trial
from preprocess.job import connect

FOLDS = [0, 0, 1, 1, 2, 2, 0, 0, 1, 1, -1, -1]
CELLS = list(itertools.product((1, 3), (0, 1, 2), (0, 1)))
"""Slice counts x folds x seeds."""
EPOCHS = 5


@pytest.fixture
def images():
    """Images that pass a backbone, one number per forward pass, whichever network and wherever it was made."""
    sizes = []
    handle = register_module_forward_pre_hook(lambda module, given: count(module, given, sizes))
    yield sizes
    handle.remove()


def count(module, given, sizes):
    if isinstance(module, ResNet):
        sizes.append(len(given[0]))


class Unread:
    """Pixels that nobody may read."""

    def __init__(self, shape):
        self.shape = shape

    def __getitem__(self, _):
        raise AssertionError("a crop was read")


class AsOnGpu(Resident):
    """A process that keeps what it would keep on a GPU, here on the CPU; steps are not recorded there."""

    on_gpu = True


def run_cells(data, folder, cells=CELLS, kind=Resident, **recipe):
    resident = kind(random_backbone())
    for num_slices, fold_number, seed in cells:
        spec = make_spec(num_slices, fold_number, seed, frozen_epochs=EPOCHS, **recipe)
        list(run_trial(spec, data, resident, TrialPlace(folder / spec.cell.name, folder / f"{spec.cell.name}.pt")))


def unread(data, backbone):
    """The data after their extraction."""
    features = torch.from_numpy(extract(backbone, data.crops_NKHW))
    return replace(data, features_NKF=features, crops_NKHW=Unread(data.crops_NKHW.shape))


def test_frozen_study_passes_every_slice_once_and_reads_no_crop_again(images, tmp_path):
    run_cells(unread(make_data(FOLDS), fold(random_backbone())), tmp_path, unfrozen_epochs=0)
    assert len(list(tmp_path.glob("*/out_of_fold.parquet"))) == len(CELLS)
    assert sum(images) == len(FOLDS) * 3


def test_frozen_study_sends_no_crop_to_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # as it was, afterwards
    run_cells(unread(make_data(FOLDS), random_backbone()), tmp_path, CELLS[:2], AsOnGpu, unfrozen_epochs=0)
    assert len(list(tmp_path.glob("*/out_of_fold.parquet"))) == 2


def test_without_the_cache_every_epoch_of_every_trial_passes_its_slices(images, tmp_path):
    cells = [(1, 0, 0), (3, 1, 0)]
    run_cells(make_data(FOLDS, shape=(32, 32)), tmp_path, cells, unfrozen_epochs=0, feature_cache=False)
    trained_and_scored = len(FOLDS) - FOLDS.count(-1)
    assert sum(images) >= (1 + 3) * EPOCHS * trained_and_scored


def test_unfrozen_epoch_reads_crops(tmp_path):
    """The count of reads above would see one."""
    with pytest.raises(AssertionError, match="a crop was read"):
        run_cells(unread(make_data(FOLDS), random_backbone()), tmp_path, CELLS[:1])


SLOTS = 2


@pytest.fixture
def study(tmp_path):
    """A study of frozen trials from crops alone: there is no store that could be read."""
    recipe = {"weights": "random", "frozen_epochs": 2, "unfrozen_epochs": 0, "batch_size": 8}
    absent = {name: tmp_path / "absent" / name for name in ("store", "questionnaire", "annotations")}
    config = StudyConfig(
        name="counts",
        paths={**absent, "runs": tmp_path / "runs"},
        split={"folds": 3},
        recipe=recipe,
        slice_counts=[1, 3],
        seeds=list(range(25)),
        compute={"keep_models": "none", "verbose": False},
    )
    data = make_data(FOLDS)
    crops = commit_crops(tmp_path / "crops", data)
    columns = {"study_id": data.study_ids, "patient_id": data.patient_ids, "fold": data.folds_N, "label": data.labels_N}
    split = commit_split(tmp_path / "split", pd.DataFrame(columns))
    digest = weights_sha256(load_backbone_weights("random", seed=0))
    prepared = SimpleNamespace(
        paths=RunPaths(config.paths.runs, "counts"), crops=crops, split=split, weights_hash=digest
    )
    return config, prepared


def commit_crops(folder, data):
    folder.mkdir()
    np.save(folder / "crops.npy", data.crops_NKHW)
    ids = {"study_id": data.study_ids, "patient_id": data.patient_ids}
    places = {"slice_index": list(data.slice_index_NK), "slice_offset_mm": list(data.offset_mm_NK)}
    pd.DataFrame(ids | places).to_parquet(folder / "crops.parquet")
    pd.DataFrame(columns=list(EXCLUDED_COLUMNS), dtype=str).to_parquet(folder / "excluded.parquet")
    (folder / "crops.json").write_text(json.dumps({"crops_hash": "c" * 64}))
    return Crops.open(folder)


@pytest.mark.slow
@pytest.mark.ray
def test_processes_are_as_many_as_slots_not_as_trials_and_none_reads_an_image(study, monkeypatch):
    config, prepared = study
    shared = tune._shared(config, prepared)
    specs = tune.plan_trials(config, crops_hash="c" * 64, split_hash="s" * 64, weights_hash=prepared.weights_hash)
    cells = {spec.cell.name: (spec, tune.place_of(spec, prepared.paths, config)) for spec in specs}
    trackers = tune.Trackers((), study="counts", root=prepared.paths.folder, cells=cells)
    for name, value in {"OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}.items():
        monkeypatch.setenv(name, value)
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)  # Ray's logs: one file for every process that it started
        with connect(SLOTS):
            tune._run_missing(config, prepared, shared, {}, trackers)
            np.save(shared.crops / "crops.npy", np.zeros_like(prepared.crops.pixels_NKHW))  # which nobody can use
            tune._run_missing(config, prepared, shared, cells, trackers)
            logs = Path(folder).glob("lbp-*/ray/session_2*/logs/worker-*.out")
            started = {int(path.stem.rsplit("-", 1)[1]) for path in logs}
    reports = prepared.paths.tune.rglob("result.json")
    waiting = [json.loads(path.read_text().splitlines()[-1])["pid"] for path in reports]
    assert len(waiting) == len(specs) == 150
    assert len(set(waiting)) <= SLOTS + 1
    assert SLOTS < len(started) <= SLOTS + 10  # those that wait, those that train, and those that Ray holds ready
