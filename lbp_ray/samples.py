"""Slices as independent samples, and the order in which an epoch takes them.

Shape suffixes: N studies, K slice offsets, M samples (slices).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from lbp_ray.cell import TrialError
from lbp_ray.streaming import BlockOrder

if TYPE_CHECKING:
    from torch import Tensor

    from lbp_ray.cell import TrialData
    from lbp_ray.study import Recipe


class Samples(NamedTuple):
    """Slices as independent samples: row of the study and column of the offset."""

    study_M: np.ndarray
    offset_M: np.ndarray

    @property
    def size(self) -> int:
        """Number of slices."""
        return len(self.study_M)


class SamplesOnGpu(NamedTuple):
    """The same where their data are: a step then sends nothing to the device and asks it for nothing."""

    study_M: Tensor
    offset_M: Tensor

    @property
    def size(self) -> int:
        """Number of slices."""
        return len(self.study_M)


Slices = TypeVar("Slices", bound=Samples | SamplesOnGpu)


def some(samples: Slices, chosen: Any) -> Slices:  # noqa: ANN401  (a slice, or an array or tensor of rows)
    """Return some of the samples."""
    parts: Any = (samples.study_M[chosen], samples.offset_M[chosen])
    return type(samples)(*parts)


def select_samples(data: TrialData, rows: np.ndarray, num_slices: int) -> Samples:
    """List the slices of some studies: the `num_slices` offsets around the mid-sagittal one.

    Parameters
    ----------
    data
        The study's shared data; its K offsets are symmetric about the mid-sagittal slice.
    rows
        Study rows, ascending.
    num_slices
        Odd number of slices, at most K.
    """
    centre, reach = data.slice_index_NK.shape[1] // 2, num_slices // 2
    if reach > centre:
        msg = f"{num_slices} slices were asked for, but the crops hold {data.slice_index_NK.shape[1]}; make crops again"
        raise TrialError(msg)
    offsets = np.arange(centre - reach, centre + reach + 1)
    return Samples(np.repeat(rows, len(offsets)), np.tile(offsets, len(rows)))


def batch_order(*, seed: int, epoch: int, size: int) -> np.ndarray:
    """Return the order of an epoch's samples from a counter, so that any epoch can be resumed without stored state."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(size)


def epoch_order(recipe: Recipe, row_M: np.ndarray, *, seed: int, epoch: int) -> np.ndarray | BlockOrder:
    """Return the recipe's order of an epoch; slice it batch by batch.

    Parameters
    ----------
    recipe
        Says whether all samples are shuffled, or blocks of studies.
    row_M
        Row of each sample's study in the crops and in the features.
    seed, epoch
        The counter.
    """
    if recipe.block is None:
        return batch_order(seed=seed, epoch=epoch, size=len(row_M))
    return BlockOrder(row_M // recipe.block, seed=seed, epoch=epoch)
