"""Readers' grades: validation, adjudication, and agreement against a published example."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from lbp_ray.cohort import CohortError, summarise_cohort
from lbp_ray.cohort.agreement import readers_agree, weighted_kappas
from lbp_ray.cohort.gradings import grade_exams, graded_table
from lbp_ray.roi.annotations import LEVELS
from lbp_ray.study import CohortConfig

AGRESTI = np.array([[7, 7, 2, 3], [2, 8, 3, 7], [1, 5, 4, 9], [2, 8, 9, 14]])
"""Couples' ratings, 91 pairs: Agresti, Categorical Data Analysis (1990), table 2.10."""

PUBLISHED = {"linear": (0.2374, 0.0783), "quadratic": (0.3320, 0.0973)}
"""Weighted kappa of those ratings and its asymptotic standard error, as the R package vcd prints them."""


def rows(*readings, scale="pfirrmann", other=0):
    """One row per (study, reader, five grades); the other scale has one grade throughout."""
    rest = "modic" if scale == "pfirrmann" else "pfirrmann"
    return pd.DataFrame(
        [
            {"study_id": study, "reader": reader}
            | {f"{scale}_{level}": grade for level, grade in zip(LEVELS, grades, strict=True)}
            | {f"{rest}_{level}": other for level in LEVELS}
            for study, reader, grades in readings
        ]
    )


def adjudicated(rule, *readings, **config):
    gradings = grade_exams(rows(*readings), CohortConfig(adjudication=rule, **config))
    return gradings.scales["pfirrmann"]


def agresti_gradings(copies=1):
    """Every pair of ratings is one exam's Modic L1-L2; `copies` repeats them within each patient."""
    first, second = (np.repeat(side.ravel(), AGRESTI.ravel()) for side in np.indices(AGRESTI.shape))
    readings = []
    for number, pair in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
        readings += [
            (f"s{number:03d}-{copy}", reader + 1, (pair[reader], None, None, None, None))
            for copy in range(copies)
            for reader in (0, 1)
        ]
    gradings = grade_exams(rows(*readings, scale="modic", other=2), CohortConfig())
    return gradings, [study_id.split("-")[0] for study_id in gradings.study_ids]


@pytest.mark.parametrize(
    ("rule", "grades"),
    [("worse", [3, 4, 2, 5, 2]), ("better", [2, 4, 2, 3, 2]), ("reader_1", [2, 4, 2, 5, 2])],
)
def test_the_rule_decides_where_readers_differ(rule, grades):
    found = adjudicated(rule, ("a", 1, (2, 4, None, 5, 2)), ("a", 2, (3, 4, 2, 3, None)))
    assert found.final_EL.tolist() == [grades]
    assert found.decided_EL.tolist() == [[True, False, False, True, False]]


def test_missing_leaves_a_difference_ungraded():
    found = adjudicated("missing", ("a", 1, (2, 4, 2, 5, 2)), ("a", 2, (3, 4, 2, 5, 2)))
    assert np.isnan(found.final_EL[0]).tolist() == [True, False, False, False, False]


def test_consensus_decides_before_any_rule():
    found = adjudicated("worse", ("a", 1, (2,) * 5), ("a", 2, (5,) * 5), ("a", 3, (3, 3, 3, 3, None)))
    assert found.final_EL.tolist() == [[3, 3, 3, 3, 5]]
    assert found.decided_EL.sum() == 1


def test_pfirrmann_zero_is_flagged_and_gives_way_to_a_grade():
    readings = ("a", 1, (0, 0, 2, 2, 2)), ("a", 2, (3, 0, 2, 2, 2))
    found = adjudicated("better", *readings)
    assert found.final_EL[0, 0] == 3
    assert np.isnan(found.final_EL[0, 1])
    assert found.zero_EL.tolist() == [[True, True, False, False, False]]
    kept = adjudicated("better", *readings, pfirrmann_zero="grade")
    assert kept.final_EL[0, :2].tolist() == [0, 0]
    assert kept.zero_EL.sum() == 2


def test_modic_zero_is_a_grade():
    gradings = grade_exams(rows(("a", 1, (0, 1, 2, 3, 0)), scale="modic", other=2), CohortConfig())
    assert gradings.scales["modic"].final_EL.tolist() == [[0, 1, 2, 3, 0]]
    assert not gradings.scales["modic"].zero_EL.any()


def test_graded_table_counts_what_was_decided():
    config = CohortConfig()
    table = graded_table(grade_exams(rows(("b", 1, (2,) * 5), ("b", 2, (3,) * 5), ("a", 1, (0,) * 5)), config))
    assert table["study_id"].tolist() == ["a", "b"]
    assert table[["adjudicated", "pfirrmann_zero"]].to_numpy().tolist() == [[0, 5], [5, 0]]
    assert table["pfirrmann_L5S1"].tolist() == [pd.NA, 3]


