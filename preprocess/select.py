"""Pure rules: header rows → stacks → one sagittal T2 stack per exam, and a code for every file that is not in it.

Rules look at evidence in a fixed order (hard negatives, orientation, physics of the pulse sequence, description as a
last resort) and the first that rejects names the code. What a SOP class, a series number or a file name claims is
never asked. Nothing here reads a file, knows a key, or depends on the order of its input.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from preprocess.deidentify import normalise
from preprocess.geometry import GeometryError, slice_normal, stack_geometry
from preprocess.stacks import Stack, make_stacks

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from preprocess.index import FileRow

MIN_SLICES = 5
"""Fewer parallel slices are a localizer or a fragment."""

TYPICAL_SLICES = (9, 25)
"""Slice counts of a diagnostic lumbar sagittal stack, both included; such stacks rank first."""

SAGITTAL_COSINE = 0.8
"""Smallest |x| of the unit normal of a sagittal stack (37 degrees off); also the largest component."""

SAGITTAL_SURE_COSINE = 0.9
"""Below this the stack is flagged ``oblique`` (scoliosis, angled planning)."""

T2_MIN_ECHO_MS, T2_MIN_REPETITION_MS = 70.0, 1800.0
"""Spin echo with at least both is T2 weighted."""

T1_MAX_ECHO_MS, T1_MAX_REPETITION_MS = 30.0, 1200.0
"""Spin echo with at most both is T1 weighted."""

PD_MAX_ECHO_MS = 50.0
"""Spin echo up to this echo time, with a long repetition time, is proton-density weighted."""

STIR_INVERSION_MS = (80.0, 300.0)
"""Inversion times that null fat, at any field strength in use."""

MAX_ECHOES = 2
"""More echo times within one series make a relaxation map."""

TYPICAL_FOV_MM = 280.0
"""Field of view of the reference protocol; a tie goes to the stack that is nearer."""

DERIVED_TYPES = frozenset(
    {"DERIVED", "MPR", "PROJECTION IMAGE", "MIP", "ADC", "FA", "SUBTRACT", "SUB", "T2 MAP", "T1 MAP"}
)
"""Image types of computed images."""

NOT_MAGNITUDE_TYPES = frozenset({"P", "PHASE", "PHASE MAP", "R", "REAL", "I", "IMAGINARY"})
"""Image types of the other parts of a complex image."""

_LOCALIZER = re.compile(r"\b(loc|localizer|locali[sz]er|scout|survey|3[ -]?plane|calib\w*|asset)\b")
_OTHER_BODY = re.compile(
    r"head|brain|skull|neck|c.?spine|cervical|knee|shoulder|hip|prostate|breast|cardiac|heart|liver"
)
_FAT_SUPPRESSED = re.compile(r"\b(fs|fat ?sat\w*|spair|spir|dixon|stir|tirm)\b")
_STIR = re.compile(r"\b(stir|tirm)\b")
_SAYS_T2 = re.compile(r"\bt2")
_SAYS_OTHER = re.compile(r"\b(t1|pd|dp|ir|flair)|star|\*")


@dataclass(frozen=True)
class Verdict:
    """What the rules say about one stack."""

    stack: Stack
    code: str
    """Empty for a candidate, else why not."""
    evidence: tuple[str, ...] = ()
    """What fired, in order; codes and numbers only."""
    confidence: str = "high"
    """``high``, ``flagged`` (see evidence) or ``low`` (contrast by description only)."""


@dataclass(frozen=True)
class Exam:
    """One study: its judged stacks, of which at most one is selected."""

    study_uid: str
    patient: tuple[str, str]
    """Issuer and patient id, as in the headers."""
    accession: str
    verdicts: tuple[Verdict, ...]

    @property
    def selected(self) -> Verdict | None:
        """The stack to convert, if any."""
        return next((verdict for verdict in self.verdicts if not verdict.code), None)


@dataclass(frozen=True)
class Selection:
    """The decision on a whole tree."""

    exams: tuple[Exam, ...]
    settled: dict[str, str]
    """Path → code of every file outside all stacks."""


def select(rows: Iterable[FileRow]) -> Selection:
    """Decide on every file of a tree (or of any part of it that holds whole studies).

    Parameters
    ----------
    rows
        Header rows, in any order.

    Returns
    -------
    Selection
        Every path is either settled or in exactly one stack.
    """
    settled: dict[str, str] = {}
    studies: dict[str, list[FileRow]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: (row.study_uid, row.series_uid, row.sop_uid, row.path)):
        fault = row.fault or _geometry_fault(row)
        if fault:
            settled[row.path] = fault
        else:
            studies[row.study_uid].append(row)
    exams = []
    for study_uid, members in studies.items():
        patients = {(normalise(row.issuer), normalise(row.patient_id)) for row in members}
        if len(patients) > 1:
            settled |= {row.path: "patient_mismatch" for row in members}
            continue
        stacks = make_stacks(members, settled)
        first = min(members, key=lambda row: (row.issuer, row.patient_id))
        accession = max((row.accession for row in members), default="")
        exams.append(Exam(study_uid, (first.issuer, first.patient_id), accession, choose(stacks)))
    return Selection(tuple(exams), settled)


def _geometry_fault(row: FileRow) -> str:
    if not (row.rows and row.columns and row.position_mm and row.spacing_mm and min(row.spacing_mm) > 0):
        return _ungeometric(row)
    try:
        slice_normal(row.orientation)
    except GeometryError:
        return _ungeometric(row)
    return ""


def _ungeometric(row: FileRow) -> str:
    """Name the fault of an image without geometry: an error, unless its type says that it could not have one."""
    if DERIVED_TYPES & set(row.image_type):
        return "derived"
    return "secondary_capture" if row.modality in {"OT", "SC"} else "no_geometry"


def choose(stacks: Sequence[Stack]) -> tuple[Verdict, ...]:
    """Judge the stacks of one exam and leave at most one candidate.

    Returns
    -------
    tuple of Verdict
        In the order of `stacks`; candidates that rank lower have code ``not_best``.
    """
    verdicts = [judge(stack) for stack in stacks]
    candidates = [verdict for verdict in verdicts if not verdict.code]
    if len(candidates) < 2:
        return tuple(verdicts)
    best = max(candidates, key=_rank)
    return tuple(
        verdict if verdict.code or verdict is best else Verdict(verdict.stack, "not_best", verdict.evidence)
        for verdict in verdicts
    )


def _rank(verdict: Verdict) -> tuple[object, ...]:
    """Order of preference: sound geometry, sure contrast, slice count, matrix, field of view, latest, ids."""
    stack, row = verdict.stack, verdict.stack.rows[0]
    count = _num_positions(stack)
    fov_mm = (row.rows or 0) * row.spacing_mm[0]
    return (
        _can_be_ordered(stack),
        verdict.confidence != "low",
        TYPICAL_SLICES[0] <= count <= TYPICAL_SLICES[1],
        min(count, TYPICAL_SLICES[1]),
        (row.rows or 0) * (row.columns or 0),
        -round(abs(fov_mm - TYPICAL_FOV_MM), 1),
        max((item.acquisition_date, item.acquisition_time) for item in stack.rows),
        (stack.series_uid, stack.key),
    )


def _num_positions(stack: Stack) -> int:
    """Distinct slice positions along the stack's normal; a position imaged twice counts once."""
    normal = slice_normal(stack.rows[0].orientation)
    return len({round(float(np.dot(normal, row.position_mm)), 1) for row in stack.rows})


