"""Patients, grades and labels: who has pain, and how well anyone could tell from the grades.

Grades come from correlated latent wear. A logistic model on the grades gives each exam its probability of pain, so the
best possible score is known. Exactly the wanted number of positives is drawn from that model *conditional on their
number* (each set of positives in proportion to its likelihood), which leaves the grades, and the ranking by
probability, as they were: the AUC that the probabilities realise on a cohort bounds what the grades can tell about it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit
from scipy.stats import norm, rankdata

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lbp_ray.phantom.config import CohortSection

    Array = NDArray[np.float64]
    Grades = NDArray[np.int64]

OULU_PFIRRMANN = np.array(
    [
        [2, 0, 454, 58, 11, 1],
        [2, 0, 412, 91, 20, 1],
        [2, 1, 332, 131, 55, 5],
        [2, 1, 180, 161, 153, 29],
        [2, 0, 151, 126, 184, 63],
    ]
)
"""Exams per level (L1–L2 … L5–S1) and Pfirrmann grade 0–5 in the Oulu study; grade 0 is two ungraded subjects."""

OULU_MODIC = np.array([[508, 7, 11, 0], [507, 9, 9, 1], [485, 14, 25, 2], [421, 20, 65, 20], [371, 31, 92, 32]])
"""Exams per level and Modic type 0–3 in the Oulu study."""

SPREAD_PFIRRMANN = np.array(
    [
        [0, 24, 36, 12, 18, 10],
        [0, 22, 36, 12, 19, 11],
        [0, 20, 35, 12, 20, 13],
        [0, 18, 33, 12, 22, 15],
        [0, 18, 31, 13, 22, 16],
    ]
)
SPREAD_MODIC = np.array([[64, 10, 20, 6], [62, 11, 21, 6], [60, 11, 22, 7], [56, 12, 25, 7], [54, 13, 25, 8]])
"""Shares (per cent) of a cohort in which healthy and worn spines are both common."""

MODIC_LOADING = 0.75
"""Correlation of latent endplate change with the wear of the disc beside it."""

MODIC_SEVERITY = np.array([0.0, 1.0, 0.8, 0.5])
"""Weight of each Modic type in the pain model, in units of four Pfirrmann grades."""

_POOL = 20_000


@dataclass(frozen=True)
class Exams:
    """The exams of a cohort, analysed ones first.

    ``patient`` numbers each exam's patient; ``pfirrmann`` and ``modic`` are (exams, 5); ``label`` is 1, 0 or −1 for
    exams outside the binary task; ``probability`` is P(pain | grades).
    """

    patient: NDArray[np.int64]
    pfirrmann: Grades
    modic: Grades
    label: NDArray[np.int64]
    probability: Array
    strength: float
    expected_auc: float

    @property
    def realised_auc(self) -> float:
        """ROC-AUC of the true probabilities on this cohort's labels."""
        task = self.label >= 0
        return roc_auc(self.label[task], self.probability[task])


def draw_exams(section: CohortSection, seed: np.random.SeedSequence) -> Exams:
    """Draw patients, grades and labels.

    Parameters
    ----------
    section
        Sizes, marginal grades, correlations and the wanted Bayes AUC.
    seed
        Seed; patients, wear, labels and the calibration pool use streams of their own.

    Returns
    -------
    Exams
        ``section.studies`` analysed exams with ``section.positives`` positives, then the imaged excluded ones.
    """
    structure, wear, labels, pool = (np.random.default_rng(child) for child in seed.spawn(4))
    analysed, excluded = section.studies, section.excluded_imaged
    patient = np.concatenate(
        [_patients(structure, analysed, section.exams_per_patient), analysed + np.arange(excluded)]
    )
    latent = _latent(wear, patient, section)
    grader = _Grader(section.grades)
    graded = [
        grader(part, wear, exact=section.grades == "oulu" and k == 0)
        for k, part in enumerate((tuple(x[:analysed] for x in latent), tuple(x[analysed:] for x in latent)))
    ]
    pfirrmann, modic = (np.concatenate(parts) for parts in zip(*graded, strict=True))
    reference = severity(*grader(_latent(pool, np.arange(_POOL), section), pool, exact=False))
    strength, intercept, expected = calibrate(reference, section.positives / analysed, section.bayes_auc)
    logit = strength * (severity(pfirrmann, modic) - reference.mean()) / reference.std() + intercept
    probability = expit(logit)
    label = np.full(len(patient), -1)
    label[:analysed] = draw_positives(probability[:analysed], section.positives, labels)
    return Exams(patient, pfirrmann, modic, label, probability, strength, expected)


def _patients(rng: np.random.Generator, exams: int, shares: tuple[float, float, float]) -> NDArray[np.int64]:
    sizes = rng.choice([1, 2, 3], exams, p=np.array(shares) / sum(shares))
    patients = np.repeat(np.arange(exams), sizes)[:exams]
    return patients.astype(np.int64)


def _latent(rng: np.random.Generator, patient: NDArray[np.int64], section: CohortSection) -> tuple[Array, Array]:
    """Latent wear and endplate change, (exams, 5) each, standard normal."""
    within, between = section.patient_correlation, section.level_correlation

    def shared(width: int) -> Array:
        of_patient = rng.standard_normal((patient.max() + 1, width))[patient]
        of_exam = rng.standard_normal((len(patient), width))
        return np.asarray(np.sqrt(within) * of_patient + np.sqrt(1 - within) * of_exam)

    wear = np.sqrt(between) * shared(1) + np.sqrt(1 - between) * shared(5)
    change = MODIC_LOADING * wear + np.sqrt(1 - MODIC_LOADING**2) * shared(5)
    return wear, change


