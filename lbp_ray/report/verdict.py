"""What the figures say, in plain sentences made from the figures.

No sentence ranks slice counts: what a paired comparison does not tell apart reads "not distinguishable here", which
claims no equality.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lbp_ray.intervals import WIDENED
from lbp_ray.report.optimism import notice
from lbp_ray.report.provenance import association_warning
from lbp_ray.report.words import bounds, by_slices, interval_level, listed, metric, number, p_value, slices

if TYPE_CHECKING:
    from lbp_ray.result import AreaComparison, Interval, MetricSummary, PermutationNull, StudyResult

CHANCE_AUC = 0.5
"""ROC-AUC of scores that know nothing of the label."""

PERMUTATION_LEVEL = 0.05
"""A permutation p-value at or below this is called "stands out"; the value itself is always printed."""

COMPARISON_LEVEL = 0.05
"""Two slice counts differ when the adjusted p-value of their paired comparison is at or below this."""

NULL_MEAN_TOLERANCE = 0.02
"""A permutation mean farther than this from 0.5 is pointed out: it hints at leakage or at a faulty shuffle."""

MAX_PAIRS_NAMED = 3
"""Pairs of slice counts that a sentence names one by one; beyond, it counts them."""

INTERVAL_MEANING = "Intervals are over patients and conditional on the trained models."
"""Stands wherever intervals are shown."""

WIDENING = "Out of fold they are widened, because each patient trained the networks that score the others."
"""Follows `INTERVAL_MEANING` where that is so."""

INTERVAL_EXPLANATION = (
    "They say how the figures would move with other patients, not with other trainings; of those the spread over seeds"
    " gives an idea."
)
"""Follows `INTERVAL_MEANING` where there is room."""


def verdict_sentences(result: StudyResult) -> list[str]:
    """Write the paragraph that opens the report.

    Parameters
    ----------
    result
        A result that `check_reportable` accepted.

    Returns
    -------
    list of str
        Sentences in reading order: chance, ceiling (synthetic cohorts), permutations, slice counts, crop sources that
        differ between the classes, intervals. Of an optimistic result only why it has no verdict, and the crops.
    """
    if result.optimistic:
        return [*notice(result), *association_warning(result)]
    return [
        *_chance_sentences(result),
        *_ceiling_sentences(result),
        *_permutation_sentences(result),
        *_comparison_sentences(result),
        *association_warning(result),
        interval_meaning(result),
    ]


def interval_meaning(result: StudyResult) -> str:
    """Say what the intervals of an honest result hold, and whether they are widened for cross-validation."""
    held = [metric(part, "roc_auc").interval for part in by_slices(result)]
    is_widened = any(interval is not None and interval.method.endswith(WIDENED) for interval in held)
    return f"{INTERVAL_MEANING} {WIDENING}" if is_widened else INTERVAL_MEANING


def against_chance(interval: Interval) -> str:
    """Say where an AUC interval lies: ``above``, ``includes`` or ``below`` 0.5 (an end on 0.5 includes it)."""
    if interval.low > CHANCE_AUC:
        return "above"
    return "below" if interval.high < CHANCE_AUC else "includes"


def held_interval(summary: MetricSummary) -> Interval:
    """Return the interval that every metric of an honest result has."""
    assert summary.interval is not None, "checked before anything is reported"
    return summary.interval


def comparison(result: StudyResult, name: str) -> str:
    """Write what a table cell may say about one metric across slice counts; ROC-AUC alone has a paired test."""
    if result.optimistic:
        return "not compared: optimistic"
    if len(result.slice_counts) < 2:
        return "one slice count only"
    if name == "roc_auc":
        differ = differing(result)
        pairs = ", ".join(f"{pair.first} | {pair.second} ({p_value(pair.p_adjusted)})" for pair in differ)
        return f"differ: {pairs}" if differ else "not distinguishable here"
    return "not tested"


def differing(result: StudyResult) -> list[AreaComparison]:
    """Return the pairs of slice counts whose ROC-AUC differs on the same studies, after Holm's correction."""
    return [pair for pair in result.comparisons if pair.p_adjusted <= COMPARISON_LEVEL]


def _chance_sentences(result: StudyResult) -> list[str]:
    groups: dict[str, list[int]] = {"above": [], "includes": [], "below": []}
    for part in by_slices(result):
        groups[against_chance(held_interval(metric(part, "roc_auc")))].append(part.num_slices)
    claims = {
        "above": "better than chance with {}",
        "includes": "not shown to be better than chance with {}",
        "below": "below chance with {}, which hints at swapped labels or a fault",
    }
    headline = "; ".join(claims[side].format(_slice_list(counts)) for side, counts in groups.items() if counts)
    one = {"above": "excludes 0.5", "includes": "includes 0.5", "below": "lies below 0.5"}
    many = {"above": "exclude 0.5", "includes": "include 0.5", "below": "lie below 0.5"}
    held = [side for side, counts in groups.items() if counts]
    if len(held) == 1:
        position = f"{'the' if len(groups[held[0]]) == 1 else 'each'} interval {one[held[0]]}"
    else:
        position = listed(
            [
                f"that of {_slice_list(groups[side])} {one[side]}"
                if len(groups[side]) == 1
                else f"those of {_slice_list(groups[side])} {many[side]}"
                for side in held
            ]
        )
    alone = ["Each slice count is judged for itself, with no correction for their number."]
    sentences = [f"{headline[0].upper()}{headline[1:]}.", f"{_auc_figures(result)}; {position}."]
    return sentences + (alone if len(result.slice_counts) > 1 else [])


