"""The training loop of one trial: frozen epochs on constant features, then epochs of all weights.

Which epoch's network scores is decided by `lbp_ray.selection`.

Shape suffixes: N studies, K slice offsets, H rows, W columns, F features, M samples (slices), B batch, P outputs.
"""

from __future__ import annotations

import copy
import io
from contextlib import contextmanager, nullcontext
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from lbp_ray.cell import TrialError
from lbp_ray.gpu import CropsOnGpu, RecordedStep
from lbp_ray.metrics import roc_auc, study_scores
from lbp_ray.nets.folding import computed_once
from lbp_ray.nets.resnet import build_head, build_two_logit_head, set_batchnorm_mode, standardise
from lbp_ray.nets.syncnorm import synchronise_batchnorm
from lbp_ray.samples import Samples, SamplesOnGpu, epoch_order, select_samples, some
from lbp_ray.segment.loop import rank_and_world
from lbp_ray.selection import EpochRecord, Stage, chosen_epochs, draw_inner, epochs_to_keep, has_stalled, mcc_at_youden
from lbp_ray.sharing import averaging, from_first, joined, part_of
from lbp_ray.splits import HOLDOUT
from lbp_ray.steps import adam, learning_rate, take_steps, training_step
from preprocess.commit import commit_point, write_atomic

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lbp_ray.cell import TrialData, TrialSpec
    from lbp_ray.nets.weights import StateDict
    from lbp_ray.resident import Resident

EVALUATION_BATCH = 32
"""Images per forward pass when a trained network is scored."""


def sigmoid(logits_M: np.ndarray) -> np.ndarray:
    """Turn logits into probabilities; beyond what a float holds they are exactly 0 or 1."""
    with np.errstate(over="ignore"):
        return np.asarray(1.0 / (1.0 + np.exp(-logits_M)))


