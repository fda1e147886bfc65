"""The 150 last layers one by one, as trials train them, against 50 at once by batched matrix products.

Both start from the same weights and take the same batches in the same order; both score the evaluated fold after every
epoch. The batched form has the gradient in closed form, an Adam of its own that counts the steps of every head, and a
mask where a batch is shorter. Rule: batching is worth its code only if a study is at least twice as fast by it, end to
end; the study that gains most by it trains nothing but heads, after the extraction.
"""

from __future__ import annotations

import time
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from benchmarks.arithmetic import oulu_sizes
from benchmarks.study_cost import head_data
from benchmarks.synthetic import make_specs
from benchmarks.timing import fastest_type, gemm, interleave, spread
from lbp_ray.metrics import roc_auc, study_scores
from lbp_ray.nets.resnet import build_head
from lbp_ray.plan.counts import count
from lbp_ray.plan.flops import image_cost
from lbp_ray.resident import Resident
from lbp_ray.samples import Samples, batch_order, select_samples
from lbp_ray.splits import HOLDOUT
from lbp_ray.steps import learning_rate
from lbp_ray.study import Recipe
from lbp_ray.training import Training, sigmoid

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lbp_ray.cell import TrialData, TrialSpec
    from lbp_ray.plan.sizes import StudySizes

EPOCHS = 4
"""Epochs of a round; the study has 40, and every epoch costs the same."""

WORTH = 2.0
"""What batching must gain, end to end."""

PLACES = {"": "cpu", " on the GPU": "cuda"}
"""Where heads train, as the end of a case's name: a GPU's are compared with each other, never with a CPU's."""

GPU_GEMM_SIZE = 8192

BETAS, EPSILON = (0.9, 0.999), 1e-8
"""torch.optim.Adam's own."""


def measure(*, quick: bool = False) -> Iterator[dict[str, object]]:
    """Yield the ratio, the difference of the weights, and what the frozen epochs are of a whole study."""
    torch.set_num_threads(1)
    study = oulu_sizes()
    sizes = study.model_copy(update={"studies": 60, "seeds": 1}) if quick else study
    data = head_data(sizes)
    recipe = Recipe(weights="random", frozen_epochs=1 if quick else EPOCHS, unfrozen_epochs=0)
    specs = make_specs(recipe, folds=sizes.folds, seeds=range(sizes.seeds), slice_counts=sizes.slice_counts)
    weights: dict[str, Tensor] = {}

    def keep(name: str, train: Callable[[TrialData, Sequence[TrialSpec]], Tensor]) -> None:
        weights[name] = train(data, specs)

    on_gpu = torch.cuda.is_available()
    cases: dict[str, Callable[[], object]] = {}
    for where, device in PLACES.items() if on_gpu else [("", "cpu")]:
        for name, train in (("one by one", train_one_by_one), ("batched", train_batched)):
            cases[name + where] = partial(keep, name + where, partial(train, device=device))
    gemm_gflop = _add_gemms(cases, "cuda" if on_gpu else "cpu")
    seconds = interleave(cases, clock=time.perf_counter if on_gpu else time.process_time)
    conditions = (
        f"{len(specs)} heads on {len(data.study_ids)} x 5 x 2,048 features, {recipe.frozen_epochs} epoch(s), batch 32, "
        "own order per head, fold scored every epoch, float32, 1 thread"
    )
    for where in PLACES:
        alone, batched = f"one by one{where}", f"batched{where}"
        if batched not in cases:
            continue
        yield {
            "figure": f"heads: {alone} / {batched}",
            **spread(seconds[alone] / seconds[batched]),
            "largest_weight_difference": float((weights[alone] - weights[batched]).abs().max()),
            "largest_weight_change": float((weights[alone] - _start(specs)).abs().max()),
            "conditions": conditions,
        }
    yield from _shares(seconds, study, study.frozen_epochs / recipe.frozen_epochs, gemm_gflop, conditions)


def _add_gemms(cases: dict[str, Callable[[], object]], device: str) -> float:
    """Add the matrix products behind a device's peaks and return their GFLOP."""
    size = {"size": GPU_GEMM_SIZE} if device == "cuda" else {}
    for name, dtype in (("fastest gemm", fastest_type(device)), ("float32 gemm", torch.float32)):
        product, gflop = gemm(dtype, device=device, **size)
        cases[name] = (lambda product=product: (product(), torch.cuda.synchronize())) if size else product
    return gflop


