"""Does the frozen stage know more than chance? Its out-of-fold AUC against labels shuffled among patients.

All permutations are heads of one training run: one pass over the features serves them all. The same shuffles show what
a way of judging gives for nothing: balanced accuracy on labels that know nothing. Only the frozen stage is trained,
with one seed and heads of one logit.

Suffixes: N studies, S held-out studies of a fold, M slices, P permutations (the first column has the true labels).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from tqdm import tqdm

from lbp_ray.metrics import Counts, roc_auc, study_scores, threshold_metrics
from lbp_ray.nets.resnet import build_head
from lbp_ray.result import PermutationNull, ProtocolNull
from lbp_ray.samples import Samples, epoch_order, select_samples, some
from lbp_ray.splits import HOLDOUT
from lbp_ray.steps import adam, learning_rate, train_epoch

if TYPE_CHECKING:
    from lbp_ray.cell import TrialData
    from lbp_ray.study import Recipe

SCORED_AT_ONCE = 8192
"""Slices whose features are in memory while held-out studies are scored."""

PROTOCOLS = (
    ("fixed_epochs", "cross_fitted"),
    ("fixed_epochs", "same_fold"),
    ("same_fold", "cross_fitted"),
    ("same_fold", "same_fold"),
)
"""Ways of judging, as what chooses the epoch and what the threshold: honest, optimistic by either, as the Oulu thesis
did. Whatever a study is told, they take Youden's threshold of study scores and one epoch by `BestEpoch`."""


class FoldScores(NamedTuple):
    """One fold's held-out studies, scored by every head."""

    rows_S: np.ndarray
    last_SP: np.ndarray
    """After the last frozen epoch."""
    chosen_SP: np.ndarray
    """After the frozen epoch that each head's own fold would choose, by its shuffled labels."""


def permute_labels(
    labels_N: np.ndarray, patient_N: np.ndarray, folds_N: np.ndarray, *, count: int, seed: int
) -> np.ndarray:
    """Shuffle labels among patients who could have had each other's.

    A patient's labels travel together to a patient with as many exams; patients with one exam swap within their fold,
    so that the folds stay stratified.

    Parameters
    ----------
    labels_N, patient_N, folds_N
        Label, patient and fold of each study.
    count
        Number of permutations.
    seed
        Seed of the shuffles.

    Returns
    -------
    numpy.ndarray
        (N, count) labels.
    """
    generator = np.random.default_rng(seed)
    _, patient_of_N, exams = np.unique(patient_N, return_inverse=True, return_counts=True)
    order = np.argsort(patient_of_N, kind="stable")  # a patient's exams side by side
    first = np.cumsum(exams) - exams
    strata = np.stack([exams, np.where(exams == 1, folds_N[order[first]], HOLDOUT)], axis=1)
    keys, begins, stratum_P = np.unique(strata, axis=0, return_index=True, return_inverse=True)
    permuted = np.empty((len(labels_N), count), dtype=labels_N.dtype)
    for stratum in np.argsort(begins):
        rows = order[first[stratum_P.ravel() == stratum, None] + np.arange(keys[stratum, 0])]
        for column in range(count):
            permuted[rows, column] = labels_N[rows[generator.permutation(len(rows))]]
    return permuted


