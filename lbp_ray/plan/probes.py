"""The micro-benchmarks of networks, as one of a trial's workers runs them. Random weights and pixels: speed only.

Every probe is warmed up, then run `ROUNDS` times; a barrier starts each round in all workers at once, so that they
share caches, memory bandwidth and clock as the trials of a study do.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from lbp_ray.cell import Cell, TrialData, TrialSpec
from lbp_ray.features import batch_size
from lbp_ray.nets.folding import carry_norms, fold
from lbp_ray.nets.resnet import NUM_FEATURES, build_backbone, build_head, standardise
from lbp_ray.nets.weights import load_backbone_weights
from lbp_ray.permutation import permutation_null
from lbp_ray.resident import Resident
from lbp_ray.steps import adam, learning_rate
from lbp_ray.study import Recipe
from lbp_ray.training import Training

if TYPE_CHECKING:
    from collections.abc import Callable

ROUNDS = 3
"""Measured rounds of every probe."""

ROUND_S = 1.5
"""Seconds that a round of images may take: its batch is as large as that allows."""

BARRIER_S = 300.0
"""Seconds that a worker waits for the others."""

HEAD_STUDIES, HEAD_FOLDS, HEAD_EPOCHS = 160, 10, 4
"""Study that the heads are measured on: folds as in the thesis, so that scoring has its share."""

GEMM = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of the matrices behind the peaks."""


@dataclass(frozen=True)
class Request:
    """What a worker is asked to measure."""

    height_px: int
    width_px: int
    batch_size: int
    images_per_pass: int
    carries_norms: bool
    dtype: Literal["float32", "bfloat16"]
    threads: int
    permutations: int
    device: Literal["cpu", "cuda"]


class Measured(NamedTuple):
    """One worker's answer to one probe."""

    seconds: list[float]
    """Per unit, one for each round."""
    images: int
    """Images of the measured batch; 0 where there were none."""


