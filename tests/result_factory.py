"""A realistic study result from drawn scores: no model, no image, no Ray."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lbp_ray.cohort import LABELS
from lbp_ray.result import (
    METRIC_NAMES,
    Agreement,
    AreaComparison,
    BayesReference,
    ClassCount,
    CohortSummary,
    Confusion,
    CropProvenance,
    Curve,
    Duplicates,
    ExcludedByCount,
    ExcludedScores,
    FoldChoice,
    FunnelStep,
    GradeRow,
    GroupRow,
    GroupScores,
    HoldoutChoice,
    HoldoutResult,
    Interval,
    LearningCurve,
    MetricSummary,
    OrCurve,
    PermutationNull,
    ProtocolNull,
    ProtocolRow,
    RecallAt,
    RuleResult,
    SegmenterScores,
    SelectedEpoch,
    SliceCountResult,
    StudyResult,
    Unsealed,
    VarianceSplit,
)
from lbp_ray.splits import Opening
from lbp_ray.study import StudyConfig

NUM_POSITIVE, NUM_NEGATIVE, NUM_FOLDS = 64, 96, 4

RATES = (0.05, 0.1, 0.15, 0.2)
"""False-positive rates at which rules are compared."""


def make_result(
    slice_counts: tuple[int, ...] = (1, 3, 5),
    separation: tuple[float, ...] = (0.85, 1.0, 0.7),
    num_seeds: int = 3,
    *,
    optimistic: bool = False,
    level: str = "study",
    **changes: Any,
) -> StudyResult:
    """Build a result of 160 studies; `separation` is the distance of the classes in SDs, per slice count."""
    parts = tuple(
        make_slice_count(count, gap, num_seeds, optimistic=optimistic, level=level)
        for count, gap in zip(slice_counts, separation, strict=False)
    )
    source = "same_fold" if optimistic else "cross_fitted"
    selection = "same_fold" if optimistic else "fixed_epochs"
    content: dict[str, Any] = {
        "name": "Synthetic lumbar cohort, demo recipe",
        "statements": (
            "The cohort is synthetic: no patient was imaged, and no figure here says anything about back pain.",
            "The backbone starts from random weights; a pretrained one would do better.",
            "A reduced recipe: 4 folds, 3 seeds and 21 epochs instead of 10, 5 and 41.",
        ),
        "config": make_config(
            split={"folds": 4},
            recipe={"frozen_epochs": 20, "selection": selection},
            evaluation={"threshold_source": source, "level": level},
            slice_counts=slice_counts,
        ),
        "hashes": {"store": "3b" * 32, "crops": "9c" * 32, "split": "51" * 32, "recipe": "e0" * 32},
        "environment": {"python": "3.11.7", "torch": "2.9.0", "device": "CPU, 2 cores", "numerics": "1"},
        "funnel": (
            FunnelStep(name="exams in the store", count=240, reason=""),
            FunnelStep(name="exams linked to a questionnaire", count=236, reason="no matching row"),
            FunnelStep(name="exams of the two study groups", count=180, reason="group outside the binary task"),
            FunnelStep(name="exams with every slice offset", count=178, reason="no neighbour at +8 mm"),
            FunnelStep(name="exams in cross-validation", count=160, reason="sealed as hold-out"),
        ),
        "groups": {"asymptomatic": 108, "slightly symptomatic": 30, "symptomatic": 72, "symptomatic/asymptomatic": 26},
        "num_patients": 156,
        "num_studies": NUM_POSITIVE + NUM_NEGATIVE,
        "num_positive": NUM_POSITIVE,
        "num_holdout_studies": 18,
        "holdout_commitment": "7d" * 32,
        "num_folds": NUM_FOLDS,
        "seeds": tuple(range(num_seeds)),
        "slice_counts": parts,
        "level": level,
        "selection": selection,
        "threshold_source": source,
        "comparisons": () if optimistic else make_comparisons(slice_counts),
        "rules": make_rules(parts, intervals=not optimistic),
        "or_curves": make_or_curves(parts),
        "duplicates": Duplicates(num_exams=178, num_pairs=0, num_across_folds=0, lowest_correlation=0.995),
        "cohort": make_cohort(),
        "bayes": BayesReference(realised_auc=0.957, num_studies=160),
        "crops": make_provenance(),
        "acquisition": {"sequence": "sagittal T2 FSE", "matrix": "256 × 256", "TE": "112.7 ms", "TR": "3500 ms"},
    }
    return StudyResult(**(content | changes))


def make_config(**sections: Any) -> dict[str, Any]:
    """Resolve a configuration as a result holds it."""
    places = dict.fromkeys(("store", "questionnaire", "annotations", "runs"), Path("/data"))
    config = StudyConfig(name="demo", paths=places, **sections)
    return config.model_dump(mode="json", exclude={"paths", "compute", "statements"})


def make_cohort(**changes: Any) -> CohortSummary:
    """The Oulu study's Tables 3 and 4, two readers, and a scanner that once left the protocol."""
    counts = {
        "asymptomatic": 413,
        "slightly_symptomatic": 363,
        "symptomatic": 113,
        "symptomatic_asymptomatic": 527,
        "not_enough_data": 11,
    }
    grades = {("pfirrmann", 2): (454, 412, 332, 180, 151), ("modic", 1): (7, 9, 14, 20, 31)}
    ends = Interval(low=0.79, high=0.86, level=0.95, method="bootstrap over patients")
    content: dict[str, Any] = {
        "groups": tuple(
            GroupRow(
                group=name,
                count=count,
                share=count / 1427,
                share_complete=None if name == "not_enough_data" else count / 1416,
            )
            for name, count in counts.items()
        ),
        "num_subjects": 1427,
        "num_complete": 1416,
        "num_multi_match": 37,
        "num_no_match": 0,
        "grades": tuple(
            GradeRow(scale=scale, grade=grade, counts=row, shares=tuple(count / 526 for count in row))
            for (scale, grade), row in grades.items()
        ),
        "num_pfirrmann_zero": 10,
        "adjudication": "worse",
        "agreement": tuple(
            Agreement(
                scale="pfirrmann", level=level, weights="quadratic", num_pairs=526, kappa=kappa,
                interval=None if kappa is None else ends, num_adjudicated=31,
            )
            for level, kappa in (("L1-L2", None), ("L4-L5", 0.81), ("all", 0.83))
        ),
        "protocol": (
            ProtocolRow(parameter="TE", wanted="112.7 ms", found="112.7 to 120.0 ms", num_out=2, num_unknown=1),
        ),
    }  # fmt: skip
    return CohortSummary(**(content | changes))