def _shares(
    seconds: dict[str, np.ndarray], study: StudySizes, rounds: float, gemm_gflop: float, conditions: str
) -> Iterator[dict[str, object]]:
    """Yield what batching would gain a study of heads alone, and what share heads have of a whole study.

    Both are of the GPU where there is one.
    """
    where = max(place for place in PLACES if f"batched{place}" in seconds)
    middle = {name: float(np.median(values)) for name, values in seconds.items()}
    heads_s, batched_s = middle[f"one by one{where}"] * rounds, middle[f"batched{where}"] * rounds
    flop = image_cost(study.height_px, study.width_px).forward * count(study).distinct_slices
    extraction_s = flop / 1e9 / (gemm_gflop / middle["float32 gemm"])
    ratio = (extraction_s + heads_s) / (extraction_s + batched_s)
    yield {
        "figure": f"study of frozen epochs alone, extraction at the gemm peak{where}: heads one by one / batched "
        "(upper limit)",
        "ratio": round(ratio, 3),
        "worth_it_from": WORTH,
        "conclusion": "batched" if ratio >= WORTH else "keep the simple loop",
        "arithmetic": f"({extraction_s:.4g} s + {heads_s:.4g} s) / ({extraction_s:.4g} s + {batched_s:.4g} s)",
        "conditions": conditions,
    }
    flop = count(study).cached_flop
    least_s = flop / 1e9 / (gemm_gflop / middle["fastest gemm"])
    yield {
        "figure": f"heads one by one{where}, as a share of the study's seconds there (upper limit)",
        "ratio": float(f"{heads_s / least_s:.3g}"),
        "heads_s": round(heads_s, 1),
        "arithmetic": f"{heads_s:.3g} s / {flop / 1e15:.2f} PFLOP at the fastest gemm peak there "
        f"= {least_s:.4g} s, less than any study takes",
        "conditions": conditions,
    }


def _start(specs: Sequence[TrialSpec]) -> Tensor:
    return torch.cat([build_head(seed=spec.cell.seed).weight.detach() for spec in specs])


def train_one_by_one(data: TrialData, specs: Sequence[TrialSpec], *, device: str = "cpu") -> Tensor:
    """Train as trials do; (heads, features) weights on the CPU."""
    weights = []
    resident = Resident(nn.Identity(), device=device)
    for spec in specs:
        training = Training(spec, data, resident)
        list(training.epochs(Path("no-checkpoint")))
        weights.append(next(training.head.parameters()).detach())
    return torch.cat(weights).cpu()


def train_batched(data: TrialData, specs: Sequence[TrialSpec], *, device: str = "cpu") -> Tensor:
    """Train all heads of a slice count at once; (heads, features) weights on the CPU."""
    groups = [Group(data, list(group), device) for _, group in groupby(specs, key=lambda spec: spec.cell.num_slices)]
    return torch.cat([group.train() for group in groups]).cpu()


