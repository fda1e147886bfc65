"""The sentences that open a report, and what tables say of slice counts: made from the figures, never a ranking."""

from __future__ import annotations

import re

import pytest
from result_factory import make_comparisons, make_result, with_auc, with_metric, with_part

from lbp_ray.intervals import WIDENED
from lbp_ray.report.details import detail_tables
from lbp_ray.report.verdict import comparison, verdict_sentences
from lbp_ray.report.words import metric, number
from lbp_ray.result import BayesReference, Interval


@pytest.fixture(scope="module")
def result():
    return make_result()


@pytest.mark.parametrize(
    ("bounds", "first"),
    [
        (((0.6, 0.8), (0.6, 0.8), (0.51, 0.7)), "Better than chance with 1, 3 and 5 slices."),
        (
            ((0.6, 0.8), (0.5, 0.7), (0.4, 0.6)),
            "Better than chance with 1 slice; not shown to be better than chance with 3 and 5 slices.",
        ),
        (((0.4, 0.6),) * 3, "Not shown to be better than chance with 1, 3 and 5 slices."),
    ],
    ids=["all above", "an end on 0.5 includes it", "none"],
)
def test_verdict_follows_the_intervals(result, bounds, first):
    assert verdict_sentences(with_auc(result, *bounds))[0] == first


@pytest.mark.parametrize(("counts", "told"), [((1, 3), 1), ((3,), 0)])
def test_verdict_on_several_slice_counts_says_that_none_is_corrected_for(counts, told):
    text = " ".join(verdict_sentences(make_result(counts, (0.9,) * len(counts))))
    assert text.count("Each slice count is judged for itself, with no correction for their number.") == told


def test_verdict_below_chance_names_the_likely_fault(result):
    assert "swapped labels" in verdict_sentences(with_auc(result, (0.2, 0.4)))[0]


def test_verdict_never_ranks_slice_counts_that_do_not_differ(result):
    text = " ".join(verdict_sentences(result))
    assert "1, 3 and 5 slices are not distinguishable here (smallest p\u00a0=\u00a00.640, Holm over 3 pairs)" in text
    assert "does not make them equal" in text
    assert comparison(result, "roc_auc") == "not distinguishable here"
    assert not re.search(r"\b(best with|worst|highest|lowest|outperform|superior)", text)


def test_verdict_names_pairs_that_differ_on_the_same_studies():
    result = make_result(comparisons=make_comparisons((1, 3, 5), k1_k5=0.012))
    text = " ".join(verdict_sentences(result))
    told = "5 slices lie 0.10 above 1 slice (unadjusted 95\u202f% interval 0.02 to 0.18, p\u00a0=\u00a00.012)"
    assert told in text
    assert "Holm over 3 pairs; the other pairs are not distinguishable here." in text
    assert comparison(result, "roc_auc") == "differ: 1 | 5 (p\u00a0=\u00a00.012)"


def test_metrics_without_a_paired_test_are_not_compared(result):
    apart = with_metric(result, "recall", 0, interval=Interval(low=0, high=0.2, level=0.95, method=""))
    assert comparison(apart, "recall") == "not tested"


def test_verdict_says_how_large_a_difference_may_still_be(result):
    widest = max(result.comparisons, key=lambda pair: pair.high - pair.low)
    text = " ".join(verdict_sentences(result)).replace("\u202f", " ")
    bounds = f"{number(widest.low)} to {number(widest.high)}"
    assert f"the widest unadjusted 95 % interval of a difference is {bounds}." in text
    assert "exclude" not in text[text.index("not distinguishable") :]


def with_pairs(p_value, adjusted, bounds, counts=(1, 3, 5)):
    """A result whose pairs of slice counts all have this difference."""
    told = {"p_value": p_value, "p_adjusted": adjusted, "low": bounds[0], "high": bounds[1]}
    pairs = tuple(pair.model_copy(update=told) for pair in make_comparisons(counts))
    return make_result(counts, (0.9,) * len(counts), comparisons=pairs)


