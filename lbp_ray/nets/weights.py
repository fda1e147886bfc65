"""Where a network's first weights come from: ImageNet through torchvision, a local file, or a seeded random start."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import URLError

import torch
from torch import Tensor, nn
from torchvision.models import ResNet50_Weights, VGG11_BN_Weights, resnet50, vgg11_bn

if TYPE_CHECKING:
    from collections.abc import Callable

    from torchvision.models import WeightsEnum

StateDict = dict[str, Tensor]


@dataclass(frozen=True)
class Architecture:
    """A torchvision network whose weights can be loaded."""

    title: str
    build: Callable[..., nn.Module]
    imagenet: WeightsEnum
    head_prefix: str
    """Parameters of ImageNet's own last layers, dropped on loading."""


RESNET50 = Architecture("ResNet50", resnet50, ResNet50_Weights.IMAGENET1K_V1, "fc.")

VGG11_BN = Architecture("VGG11-BN", vgg11_bn, VGG11_BN_Weights.IMAGENET1K_V1, "classifier.")


class WeightsError(ValueError):
    """Weights that are absent or do not fit the network."""


def load_backbone_weights(source: str, *, seed: int = 0, architecture: Architecture = RESNET50) -> StateDict:
    """Load a network's state, without ImageNet's last layers.

    Parameters
    ----------
    source
        ``imagenet``: torchvision's IMAGENET1K_V1, taken from ``TORCH_HOME`` or downloaded into it. ``random``: a seeded
        random start. Anything else: path of a ``torch.save``d state dict.
    seed
        Seed of the random start; ignored otherwise.
    architecture
        `RESNET50` or `VGG11_BN`.

    Returns
    -------
    dict
        Parameter and buffer name → tensor on the CPU.

    Raises
    ------
    WeightsError
        If the file is absent, cannot be downloaded or does not fit. Nothing ever falls back to random weights.
    """
    if source == "random":
        state = _random_state(architecture, seed)
    elif source == "imagenet":
        state = _imagenet_state(architecture)
    else:
        state = _file_state(architecture, Path(source))
    return {name: value for name, value in state.items() if not name.startswith(architecture.head_prefix)}


def weights_sha256(state: StateDict) -> str:
    """Return the SHA-256 of names, types, shapes and bytes of a state dict, in name order."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def _random_state(architecture: Architecture, seed: int) -> StateDict:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return dict(architecture.build(weights=None).state_dict())


def _imagenet_state(architecture: Architecture) -> StateDict:
    weights = architecture.imagenet
    target = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    try:
        return dict(weights.get_state_dict(progress=False, check_hash=True))
    except (URLError, OSError, RuntimeError) as error:
        msg = (
            f"ImageNet weights are not at {target} and could not be downloaded ({type(error).__name__}); fetch "
            f"{target.name} where there is a network and put it there, set TORCH_HOME to a folder that has it, "
            "or ask for a random start with recipe.weights=random"
        )
        raise WeightsError(msg) from error


def _file_state(architecture: Architecture, path: Path) -> StateDict:
    if not path.is_file():
        msg = f"weights file not found: {path}; set recipe.weights to imagenet, random or the path of a state dict"
        raise WeightsError(msg)
    state = torch.load(path, map_location="cpu", weights_only=True)
    with torch.device("meta"):
        expected = architecture.build(weights=None).state_dict()
    needed = {name for name in expected if not name.startswith(architecture.head_prefix)}
    absent = sorted(needed - set(state))
    wrong = sorted(name for name in needed & set(state) if state[name].shape != expected[name].shape)
    if absent or wrong:
        msg = (
            f"{path} does not fit {architecture.title}: {len(absent)} parameter(s) absent (e.g. {absent[:2]}), "
            f"{len(wrong)} of another shape (e.g. {wrong[:2]}); torchvision's parameter names are required"
        )
        raise WeightsError(msg)
    return {name: state[name] for name in expected if name in needed}
