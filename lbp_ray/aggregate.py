"""Out-of-fold table → the one result object, committed with the tables it was made from."""

from __future__ import annotations

import hashlib
from collections import Counter
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lbp_ray.association import describe_provenance
from lbp_ray.intervals import compare_areas, cross_validation_inflation, difference_of, holm
from lbp_ray.metrics import roc_auc
from lbp_ray.out_of_fold import (
    IncompleteStudyError,
    check_environments,
    collect,
    collect_holdout,
    recipe_id,
    seed_means,
)
from lbp_ray.permutation import permutation_null
from lbp_ray.result import (
    AreaComparison,
    BayesReference,
    CropProvenance,
    FoldChoice,
    LearningCurve,
    OrCurve,
    PermutationNull,
    SelectedEpoch,
    SliceCountResult,
    StudyResult,
    VarianceSplit,
    table_hashes,
)
from lbp_ray.rules import compare_rules, or_curve
from lbp_ray.splits import HOLDOUT
from lbp_ray.summaries import THRESHOLD_OF, judge, summarise, the_eight
from lbp_ray.variance import split_variance
from preprocess.commit import committed_directory, content_id

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from lbp_ray.cell import TrialData, TrialSpec
    from lbp_ray.prepare import Prepared
    from lbp_ray.study import Level, StudyConfig
    from lbp_ray.summaries import Judged

RESULT_VERSION = 6
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
    table = collect(specs, folders, prepared.analysed, config.evaluation)
    environment = check_environments(folders, allow_mixed=config.evaluation.allow_mixed_environments)
    provenance = describe_provenance(prepared, seed=config.evaluation.seed)
    final = prepared.paths.result(_address(config, prepared, provenance, specs, environment))
    if final.is_dir():
        return final
    inflation = out_of_fold_inflation(config)
    by_count = {count: table[table["num_slices"] == count] for count in config.slice_counts}
    means = {count: seed_means(rows, config.evaluation) for count, rows in by_count.items()}
    per_count = tuple(
        _slice_count_result(config, rows, means[count], _history(specs, folders, count), data, inflation=inflation)
        for count, rows in by_count.items()
    )
    result = _study_result(
        config,
        prepared,
        per_count,
        cohort=prepared.cohort,
        comparisons=()
        if config.optimistic
        else compare_slice_counts(means, data.patient_of, config.evaluation.interval_level, inflation=inflation),
        crops=provenance,
        environment=environment,
        recipe=recipe_id(specs[0]),
        rules=compare_rules(
            table,
            data.patient_of,
            k=config.recipe.study_rule_k,
            evaluation=config.evaluation,
            optimistic=config.optimistic,
            inflation=inflation,
        ),
    )
    with committed_directory(final, point="result") as folder:
        table.to_parquet(folder / "out_of_fold.parquet", index=False)
        collect_holdout(specs, folders, config.evaluation).to_parquet(folder / "holdout.parquet", index=False)
        sound = result.model_copy(update={"hashes": result.hashes | table_hashes(folder)})
        sound.save(folder / "result.json")
    return final


def out_of_fold_inflation(config: StudyConfig) -> float:
    """Return the factor of the variance of out-of-fold scores."""
    inflated = config.evaluation.cross_validated_variance == "nadeau_bengio"
    return cross_validation_inflation(config.split.folds) if inflated else 1.0


def _address(
    config: StudyConfig,
    prepared: Prepared,
    provenance: CropProvenance,
    specs: Sequence[TrialSpec],
    environment: dict[str, str],
) -> str:
    """Content id of everything that a result is made from."""
    return content_id(
        {
            "version": RESULT_VERSION,
            "trials": [spec.trial_id for spec in specs],
            "evaluation": config.evaluation.model_dump(mode="json"),
            "cohort": prepared.cohort.model_dump(mode="json"),
            "questionnaire": prepared.questionnaire_hash,
            "duplicates": prepared.duplicates.model_dump(mode="json"),
            "name": config.name,
            "statements": (*config.statements, *prepared.statements),
            "environment": environment,
            "store": prepared.store_hash,
            "funnel": [step.model_dump() for step in prepared.funnel],
            "groups": prepared.groups,
            "crops": provenance.model_dump(mode="json"),
            "truth": _sha256(config.paths.truth),
        }
    )


def _sha256(path: Path | None) -> str | None:
    return None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()


def _study_result(
    config: StudyConfig,
    prepared: Prepared,
    per_count: tuple[SliceCountResult, ...],
    *,
    recipe: str,
    **parts: Any,  # noqa: ANN401  (fields of the result, as they are)
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
            "questionnaire": prepared.questionnaire_hash,
            "weights": prepared.weights_hash,
            "recipe": recipe,
            **({} if prepared.regions is None else {"regions": prepared.regions.meta.regions_hash}),
        },
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
        level=config.evaluation.level,
        selection=config.recipe.selection,
        threshold_source=config.evaluation.threshold_source,
        or_curves=_or_curves(per_count) if config.evaluation.level == "study" else (),
        duplicates=prepared.duplicates,
        bayes=_bayes_reference(config.paths.truth, inside) if config.evaluation.level == "study" else None,
        acquisition=prepared.acquisition,
        **parts,
    )