def make_rules(parts: tuple[SliceCountResult, ...], *, intervals: bool = True) -> tuple[RuleResult, ...]:
    """Compare the rules of every slice count; one slice has one."""
    names = ("any", "mean", "top_k", "noisy_or")
    return tuple(
        RuleResult(
            num_slices=part.num_slices,
            rule=name,
            roc_auc=0.7 + 0.01 * place,
            interval=_interval(0.7 + 0.01 * place) if intervals else None,
            recall_at=tuple(
                RecallAt(
                    false_positive_rate=rate,
                    recall=rate + 0.2 + 0.02 * place,
                    interval=_interval(rate + 0.2 + 0.02 * place) if intervals else None,
                )
                for rate in RATES
            ),
        )
        for part in parts
        for place, name in enumerate(names)
        if part.num_slices > 1 or name == "any"
    )


def make_or_curves(parts: tuple[SliceCountResult, ...]) -> tuple[OrCurve, ...]:
    """Put the one-slice network through the any-slice rule."""
    one = next((part for part in parts if part.num_slices == 1), None)
    if one is None:
        return ()
    rate, recall = one.confusion.fp / NUM_NEGATIVE, one.confusion.tp / NUM_POSITIVE
    return tuple(
        OrCurve(
            num_slices=part.num_slices,
            curve=Curve(
                x=tuple(1 - (1 - x) ** part.num_slices for x in one.roc.x),
                y=tuple(1 - (1 - y) ** part.num_slices for y in one.roc.y),
            ),
            false_positive_rate=1 - (1 - rate) ** part.num_slices,
            recall=1 - (1 - recall) ** part.num_slices,
        )
        for part in parts
        if part.num_slices > 1
    )