class Bench:
    """One worker: the networks it holds and what it measures on them."""

    def __init__(self, request: Request, barrier: Any = None) -> None:  # noqa: ANN401  (threading's or multiprocessing's)
        self.request, self.device = request, request.device
        self.barrier = barrier or threading.Barrier(1)
        torch.set_num_threads(request.threads)
        if self.device == "cuda":
            torch.backends.cudnn.allow_tf32 = False  # both as `lbp_ray.resident.Resident` has them
            torch.backends.cudnn.deterministic = True
        self.backbone = build_backbone(load_backbone_weights("random")).to(self.device)
        self.whole = carry_norms(self.backbone) if request.carries_norms else self.backbone
        self.head = build_head(seed=0).to(self.device)
        self.worker_bytes = own_bytes()

    def run(self, name: str) -> Measured:
        """Run one probe of `PROBES`."""
        measured = PROBES[name](self)
        if self.device == "cuda":
            torch.cuda.empty_cache()
        return measured

    def _rounds(self, work: Callable[[], object], *, units: int) -> list[float]:
        seconds = []
        for _ in range(ROUNDS):
            self.barrier.wait(BARRIER_S)
            seconds.append(self._timed(work) / units)
        return seconds

    def _timed(self, work: Callable[[], object]) -> float:
        self._settle()
        begun = time.perf_counter()
        work()
        self._settle()
        return time.perf_counter() - begun

    def _settle(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _images(self, work: Callable[[torch.Tensor], object], channels: int = 3) -> Measured:
        """Measure a pass over a batch as large as the study's, or as time allows: it is doubled from one image on."""
        request, size = self.request, 1
        batch = request.images_per_pass if channels == 3 else batch_size(self.device)
        pixels = torch.randint(0, 4000, (batch, request.height_px, request.width_px), dtype=torch.int32)
        images = standardise(pixels.to(self.device), channels=channels)
        work(images[:1])
        while size < batch and self._timed(partial(work, images[:size])) < ROUND_S / 2:
            size = min(2 * size, batch)
        work(images[:size])
        return Measured(self._rounds(partial(work, images[:size]), units=size), size)

    def extraction(self) -> Measured:
        """Folded float32 features."""
        folded = fold(self.backbone)

        def work(images: torch.Tensor) -> None:
            with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                folded(images)

        return self._images(work, channels=1)

    def evaluation(self) -> Measured:
        """Scores of the whole network."""

        def work(images: torch.Tensor) -> None:
            with torch.inference_mode(), self._autocast():
                self.head(self.whole(images))

        return self._images(work)

    def training(self) -> Measured:
        """Forward and backward of the whole network."""
        self.backbone.requires_grad_(True)

        def work(images: torch.Tensor) -> None:
            self.backbone.zero_grad(set_to_none=True)
            with self._autocast():
                logits = self.head(self.whole(images))
            targets = torch.zeros_like(logits, dtype=torch.float32)
            binary_cross_entropy_with_logits(logits.float(), targets).backward()  # type: ignore[no-untyped-call]

        measured = self._images(work)
        self.backbone.zero_grad(set_to_none=True)
        return measured

    def optimiser(self) -> Measured:
        """Adam over all weights."""
        parameters = [*self.backbone.parameters(), *self.head.parameters()]
        for parameter in parameters:
            parameter.requires_grad_(True)
            parameter.grad = torch.full_like(parameter, 1e-6)
        step = adam(parameters, Recipe()).step
        step()
        seconds = self._rounds(step, units=1)
        self.backbone.zero_grad(set_to_none=True)
        self.backbone.requires_grad_(False)
        return Measured(seconds, 0)

    def heads(self) -> Measured:
        """Frozen epochs of one trial on cached features, as the project trains them."""
        data, epochs = _study(self.device), 2 + ROUNDS * HEAD_EPOCHS  # at one learning rate, so recorded once on a GPU
        recipe = Recipe(weights="random", frozen_epochs=epochs, unfrozen_epochs=0, batch_size=self.request.batch_size)
        assert learning_rate(recipe, 1) == learning_rate(recipe, epochs)
        cell = Cell(num_slices=1, fold=0, seed=0)
        spec = TrialSpec(cell=cell, recipe=recipe, crops_hash="", split_hash="", weights_hash="")
        resident = Resident(torch.nn.Identity(), device=self.device)

        training = Training(spec, data, resident).epochs(Path("/nowhere/no-checkpoint"))
        for _ in range(2):
            next(training)
        seconds = self._rounds(lambda: list(islice(training, HEAD_EPOCHS)), units=HEAD_EPOCHS * self._steps(1))
        return Measured(seconds, 0)

    def permutation(self) -> Measured:
        """Frozen epochs of all permutations at once."""
        if not self.request.permutations:
            return Measured([0.0] * ROUNDS, 0)
        recipe = Recipe(weights="random", frozen_epochs=1, unfrozen_epochs=0, batch_size=self.request.batch_size)
        data = _study("cpu")

        def work() -> None:
            permutation_null(data, recipe=recipe, num_slices=1, count=self.request.permutations, seed=0, progress=False)

        work()
        return Measured(self._rounds(work, units=HEAD_FOLDS * self._steps(1)), 0)

    def gemm_float32(self) -> Measured:
        """Seconds per operation of a float32 matrix product."""
        return self._gemm(torch.float32)

    def gemm_bfloat16(self) -> Measured:
        """Seconds per operation of a bfloat16 matrix product."""
        return self._gemm(torch.bfloat16)

    def _gemm(self, dtype: torch.dtype) -> Measured:
        size = GEMM[self.device]
        first, second = torch.randn(2, size, size, device=self.device).to(dtype)
        for _ in range(2):
            torch.mm(first, second)
        return Measured(self._rounds(lambda: torch.mm(first, second), units=2 * size**3), 0)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.request.dtype == "bfloat16")

    def _steps(self, epochs: int) -> int:
        trained = HEAD_STUDIES - HEAD_STUDIES // HEAD_FOLDS
        return -(-trained // self.request.batch_size) * epochs


PROBES: dict[str, Callable[[Bench], Measured]] = {
    "extraction": Bench.extraction,
    "evaluation": Bench.evaluation,
    "training": Bench.training,
    "optimiser": Bench.optimiser,
    "heads": Bench.heads,
    "permutation": Bench.permutation,
    "gemm_float32": Bench.gemm_float32,
    "gemm_bfloat16": Bench.gemm_bfloat16,
}
"""Name of each probe and what runs it, in the order in which they run."""


def own_bytes() -> int:
    """Return the memory that this process holds alone, libraries left out: all workers of a node share those."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def _study(device: str) -> TrialData:
    """Draw a study of features alone, whose crops nothing reads."""
    generator = torch.Generator().manual_seed(0)
    numbers = np.arange(HEAD_STUDIES)
    return TrialData(
        crops_NKHW=np.zeros((HEAD_STUDIES, 1, 1, 1), np.uint16),
        crop_row_N=numbers,
        features_NKF=torch.rand(HEAD_STUDIES, 1, NUM_FEATURES, generator=generator).to(device),
        study_ids=tuple(f"s{number}" for number in numbers),
        patient_ids=tuple(f"p{number}" for number in numbers),
        labels_N=(numbers // HEAD_FOLDS % 2).astype(np.float32),
        folds_N=numbers % HEAD_FOLDS,
        slice_index_NK=np.zeros((HEAD_STUDIES, 1), int),
        offset_mm_NK=np.zeros((HEAD_STUDIES, 1)),
    )


_HERE: list[Bench] = []
"""The worker that this process is."""


def begin(request: Request, barrier: Any) -> None:  # noqa: ANN401  (multiprocessing's barrier)
    """Make this process a worker."""
    _HERE.append(Bench(request, barrier))


def started(_number: int) -> tuple[float, int]:
    """Return when this worker was ready, on the clock of all processes, and its memory."""
    ready, bench = time.time(), _HERE[0]
    bench.barrier.wait(BARRIER_S)
    return ready, bench.worker_bytes


def probe(name: str) -> Measured:
    """Run a probe in this worker; all workers must, because they wait for each other."""
    return _HERE[0].run(name)
