"""The whole study both ways, from what one image costs here: 124 PFLOP without the cache, 8.4 with it.

Measured, in alternating rounds on one thread: a batch forward, and forward and backward, in the layout most people
use (NCHW), in channels_last and in channels_last with bfloat16; the same as the project computes it, in passes and with
BatchNorm carried by the convolutions; the folded extraction; Adam's step; the frozen epochs on cached features; and the
gemm peaks. The study is their sum by its counts, and every term is printed.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.arithmetic import CROP, Costs, count_lines, oulu_sizes
from benchmarks.synthetic import make_specs, make_study
from benchmarks.timing import ROUNDS, fastest_type, gemm, interleave, spread
from lbp_ray.features import batch_size
from lbp_ray.native import images_per_pass, keep_freed_memory
from lbp_ray.nets.folding import carry_norms, computed_once, fold
from lbp_ray.nets.resnet import NUM_FEATURES, build_backbone
from lbp_ray.nets.weights import load_backbone_weights
from lbp_ray.plan.counts import count
from lbp_ray.resident import Resident
from lbp_ray.study import Recipe
from lbp_ray.training import Training

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from lbp_ray.cell import TrialData
    from lbp_ray.plan.sizes import StudySizes

BATCH = 32
"""Images of a batch, as in the recipe."""

NETWORKS = {
    "naive": (torch.contiguous_format, False),
    "float32": (torch.channels_last, False),
    "bfloat16": (torch.channels_last, True),
}
"""Of the network in the loop: memory format and whether autocast computes in bfloat16."""

CACHED = {"float32": (False, True), "bfloat16": (True, True), "float32 in whole batches": (False, False)}
"""Ways of the project's unfrozen epoch: whether autocast computes in bfloat16, and whether a batch is divided into the
passes that keep a worker below 1.5 GiB."""

COMPARED = (
    ("float32", "float32", 14),
    ("float32", "float32 in whole batches", 14),
    ("bfloat16", "bfloat16", 14),
    ("naive", "bfloat16", 30),
)
"""The loop, the project's way, and the least ratio that is asked for."""

NO_BFLOAT16 = "this CPU has neither AVX512-BF16 nor AMX"

HAS_BFLOAT16 = fastest_type() == torch.bfloat16
"""Whether this CPU computes bfloat16; else what is measured in it is left out."""

if not HAS_BFLOAT16:
    NETWORKS = {name: given for name, given in NETWORKS.items() if name != "bfloat16"}
    CACHED = {name: given for name, given in CACHED.items() if name != "bfloat16"}


def measure(*, quick: bool = False) -> Iterator[dict[str, object]]:
    """Yield costs, the study's ratios and the shares of the gemm peak."""
    torch.set_num_threads(1)
    kept = keep_freed_memory()  # as in the project's workers; it helps the loop that is compared with as much
    shape, batch = ((64, 32), 8) if quick else (CROP, BATCH)
    state = load_backbone_weights("random")
    networks = {name: build_backbone(state).to(memory_format=layout) for name, (layout, _) in NETWORKS.items()}
    folded, carrying = fold(networks["float32"]), carry_norms(networks["float32"])
    image = torch.randn(batch, 3, *shape)
    grey = image[: batch_size("cpu"), :1].contiguous(memory_format=torch.channels_last)
    cases: dict[str, Callable[[], object]] = {"extraction": lambda: _forward(folded, grey, half=False)}
    for name, (layout, half) in NETWORKS.items():
        given = image.contiguous(memory_format=layout)
        cases[f"{name} forward"] = lambda name=name, given=given, half=half: _forward(networks[name], given, half=half)
        cases[f"{name} training"] = lambda name=name, given=given, half=half: _train(networks[name], given, half=half)
    inputs = image.contiguous(memory_format=torch.channels_last)
    owner = networks["float32"]
    for name, (half, divided) in CACHED.items():
        most = images_per_pass("bfloat16" if half else "float32", shape[0] * shape[1])
        parts = inputs.split(most if divided else batch)
        cases[f"cached {name} forward"] = lambda parts=parts, half=half: _forward(carrying, *parts, half=half)
        cases[f"cached {name} training"] = lambda parts=parts, half=half: _train(owner, *parts, half=half, run=carrying)
    cases["adam"] = _adam_step()
    cases["float32 gemm"], gemm_gflop = gemm(torch.float32)
    if HAS_BFLOAT16:
        cases["bfloat16 gemm"], _ = gemm(torch.bfloat16)
    sizes = oulu_sizes(height_px=shape[0], width_px=shape[1])
    data = head_data(sizes)
    for num_slices in sizes.slice_counts:
        cases[f"heads {num_slices}"] = lambda num_slices=num_slices: train_head(data, sizes, num_slices=num_slices)
    seconds = interleave(cases)
    for name in seconds:
        if name.endswith(("forward", "training", "extraction")):
            seconds[name] = seconds[name] / (len(grey) if name == "extraction" else batch)
    conditions = (
        f"{shape[0]} x {shape[1]}, batch {batch}, extraction {len(grey)}, 1 thread, CPU time, {ROUNDS} rounds, random "
        f"weights, freed memory {'kept' if kept else 'given back'}"
    )
    yield {
        "figure": "CPU ms per image or step",
        **{name: spread(1e3 * values) for name, values in seconds.items()},
        "conditions": conditions,
    }
    yield {"figure": "counts of the study", **count_lines(sizes)}
    for figure in _ratios(seconds, sizes):
        yield {**figure, "conditions": conditions}
    extraction_gflop = _gflop(folded, grey[:1])
    yield {
        "figure": "folded extraction as a share of the float32 gemm peak",
        **spread(extraction_gflop / seconds["extraction"] / (gemm_gflop / seconds["float32 gemm"])),
        "at_least": 0.7,
        "arithmetic": f"{extraction_gflop:.3f} GFLOP per image, gemm of {gemm_gflop:.1f} GFLOP",
        "conditions": conditions,
    }
    if HAS_BFLOAT16:
        yield {
            "figure": "unfrozen step: float32 channels_last / bfloat16 channels_last",
            **spread(seconds["float32 training"] / seconds["bfloat16 training"]),
            "at_least": 1.8,
            "bound": spread(seconds["float32 gemm"] / seconds["bfloat16 gemm"])["median"],
            "arithmetic": "bound: gemm peaks of the two types",
            "conditions": conditions,
        }
    else:
        yield {"figure": "unfrozen step: float32 / bfloat16", "skipped": NO_BFLOAT16}


