"""What a region finder is: the models behind ``configs/roi_*.yaml`` of ``python -m lbp_ray.segment``."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from lbp_ray.config import AbsolutePath, FrozenModel
from lbp_ray.study import PositiveInt

STRIDE = 32
"""The network's grid must be a multiple of this: its encoder halves rows and columns five times."""

LossName = Literal["bce", "dice", "bce_dice"]
"""Binary cross-entropy (the thesis's), 1 - soft Dice, or their sum."""


class RegionPaths(FrozenModel):
    """Where the region finder reads and writes; absolute, on storage that every node sees."""

    store: AbsolutePath
    """Slice store written by ``python -m preprocess``."""
    midsagittal: AbsolutePath | None = None
    """Mid-sagittal artefact; None takes the only one beside the store and refuses a choice."""
    annotations: AbsolutePath
    """Linked CVAT annotations (``python -m preprocess link``)."""
    runs: AbsolutePath
    """Root of trained folds and regions; the study's own, where it has sealed a split."""


class RegionFolds(FrozenModel):
    """Who trains which network, always by patient."""

    study: str | None = None
    """Study below ``paths.runs`` whose sealed patients no network may see; None needs ``allow_holdout``."""
    nested: bool = False
    """Take the study's outer folds: every exam's mask then comes from a network that saw no patient of its fold."""
    allow_holdout: bool = False
    """Train on every annotated patient, sealed or not. A study then refuses the regions unless told to take them."""
    folds: Annotated[int, Field(ge=2)] = 5
    """Folds of its own; ignored when nested."""
    test_fraction: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of annotated patients that only the final network's Dice is measured on. The thesis names 10 % in one place
    and five folds over all 331 in another; the folds are the default."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of folds and test patients."""

    @model_validator(mode="after")
    def _sealed_or_told(self) -> Self:
        if (self.study is None) != self.allow_holdout:
            msg = (
                "name the study whose hold-out stays unseen as folds.study (after `python -m lbp_ray.seal`), or, where "
                "there is none, set folds.allow_holdout=true; one of the two is required, and not both"
            )
            raise ValueError(msg)
        if self.nested and self.study is None:
            msg = "folds.nested needs folds.study: the folds are that study's"
            raise ValueError(msg)
        return self


class RegionRecipe(FrozenModel):
    """How one network is trained: everything that changes its numbers."""

    weights: str = "imagenet"
    """Encoder: ``imagenet`` (torchvision's VGG11_BN IMAGENET1K_V1), ``random`` or the absolute path of a state dict."""
    input_px: Annotated[int, Field(ge=STRIDE, multiple_of=STRIDE)] = 512
    """Rows and columns of the network's grid; images of another size are scaled to fit."""
    epochs: PositiveInt = 41
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    learning_rate_drops: tuple[tuple[PositiveInt, Annotated[float, Field(gt=0)]], ...] = ((20, 1e-5), (40, 1e-6))
    """(first epoch, counted from 1; learning rate from there on), ascending."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-3
    """Adam's L2 term."""
    batch_size: PositiveInt = 16
    """Slices of one step, over all workers."""
    loss: LossName = "bce"
    flip_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of training slices that are mirrored from front to back."""
    rotation_deg: Annotated[float, Field(ge=0, lt=90)] = 15.0
    """Training slices are turned by up to this angle either way."""
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    """Autocast type. ``auto`` becomes, when the run starts, ``bfloat16`` where the device computes it natively, else
    ``float32``; the regions name what it became."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of initial decoder, batch order and poses."""
    threads: PositiveInt = 1
    """CPU threads of one worker: they change float32 sums, so they belong to the recipe."""

    @field_validator("learning_rate_drops")
    @classmethod
    def _ascending(cls, value: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
        if [first for first, _ in value] != sorted({first for first, _ in value}):
            msg = f"epochs must ascend, found {[first for first, _ in value]}"
            raise ValueError(msg)
        return value


class RegionCompute(FrozenModel):
    """Where and how fast: changes results by rounding only."""

    workers: PositiveInt = 1
    """Workers that share each batch of one fold (gloo on CPUs, NCCL on GPUs)."""
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0.0
    """GPUs that each worker asks for; 0 trains on CPUs."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Retries of a fold of which a worker died."""
    checkpoint_s: Annotated[float, Field(ge=0)] = 60.0
    """Least time between two in-progress checkpoints of one network, in seconds; each writes 220 MB."""
    keep_models: Literal["final", "all"] = "final"
    """Networks that stand beside the regions (73 MB each); all of them stay in the folder of the region finder."""
    verbose: bool = True
    """Progress bars and a console line per finished fold."""

    @model_validator(mode="after")
    def _whole_gpus(self) -> Self:
        if self.workers > 1 and self.gpus_per_worker not in (0, 1):
            msg = f"several workers need one whole GPU each, or none; gpus_per_worker is {self.gpus_per_worker}"
            raise ValueError(msg)
        return self


class SegmentConfig(FrozenModel):
    """A whole region finder."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,40}$")]
    """Folder of its folds below ``paths.runs``."""
    statements: tuple[str, ...] = ()
    """Sentences that must stand at the top of the page."""
    paths: RegionPaths
    folds: RegionFolds
    recipe: RegionRecipe = RegionRecipe()
    compute: RegionCompute = RegionCompute()
