from __future__ import annotations

import pandas as pd
import pytest

from lbp_ray.cohort import ANSWERS, CohortError, classify, label_exams, matched_rules
from lbp_ray.cohort.questionnaire import DAYS, reported_rows


def answers(*rows):
    return pd.DataFrame(rows, columns=list(ANSWERS))


@pytest.mark.parametrize(
    ("row", "group"),
    [
        ((2, 3, 6, 0, 1), "symptomatic"),
        ((2, 4, 10, 1, 1), "symptomatic"),
        ((2, 3, 6, 0, 0), "symptomatic_asymptomatic"),
        ((1, None, None, 0, 0), "asymptomatic"),
        ((2, 1, 3, 0, 0), "asymptomatic"),
        ((2, 1, 3, 0, 1), "asymptomatic"),
        ((2, 1, 3, 1, 1), "slightly_symptomatic"),
        ((2, 2, 5, 0, 1), "slightly_symptomatic"),
        ((2, 3, 5, 0, 1), "slightly_symptomatic"),
        ((2, 2, 7, 0, 1), "unclassified"),
        ((1, None, None, 1, 0), "unclassified"),
        ((2, None, 4, 0, 1), "not_enough_data"),
        ((2, 3, 6, 0, None), "not_enough_data"),
        ((None, 3, 6, 0, 1), "not_enough_data"),
    ],
)
def test_rules(row, group):
    assert classify(answers(row)).tolist() == [group]


@pytest.mark.parametrize(
    ("column", "value"),
    [("frequency", 5), ("frequency", 2.5), ("intensity", 11), ("pain_now", "yes"), ("pain_now", 0.5), ("pain_now", 2)],
)
def test_answers_out_of_range_are_named(column, value):
    table = answers((2, 3, 6, 0, 1), (2, 3, 6, 0, 1)).astype(object)
    table.loc[1, column] = value
    with pytest.raises(CohortError, match=rf"{column} must be a (whole )?number.*line\(s\) 3"):
        classify(table)


def in_days(days, *rest):
    return pd.DataFrame([(2, days, *rest)], columns=[DAYS if name == "frequency" else name for name in ANSWERS])


@pytest.mark.parametrize(
    ("days", "group", "strict"),
    [
        (365, "symptomatic", "symptomatic"),
        (31, "symptomatic", "symptomatic"),
        (30, "symptomatic", "unclassified"),
        (29, "unclassified", "unclassified"),
    ],
)
def test_thirty_days_are_symptomatic_unless_strict(days, group, strict):
    table = in_days(days, 6, 0, 1)
    assert classify(table).tolist() == [group]
    assert classify(table, strict_gt30=True).tolist() == [strict]


def test_seven_days_are_asymptomatic_and_eight_are_not():
    assert [classify(in_days(days, 3, 0, 0))[0] for days in (0, 7, 8)] == ["asymptomatic"] * 2 + ["unclassified"]


def test_strictness_does_not_touch_codes():
    table = answers((2, 3, 6, 0, 1), (2, 2, 6, 0, 1))
    assert classify(table, strict_gt30=True).tolist() == ["symptomatic", "unclassified"]


def test_no_implies_frequency_and_intensity_zero():
    table = answers((1, 4, 9, 0, 0), (1, None, None, 0, 0))
    assert classify(table).tolist() == ["asymptomatic"] * 2
    assert reported_rows(table)["why"].tolist() == ["contradiction"]


def test_frequency_is_given_once():
    table = answers((2, 3, 6, 0, 1))
    with pytest.raises(CohortError, match="found both"):
        classify(table.assign(frequency_days=40))
    with pytest.raises(CohortError, match="found neither"):
        classify(table.drop(columns="frequency"))
    with pytest.raises(CohortError, match="frequency_days must be a number from 0 to 365"):
        classify(in_days(366, 6, 0, 1))


@pytest.mark.parametrize(
    ("row", "met"),
    [
        ((2, 3, 6, 0, 1), {"symptomatic"}),
        ((2, 3, 6, 0, 0), {"symptomatic", "symptomatic_asymptomatic"}),
        ((2, 1, 3, 0, 1), {"asymptomatic", "slightly_symptomatic"}),
        ((2, 2, 7, 0, 1), set()),
        ((2, 3, 6, None, None), {"symptomatic"}),
        ((2, None, 4, 0, 1), {"slightly_symptomatic"}),
    ],
)
def test_rules_are_matched_as_worded(row, met):
    matched = matched_rules(answers(row))
    assert {name for name in matched if matched[name][0]} == met


def test_order_decides_among_all_answers_that_can_be_given():
    """Every group is one of the rules met; a row that meets none is unclassified or incomplete."""
    grid = pd.MultiIndex.from_product([(1, 2), (1, 2, 3, 4, None), range(11), (0, 1), (0, 1, None)]).to_frame()
    table = answers(*grid.to_numpy().tolist())
    groups, matched = classify(table), matched_rules(table)
    for name in matched:
        assert matched.loc[groups == name, name].all()
    assert not matched[groups == "unclassified"].any(axis=None)
    assert set(groups[matched["symptomatic_asymptomatic"] & (table["previous_episodes"] == 0)]) == {
        "symptomatic_asymptomatic"
    }
    assert groups[table["pain_now"].isna()].eq("not_enough_data").all()


def test_reported_rows_keep_their_lines_and_incomplete_ones_stay_out():
    table = answers((2, 3, 6, 0, 1), (2, 3, 6, 0, 0), (2, None, 7, 0, 1), (2, 2, 7, 0, 1), (2, 3, 6, None, 0))
    listed = reported_rows(table)
    assert listed[["line", "why", "rules"]].to_numpy().tolist() == [
        [3, "several_rules", "symptomatic_asymptomatic+symptomatic"],
        [5, "no_rule", ""],
    ]


def test_missing_column_is_named():
    with pytest.raises(CohortError, match="pain_now"):
        classify(answers((2, 3, 6, 0, 1)).drop(columns="pain_now"))


def test_labels_follow_groups():
    table = answers((2, 3, 6, 0, 1), (1, None, None, 0, 0), (2, 2, 5, 0, 1))
    exams = label_exams(table.assign(study_id=["c", "a", "b"], patient_id=["p", "q", "r"]))
    assert exams["study_id"].tolist() == ["a", "b", "c"]
    assert exams["label"].tolist() == [0, pd.NA, 1]


def test_two_rows_for_one_exam_are_refused():
    table = answers((2, 3, 6, 0, 1), (1, None, None, 0, 0)).assign(study_id="a", patient_id="p")
    with pytest.raises(CohortError, match="more than one questionnaire row"):
        label_exams(table)
