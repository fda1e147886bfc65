"""Which epoch of a trial scores: decided from its learning curve alone, so that a run and its resumption agree."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from lbp_ray.metrics import confusion, fit_threshold, threshold_metrics

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lbp_ray.study import Recipe

Stage = Literal["frozen", "unfrozen"]


class EpochRecord(NamedTuple):
    """One line of a learning curve."""

    epoch: int
    """Counted from 1 over both stages."""
    stage: Stage
    learning_rate: float
    train_loss: float
    """Mean over the epoch's samples, while training."""
    validation_loss: float
    """Mean over the slices of the evaluated fold: for looking, unless the recipe selects on the same fold."""
    validation_auc: float
    """Study-level ROC-AUC on the evaluated fold."""
    selection_loss: float | None = None
    """Mean over the slices that select; None with fixed epochs."""
    selection_mcc: float | None = None
    """Study-level MCC of what selects, at its own Youden threshold at this epoch."""


def chosen_epochs(history: Sequence[EpochRecord], recipe: Recipe) -> list[int]:
    """Return the epochs whose networks score, the best first.

    Parameters
    ----------
    history
        All epochs of a trial, in order.
    recipe
        ``fixed_epochs`` takes the last one; ``min_loss`` the lowest losses, ties going to the earlier epoch;
        ``best_mcc`` the largest MCC among the epochs up to the first of lowest loss, ties going to the later one.
        ``checkpoint_top_k`` says how many.

    References
    ----------
    Oulu thesis, section 3.4.2: "the best five MCC results before the minimum loss epoch was saved each time", read as
    one checkpoint per seed, that epoch included.
    """
    if recipe.selection == "fixed_epochs":
        return [history[-1].epoch]
    if recipe.checkpoint == "min_loss":
        return _best(history, recipe)
    lowest = min(history, key=lambda record: (record.selection_loss, record.epoch))
    return _best([record for record in history if record.epoch <= lowest.epoch], recipe)


def epochs_to_keep(history: Sequence[EpochRecord], recipe: Recipe) -> set[int]:
    """Return the epochs so far that may be chosen in the end, wherever the lowest loss will come to lie."""
    return {*chosen_epochs(history, recipe), *_best(history, recipe)}


def _best(history: Sequence[EpochRecord], recipe: Recipe) -> list[int]:
    def merit(record: EpochRecord) -> tuple[float, int]:
        assert record.selection_loss is not None
        assert record.selection_mcc is not None
        if recipe.checkpoint == "min_loss":
            return (-record.selection_loss, -record.epoch)
        return (record.selection_mcc, record.epoch)

    ranked = sorted(history, key=merit, reverse=True)
    return [record.epoch for record in ranked[: recipe.checkpoint_top_k]]


def has_stalled(history: Sequence[EpochRecord], patience: int | None) -> bool:
    """Say whether the unfrozen epochs have gone `patience` epochs without a lower loss on what selects."""
    unfrozen = [record.selection_loss for record in history if record.stage == "unfrozen"]
    if patience is None or len(unfrozen) <= patience:
        return False
    losses = np.array(unfrozen, dtype=float)
    return bool(losses[-patience:].min() >= losses[:-patience].min())


def draw_inner(patients_S: np.ndarray, labels_S: np.ndarray, *, fraction: float, seed: tuple[int, ...]) -> np.ndarray:
    """Draw patients whose studies choose an epoch instead of training it, stratified by label.

    Parameters
    ----------
    patients_S, labels_S
        Patient and label of each training study; a patient is positive if any study is.
    fraction
        Share of each class's patients, rounded up; of every class one at least stays in training.
    seed
        What the draw depends on.

    Returns
    -------
    numpy.ndarray
        (S,) bool: studies of the drawn patients.
    """
    patients, patient_S = np.unique(patients_S, return_inverse=True)
    positive = np.bincount(patient_S, labels_S) > 0
    generator = np.random.default_rng(seed)
    drawn = np.zeros(len(patients), dtype=bool)
    for members in (np.flatnonzero(~positive), np.flatnonzero(positive)):
        size = min(int(np.ceil(fraction * len(members))), len(members) - 1)
        drawn[generator.permutation(members)[: max(size, 0)]] = True
    return drawn[patient_S]


def mcc_at_youden(labels_S: np.ndarray, scores_S: np.ndarray) -> float:
    """Return the MCC of decisions at the Youden threshold of the same scores."""
    decisions_S = (scores_S >= fit_threshold(labels_S, scores_S)).astype(int)
    return float(threshold_metrics(confusion(labels_S, decisions_S))["mcc"][0])