def permutation_null(
    data: TrialData,
    *,
    recipe: Recipe,
    num_slices: int,
    count: int,
    seed: int,
    progress: bool = True,
) -> PermutationNull:
    """Train the frozen stage's heads with true and with shuffled labels over all folds.

    Parameters
    ----------
    data
        The study's shared data, with features.
    recipe
        Its frozen stage is what is tested, by its last epoch; epochs are chosen for `PermutationNull.balanced_accuracy`
        alone, whatever the recipe selects by.
    num_slices
        Slice count.
    count
        Number of permutations.
    seed
        Seed of the shuffles and of the heads.
    progress
        Show a progress bar.

    Returns
    -------
    PermutationNull
        With p = (1 + permutations at least as good) / (1 + permutations).
    """
    inside = data.folds_N != HOLDOUT
    labels_NP = np.zeros((len(data.labels_N), count + 1), dtype=np.float32)
    labels_NP[inside, 0] = data.labels_N[inside]
    patient_N = np.array(data.patient_ids)
    labels_NP[inside, 1:] = permute_labels(
        data.labels_N[inside], patient_N[inside], data.folds_N[inside], count=count, seed=seed
    )
    last_NP, chosen_NP = np.zeros_like(labels_NP), np.zeros_like(labels_NP)
    folds = np.unique(data.folds_N[inside])
    for fold in tqdm(folds, desc=f"permutations k{num_slices}", unit="fold", disable=not progress):
        found = _fold_scores(data, torch.from_numpy(labels_NP), int(fold), recipe=recipe, k=num_slices)
        last_NP[found.rows_S], chosen_NP[found.rows_S] = found.last_SP, found.chosen_SP
    areas = [roc_auc(labels_NP[inside, column], last_NP[inside, column]) for column in range(count + 1)]
    observed, null = areas[0], np.array(areas[1:])
    return PermutationNull(
        num_permutations=count,
        observed=observed,
        mean=float(null.mean()),
        sd=_deviation(null),
        p_value=float((1 + (null >= observed).sum()) / (1 + count)),
        null=tuple(null.tolist()),
        balanced_accuracy=_protocol_nulls(
            labels_NP[inside, 1:], last_NP[inside, 1:], chosen_NP[inside, 1:], data.folds_N[inside]
        ),
    )


def _deviation(values: np.ndarray) -> float:
    """Sample standard deviation; 0 of a single value."""
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def _fold_scores(data: TrialData, labels_NP: torch.Tensor, fold: int, *, recipe: Recipe, k: int) -> FoldScores:
    assert data.features_NKF is not None
    features_NKF = data.features_NKF
    train = select_samples(data, np.flatnonzero((data.folds_N != HOLDOUT) & (data.folds_N != fold)), k)
    held_out = select_samples(data, np.flatnonzero(data.folds_N == fold), k)
    head = build_head(seed=0, num_outputs=labels_NP.shape[1])
    optimiser = adam(list(head.parameters()), recipe)
    best = BestEpoch(labels_NP[np.unique(held_out.study_M)].numpy())

    def score(batch: Samples) -> torch.Tensor:
        logits_BP: torch.Tensor = head(features_NKF[torch.from_numpy(batch.study_M), torch.from_numpy(batch.offset_M)])
        return logits_BP

    for epoch in range(1, recipe.frozen_epochs + 1):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(recipe, epoch)
        order = epoch_order(recipe, data.crop_row_N[train.study_M], seed=0, epoch=epoch)
        train_epoch(score, optimiser, train, targets_NP=labels_NP, order=order, batch_size=recipe.batch_size)
        with torch.no_grad():
            starts = range(0, held_out.size, SCORED_AT_ONCE)
            logits_MP = torch.cat([score(some(held_out, slice(m, m + SCORED_AT_ONCE))) for m in starts]).double()
        targets_MP = labels_NP[torch.from_numpy(held_out.study_M)].double()
        loss_P = binary_cross_entropy_with_logits(logits_MP, targets_MP, reduction="none").mean(0).numpy()
        rows_S, scores_SP = _study_scores(held_out.study_M, torch.sigmoid(logits_MP).numpy(), recipe)
        best.see(scores_SP, loss_P)
    return FoldScores(rows_S, scores_SP, best.chosen_SP)


def _study_scores(study_M: np.ndarray, probability_MP: np.ndarray, recipe: Recipe) -> tuple[np.ndarray, np.ndarray]:
    """Aggregate the slices of every head at once: to the study rule, a study judged by another head is another one."""
    rows_S, study_of_M = np.unique(study_M, return_inverse=True)
    heads = np.arange(probability_MP.shape[1])
    keys_MP = heads * len(rows_S) + study_of_M[:, None]
    _, scores = study_scores(keys_MP.ravel(), probability_MP.ravel(), rule=recipe.study_rule, k=recipe.study_rule_k)
    return rows_S, scores.reshape(len(heads), len(rows_S)).T.astype(np.float32)