def _or_curves(per_count: tuple[SliceCountResult, ...]) -> tuple[OrCurve, ...]:
    one = next((part for part in per_count if part.num_slices == 1), None)
    larger = [part.num_slices for part in per_count if part.num_slices > 1]
    return () if one is None else tuple(or_curve(one.roc, one.confusion, count) for count in larger)


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


def compare_slice_counts(
    means: Mapping[int, pd.DataFrame], patient_of: Mapping[str, str], level: float, *, inflation: float
) -> tuple[AreaComparison, ...]:
    """Compare the ROC-AUC of every pair of slice counts on the same studies.

    Parameters
    ----------
    means
        Slice count → `lbp_ray.out_of_fold.seed_means` of the same studies.
    patient_of
        Patient of each study.
    level
        Nominal coverage of the intervals of the differences.
    inflation
        Factor of the variance, for cross-validated scores.
    """
    counts = sorted(means)
    judged = [judge(means[count], patient_of, "study") for count in counts]
    studies = [sorted(means[count]["study_id"].unique()) for count in counts]
    assert all(found == studies[0] for found in studies), "slice counts share their studies"
    first = judged[0]
    scores_KS = np.stack([part.scores_S for part in judged])
    areas = compare_areas(first.labels_S, scores_KS, first.patients_S, inflation=inflation)
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
    config: StudyConfig,
    table: pd.DataFrame,
    means: pd.DataFrame,
    history: pd.DataFrame,
    data: TrialData,
    *,
    inflation: float,
) -> SliceCountResult:
    patient_of, count = data.patient_of, int(table["num_slices"].iloc[0])
    level = config.evaluation.level
    shown = None if config.optimistic else config.evaluation
    seeds = [rows for _, rows in table.groupby("seed", sort=True)]
    averaged = judge(means, patient_of, level)
    summaries = summarise(averaged, [judge(rows, patient_of, level) for rows in seeds], shown, inflation=inflation)
    other: Level = "slice" if level == "study" else "study"
    others = [judge(rows, patient_of, other) for rows in seeds]
    beside = summarise(judge(means, patient_of, other), others, shown, inflation=inflation)
    folds = [rows for _, rows in means.groupby("fold", sort=True)]
    return SliceCountResult(
        num_slices=count,
        metrics=the_eight(summaries),
        accuracy=summaries["accuracy"],
        separation=summaries["separation"],
        other_level=the_eight(beside),
        variance=_variance(seeds, means, data).model_copy(update={"patient_sd": None} if config.optimistic else {}),
        epochs=_selected_epochs(table, config.recipe.frozen_epochs),
        choices=tuple(_choice(rows, table[table["fold"] == rows["fold"].iloc[0]], patient_of) for rows in folds),
        roc=averaged.roc,
        precision_recall=averaged.precision_recall,
        confusion=averaged.confusion,
        learning=_learning_curve(history),
        permutation=_permutation(config, data, count),
        fold_auc=tuple(_area(judge(rows, patient_of, level)) for rows in folds),
        scores_positive=tuple(np.sort(averaged.scores_S[averaged.labels_S == 1]).tolist()),
        scores_negative=tuple(np.sort(averaged.scores_S[averaged.labels_S == 0]).tolist()),
        fold_thresholds=tuple(float(rows[THRESHOLD_OF[level]].iloc[0]) for rows in folds),
    )


def _area(judged: Judged) -> float:
    return roc_auc(judged.labels_S, judged.scores_S)


def _variance(seeds: list[pd.DataFrame], means: pd.DataFrame, data: TrialData) -> VarianceSplit:
    averaged = judge(means, data.patient_of, "study")
    scores_RS = np.stack([judge(rows, data.patient_of, "study").scores_S for rows in seeds])
    folds_S = means.drop_duplicates("study_id")["fold"].to_numpy()
    return split_variance(averaged.labels_S, scores_RS, averaged.patients_S, folds_S)


def _selected_epochs(table: pd.DataFrame, frozen_epochs: int) -> tuple[SelectedEpoch, ...]:
    """Count the scoring epochs of fold x seed trials."""
    counts = Counter(table.drop_duplicates(["fold", "seed"])["epoch"].tolist())
    return tuple(
        SelectedEpoch(epoch=epoch, stage="frozen" if epoch <= frozen_epochs else "unfrozen", trials=counts[epoch])
        for epoch in sorted(counts)
    )


def _choice(means: pd.DataFrame, table: pd.DataFrame, patient_of: Mapping[str, str]) -> FoldChoice:
    """Judge one fold alone; `means` and `table` hold its rows only."""
    averaged = judge(means, patient_of, "study")
    seeds = [rows for _, rows in table.groupby("seed", sort=True)]
    summaries = summarise(averaged, [judge(rows, patient_of, "study") for rows in seeds], None)
    return FoldChoice(
        fold=int(means["fold"].iloc[0]),
        num_studies=len(averaged.labels_S),
        num_positive=int(averaged.labels_S.sum()),
        threshold=float(means["threshold"].iloc[0]),
        epochs=tuple(int(rows["epoch"].iloc[0]) for rows in seeds),
        confusion=averaged.confusion,
        metrics=the_eight(summaries),
    )


def _learning_curve(history: pd.DataFrame) -> LearningCurve:
    reached = history["epoch"].map(history["epoch"].value_counts())
    grouped = history[reached == reached.max()].groupby("epoch", sort=True)
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
