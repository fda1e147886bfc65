"""A realistic study result from drawn scores: no model, no image, no Ray."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np

from lbp_ray.result import (
    METRIC_NAMES,
    AreaComparison,
    BayesReference,
    ClassCount,
    Confusion,
    CropProvenance,
    Curve,
    FunnelStep,
    Interval,
    LearningCurve,
    MetricSummary,
    PermutationNull,
    SegmenterScores,
    SliceCountResult,
    StudyResult,
)

NUM_POSITIVE, NUM_NEGATIVE, NUM_FOLDS = 64, 96, 4


def make_result(
    slice_counts: tuple[int, ...] = (1, 3, 5),
    separation: tuple[float, ...] = (0.85, 1.0, 0.7),
    num_seeds: int = 3,
    **changes: Any,
) -> StudyResult:
    """Build a result of 160 studies; `separation` is the distance of the classes in SDs, per slice count."""
    parts = tuple(make_slice_count(count, gap, num_seeds) for count, gap in zip(slice_counts, separation, strict=False))
    content: dict[str, Any] = {
        "name": "Synthetic lumbar cohort, demo recipe",
        "statements": (
            "The cohort is synthetic: no patient was imaged, and no figure here says anything about back pain.",
            "The backbone starts from random weights; a pretrained one would do better.",
            "A reduced recipe: 4 folds, 3 seeds and 21 epochs instead of 10, 5 and 41.",
        ),
        "config": {
            "recipe": {"backbone": "resnet50", "frozen_epochs": 20, "unfrozen_epochs": 1, "learning_rate": 1e-4},
            "splits": {"folds": 4, "holdout_fraction": 0.1, "seed": 20240229},
            "study_rule": "mean",
            "slice_counts": list(slice_counts),
        },
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
        "comparisons": make_comparisons(slice_counts),
        "bayes": BayesReference(realised_auc=0.957, num_studies=160),
        "crops": make_provenance(),
        "acquisition": {"sequence": "sagittal T2 FSE", "matrix": "256 × 256", "TE": "112.7 ms", "TR": "3500 ms"},
    }
    return StudyResult(**(content | changes))


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


def make_slice_count(num_slices: int, separation: float, num_seeds: int = 3) -> SliceCountResult:
    """Draw scores of one slice count and derive every curve and count from them."""
    random = np.random.default_rng(1000 + num_slices)
    logits = np.concatenate([random.normal(separation, 1, NUM_POSITIVE), random.normal(0, 1, NUM_NEGATIVE)])
    scores = 1 / (1 + np.exp(-(0.6 * logits - 0.5)))
    label = np.arange(scores.size) < NUM_POSITIVE
    thresholds = np.quantile(scores, [0.52, 0.55, 0.56, 0.6])
    called = scores > np.resize(thresholds, scores.size)
    order = np.argsort(-scores)
    hits, misses = np.cumsum(label[order]), np.cumsum(~label[order])
    recall = np.concatenate([[0], hits / NUM_POSITIVE])
    precision = np.concatenate([[1], hits / (hits + misses)])
    false_positive_rate = np.concatenate([[0], misses / NUM_NEGATIVE])
    auc = float(np.trapezoid(recall, false_positive_rate))
    table = Confusion(
        tp=int((called & label).sum()), fp=int((called & ~label).sum()),
        fn=int((~called & label).sum()), tn=int((~called & ~label).sum()),
    )  # fmt: skip
    average_precision = float(np.sum(np.diff(recall) * precision[1:]))
    values = _metric_values(table) | {"roc_auc": auc, "average_precision": average_precision}
    summaries = {name: make_metric(name, value, num_seeds, random) for name, value in values.items()}
    return SliceCountResult(
        num_slices=num_slices,
        metrics=tuple(summaries[name] for name in METRIC_NAMES),
        accuracy=summaries["accuracy"],
        roc=Curve(x=tuple(false_positive_rate.tolist()), y=tuple(recall.tolist())),
        precision_recall=Curve(x=tuple(recall[::-1].tolist()), y=tuple(precision[::-1].tolist())),
        confusion=table,
        learning=_learning(auc, random),
        permutation=_permutation(auc, random),
        fold_auc=tuple((auc + random.normal(0, 0.05, NUM_FOLDS)).clip(0, 1).tolist()),
        scores_positive=tuple(np.sort(scores[label]).tolist()),
        scores_negative=tuple(np.sort(scores[~label]).tolist()),
        fold_thresholds=tuple(thresholds.tolist()),
    )


def make_metric(name: str, value: float, num_seeds: int, random: np.random.Generator) -> MetricSummary:
    """Put a normal interval and a spread over seeds around a value."""
    half = 1.96 * 0.04
    seeds = value + random.normal(0, 0.012, num_seeds)
    return MetricSummary(
        name=name,
        per_seed=tuple(seeds.tolist()),
        mean=float(seeds.mean()),
        sd=float(seeds.std(ddof=1)) if num_seeds > 1 else None,
        interval=Interval(
            estimate=value, low=value - half, high=min(value + half, 1.0), level=0.95,
            method="percentile bootstrap over patients, 2000 resamples",
        ),
    )  # fmt: skip


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
    )
