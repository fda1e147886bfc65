"""Frozen-backbone features of every slice: computed once, shared by every trial.

While the backbone is frozen with BatchNorm in eval mode its pooled features are constants, so training the last layer
on them gives the very numbers that the whole network in the loop would give.

Shape suffixes: N studies, K slice offsets, H rows, W columns, F features.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torchvision

from lbp_ray.nets.resnet import NUM_FEATURES, standardise
from lbp_ray.streaming import MappedFeatures, StreamedFeatures
from lbp_ray.study import NUMERICS_VERSION
from preprocess.commit import commit_point, committed_directory, content_id, write_atomic

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import nn

    from lbp_ray.streaming import FeatureFile
    from lbp_ray.study import Recipe

BATCH_SIZE = 16
"""Images per forward pass of the extraction on a CPU; fixed, because another may move float32 in the last digits."""

CUDA_BATCH_SIZE = 128
"""The same on a GPU, which small batches leave idle: about 2.5 GB of activations at 400 x 200."""

SHARD_STUDIES = 16
"""Studies per shard on a CPU: the unit of work, of resume and of one Ray task. A multiple of the batch size, so that
shards cut no batch, whatever the number of offsets."""

CUDA_SHARD_STUDIES = 256
"""The same on a GPU: some tenths of a second of work, so that starting a task and flushing its file do not dominate."""

IN_MEMORY_BYTES = 256 * 2**20
"""Largest feature table that every process copies into its memory: 6,500 studies of 5 slices."""

MAPPED_BYTES = 8 * 2**30
"""Largest feature table that a full shuffle may read at random from the map that the processes of a node share."""

SEAL_BYTES = 32
"""Length of the SHA-256 at the end of a shard."""

MANIFEST = "shards.json"
"""Says which table the shards of a folder belong to and which studies each holds."""


class FeatureCacheError(ValueError):
    """A feature cache that would not equal the network in the loop, or cannot be used."""


def is_cuda(device: str) -> bool:
    """Whether a Torch device is a GPU."""
    return device.startswith("cuda")


def features_id(
    *,
    crops_hash: str,
    weights_hash: str,
    threads: int,
    batchnorm: str = "eval",
    device: str = "cpu",
    folded: bool = False,
) -> str:
    """Return the address of a feature table.

    Parameters
    ----------
    crops_hash
        Content hash of the crops artefact: its pixels, studies, slice indices and offsets.
    weights_hash
        SHA-256 of the backbone's state.
    threads
        CPU threads of the extraction: they change float32 sums.
    batchnorm
        BatchNorm mode of the frozen backbone; only ``eval`` gives constant features.
    device
        Kind of device, ``cpu`` or ``cuda``: their float32 sums differ.
    folded
        Whether the backbone is folded by `lbp_ray.nets.folding.fold`.

    Raises
    ------
    FeatureCacheError
        If BatchNorm is in train mode.
    """
    if batchnorm != "eval":
        msg = (
            f"the feature cache needs BatchNorm in eval mode, found {batchnorm!r}: running statistics would drift and "
            "every feature depend on its batch; set recipe.frozen_batchnorm: eval or recipe.feature_cache: false"
        )
        raise FeatureCacheError(msg)
    return content_id(
        {
            "crops": crops_hash,
            "weights": weights_hash,
            "threads": threads,
            "batch_size": batch_size(device),
            "batchnorm": batchnorm,
            "folded": folded,
            "device": device,
            "dtype": "float32",
            "layout": "channels_last",
            "standardise": "per image",
            "numerics": NUMERICS_VERSION,
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        }
    )


def batch_size(device: str) -> int:
    """Return the images per forward pass of the extraction on a device."""
    return CUDA_BATCH_SIZE if is_cuda(device) else BATCH_SIZE


def extract(backbone: nn.Module, crops_NKHW: np.ndarray, *, device: str = "cpu") -> np.ndarray:
    """Run the frozen backbone over every slice of some studies, in full float32 (no TF32).

    Parameters
    ----------
    backbone
        Frozen ResNet50 without its last layer, as `lbp_ray.nets.resnet.build_backbone` makes it or folded by
        `lbp_ray.nets.folding.fold`.
    crops_NKHW
        Stored pixel values.
    device
        Torch device to run on.

    Returns
    -------
    numpy.ndarray
        (N, K, F) float32.

    Raises
    ------
    FeatureCacheError
        If any layer of the backbone is in train mode.
    """
    if any(module.training for module in backbone.modules()):
        msg = "the backbone is in train mode: its features would not be constants; call backbone.eval() first"
        raise FeatureCacheError(msg)
    num_studies, num_offsets = crops_NKHW.shape[:2]
    flat = crops_NKHW.reshape(-1, *crops_NKHW.shape[2:])
    channels = next(backbone.parameters()).shape[1]  # of conv1
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        parts = [
            backbone(standardise(torch.from_numpy(batch).to(device), channels=channels)).cpu()
            for batch in _batches(flat, batch_size(device))
        ]
    return torch.cat(parts).reshape(num_studies, num_offsets, -1).numpy()


def _batches(flat: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(flat), size):
        yield np.array(flat[start : start + size])


class Extracted(NamedTuple):
    """What a run computed of a feature table; shards of a killed run before it are not counted."""

    images: int
    seconds: float
    """Of all workers together."""


@dataclass(frozen=True)
class Shards:
    """The parts of one feature table while it is computed.

    A shard is a file of float32 values that ends with a SHA-256 over the table's address, the studies and the values:
    it is whole, and this very shard, or it is not taken.
    """

    final: Path
    """Folder of the table once it is committed; its name is the table's address."""
    shape: tuple[int, int, int]
    """Shape of the table: (N, K, F)."""
    studies: int
    """Studies per shard; the last may have fewer."""

    @classmethod
    def of(cls, final: Path, crops_NKHW: np.ndarray, *, device: str) -> Shards:
        """Plan the shards of a table that will be committed as `final`."""
        studies = CUDA_SHARD_STUDIES if is_cuda(device) else SHARD_STUDIES
        return cls(final, (*crops_NKHW.shape[:2], NUM_FEATURES), studies)

    def __len__(self) -> int:
        return -(-self.shape[0] // self.studies)

    @property
    def folder(self) -> Path:
        """Where the shards lie, beside `MANIFEST`; those of a killed run are kept."""
        return self.final.with_suffix(".shards")

    def rows(self, index: int) -> slice:
        """Studies of one shard."""
        return slice(index * self.studies, min((index + 1) * self.studies, self.shape[0]))

    def file(self, index: int) -> Path:
        """File of one shard."""
        return self.folder / f"{index:06d}.f32"

    @property
    def manifest(self) -> dict[str, Any]:
        """What each shard is."""
        rows = [self.rows(index) for index in range(len(self))]
        return {
            "features": self.final.name,
            "dtype": "float32",
            "shape": list(self.shape),
            "shards": {self.file(index).name: [part.start, part.stop] for index, part in enumerate(rows)},
        }

    def begin(self) -> list[int]:
        """Write the manifest, drop what belongs to another one and return the shards that are missing."""
        path = self.folder / MANIFEST
        text = json.dumps(self.manifest, indent=1)
        if not path.is_file() or path.read_text() != text:
            shutil.rmtree(self.folder, ignore_errors=True)
            write_atomic(path, text.encode())
        return [index for index in range(len(self)) if self.read(index) is None]

    def write(self, index: int, features_NKF: np.ndarray) -> None:
        """Commit one shard."""
        values = np.ascontiguousarray(features_NKF, dtype=np.float32).tobytes()
        try:
            write_atomic(self.file(index), values + self._seal(index, values))
        except FileNotFoundError:
            if not self.final.is_dir():  # else another study has just committed the same table
                raise
        commit_point("features:shard")

    def read(self, index: int) -> np.ndarray | None:
        """Return the features of one shard, or None unless it is there, whole and of this table."""
        try:
            content = self.file(index).read_bytes()
        except FileNotFoundError:
            return None
        values = content[:-SEAL_BYTES]
        if content[-SEAL_BYTES:] != self._seal(index, values):
            return None
        rows = self.rows(index)
        return np.frombuffer(values, dtype=np.float32).reshape(rows.stop - rows.start, *self.shape[1:])

    def _seal(self, index: int, values: bytes) -> bytes:
        rows = self.rows(index)
        digest = hashlib.sha256(f"{self.final.name} {self.shape} {rows.start}:{rows.stop}\n".encode())
        digest.update(values)
        return digest.digest()

    def assemble(self, extracted: Extracted) -> None:
        """Commit the table, with what this run computed of it, and delete its shards.

        Where another study has committed the same table meanwhile, that one stays.

        Raises
        ------
        FeatureCacheError
            If a shard has gone or changed since it was written.
        """
        with committed_directory(self.final, point="features") as partial:
            table = np.lib.format.open_memmap(partial / "features.npy", mode="w+", dtype=np.float32, shape=self.shape)
            for index in range(len(self)):
                features_NKF = self.read(index)
                if features_NKF is None and self.final.is_dir():
                    break
                if features_NKF is None:
                    msg = f"shard {self.file(index)} has gone or changed since it was written; run the command again"
                    raise FeatureCacheError(msg)
                table[self.rows(index)] = features_NKF
            table.flush()
            (partial / "features.json").write_text(json.dumps(extracted._asdict()))
        shutil.rmtree(self.folder, ignore_errors=True)


def refuse_random_access(crops_NKHW: np.ndarray, recipe: Recipe) -> None:
    """Refuse a full shuffle of a feature table that memory may not hold, before it is computed.

    Raises
    ------
    FeatureCacheError
        If the table is larger than `MAPPED_BYTES` and the recipe shuffles all slices.
    """
    table_bytes = int(np.prod(crops_NKHW.shape[:2])) * NUM_FEATURES * np.dtype(np.float32).itemsize
    if recipe.block is None and table_bytes > MAPPED_BYTES:
        msg = (
            f"the features of {crops_NKHW.shape[0]} studies take {table_bytes / 2**30:.1f} GiB, and a full shuffle "
            f"reads at most {MAPPED_BYTES / 2**30:.1f} GiB at random; set recipe.shuffle: block to read them in blocks"
        )
        raise FeatureCacheError(msg)


def load_features(folder: Path, row_N: np.ndarray, *, block_studies: int | None) -> torch.Tensor | FeatureFile:
    """Open a committed feature table: in memory up to `IN_MEMORY_BYTES`, else on disk.

    Parameters
    ----------
    folder
        The committed table.
    row_N
        Row of each study that is wanted.
    block_studies
        Rows per block of the recipe's shuffle, None for a full one.

    Returns
    -------
    torch.Tensor or FeatureFile
        (N, K, F) float32, or what answers ``[study_B, offset_B]`` as that would.
    """
    path = folder / "features.npy"
    if path.stat().st_size <= IN_MEMORY_BYTES:
        return torch.from_numpy(np.load(path, mmap_mode="r")[row_N])
    if block_studies is None:
        return MappedFeatures(path, row_N)
    return StreamedFeatures(path, row_N, block_studies=block_studies)
