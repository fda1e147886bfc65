from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from study_factory import make_data, random_backbone
from test_folding import trained_backbone

from lbp_ray import features
from lbp_ray.features import (
    Extracted,
    FeatureCacheError,
    Shards,
    extract,
    features_id,
    load_features,
    refuse_random_access,
)
from lbp_ray.nets.folding import fold
from lbp_ray.streaming import MappedFeatures, StreamedFeatures
from lbp_ray.study import Recipe
from preprocess.commit import KILL_AT_VARIABLE

SHAPE = (5, 2, 3)
VALUES = np.arange(30, dtype=np.float32).reshape(SHAPE)


@pytest.fixture(scope="module")
def backbone():
    return trained_backbone()


@pytest.mark.parametrize("shape", [(400, 200), (64, 32), (101, 77)], ids=str)
def test_folded_features_agree_to_1e_5(backbone, shape):
    crops = make_data([0, 1], shape=shape, offsets=1).crops_NKHW
    whole, folded = extract(backbone, crops), extract(fold(backbone), crops)
    assert 0 < np.abs(whole - folded).max() <= 1e-5 * np.abs(whole).max()


def test_folded_network_is_given_one_channel():
    shapes = []
    network = fold(random_backbone())
    network.register_forward_pre_hook(lambda _, images: shapes.append(tuple(images[0].shape)))
    extract(network, make_data([0] * 7, shape=(32, 32)).crops_NKHW)
    assert shapes == [(16, 1, 32, 32), (5, 1, 32, 32)]


def test_extraction_is_full_float32_and_leaves_the_setting(backbone):
    seen = []
    network = fold(backbone)
    network.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    before = torch.backends.cudnn.allow_tf32
    extract(network, make_data([0], shape=(32, 32)).crops_NKHW)
    assert (seen, torch.backends.cudnn.allow_tf32) == ([False], before)


@pytest.mark.parametrize(
    "change",
    [{"crops_hash": "other"}, {"weights_hash": "other"}, {"threads": 2}, {"device": "cuda"}, {"folded": True}],
    ids=str,
)
def test_address_covers(change):
    given = {"crops_hash": "c", "weights_hash": "w", "threads": 1}
    assert features_id(**given) == features_id(**given)
    assert features_id(**{**given, **change}) != features_id(**given)


@pytest.mark.parametrize("library", ["torch", "torchvision"])
def test_address_covers_library_versions_and_batch_size(monkeypatch, library):
    given = {"crops_hash": "c", "weights_hash": "w", "threads": 1}
    before = features_id(**given)
    monkeypatch.setattr(getattr(features, library), "__version__", "0.0")
    other = features_id(**given)
    monkeypatch.setattr(features, "BATCH_SIZE", 8)
    assert len({before, other, features_id(**given)}) == 3


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("offsets", [1, 3, 5, 7])
def test_shards_cut_no_batch(tmp_path, device, offsets):
    shards = Shards.of(tmp_path / "f", np.empty((1000, offsets, 1, 1)), device=device)
    sizes = [shards.rows(index).stop - shards.rows(index).start for index in range(len(shards))]
    assert sum(sizes) == 1000
    assert all(size * offsets % features.batch_size(device) == 0 for size in sizes[:-1])


@pytest.fixture
def shards(tmp_path):
    """Two of three shards are done."""
    shards = Shards(tmp_path / "a", SHAPE, studies=2)
    assert shards.begin() == [0, 1, 2]
    for index in (0, 2):
        shards.write(index, VALUES[shards.rows(index)])
    return shards


def test_finished_shards_are_taken_and_the_table_is_theirs(shards, tmp_path):
    assert shards.begin() == [1]
    shards.write(1, VALUES[shards.rows(1)])
    shards.assemble(Extracted(1, 0.5))
    np.testing.assert_array_equal(np.load(tmp_path / "a" / "features.npy"), VALUES)
    assert not shards.folder.exists()


