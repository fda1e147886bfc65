"""Study rules at equal false-positive rates: what more slices earn, apart from crying more often.

A study called positive if any slice is gains recall and false positives with every slice added, whatever the slices
show. Suffixes: S studies, R seeds, M slices of all seeds and studies, F rates, B bootstrap
resamples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import numpy as np

from lbp_ray.intervals import delong_interval, resampled_interval, widened
from lbp_ray.metrics import patient_resamples, roc_auc, study_scores
from lbp_ray.result import Curve, Interval, OrCurve, RecallAt, RuleResult
from lbp_ray.study import StudyRule

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd

    from lbp_ray.result import Confusion
    from lbp_ray.study import EvaluationConfig

FALSE_POSITIVE_RATES = (0.05, 0.10, 0.15, 0.20)
"""Where recalls are compared. They span the rates of the Oulu thesis at one slice (2 of 39) and three (6 of 39), which
its any-slice rule let grow with the slice count; above, a fifth and more of the healthy would be called ill."""


def compare_rules(
    table: pd.DataFrame,
    patient_of: Mapping[str, str],
    *,
    k: int,
    evaluation: EvaluationConfig,
    optimistic: bool,
    inflation: float,
) -> tuple[RuleResult, ...]:
    """Judge every study rule of every slice count by ROC-AUC and by recall at equal false-positive rates.

    Parameters
    ----------
    table
        Out-of-fold table of all slice counts: ``study_id``, ``seed``, ``num_slices``, ``probability``, ``label``.
    patient_of
        Study → patient.
    k
        How many slice probabilities ``top_k`` averages.
    evaluation
        Level, resamples and seed of the intervals.
    optimistic
        Whether a fold was judged by what was chosen on it; no interval is made then.
    inflation
        Factor of the variance over patients, for cross-validated scores.

    Returns
    -------
    tuple of RuleResult
        By slice count, rules in the order of `StudyRule`; with one slice they are the same, and only ``any`` stands.

    Notes
    -----
    A rule is applied within each seed, and study scores are averaged over seeds. ROC-AUC has DeLong's interval on the
    logit scale. The recall is the largest one reached at or below the rate, not an interpolated one: a threshold
    stands behind it. Its interval resamples patients and takes the threshold anew in each resample, because the rate
    is uncertain as well as the recall.
    """
    results = []
    for count in sorted(table["num_slices"].unique().tolist()):
        rows = table[table["num_slices"] == count]
        truth = rows.groupby("study_id", sort=True)["label"].first()
        labels_S, patients_S = truth.to_numpy(dtype=int), np.array([patient_of[study] for study in truth.index])
        resamples, level = evaluation.bootstrap_resamples, evaluation.interval_level
        weights_BS = patient_resamples(patients_S, labels_S, resamples=resamples, seed=evaluation.seed)
        for rule in get_args(StudyRule) if count > 1 else ("any",):
            scores_S = _averaged_scores(rows, rule=rule, k=k)
            area = None
            if not optimistic:
                area = delong_interval(labels_S, scores_S, patients_S, level=level, inflation=inflation)
            results.append(
                RuleResult(
                    num_slices=count,
                    rule=rule,
                    roc_auc=roc_auc(labels_S, scores_S),
                    interval=area,
                    recall_at=_recalls(
                        labels_S, scores_S, None if optimistic else weights_BS, level=level, inflation=inflation
                    ),
                )
            )
    return tuple(results)


def _averaged_scores(rows: pd.DataFrame, *, rule: StudyRule, k: int) -> np.ndarray:
    """Apply a rule within each seed and average over seeds; studies ascending."""
    seeds, seed_M = np.unique(rows["seed"], return_inverse=True)
    studies, study_M = np.unique(rows["study_id"], return_inverse=True)
    found, scores = study_scores(
        seed_M * len(studies) + study_M, rows["probability"].to_numpy(dtype=float), rule=rule, k=k
    )
    assert len(found) == len(seeds) * len(studies), "every seed scores every study"
    return np.asarray(scores.reshape(len(seeds), len(studies)).mean(axis=0))


def _recalls(
    labels_S: np.ndarray, scores_S: np.ndarray, weights_BS: np.ndarray | None, *, level: float, inflation: float
) -> tuple[RecallAt, ...]:
    estimates_F = recalls_at(labels_S, scores_S, np.ones((1, len(labels_S))))[0].tolist()
    intervals_F: list[Interval | None] = [None] * len(estimates_F)
    if weights_BS is not None:
        intervals_F = [
            widened(resampled_interval(values_B, level=level), recall, inflation=inflation)
            for values_B, recall in zip(recalls_at(labels_S, scores_S, weights_BS).T, estimates_F, strict=True)
        ]
    return tuple(
        RecallAt(false_positive_rate=rate, recall=recall, interval=interval)
        for rate, recall, interval in zip(FALSE_POSITIVE_RATES, estimates_F, intervals_F, strict=True)
    )


def recalls_at(labels_S: np.ndarray, scores_S: np.ndarray, weights_BS: np.ndarray) -> np.ndarray:
    """Return the largest recall whose false-positive rate is at most each of `FALSE_POSITIVE_RATES`.

    Parameters
    ----------
    labels_S, scores_S
        0 or 1, both present in every resample, and scores.
    weights_BS
        How often each study stands in each resample.

    Returns
    -------
    numpy.ndarray
        (B, rates).
    """
    order = np.argsort(-scores_S, kind="stable")
    last_of_tie = np.append(np.diff(scores_S[order]) != 0, True)
    weights_BS, positive_S = weights_BS[:, order], labels_S[order] == 1
    recall, false_positive_rate = (
        np.cumsum(chosen, axis=1)[:, last_of_tie] / chosen.sum(axis=1, keepdims=True)
        for chosen in (weights_BS * positive_S, weights_BS * ~positive_S)
    )
    reached = [np.where(false_positive_rate <= rate, recall, 0.0).max(axis=1) for rate in FALSE_POSITIVE_RATES]
    return np.stack(reached, axis=1)


def or_curve(roc: Curve, confusion: Confusion, num_slices: int) -> OrCurve:
    """Return what the any-slice rule alone would make of a one-slice network.

    Of slices that are judged like the one and err independently given the label, the chance that none is called
    positive is that of one to the power of their number. So a rate x becomes 1 - (1 - x)^num_slices, the
    false-positive rate as well as the recall. Slices of one patient resemble each other, and both rates then rise less.

    Parameters
    ----------
    roc, confusion
        Curve and decisions of the one-slice network, at study level.
    num_slices
        Slices of the rule.
    """

    def any_of(rate: float) -> float:
        return float(1 - (1 - rate) ** num_slices)

    return OrCurve(
        num_slices=num_slices,
        curve=Curve(x=tuple(map(any_of, roc.x)), y=tuple(map(any_of, roc.y))),
        false_positive_rate=any_of(confusion.fp / (confusion.fp + confusion.tn)),
        recall=any_of(confusion.tp / (confusion.tp + confusion.fn)),
    )
