"""Study rules are compared where they cry equally often; the OR rule alone makes the thesis's false positives."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_curve

from lbp_ray.intervals import WIDENED
from lbp_ray.metrics import roc_auc
from lbp_ray.result import Confusion, Curve
from lbp_ray.rules import FALSE_POSITIVE_RATES, compare_rules, or_curve, recalls_at
from lbp_ray.study import EvaluationConfig

EVALUATION = EvaluationConfig(bootstrap_resamples=200)


def out_of_fold(counts=(1, 3), seeds=(0, 1), number=120, shift=1.2):
    """A table of independent slices whose logits the label shifts."""
    chance = np.random.default_rng(0)
    rows = [
        (
            f"s{study:03d}",
            index,
            seed,
            count,
            1 / (1 + np.exp(-(shift * (study % 4 == 0) + noise))),
            int(study % 4 == 0),
        )
        for count in counts
        for seed in seeds
        for study in range(number)
        for index, noise in enumerate(chance.standard_normal(count))
    ]
    columns = ["study_id", "slice_index", "seed", "num_slices", "probability", "label"]
    return pd.DataFrame(rows, columns=columns).assign(fold=0)


def compared(table, k=2, optimistic=False, evaluation=EVALUATION, inflation=1.0):
    patient_of = {study: f"p{study}" for study in table["study_id"]}
    found = compare_rules(table, patient_of, k=k, evaluation=evaluation, optimistic=optimistic, inflation=inflation)
    return {(row.num_slices, row.rule): row for row in found}


def test_one_slice_has_one_rule_and_more_have_four():
    assert list(compared(out_of_fold())) == [(1, "any"), (3, "any"), (3, "mean"), (3, "top_k"), (3, "noisy_or")]


@pytest.mark.parametrize(
    ("rule", "by_hand"),
    [
        ("any", lambda p: p.max()),
        ("mean", lambda p: p.mean()),
        ("top_k", lambda p: np.sort(p)[-2:].mean()),
        ("noisy_or", lambda p: 1 - np.prod(1 - p)),
    ],
    ids=["any", "mean", "top_k", "noisy_or"],
)
def test_each_rule_is_applied_within_each_seed_and_then_averaged(rule, by_hand):
    table = out_of_fold().sample(frac=1, random_state=1)
    three = table[table["num_slices"] == 3]
    per_seed = three.groupby(["study_id", "seed"])["probability"].apply(lambda p: by_hand(p.to_numpy()))
    scores = per_seed.groupby("study_id").mean()
    labels = three.groupby("study_id")["label"].first()
    found = compared(table)[3, rule]
    assert found.roc_auc == pytest.approx(roc_auc(labels.to_numpy(), scores.to_numpy()))
    false_positive_rate, recall, _ = roc_curve(labels, scores, drop_intermediate=False)
    for at in found.recall_at:
        assert at.recall == pytest.approx(recall[false_positive_rate <= at.false_positive_rate].max())


def test_every_rule_is_judged_at_the_same_rates_with_an_interval():
    for row in compared(out_of_fold()).values():
        assert tuple(at.false_positive_rate for at in row.recall_at) == FALSE_POSITIVE_RATES
        assert row.interval.low < row.roc_auc < row.interval.high
        assert row.interval.method == "DeLong over patients, on the logit scale"
        for at in row.recall_at:
            assert 0 <= at.interval.low <= at.recall <= at.interval.high <= 1
            assert at.interval.method == "percentile bootstrap over patients, 200 resamples"


def test_slices_that_tell_the_same_earn_nothing_at_equal_rates_however_the_rule_counts_them():
    """Three copies of one slice: any-slice decisions at one threshold cannot differ from the one slice's."""
    one = out_of_fold(counts=(1,))
    copies = pd.concat([one.assign(num_slices=3, slice_index=index) for index in range(3)])
    found = compared(pd.concat([one, copies]))
    recalls = {key: [at.recall for at in row.recall_at] for key, row in found.items()}
    assert recalls[3, "any"] == recalls[1, "any"]
    assert recalls[3, "mean"] == pytest.approx(recalls[1, "any"])


def test_slices_that_tell_more_earn_recall_at_equal_rates():
    found = compared(out_of_fold(number=400))
    assert found[3, "mean"].recall_at[1].recall > found[1, "any"].recall_at[1].recall + 0.1