def make_unsealed(result: StudyResult, *, number: int = 1, **changes: Any) -> Unsealed:
    """Open the hold-out of a result."""
    opening = Opening(
        line=number,
        number=number,
        study=result.name,
        user="radiologist1",
        time=f"2026-03-0{number}T10:00:00Z",
        result_hash=result.result_hash,
        split_hash="51" * 32,
        studies=(),
        previous="0" * 64,
    )
    content: dict[str, Any] = {
        "opening": opening,
        "num_lost": 2,
        "slice_counts": tuple(_holdout(part) for part in result.slice_counts),
    }
    return Unsealed(**(content | changes))


def _holdout(part: SliceCountResult) -> HoldoutResult:
    held = [summary.model_copy(update={"interval": _interval(summary.estimate)}) for summary in part.metrics]
    bare = tuple(summary.model_copy(update={"interval": None}) for summary in held)
    return HoldoutResult(
        num_slices=part.num_slices,
        num_studies=16,
        num_positive=6,
        threshold=0.41,
        threshold_source="out_of_fold",
        confusion=Confusion(tp=4, fp=3, fn=2, tn=7),
        metrics=tuple(held),
        accuracy=part.accuracy.model_copy(update={"interval": _interval(part.accuracy.estimate)}),
        roc=part.roc,
        precision_recall=part.precision_recall,
        choices=tuple(
            HoldoutChoice(fold=fold, threshold=0.4, confusion=Confusion(tp=4, fp=3, fn=2, tn=7), metrics=bare)
            for fold in range(NUM_FOLDS)
        ),
    )


def make_excluded(result: StudyResult, **changes: Any) -> ExcludedScores:
    """Score the groups between the two classes, with the two classes beside them."""
    groups = {"asymptomatic": 0.3, "slightly_symptomatic": 0.4, "symptomatic_asymptomatic": 0.45, "symptomatic": 0.6}
    content: dict[str, Any] = {
        "result_hash": result.result_hash,
        "num_models": 12,
        "left_out": {"no crop": 3},
        "slice_counts": tuple(
            ExcludedByCount(
                num_slices=part.num_slices,
                threshold=0.42,
                groups=tuple(
                    GroupScores(
                        group=name,
                        num_studies=30,
                        mean=share,
                        sd=0.1,
                        quartiles=(share - 0.05, share, share + 0.05),
                        share_positive=share,
                        interval=None if result.optimistic and name in LABELS else _interval(share),
                    )
                    for name, share in groups.items()
                ),
            )
            for part in result.slice_counts
        ),
    }
    return ExcludedScores(**(content | changes))


def make_comparisons(slice_counts: tuple[int, ...], **p_adjusted: float) -> tuple[AreaComparison, ...]:
    """Compare every pair; ``k1_k5=0.01`` gives a pair its p-value, the others are far from differing."""
    pairs = combinations(sorted(slice_counts), 2)
    values = {pair: p_adjusted.get(f"k{pair[0]}_k{pair[1]}", 0.64) for pair in pairs}
    return tuple(
        AreaComparison(
            first=first, second=second, difference=0.1, low=0.02 if p <= 0.05 else -0.05, high=0.18, level=0.95,
            p_value=p / 2, p_adjusted=p,
        )
        for (first, second), p in values.items()
    )  # fmt: skip


def make_provenance(**changes: Any) -> CropProvenance:
    """Crops by a segmenter, three of them corrected by hand, whose sources do not know the label."""
    content: dict[str, Any] = {
        "sources": (
            ClassCount(name="manual", negative=2, positive=1),
            ClassCount(name="model", negative=38, positive=25),
            ClassCount(name="out_of_fold", negative=56, positive=38),
        ),
        "excluded": (ClassCount(name="roi_several_components", negative=1, positive=1),),
        "statistic": 0.06,
        "p_value": 0.97,
        "num_permutations": 4999,
        "segmenter": SegmenterScores(
            num_images=110,
            num_folds=5,
            dice=0.951,
            standard_error_images=0.002,
            standard_error_folds=0.004,
            baseline_dice=0.712,
            centroid_error_median_mm=1.4,
            centroid_error_p95_mm=3.9,
        ),
    }
    return CropProvenance(**(content | changes))


class _Judged(NamedTuple):
    """What units (studies or slices) with scores and decisions give."""

    roc: Curve
    precision_recall: Curve
    confusion: Confusion
    values: dict[str, float]


