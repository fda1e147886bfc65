"""The whole study on one GPU, without Ray: ``python -m benchmarks.gpu_study [--studies 526 --crop 400 200 ...]``.

Synthetic crops, random weights, all folds, seeds and slice counts. The project's own functions extract once and run
every cell, one after the other in this process, or spread over ``--processes`` that share the device and map the same
files. Then a small cell shows that the project's frozen stage gives the logits of the network in the loop; a share of
the loop that most people would write runs on the same device, and is extended by the study's counts; and so does a
share of the permutation null, on a CPU core. Without a GPU all runs on one CPU core, at a size that suits it, e.g.::

    python -m benchmarks.gpu_study --studies 24 --crop 64 32 --folds 2 --seeds 1 --frozen-epochs 2
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.arithmetic import Costs, count_lines, oulu_sizes
from benchmarks.naive import SCORING_BATCH, NaiveLoop
from benchmarks.summary import verdict
from benchmarks.synthetic import make_specs, make_study
from benchmarks.timing import fastest_type, gemm
from lbp_ray import gpu
from lbp_ray.cell import TrialPlace
from lbp_ray.features import Shards, extract
from lbp_ray.native import native_dtype
from lbp_ray.nets.folding import fold
from lbp_ray.nets.resnet import build_backbone
from lbp_ray.nets.weights import load_backbone_weights
from lbp_ray.permutation import permutation_null
from lbp_ray.plan.counts import count
from lbp_ray.plan.flops import image_cost
from lbp_ray.resident import Resident
from lbp_ray.samples import Samples
from lbp_ray.study import Recipe
from lbp_ray.training import Training
from lbp_ray.trial import run_trial

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lbp_ray.cell import TrialData, TrialSpec
    from lbp_ray.plan.sizes import StudySizes

GOAL_S, STRETCH_S = 300, 120
"""Wall clock of the full-size study on one H200, start-up included."""

GOAL_TFLOP_S, STRETCH_TFLOP_S = 60, 120
"""Of the unfrozen epoch."""

GPU_GEMM_SIZE, GEMM_ROUNDS = 8192, 10

EXACT_STUDIES, EXACT_EPOCHS = 40, 8
"""Most studies and frozen epochs of the small cell: enough steps that recorded ones are replayed."""

NULL_EPOCHS = 2
"""Most frozen epochs of the permutation null that are measured; every epoch costs the same."""


@dataclass(frozen=True)
class Options:
    """What is run."""

    studies: int = 526
    crop: tuple[int, int] = (400, 200)
    folds: int = 10
    seeds: int = 5
    slices: tuple[int, ...] = (1, 3, 5)
    frozen_epochs: int = 40
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    processes: int = 1
    """Processes that train at a time; more than 1 share the device."""
    eager: bool = False
    """Run every step as it is, without a recorded CUDA graph."""
    naive_steps: int = 20
    """Steps of each kind that the plain loop is measured on."""

    @property
    def sizes(self) -> StudySizes:
        """What the planner counts."""
        return oulu_sizes(
            exams=self.studies,
            studies=self.studies,
            height_px=self.crop[0],
            width_px=self.crop[1],
            folds=self.folds,
            seeds=self.seeds,
            slice_counts=self.slices,
            frozen_epochs=self.frozen_epochs,
        )

    @property
    def recipe(self) -> Recipe:
        """The study's recipe; bfloat16 where the device computes it natively."""
        dtype = native_dtype("auto", gpu=self.device.startswith("cuda"))
        return Recipe(weights="random", frozen_epochs=self.frozen_epochs, unfrozen_dtype=dtype)


class CellTimes(NamedTuple):
    """Seconds of one cell."""

    heads_s: float
    """Frozen epochs, the trial's set-up and its fold's scores included."""
    unfrozen_s: float
    """Unfrozen epoch, its fold's scores included."""
    final_s: float
    """Scores of fold and hold-out, and the commit."""
    peak_bytes: float
    """Most memory that the process has held so far: of the GPU, or resident."""


class Worker:
    """A process that holds a backbone and runs cells on the study's files."""

    def __init__(self, data: TrialData, device: str, folder: Path, *, eager: bool = False) -> None:
        self.folder = folder
        self.warm_up_steps = sys.maxsize if eager else gpu.WARM_UP_STEPS
        mapped = {"crops_NKHW": np.load(folder / "crops.npy", mmap_mode="r")}
        if (folder / "features.npy").is_file():
            mapped["features_NKF"] = torch.from_numpy(np.load(folder / "features.npy"))
        self.data = replace(data, **mapped)
        self.resident = Resident(build_backbone(load_backbone_weights("random")), device=device)

    def run(self, spec: TrialSpec) -> CellTimes:
        """Run one cell as the study's workers do."""
        place = TrialPlace(final=self.folder / spec.cell.name, checkpoint=self.folder / f"{spec.cell.name}.pt")
        spent = {"frozen": 0.0, "unfrozen": 0.0}
        last = time.perf_counter()
        with patch.object(gpu, "WARM_UP_STEPS", self.warm_up_steps):
            for record in run_trial(spec, self.data, self.resident, place):
                now = time.perf_counter()
                spent[record.stage] += now - last
                last = now
        return CellTimes(
            spent["frozen"], spent["unfrozen"], time.perf_counter() - last, _peak_bytes(self.resident.device)
        )


