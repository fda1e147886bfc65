"""The loop that most people would write: the whole network in every step of every epoch, nothing kept between trials.

Same data, order, seed and optimiser as the project's trial, so that their scores can be compared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from lbp_ray.nets.resnet import build_backbone, build_head, standardise
from lbp_ray.samples import Samples, batch_order, select_samples
from lbp_ray.splits import HOLDOUT
from lbp_ray.steps import adam, learning_rate

if TYPE_CHECKING:
    from lbp_ray.cell import TrialData, TrialSpec
    from lbp_ray.nets.weights import StateDict

SCORING_BATCH = 32


class NaiveTrial(NamedTuple):
    """What the naive loop of one trial ends with."""

    frozen_logits_M: np.ndarray
    """Logits of the evaluated fold after the last frozen epoch."""
    logits_M: np.ndarray
    """The same after the last epoch."""
    labels_M: np.ndarray
    """Labels of the evaluated fold's slices."""

    @property
    def frozen_loss(self) -> float:
        """Mean cross-entropy over the evaluated fold's slices after the last frozen epoch."""
        return float(np.mean(np.logaddexp(0, self.frozen_logits_M) - self.labels_M * self.frozen_logits_M))


class NaiveLoop:
    """One network, trained plainly.

    Parameters
    ----------
    data
        Crops and labels; features are not looked at.
    state
        The backbone's first weights.
    spec
        What to train.
    device
        Torch device.
    layout
        Memory format of network and images.
    """

    def __init__(
        self,
        data: TrialData,
        state: StateDict,
        spec: TrialSpec,
        *,
        device: str = "cpu",
        layout: torch.memory_format = torch.channels_last,
    ) -> None:
        self.data, self.spec, self.recipe = data, spec, spec.recipe
        self.device, self.layout = device, layout
        self.backbone = build_backbone(state).to(device).to(memory_format=layout)
        self.head = build_head(seed=spec.cell.seed).to(device)
        self.network = nn.Sequential(self.backbone, self.head).eval()
        self.optimiser = adam(list(self.head.parameters()), self.recipe)
        self.targets_N = torch.from_numpy(data.labels_N).to(device)
        self.train = self._samples((data.folds_N != HOLDOUT) & (data.folds_N != spec.cell.fold))
        self.validation = self._samples(data.folds_N == spec.cell.fold)
        self.holdout = self._samples(data.folds_N == HOLDOUT)

    def run(self) -> NaiveTrial:
        """Train and score to the end."""
        torch.set_num_threads(self.recipe.threads)
        frozen = logits = np.empty(0)
        for epoch in range(1, self.recipe.frozen_epochs + self.recipe.unfrozen_epochs + 1):
            if epoch == self.recipe.frozen_epochs + 1:
                self.unfreeze()
            for group in self.optimiser.param_groups:
                group["lr"] = learning_rate(self.recipe, epoch)
            order = batch_order(seed=self.spec.cell.seed, epoch=epoch, size=self.train.size)
            for start in range(0, len(order), self.recipe.batch_size):
                self.step(order[start : start + self.recipe.batch_size])
            logits = self.score(self.validation)
            frozen = logits if epoch <= self.recipe.frozen_epochs else frozen
        self.score(self.holdout)
        return NaiveTrial(frozen, logits, self.data.labels_N[self.validation.study_M].astype(float))

    def unfreeze(self) -> None:
        """Let all weights train; the last layer's moments are kept."""
        self.backbone.requires_grad_(True)
        self.optimiser.add_param_group({"params": list(self.backbone.parameters())})

    def step(self, chosen: np.ndarray) -> None:
        """Train on some of the training slices."""
        batch = Samples(self.train.study_M[chosen], self.train.offset_M[chosen])
        logits_B = self.network(self.images(batch))[:, 0]
        loss = binary_cross_entropy_with_logits(logits_B, self.targets_N[torch.from_numpy(batch.study_M)])
        self.optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()
        loss.item()  # what a progress bar shows

    def score(self, samples: Samples) -> np.ndarray:
        """Return the logits of some slices, float64."""
        with torch.no_grad():
            parts = [
                self.network(self.images(Samples(*(part[start : start + SCORING_BATCH] for part in samples)))).cpu()
                for start in range(0, samples.size, SCORING_BATCH)
            ]
        return torch.cat(parts)[:, 0].double().numpy()

    def images(self, batch: Samples) -> Tensor:
        """Standardised images of some slices."""
        pixels = torch.from_numpy(self.data.crops_NKHW[batch.study_M, batch.offset_M]).to(self.device)
        return standardise(pixels).contiguous(memory_format=self.layout)

    def _samples(self, chosen_N: np.ndarray) -> Samples:
        return select_samples(self.data, np.flatnonzero(chosen_N), self.spec.cell.num_slices)
