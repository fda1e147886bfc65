"""Who was asked and who graded: how the rules met the answers, how readers agree, protocol, and doubled images."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lbp_ray.report.sheets import Sheet
from lbp_ray.report.words import NO_SPREAD, number

if TYPE_CHECKING:
    from lbp_ray.result import Agreement, CohortSummary, Interval, StudyResult

ADJUDICATIONS = {
    "worse": "the worse grade counts",
    "better": "the better grade counts",
    "reader_1": "the first reader's grade counts",
    "missing": "the disc counts as ungraded",
}
"""What happens to a disc that two readers grade differently, for a reader."""


def reader_tables(result: StudyResult) -> list[Sheet]:
    """Make the tables of readers' agreement and of the acquisition protocol; those without rows are left out."""
    if result.cohort is None:
        return []
    made = [_agreement(result.cohort), _protocol(result.cohort)]
    return [sheet for sheet in made if sheet.rows]


def cohort_sentences(result: StudyResult) -> list[str]:
    """Say how answers met the rules, what was odd about grades, and whether images occur twice."""
    cohort = result.cohort
    if cohort is None:
        return _duplicate_sentences(result)
    several = f"{_rows(cohort.num_multi_match)} more than one rule of the groups (the order of the rules decides)"
    none = f"{cohort.num_no_match} with complete answers {'meets' if cohort.num_no_match == 1 else 'meet'} none"
    told = [f"{several}, and {none}."]
    if cohort.num_pfirrmann_zero:
        told.append(
            f"Pfirrmann 0, which that scale does not have, was given to {cohort.num_pfirrmann_zero} discs: look at them"
            " before the grades are used."
        )
    if cohort.agreement:
        told.append(f"Where two readers differ, {ADJUDICATIONS.get(cohort.adjudication, cohort.adjudication)}.")
    return [*told, *_duplicate_sentences(result)]


def _rows(count: int) -> str:
    return f"{count} {'row meets' if count == 1 else 'rows meet'}"


def _duplicate_sentences(result: StudyResult) -> list[str]:
    found = result.duplicates
    looked = f"{found.num_exams} exams were searched for images that occur under two patients"
    alike = f"crops alike from a correlation of {number(found.lowest_correlation, 3)} on"
    if not found.num_pairs:
        return [f"{looked} ({alike}): none was found."]
    across = f"{found.num_across_folds} of them across folds or into the hold-out"
    warning = " Scores may rest on having seen the same image in training." if found.num_across_folds else ""
    return [f"{looked} ({alike}): {found.num_pairs} pairs were found, {across}.{warning}"]


def _agreement(cohort: CohortSummary) -> Sheet:
    rows = tuple(
        (
            row.scale.capitalize(),
            "all levels" if row.level == "all" else row.level,
            str(row.num_pairs),
            NO_SPREAD if row.kappa is None else number(row.kappa),
            _ends(row.interval),
            str(row.num_adjudicated),
        )
        for row in cohort.agreement
    )
    weights = ", ".join(sorted({row.weights for row in cohort.agreement}))
    note = (
        f"Cohen's kappa of two readers with {weights} weights; no value where both give one and the same grade"
        " throughout. Adjudicated: discs that they grade differently."
    )
    head = ("scale", "level", "discs read twice", "weighted kappa", "interval", "adjudicated")
    records = tuple(_agreement_record(row) for row in cohort.agreement)
    return Sheet("agreement", "Two readers", note, head, "llrrrr", rows, records, judged=False)


def _agreement_record(row: Agreement) -> dict[str, object]:
    ends = {"low": None, "high": None} if row.interval is None else {"low": row.interval.low, "high": row.interval.high}
    return {**row.model_dump(exclude={"interval"}), **ends}


def _protocol(cohort: CohortSummary) -> Sheet:
    rows = tuple(
        (row.parameter, row.wanted, row.found, str(row.num_out), str(row.num_unknown)) for row in cohort.protocol
    )
    head = ("parameter", "protocol", "found", "exams outside", "header silent")
    note = "Acquisition of the exams against the protocol. Nothing is left out because of it."
    records = tuple(row.model_dump() for row in cohort.protocol)
    return Sheet("protocol", "Acquisition protocol", note, head, "lllrr", rows, records, judged=False)


def _ends(interval: Interval | None) -> str:
    return NO_SPREAD if interval is None else f"{number(interval.low)} to {number(interval.high)}"
