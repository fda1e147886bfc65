"""The training loop of one trial: frozen epochs on constant features, then epochs of all weights.

Shape suffixes: N studies, K slice offsets, H rows, W columns, F features, M samples (slices), B batch, P outputs.
"""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from lbp_ray.cell import TrialData, TrialError, TrialSpec
from lbp_ray.metrics import roc_auc, study_scores
from lbp_ray.nets.resnet import build_head, set_batchnorm_mode, standardise
from lbp_ray.splits import HOLDOUT
from preprocess.commit import commit_point, write_atomic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from lbp_ray.nets.weights import StateDict
    from lbp_ray.study import Recipe

EVALUATION_BATCH = 32
"""Images per forward pass when a trained network is scored."""


class Samples(NamedTuple):
    """Slices as independent samples: row of the study and column of the offset."""

    study_M: np.ndarray
    offset_M: np.ndarray

    @property
    def size(self) -> int:
        """Number of slices."""
        return len(self.study_M)


@dataclass(frozen=True)
class EpochRecord:
    """One line of a learning curve."""

    epoch: int
    """Counted from 1 over both stages."""
    stage: Literal["frozen", "unfrozen"]
    learning_rate: float
    train_loss: float
    """Mean over the epoch's samples, while training."""
    validation_loss: float
    """Mean over the slices of the evaluated fold; for looking, nothing is chosen on it."""
    validation_auc: float
    """Study-level ROC-AUC on the evaluated fold."""


class Resident:
    """A backbone that stays in a process; every trial starts from its base weights, loaded in place.

    Parameters
    ----------
    backbone
        As `lbp_ray.nets.resnet.build_backbone` makes it.
    device
        Torch device.
    """

    def __init__(self, backbone: nn.Module, *, device: str = "cpu") -> None:
        self.device = device
        self.backbone = backbone.to(device)
        self._base: StateDict = {name: value.clone() for name, value in backbone.state_dict().items()}

    def reset(self) -> nn.Module:
        """Undo whatever an earlier trial did: weights, running statistics, gradients, modes."""
        self.backbone.load_state_dict(self._base)
        self.backbone.requires_grad_(False)
        self.backbone.zero_grad(set_to_none=True)
        return self.backbone.eval()


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


def learning_rate(recipe: Recipe, epoch: int) -> float:
    """Return the learning rate of an epoch counted from 1 over both stages."""
    if epoch > recipe.frozen_epochs and recipe.learning_rate_unfrozen is not None:
        return recipe.learning_rate_unfrozen
    return recipe.learning_rate if epoch < recipe.learning_rate_drop else recipe.learning_rate_late


def train_epoch(
    score: Callable[[Samples], Tensor],
    optimiser: torch.optim.Optimizer,
    samples: Samples,
    *,
    targets_NP: Tensor,
    order: np.ndarray,
    batch_size: int,
) -> float:
    """Train for one epoch.

    Parameters
    ----------
    score
        Samples of one batch → (B, P) logits, with gradients.
    optimiser
        Holds the parameters that train.
    samples
        The training slices.
    targets_NP
        Label of every study; each of the P outputs is a head of its own.
    order
        Permutation of the samples.
    batch_size
        Samples per step; the last batch may be smaller.

    Returns
    -------
    float
        Mean loss over the samples (summed over outputs).
    """
    total = 0.0
    for start in range(0, samples.size, batch_size):
        chosen = order[start : start + batch_size]
        batch = Samples(samples.study_M[chosen], samples.offset_M[chosen])
        logits_BP = score(batch)
        targets_BP = targets_NP[torch.from_numpy(batch.study_M)].to(logits_BP.device)
        loss = binary_cross_entropy_with_logits(logits_BP.float(), targets_BP, reduction="none").mean(0).sum()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        total += loss.item() * batch.size
    return total / samples.size


def adam(parameters: list[nn.Parameter], recipe: Recipe) -> torch.optim.Adam:
    """Make the recipe's Adam, in its fused form; the learning rate is set before each epoch."""
    return torch.optim.Adam(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True)


