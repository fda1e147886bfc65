"""What a process keeps between trials: one backbone and, on a GPU, the study's crops and features."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lbp_ray.gpu import CropsOnGpu, why_not_held
from lbp_ray.nets.folding import carry_norms

if TYPE_CHECKING:
    from lbp_ray.cell import TrialData
    from lbp_ray.nets.weights import StateDict
    from lbp_ray.streaming import FeatureFile

_log = logging.getLogger(__name__)


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
        if self.on_gpu:
            torch.backends.cudnn.allow_tf32 = False  # float32 is float32: else convolutions round their inputs
            torch.backends.cudnn.deterministic = True  # else gradients of convolutions differ from run to run
        self.backbone = backbone.to(device)
        self.carrying = carry_norms(self.backbone)
        """The same weights, with BatchNorm in eval mode carried by the convolutions."""
        self._base: StateDict = {name: value.clone() for name, value in backbone.state_dict().items()}
        self._crops: tuple[TrialData, CropsOnGpu] | None = None
        self._features: tuple[TrialData, Tensor] | None = None
        self._refused: TrialData | None = None
        """The study whose crops were last said not to stay on the GPU."""

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.startswith("cuda")

    def crops(self, data: TrialData) -> CropsOnGpu | None:
        """Return the study's crops where they may stay on this GPU; they are sent once per process."""
        if not self.on_gpu:
            return None
        if reason := why_not_held(data.crops_NKHW, len(data.study_ids)):
            if self._refused is not data:
                self._refused = data
                _log.warning("the crops do not stay on %s, and their steps are not recorded: %s", self.device, reason)
            return None
        if self._crops is None or self._crops[0] is not data:
            self._crops = None  # so that there are never two
            self._crops = data, CropsOnGpu(data.crops_NKHW, data.crop_row_N, self.device)
        return self._crops[1]

    def features(self, data: TrialData) -> Tensor | FeatureFile | None:
        """Return the study's features, those that are in memory on this device; they are sent once per process."""
        if not self.on_gpu or not isinstance(data.features_NKF, Tensor):
            return data.features_NKF
        if self._features is None or self._features[0] is not data:
            self._features = data, data.features_NKF.to(self.device)
        return self._features[1]

    def reset(self) -> nn.Module:
        """Undo whatever an earlier trial did: weights, running statistics, gradients, modes, the current GPU."""
        if self.on_gpu and torch.device(self.device).index is not None:
            torch.cuda.set_device(self.device)
        self.backbone.load_state_dict(self._base)
        self.backbone.requires_grad_(False)
        self.backbone.zero_grad(set_to_none=True)
        return self.backbone.eval()
