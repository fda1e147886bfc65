"""How often intervals of ROC-AUC hold the truth, and how often two areas are told apart: simulated studies.

Scores are normal in each class, so the true area is known. Sizes are the study's (102 symptomatic, 371 not), a fold's
or hold-out's (11, 42) and the thesis's test set (14, 39). A share of 2,000 simulations has a standard error of 0.005
at 0.95.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import binom, norm

from lbp_ray.intervals import (
    area_interval,
    compare_areas,
    cross_validation_inflation,
    difference_of,
    wilson_interval,
)
from lbp_ray.metrics import _weighted_roc_auc, patient_resamples, percentile_interval

if TYPE_CHECKING:
    from collections.abc import Iterator

SIMULATIONS = 2000
CROSS_VALIDATIONS = 1000
RESAMPLES = 2000
"""As `lbp_ray.study.EvaluationConfig`; drawn once per size, as a study of fixed seed draws them."""
LEVEL = 0.95
AREAS = (0.6, 0.75, 0.9)
SIZES = ((11, 42), (102, 371))
WITHIN = 0.8
"""Correlation of the slices of a patient, beyond the label."""
ALTERNATIVE = (0.67, 0.75)
"""Areas that the comparison should tell apart."""


def measure() -> Iterator[dict[str, object]]:
    """Yield coverage of intervals of areas and of shares, coverage by slices, level and power of the comparison."""
    for positives, negatives in SIZES:
        for area in AREAS:
            yield _coverage(area, positives, negatives)
    for positives, negatives in SIZES:
        for slices in (3, 5):
            yield _coverage_by_slices(slices, positives, negatives)
    for correlation in (0.5, 0.8):
        yield _comparison(correlation)
    for features, strength in ((60, 0.0), (200, 0.0), (60, 0.15)):
        yield _cross_validated(features, strength)
    for patients in (14, 102):
        for share in (0.15, 0.55, 0.8, 0.95):
            yield _coverage_of_shares(share, patients)


def _shift(area: float) -> float:
    """Distance of two normal classes of unit variance with this area between them."""
    return float(np.sqrt(2) * norm.ppf(area))


def _coverage(area: float, positives: int, negatives: int) -> dict[str, object]:
    chance = np.random.default_rng(0)
    labels, patients = np.repeat([1, 0], [positives, negatives]), np.arange(positives + negatives)
    weights = patient_resamples(patients, labels, resamples=RESAMPLES, seed=0)
    intervals: dict[str, list[tuple[float, float]]] = {"logit_delong": [], "plain_delong": [], "bootstrap": []}
    half_widths = norm.ppf((1 + LEVEL) / 2)
    for _ in range(SIMULATIONS):
        scores = chance.standard_normal(len(labels)) + labels * _shift(area)
        found = compare_areas(labels, scores[None], patients)
        half = half_widths * float(np.sqrt(found.covariance_KK[0, 0]))
        intervals["logit_delong"].append(area_interval(found, 0, level=LEVEL))
        intervals["plain_delong"].append((found.areas_K[0] - half, found.areas_K[0] + half))
        intervals["bootstrap"].append(percentile_interval(_weighted_roc_auc(labels, scores, weights), LEVEL))
    return {
        "figure": "coverage of 95 % intervals of ROC-AUC over patients",
        "area": area,
        "positives": positives,
        "negatives": negatives,
        **{method: _share_holding(area, made) for method, made in intervals.items()},
        "conditions": f"{SIMULATIONS} simulations, normal scores, bootstrap of {RESAMPLES} resamples by percentiles",
    }


def _share_holding(truth: float, intervals: list[tuple[float, float]]) -> float:
    low, high = np.array(intervals).T
    return float(((low <= truth) & (truth <= high)).mean())


def _coverage_by_slices(slices: int, positives: int, negatives: int) -> dict[str, object]:
    chance = np.random.default_rng(1)
    area, number = 0.75, positives + negatives
    labels = np.repeat([1, 0], [positives * slices, negatives * slices])
    owners = {"slices_as_if_independent": np.arange(number * slices), "patients": np.repeat(np.arange(number), slices)}
    intervals: dict[str, list[tuple[float, float]]] = {unit: [] for unit in owners}
    for _ in range(SIMULATIONS):
        common = np.repeat(chance.standard_normal(number), slices)
        noise = np.sqrt(WITHIN) * common + np.sqrt(1 - WITHIN) * chance.standard_normal(number * slices)
        for unit, of in owners.items():
            found = compare_areas(labels, (noise + labels * _shift(area))[None], of)
            intervals[unit].append(area_interval(found, 0, level=LEVEL))
    return {
        "figure": "coverage of 95 % intervals of slice-level ROC-AUC (logit DeLong)",
        "area": area,
        "slices": slices,
        "positives": positives,
        "negatives": negatives,
        **{unit: _share_holding(area, made) for unit, made in intervals.items()},
        "conditions": f"{SIMULATIONS} simulations, intra-class correlation {WITHIN}",
    }


def _comparison(correlation: float) -> dict[str, object]:
    none = (ALTERNATIVE[0], ALTERNATIVE[0])
    return {
        "figure": "how often two ROC-AUCs on the same studies are told apart at p <= 0.05 (paired DeLong)",
        "correlation": correlation,
        "no_difference_102_371": _told_apart(none, correlation, 102, 371),
        "no_difference_14_39": _told_apart(none, correlation, 14, 39),
        "power_102_371": _told_apart(ALTERNATIVE, correlation, 102, 371),
        "power_14_39": _told_apart(ALTERNATIVE, correlation, 14, 39),
        "conditions": f"{SIMULATIONS} simulations, areas {none} and {ALTERNATIVE}, correlation within each class",
    }


def _told_apart(areas: tuple[float, float], correlation: float, positives: int, negatives: int) -> float:
    chance = np.random.default_rng(2)
    labels, patients = np.repeat([1, 0], [positives, negatives]), np.arange(positives + negatives)
    shifts = np.array([_shift(area) for area in areas])
    told = 0
    for _ in range(SIMULATIONS):
        first, other = chance.standard_normal((2, len(labels)))
        noise = np.stack([first, correlation * first + np.sqrt(1 - correlation**2) * other])
        found = compare_areas(labels, noise + labels * shifts[:, None], patients)
        told += difference_of(found, 0, 1, level=LEVEL).p_value <= 1 - LEVEL
    return told / SIMULATIONS


def cross_validated(
    features_SD: np.ndarray, labels_S: np.ndarray, folds_S: np.ndarray, shift_D: np.ndarray
) -> tuple[np.ndarray, float]:
    """Score every patient by a ridge regression on the other folds; also return the mean true area of those models.

    Parameters
    ----------
    features_SD
        Independent and normal, of unit variance in each class.
    labels_S, folds_S
        0 or 1, and the fold of every patient.
    shift_D
        Distance of the classes in every feature.
    """
    scores, areas = np.empty(len(labels_S)), []
    for fold in np.unique(folds_S):
        rest = folds_S != fold
        known, told = features_SD[rest], labels_S[rest] - labels_S[rest].mean()
        size = known.shape[1]
        weights_D = np.linalg.solve(known.T @ known + size * np.eye(size), known.T @ told)
        scores[~rest] = features_SD[~rest] @ weights_D
        areas.append(norm.cdf(shift_D @ weights_D / np.linalg.norm(weights_D) / np.sqrt(2)))
    return scores, float(np.mean(areas))


def cross_validations(
    features: int, strength: float, *, simulations: int
) -> Iterator[tuple[np.ndarray, np.ndarray, float]]:
    """Yield labels, scores of two equally good views of the same patients (correlation 0.5), and the first's true area.

    Parameters
    ----------
    features
        Features of a view, all of which the classes differ in alike.
    strength
        By how much, in standard deviations; 0 leaves nothing to learn.
    simulations
        How many studies of 102 and 371 patients in 10 folds.
    """
    chance = np.random.default_rng(3)
    labels = np.repeat([1, 0], [102, 371])
    folds = np.concatenate([np.arange(102) % 10, np.arange(371) % 10])
    shift = np.full(features, strength)
    for _ in range(simulations):
        common, *own = chance.standard_normal((3, len(labels), features))
        views = [np.sqrt(0.5) * (common + part) + labels[:, None] * shift for part in own]
        scored = [cross_validated(view, labels, folds, shift) for view in views]
        yield labels, np.stack([scores for scores, _ in scored]), scored[0][1]


def _cross_validated(features: int, strength: float) -> dict[str, object]:
    inflations = {"as_one_model": 1.0, "widened": cross_validation_inflation(10)}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in inflations}
    truths, told = [], dict.fromkeys(inflations, 0)
    for labels, scores, truth in cross_validations(features, strength, simulations=CROSS_VALIDATIONS):
        truths.append(truth)
        for name, inflation in inflations.items():
            areas = compare_areas(labels, scores, np.arange(len(labels)), inflation=inflation)
            found[name].append(area_interval(areas, 0, level=LEVEL))
            told[name] += difference_of(areas, 0, 1, level=LEVEL).p_value <= 1 - LEVEL
    truth_of = np.array(truths)
    held = {
        name: (np.array(made)[:, 0] <= truth_of) & (truth_of <= np.array(made)[:, 1]) for name, made in found.items()
    }
    return {
        "figure": "cross-validated scores: coverage of 95 % intervals of ROC-AUC, and false claims of a difference",
        "features": features,
        "area_of_the_models": float(np.mean(truths)),
        **{f"coverage_{name}": float(values.mean()) for name, values in held.items()},
        **{f"told_apart_{name}": count / CROSS_VALIDATIONS for name, count in told.items()},
        "conditions": f"{CROSS_VALIDATIONS} simulated studies of 102 and 371 patients, 10 folds, ridge regression",
    }


def _coverage_of_shares(share: float, patients: int) -> dict[str, object]:
    """Exact, no simulation: every count of successes with its probability."""
    counts = np.arange(patients + 1)
    chances = binom.pmf(counts, patients, share)
    wilson = np.array([wilson_interval(int(count), patients, level=LEVEL) for count in counts])
    tails = [[(1 - LEVEL) / 2], [(1 + LEVEL) / 2]]
    bootstrap = np.asarray(binom.ppf(tails, patients, counts / patients)).T / patients
    return {
        "figure": "coverage of 95 % intervals of a share of patients (exact)",
        "share": share,
        "patients": patients,
        **{
            name: float(chances[(made[:, 0] <= share) & (share <= made[:, 1])].sum())
            for name, made in (("wilson", wilson), ("bootstrap", bootstrap))
        },
        "conditions": "independent patients; bootstrap of infinitely many resamples, by percentiles",
    }
