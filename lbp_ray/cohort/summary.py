"""Questionnaire, gradings and manifest → the one summary that the report's cohort tables come from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lbp_ray.cohort.agreement import readers_agree
from lbp_ray.cohort.gradings import SCALES, Gradings, grade_exams
from lbp_ray.cohort.protocol import check_protocol
from lbp_ray.cohort.questionnaire import (
    NOT_ENOUGH_DATA,
    UNCLASSIFIED,
    CohortError,
    classify,
    label_exams,
    matched_rules,
)
from lbp_ray.result import CohortSummary, GradeRow, GroupRow

if TYPE_CHECKING:
    import pandas as pd

    from lbp_ray.study import CohortConfig

GROUPS = (
    "asymptomatic",
    "slightly_symptomatic",
    "symptomatic",
    "symptomatic_asymptomatic",
    UNCLASSIFIED,
    NOT_ENOUGH_DATA,
)
"""Rows of Table 3, in its order; complete answers that meet no rule stand on their own."""


def summarise_cohort(
    questionnaire: pd.DataFrame, gradings: pd.DataFrame | None, manifest: pd.DataFrame | None, config: CohortConfig
) -> CohortSummary:
    """Count the cohort as the published tables do.

    Parameters
    ----------
    questionnaire
        One row per subject, linked or not; see `lbp_ray.cohort.classify`.
    gradings
        Linked gradings (see `lbp_ray.cohort.gradings.grade_exams`); only exams of the binary task are counted. None
        leaves Table 4 and the agreement out.
    manifest
        Rows of the store's manifest to check against `CohortConfig.protocol`; None, or no protocol, skips the check.
    config
        How answers and gradings are read.

    Raises
    ------
    CohortError
        If there is no subject, answers or grades cannot be used, or gradings come with a questionnaire that names no
        exams, or none of the same.
    """
    if questionnaire.empty:
        msg = "the questionnaire has no rows; at least one subject is required"
        raise CohortError(msg)
    strict = config.strict_gt30
    groups = classify(questionnaire, strict_gt30=strict)
    met = matched_rules(questionnaire, strict_gt30=strict).sum(axis=1)[groups != NOT_ENOUGH_DATA]
    protocol = check_protocol(manifest, config.protocol)[0] if manifest is not None and config.protocol else ()
    graded, patients = (None, []) if gradings is None else _of_task(questionnaire, gradings, config)
    return CohortSummary(
        groups=_group_rows(groups),
        num_subjects=len(groups),
        num_complete=len(met),
        num_multi_match=int((met > 1).sum()),
        num_no_match=int((met == 0).sum()),
        grades=() if graded is None else _grade_rows(graded),
        num_pfirrmann_zero=0 if graded is None else int(graded.scales["pfirrmann"].zero_EL.sum()),
        adjudication=config.adjudication,
        agreement=() if graded is None else readers_agree(graded, patients, weights=config.agreement_weights),
        protocol=protocol,
    )


def task_exams(questionnaire: pd.DataFrame, *, strict_gt30: bool) -> pd.DataFrame:
    """Return the exams of the binary task, as `label_exams` does; rows without an exam are passed over.

    Raises
    ------
    CohortError
        If the questionnaire is not linked, or an exam has no patient or two rows.
    """
    absent = [name for name in ("study_id", "patient_id") if name not in questionnaire]
    if absent:
        msg = (
            f"the questionnaire lacks {', '.join(absent)}: whose gradings belong to the task cannot be known; "
            "run `python -m preprocess link` on it, or leave the gradings out"
        )
        raise CohortError(msg)
    linked = questionnaire.dropna(subset=["study_id"])
    if linked["patient_id"].isna().any():
        study_id = linked.loc[linked["patient_id"].isna(), "study_id"].iloc[0]
        msg = f"study {study_id} has no patient_id; every exam needs its patient: link the questionnaire again"
        raise CohortError(msg)
    exams = label_exams(linked, strict_gt30=strict_gt30)
    return exams[exams["label"].notna()]


def _of_task(questionnaire: pd.DataFrame, gradings: pd.DataFrame, config: CohortConfig) -> tuple[Gradings, list[str]]:
    """Gradings of the exams of the binary task, and the patient of each."""
    task = task_exams(questionnaire, strict_gt30=config.strict_gt30).astype({"study_id": str, "patient_id": str})
    graded = grade_exams(gradings, config, studies=set(task["study_id"]))
    if not graded.study_ids:
        msg = (
            f"none of {gradings['study_id'].nunique()} graded exam(s) is among the {len(task)} exam(s) of the task; "
            "link questionnaire and gradings with the same key"
        )
        raise CohortError(msg)
    patient_of = dict(zip(task["study_id"], task["patient_id"], strict=True))
    return graded, [patient_of[study_id] for study_id in graded.study_ids]


def _group_rows(groups: pd.Series[str]) -> tuple[GroupRow, ...]:
    counts = groups.value_counts()
    complete = len(groups) - int(counts.get(NOT_ENOUGH_DATA, 0))
    rows = []
    for name in GROUPS:
        count = int(counts.get(name, 0))
        share = None if name == NOT_ENOUGH_DATA or not complete else count / complete
        rows.append(GroupRow(group=name, count=count, share=count / len(groups), share_complete=share))
    return tuple(rows)


def _grade_rows(gradings: Gradings) -> tuple[GradeRow, ...]:
    """Rows of Table 4; a disc whose only grade is Pfirrmann 0 stands in row 0, as published, missing or not."""
    rows = []
    for scale, highest in SCALES.items():
        grades = gradings.scales[scale]
        shown_EL = np.where(np.isnan(grades.final_EL) & grades.zero_EL, 0, grades.final_EL)
        graded_L = np.maximum((~np.isnan(shown_EL)).sum(axis=0), 1)
        for grade in range(highest + 1):
            counts_L = (shown_EL == grade).sum(axis=0)
            shares = tuple(float(share) for share in counts_L / graded_L)
            rows.append(GradeRow(scale=scale, grade=grade, counts=tuple(counts_L.tolist()), shares=shares))
    return tuple(rows)
