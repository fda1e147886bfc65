"""A trained region finder at work: slices of any size in, masks on their own pixels out."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Self

import numpy as np
import torch

from lbp_ray.nets.unet import build_unet
from lbp_ray.segment.samples import Grid, standardise_grid

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

BATCH = 16
"""Slices per forward pass."""


class Segmenter:
    """A network that stays in a process.

    Parameters
    ----------
    model
        State dict file of the U-Net.
    input_px
        Rows and columns of the grid that it was trained on.
    device
        Torch device.
    bfloat16
        Autocast type; that of the training.
    """

    def __init__(self, model: Path, *, input_px: int, device: str = "cpu", bfloat16: bool = False) -> None:
        network = build_unet(None, seed=0)
        network.load_state_dict(torch.load(model, map_location="cpu", weights_only=True))
        self.network = network.eval().to(device)
        self.input_px, self.device, self.bfloat16 = input_px, device, bfloat16

    @classmethod
    def load(cls, folder: Path, *, device: str = "cpu") -> Self:
        """Load the final network of a regions artefact."""
        recipe = json.loads((folder / "regions.json").read_text())["recipe"]
        return cls(
            folder / "final.pt", input_px=recipe["input_px"], device=device, bfloat16=recipe["dtype"] == "bfloat16"
        )

    @torch.inference_mode()
    def masks(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Segment slices.

        Parameters
        ----------
        images
            (rows, columns) stored pixel values each; sizes may differ.

        Returns
        -------
        list of numpy.ndarray
            (rows, columns) bool each; empty for a blank slice, which shows no spine.
        """
        masks = [np.zeros(image.shape, dtype=bool) for image in images]
        shown = [row for row, image in enumerate(images) if image.min() < image.max()]
        for start in range(0, len(shown), BATCH):
            chosen = shown[start : start + BATCH]
            part = [images[row] for row in chosen]
            grids = [Grid(image.shape[0], image.shape[1], self.input_px) for image in part]
            values = torch.stack([grid.resample(image) for grid, image in zip(grids, part, strict=True)])
            inputs = standardise_grid(values.to(self.device), torch.tensor([g.used for g in grids], device=self.device))
            with torch.autocast(self.device.split(":")[0], dtype=torch.bfloat16, enabled=self.bfloat16):
                logits = self.network(inputs)
            for row, grid, one in zip(chosen, grids, logits[:, 0].float().cpu(), strict=True):
                masks[row] = grid.restore(one)
        return masks