def test_what_was_chosen_on_its_own_fold_has_no_intervals():
    for row in compared(out_of_fold(), optimistic=True).values():
        assert row.interval is None
        assert all(at.interval is None for at in row.recall_at)


def test_cross_validation_widens_the_intervals():
    plain, wide = compared(out_of_fold()), compared(out_of_fold(), inflation=4.0)
    for key, row in wide.items():
        assert row.interval.method == f"{plain[key].interval.method}{WIDENED}"
        assert row.interval.low < plain[key].interval.low < plain[key].interval.high < row.interval.high
        for at, before in zip(row.recall_at, plain[key].recall_at, strict=True):
            assert at.interval.method == f"{before.interval.method}{WIDENED}"
            assert at.recall == before.recall
            twice = 2 * (before.recall - before.interval.low)
            assert at.recall - at.interval.low == pytest.approx(min(at.recall, twice))


def test_exams_of_a_patient_widen_the_intervals():
    """40 patients with three exams that all say the same."""
    table = out_of_fold(counts=(1,), number=40)
    exams = pd.concat([table.assign(study_id=table["study_id"] + exam) for exam in "abc"])
    patient_of = {study: study[:-1] for study in exams["study_id"]}
    clustered = compare_rules(exams, patient_of, k=2, evaluation=EVALUATION, optimistic=False, inflation=1.0)[0]
    apart = compared(exams)[1, "any"]
    assert clustered.roc_auc == apart.roc_auc
    for one, other in ((clustered, apart), (clustered.recall_at[2], apart.recall_at[2])):
        assert one.interval.high - one.interval.low > 1.3 * (other.interval.high - other.interval.low)


def test_a_tie_is_taken_whole_or_not_at_all():
    labels = np.array([1, 1, 0, *[0] * 18, 1])
    scores = np.array([0.9, 0.5, 0.5, *[0.1] * 18, 0.1])
    once = np.ones((1, 22))
    assert recalls_at(labels, scores, once)[0, 0] == pytest.approx(1 / 3)  # the tie would cry at 1 of 19: 0.053
    assert recalls_at(labels, scores, once)[0, 1] == pytest.approx(2 / 3)


def test_no_threshold_below_the_rate_gives_no_recall():
    labels = np.array([1, 1, 0, 0])
    np.testing.assert_array_equal(recalls_at(labels, np.full(4, 0.5), np.ones((1, 4))), [[0, 0, 0, 0]])


def test_recalls_of_resamples_are_those_of_the_cohorts_they_stand_for():
    chance = np.random.default_rng(2)
    labels, scores = np.repeat([1, 0], [15, 45]), np.round(chance.standard_normal(60), 1)
    drawn = chance.integers(0, 60, (5, 60))
    weights = np.stack([np.bincount(rows, minlength=60) for rows in drawn]).astype(float)
    expected = [recalls_at(labels[rows], scores[rows], np.ones((1, 60)))[0] for rows in drawn]
    np.testing.assert_allclose(recalls_at(labels, scores, weights), expected)


@pytest.mark.parametrize(("num_slices", "rate"), [(3, 0.146), (5, 0.231)])
def test_the_any_slice_rule_alone_multiplies_the_thesiss_false_positives(num_slices, rate):
    """From 2 of 39 at one slice (Oulu thesis, Figure 20)."""
    told = or_curve(Curve(x=(0, 0.5, 1), y=(0, 0.8, 1)), Confusion(tp=2, fp=2, fn=12, tn=37), num_slices)
    assert told.num_slices == num_slices
    assert round(told.false_positive_rate, 3) == rate
    assert told.recall == pytest.approx(1 - (12 / 14) ** num_slices)
    assert told.curve.x == pytest.approx((0, 1 - 0.5**num_slices, 1))
    assert told.curve.y == pytest.approx((0, 1 - 0.2**num_slices, 1))


def test_the_curve_is_what_independent_slices_do():
    chance = np.random.default_rng(3)
    ill, healthy = chance.standard_normal((200_000, 3)) + 1, chance.standard_normal((200_000, 3))
    threshold = 1.5
    one = Curve(x=(float((healthy[:, 0] > threshold).mean()),), y=(float((ill[:, 0] > threshold).mean()),))
    told = or_curve(one, Confusion(tp=1, fp=1, fn=1, tn=1), 3).curve
    assert told.x[0] == pytest.approx((healthy > threshold).any(1).mean(), abs=0.005)
    assert told.y[0] == pytest.approx((ill > threshold).any(1).mean(), abs=0.005)
