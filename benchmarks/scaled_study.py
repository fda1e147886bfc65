"""A small study run whole both ways: 150 trials by the project, and 150 by the loop most people would write.

Crops are a tenth of the study's in each direction, studies few and frozen epochs fewer; everything else is the study's:
10 folds, 5 seeds, 1, 3 and 5 slices, one unfrozen epoch of all weights, batches of 32. The project extracts once and
runs every cell by `lbp_ray.trial.run_trial`, as its workers do, commits included. Both ways take turns, cell by cell,
in two processes of one thread each, and their scores are compared. Start-up and the loading of weights are left out.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from benchmarks.arithmetic import Costs, oulu_sizes
from benchmarks.naive import NaiveLoop
from benchmarks.synthetic import make_specs, make_study
from benchmarks.timing import interleave, spread
from lbp_ray.cell import TrialPlace
from lbp_ray.features import extract
from lbp_ray.nets.resnet import NUM_FEATURES, build_backbone, build_head, standardise
from lbp_ray.nets.weights import load_backbone_weights
from lbp_ray.plan.counts import count
from lbp_ray.resident import Resident
from lbp_ray.study import Recipe
from lbp_ray.trial import run_trial

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lbp_ray.cell import TrialData, TrialSpec
    from lbp_ray.plan.counts import Counts
    from lbp_ray.plan.sizes import StudySizes

PROCESSES = 2


@dataclass(frozen=True)
class Size:
    """Size of the scaled study."""

    studies: int = 24
    crop: tuple[int, int] = (40, 20)
    folds: int = 10
    seeds: int = 5
    slice_counts: tuple[int, ...] = (1, 3, 5)
    frozen_epochs: int = 8

    def as_planned(self) -> StudySizes:
        """Return the sizes that the planner counts."""
        changes = {name: value for name, value in vars(self).items() if name != "crop"}
        return oulu_sizes(**changes, exams=self.studies, height_px=self.crop[0], width_px=self.crop[1])


QUICK = Size(studies=14, folds=2, seeds=1, slice_counts=(1, 3), frozen_epochs=2)


class CellTimes(NamedTuple):
    """CPU seconds of one cell both ways, and how far their scores differ."""

    naive_s: float
    project_s: float
    frozen_difference: float
    """Difference of the evaluated fold's loss after the frozen epochs, relative."""
    logit_difference: float
    """Largest difference of a logit after the last epoch, relative to the largest logit."""


def measure(*, quick: bool = False) -> Iterator[dict[str, object]]:
    """Yield the measured ratio beside the predicted one, the ratio per cell, and the differences of the scores."""
    torch.set_num_threads(1)
    size = QUICK if quick else Size()
    data = make_study(size.studies, size.crop, folds=size.folds, positive_share=0.5)
    backbone = build_backbone(load_backbone_weights("random"))
    begun = time.process_time()
    data = replace(data, features_NKF=torch.from_numpy(extract(backbone, data.crops_NKHW)))
    extraction_s = time.process_time() - begun
    epochs = size.frozen_epochs
    recipe = Recipe(weights="random", frozen_epochs=epochs, learning_rate_drop=epochs, fold_training=False)
    specs = make_specs(recipe, folds=size.folds, seeds=range(size.seeds), slice_counts=size.slice_counts)
    cells = run_both_ways(data, specs, processes=PROCESSES)
    counts = count(size.as_planned())
    costs = _measure_costs(data, counts, recipe.batch_size)
    conditions = (
        f"{size.studies} studies, crops of {size.crop[0]} x {size.crop[1]}, {len(specs)} trials, {size.frozen_epochs} "
        f"frozen epochs and one unfrozen, float32 channels_last, 1 thread, {PROCESSES} processes, CPU time"
    )
    naive_s = sum(cell.naive_s for cell in cells)
    project_s = extraction_s + sum(cell.project_s for cell in cells)
    yield {
        "figure": "scaled study run whole: network in the loop / project",
        "ratio": round(naive_s / project_s, 3),
        "predicted": round(costs.study_s(counts, cached=False) / costs.study_s(counts, cached=True), 3),
        "bound": round(counts.flop_ratio, 3),
        "naive_s": round(naive_s, 1),
        "project_s": round(project_s, 1),
        "naive_predicted": costs.line(counts, cached=False),
        "project_predicted": costs.line(counts, cached=True),
        "conditions": conditions,
    }
    yield {
        "figure": "one trial of the scaled study: network in the loop / project, extraction left out",
        **spread([cell.naive_s / cell.project_s for cell in cells]),
        "conditions": conditions,
    }
    yield {
        "figure": "largest relative difference between both ways' losses after the frozen epochs",
        "ratio": max(cell.frozen_difference for cell in cells),
        "at_most": 1e-5,
        "logit_at_the_end": max(cell.logit_difference for cell in cells),
        "arithmetic": "Adam's first steps have one size whatever the gradient: the unfrozen epoch enlarges rounding",
        "conditions": conditions + ", nothing folded",
    }


