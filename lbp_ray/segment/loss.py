"""What a segmentation network is trained by and judged by, one number per image.

Shape suffixes: B batch, C classes, then any number of spatial axes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.functional import binary_cross_entropy_with_logits

if TYPE_CHECKING:
    from torch import Tensor

    from lbp_ray.segment.config import LossName

SMOOTH = 1.0
"""Added to both sides of the soft Dice ratio, in pixels: an empty mask predicted empty costs nothing."""


def loss_per_image(logits: Tensor, targets: Tensor, *, name: LossName) -> Tensor:
    """Return the loss of every image, so that batches split over workers can be averaged exactly.

    Parameters
    ----------
    logits, targets
        (B, C, ...) logits and 0/1 targets, float32.
    name
        Which loss.

    Returns
    -------
    torch.Tensor
        (B,).

    References
    ----------
    Oulu thesis, equation 8 (binary cross-entropy) and 9 (Dice).
    """
    total = logits.new_zeros(len(logits))
    if name in ("bce", "bce_dice"):
        total = total + binary_cross_entropy_with_logits(logits, targets, reduction="none").flatten(1).mean(1)
    if name in ("dice", "bce_dice"):
        share = logits.sigmoid()
        total = total + 1 - _dice(share.flatten(1), targets.flatten(1), SMOOTH)
    return total


def dice_per_image(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the Dice coefficient of every thresholded image, 1 where both masks are empty: (B,)."""
    return _dice((logits > 0).float().flatten(1), targets.flatten(1), 1e-6)


def _dice(share_BM: Tensor, targets_BM: Tensor, smooth: float) -> Tensor:
    overlap = (share_BM * targets_BM).sum(1)
    return (2 * overlap + smooth) / (share_BM.sum(1) + targets_BM.sum(1) + smooth)