class Training:
    """State of one trial while it trains; `epochs` yields a record after each epoch."""

    def __init__(self, spec: TrialSpec, data: TrialData, resident: Resident) -> None:
        self.spec, self.data, self.device = spec, data, resident.device
        self.recipe = spec.recipe
        self.resident = resident
        self.backbone = resident.reset()
        build = build_head if self.recipe.head == "one_logit" else build_two_logit_head
        self.head: nn.Module = build(seed=spec.cell.seed).to(self.device)
        self.optimiser = adam(list(self.head.parameters()), self.recipe)
        self.rank, self.world = rank_and_world()
        self._features = resident.features(data)
        self._averaging: nn.Module | None = None
        """The whole network while several workers train it."""
        most = self.recipe.images_per_pass
        self._images_per_pass = None if most == "auto" else most
        self.seconds = dict.fromkeys(("frozen", "unfrozen", "evaluation"), 0.0)
        """Wall time of the frozen epochs, of training all weights, and of scoring by trained networks."""
        self._steps: dict[tuple[Stage, float], RecordedStep] = {}
        """Of each stage and learning rate, on a GPU."""
        self.history: list[EpochRecord] = []
        self._last_logits_M: np.ndarray | None = None
        self.snapshots: dict[int, dict[str, StateDict]] = {}
        """States of the epochs that may still be chosen."""
        folds, fold = data.folds_N, spec.cell.fold
        inside = (folds != HOLDOUT) & (folds != fold)
        inner = self._inner(inside) if self.recipe.selection == "inner_validation" else np.zeros_like(inside)
        self.train = self._samples(inside & ~inner)
        self.validation = self._samples(folds == fold)
        self.holdout = self._samples(folds == HOLDOUT)
        self.selecting = {
            "fixed_epochs": None,
            "inner_validation": self._samples(inner),
            "same_fold": self.validation,
        }[self.recipe.selection]
        self.targets_N1 = torch.from_numpy(data.labels_N.astype(np.float32))[:, None]
        self._targets_N1 = self.targets_N1.to(self.device)
        self._check()

    def _samples(self, chosen_N: np.ndarray) -> Samples:
        return select_samples(self.data, np.flatnonzero(chosen_N), self.spec.cell.num_slices)

    def _inner(self, inside_N: np.ndarray) -> np.ndarray:
        """Draw training patients that training does not see; they choose its epoch."""
        rows = np.flatnonzero(inside_N)
        drawn = draw_inner(
            np.array(self.data.patient_ids)[rows],
            self.data.labels_N[rows],
            fraction=self.recipe.inner_fraction,
            seed=(self.spec.cell.seed, self.spec.cell.fold),
        )
        chosen_N = np.zeros_like(inside_N)
        chosen_N[rows[drawn]] = True
        return chosen_N

    def _check(self) -> None:
        parts = {"training": self.train, "evaluated": self.validation}
        if self.selecting is not None:
            parts["inner validation" if self.recipe.selection == "inner_validation" else "selecting"] = self.selecting
        for name, samples in parts.items():
            found = sorted({float(label) for label in self.data.labels_N[samples.study_M]})
            if found != [0.0, 1.0]:
                msg = f"{self.spec.cell.name}: the {name} studies must have labels 0 and 1, found {found}; split again"
                raise TrialError(msg)
        if self.recipe.feature_cache and self.data.features_NKF is None:
            msg = f"{self.spec.cell.name}: the recipe uses the feature cache, but no features were given"
            raise TrialError(msg)

    def images(self, batch: Samples | SamplesOnGpu) -> Tensor:
        """Standardised images of some slices, on the device."""
        if isinstance(batch, SamplesOnGpu):
            crops = self.resident.crops(self.data)
            assert crops is not None
            return crops.images(batch.study_M, batch.offset_M)
        pixels = torch.from_numpy(self.data.crops_NKHW[self.data.crop_row_N[batch.study_M], batch.offset_M])
        if self.resident.on_gpu:
            pixels = pixels.pin_memory()
        return standardise(pixels.to(self.device, non_blocking=True))

    def frozen_logits(self, batch: Samples | SamplesOnGpu) -> Tensor:
        """Logits of the last layer on constant features (or on the live frozen backbone)."""
        if self.recipe.feature_cache:
            assert self._features is not None
            features = self._features[torch.as_tensor(batch.study_M), torch.as_tensor(batch.offset_M)]
            return self._score(features.to(self.device))
        with torch.no_grad():
            features = self.backbone(self.images(batch))
        return self._score(features)

    def unfrozen_logits(self, batch: Samples | SamplesOnGpu) -> Tensor:
        """Logits of the whole network, in the recipe's autocast type; each worker computes its part of the batch."""
        half = self.recipe.unfrozen_dtype == "bfloat16"
        images = self.images(some(batch, part_of(batch.size)))
        with torch.autocast(self.device.split(":")[0], dtype=torch.bfloat16, enabled=half):
            if self._averaging is not None and torch.is_grad_enabled():
                logits_BP = self._averaging(images)
            else:
                logits_BP = self._score(self._network(images))
        return joined(logits_BP, batch.size)

    def _where_data_are(self, samples: Samples, stage: Stage) -> Samples | SamplesOnGpu:
        """Send the samples to the GPU that holds what the stage reads."""
        cached = stage == "frozen" and self.recipe.feature_cache
        held = self._features if cached else self.resident.crops(self.data)
        if not self.resident.on_gpu or not isinstance(held, Tensor | CropsOnGpu):
            return samples
        return SamplesOnGpu(*(torch.from_numpy(part).to(self.device) for part in samples))

    def _score(self, features_BF: Tensor) -> Tensor:
        logits_BP: Tensor = self.head(features_BF)
        return logits_BP

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        begun = perf_counter()
        yield
        self.seconds[what] += perf_counter() - begun

    def logits(self, samples: Samples) -> np.ndarray:
        """Score slices with the network as it stands; (M,) float64."""
        with self._timed("evaluation" if self.unfrozen else "frozen"):
            return self._logits(samples)

    def _logits(self, samples: Samples) -> np.ndarray:
        score = self.unfrozen_logits if self.unfrozen else self.frozen_logits
        modes = [(module, module.training) for module in self.backbone.modules()]
        self.backbone.eval()
        placed = self._where_data_are(samples, "unfrozen" if self.unfrozen else "frozen")
        logits_M = torch.empty(samples.size, device=self.device)  # a list of small results would scatter the heap
        with torch.no_grad(), computed_once(self._network) if self.unfrozen else nullcontext():
            for start in range(0, samples.size, self._scored_at_once):
                part = slice(start, start + self._scored_at_once)
                logits_M[part] = score(some(placed, part))[:, 0]
        for module, mode in modes:
            module.training = mode
        return logits_M.double().cpu().numpy()

    @property
    def _scored_at_once(self) -> int:
        most = self._images_per_pass if self.unfrozen else None
        return min(EVALUATION_BATCH, most or EVALUATION_BATCH)

    @property
    def unfrozen(self) -> bool:
        """Whether all weights train."""
        return any(parameter.requires_grad for parameter in self.backbone.parameters())

    @property
    def _network(self) -> nn.Module:
        """The backbone as the unfrozen epochs run it."""
        return self.resident.carrying if self.recipe.carries_norms else self.backbone

    def unfreeze(self) -> None:
        """Let all weights train; the last layer's Adam moments are kept or reset as the recipe says."""
        moments = {parameter: dict(state) for parameter, state in self.optimiser.state.items()}
        if self.world > 1 and self.recipe.unfrozen_batchnorm == "train":
            # A copy: the process's own network keeps its layers.
            self.backbone = synchronise_batchnorm(copy.deepcopy(self.backbone), self.device.split(":")[0])
        self.backbone.requires_grad_(True)
        self._averaging = averaging(nn.Sequential(self._network, self.head)) if self.world > 1 else None
        self._steps.clear()
        self.optimiser = adam([*self.backbone.parameters(), *self.head.parameters()], self.recipe)
        if self.recipe.adam_at_unfreeze == "keep":
            self.optimiser.state.update(moments)

    def epochs(self, checkpoint: Path) -> Iterator[EpochRecord]:
        """Train to the end, resuming from `checkpoint` when there is one."""
        try:
            yield from self._epochs(checkpoint)
        finally:
            self._steps.clear()  # recorded steps hold this object and much of a GPU's memory

    def _epochs(self, checkpoint: Path) -> Iterator[EpochRecord]:
        self._resume(checkpoint)
        yield from list(self.history)
        last = self.recipe.frozen_epochs + self.recipe.unfrozen_epochs
        for epoch in range(len(self.history) + 1, last + 1):
            if has_stalled(self.history, self.recipe.stop_patience):
                return
            frozen = epoch <= self.recipe.frozen_epochs
            if not frozen and not self.unfrozen:
                self.unfreeze()
            self.history.append(self._epoch(epoch, "frozen" if frozen else "unfrozen"))
            self._keep_snapshots()
            if (epoch == self.recipe.frozen_epochs or not frozen) and epoch < last:
                self._save(checkpoint)
                if frozen and self.world > 1:
                    self._load(from_first(self._packed()))  # each trained the last layer by itself so far
            yield self.history[-1]

    def _epoch(self, epoch: int, stage: Stage) -> EpochRecord:
        rate = learning_rate(self.recipe, epoch)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        set_batchnorm_mode(
            self.backbone, self.recipe.frozen_batchnorm if stage == "frozen" else self.recipe.unfrozen_batchnorm
        )
        with self._timed(stage):
            train_loss = self._train(epoch, stage, rate)
        logits_M = self._last_logits_M = self.logits(self.validation)
        if not np.isfinite([train_loss, *logits_M]).all():
            msg = f"{self.spec.cell.name}: the loss is not finite at epoch {epoch}; lower recipe.learning_rate"
            raise TrialError(msg)
        loss, labels, scores = self._judge(self.validation, logits_M)
        record = EpochRecord(epoch, stage, rate, train_loss, loss, roc_auc(labels, scores))
        if self.selecting is None:
            return record
        if self.selecting is not self.validation:
            loss, labels, scores = self._judge(self.selecting, self.logits(self.selecting))
        return record._replace(selection_loss=loss, selection_mcc=mcc_at_youden(labels, scores))

    def _train(self, epoch: int, stage: Stage, rate: float) -> float:
        """Train for one epoch and return its mean loss."""
        score = self.frozen_logits if stage == "frozen" else self.unfrozen_logits
        most = self._images_per_pass if stage == "unfrozen" else None
        step = training_step(score, self.optimiser, self._targets_N1, images_per_pass=most, network=self._network)
        row_M = self.data.crop_row_N[self.train.study_M]
        order = epoch_order(self.recipe, row_M, seed=self.spec.cell.seed, epoch=epoch)
        samples = self._where_data_are(self.train, stage)
        size = self.recipe.batch_size
        if isinstance(samples, Samples):
            return take_steps(step, samples, order=order, batch_size=size)
        if self.world == 1:
            step = self._steps.setdefault((stage, rate), RecordedStep(step, self.optimiser, batch_size=size))
        placed = torch.from_numpy(order[: samples.size]).to(self.device)
        return take_steps(step, samples, order=placed, batch_size=size)

    def rehearse(self, steps: int) -> None:
        """Take some steps of the present stage and score a few slices, so that they can be measured; then discard.

        A last smaller batch is among them: it runs beside the memory of a recorded one.
        """
        stage: Stage = "unfrozen" if self.unfrozen else "frozen"
        self.train = some(self.train, slice((steps + 1) * self.recipe.batch_size - 1))
        self._train(1, stage, self.recipe.learning_rate)
        self.logits(some(self.validation, slice(EVALUATION_BATCH)))

    def _judge(self, samples: Samples, logits_M: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """Loss over slices; labels and scores of their studies."""
        targets_M = self.targets_N1[torch.from_numpy(samples.study_M), 0].double()
        loss = binary_cross_entropy_with_logits(torch.from_numpy(logits_M), targets_M).item()
        rule, k = self.recipe.study_rule, self.recipe.study_rule_k
        rows, scores = study_scores(samples.study_M, sigmoid(logits_M), rule=rule, k=k)
        return loss, self.data.labels_N[rows], scores

    @property
    def scoring_epochs(self) -> list[int]:
        """Epochs whose networks score, the best first."""
        return chosen_epochs(self.history, self.recipe)

    def probabilities(self, samples: Samples) -> np.ndarray:
        """Score slices with the networks of the chosen epochs, averaged; (M,) float64.

        Raises
        ------
        TrialError
            If a score is not finite.
        """
        parts = []
        for epoch in reversed(self.scoring_epochs):  # the best last: its network is the one that stays loaded
            self._restore(epoch)
            logits_M = self._known(epoch, samples)
            if logits_M is None:
                logits_M = self.logits(samples)
            if not np.isfinite(logits_M).all():
                msg = f"{self.spec.cell.name}: {int((~np.isfinite(logits_M)).sum())} score(s) are not finite"
                raise TrialError(msg)
            parts.append(sigmoid(logits_M))
        return np.asarray(np.mean(parts, axis=0))

    def _known(self, epoch: int, samples: Samples) -> np.ndarray | None:
        """Scores of the evaluated fold by the last epoch's network, which its learning curve asked for already."""
        last = epoch == self.history[-1].epoch and samples is self.validation
        return self._last_logits_M if last else None

    def _keep_snapshots(self) -> None:
        if self.recipe.selection == "fixed_epochs":
            return
        kept = epochs_to_keep(self.history, self.recipe)
        self.snapshots = {epoch: state for epoch, state in self.snapshots.items() if epoch in kept}
        if self.history[-1].epoch in kept:
            self.snapshots[self.history[-1].epoch] = {
                part: {name: value.detach().cpu().clone() for name, value in state.items()}
                for part, state in self._state().items()
            }

    def _state(self) -> dict[str, StateDict]:
        """Weights that differ from the start."""
        state: dict[str, StateDict] = {"head": self.head.state_dict()}
        if self.unfrozen or self.recipe.frozen_batchnorm == "train":
            state["backbone"] = self.backbone.state_dict()
        return state

    def _restore(self, epoch: int) -> None:
        """Load the network of an epoch; the last one is loaded as it is unless another was restored."""
        if epoch not in self.snapshots:
            assert epoch == self.history[-1].epoch
            return
        state = self.snapshots[epoch]
        self.head.load_state_dict(state["head"])
        self.backbone = self.resident.reset()
        if "backbone" in state:
            self.backbone.load_state_dict(state["backbone"])
        self.backbone.requires_grad_(self.history[epoch - 1].stage == "unfrozen")

    def _packed(self) -> bytes:
        buffer = io.BytesIO()
        state: dict[str, Any] = {
            **self._state(),
            "optimiser": self.optimiser.state_dict(),
            "history": [record._asdict() for record in self.history],
            "snapshots": self.snapshots,
            "seconds": self.seconds,
        }
        torch.save(state, buffer)
        return buffer.getvalue()

    def _save(self, checkpoint: Path) -> None:
        if self.rank > 0:
            return
        write_atomic(checkpoint, self._packed())
        commit_point("trial:checkpoint")

    def _resume(self, checkpoint: Path) -> None:
        packed = from_first(checkpoint.read_bytes() if self.rank == 0 and checkpoint.is_file() else None)
        if packed is not None:
            self._load(packed)

    def _load(self, packed: bytes) -> None:
        state = torch.load(io.BytesIO(packed), map_location="cpu", weights_only=True)
        self.history = [EpochRecord(**record) for record in state["history"]]
        self.snapshots, self.seconds = state["snapshots"], state["seconds"]
        if self.history[-1].stage == "unfrozen":
            self.unfreeze()
        if "backbone" in state:
            self.backbone.load_state_dict(state["backbone"])
        self.head.load_state_dict(state["head"])
        self.optimiser.load_state_dict(state["optimiser"])
        self._steps.clear()  # the optimiser's state lies elsewhere now