def _auc_figures(result: StudyResult) -> str:
    told: list[str] = []
    for part in by_slices(result):
        area = metric(part, "roc_auc")
        of = "" if told else f"{interval_level(result)} interval "
        told.append(f"{number(area.estimate)} with {slices(part.num_slices)} ({of}{bounds(area.interval)})")
    return f"Judged on patients left out of the training, ROC-AUC is {listed(told)}"


def _slice_list(counts: list[int]) -> str:
    return listed([*[str(count) for count in counts[:-1]], slices(counts[-1])])


def _ceiling_sentences(result: StudyResult) -> list[str]:
    if result.bayes is None:
        return []
    ceiling = result.bayes.realised_auc
    gaps = [ceiling - metric(part, "roc_auc").estimate for part in by_slices(result)]
    known = (
        "The cohort is synthetic, so the best ROC-AUC that any model could reach on these very studies is known:"
        f" {number(ceiling)}."
    )
    if min(gaps) < 0:
        return [known, "An estimate above that ceiling is luck or leakage: look for the latter first."]
    low, high = number(min(gaps)), number(max(gaps))
    distance = low if low == high else f"{low} to {high}"
    stays = "estimate stays" if len(gaps) == 1 else "estimates stay"
    return [known, f"The {stays} {distance} below it."]


def _permutation_sentences(result: StudyResult) -> list[str]:
    tested = [(part.num_slices, part.permutation) for part in by_slices(result) if part.permutation is not None]
    if not tested:
        return ["No permutation test was run."]
    times = listed(sorted({str(null.num_permutations) for _, null in tested}, key=int))
    out = [f"{slices(n)} ({p_value(null.p_value)})" for n, null in tested if null.p_value <= PERMUTATION_LEVEL]
    within = [f"{slices(n)} ({p_value(null.p_value)})" for n, null in tested if null.p_value > PERMUTATION_LEVEL]
    means = listed(sorted({number(null.mean) for _, null in tested}))
    claims = [f"stands out with {listed(out)}"] if out else []
    claims += [f"does not stand out with {listed(within)}"] if within else []
    sentences = [
        f"Against {times} shuffles of the labels among patients, whose AUC averages {means},"
        f" the frozen stage {', and '.join(claims)}."
    ]
    drifted = [slices(n) for n, null in tested if _drifts(null)]
    if drifted:
        sentences.append(
            f"With {listed(drifted)} the shuffled labels do not average 0.50 ± {NULL_MEAN_TOLERANCE}:"
            " look for leakage before believing the rest."
        )
    return sentences


def _drifts(null: PermutationNull) -> bool:
    """Whether the null's mean is farther from chance than tolerated, and than few shuffles explain (three errors)."""
    error = null.sd / null.num_permutations**0.5
    return bool(abs(null.mean - CHANCE_AUC) > max(NULL_MEAN_TOLERANCE, 3 * error))


def _comparison_sentences(result: StudyResult) -> list[str]:
    if len(result.slice_counts) < 2:
        return []
    differ, pairs = differing(result), len(result.comparisons)
    by = "By ROC-AUC on the same studies" if result.level == "study" else "By the ROC-AUC of study scores"
    holm = f", Holm over {pairs} pairs" if pairs > 1 else ""
    if not differ:
        counts = _slice_list([part.num_slices for part in by_slices(result)])
        smallest = min(pair.p_adjusted for pair in result.comparisons)
        told = f"{'smallest ' if pairs > 1 else ''}{p_value(smallest)}{holm}"
        widest = max(result.comparisons, key=lambda pair: pair.high - pair.low)
        level = interval_level(result)
        which = f"the widest unadjusted {level} interval" if pairs > 1 else f"the {level} interval"
        return [
            f"{by}, {counts} are not distinguishable here ({told}), which does not make them equal: {which} of"
            f" {'a' if pairs > 1 else 'the'} difference is {number(widest.low)} to {number(widest.high)}.",
            *_unadjusted_sentences(result),
        ]
    rest = "; the other pairs are not distinguishable here" if len(differ) < pairs else ""
    if len(differ) > MAX_PAIRS_NAMED:
        sentence = f"{by}, {len(differ)} of {pairs} pairs of slice counts differ{rest}."
    else:
        sentence = f"{by}, {'; '.join(_difference(result, pair) for pair in differ)}{holm}{rest}."
    return [sentence, *_unadjusted_sentences(result), "One metric alone ranks nothing."]


def _unadjusted_sentences(result: StudyResult) -> list[str]:
    """Say why an interval excludes 0 where Holm's p-value does not tell the pair apart."""
    undone = [pair for pair in result.comparisons if pair.p_value <= COMPARISON_LEVEL < pair.p_adjusted]
    held = [pair for pair in undone if not pair.low <= 0 <= pair.high]
    if not held:
        return []
    pairs = len(result.comparisons)
    told = (
        f"{len(held)} of the {pairs} intervals exclude" if len(held) > 1 else f"One of the {pairs} intervals excludes"
    )
    return [
        f"{told} 0, which is no contradiction: each is of one pair alone, unadjusted, and Holm's correction over all"
        f" {pairs} pairs asks for more."
    ]


def _difference(result: StudyResult, pair: AreaComparison) -> str:
    side = "above" if pair.difference > 0 else "below"
    low, high = sorted((abs(pair.low), abs(pair.high))) if pair.low * pair.high > 0 else (pair.low, pair.high)
    unadjusted = "unadjusted " if len(result.comparisons) > 1 else ""
    return (
        f"{slices(pair.second)} lie {number(abs(pair.difference))} {side} {slices(pair.first)}"
        f" ({unadjusted}{interval_level(result)} interval {number(low)} to {number(high)}, {p_value(pair.p_adjusted)})"
    )
