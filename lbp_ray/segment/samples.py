"""Slices and masks on one square grid, and the batches that a network is trained on.

Shape suffixes: N slices, B batch, P rows and columns of the network's grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate

if TYPE_CHECKING:
    from pathlib import Path


class Grid(NamedTuple):
    """Where an image of some size lies on the network's square grid: scaled to fit, in the middle."""

    rows: int
    columns: int
    size_px: int

    @property
    def used(self) -> tuple[int, int]:
        """How many rows and columns of the grid the image covers; the rest is padding, as much on both sides."""
        scale = self.size_px / max(self.rows, self.columns)
        return max(1, round(self.rows * scale)), max(1, round(self.columns * scale))

    @property
    def place(self) -> tuple[slice, slice]:
        """Rows and columns of the grid that the image covers."""
        first, second = (slice(corner, corner + size) for corner, size in zip(self._corner, self.used, strict=True))
        return first, second

    @property
    def _corner(self) -> tuple[int, int]:
        rows, columns = self.used
        return (self.size_px - rows) // 2, (self.size_px - columns) // 2

    def resample(self, values_HW: np.ndarray) -> Tensor:
        """Bring an image, or a mask as shares of pixels, onto the grid: (P, P) float32, zero outside the image."""
        values = torch.from_numpy(values_HW.astype(np.float32))[None, None]
        if self.used != (self.rows, self.columns):
            values = interpolate(values, size=self.used, mode="bilinear", antialias=True, align_corners=False)
        grid = torch.zeros(self.size_px, self.size_px)
        grid[self.place] = values[0, 0]
        return grid

    def restore(self, logits_PP: Tensor) -> np.ndarray:
        """Bring logits back to the image's own pixels and decide: (rows, columns) bool."""
        values = logits_PP[self.place].float()[None, None]
        if self.used != (self.rows, self.columns):
            values = interpolate(values, size=(self.rows, self.columns), mode="bilinear", align_corners=False)
        return np.asarray(values[0, 0].cpu().numpy() > 0)


def standardise_grid(values_BPP: Tensor, used_B2: Tensor) -> Tensor:
    """Give every image mean 0 and standard deviation 1 over the part of the grid that it covers; padding becomes 0.

    Parameters
    ----------
    values_BPP
        Stored pixel values on the grid.
    used_B2
        Rows and columns that each image covers.

    Returns
    -------
    torch.Tensor
        (B, 1, P, P) float32 in channels_last.

    Raises
    ------
    ValueError
        If an image is constant.
    """
    axis = torch.arange(values_BPP.shape[-1], device=values_BPP.device)
    corner_B2 = (values_BPP.shape[-1] - used_B2) // 2
    covered_B2P = (axis >= corner_B2[:, :, None]) & (axis < (corner_B2 + used_B2)[:, :, None])
    inside = covered_B2P[:, 0, :, None] & covered_B2P[:, 1, None, :]
    values = values_BPP.float()
    count = inside.sum((1, 2), keepdim=True)
    mean = (values * inside).sum((1, 2), keepdim=True) / count
    std = (((values - mean) * inside).square().sum((1, 2), keepdim=True) / count).sqrt()
    if bool((std == 0).any()):
        msg = f"image {int((std.flatten() == 0).nonzero()[0])} of the batch is constant; a blank slice shows no spine"
        raise ValueError(msg)
    return ((values - mean) / std * inside).unsqueeze(1).contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class TrainingSet:
    """Annotated slices on the network's grid, memory-mapped, and who they are of."""

    images_NPP: np.ndarray
    """Stored pixel values, rounded where the image was resampled."""
    masks_NPP: np.ndarray
    """uint8, 1 inside the region."""
    used_N2: np.ndarray
    """Rows and columns of the grid that each image covers."""

    @classmethod
    def open(cls, folder: Path) -> TrainingSet:
        """Map a committed set."""
        arrays = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("images", "masks", "used"))
        return cls(*arrays)

    def batch(self, rows_B: np.ndarray, device: str) -> tuple[Tensor, Tensor]:
        """Return standardised images and masks of some rows: (B, 1, P, P) float32 each, made on the device."""
        values, masks, used = (
            torch.from_numpy(np.ascontiguousarray(array[rows_B]).astype(dtype)).to(device)
            for array, dtype in ((self.images_NPP, np.float32), (self.masks_NPP, np.uint8), (self.used_N2, np.int64))
        )
        return standardise_grid(values, used), masks.float().unsqueeze(1)


class Pose(NamedTuple):
    """How each of B images is turned before a network sees it."""

    flip_B: np.ndarray
    """Whether columns are reversed (a mirror from front to back in a sagittal image)."""
    angle_deg_B: np.ndarray
    """Counter-clockwise turn about the grid's centre."""


def draw_poses(*, seed: int, epoch: int, size: int, flip_share: float, rotation_deg: float) -> Pose:
    """Draw the poses of an epoch from a counter: the same whichever worker draws, and after any resume.

    References
    ----------
    Oulu thesis, section 3.3: random horizontal flip, random rotation of -15 to 15 degrees, training images only.
    """
    chance = np.random.Generator(np.random.Philox(key=[seed, 2**32 + epoch]))
    return Pose(chance.random(size) < flip_share, chance.uniform(-rotation_deg, rotation_deg, size))


def turn(values_B1PP: Tensor, pose: Pose) -> Tensor:
    """Flip and rotate images; what comes from outside is 0."""
    angle = torch.from_numpy(np.deg2rad(pose.angle_deg_B)).float().to(values_B1PP.device)
    mirror = torch.from_numpy(np.where(pose.flip_B, -1.0, 1.0)).float().to(values_B1PP.device)
    zero = torch.zeros_like(angle)
    first = torch.stack([mirror * angle.cos(), -mirror * angle.sin(), zero], dim=1)
    second = torch.stack([angle.sin(), angle.cos(), zero], dim=1)
    grid = affine_grid(torch.stack([first, second], dim=1), list(values_B1PP.shape), align_corners=False)
    return grid_sample(values_B1PP, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
