"""Lightning's and MONAI's trainers, and a plain PyTorch loop, on the same data, order and seed as the project.

Twice: the last layer on given features, where only the loop itself costs anything; and the frozen network in the loop,
as people use these trainers. With the network in the loop every trainer computes the same features again in every
epoch; the project computes them once. All start from the same weights and must end with the same logits. MONAI's
`SupervisedTrainer` calls ``network.train()`` itself: BatchNorm of the frozen backbone then drifts, unless the backbone
refuses train mode; both are shown.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader, Sampler, TensorDataset

from benchmarks.timing import ROUNDS, interleave, spread
from lbp_ray.features import extract
from lbp_ray.nets.resnet import NUM_FEATURES, build_backbone, build_head, standardise
from lbp_ray.nets.weights import load_backbone_weights
from lbp_ray.samples import Samples, batch_order
from lbp_ray.steps import adam, train_epoch
from lbp_ray.study import Recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NEEDED = {"Lightning Trainer": ("lightning",), "MONAI SupervisedTrainer": ("monai", "ignite")}
"""Packages of each trainer."""

RECIPE = Recipe(weights="random", batch_size=16)


@dataclass(frozen=True)
class Size:
    """How much every trainer trains."""

    images: int = 32
    crop: tuple[int, int] = (64, 32)
    epochs: int = 40
    head_slices: int = 2048


QUICK = Size(images=16, epochs=2, head_slices=64)


class Orders(Sampler[list[int]]):
    """The project's batches: an order per epoch from a counter."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples, self.epoch = num_samples, 0

    def __iter__(self) -> Iterator[list[int]]:
        self.epoch += 1
        order = batch_order(seed=0, epoch=self.epoch, size=self.num_samples).tolist()
        for start in range(0, self.num_samples, RECIPE.batch_size):
            yield order[start : start + RECIPE.batch_size]

    def __len__(self) -> int:
        return -(-self.num_samples // RECIPE.batch_size)


class StaysInEval(nn.Module):
    """A frozen backbone that refuses train mode."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.train(False)

    def train(self, mode: bool = True) -> StaysInEval:
        """Stay in eval mode, whatever was asked for."""
        return super().train(False)

    def forward(self, image: Tensor) -> Tensor:
        """Pass the backbone's features on."""
        features: Tensor = self.backbone(image)
        return features


def measure(*, quick: bool = False) -> Iterator[dict[str, object]]:
    """Yield the cost of each trainer over the project's, and how far logits and running statistics moved."""
    torch.set_num_threads(1)
    size = QUICK if quick else Size()
    trainers = {"plain PyTorch loop": train_plainly}
    for name, packages in NEEDED.items():
        absent = [package for package in packages if find_spec(package) is None]
        if absent:
            yield {
                "figure": name,
                "skipped": f"not installed: {', '.join(absent)} (pip install '.[bench]')",
            }
        else:
            trainers[name] = {"Lightning Trainer": train_lightning, "MONAI SupervisedTrainer": train_monai}[name]
    yield from _on_features(trainers, size)
    yield from _with_network(trainers, size)


def _on_features(trainers: dict[str, Any], size: Size) -> Iterator[dict[str, object]]:
    """Train the last layer on given features."""
    features = torch.randn(size.head_slices, NUM_FEATURES, generator=torch.Generator().manual_seed(0)).abs()
    data = TensorDataset(features, torch.arange(size.head_slices)[:, None] % 2 * 1.0)
    logits: dict[str, Tensor] = {}

    def run(name: str, train: Callable[[], nn.Module]) -> None:
        network = train().eval()
        with torch.no_grad():
            logits[name] = network(features)

    def trained(train: Any) -> nn.Module:  # noqa: ANN401
        network = nn.Sequential(build_head(seed=0))
        train(network, data, size.epochs)
        return network

    cases: dict[str, Callable[[], object]] = {"project": lambda: run("project", lambda: train_head(data, size.epochs))}
    for name, train in trainers.items():
        cases[name] = lambda name=name, train=train: run(name, lambda: trained(train))
    seconds = interleave(cases)
    for name in trainers:
        yield {
            "figure": f"CPU time, last layer on given features: {name} / project",
            **spread(seconds[name] / seconds["project"]),
            "largest_logit_difference": _difference(logits[name], logits["project"]),
            "conditions": f"{size.head_slices} x 2,048 features, {size.epochs} epochs, batch 16, 1 thread, {ROUNDS} "
            "rounds, set-up of the trainer included",
        }


def _with_network(trainers: dict[str, Any], size: Size) -> Iterator[dict[str, object]]:
    """Train with the frozen network in the loop; the project extracts and trains the last layer."""
    pixels = np.random.default_rng(0).integers(0, 4000, (size.images, 1, *size.crop)).astype(np.uint16)
    images = standardise(torch.from_numpy(pixels[:, 0]))
    targets = torch.arange(size.images)[:, None] % 2 * 1.0
    data = TensorDataset(images, targets)
    state = load_backbone_weights("random")
    backbone = build_backbone(state)
    logits: dict[str, Tensor] = {}
    drift: dict[str, float] = {}
    variants = {name: (train, False) for name, train in trainers.items()}
    if "MONAI SupervisedTrainer" in trainers:
        variants["MONAI SupervisedTrainer, backbone that refuses train mode"] = (
            trainers["MONAI SupervisedTrainer"],
            True,
        )

    backbones = {name: build_backbone(state) for name in variants}

    def project() -> None:
        features = torch.from_numpy(extract(backbone, pixels))[:, 0]
        head = train_head(TensorDataset(features, targets), size.epochs)
        with torch.no_grad():
            logits["project"] = head(backbone(images))

    def peer(name: str) -> None:
        train, refuses = variants[name]
        frozen = backbones[name]
        frozen.load_state_dict(state)
        network = nn.Sequential(StaysInEval(frozen) if refuses else frozen, build_head(seed=0)).eval()
        train(network, data, size.epochs)
        drift[name] = _drift(frozen, state)
        with torch.no_grad():
            logits[name] = network.eval()(images)

    cases: dict[str, Callable[[], object]] = {"project": project}
    cases |= {name: (lambda name=name: peer(name)) for name in variants}
    seconds = interleave(cases)
    for name in variants:
        yield {
            "figure": f"CPU time, frozen network in the loop: {name} / project",
            **spread(seconds[name] / seconds["project"]),
            "at_least": 10,
            "bound": size.epochs,
            "largest_logit_difference": _difference(logits[name], logits["project"]),
            "logit_std": float(logits["project"].std()),
            "running_statistics_drift": drift[name],
            "forward_passes": f"{size.epochs} x {size.images} against {size.images}; over 150 trials of the study "
            "8,514,000 against 2,630",
            "conditions": f"{size.images} images of {size.crop[0]} x {size.crop[1]}, {size.epochs} epochs, batch 16, "
            f"float32 channels_last, random weights, 1 thread, {ROUNDS} rounds",
        }


def _difference(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().max())


def _drift(backbone: nn.Module, state: dict[str, Tensor]) -> float:
    """Largest change of a running mean or variance."""
    after = backbone.state_dict()
    return max(_difference(after[name], state[name]) for name in state if "running" in name)


def train_head(data: TensorDataset, epochs: int) -> nn.Module:
    """Train the last layer on a table of features by the project's own loop."""
    features, targets = data.tensors
    head = build_head(seed=0)
    optimiser = adam(list(head.parameters()), RECIPE)
    samples = Samples(np.arange(len(features)), np.zeros(len(features), dtype=int))
    for epoch in range(1, epochs + 1):
        train_epoch(
            lambda batch: head(features[torch.from_numpy(batch.study_M)]),
            optimiser,
            samples,
            targets_NP=targets,
            order=batch_order(seed=0, epoch=epoch, size=len(features)),
            batch_size=RECIPE.batch_size,
        )
    return head


def _loader(data: TensorDataset) -> DataLoader[Any]:
    return DataLoader(data, batch_sampler=Orders(len(data)))


def _optimiser(network: nn.Module) -> torch.optim.Adam:
    return adam([parameter for parameter in network.parameters() if parameter.requires_grad], RECIPE)


def train_plainly(network: nn.Module, data: TensorDataset, epochs: int) -> None:
    """Train with a data loader and nothing else."""
    optimiser, loader = _optimiser(network), _loader(data)
    for _ in range(epochs):
        for image, target in loader:
            optimiser.zero_grad()
            loss = binary_cross_entropy_with_logits(network(image), target)
            loss.backward()
            optimiser.step()


def train_lightning(network: nn.Module, data: TensorDataset, epochs: int) -> None:
    """Train with Lightning's Trainer, without its logger, checkpoints and progress bar."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return binary_cross_entropy_with_logits(self.network(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return _optimiser(self.network)

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        trainer.fit(Module(), _loader(data))


def train_monai(network: nn.Module, data: TensorDataset, epochs: int) -> None:
    """Train with MONAI's SupervisedTrainer, without handlers."""
    from monai.engines import SupervisedTrainer

    SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=epochs,
        train_data_loader=_loader(data),
        network=network,
        optimizer=_optimiser(network),
        loss_function=binary_cross_entropy_with_logits,
    ).run()
