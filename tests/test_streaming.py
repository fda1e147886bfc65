from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from study_factory import make_data, make_spec, random_backbone, with_features

from lbp_ray import streaming
from lbp_ray.permutation import permutation_null
from lbp_ray.resident import Resident
from lbp_ray.samples import epoch_order
from lbp_ray.streaming import BlockOrder, StreamedFeatures
from lbp_ray.study import Recipe
from lbp_ray.training import Training

BLOCKS = np.repeat([0, 1, 3, 4], [5, 1, 7, 4])
BLOCK_RECIPE = {"unfrozen_epochs": 0, "shuffle": "block", "block_studies": 3}


@pytest.fixture(scope="module")
def backbone():
    return random_backbone()


@pytest.fixture(scope="module")
def data(backbone):
    return with_features(make_data([0, 0, 1, 1, 1, 1, 0, 0, 1, 1, -1, -1]), backbone)


@pytest.mark.parametrize("seed", range(20))
def test_order_visits_every_sample_once_and_block_after_block(seed):
    order = BlockOrder(BLOCKS, seed=seed, epoch=1)[:]
    assert sorted(order) == list(range(17))
    assert (np.diff(BLOCKS[order]) != 0).sum() == 3


def test_order_shuffles_blocks_and_samples_anew_in_every_epoch_and_seed():
    orders = [BlockOrder(BLOCKS, seed=seed, epoch=epoch)[:] for seed in range(5) for epoch in range(5)]
    assert len({tuple(order) for order in orders}) == 25
    assert len({tuple(dict.fromkeys(BLOCKS[order])) for order in orders}) > 10
    assert len({tuple(order[BLOCKS[order] == 3]) for order in orders}) == 25


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 40])
def test_any_place_of_the_order_is_reached_without_the_ones_before(size):
    whole = BlockOrder(BLOCKS, seed=1, epoch=2)[:]
    for start in range(0, 17, size):
        alone = BlockOrder(BLOCKS, seed=1, epoch=2)[start : start + size]
        np.testing.assert_array_equal(alone, whole[start : start + size])
    assert len(BlockOrder(BLOCKS, seed=1, epoch=2)) == 17


def test_a_block_keeps_its_order_whoever_else_takes_part():
    """A fold leaves studies out; what is drawn for one block must not hang on the sizes of the others."""
    whole, part = (BlockOrder(blocks, seed=1, epoch=2)[:] for blocks in (BLOCKS, BLOCKS[6:]))
    inside = [order[np.isin(order, range(first, first + 7))] - first for order, first in ((whole, 6), (part, 0))]
    np.testing.assert_array_equal(*inside)


def test_recipe_chooses_the_order():
    rows = np.repeat(np.arange(6), 2)
    assert isinstance(epoch_order(Recipe(), rows, seed=0, epoch=1), np.ndarray)
    order = epoch_order(Recipe(shuffle="block", block_studies=2), rows, seed=0, epoch=1)
    assert (np.diff(rows[order[:]] // 2) != 0).sum() == 2


@pytest.fixture
def on_disk(data, tmp_path):
    """The same data with its features in a file that also holds studies which the split has not."""
    rows = np.arange(len(data.study_ids)) + np.arange(len(data.study_ids)) // 4
    table = np.full((rows[-1] + 3, *data.features_NKF.shape[1:]), np.nan, dtype=np.float32)
    table[rows] = data.features_NKF
    np.save(tmp_path / "features.npy", table)
    streamed = StreamedFeatures(tmp_path / "features.npy", rows, block_studies=BLOCK_RECIPE["block_studies"])
    return [replace(data, crop_row_N=rows, features_NKF=features) for features in (data.features_NKF, streamed)]


@pytest.mark.parametrize("num_slices", [1, 3])
def test_training_from_disk_is_bit_equal_to_the_same_order_in_memory(on_disk, backbone, tmp_path, num_slices):
    scores, curves = [], []
    for number, data in enumerate(on_disk):
        training = Training(make_spec(num_slices, **BLOCK_RECIPE), data, Resident(backbone))
        curves.append(list(training.epochs(tmp_path / f"{number}.pt")))
        scores.append(training.logits(training.validation))
    assert curves[0] == curves[1]
    np.testing.assert_array_equal(*scores)


def test_another_shuffle_gives_other_numbers(data, backbone, tmp_path):
    recipes = ({}, {"shuffle": "block"}, {"shuffle": "block", "block_studies": 2})
    trained = [
        Training(make_spec(**{**BLOCK_RECIPE, "shuffle": "full", **recipe}), data, Resident(backbone))
        for recipe in recipes
    ]
    curves = [tuple(training.epochs(tmp_path / "c.pt"))[-1].train_loss for training in trained]
    assert len(set(curves)) == 3


def test_an_epoch_reads_each_block_once(on_disk, backbone, monkeypatch):
    training = Training(make_spec(3, **BLOCK_RECIPE), on_disk[1], Resident(backbone))
    offsets = []
    read = np.fromfile
    monkeypatch.setattr(streaming.np, "fromfile", lambda *a, **k: offsets.append(k["offset"]) or read(*a, **k))
    rows = on_disk[1].crop_row_N
    monkeypatch.setattr(training, "logits", lambda samples: np.zeros(samples.size))
    training._epoch(1, "frozen")
    assert len(offsets) == len(set(offsets)) == len(set(rows[training.train.study_M] // 3))


PEAK = r"""
import re, sys
import numpy as np
from dataclasses import replace
from pathlib import Path
from study_factory import make_data, make_spec, random_backbone
from lbp_ray import features
from lbp_ray.resident import Resident
from lbp_ray.training import Training
folder, shuffle = Path(sys.argv[1]), sys.argv[2]
features.IN_MEMORY_BYTES = 0 if shuffle == "block" else 2**40
recipe = make_spec(unfrozen_epochs=0, shuffle=shuffle, block_studies=100, batch_size=512).recipe
number = np.load(folder / "features.npy", mmap_mode="r").shape[0]
data = make_data(np.arange(number) // 2 % 5, shape=(1, 1), offsets=5)
data = replace(data, features_NKF=features.load_features(folder, data.crop_row_N, block_studies=recipe.block))
training = Training(make_spec(5).model_copy(update={"recipe": recipe}), data, Resident(random_backbone()))
for epoch in (1, 2):
    training._epoch(epoch, "frozen")
print(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
"""


def peak_kib(folder, shuffle):
    """Peak resident memory of head training in a process of its own.

    From its status: getrusage also reports what the process was before it became Python, a copy of this one.
    """
    tests = Path(__file__).parent
    child = subprocess.run(
        [sys.executable, "-c", PEAK, str(folder), shuffle],
        env={"PYTHONPATH": f"{tests.parent}:{tests}", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(child.stdout)


@pytest.mark.slow
def test_memory_of_head_training_does_not_grow_with_the_cohort(tmp_path):
    folders = []
    for number in (1000, 4000):
        folders.append(tmp_path / str(number))
        folders[-1].mkdir()
        table = np.random.default_rng(0).standard_normal((number, 5, 2048), dtype=np.float32)
        np.save(folders[-1] / "features.npy", table)
    one, four = (peak_kib(folder, "block") for folder in folders)
    assert four < 1.1 * one
    assert peak_kib(folders[1], "full") > one + 100 * 2**10  # the table that streaming leaves on disk


def test_permutations_read_blocks_too(on_disk):
    nulls = [
        permutation_null(data, recipe=make_spec(**BLOCK_RECIPE).recipe, num_slices=3, count=3, seed=0, progress=False)
        for data in on_disk
    ]
    assert nulls[0] == nulls[1]
