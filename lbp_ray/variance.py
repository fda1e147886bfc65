"""How much the area under the ROC curve moves with other patients, between folds, and with another training seed.

Suffixes: S studies, R seeds, F folds.
"""

from __future__ import annotations

import numpy as np

from lbp_ray.intervals import compare_areas
from lbp_ray.result import VarianceSplit


def split_variance(
    labels_S: np.ndarray, scores_RS: np.ndarray, patients_S: np.ndarray, folds_S: np.ndarray
) -> VarianceSplit:
    """Split the variation of the out-of-fold ROC-AUC by its source.

    Parameters
    ----------
    labels_S, patients_S, folds_S
        Label, patient and fold of every study.
    scores_RS
        Out-of-fold score of every study by every seed.

    Notes
    -----
    The three are not parts of one sum. Patients: DeLong's standard deviation of the pooled area of the seed-averaged
    scores. Seeds: sample standard deviation of the seeds' pooled areas. Folds: method of moments; the variance between
    the folds' areas less the mean of their own DeLong variances, which is what a fold's few patients explain, and 0
    where nothing is left. Folds with a single patient of a class have no variance of their own and are left out.

    References
    ----------
    Hedges and Olkin, Statistical Methods for Meta-Analysis (1985), chapter 9: the unweighted moment estimator. It is
    preferred to DerSimonian and Laird's, whose weights break down in a fold that is separated perfectly.
    """
    mean_S = scores_RS.mean(axis=0)
    pooled = compare_areas(labels_S, np.vstack([mean_S, scores_RS]), patients_S)
    seed_areas_R = pooled.areas_K[1:]
    return VarianceSplit(
        patient_sd=_root(pooled.covariance_KK[0, 0]),
        fold_sd=_fold_deviation(labels_S, mean_S, patients_S, folds_S),
        seed_sd=float(seed_areas_R.std(ddof=1)) if len(seed_areas_R) > 1 else None,
    )


def _fold_deviation(labels_S: np.ndarray, scores_S: np.ndarray, patients_S: np.ndarray, folds_S: np.ndarray) -> float:
    inside = (folds_S == fold for fold in np.unique(folds_S))
    folds = [compare_areas(labels_S[of], scores_S[of][None], patients_S[of]) for of in inside]
    sized = [fold for fold in folds if fold.smaller_class > 1]
    if len(sized) < 2:
        return 0.0
    areas_F = np.array([fold.areas_K[0] for fold in sized])
    own_F = np.array([fold.covariance_KK[0, 0] for fold in sized])
    return _root(areas_F.var(ddof=1) - own_F.mean())


def _root(variance: float) -> float:
    return float(np.sqrt(max(variance, 0.0)))