def make_slice_count(
    num_slices: int, separation: float, num_seeds: int = 3, *, optimistic: bool = False, level: str = "study"
) -> SliceCountResult:
    """Draw scores of one slice count and derive every curve and count from them."""
    random = np.random.default_rng(1000 + num_slices)
    logits = np.concatenate([random.normal(separation, 1, NUM_POSITIVE), random.normal(0, 1, NUM_NEGATIVE)])
    scores = 1 / (1 + np.exp(-(0.6 * logits - 0.5)))
    label = np.arange(scores.size) < NUM_POSITIVE
    thresholds = np.quantile(scores, [0.52, 0.55, 0.56, 0.6])
    studies = _judge(label, scores, thresholds)
    slices = _judge(np.repeat(label, num_slices), np.repeat(scores, num_slices), thresholds)
    judged, other = (studies, slices) if level == "study" else (slices, studies)
    summaries, others = (
        {name: make_metric(name, value, num_seeds, random, bare=optimistic) for name, value in held.values.items()}
        for held in (judged, other)
    )
    auc, units = judged.values["roc_auc"], num_slices if level == "slice" else 1
    epochs = (SelectedEpoch(epoch=21, stage="unfrozen", trials=NUM_FOLDS * num_seeds),)
    if optimistic:
        rest = NUM_FOLDS * num_seeds - 2
        epochs = (
            SelectedEpoch(epoch=14, stage="frozen", trials=2),
            SelectedEpoch(epoch=21, stage="unfrozen", trials=rest),
        )
    return SliceCountResult(
        num_slices=num_slices,
        metrics=tuple(summaries[name] for name in METRIC_NAMES),
        accuracy=summaries["accuracy"],
        separation=summaries["separation"],
        other_level=tuple(others[name] for name in METRIC_NAMES),
        variance=VarianceSplit(patient_sd=0.038, fold_sd=0.021, seed_sd=0.009 if num_seeds > 1 else None),
        epochs=epochs,
        choices=_choices(studies, num_seeds, thresholds),
        roc=judged.roc,
        precision_recall=judged.precision_recall,
        confusion=judged.confusion,
        learning=_learning(auc, random),
        permutation=_permutation(auc, random),
        fold_auc=tuple((auc + random.normal(0, 0.05, NUM_FOLDS)).clip(0, 1).tolist()),
        scores_positive=tuple(np.sort(np.repeat(scores[label], units)).tolist()),
        scores_negative=tuple(np.sort(np.repeat(scores[~label], units)).tolist()),
        fold_thresholds=tuple(thresholds.tolist()),
    )


def _judge(label: np.ndarray, scores: np.ndarray, thresholds: np.ndarray) -> _Judged:
    called = scores > np.resize(thresholds, scores.size)
    order = np.argsort(-scores, kind="stable")
    positive, negative = label.sum(), (~label).sum()
    hits, misses = np.cumsum(label[order]), np.cumsum(~label[order])
    recall = np.concatenate([[0], hits / positive])
    precision = np.concatenate([[1], hits / (hits + misses)])
    false_positive_rate = np.concatenate([[0], misses / negative])
    table = Confusion(
        tp=int((called & label).sum()), fp=int((called & ~label).sum()),
        fn=int((~called & label).sum()), tn=int((~called & ~label).sum()),
    )  # fmt: skip
    return _Judged(
        Curve(x=tuple(false_positive_rate.tolist()), y=tuple(recall.tolist())),
        Curve(x=tuple(recall[::-1].tolist()), y=tuple(precision[::-1].tolist())),
        table,
        _metric_values(table)
        | {
            "roc_auc": float(np.trapezoid(recall, false_positive_rate)),
            "average_precision": float(np.sum(np.diff(recall) * precision[1:])),
            "separation": float(scores[label].mean() - scores[~label].mean()),
        },
    )


def _choices(studies: _Judged, num_seeds: int, thresholds: np.ndarray) -> tuple[FoldChoice, ...]:
    """Each fold alone: figures that scatter around those of all folds."""
    random = np.random.default_rng(7)
    return tuple(
        FoldChoice(
            fold=fold,
            num_studies=40,
            num_positive=16,
            threshold=float(thresholds[fold]),
            epochs=(14,) + (21,) * (num_seeds - 1),
            confusion=Confusion(tp=10 + fold, fp=8, fn=6 - fold, tn=16),
            metrics=tuple(
                make_metric(
                    name, float(np.clip(studies.values[name] + random.normal(0, 0.08), 0, 1)), num_seeds, random,
                    bare=True,
                )
                for name in METRIC_NAMES
            ),
        )
        for fold in range(NUM_FOLDS)
    )  # fmt: skip


