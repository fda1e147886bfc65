"""How far two readers agree: weighted kappa per disc level and over all, with an interval over patients.

Suffixes: E exams, L disc levels, P patients, B bootstrap resamples, C cells of a confusion table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from sklearn.metrics import cohen_kappa_score

from lbp_ray.cohort.gradings import SCALES, Gradings
from lbp_ray.result import Agreement, Interval
from preprocess.cvat.shapes import LEVELS

if TYPE_CHECKING:
    from collections.abc import Sequence

RESAMPLES = 2000
"""Resamples of patients behind each interval."""

LEVEL = 0.95
"""Nominal coverage of the intervals."""


def readers_agree(gradings: Gradings, patients_E: Sequence[str], *, weights: str) -> tuple[Agreement, ...]:
    """Compare readers 1 and 2.

    Parameters
    ----------
    gradings
        Validated grades.
    patients_E
        Patient of each of their exams: exams and discs of one patient are resampled together.
    weights
        ``linear`` or ``quadratic``.

    Returns
    -------
    tuple of Agreement
        Per scale: each level, then ``all`` levels together; empty where no disc has two readers. Kappa is None where
        both readers give one and the same grade throughout. Its interval (percentile bootstrap over patients) is None
        where nothing would vary, because the readers never differ or one patient has all the pairs, and where too many
        resamples have no kappa.

    References
    ----------
    Cohen, Weighted kappa, Psychological Bulletin 70 (1968). Estimates are scikit-learn's; tests hold them and the
    interval against the published example of Agresti's *Categorical Data Analysis*.
    """
    _, patient_E = np.unique(np.asarray(patients_E), return_inverse=True)
    num_patients = int(patient_E.max(initial=-1)) + 1
    if not num_patients:
        return ()
    chance = np.full(num_patients, 1 / num_patients)
    resamples_BP = np.random.default_rng(0).multinomial(num_patients, chance, size=RESAMPLES)
    found = []
    for scale, grades in gradings.scales.items():
        first_EL, second_EL = grades.read_REL[:2]
        paired_EL = ~np.isnan(first_EL) & ~np.isnan(second_EL)
        for level, columns in [*((name, [k]) for k, name in enumerate(LEVELS)), ("all", list(range(len(LEVELS))))]:
            rows, _ = np.nonzero(paired_EL[:, columns])
            pairs = [side[:, columns][paired_EL[:, columns]].astype(int) for side in (first_EL, second_EL)]
            kappa, interval = _kappa(pairs, patient_E[rows], resamples_BP, weights=weights, highest=SCALES[scale])
            found.append(
                Agreement(
                    scale=scale,
                    level=level,
                    weights=weights,
                    num_pairs=len(rows),
                    kappa=kappa,
                    interval=interval,
                    num_adjudicated=int(grades.decided_EL[:, columns].sum()),
                )
            )
    return tuple(found) if any(row.num_pairs for row in found) else ()


def _kappa(
    pairs: list[np.ndarray], patient_N: np.ndarray, resamples_BP: np.ndarray, *, weights: str, highest: int
) -> tuple[float | None, Interval | None]:
    first_N, second_N = pairs
    if len(np.unique(np.concatenate(pairs))) < 2:
        return None, None
    grades = list(range(highest + 1))
    kappa = float(cohen_kappa_score(first_N, second_N, labels=grades, weights=weights))
    if (first_N == second_N).all() or len(np.unique(patient_N)) < 2:
        return kappa, None
    counts_PC = np.zeros((resamples_BP.shape[1], len(grades) ** 2))
    np.add.at(counts_PC, (patient_N, first_N * len(grades) + second_N), 1)
    kappas_B = weighted_kappas((resamples_BP @ counts_PC).reshape(-1, len(grades), len(grades)), weights)
    if np.isnan(kappas_B).mean() > 1 - LEVEL:
        return kappa, None
    low, high = np.nanquantile(kappas_B, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    method = f"percentile bootstrap over patients, {RESAMPLES} resamples"
    return kappa, Interval(low=float(low), high=float(high), level=LEVEL, method=method)


def weighted_kappas(tables_BGG: np.ndarray, weights: str) -> np.ndarray:
    """Compute weighted kappa of many confusion tables of two readers at once.

    Parameters
    ----------
    tables_BGG
        Counts: first reader's grade, second reader's grade.
    weights
        ``linear`` or ``quadratic`` in the distance of the grades.

    Returns
    -------
    numpy.ndarray
        Kappa of each table; NaN where both readers give one and the same grade throughout, and of an empty table.
    """
    grade = np.arange(tables_BGG.shape[-1])
    distance_GG = np.abs(grade[:, None] - grade).astype(float) ** (1 if weights == "linear" else 2)
    observed = (tables_BGG * distance_GG).sum(axis=(1, 2)) * tables_BGG.sum(axis=(1, 2))
    by_chance = np.einsum("bi,bj,ij->b", tables_BGG.sum(axis=2), tables_BGG.sum(axis=1), distance_GG)
    with np.errstate(invalid="ignore"):
        return np.asarray(1 - observed / np.where(by_chance > 0, by_chance, np.nan))