def _ratios(seconds: dict[str, np.ndarray], sizes: StudySizes) -> Iterator[dict[str, object]]:
    """Yield what the cache saves of the frozen stage and of the whole study."""
    counts = count(sizes)
    names = (*NETWORKS, *(f"cached {name}" for name in CACHED))
    rounds = {name: [_costs(seconds, sizes, name, at) for at in range(ROUNDS)] for name in names}
    middle = {name: _costs(seconds, sizes, name, None) for name in names}
    for name in ("float32", "naive"):
        frozen = [cost.frozen_s(counts, cached=False) / cost.frozen_s(counts, cached=True) for cost in rounds[name]]
        yield {
            "figure": f"frozen stage of 150 trials: network in the loop ({_words(name)}) / cached",
            **spread(frozen),
            "at_least": 1500,
            "bound": round(counts.frozen_passes / counts.distinct_slices),
            "arithmetic": f"{counts.frozen_passes:,} x {1e3 * middle[name].forward_s:.1f} ms / "
            f"({counts.distinct_slices:,} x {1e3 * middle[name].extraction_s:.1f} ms + {middle[name].heads_s:.3g} s of "
            "heads); bound: passes",
        }
    for before, after, goal in COMPARED:
        if after not in CACHED:
            name = f"whole study: network in the loop ({_words(before)}) / cached ({after})"
            yield {"figure": name, "skipped": NO_BFLOAT16}
            continue
        ratios = [
            first.study_s(counts, cached=False) / second.study_s(counts, cached=True)
            for first, second in zip(rounds[before], rounds[f"cached {after}"], strict=True)
        ]
        yield {
            "figure": f"whole study: network in the loop ({_words(before)}) / cached ({after})",
            **spread(ratios),
            "at_least": goal,
            "bound": round(counts.flop_ratio, 2) if after.startswith(before) else None,
            "network_in_the_loop": middle[before].line(counts, cached=False),
            "cached": middle[f"cached {after}"].line(counts, cached=True),
            "training_over_forward": round(middle[f"cached {after}"].training_s / middle[before].forward_s, 2),
        }


def _costs(seconds: dict[str, np.ndarray], sizes: StudySizes, name: str, at: int | None) -> Costs:
    """Costs of one round, or of the medians; the extraction is float32 always, because features are."""
    per_fold = sizes.folds * sizes.seeds
    columns = {
        "forward": seconds[f"{name} forward"],
        "training": seconds[f"{name} training"],
        "extraction": seconds["extraction"],
        "adam": seconds["adam"],
        "heads": per_fold * np.sum([seconds[f"heads {slices}"] for slices in sizes.slice_counts], axis=0),
    }
    return Costs.of({key: np.median(values) if at is None else values[at] for key, values in columns.items()})


def _words(name: str) -> str:
    return "float32 NCHW" if name == "naive" else f"{name} channels_last"


def _forward(network: nn.Module, *parts: Tensor, half: bool) -> None:
    with torch.no_grad(), computed_once(network):
        for image in parts:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                network(image)


def _train(owner: nn.Module, *parts: Tensor, half: bool, run: nn.Module | None = None) -> None:
    """Compute the gradients of a batch's passes by `run`, a network of the parameters of `owner`, or by itself."""
    owner.requires_grad_(True).zero_grad(set_to_none=True)
    network = run or owner
    with computed_once(network):
        for image in parts:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = network(image).float().sum()
            loss.backward()


def _adam_step() -> Callable[[], object]:
    network = build_backbone(load_backbone_weights("random")).requires_grad_(True)
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, 1e-6)
    return torch.optim.Adam(network.parameters(), lr=1e-6, fused=True).step


def _gflop(network: nn.Module, image: Tensor) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(image)
    return counter.get_total_flops() / 1e9


def head_data(sizes: StudySizes) -> TrialData:
    """Draw a study's features; its images are of one pixel, because nothing reads them."""
    data = make_study(sizes.studies, (1, 1), folds=sizes.folds)
    shape = (sizes.studies, max(sizes.slice_counts), NUM_FEATURES)
    return replace(data, features_NKF=torch.randn(shape, generator=torch.Generator().manual_seed(0)).abs())


def train_head(data: TrialData, sizes: StudySizes, *, num_slices: int) -> None:
    """Run the frozen epochs of one trial as the project does: steps, and the evaluated fold's scores every epoch."""
    recipe = Recipe(weights="random", frozen_epochs=sizes.frozen_epochs, unfrozen_epochs=0)
    spec = make_specs(recipe, folds=1, seeds=[0], slice_counts=[num_slices])[0]
    list(Training(spec, data, Resident(nn.Identity())).epochs(Path("no-checkpoint")))
