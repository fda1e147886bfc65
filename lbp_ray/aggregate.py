"""Out-of-fold table → the one result object, committed with the tables it was made from."""

from __future__ import annotations

import hashlib
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from sklearn.metrics import precision_recall_curve, roc_curve

from lbp_ray.association import describe_provenance
from lbp_ray.intervals import area_interval, compare_areas, difference_of, holm
from lbp_ray.metrics import (
    all_metrics,
    confusion,
    cross_fitted_thresholds,
    patient_resamples,
    percentile_interval,
    resampled_metrics,
    roc_auc,
)
from lbp_ray.out_of_fold import IncompleteStudyError, check_environments, collect, collect_holdout, recipe_id
from lbp_ray.permutation import permutation_null
from lbp_ray.result import (
    METRIC_NAMES,
    AreaComparison,
    BayesReference,
    Confusion,
    CropProvenance,
    Curve,
    Interval,
    LearningCurve,
    MetricSummary,
    PermutationNull,
    SliceCountResult,
    StudyResult,
    table_hashes,
)
from lbp_ray.splits import HOLDOUT
from preprocess.commit import committed_directory, content_id

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from lbp_ray.cell import TrialData, TrialSpec
    from lbp_ray.prepare import Prepared
    from lbp_ray.study import EvaluationConfig, StudyConfig

RESULT_VERSION = 3
"""Raised by hand when the same trials give other figures; part of a result's address."""


def aggregate(
    config: StudyConfig, prepared: Prepared, specs: Sequence[TrialSpec], folders: Sequence[Path], data: TrialData
) -> Path:
    """Make the out-of-fold table and the result of a complete set of trials.

    Parameters
    ----------
    config, prepared
        The study.
    specs, folders
        Every planned trial and its committed folder, in the same order.
    data
        The trials' shared data, for the permutation null.

    Returns
    -------
    pathlib.Path
        Folder with ``out_of_fold.parquet``, ``holdout.parquet`` and ``result.json``.

    Raises
    ------
    lbp_ray.out_of_fold.IncompleteStudyError
        If trials are missing, invalid or from different environments.
    """
    table = collect(specs, folders, prepared.analysed)
    environment = check_environments(folders, allow_mixed=config.evaluation.allow_mixed_environments)
    provenance = describe_provenance(prepared, seed=config.evaluation.seed)
    final = prepared.paths.result(_address(config, prepared, provenance, specs, environment))
    if final.is_dir():
        return final
    means = {count: seed_means(table[table["num_slices"] == count], data) for count in config.slice_counts}
    per_count = tuple(
        _slice_count_result(
            config, table[table["num_slices"] == count], means[count], _history(specs, folders, count), data
        )
        for count in config.slice_counts
    )
    comparisons = compare_slice_counts(means, level=config.evaluation.interval_level)
    result = _study_result(
        config, prepared, provenance, per_count, comparisons, environment=environment, recipe=recipe_id(specs[0])
    )
    with committed_directory(final, point="result") as folder:
        table.to_parquet(folder / "out_of_fold.parquet", index=False)
        collect_holdout(specs, folders).to_parquet(folder / "holdout.parquet", index=False)
        sound = result.model_copy(update={"hashes": result.hashes | table_hashes(folder)})
        sound.save(folder / "result.json")
    return final


def _address(
    config: StudyConfig,
    prepared: Prepared,
    provenance: CropProvenance,
    specs: Sequence[TrialSpec],
    environment: dict[str, str],
) -> str:
    """Content id of everything that a result is made from."""
    truth = config.paths.truth
    return content_id(
        {
            "version": RESULT_VERSION,
            "trials": [spec.trial_id for spec in specs],
            "evaluation": config.evaluation.model_dump(mode="json"),
            "name": config.name,
            "statements": (*config.statements, *prepared.statements),
            "environment": environment,
            "store": prepared.store_hash,
            "funnel": [step.model_dump() for step in prepared.funnel],
            "groups": prepared.groups,
            "crops": provenance.model_dump(mode="json"),
            "truth": hashlib.sha256(truth.read_bytes()).hexdigest() if truth else None,
        }
    )


