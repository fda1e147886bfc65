"""How sure an area under the ROC curve is, and whether two of them differ on the same exams.

Uncertainty is over patients, conditional on the trained models. Suffixes: S studies, P positive studies, N negative
studies, C patients, K sets of scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.stats import beta, norm, rankdata

from lbp_ray.metrics import check_scores

if TYPE_CHECKING:
    from collections.abc import Sequence

NO_SPREAD = 1e-7
"""Standard deviation of an area, and difference of two, that is rounding error: one pair of exams moves more."""


@dataclass(frozen=True)
class Areas:
    """Areas under the ROC curves of K sets of scores on the same studies, and their covariance over patients."""

    areas_K: np.ndarray
    covariance_KK: np.ndarray
    smaller_class: int
    """Patients of the class that has fewer."""


class Difference(NamedTuple):
    """Two areas on the same studies, compared."""

    difference: float
    """First minus second."""
    low: float
    high: float
    p_value: float
    """Two-sided, of no difference."""


def compare_areas(labels_S: np.ndarray, scores_KS: np.ndarray, patients_S: np.ndarray) -> Areas:
    """Compute areas under ROC curves and how they vary together over patients.

    With one study per patient this is DeLong's covariance; with several, studies of a patient count as a cluster.

    Parameters
    ----------
    labels_S
        0 or 1, both present.
    scores_KS
        K scores of every study; higher means positive.
    patients_S
        Patient of every study.

    Raises
    ------
    lbp_ray.metrics.MetricError
        If a score is not finite or a class is missing.

    References
    ----------
    DeLong, DeLong and Clarke-Pearson, Biometrics 44 (1988); Obuchowski, Biometrics 53 (1997) for clusters.
    """
    for scores in scores_KS:
        check_scores(labels_S, scores)
    positive = labels_S == 1
    above_KP, below_KN = zip(*(_placements(scores[positive], scores[~positive]) for scores in scores_KS), strict=True)
    areas_K = np.array([placements.mean() for placements in above_KP])
    _, patient_S = np.unique(patients_S, return_inverse=True)
    sums_KC = _cluster_sums(np.array(above_KP) - areas_K[:, None], patient_S[positive], patient_S.max() + 1)
    other_KC = _cluster_sums(np.array(below_KN) - areas_K[:, None], patient_S[~positive], patient_S.max() + 1)
    sums_KC, other_KC = sums_KC / positive.sum(), other_KC / (~positive).sum()
    first = _correction(patient_S[positive]) * sums_KC @ sums_KC.T
    second = _correction(patient_S[~positive]) * other_KC @ other_KC.T
    both = _correction(patient_S) * sums_KC @ other_KC.T
    smaller = min(len(np.unique(patient_S[chosen])) for chosen in (positive, ~positive))
    return Areas(areas_K, first + second + both + both.T, smaller)


def _placements(scores_P: np.ndarray, scores_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of the other class that each study beats (ties count one half), for positives and for negatives."""
    ranks = rankdata(np.concatenate([scores_P, scores_N]))
    above_P = (ranks[: len(scores_P)] - rankdata(scores_P)) / len(scores_N)
    below_N = 1 - (ranks[len(scores_P) :] - rankdata(scores_N)) / len(scores_P)
    return above_P, below_N


def _cluster_sums(values_KM: np.ndarray, patient_M: np.ndarray, num_patients: int) -> np.ndarray:
    return np.array([np.bincount(patient_M, values, minlength=num_patients) for values in values_KM])


def _correction(patient_M: np.ndarray) -> float:
    count = len(np.unique(patient_M))
    return count / (count - 1) if count > 1 else 1.0


def area_interval(areas: Areas, row: int, *, level: float) -> tuple[float, float]:
    """Return the interval of one area, made on the logit scale so that it stays between 0 and 1.

    Parameters
    ----------
    areas
        From `compare_areas`.
    row
        Which set of scores.
    level
        Nominal coverage, e.g. 0.95.

    Notes
    -----
    An area that does not vary is not known for certain: perfect or constant scores have no variance. Its interval is
    then that of a share of the patients of the smaller class, by Clopper and Pearson, which errs on the wide side: the
    low end of the area rounded down to whole patients, the high end of the area rounded up.

    References
    ----------
    Pepe, The Statistical Evaluation of Medical Tests (2003), section 5.2: intervals for the AUC by its logit.
    Clopper and Pearson, Biometrika 26 (1934).
    """
    area = float(areas.areas_K[row])
    spread = _deviation(areas.covariance_KK[row, row])
    if spread <= NO_SPREAD:
        return _share_interval(area, areas.smaller_class, level=level)
    half = norm.ppf((1 + level) / 2) * spread / (area * (1 - area))
    logit = np.log(area / (1 - area))
    low, high = 1 / (1 + np.exp(-(logit - half))), 1 / (1 + np.exp(-(logit + half)))
    return float(low), float(high)


def _deviation(variance: float) -> float:
    """Return the standard deviation; a variance over clusters may come out below 0."""
    return float(np.sqrt(max(variance, 0.0)))


def _share_interval(share: float, patients: int, *, level: float) -> tuple[float, float]:
    tail = (1 - level) / 2
    fewest, most = np.floor(share * patients), np.ceil(share * patients)
    low = float(beta.ppf(tail, fewest, patients - fewest + 1)) if fewest > 0 else 0.0
    high = float(beta.ppf(1 - tail, most + 1, patients - most)) if most < patients else 1.0
    return low, high


def difference_of(areas: Areas, first: int, second: int, *, level: float) -> Difference:
    """Compare two areas on the same studies.

    Parameters
    ----------
    areas
        From `compare_areas`.
    first, second
        Which sets of scores.
    level
        Nominal coverage of the interval.

    Notes
    -----
    Where neither area varies (perfect or constant scores), or two that differ vary as one, nothing tells how far the
    difference would be another one on other patients. It is then not estimable: the interval is -1 to 1, the p-value 1.
    """
    difference = float(areas.areas_K[first] - areas.areas_K[second])
    covariance = areas.covariance_KK
    variance = covariance[first, first] + covariance[second, second] - 2 * covariance[first, second]
    spread = _deviation(variance)
    if spread <= NO_SPREAD:
        same = abs(difference) <= NO_SPREAD < _deviation(covariance[first, first])
        return Difference(difference, *((difference, difference) if same else (-1.0, 1.0)), p_value=1.0)
    half = float(norm.ppf((1 + level) / 2)) * spread
    return Difference(difference, difference - half, difference + half, float(2 * norm.sf(abs(difference) / spread)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values of several comparisons, so that the chance of any false claim stays at the level.

    References
    ----------
    Holm, Scandinavian Journal of Statistics 6 (1979).
    """
    order = np.argsort(p_values, kind="stable")
    steps = np.asarray(p_values)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return [float(value) for value in adjusted]