class Group:
    """Heads of one slice count that train together.

    Shape suffixes: G heads of the group, B batch, F features, S slices of the table.
    """

    def __init__(self, data: TrialData, specs: list[TrialSpec], device: str) -> None:
        self.data, self.specs, self.recipe = data, specs, specs[0].recipe
        assert data.features_NKF is not None
        self.num_offsets = data.features_NKF.shape[1]
        self.features_SF = data.features_NKF.flatten(0, 1).to(device)
        self.labels_S = torch.from_numpy(np.repeat(data.labels_N, self.num_offsets)).to(device)
        heads = [build_head(seed=spec.cell.seed) for spec in specs]
        weights = torch.stack([head.weight.detach()[0] for head in heads])
        bias = torch.stack([head.bias.detach() for head in heads])
        self.state_GF = torch.cat([weights, bias], dim=1).to(device)
        """Weights, then the bias."""
        self.first_GF, self.second_GF = torch.zeros_like(self.state_GF), torch.zeros_like(self.state_GF)
        self.steps_G1 = torch.zeros(len(specs), 1, device=device)
        self.device = device

    def train(self) -> Tensor:
        """Run all epochs; (G, F) weights."""
        folds_N = self.data.folds_N
        inside = [self._slices((folds_N != HOLDOUT) & (folds_N != spec.cell.fold), spec) for spec in self.specs]
        fold = [self._slices(folds_N == spec.cell.fold, spec) for spec in self.specs]
        for epoch in range(1, self.recipe.frozen_epochs + 1):
            rate = learning_rate(self.recipe, epoch)
            batches_GM = self._batches([self._rows(samples) for samples in inside], epoch)
            for start in range(0, batches_GM.shape[1], self.recipe.batch_size):
                self._step(batches_GM[:, start : start + self.recipe.batch_size], rate)
            self._score(fold)
        return self.state_GF[:, :-1]

    def _slices(self, chosen_N: np.ndarray, spec: TrialSpec) -> Samples:
        return select_samples(self.data, np.flatnonzero(chosen_N), spec.cell.num_slices)

    def _rows(self, samples: Samples) -> np.ndarray:
        return samples.study_M * self.num_offsets + samples.offset_M

    def _batches(self, rows: list[np.ndarray], epoch: int) -> Tensor:
        """Rows of the table in each head's own order; -1 fills the shorter ones."""
        filled = np.full((len(rows), max(map(len, rows))), -1)
        for head, (own, spec) in enumerate(zip(rows, self.specs, strict=True)):
            filled[head, : len(own)] = own[batch_order(seed=spec.cell.seed, epoch=epoch, size=len(own))]
        return torch.from_numpy(filled).to(self.device)

    def _step(self, rows_GB: Tensor, rate: float) -> None:
        known_GB = rows_GB >= 0
        size_G1 = known_GB.sum(1, keepdim=True)
        features_GBF = self.features_SF[rows_GB.clamp(min=0)]
        logits_GB = torch.baddbmm(self.state_GF[:, -1:, None], features_GBF, self.state_GF[:, :-1, None])[..., 0]
        errors_GB = (torch.sigmoid(logits_GB) - self.labels_S[rows_GB.clamp(min=0)]) / size_G1.clamp(min=1)
        errors_GB = torch.where(known_GB, errors_GB, 0.0)
        weights_GF = torch.bmm(errors_GB[:, None], features_GBF)[:, 0]
        gradient_GF = torch.cat([weights_GF, errors_GB.sum(1, keepdim=True)], dim=1)
        self._adam(gradient_GF.add_(self.state_GF, alpha=self.recipe.weight_decay), size_G1 > 0, rate)

    def _adam(self, gradient_GF: Tensor, active_G1: Tensor, rate: float) -> None:
        """Step the heads that still have a batch; the others keep moments, steps and weights."""
        everyone = bool(active_G1.all())
        before = None if everyone else [part.clone() for part in (self.first_GF, self.second_GF, self.state_GF)]
        self.steps_G1 += active_G1
        steps_G1 = self.steps_G1.clamp(min=1)
        self.first_GF.lerp_(gradient_GF, 1 - BETAS[0])
        self.second_GF.mul_(BETAS[1]).addcmul_(gradient_GF, gradient_GF, value=1 - BETAS[1])
        spread_GF = (self.second_GF / (1 - BETAS[1] ** steps_G1)).sqrt_().add_(EPSILON)
        self.state_GF.sub_(rate / (1 - BETAS[0] ** steps_G1) * self.first_GF / spread_GF)
        if before is not None:
            for part, old in zip((self.first_GF, self.second_GF, self.state_GF), before, strict=True):
                torch.where(active_G1, part, old, out=part)

    def _score(self, folds: list[Samples]) -> list[tuple[float, float]]:
        """Loss and study-level area of every head on its fold, as a trial's learning curve has them."""
        curve = []
        for head, samples in enumerate(folds):
            features = self.features_SF[torch.from_numpy(self._rows(samples)).to(self.device)]
            logits = (features @ self.state_GF[head, :-1] + self.state_GF[head, -1]).cpu().double()
            labels = torch.from_numpy(self.data.labels_N[samples.study_M]).double()
            loss = binary_cross_entropy_with_logits(logits, labels).item()
            rows, scores = study_scores(samples.study_M, sigmoid(logits.numpy()), rule=self.recipe.study_rule, k=1)
            curve.append((loss, roc_auc(self.data.labels_N[rows], scores)))
        return curve