def _can_be_ordered(stack: Stack) -> bool:
    try:
        stack_geometry(stack.rows)
    except GeometryError:
        return False
    return True


def judge(stack: Stack) -> Verdict:
    """Decide by its headers whether a stack is a sagittal T2 stack.

    Parameters
    ----------
    stack
        The stack.

    Returns
    -------
    Verdict
        With an empty code if it is one.
    """
    for rule in (_reject_by_type, _reject_by_plane, _reject_by_sequence):
        code = rule(stack)
        if code:
            return Verdict(stack, code, (rule.__name__.removeprefix("_reject_"),))
    return _judge_contrast(stack)


def _description(row: FileRow) -> str:
    return f"{row.series_description} {row.protocol}".lower().replace("_", " ")


def _reject_by_type(stack: Stack) -> str:
    row = stack.rows[0]
    types = set(row.image_type)
    if "LOCALIZER" in types or _LOCALIZER.search(_description(row)):
        return "localizer"
    if types & NOT_MAGNITUDE_TYPES:
        return "not_magnitude"
    if "MOSAIC" in types:
        return "mosaic"
    if types & DERIVED_TYPES:
        return "derived"
    if row.b_value:
        return "diffusion"
    return "multi_echo" if stack.num_echoes > MAX_ECHOES else ""


def _reject_by_plane(stack: Stack) -> str:
    normal = np.abs(slice_normal(stack.rows[0].orientation))
    if np.argmax(normal) != 0 or normal[0] < SAGITTAL_COSINE:
        return "not_sagittal" if len(stack.rows) >= MIN_SLICES else "localizer"
    if _num_positions(stack) < MIN_SLICES:
        return "too_few_slices"
    return "body_part" if _OTHER_BODY.search(stack.rows[0].body_part.lower()) else ""


def _reject_by_sequence(stack: Stack) -> str:
    row = stack.rows[0]
    sequence, description = set(row.scanning_sequence), _description(row)
    inversion = row.inversion_time_ms or 0.0
    stir_time = STIR_INVERSION_MS[0] <= inversion <= STIR_INVERSION_MS[1]
    if "EP" in sequence:
        return "echo_planar"
    if "GR" in sequence and "SE" not in sequence:
        return "gradient_echo"
    if "IR" in sequence or stir_time or _STIR.search(description):
        return "inversion_recovery"
    if row.acquisition_type == "3D":
        return "acquisition_3d"
    return "fat_suppressed" if "FS" in row.scan_options or _FAT_SUPPRESSED.search(description) else ""


def _judge_contrast(stack: Stack) -> Verdict:
    row = stack.rows[0]
    flags = _flags(stack)
    echo, repetition = row.echo_time_ms, row.repetition_time_ms
    if echo is None or repetition is None:
        says_t2 = _SAYS_T2.search(_description(row)) and not _SAYS_OTHER.search(_description(row))
        code = "" if says_t2 else "unknown_contrast"
        return Verdict(stack, code, ("description", *flags), "low")
    evidence = ("physics", f"te={echo:g}", f"tr={repetition:g}", *flags)
    if echo >= T2_MIN_ECHO_MS and repetition >= T2_MIN_REPETITION_MS:
        return Verdict(stack, "", evidence, "flagged" if flags else "high")
    if echo <= T1_MAX_ECHO_MS and repetition <= T1_MAX_REPETITION_MS:
        return Verdict(stack, "t1_weighted", evidence)
    if echo <= PD_MAX_ECHO_MS and repetition >= T2_MIN_REPETITION_MS:
        return Verdict(stack, "proton_density", evidence)
    return Verdict(stack, "unknown_contrast", evidence)


def _flags(stack: Stack) -> tuple[str, ...]:
    row = stack.rows[0]
    oblique = abs(slice_normal(row.orientation)[0]) < SAGITTAL_SURE_COSINE
    named = {"oblique": oblique, "contrast_agent": bool(row.contrast_agent), "echoes": stack.num_echoes > 1}
    return tuple(name for name, fired in named.items() if fired)