@pytest.mark.parametrize(
    ("column", "value", "fault"),
    [
        ("pfirrmann_L1L2", 6, r"pfirrmann_L1L2 must be a whole number from 0 to 5.*line\(s\) 3"),
        ("pfirrmann_L1L2", 2.5, "pfirrmann_L1L2 must be a whole number"),
        ("modic_L5S1", 4, r"modic_L5S1 must be a whole number from 0 to 3"),
        ("modic_L5S1", "II", "modic_L5S1 must be a whole number"),
        ("reader", 4, "reader must be 1, 2, or 3"),
        ("reader", None, "reader must be 1, 2, or 3"),
        ("study_id", None, "study_id must name an exam"),
        ("study_id", "a", "one row per reader"),
    ],
)
def test_gradings_that_cannot_be_are_refused(column, value, fault):
    table = rows(("a", 1, (2,) * 5), ("b", 1, (2,) * 5)).astype(object)
    table.loc[1, column] = value
    with pytest.raises(CohortError, match=fault):
        grade_exams(table, CohortConfig())


def test_missing_columns_are_named():
    table = rows(("a", 1, (2,) * 5))
    with pytest.raises(CohortError, match=r"lack the column\(s\) modic_L3L4"):
        grade_exams(table.drop(columns="modic_L3L4"), CohortConfig())
    with pytest.raises(CohortError, match="not linked"):
        grade_exams(table.drop(columns="study_id"), CohortConfig())


@pytest.mark.parametrize("weights", PUBLISHED)
def test_kappa_and_interval_agree_with_the_published_example(weights):
    gradings, patients = agresti_gradings()
    found = next(row for row in readers_agree(gradings, patients, weights=weights) if row.scale == "modic")
    kappa, error = PUBLISHED[weights]
    assert (found.level, found.num_pairs, found.num_adjudicated) == ("L1L2", 91, 91 - np.trace(AGRESTI))
    assert found.kappa == pytest.approx(kappa, abs=5e-5)
    assert found.interval.low == pytest.approx(kappa - 1.96 * error, abs=0.03)
    assert found.interval.high == pytest.approx(kappa + 1.96 * error, abs=0.03)


@pytest.mark.parametrize("weights", PUBLISHED)
def test_kappa_of_many_tables_is_that_of_each(weights):
    padded = np.zeros((2, 6, 6))
    padded[0, :4, :4], padded[1, 2, 2] = AGRESTI, 9
    kappas = weighted_kappas(padded, weights)
    assert kappas[0] == pytest.approx(PUBLISHED[weights][0], abs=5e-5)
    assert np.isnan(kappas[1])


def test_more_exams_of_the_same_patients_do_not_narrow_the_interval():
    (once, many) = (readers_agree(*agresti_gradings(copies), weights="linear")[-1] for copies in (1, 4))
    assert many.num_pairs == 4 * once.num_pairs
    assert many.kappa == pytest.approx(once.kappa)
    width = many.interval.high - many.interval.low
    assert width == pytest.approx(once.interval.high - once.interval.low, rel=0.01)


def test_kappa_without_variation_is_none_and_without_difference_has_no_interval():
    gradings = grade_exams(
        rows(*((f"s{k}", reader, (2, 2 + k % 2, 2, 2, 2)) for k in range(8) for reader in (1, 2))), CohortConfig()
    )
    agreement = readers_agree(gradings, gradings.study_ids, weights="quadratic")
    found = {row.level: row for row in agreement if row.scale == "pfirrmann"}
    assert found["L1L2"].kappa is None
    assert (found["L2L3"].kappa, found["L2L3"].interval) == (1.0, None)
    assert found["all"].num_pairs == 40


def test_one_reader_has_nobody_to_agree_with():
    gradings = grade_exams(rows(("a", 1, (2,) * 5), ("b", 1, (3,) * 5)), CohortConfig())
    assert readers_agree(gradings, ["p", "q"], weights="linear") == ()


def asked(*studies):
    """Asymptomatic subjects."""
    row = {"low_back_pain": 1, "frequency": 0, "intensity": 0, "previous_episodes": 0, "pain_now": 0}
    return pd.DataFrame([row | {"study_id": study, "patient_id": f"p{study}"} for study in studies])


def test_only_exams_of_the_task_are_counted():
    table = rows(("a", 1, (2,) * 5), ("z", 1, (5,) * 5))
    summary = summarise_cohort(asked("a", "b"), table, None, CohortConfig())
    assert {row.grade: row.counts[0] for row in summary.grades if row.scale == "pfirrmann"} == {
        0: 0, 1: 0, 2: 1, 3: 0, 4: 0, 5: 0
    }  # fmt: skip
    with pytest.raises(CohortError, match="none of 1 graded exam"):
        summarise_cohort(asked("a", "b"), table[table["study_id"] == "z"], None, CohortConfig())


def test_two_readers_meet_in_the_summary():
    table = rows(*((study, reader, (2, 3, 2, 2, reader + 1)) for study in "abc" for reader in (1, 2)))
    summary = summarise_cohort(asked(*"abc"), table, None, CohortConfig(agreement_weights="linear"))
    last = next(row for row in summary.agreement if (row.scale, row.level) == ("pfirrmann", "L5S1"))
    assert (summary.adjudication, last.weights, last.num_pairs, last.num_adjudicated) == ("worse", "linear", 3, 3)
    assert next(row for row in summary.grades if (row.scale, row.grade) == ("pfirrmann", 3)).counts == (0, 3, 0, 0, 3)