class Training:
    """State of one trial while it trains; `epochs` yields a record after each epoch."""

    def __init__(self, spec: TrialSpec, data: TrialData, resident: Resident) -> None:
        self.spec, self.data, self.device = spec, data, resident.device
        self.recipe = spec.recipe
        self.backbone = resident.reset()
        self.head = build_head(seed=spec.cell.seed).to(self.device)
        self.optimiser = adam(list(self.head.parameters()), self.recipe)
        self.history: list[EpochRecord] = []
        folds = data.folds_N
        fold = spec.cell.fold
        self.train = self._samples((folds != HOLDOUT) & (folds != fold))
        self.validation = self._samples(folds == fold)
        self.holdout = self._samples(folds == HOLDOUT)
        self.targets_N1 = torch.from_numpy(data.labels_N.astype(np.float32))[:, None]
        self._check()

    def _samples(self, chosen_N: np.ndarray) -> Samples:
        return select_samples(self.data, np.flatnonzero(chosen_N), self.spec.cell.num_slices)

    def _check(self) -> None:
        for name, samples in (("training", self.train), ("evaluated", self.validation)):
            found = sorted({float(label) for label in self.data.labels_N[samples.study_M]})
            if found != [0.0, 1.0]:
                msg = f"{self.spec.cell.name}: the {name} studies must have labels 0 and 1, found {found}; split again"
                raise TrialError(msg)
        if self.recipe.feature_cache and self.data.features_NKF is None:
            msg = f"{self.spec.cell.name}: the recipe uses the feature cache, but no features were given"
            raise TrialError(msg)

    def images(self, batch: Samples) -> Tensor:
        """Standardised images of some slices, on the device."""
        pixels = torch.from_numpy(self.data.crops_NKHW[self.data.crop_row_N[batch.study_M], batch.offset_M])
        return standardise(pixels.to(self.device))

    def frozen_logits(self, batch: Samples) -> Tensor:
        """Logits of the last layer on constant features (or on the live frozen backbone)."""
        if self.recipe.feature_cache:
            assert self.data.features_NKF is not None
            features = self.data.features_NKF[torch.from_numpy(batch.study_M), torch.from_numpy(batch.offset_M)]
            return self._score(features.to(self.device))
        with torch.no_grad():
            features = self.backbone(self.images(batch))
        return self._score(features)

    def unfrozen_logits(self, batch: Samples) -> Tensor:
        """Logits of the whole network, in the recipe's autocast type."""
        half = self.recipe.unfrozen_dtype == "bfloat16"
        with torch.autocast(self.device.split(":")[0], dtype=torch.bfloat16, enabled=half):
            return self._score(self.backbone(self.images(batch)))

    def _score(self, features_BF: Tensor) -> Tensor:
        logits_BP: Tensor = self.head(features_BF)
        return logits_BP

    def logits(self, samples: Samples) -> np.ndarray:
        """Score slices with the network as it stands; (M,) float64."""
        score = self.unfrozen_logits if self.unfrozen else self.frozen_logits
        modes = [(module, module.training) for module in self.backbone.modules()]
        self.backbone.eval()
        with torch.no_grad():
            parts = [
                score(Samples(*(part[start : start + EVALUATION_BATCH] for part in samples))).float().cpu()
                for start in range(0, samples.size, EVALUATION_BATCH)
            ]
        for module, mode in modes:
            module.training = mode
        return torch.cat(parts)[:, 0].double().numpy() if parts else np.empty(0)

    @property
    def unfrozen(self) -> bool:
        """Whether all weights train."""
        return any(parameter.requires_grad for parameter in self.backbone.parameters())

    def unfreeze(self) -> None:
        """Let all weights train; the last layer's Adam moments are kept or reset as the recipe says."""
        moments = {parameter: dict(state) for parameter, state in self.optimiser.state.items()}
        self.backbone.requires_grad_(True)
        self.optimiser = adam([*self.backbone.parameters(), *self.head.parameters()], self.recipe)
        if self.recipe.adam_at_unfreeze == "keep":
            self.optimiser.state.update(moments)

    def epochs(self, checkpoint: Path) -> Iterator[EpochRecord]:
        """Train to the end, resuming from `checkpoint` when there is one."""
        self._resume(checkpoint)
        yield from list(self.history)
        last = self.recipe.frozen_epochs + self.recipe.unfrozen_epochs
        for epoch in range(len(self.history) + 1, last + 1):
            frozen = epoch <= self.recipe.frozen_epochs
            if not frozen and not self.unfrozen:
                self.unfreeze()
            self.history.append(self._epoch(epoch, "frozen" if frozen else "unfrozen"))
            if (epoch == self.recipe.frozen_epochs or not frozen) and epoch < last:
                self._save(checkpoint)
            yield self.history[-1]

    def _epoch(self, epoch: int, stage: Literal["frozen", "unfrozen"]) -> EpochRecord:
        rate = learning_rate(self.recipe, epoch)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        set_batchnorm_mode(
            self.backbone, self.recipe.frozen_batchnorm if stage == "frozen" else self.recipe.unfrozen_batchnorm
        )
        train_loss = train_epoch(
            self.frozen_logits if stage == "frozen" else self.unfrozen_logits,
            self.optimiser,
            self.train,
            targets_NP=self.targets_N1,
            order=batch_order(seed=self.spec.cell.seed, epoch=epoch, size=self.train.size),
            batch_size=self.recipe.batch_size,
        )
        logits_M = self.logits(self.validation)
        if not np.isfinite([train_loss, *logits_M]).all():
            msg = f"{self.spec.cell.name}: the loss is not finite at epoch {epoch}; lower recipe.learning_rate"
            raise TrialError(msg)
        return EpochRecord(epoch, stage, rate, train_loss, *self._judge(logits_M))

    def _judge(self, logits_M: np.ndarray) -> tuple[float, float]:
        """Loss over slices and ROC-AUC over studies of the evaluated fold."""
        targets_M = self.targets_N1[torch.from_numpy(self.validation.study_M), 0].double()
        loss = binary_cross_entropy_with_logits(torch.from_numpy(logits_M), targets_M).item()
        rows, scores = study_scores(self.validation.study_M, logits_M, rule=self.recipe.study_rule)
        return loss, roc_auc(self.data.labels_N[rows], scores)

    def _save(self, checkpoint: Path) -> None:
        buffer = io.BytesIO()
        state: dict[str, Any] = {
            "head": self.head.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "history": [asdict(record) for record in self.history],
        }
        if self.unfrozen or self.recipe.frozen_batchnorm == "train":
            state["backbone"] = self.backbone.state_dict()
        torch.save(state, buffer)
        write_atomic(checkpoint, buffer.getvalue())
        commit_point("trial:checkpoint")

    def _resume(self, checkpoint: Path) -> None:
        if not checkpoint.is_file():
            return
        state = torch.load(checkpoint, map_location=self.device, weights_only=True)
        self.history = [EpochRecord(**record) for record in state["history"]]
        if self.history[-1].stage == "unfrozen":
            self.unfreeze()
        if "backbone" in state:
            self.backbone.load_state_dict(state["backbone"])
        self.head.load_state_dict(state["head"])
        self.optimiser.load_state_dict(state["optimiser"])
