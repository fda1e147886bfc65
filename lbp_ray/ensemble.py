"""What is averaged where, and at which threshold the average decides.

Out of fold a study has one network per seed, so seeds are averaged. On exams that no network was trained on (hold-out,
excluded groups, a new exam) fold models are averaged too. A study is scored by each network before networks are
averaged: the mean of largest slice probabilities keeps its size however many networks there are, the largest of mean
probabilities shrinks with them, and a threshold of five seeds would not fit fifty fold models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lbp_ray.metrics import fit_threshold
from lbp_ray.out_of_fold import fitting_scores
from lbp_ray.summaries import THRESHOLD_OF

if TYPE_CHECKING:
    import pandas as pd

    from lbp_ray.study import EvaluationConfig, Level

MODEL = ["fold", "seed"]
"""Columns that tell the networks of one slice count apart."""

FACTS = ("label", "patient_id", "group")
"""Columns that do not depend on the network."""


def model_means(scores: pd.DataFrame) -> pd.DataFrame:
    """Average slice and study scores over networks.

    Parameters
    ----------
    scores
        One row per slice and network of one slice count: ``study_id``, ``slice_index``, ``probability``,
        ``study_probability``, and any of `FACTS`, which are kept.

    Returns
    -------
    pandas.DataFrame
        One row per slice, sorted by study and slice.
    """
    how = dict.fromkeys(("probability", "study_probability"), "mean")
    how |= {name: "first" for name in FACTS if name in scores}
    return scores.groupby(["study_id", "slice_index"], sort=True, as_index=False).agg(how)


def model_thresholds(outside: pd.DataFrame, level: Level) -> pd.Series[float]:
    """Return the threshold of each network for studies or slices, indexed by `MODEL`.

    It is the one that its own fold was judged by out of fold: fitted on the other folds' scores of its seed or, in the
    literal preset, on the scores of its validation fold.

    Parameters
    ----------
    outside
        Rows of one slice count of the out-of-fold table.
    level
        What is judged.
    """
    return outside.drop_duplicates(MODEL).set_index(MODEL)[THRESHOLD_OF[level]].sort_index()


def ensemble_threshold(outside: pd.DataFrame, evaluation: EvaluationConfig, level: Level = "study") -> float:
    """Return the threshold of averaged scores, from out-of-fold scores alone.

    Parameters
    ----------
    outside
        Rows of one slice count of the out-of-fold table.
    evaluation
        ``ensemble_threshold``: ``refit`` on the seed-averaged scores of all folds (``threshold_criterion``,
        ``threshold_target``), or ``mean_of_seeds``, the mean of all networks' thresholds.
    level
        What is judged.

    Raises
    ------
    lbp_ray.metrics.MetricError
        If no threshold reaches the target.
    """
    if evaluation.ensemble_threshold == "mean_of_seeds":
        return float(model_thresholds(outside, level).mean())
    labels, scores, _ = fitting_scores(model_means(outside).assign(fold=0), evaluation, level)
    return fit_threshold(labels, scores, criterion=evaluation.threshold_criterion, target=evaluation.threshold_target)