class _Grader:
    """Latent values → grades with the wanted marginals, by threshold or by exact counts."""

    def __init__(self, marginals: str) -> None:
        oulu = marginals == "oulu"
        self.pfirrmann = OULU_PFIRRMANN if oulu else SPREAD_PFIRRMANN
        self.modic = OULU_MODIC if oulu else SPREAD_MODIC

    def __call__(self, latent: tuple[Array, ...], rng: np.random.Generator, *, exact: bool) -> tuple[Grades, Grades]:
        wear, change = latent
        ungraded = self.pfirrmann[0, 0] if exact else 0
        skipped = rng.permutation(len(wear))[:ungraded]
        pfirrmann, modic = np.zeros(wear.shape, np.int64), np.zeros(wear.shape, np.int64)
        graded = np.setdiff1d(np.arange(len(wear)), skipped)
        for level in range(5):
            shares = self.pfirrmann[level].copy()
            shares[0] = 0
            order = _fractions(wear[graded, level], exact=exact)
            pfirrmann[graded, level] = np.searchsorted(np.cumsum(shares) / shares.sum(), order, side="right")
            types = self.modic[level]
            order = _fractions(change[:, level], exact=exact)
            changed = order >= types[0] / types.sum()
            kinds = (
                np.repeat([1, 2, 3], types[1:])
                if exact
                else rng.choice([1, 2, 3], changed.sum(), p=types[1:] / types[1:].sum())
            )
            modic[changed, level] = rng.permutation(kinds)
        return pfirrmann, modic


def _fractions(values: Array, *, exact: bool) -> Array:
    if not exact:
        return np.asarray(norm.cdf(values))
    return np.asarray((rankdata(values, method="ordinal") - 0.5) / len(values))


def severity(pfirrmann: Grades, modic: Grades) -> Array:
    """Linear score of the grades that pain depends on, per exam; ungraded discs count as grade 2."""
    worn = (np.where(pfirrmann == 0, 2, pfirrmann) - 1) / 4
    return np.asarray((worn + 0.5 * MODIC_SEVERITY[modic]).sum(axis=1))


def calibrate(reference: Array, prevalence: float, wanted_auc: float) -> tuple[float, float, float]:
    """Find the slope and intercept of the pain model.

    Parameters
    ----------
    reference
        Severity of many exams.
    prevalence
        Wanted share of positives.
    wanted_auc
        Wanted expected ROC-AUC of the true probability.

    Returns
    -------
    tuple of float
        Slope per standard deviation of severity, intercept, and the expected AUC that they give.
    """
    standard = (reference - reference.mean()) / reference.std()

    def intercept(slope: float) -> float:
        return float(brentq(lambda b: expit(slope * standard + b).mean() - prevalence, -60, 60))

    def auc(slope: float) -> float:
        return expected_auc(expit(slope * standard + intercept(slope)))

    top = 24.0
    slope = float(brentq(lambda b: auc(b) - wanted_auc, 0.0, top, xtol=1e-3)) if auc(top) > wanted_auc else top
    return slope, intercept(slope), auc(slope)


def expected_auc(probability: Array) -> float:
    """ROC-AUC in expectation when every label is drawn from its own probability, and that probability is the score."""
    order = np.argsort(probability, kind="stable")
    p, (_, start, counts) = probability[order], np.unique(probability[order], return_index=True, return_counts=True)
    negatives = np.add.reduceat(1 - p, start)
    positives = np.add.reduceat(p, start)
    below = np.cumsum(negatives) - negatives
    assert counts.sum() == len(p)
    return float((positives * (below + negatives / 2)).sum() / (positives.sum() * negatives.sum()))


def roc_auc(label: NDArray[np.int64], score: Array) -> float:
    """ROC-AUC by ranks; ties count half."""
    ranks = rankdata(score)
    positives = int(label.sum())
    negatives = len(label) - positives
    return float((ranks[label == 1].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def draw_positives(probability: Array, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw independent labels conditional on their sum.

    Parameters
    ----------
    probability
        P(label = 1) per exam.
    count
        Exact number of ones.
    rng
        Random stream.

    Returns
    -------
    numpy.ndarray
        Labels, each set of positives in proportion to its likelihood.
    """
    p = np.clip(probability, 1e-9, 1 - 1e-9)
    ways = np.zeros((len(p) + 1, count + 1))
    ways[0, 0] = 1.0
    for i, q in enumerate(p):
        ways[i + 1] = (1 - q) * ways[i]
        ways[i + 1, 1:] += q * ways[i, :-1]
        ways[i + 1] /= ways[i + 1].max()
    label, left = np.zeros(len(p), np.int64), count
    for i in range(len(p) - 1, -1, -1):
        with_one = p[i] * ways[i, left - 1] if left else 0.0
        without = (1 - p[i]) * ways[i, left]
        label[i] = int(rng.random() * (with_one + without) < with_one)
        left -= label[i]
    assert left == 0
    return label