class BestEpoch:
    """The epoch that a fold chooses for every head, kept while epochs pass: its scores, no list of all epochs.

    Of the epochs up to the first of lowest loss, that of the largest MCC at its own Youden threshold; ties go to the
    later one, as in `lbp_ray.selection.chosen_epochs`.

    Parameters
    ----------
    labels_SP
        Labels of the fold's studies, for every head.
    """

    def __init__(self, labels_SP: np.ndarray) -> None:
        self.labels_SP = labels_SP
        self.chosen_SP = np.zeros(labels_SP.shape, dtype=np.float32)
        self._candidate_SP = self.chosen_SP.copy()
        self._mcc_P = np.full(labels_SP.shape[1], -np.inf)
        self._lowest_P = np.full(labels_SP.shape[1], np.inf)

    def see(self, scores_SP: np.ndarray, loss_P: np.ndarray) -> None:
        """Take in the next epoch's study scores and losses over slices."""
        decisions_SP = scores_SP >= youden_thresholds(self.labels_SP, scores_SP)
        mcc_P = np.round(threshold_metrics(_counts(self.labels_SP, decisions_SP))["mcc"], 12)
        better = mcc_P >= self._mcc_P
        self._mcc_P[better], self._candidate_SP[:, better] = mcc_P[better], scores_SP[:, better]
        lower = loss_P < self._lowest_P
        self._lowest_P[lower], self.chosen_SP[:, lower] = loss_P[lower], self._candidate_SP[:, lower]


def youden_thresholds(labels_SP: np.ndarray, scores_SP: np.ndarray) -> np.ndarray:
    """Return the Youden threshold of every column, as `lbp_ray.metrics.fit_threshold` does of one.

    Parameters
    ----------
    labels_SP, scores_SP
        0 or 1, and scores. A column without positives calls none positive, one without negatives all.

    Returns
    -------
    numpy.ndarray
        (P,) thresholds; positive is a score at or above.
    """
    order = np.argsort(-scores_SP, axis=0, kind="stable")
    falling_SP = np.take_along_axis(scores_SP, order, axis=0)
    positive_SP = np.take_along_axis(labels_SP, order, axis=0) == 1
    recall, false_positive_rate = (
        np.cumsum(chosen, axis=0) / np.maximum(chosen.sum(axis=0), 1) for chosen in (positive_SP, ~positive_SP)
    )
    merit_SP = np.round(recall - false_positive_rate, 12)
    merit_SP[:-1][falling_SP[1:] == falling_SP[:-1]] = -np.inf  # no threshold parts equal scores
    best_P, columns = merit_SP.argmax(axis=0), np.arange(scores_SP.shape[1])
    return np.asarray(
        np.where(merit_SP[best_P, columns] > 0, falling_SP[best_P, columns], np.nextafter(falling_SP[0], np.inf))
    )


def _counts(labels_SP: np.ndarray, decisions_SP: np.ndarray) -> Counts:
    positive_SP = labels_SP == 1
    return Counts(
        tp=(positive_SP & decisions_SP).sum(axis=0),
        fp=(~positive_SP & decisions_SP).sum(axis=0),
        fn=(positive_SP & ~decisions_SP).sum(axis=0),
        tn=(~positive_SP & ~decisions_SP).sum(axis=0),
    )


def _protocol_nulls(
    labels_NP: np.ndarray, last_NP: np.ndarray, chosen_NP: np.ndarray, folds_N: np.ndarray
) -> tuple[ProtocolNull, ...]:
    """Judge the shuffled labels' scores in each of `PROTOCOLS`; decisions are pooled over folds."""
    nulls = []
    for selection, source in PROTOCOLS:
        scores_NP = last_NP if selection == "fixed_epochs" else chosen_NP
        decisions_NP = np.zeros(labels_NP.shape, dtype=bool)
        for fold in np.unique(folds_N):
            judged = folds_N == fold
            fitted = judged if source == "same_fold" else ~judged
            decisions_NP[judged] = scores_NP[judged] >= youden_thresholds(labels_NP[fitted], scores_NP[fitted])
        values_P = threshold_metrics(_counts(labels_NP, decisions_NP))["balanced_accuracy"]
        nulls.append(
            ProtocolNull(
                selection=selection, threshold_source=source, mean=float(values_P.mean()), sd=_deviation(values_P)
            )
        )
    return tuple(nulls)
