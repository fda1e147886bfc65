"""Features that stay on disk: the order of an epoch by blocks of studies, and the reader that follows it.

A block is a range of rows of the crops, and of the feature table, which is in their order. Studies are filed by their
pseudonym, so that a block is a random draw of the cohort.

Shape suffixes: N studies, K slice offsets, F features, M samples (slices), B batch, R rows of a block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


class BlockOrder:
    """Order of an epoch's samples: the blocks shuffled, and the samples within each; no list of all samples is kept.

    Whatever is asked for is drawn from counters (Philox, keyed by seed and epoch, one counter range per block), so that
    any epoch, and any place in it, is reached without the ones before. Batches run on from block to block.

    Parameters
    ----------
    block_M
        Block of each sample; samples of one block stand together.
    seed, epoch
        The key.
    """

    def __init__(self, block_M: np.ndarray, *, seed: int, epoch: int) -> None:
        self._key = [seed, epoch]
        bounds = np.flatnonzero(np.diff(block_M, prepend=-1, append=-1))
        self._number = block_M[bounds[:-1]]
        self._first, self._size = bounds[:-1], np.diff(bounds)
        self._sequence = self._generator(0).permutation(len(self._number))
        self._end = np.cumsum(self._size[self._sequence])
        self._held: tuple[int, np.ndarray] | None = None

    def _generator(self, part: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=self._key, counter=[0, 0, 0, part]))

    def __len__(self) -> int:
        return int(self._size.sum())

    def __getitem__(self, wanted: slice) -> np.ndarray:
        """Return the samples from one place of the order to another."""
        start, stop, _ = wanted.indices(len(self))
        parts = [np.empty(0, dtype=np.int64)]
        while start < stop:
            place = int(np.searchsorted(self._end, start, side="right"))
            inside = self._shuffled(place)
            begun = start - (int(self._end[place]) - len(inside))
            parts.append(inside[begun : begun + stop - start])
            start += len(parts[-1])
        return np.concatenate(parts)

    def _shuffled(self, place: int) -> np.ndarray:
        """Draw the samples of the block at one place of the sequence."""
        if self._held is None or self._held[0] != place:
            block = self._sequence[place]
            generator = self._generator(1 + int(self._number[block]))
            self._held = place, self._first[block] + generator.permutation(self._size[block])
        return self._held[1]


class MappedFeatures:
    """A feature table that the processes of a node share as a memory map; any row at any time.

    Parameters
    ----------
    path
        ``features.npy``: (rows, K, F) float32.
    row_N
        Row of each study.
    """

    def __init__(self, path: Path, row_N: np.ndarray) -> None:
        self._table_NKF: np.ndarray = np.load(path, mmap_mode="r")
        self._row_N = row_N

    def __getitem__(self, where: tuple[Tensor, Tensor]) -> Tensor:
        """Return the features of (study, offset) pairs: (B, F)."""
        study_B, offset_B = (part.numpy() for part in where)
        return torch.from_numpy(np.array(self._table_NKF[self._row_N[study_B], offset_B]))


class StreamedFeatures:
    """A feature table of which one block at a time is in memory; each of an epoch in `BlockOrder` is read once.

    It is read, not mapped: touched pages of a map would count as this process's memory.

    Parameters
    ----------
    path
        ``features.npy``: (rows, K, F) float32.
    row_N
        Row of each study.
    block_studies
        Rows per block.
    """

    def __init__(self, path: Path, row_N: np.ndarray, *, block_studies: int) -> None:
        table_NKF: np.memmap = np.load(path, mmap_mode="r")
        self._path, self._row_N, self._block_studies = path, row_N, block_studies
        self._shape, self._header_bytes = table_NKF.shape, table_NKF.offset
        self._held: tuple[int, Tensor] | None = None

    def __getitem__(self, where: tuple[Tensor, Tensor]) -> Tensor:
        """Return the features of (study, offset) pairs: (B, F)."""
        study_B, offset_B = where
        row_B = torch.from_numpy(self._row_N[study_B.numpy()])
        block_B = row_B // self._block_studies
        features_BF = torch.empty(len(row_B), self._shape[2])
        for block in dict.fromkeys(block_B.tolist()):  # as the batch meets them: the one in memory comes first
            inside_B = block_B == block
            rows = row_B[inside_B] - block * self._block_studies
            features_BF[inside_B] = self.read(block)[rows, offset_B[inside_B]]
        return features_BF

    def read(self, block: int) -> Tensor:
        """Return a block's features (R, K, F), from memory if it was the last one asked for."""
        if self._held is None or self._held[0] != block:
            self._held = None  # so that there are never two
            num_rows, *row = self._shape
            start, size = block * self._block_studies, int(np.prod(row))
            count = min(self._block_studies, num_rows - start)
            offset = self._header_bytes + start * size * np.dtype(np.float32).itemsize
            values = np.fromfile(self._path, np.float32, count=count * size, offset=offset)
            self._held = block, torch.from_numpy(values.reshape(count, *row))
        return self._held[1]


FeatureFile = MappedFeatures | StreamedFeatures
"""A feature table on disk; it answers ``features[study_B, offset_B]`` alone."""