def measure(options: Options) -> Iterator[dict[str, object]]:
    """Run the study and yield its figures, then those of what it is compared with.

    Parameters
    ----------
    options
        Size, device and processes.
    """
    begun_s = _process_age_s() - time.perf_counter()
    torch.set_num_threads(1)
    counts = count(options.sizes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = _write_crops(options, folder)
        worker = Worker(data, options.device, folder, eager=options.eager)
        extraction_s = _timed(lambda: _extract(worker, folder), options.device)
        specs = make_specs(options.recipe, folds=options.folds, seeds=range(options.seeds), slice_counts=options.slices)
        before = time.perf_counter()
        cells = _run_cells(worker, specs, data, options)
        trials_s = time.perf_counter() - before
        total_s = begun_s + time.perf_counter()
        yield {"figure": "counts of the study", **count_lines(options.sizes)}
        yield _whole_study(options, cells, total_s=total_s, extraction_s=extraction_s, trials_s=trials_s)
        unfrozen = _unfrozen(options, cells, trials_s)
        yield unfrozen
        yield {
            "figure": "extraction, img/s",
            "img_s": float(f"{counts.distinct_slices / extraction_s:.4g}"),
            "tflop_s": float(f"{counts.distinct_slices * image_cost(*options.crop).forward / 1e12 / extraction_s:.4g}"),
        }
        yield _exactness(worker.resident, options)
        peak = _gemm_tflop_s(options.device)
        yield {
            "figure": "unfrozen epoch with its fold's scores / matmul peak",
            "ratio": float(f"{unfrozen['tflop_s'] / peak:.3g}"),
            "matmul_tflop_s": float(f"{peak:.4g}"),
            "matmul_dtype": str(fastest_type(options.device)).removeprefix("torch."),
        }
        naive = _naive_costs(worker, specs[-1], options)
        naive_s = naive.study_s(counts, cached=False)
        yield {
            "figure": "whole study on this device: network in the loop (plain PyTorch) / project",
            "ratio": float(f"{naive_s / total_s:.4g}"),
            **({"at_least": 10} if _is_goal(options) else {}),
            "bound_at_equal_precision": round(counts.flop_ratio, 2),
            "network_in_the_loop": naive.line(counts, cached=False),
            "conditions": f"float32 (TF32 on a GPU) NCHW, eager, batch 32, {options.naive_steps} steps of each kind "
            f"measured, against {options.recipe.unfrozen_dtype} in the project's unfrozen epoch; no start-up of 150 "
            "processes counted",
        }
        yield _permutations(worker.data, options)


def _whole_study(
    options: Options, cells: list[CellTimes], *, total_s: float, extraction_s: float, trials_s: float
) -> dict[str, object]:
    """Return what the study took."""
    on_gpu, spent = options.device.startswith("cuda"), CellTimes(*np.sum(cells, axis=0).tolist())
    return {
        "figure": "whole study, seconds of wall clock with start-up",
        "total_s": round(total_s, 2),
        **({"at_most": GOAL_S, "stretch": STRETCH_S} if _is_goal(options) else {}),
        "start_and_data_s": round(total_s - extraction_s - trials_s, 2),
        "extraction_s": round(extraction_s, 2),
        "trials_s": round(trials_s, 2),
        **{name: round(value, 2) for name, value in spent._asdict().items() if name.endswith("_s")},
        "trials": len(cells),
        "processes": options.processes,
        "peak_memory_gib_of_a_process": float(f"{max(cell.peak_bytes for cell in cells) / 2**30:.3g}"),
        "device": torch.cuda.get_device_name() if on_gpu else torch.backends.cpu.get_cpu_capability(),
        "dtype": options.recipe.unfrozen_dtype,
        "conditions": f"steps {'recorded as CUDA graphs' if on_gpu and not options.eager else 'as they are'}; without "
        "what lbp_ray.tune does beside extraction and trials: Ray, crops, permutations, bootstrap, report",
    }


def _unfrozen(options: Options, cells: list[CellTimes], trials_s: float) -> dict[str, Any]:
    """Return the rate of the unfrozen epochs.

    Several processes share the device in turns that nobody measures, and their seconds divided by their number may be
    less than the device took. All trials' wall clock, heads included, is never less.
    """
    counts, alone = count(options.sizes), options.processes == 1
    forward, training = (value / 1e12 for value in image_cost(*options.crop)[:2])
    fold_images = counts.evaluation_images - options.folds * options.seeds * counts.holdout * sum(options.slices)
    unfrozen_s = sum(cell.unfrozen_s for cell in cells) if alone else trials_s
    rate = (counts.training_images * training + fold_images * forward) / unfrozen_s
    return {
        "figure": "unfrozen epoch with its fold's scores, TFLOP/s of the device"
        + ("" if alone else " (lower bound: over the wall clock of whole trials)"),
        "tflop_s": float(f"{rate:.4g}"),
        **({"at_least": GOAL_TFLOP_S, "stretch": STRETCH_TFLOP_S} if _is_goal(options) else {}),
        "img_s": float(f"{counts.training_images / unfrozen_s:.4g}"),
        "arithmetic": f"({counts.training_images:,} x {training:.6f} + {fold_images:,} x {forward:.6f}) TFLOP / "
        f"{unfrozen_s:.4g} s, {options.processes} process(es)",
    }


def _exactness(resident: Resident, options: Options) -> dict[str, object]:
    """Train the last layer of a small cell with the network in the loop and on features computed once."""
    studies, k = min(options.studies, EXACT_STUDIES), max(options.slices)
    recipe = Recipe(weights="random", frozen_epochs=min(options.frozen_epochs, EXACT_EPOCHS), unfrozen_epochs=0)
    (spec,) = make_specs(recipe, folds=1, seeds=[0], slice_counts=[k])
    data, state = make_study(studies, options.crop, folds=2, offsets=k), load_backbone_weights("random")
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        naive_M = NaiveLoop(data, state, spec, device=options.device).run().logits_M
    differences = {}
    for name, change in (("whole", lambda backbone: backbone), ("folded", fold)):
        features_NKF = extract(change(resident.reset()), data.crops_NKHW, device=options.device)
        training = Training(spec, replace(data, features_NKF=torch.from_numpy(features_NKF)), resident)
        list(training.epochs(Path("no-checkpoint")))
        differences[name] = float(np.abs(training.logits(training.validation) - naive_M).max())
    largest = float(np.abs(naive_M).max())
    return {
        "figure": "frozen stage of a small cell: largest difference of a logit from the network in the loop / largest",
        "ratio": float(f"{differences['whole'] / largest:.3g}"),
        "at_most": 1e-5,
        "largest_logit_difference": float(f"{differences['whole']:.3g}"),
        "ratio_with_folded_extraction": float(f"{differences['folded'] / largest:.3g}"),
        "conditions": f"{studies} studies of {k} slice(s), {recipe.frozen_epochs} epoch(s), batch 32, float32 without "
        "TF32, channels_last both ways",
    }


def _permutations(data: TrialData, options: Options) -> dict[str, object]:
    """Measure some epochs of the permutation null and extend them to the study's."""
    epochs, number = min(options.frozen_epochs, NULL_EPOCHS), options.sizes.permutations
    recipe = options.recipe.model_copy(update={"frozen_epochs": epochs})
    begun = time.perf_counter()
    for k in options.slices:
        permutation_null(data, recipe=recipe, num_slices=k, count=number, seed=0, progress=False)
    taken_s = time.perf_counter() - begun
    return {
        "figure": "permutation null on one CPU core, seconds beside the study's total",
        "predicted_s": float(f"{taken_s * options.frozen_epochs / epochs:.4g}"),
        "arithmetic": f"{taken_s:.4g} s x {options.frozen_epochs} / {epochs} epochs, {number} permutations of "
        f"{len(options.slices)} slice count(s)",
    }


def _is_goal(options: Options) -> bool:
    return options.device.startswith("cuda") and replace(options, device="", processes=1) == Options(device="")


def _process_age_s() -> float:
    """Seconds since this process started, imports included."""
    started = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")


def _timed(call: Callable[[], object], device: str) -> float:
    begun = time.perf_counter()
    call()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def _write_crops(options: Options, folder: Path) -> TrialData:
    """Write the crops; return the study without them, which is what other processes are sent."""
    data = make_study(options.studies, options.crop, folds=options.folds, offsets=max(options.slices))
    np.save(folder / "crops.npy", data.crops_NKHW)
    return replace(data, crops_NKHW=np.empty((0, *data.crops_NKHW.shape[1:]), dtype=np.uint16))


def _extract(worker: Worker, folder: Path) -> None:
    """Extract shard by shard and write the table, as the study's workers do."""
    network = fold(worker.resident.reset())
    device, crops_NKHW = worker.resident.device, worker.data.crops_NKHW
    shards = Shards.of(folder / "features", crops_NKHW, device=device)
    parts = [extract(network, crops_NKHW[shards.rows(index)], device=device) for index in range(len(shards))]
    features = np.concatenate(parts)
    np.save(folder / "features.npy", features)
    worker.data = replace(worker.data, features_NKF=torch.from_numpy(features))


_worker: list[Worker] = []
"""The worker of a process of the pool."""


def _begin(data: TrialData, folder: Path, options: Options) -> None:
    torch.set_num_threads(1)
    _worker.append(Worker(data, options.device, folder, eager=options.eager))


def _run_cell(spec: TrialSpec) -> CellTimes:
    return _worker[0].run(spec)


def _run_cells(worker: Worker, specs: Sequence[TrialSpec], data: TrialData, options: Options) -> list[CellTimes]:
    if options.processes == 1:
        return [worker.run(spec) for spec in specs]
    context = multiprocessing.get_context("spawn")
    given = {"mp_context": context, "initializer": _begin, "initargs": (data, worker.folder, options)}
    with ProcessPoolExecutor(options.processes, **given) as pool:
        return list(pool.map(_run_cell, specs[::-1]))  # the longest first, so that no process ends alone


def _naive_costs(worker: Worker, spec: TrialSpec, options: Options) -> Costs:
    """Measure the plain loop's steps on the same device: TF32 and NCHW, as PyTorch comes with them or nearly so."""
    rounds = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with torch.backends.cudnn.flags(enabled=True, deterministic=False, allow_tf32=True):
            state = load_backbone_weights("random")
            loop = NaiveLoop(worker.data, state, spec, device=options.device, layout=torch.contiguous_format)
            batch = np.resize(np.arange(loop.train.size), spec.recipe.batch_size)
            scored = Samples(*(np.resize(part, SCORING_BATCH) for part in loop.validation))
            frozen_s = _per_step_s(lambda: loop.step(batch), options)
            scoring_s = _per_step_s(lambda: loop.score(scored), options)
            loop.unfreeze()
            training_s = _per_step_s(lambda: loop.step(batch), options)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = rounds
    # Of the frozen passes nine tenths are steps and one tenth scores; Adam's step is in the unfrozen one.
    share = 1 / options.folds
    forward_s = (1 - share) * frozen_s / len(batch) + share * scoring_s / SCORING_BATCH
    return Costs(forward_s, training_s / len(batch), 0.0, 0.0, 0.0)


def _per_step_s(step: Callable[[], object], options: Options) -> float:
    """Median seconds of a step, after two that are not counted."""
    return float(np.median([_timed(step, options.device) for _ in range(options.naive_steps + 2)][2:]))


def _gemm_tflop_s(device: str) -> float:
    """Return the matmul peak, in bfloat16 where the device has it: the best of some rounds."""
    size = {"size": GPU_GEMM_SIZE} if device.startswith("cuda") else {}
    product, gflop = gemm(fastest_type(device), device=device, **size)
    return gflop / 1e3 / min(_timed(product, device) for _ in range(GEMM_ROUNDS))


def _peak_bytes(device: str) -> float:
    if device.startswith("cuda"):
        return float(torch.cuda.max_memory_reserved())
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def parse(arguments: list[str] | None = None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_study", description=__doc__.split("\n\n")[0])
    standard = Options()
    parser.add_argument("--studies", type=int, default=standard.studies)
    parser.add_argument("--crop", type=int, nargs=2, default=standard.crop, metavar=("ROWS", "COLUMNS"))
    parser.add_argument("--folds", type=int, default=standard.folds)
    parser.add_argument("--seeds", type=int, default=standard.seeds)
    parser.add_argument("--slices", type=int, nargs="+", default=standard.slices, metavar="K")
    parser.add_argument("--frozen-epochs", type=int, default=standard.frozen_epochs)
    parser.add_argument("--device", default=standard.device)
    parser.add_argument("--processes", type=int, default=1, help="processes that train at a time on the one device")
    parser.add_argument("--eager", action="store_true", help="run every step as it is, without a recorded CUDA graph")
    parser.add_argument(
        "--naive-steps", type=int, default=standard.naive_steps, help="measured steps of the plain loop"
    )
    given: dict[str, Any] = vars(parser.parse_args(arguments))
    return Options(**given | {"crop": tuple(given["crop"]), "slices": tuple(given["slices"])})


def main(arguments: list[str] | None = None) -> int:
    """Run the study and print one JSON line per figure."""
    for figure in measure(parse(arguments)):
        judged = verdict(figure)
        told = {"benchmark": "gpu_study", **figure, **({"goal": judged} if judged else {})}
        print(json.dumps(told), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
