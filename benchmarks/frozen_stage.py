"""The frozen stage of one trial: features once and a head, against the frozen network in every step.

Both run in this process, one thread, the same images, order and seed, in alternating rounds; their logits are
compared. What the cache saves over a whole study is larger, because all trials share one extraction: the last line
gives the counts with their arithmetic.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from lbp_ray.features import extract
from lbp_ray.nets.resnet import build_backbone, build_head, standardise
from lbp_ray.nets.weights import load_backbone_weights
from lbp_ray.samples import Samples, batch_order
from lbp_ray.steps import adam, train_epoch
from lbp_ray.study import Recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROUNDS = 3
NUM_IMAGES = 32
SHAPE = (100, 50)
EPOCHS = 40


def measure() -> Iterator[dict[str, object]]:
    """Yield the ratio of CPU times and the largest difference of the logits."""
    torch.set_num_threads(1)
    recipe = Recipe(weights="random", batch_size=16)
    backbone = build_backbone(load_backbone_weights("random"))
    pixels = np.random.default_rng(0).integers(0, 4000, (NUM_IMAGES, 1, *SHAPE)).astype(np.uint16)
    labels = torch.arange(NUM_IMAGES)[:, None] % 2 * 1.0
    ratios, cached_s, naive_s, difference = [], [], [], 0.0
    for _ in range(ROUNDS):
        begun = time.process_time()
        features = torch.from_numpy(extract(backbone, pixels))[:, 0]
        cached = _train(lambda rows, table=features: table[rows], labels, recipe)
        cached_s.append(time.process_time() - begun)
        begun = time.process_time()
        naive = _train(lambda rows: _forward(backbone, pixels, rows), labels, recipe)
        naive_s.append(time.process_time() - begun)
        ratios.append(naive_s[-1] / cached_s[-1])
        difference = max(difference, float((cached(features) - naive(features)).detach().abs().max()))
    yield {
        "figure": "CPU time of one trial's frozen stage, network in the loop / cached features",
        "min": min(ratios),
        "median": float(np.median(ratios)),
        "max": max(ratios),
        "bound": f"{EPOCHS} (epochs)",
        "max_logit_difference": difference,
        "conditions": f"{NUM_IMAGES} images of {SHAPE[0]} x {SHAPE[1]}, float32, 1 thread, {ROUNDS} rounds",
    }
    per_image_s = min(naive_s) / (EPOCHS * NUM_IMAGES)
    yield {
        "figure": "forward passes of the frozen stage of the Oulu study, network in the loop / cached features",
        "ratio": round(40 * 50 * 473 * 9 / 2630),
        "arithmetic": "40 epochs x 50 fold-seed pairs x 473 studies x (1+3+5) slices / 2630 distinct slices",
        "ms_per_forward_here": 1e3 * per_image_s,
    }


def _forward(backbone: torch.nn.Module, pixels: np.ndarray, rows: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        features: torch.Tensor = backbone(standardise(torch.from_numpy(pixels[rows.numpy(), 0])))
    return features


def _train(
    features_of: Callable[[torch.Tensor], torch.Tensor], labels: torch.Tensor, recipe: Recipe
) -> torch.nn.Linear:
    head = build_head(seed=0)
    optimiser = adam(list(head.parameters()), recipe)
    samples = Samples(np.arange(NUM_IMAGES), np.zeros(NUM_IMAGES, dtype=int))
    for epoch in range(1, EPOCHS + 1):
        train_epoch(
            lambda batch: head(features_of(torch.from_numpy(batch.study_M))),
            optimiser,
            samples,
            targets_NP=labels,
            order=batch_order(seed=0, epoch=epoch, size=NUM_IMAGES),
            batch_size=recipe.batch_size,
        )
    return head
