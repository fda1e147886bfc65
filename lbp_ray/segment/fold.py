"""One network of a region finder: trained to the end, resumable, committed in one rename. Knows nothing of Ray."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from lbp_ray.nets.unet import build_unet
from lbp_ray.segment.loop import EpochRecord, Schedule, Training, rank_and_world
from lbp_ray.segment.loss import dice_per_image, loss_per_image
from lbp_ray.segment.network import APART, SegmentError
from lbp_ray.segment.samples import Pose, TrainingSet, draw_poses, turn
from lbp_ray.trial import environment
from preprocess.commit import committed_directory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

    from lbp_ray.segment.config import LossName, RegionRecipe
    from lbp_ray.segment.network import FoldPlace, FoldSpec


@dataclass(frozen=True)
class LumbarTask:
    """The lumbar region of annotated slices: what the shared loop trains the U-Net for."""

    data: TrainingSet
    training_rows: np.ndarray
    validation_rows: np.ndarray
    loss_name: LossName
    flip_share: float
    rotation_deg: float
    seed: int
    device: str = "cpu"
    """Where batches are standardised and turned: the network's device."""

    @property
    def size(self) -> int:
        """Number of training slices."""
        return len(self.training_rows)

    @property
    def validation_size(self) -> int:
        """Number of slices of the fold that is left out."""
        return len(self.validation_rows)

    def training_batch(self, samples_B: np.ndarray, epoch: int) -> tuple[Tensor, Tensor]:
        """Return slices and masks, turned."""
        poses = draw_poses(
            seed=self.seed, epoch=epoch, size=self.size, flip_share=self.flip_share, rotation_deg=self.rotation_deg
        )
        pose = Pose(*(values[samples_B] for values in poses))
        images, masks = self.data.batch(self.training_rows[samples_B], self.device)
        return turn(images, pose).contiguous(memory_format=torch.channels_last), (turn(masks, pose) >= 0.5).float()

    def validation_batch(self, samples_B: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return slices and masks as they are."""
        return self.data.batch(self.validation_rows[samples_B], self.device)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the recipe's loss of every slice."""
        return loss_per_image(outputs, targets, name=self.loss_name)

    def dice(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the Dice coefficient of every slice."""
        return dice_per_image(outputs, targets)


def lumbar_task(folder: Path, fold: int, recipe: RegionRecipe, *, device: str = "cpu") -> LumbarTask:
    """Choose the slices that one network is trained and looked at on.

    Parameters
    ----------
    folder
        Committed training set.
    fold
        Left out for validation; `lbp_ray.segment.network.FINAL` leaves out none.
    recipe
        Loss, poses and seed.
    device
        Torch device of this worker.
    """
    slices = pd.read_parquet(folder / "slices.parquet")
    return LumbarTask(
        data=TrainingSet.open(folder),
        training_rows=np.flatnonzero((slices["fold"] != fold) & (slices["fold"] != APART)),
        validation_rows=np.flatnonzero(slices["fold"] == fold),
        loss_name=recipe.loss,
        flip_share=recipe.flip_share,
        rotation_deg=recipe.rotation_deg,
        seed=recipe.seed,
        device=device,
    )


def schedule_of(recipe: RegionRecipe) -> Schedule:
    """Return the part of a recipe that the shared loop reads."""
    return Schedule(
        epochs=recipe.epochs,
        learning_rate=recipe.learning_rate,
        drops=recipe.learning_rate_drops,
        weight_decay=recipe.weight_decay,
        batch_size=recipe.batch_size,
        bfloat16=recipe.dtype == "bfloat16",
        seed=recipe.seed,
    )


def train_fold(
    spec: FoldSpec, folder: Path, place: FoldPlace, *, checkpoint_s: float, device: str = "cpu"
) -> Iterator[EpochRecord]:
    """Train one network, yield its learning curve and commit it; the first of several workers writes.

    Parameters
    ----------
    spec
        What to train.
    folder
        Committed training set.
    place
        Where to write. A committed network is left as it is and its curve is yielded again.
    checkpoint_s
        Least time between two checkpoints, in seconds.
    device
        Torch device of this worker.

    Yields
    ------
    EpochRecord
        After each epoch, those of a resumed checkpoint included.

    Raises
    ------
    SegmentError
        If a loss is not finite or the slices are too few.
    """
    if place.final.is_dir():
        place.checkpoint.unlink(missing_ok=True)  # left by a kill right after the commit
        yield from (EpochRecord(**row) for row in json.loads((place.final / "history.json").read_text()))
        return
    rank, world = rank_and_world()
    if world != spec.workers:
        msg = f"{spec.name} was planned for {spec.workers} worker(s), {world} run(s)"
        raise SegmentError(msg)
    torch.set_num_threads(spec.recipe.threads)
    network = build_unet(None, seed=spec.recipe.seed)
    network.load_state_dict(torch.load(folder / "initial.pt", map_location="cpu", weights_only=True))
    task = lumbar_task(folder, spec.fold, spec.recipe, device=device)
    training = Training(network, task, schedule_of(spec.recipe), device=device)
    yield from training.epochs(place.checkpoint, checkpoint_s=checkpoint_s)
    if rank == 0:
        commit_network(training, spec, place)


def commit_network(training: Training, spec: FoldSpec, place: FoldPlace) -> None:
    """Write a trained network with its learning curve, and drop its checkpoint."""
    with committed_directory(place.final, point="network") as partial:
        buffer = io.BytesIO()
        torch.save({name: value.cpu() for name, value in training.network.state_dict().items()}, buffer)
        (partial / "model.pt").write_bytes(buffer.getvalue())
        (partial / "history.json").write_text(json.dumps([asdict(record) for record in training.history], indent=1))
        record = {
            "fold_id": spec.fold_id,
            "spec": spec.model_dump(mode="json"),
            "environment": environment(training.device),
        }
        (partial / "network.json").write_text(json.dumps(record, indent=1))
    place.checkpoint.unlink(missing_ok=True)