def make_metric(
    name: str, value: float, num_seeds: int, random: np.random.Generator, *, bare: bool = False
) -> MetricSummary:
    """Put a normal interval, unless it is bare, and a spread over seeds around a value."""
    seeds = value + random.normal(0, 0.012, num_seeds)
    return MetricSummary(
        name=name,
        estimate=value,
        interval=None if bare else _interval(value),
        per_seed=tuple(seeds.tolist()),
        mean=float(seeds.mean()),
        sd=float(seeds.std(ddof=1)) if num_seeds > 1 else None,
    )


def _interval(value: float) -> Interval:
    half = 1.96 * 0.04
    method = "percentile bootstrap over patients, 2000 resamples"
    return Interval(low=value - half, high=min(value + half, 1.0), level=0.95, method=method)


def _metric_values(table: Confusion) -> dict[str, float]:
    tp, fp, fn, tn = table.tp, table.fp, table.fn, table.tn
    recall, specificity = tp / (tp + fn), tn / (tn + fp)
    return {
        "precision": tp / (tp + fp),
        "npv": tn / (tn + fn),
        "recall": recall,
        "specificity": specificity,
        "balanced_accuracy": (recall + specificity) / 2,
        "mcc": (tp * tn - fp * fn) / float(np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))),
        "accuracy": (tp + tn) / (tp + fp + fn + tn),
    }


def _learning(auc: float, random: np.random.Generator) -> LearningCurve:
    epochs = np.arange(1, 22)
    decay = np.exp(-epochs / 6)
    noise = random.normal(0, 0.006, (3, epochs.size))
    return LearningCurve(
        epoch=tuple(epochs.tolist()),
        stage=tuple("frozen" if epoch <= 20 else "unfrozen" for epoch in epochs),
        train_loss=tuple((0.56 + 0.14 * decay + noise[0]).tolist()),
        train_loss_sd=tuple((0.012 + 0 * decay).tolist()),
        validation_loss=tuple((0.62 + 0.08 * decay + noise[1]).tolist()),
        validation_loss_sd=tuple((0.03 + 0 * decay).tolist()),
        validation_auc=tuple((auc - 0.15 * decay + noise[2]).tolist()),
        validation_auc_sd=tuple((0.05 + 0 * decay).tolist()),
    )


def _permutation(auc: float, random: np.random.Generator) -> PermutationNull:
    null = random.normal(0.5, 0.042, 200)
    observed = auc - 0.01
    return PermutationNull(
        num_permutations=200,
        observed=observed,
        mean=float(null.mean()),
        sd=float(null.std(ddof=1)),
        p_value=float((1 + (null >= observed).sum()) / 201),
        null=tuple(null.tolist()),
        balanced_accuracy=(
            ProtocolNull(selection="fixed_epochs", threshold_source="cross_fitted", mean=0.501, sd=0.031),
            ProtocolNull(selection="fixed_epochs", threshold_source="same_fold", mean=0.574, sd=0.028),
            ProtocolNull(selection="same_fold", threshold_source="cross_fitted", mean=0.518, sd=0.033),
            ProtocolNull(selection="same_fold", threshold_source="same_fold", mean=0.603, sd=0.026),
        ),
    )


def with_part(result: StudyResult, index: int = 0, **changes: Any) -> StudyResult:
    """Change one slice count's part of a result."""
    parts = list(result.slice_counts)
    parts[index] = parts[index].model_copy(update=changes)
    return result.model_copy(update={"slice_counts": tuple(parts)})


def with_metric(result: StudyResult, name: str, index: int = 0, **changes: Any) -> StudyResult:
    """Change one metric of one slice count."""
    held = result.slice_counts[index].metrics
    metrics = tuple(metric.model_copy(update=changes) if metric.name == name else metric for metric in held)
    return with_part(result, index, metrics=metrics)


def with_auc(result: StudyResult, *bounds: tuple[float, float]) -> StudyResult:
    """Give the first slice counts ROC-AUCs in the middle of these intervals."""
    for index, (low, high) in enumerate(bounds):
        interval = Interval(low=low, high=high, level=0.95, method="bootstrap")
        result = with_metric(result, "roc_auc", index, estimate=(low + high) / 2, interval=interval)
    return result
