from __future__ import annotations

import pandas as pd
import pytest

from lbp_ray.cohort import ANSWERS, CohortError, classify, label_exams


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
        ((None, 3, 6, 0, 1), "symptomatic"),
    ],
)
def test_rules(row, group):
    assert classify(answers(row)).tolist() == [group]


@pytest.mark.parametrize(
    ("column", "value"), [("frequency", 5), ("intensity", 11), ("pain_now", "yes"), ("pain_now", 2)]
)
def test_answers_out_of_range_are_named(column, value):
    table = answers((2, 3, 6, 0, 1), (2, 3, 6, 0, 1)).astype(object)
    table.loc[1, column] = value
    with pytest.raises(CohortError, match=rf"{column} must be a number.*line\(s\) 3"):
        classify(table)


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
