"""One set of decisions → every metric with its interval over patients and its spread over models."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from sklearn.metrics import precision_recall_curve, roc_curve

from lbp_ray.intervals import metric_intervals
from lbp_ray.metrics import all_metrics, confusion
from lbp_ray.result import METRIC_NAMES, Confusion, Curve, MetricSummary

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd

    from lbp_ray.study import EvaluationConfig, Level


THRESHOLD_OF: dict[Level, str] = {"study": "threshold", "slice": "slice_threshold"}
"""Column of the threshold that studies, and slices, are judged by."""


class Judged(NamedTuple):
    """Units (studies or slices) with what is known and what was said of them."""

    labels_S: np.ndarray
    scores_S: np.ndarray
    decisions_S: np.ndarray
    patients_S: np.ndarray

    @property
    def metrics(self) -> dict[str, float]:
        """Every metric, by name."""
        return all_metrics(self.labels_S, self.scores_S, self.decisions_S)

    @property
    def confusion(self) -> Confusion:
        """Decisions against labels."""
        counts = confusion(self.labels_S, self.decisions_S)
        return Confusion(**{name: int(value[0]) for name, value in counts._asdict().items()})

    @property
    def roc(self) -> Curve:
        """Recall by false-positive rate."""
        false_positive_rate, recall, _ = roc_curve(self.labels_S, self.scores_S)
        return Curve(x=tuple(false_positive_rate.tolist()), y=tuple(recall.tolist()))

    @property
    def precision_recall(self) -> Curve:
        """Precision by recall."""
        precision, recall, _ = precision_recall_curve(self.labels_S, self.scores_S)
        return Curve(x=tuple(recall.tolist()), y=tuple(precision.tolist()))


def judge(slices: pd.DataFrame, patient_of: Mapping[str, str], level: Level) -> Judged:
    """Decide on every study or slice by its threshold.

    Parameters
    ----------
    slices
        One row per slice: ``study_id``, ``slice_index``, ``label``, ``probability``, ``study_probability``, and
        ``threshold`` of studies or ``slice_threshold``.
    patient_of
        Patient of each study.
    level
        ``study`` takes each study once with its study score, ``slice`` every slice with its own.

    Returns
    -------
    Judged
        Sorted by study, then by slice.
    """
    units = slices.sort_values(["study_id", "slice_index"])
    if level == "study":
        units = units.drop_duplicates("study_id")
    scores = units["study_probability" if level == "study" else "probability"].to_numpy()
    return Judged(
        labels_S=units["label"].to_numpy(dtype=int),
        scores_S=scores,
        decisions_S=(scores >= units[THRESHOLD_OF[level]].to_numpy()).astype(int),
        patients_S=units["study_id"].map(patient_of).to_numpy(),
    )


def summarise(
    averaged: Judged, single: Sequence[Judged], evaluation: EvaluationConfig | None, *, inflation: float = 1.0
) -> Mapping[str, MetricSummary]:
    """Summarise every metric of averaged scores, and of each model alone.

    Parameters
    ----------
    averaged
        Scores averaged over models and the decisions on them.
    single
        Scores and decisions of each model (seed, or fold model of a seed) alone.
    evaluation
        How intervals are made; None makes none, as for what was chosen on the fold that it is judged by.
    inflation
        Factor of the variance over patients; above 1 for cross-validated scores.

    Returns
    -------
    Mapping
        The eight metrics, ``accuracy`` and ``separation``, by name.
    """
    intervals = {} if evaluation is None else metric_intervals(*averaged, evaluation=evaluation, inflation=inflation)
    models = [judged.metrics for judged in single]
    summaries = {}
    for name, estimate in averaged.metrics.items():
        values = [model[name] for model in models]
        summaries[name] = MetricSummary(
            name=name,
            estimate=estimate,
            interval=intervals.get(name),
            per_seed=tuple(values),
            mean=float(np.mean(values)),
            sd=float(np.std(values, ddof=1)) if len(values) > 1 else None,
        )
    return summaries


def the_eight(summaries: Mapping[str, MetricSummary]) -> tuple[MetricSummary, ...]:
    """Return the eight metrics of the Oulu study, in the order of its Table 5."""
    return tuple(summaries[name] for name in METRIC_NAMES)