def _study_result(
    config: StudyConfig,
    prepared: Prepared,
    provenance: CropProvenance,
    per_count: tuple[SliceCountResult, ...],
    comparisons: tuple[AreaComparison, ...],
    *,
    environment: dict[str, str],
    recipe: str,
) -> StudyResult:
    split, analysed = prepared.split.table, prepared.analysed.table
    inside = analysed[analysed["fold"] != HOLDOUT]
    return StudyResult(
        name=config.name,
        statements=(*config.statements, *prepared.statements),
        config=config.model_dump(mode="json", exclude={"paths", "compute", "statements"}),
        hashes={
            "store": prepared.store_hash,
            "crops": prepared.crops.crops_hash,
            "split": prepared.split.split_hash,
            "weights": prepared.weights_hash,
            "recipe": recipe,
            **({} if prepared.regions is None else {"regions": prepared.regions.meta.regions_hash}),
        },
        environment=environment,
        funnel=prepared.funnel,
        groups=prepared.groups,
        num_patients=inside["patient_id"].nunique(),
        num_studies=len(inside),
        num_positive=int(inside["label"].sum()),
        num_holdout_studies=int((split["fold"] == HOLDOUT).sum()),
        holdout_commitment=prepared.split.holdout_commitment,
        num_folds=config.split.folds,
        seeds=config.seeds,
        slice_counts=per_count,
        comparisons=comparisons,
        bayes=_bayes_reference(config.paths.truth, inside),
        acquisition=prepared.acquisition,
        crops=provenance,
    )


def _bayes_reference(truth: Path | None, inside: pd.DataFrame) -> BayesReference | None:
    """Score the true probabilities on the very studies that were cross-validated."""
    if truth is None:
        return None
    joined = inside.merge(pd.read_csv(truth)[["study_id", "probability"]], on="study_id", how="left")
    if joined["probability"].isna().any():
        absent = joined.loc[joined["probability"].isna(), "study_id"].iloc[0]
        msg = f"{truth} has no true probability of study {absent}; link the truth table of this very cohort"
        raise IncompleteStudyError(msg)
    area = roc_auc(joined["label"].to_numpy(dtype=int), joined["probability"].to_numpy())
    return BayesReference(realised_auc=area, num_studies=len(joined))


def _history(specs: Sequence[TrialSpec], folders: Sequence[Path], count: int) -> pd.DataFrame:
    tables = [
        pd.read_parquet(folder / "history.parquet")
        for spec, folder in zip(specs, folders, strict=True)
        if spec.cell.num_slices == count
    ]
    return pd.concat(tables)


def seed_means(table: pd.DataFrame, data: TrialData) -> pd.DataFrame:
    """Average the study scores of one slice count over seeds.

    Parameters
    ----------
    table
        Its rows of the out-of-fold table.
    data
        Whose study is whose.

    Returns
    -------
    pandas.DataFrame
        Indexed and sorted by study: ``score``, ``label``, ``fold``, ``patient_id``.
    """
    mean = (
        table.drop_duplicates(["seed", "study_id"])
        .groupby("study_id", sort=True)
        .agg(score=("study_probability", "mean"), label=("label", "first"), fold=("fold", "first"))
    )
    return mean.assign(patient_id=mean.index.map(dict(zip(data.study_ids, data.patient_ids, strict=True))))


def compare_slice_counts(means: Mapping[int, pd.DataFrame], *, level: float) -> tuple[AreaComparison, ...]:
    """Compare the ROC-AUC of every pair of slice counts on the same studies.

    Parameters
    ----------
    means
        Slice count → `seed_means` of the same studies.
    level
        Nominal coverage of the intervals of the differences.
    """
    counts = sorted(means)
    first = means[counts[0]]
    assert all(means[count].index.equals(first.index) for count in counts), "slice counts share their studies"
    areas = compare_areas(
        first["label"].to_numpy(dtype=int),
        np.stack([means[count]["score"].to_numpy() for count in counts]),
        first["patient_id"].to_numpy(),
    )
    pairs = list(combinations(range(len(counts)), 2))
    found = [difference_of(areas, more, fewer, level=level) for fewer, more in pairs]
    adjusted = holm([difference.p_value for difference in found])
    return tuple(
        AreaComparison(
            first=counts[fewer], second=counts[more], level=level, p_adjusted=p_adjusted, **difference._asdict()
        )
        for (fewer, more), difference, p_adjusted in zip(pairs, found, adjusted, strict=True)
    )