def test_verdict_explains_intervals_that_exclude_0_where_holm_tells_nothing_apart():
    text = " ".join(verdict_sentences(with_pairs(0.03, 0.09, (0.005, 0.195)))).replace("\u00a0", " ")
    assert "not distinguishable here (smallest p = 0.090, Holm over 3 pairs)" in text
    assert (
        "interval of a difference is 0.01 to 0.20. 3 of the 3 intervals exclude 0, which is no contradiction: each is"
        " of one pair alone, unadjusted, and Holm's correction over all 3 pairs asks for more."
    ) in text


@pytest.mark.parametrize("side", [1, -1], ids=["above", "below"])
def test_verdict_explains_a_pair_that_holm_leaves_beside_one_that_differs(side):
    differ, plain, held = make_comparisons((1, 3, 5), k1_k3=0.01)
    low, high = sorted((0.005 * side, 0.195 * side))
    held = held.model_copy(update={"p_value": 0.04, "p_adjusted": 0.08, "low": low, "high": high})
    text = " ".join(verdict_sentences(make_result(comparisons=(differ, plain, held))))
    assert "One of the 3 intervals excludes 0, which is no contradiction" in text


def test_a_single_pair_needs_no_adjustment():
    text = " ".join(verdict_sentences(with_pairs(0.3, 0.3, (-0.05, 0.15), (1, 3)))).replace("\u202f", " ")
    assert "the 95 % interval of the difference is −0.05 to 0.15." in text
    assert "adjusted" not in text


def test_table_of_pairs_says_what_is_adjusted(result):
    (sheet,) = (sheet for sheet in detail_tables(result) if sheet.name == "comparisons")
    assert [name.replace("\u202f", " ") for name in sheet.head[2:5]] == [
        "unadjusted 95 % interval", "p, unadjusted", "p, Holm",
    ]  # fmt: skip
    assert "an interval may exclude 0 where the pair is not distinguishable" in sheet.note


def test_widened_intervals_are_said_to_be(result):
    assert "widened" not in verdict_sentences(result)[-1]
    held = metric(result.slice_counts[0], "roc_auc").interval
    wide = held.model_copy(update={"method": f"{held.method}{WIDENED}"})
    told = verdict_sentences(with_metric(result, "roc_auc", 0, interval=wide))[-1]
    assert told.endswith(
        "Out of fold they are widened, because each patient trained the networks that score the others."
    )


def test_every_pair_of_slice_counts_has_a_row(result):
    (sheet,) = (sheet for sheet in detail_tables(result) if sheet.name == "comparisons")
    assert [row[0] for row in sheet.rows] == ["3 slices − 1 slice", "5 slices − 1 slice", "5 slices − 3 slices"]
    assert {row[-1] for row in sheet.rows} == {"not distinguishable here"}
    assert [record["low"] for record in sheet.records] == [pair.low for pair in result.comparisons]


def test_verdict_counts_pairs_when_there_are_many():
    counts = (1, 3, 5, 7)
    given = {"k1_k3": 0.01, "k1_k5": 0.01, "k1_k7": 0.01, "k3_k7": 0.02}
    many = make_result(counts, (0.9,) * 4, comparisons=make_comparisons(counts, **given))
    text = " ".join(verdict_sentences(with_auc(many, (0.4, 0.5), (0.55, 0.7), (0.6, 0.7), (0.6, 0.8))))
    assert "4 of 6 pairs of slice counts differ; the other pairs are not distinguishable here." in text
    assert "that of 1 slice includes 0.5" in text


def test_verdict_measures_distance_to_the_ceiling(result):
    bounds = ((0.7, 0.8), (0.6, 0.8), (0.6, 0.7))
    assert "The estimates stay 0.21 to 0.31 below it." in verdict_sentences(with_auc(result, *bounds))
    over = result.model_copy(update={"bayes": BayesReference(realised_auc=0.6, num_studies=160)})
    assert "luck or leakage" in " ".join(verdict_sentences(over))


def test_verdict_reads_the_permutations(result):
    null = result.slice_counts[2].permutation
    weak = with_part(result, 2, permutation=null.model_copy(update={"p_value": 0.21, "mean": 0.56}))
    text = " ".join(verdict_sentences(weak)).replace("\u00a0", " ")
    assert "stands out with 1 slice (p = 0.005) and 3 slices (p = 0.005)" in text
    assert "does not stand out with 5 slices (p = 0.210)" in text
    assert "With 5 slices the shuffled labels do not average 0.50" in text