def test_table_that_another_study_commits_meanwhile_is_taken(shards, tmp_path):
    other = Shards(shards.final, SHAPE, studies=2)
    shards.write(1, VALUES[shards.rows(1)])
    shards.assemble(Extracted(1, 0.5))
    other.write(1, VALUES[other.rows(1)])  # it had begun before the other was done
    other.assemble(Extracted(2, 0.7))
    np.testing.assert_array_equal(np.load(tmp_path / "a" / "features.npy"), VALUES)
    assert json.loads((tmp_path / "a" / "features.json").read_text())["images"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_shard_that_cannot_be_written_is_an_error_unless_the_table_is_there(shards, tmp_path, monkeypatch):
    def gone(*_):
        raise FileNotFoundError

    monkeypatch.setattr(features, "write_atomic", gone)
    with pytest.raises(FileNotFoundError):
        shards.write(1, VALUES[shards.rows(1)])
    (tmp_path / "a").mkdir()
    shards.write(1, VALUES[shards.rows(1)])


def test_manifest_says_what_each_shard_is(shards):
    manifest = json.loads((shards.folder / features.MANIFEST).read_text())
    assert manifest["features"] == "a"
    assert manifest["shards"] == {"000000.f32": [0, 2], "000001.f32": [2, 4], "000002.f32": [4, 5]}


@pytest.mark.parametrize(
    "other",
    [{"final": "b"}, {"shape": (5, 1, 6)}, {"studies": 1}],
    ids=str,
)
def test_shards_of_another_table_are_not_taken(shards, other):
    stranger = Shards(**{**vars(shards), **other, "final": shards.final.with_name(other.get("final", "a"))})
    if stranger.folder != shards.folder:
        shutil.copytree(shards.folder, stranger.folder)
    moved = stranger.file(0).read_bytes()
    assert stranger.begin() == list(range(len(stranger)))
    assert json.loads((stranger.folder / features.MANIFEST).read_text()) == json.loads(json.dumps(stranger.manifest))
    stranger.file(0).write_bytes(moved)  # also where the manifest is right
    assert 0 in stranger.begin()


@pytest.mark.parametrize(
    "harm", [lambda b: b[:-1], lambda b: b[:5], lambda b: bytes([b[0] ^ 1]) + b[1:], lambda _: b""]
)
def test_harmed_shard_is_computed_again(shards, harm, tmp_path):
    shards.write(1, VALUES[shards.rows(1)])
    file = shards.file(0)
    file.write_bytes(harm(file.read_bytes()))
    with pytest.raises(FeatureCacheError, match=r"000000.f32 has gone or changed"):
        shards.assemble(Extracted(1, 0.5))
    assert shards.begin() == [0]


def test_shard_of_other_studies_is_not_taken(shards):
    shutil.copy(shards.file(0), shards.file(1))
    assert shards.begin() == [1]


CHILD = """
import sys, numpy as np
from pathlib import Path
from lbp_ray.features import Shards
shards = Shards(Path(sys.argv[1]), (5, 2, 3), studies=2)
for index in shards.begin():
    shards.write(index, np.arange(30).reshape(5, 2, 3)[shards.rows(index)])
"""


def test_kill_between_shards_resumes_without_computing_again(tmp_path):
    shards = Shards(tmp_path / "a", SHAPE, studies=2)
    killed = {**os.environ, KILL_AT_VARIABLE: f"features:shard@{tmp_path / 'marker'}"}
    child = subprocess.run([sys.executable, "-c", CHILD, str(shards.final)], env=killed, check=False)
    assert child.returncode == -signal.SIGKILL
    assert {path.name for path in shards.folder.iterdir()} == {features.MANIFEST, "000000.f32"}
    assert shards.begin() == [1, 2]
    np.testing.assert_array_equal(shards.read(0), VALUES[:2])


@pytest.mark.parametrize(
    ("limit", "block", "kind"),
    [(10**6, None, torch.Tensor), (10**6, 2, torch.Tensor), (0, None, MappedFeatures), (0, 2, StreamedFeatures)],
)
def test_table_is_in_memory_when_small_and_answers_alike(tmp_path, monkeypatch, limit, block, kind):
    monkeypatch.setattr(features, "IN_MEMORY_BYTES", limit)
    np.save(tmp_path / "features.npy", VALUES)
    table = load_features(tmp_path, np.array([0, 2, 3, 4]), block_studies=block)
    assert isinstance(table, kind)
    study, offset = [3, 0, 0, 1, 2, 2], [1, 0, 1, 1, 0, 1]
    found = table[torch.tensor(study), torch.tensor(offset)]
    np.testing.assert_array_equal(found, VALUES[[0, 2, 3, 4]][study, offset])


def test_full_shuffle_of_a_table_beyond_memory_is_refused():
    crops = np.empty((2_400_000, 5, 0, 0))
    with pytest.raises(FeatureCacheError, match=r"2400000 studies take 91.6 GiB.*8.0 GiB.*recipe.shuffle: block"):
        refuse_random_access(crops, Recipe())
    refuse_random_access(crops, Recipe(shuffle="block"))
    refuse_random_access(crops[:200_000], Recipe())