def _slice_count_result(
    config: StudyConfig, table: pd.DataFrame, mean: pd.DataFrame, history: pd.DataFrame, data: TrialData
) -> SliceCountResult:
    count = int(table["num_slices"].iloc[0])
    studies = table.drop_duplicates(["seed", "study_id"])
    labels, scores = mean["label"].to_numpy(dtype=int), mean["score"].to_numpy()
    thresholds = cross_fitted_thresholds(labels, scores, mean["fold"].to_numpy())
    decisions = (scores >= mean["fold"].map(thresholds).to_numpy()).astype(int)
    summaries = _summaries(
        config.evaluation,
        per_seed=[_seed_metrics(rows) for _, rows in studies.groupby("seed", sort=True)],
        labels=labels,
        scores=scores,
        decisions=decisions,
        patients=mean["patient_id"].to_numpy(),
    )
    false_positive_rate, recall, _ = roc_curve(labels, scores)
    precision, recall_of_precision, _ = precision_recall_curve(labels, scores)
    counts = confusion(labels, decisions)
    return SliceCountResult(
        num_slices=count,
        metrics=tuple(summaries[name] for name in METRIC_NAMES),
        accuracy=summaries["accuracy"],
        roc=Curve(x=tuple(false_positive_rate.tolist()), y=tuple(recall.tolist())),
        precision_recall=Curve(x=tuple(recall_of_precision.tolist()), y=tuple(precision.tolist())),
        confusion=Confusion(**{name: int(value[0]) for name, value in counts._asdict().items()}),
        learning=_learning_curve(history),
        permutation=_permutation(config, data, count),
        fold_auc=tuple(
            roc_auc(rows["label"].to_numpy(dtype=int), rows["score"].to_numpy()) for _, rows in mean.groupby("fold")
        ),
        scores_positive=tuple(np.sort(scores[labels == 1]).tolist()),
        scores_negative=tuple(np.sort(scores[labels == 0]).tolist()),
        fold_thresholds=tuple(thresholds[fold] for fold in sorted(thresholds)),
    )


def _seed_metrics(rows: pd.DataFrame) -> dict[str, float]:
    scores = rows["study_probability"].to_numpy()
    decisions = (scores >= rows["threshold"].to_numpy()).astype(int)
    return all_metrics(rows["label"].to_numpy(dtype=int), scores, decisions)


def _summaries(
    evaluation: EvaluationConfig,
    *,
    per_seed: list[dict[str, float]],
    labels: np.ndarray,
    scores: np.ndarray,
    decisions: np.ndarray,
    patients: np.ndarray,
) -> dict[str, MetricSummary]:
    weights = patient_resamples(patients, labels, resamples=evaluation.bootstrap_resamples, seed=evaluation.seed)
    resampled = resampled_metrics(labels, scores, decisions, weights)
    area = area_interval(compare_areas(labels, scores[None], patients), 0, level=evaluation.interval_level)
    summaries = {}
    for name, estimate in all_metrics(labels, scores, decisions).items():
        values = [seed[name] for seed in per_seed]
        low, high = percentile_interval(resampled[name], evaluation.interval_level)
        method = f"percentile bootstrap over patients, {evaluation.bootstrap_resamples} resamples"
        if name == "roc_auc":
            (low, high), method = area, "DeLong over patients, on the logit scale"
        summaries[name] = MetricSummary(
            name=name,
            per_seed=tuple(values),
            mean=float(np.mean(values)),
            sd=float(np.std(values, ddof=1)) if len(values) > 1 else None,
            interval=Interval(
                estimate=estimate,
                low=low,
                high=high,
                level=evaluation.interval_level,
                method=method,
            ),
        )
    return summaries


def _learning_curve(history: pd.DataFrame) -> LearningCurve:
    grouped = history.groupby("epoch", sort=True)
    columns = ("train_loss", "validation_loss", "validation_auc")
    mean, spread = grouped[list(columns)].mean(), grouped[list(columns)].std(ddof=0)
    return LearningCurve(
        epoch=tuple(mean.index.tolist()),
        stage=tuple(grouped["stage"].first().tolist()),
        **{name: tuple(mean[name].tolist()) for name in columns},
        **{f"{name}_sd": tuple(spread[name].tolist()) for name in columns},
    )


def _permutation(config: StudyConfig, data: TrialData, count: int) -> PermutationNull | None:
    wanted = config.evaluation.permutations
    if not wanted or data.features_NKF is None or not config.recipe.frozen_epochs:
        return None
    return permutation_null(
        data,
        recipe=config.recipe,
        num_slices=count,
        count=wanted,
        seed=config.evaluation.seed,
        progress=config.compute.verbose,
    )
