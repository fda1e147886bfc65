"""Does the frozen stage know more than chance? Its out-of-fold AUC against labels shuffled among patients.

All permutations are heads of one training run: one pass over the features serves them all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

from lbp_ray.metrics import roc_auc, study_scores
from lbp_ray.nets.resnet import build_head
from lbp_ray.result import PermutationNull
from lbp_ray.splits import HOLDOUT
from lbp_ray.training import Samples, adam, batch_order, learning_rate, select_samples, train_epoch

if TYPE_CHECKING:
    from lbp_ray.cell import TrialData
    from lbp_ray.study import Recipe


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
    patients, first, exams = np.unique(patient_N, return_index=True, return_counts=True)
    strata: dict[tuple[int, int], list[np.ndarray]] = {}
    for patient, start, number in zip(patients, first, exams, strict=True):
        key = (int(number), int(folds_N[start]) if number == 1 else HOLDOUT)
        strata.setdefault(key, []).append(np.flatnonzero(patient_N == patient))
    permuted = np.empty((len(labels_N), count), dtype=labels_N.dtype)
    for members in strata.values():
        rows = np.stack(members)
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
        Its frozen stage is what is tested.
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
    scores_NP = np.zeros_like(labels_NP)
    folds = np.unique(data.folds_N[inside])
    for fold in tqdm(folds, desc=f"permutations k{num_slices}", unit="fold", disable=not progress):
        rows, fold_scores = _fold_scores(data, torch.from_numpy(labels_NP), int(fold), recipe=recipe, k=num_slices)
        scores_NP[rows] = fold_scores
    areas = [roc_auc(labels_NP[inside, column], scores_NP[inside, column]) for column in range(count + 1)]
    observed, null = areas[0], np.array(areas[1:])
    return PermutationNull(
        num_permutations=count,
        observed=observed,
        mean=float(null.mean()),
        sd=float(null.std(ddof=1)),
        p_value=float((1 + (null >= observed).sum()) / (1 + count)),
        null=tuple(null.tolist()),
    )


def _fold_scores(
    data: TrialData, labels_NP: torch.Tensor, fold: int, *, recipe: Recipe, k: int
) -> tuple[np.ndarray, np.ndarray]:
    assert data.features_NKF is not None
    features_NKF = data.features_NKF
    train = select_samples(data, np.flatnonzero((data.folds_N != HOLDOUT) & (data.folds_N != fold)), k)
    held_out = select_samples(data, np.flatnonzero(data.folds_N == fold), k)
    head = build_head(seed=0, num_outputs=labels_NP.shape[1])
    optimiser = adam(list(head.parameters()), recipe)

    def score(batch: Samples) -> torch.Tensor:
        logits_BP: torch.Tensor = head(features_NKF[torch.from_numpy(batch.study_M), torch.from_numpy(batch.offset_M)])
        return logits_BP

    for epoch in range(1, recipe.frozen_epochs + 1):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(recipe, epoch)
        order = batch_order(seed=0, epoch=epoch, size=train.size)
        train_epoch(score, optimiser, train, targets_NP=labels_NP, order=order, batch_size=recipe.batch_size)
    with torch.no_grad():
        probability_MP = torch.sigmoid(score(held_out).double()).numpy()
    columns = [study_scores(held_out.study_M, column, rule=recipe.study_rule) for column in probability_MP.T]
    return columns[0][0], np.stack([scores for _, scores in columns], axis=1)