def _measure_costs(data: TrialData, counts: Counts, batch: int) -> Costs:
    """Measure what the prediction is made of: an image forward, and with backward, and the steps."""
    pixels = torch.from_numpy(data.crops_NKHW.reshape(-1, *data.crops_NKHW.shape[2:])[:batch])
    frozen = build_backbone(load_backbone_weights("random"))
    network = build_backbone(load_backbone_weights("random")).requires_grad_(True)
    head, features = build_head(seed=0), torch.randn(batch, NUM_FEATURES)
    adam, head_adam = (torch.optim.Adam(of.parameters(), lr=1e-6, fused=True) for of in (network, head))

    def forward() -> None:
        with torch.no_grad():
            frozen(standardise(pixels))

    def training() -> None:
        adam.zero_grad()
        network(standardise(pixels)).sum().backward()

    def head_step() -> None:
        head_adam.zero_grad()
        head(features).sum().backward()
        head_adam.step()

    cases = {"forward": forward, "training": training, "adam": adam.step, "head": head_step}
    middle = {name: float(np.median(values)) for name, values in interleave(cases, rounds=5).items()}
    forward_s, training_s = middle["forward"] / len(pixels), middle["training"] / len(pixels)
    return Costs(forward_s, training_s, forward_s, middle["adam"], middle["head"] * counts.head_steps)


def run_both_ways(data: TrialData, specs: Sequence[TrialSpec], *, processes: int) -> list[CellTimes]:
    """Run every cell both ways, spread over processes; which way is first changes from cell to cell."""
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(processes, mp_context=context, initializer=_begin, initargs=(data, folder)) as pool,
    ):
        return list(pool.map(_run_cell, specs, [bool(number % 2) for number in range(len(specs))]))


_here: dict[str, Any] = {}
"""What a process of the pool keeps."""


def _begin(data: TrialData, folder: str) -> None:
    torch.set_num_threads(1)
    state = load_backbone_weights("random")
    _here.update(data=data, folder=Path(folder), state=state, resident=Resident(build_backbone(state)))


def _run_cell(spec: TrialSpec, naive_first: bool) -> CellTimes:
    data, state, resident, folder = (_here[name] for name in ("data", "state", "resident", "folder"))
    place = TrialPlace(final=folder / spec.cell.name, checkpoint=folder / f"{spec.cell.name}.pt")
    ways = {
        "naive": lambda: NaiveLoop(data, state, spec).run(),
        "project": lambda: list(run_trial(spec, data, resident, place)),
    }
    seconds, results = {}, {}
    for name in sorted(ways, reverse=not naive_first):
        begun = time.process_time()
        results[name] = ways[name]()
        seconds[name] = time.process_time() - begun
    naive, record = results["naive"], results["project"][spec.recipe.frozen_epochs - 1]
    share = pd.read_parquet(place.final / "out_of_fold.parquet")["probability"].to_numpy()
    logits = np.log(share) - np.log1p(-share)
    return CellTimes(
        seconds["naive"],
        seconds["project"],
        abs(record.validation_loss - naive.frozen_loss) / naive.frozen_loss,
        float(np.abs(logits - naive.logits_M).max() / np.abs(naive.logits_M).max()),
    )
