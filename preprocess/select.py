"""Pure rules: header rows → stacks → at most one stack per exam and contrast, and a code for every other file.

Rules look at evidence in a fixed order (hard negatives, orientation, physics of the pulse sequence, description as a
last resort) and the first that rejects names the code. What a SOP class, a series number or a file name claims is
never asked. Nothing here reads a file, knows a key, or depends on the order of its input.
"""

from __future__ import annotations

import csv
import io
import re
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from preprocess.accounting import QUARANTINED
from preprocess.deidentify import normalise
from preprocess.geometry import GeometryError, slice_normal, stack_geometry
from preprocess.headers.reader import COMPRESSED_SYNTAXES
from preprocess.stacks import Stack, make_stacks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from preprocess.headers.index import FileRow

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

T1_FLAIR_INVERSION_MS = (400.0, 1500.0)
"""Inversion times that null fluid at a short echo time: a T1 FLAIR, which has a longer repetition time."""

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

DIXON_OTHER_TYPES = frozenset({"F", "FAT", "FF", "OP", "OPP_PHASE", "OUT_PHASE", "OUT_OF_PHASE", "OPPOSED_PHASE"})
"""Image types of the Dixon images that are no T1 or T2 image of the anatomy: fat alone, and opposed phase."""

DIXON_IN_PHASE_TYPES = frozenset({"IP", "IN", "IN_PHASE", "INPHASE"})
"""Image types of Dixon images that look as if no fat had been separated."""

DIXON_WATER_TYPES = frozenset({"W", "WATER"})
"""Image types of Dixon water images: fat suppressed."""

Contrast = Literal["t2_sagittal", "t1_sagittal", "t2_fatsat_sagittal"]

CONTRASTS: tuple[Contrast, ...] = ("t2_sagittal", "t1_sagittal", "t2_fatsat_sagittal")
"""What can be selected: T2, T1 and fat-suppressed T2 (with STIR, if the policy says so), all sagittal."""

_LOCALIZER = re.compile(r"\b(loc|localizer|locali[sz]er|scout|survey|3[ -]?plane|calib\w*|asset)\b")
_OTHER_BODY = re.compile(
    r"head|brain|skull|neck|c.?spine|cervical|knee|shoulder|hip|prostate|breast|cardiac|heart|liver"
)
_FAT_SUPPRESSED = re.compile(r"\b(fs|fat ?sat\w*|spair|spir|dixon|stir|tirm)\b")
_STIR = re.compile(r"\b(stir|tirm)\b")
_SAYS_T2 = re.compile(r"\bt2")
_SAYS_T1 = re.compile(r"\bt1")
_SAYS_OTHER = re.compile(r"\b(t1|pd|dp|ir|flair)|star|\*")


class OverrideError(ValueError):
    """An override file that cannot be used."""


@dataclass(frozen=True)
class Policy:
    """What a site wants selected."""

    contrasts: tuple[Contrast, ...] = ("t2_sagittal",)
    """At most one stack of each is converted per exam."""
    stir: Literal["exclude", "fat_suppressed"] = "exclude"
    """Whether a STIR stack counts as a fat-suppressed T2 stack."""
    fat_suppressed: Literal["exclude", "fallback"] = "exclude"
    """Whether a fat-suppressed T2 stack stands in, flagged, for an exam without a plain one."""
    allow_gaps: bool = False
    """Convert stacks in which slices are missing or faulty, and say where."""
    overrides: Mapping[str, str] = field(default_factory=dict)
    """SeriesInstanceUID, or pseudonym of a stack → ``use`` or ``skip``, by a person's word."""


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
    contrast: str = ""
    """One of `CONTRASTS` where the stack is one of them, selected or not; else empty."""


@dataclass(frozen=True)
class Exam:
    """One study: its judged stacks, of which at most one per contrast is selected."""

    study_uid: str
    patient: tuple[str, str]
    """Issuer and patient id, as in the headers."""
    accession: str
    verdicts: tuple[Verdict, ...]
    """Empty when every file of the study was settled by itself."""

    @property
    def selected(self) -> tuple[Verdict, ...]:
        """The stacks to convert."""
        return tuple(verdict for verdict in self.verdicts if not verdict.code)


@dataclass(frozen=True)
class Selection:
    """The decision on a whole tree."""

    exams: tuple[Exam, ...]
    settled: tuple[tuple[FileRow, str], ...]
    """Row and code of every image or file outside all stacks."""


def select(
    rows: Iterable[FileRow], policy: Policy | None = None, name_of: Callable[[Stack], str] = lambda stack: ""
) -> Selection:
    """Decide on every file of a tree (or of any part of it that holds whole studies).

    Parameters
    ----------
    rows
        Header rows, in any order.
    policy
        What is wanted; None takes the defaults.
    name_of
        Pseudonym of a stack, by which an override may name it.

    Returns
    -------
    Selection
        Every row is either settled or in exactly one stack.
    """
    policy = policy or Policy()
    studies: dict[str, list[FileRow]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: (row.study_uid, row.series_uid, row.sop_uid, row.frame or 0, row.path)):
        studies[row.study_uid].append(row)
    settled: list[tuple[FileRow, str]] = []
    exams = []
    for study_uid, members in studies.items():
        exam, outside = _select_in_study(study_uid, members, policy, name_of)
        settled += outside
        exams += [exam] if exam is not None else []
    return Selection(tuple(exams), tuple(settled))


def _select_in_study(
    study_uid: str, members: list[FileRow], policy: Policy, name_of: Callable[[Stack], str]
) -> tuple[Exam | None, list[tuple[FileRow, str]]]:
    """Decide on one study; no exam is made of what names no patient, or two."""
    faults = [(row, row.fault or _geometry_fault(row)) for row in members]
    images = [row for row, fault in faults if not fault]
    settled = [(row, fault) for row, fault in faults if fault]
    named = [row for row in members if row.study_uid and row.patient_id]
    if len({(normalise(row.issuer), normalise(row.patient_id)) for row in named}) > 1:
        return None, settled + [(row, "patient_mismatch") for row in images]
    if not named:
        return None, settled
    stacks = make_stacks(images, settled)
    stacks = [replace(stack, incomplete=_is_incomplete(stack, settled)) for stack in stacks]
    first = min(named, key=lambda row: (row.issuer, row.patient_id))
    accession = min({normalise(row.accession) for row in named} - {""}, default="")
    verdicts = choose(stacks, policy, name_of)
    return Exam(study_uid, (first.issuer, first.patient_id), accession, verdicts), settled


def _is_incomplete(stack: Stack, settled: Sequence[tuple[FileRow, str]]) -> bool:
    """Whether a quarantined image of the series may be one of the stack's slices."""
    size = stack.rows[0].rows, stack.rows[0].columns
    return any(
        row.series_uid == stack.series_uid
        and code.partition(":")[0] in QUARANTINED
        and (row.rows is None or (row.rows, row.columns) == size)
        for row, code in settled
    )


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
    if "MOSAIC" in row.image_type:
        return "mosaic"
    if DERIVED_TYPES & set(row.image_type):
        return "derived"
    return "secondary_capture" if row.modality in {"OT", "SC"} else "no_geometry"


def choose(
    stacks: Sequence[Stack], policy: Policy, name_of: Callable[[Stack], str] = lambda stack: ""
) -> tuple[Verdict, ...]:
    """Judge the stacks of one exam and leave at most one candidate per wanted contrast.

    Returns
    -------
    tuple of Verdict
        In the order of `stacks`; candidates that rank lower have code ``not_best``, those of a contrast that is not
        wanted the code of that contrast.
    """
    verdicts = [_overridden(judge(stack, policy), policy, name_of(stack)) for stack in stacks]
    verdicts = _fall_back(verdicts, policy)
    best: dict[str, Verdict] = {}
    for verdict in verdicts:
        if not verdict.code and verdict.contrast in policy.contrasts:
            best[verdict.contrast] = max(best.get(verdict.contrast, verdict), verdict, key=_rank)
    return tuple(_final(verdict, best, policy) for verdict in verdicts)


def _final(verdict: Verdict, best: Mapping[str, Verdict], policy: Policy) -> Verdict:
    if verdict.code:
        return verdict
    if verdict is best.get(verdict.contrast):
        refused = verdict.stack.incomplete and not policy.allow_gaps
        return replace(verdict, code="series_incomplete") if refused else verdict
    return replace(verdict, code="not_best" if verdict.contrast in best else _unwanted(verdict))


def _overridden(verdict: Verdict, policy: Policy, name: str) -> Verdict:
    """Let a person's word replace the verdict of the rules."""
    word = policy.overrides.get(verdict.stack.series_uid) or policy.overrides.get(name)
    if word == "skip":
        return replace(verdict, code="overridden")
    if word != "use" or (verdict.code and _num_positions(verdict.stack) < 2):
        return verdict  # a lone image in the series, beside the stack that was meant
    contrast = verdict.contrast or policy.contrasts[0]
    return replace(verdict, code="", contrast=contrast, evidence=(*verdict.evidence, "override"), confidence="flagged")


def _fall_back(verdicts: list[Verdict], policy: Policy) -> list[Verdict]:
    """Let fat-suppressed stacks stand in for a plain T2 stack, where the exam has none and the policy allows it."""
    plain = any(verdict.contrast == "t2_sagittal" and not verdict.code for verdict in verdicts)
    wanted = "t2_sagittal" in policy.contrasts and "t2_fatsat_sagittal" not in policy.contrasts
    if plain or not wanted or policy.fat_suppressed != "fallback":
        return verdicts
    return [
        replace(verdict, contrast="t2_sagittal", confidence="flagged", evidence=(*verdict.evidence, "fat_suppressed"))
        if verdict.contrast == "t2_fatsat_sagittal" and not verdict.code
        else verdict
        for verdict in verdicts
    ]


def _unwanted(verdict: Verdict) -> str:
    if verdict.contrast == "t2_fatsat_sagittal":
        return "inversion_recovery" if "stir" in verdict.evidence else "fat_suppressed"
    return "t1_weighted" if verdict.contrast == "t1_sagittal" else "t2_weighted"


def _rank(verdict: Verdict) -> tuple[object, ...]:
    """Order of preference: override, geometry, contrast, slice count, matrix, field of view, latest, ids."""
    stack, row = verdict.stack, verdict.stack.rows[0]
    count = _num_positions(stack)
    fov_mm = (row.rows or 0) * row.spacing_mm[0]
    return (
        "override" in verdict.evidence,
        _can_be_ordered(stack) and not stack.incomplete,
        verdict.confidence != "low",
        "stir" not in verdict.evidence,
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


def judge(stack: Stack, policy: Policy) -> Verdict:
    """Decide by its headers which contrast a stack has, if it is sagittal and of any that can be selected.

    Parameters
    ----------
    stack
        The stack.
    policy
        Says what STIR counts as.

    Returns
    -------
    Verdict
        With a contrast and an empty code, or with the code of the rule that rejected it.
    """
    for rule in (_reject_by_type, _reject_by_plane, _reject_by_sequence):
        code = rule(stack)
        if code:
            return Verdict(stack, code, (rule.__name__.removeprefix("_reject_"),))
    return _judge_contrast(stack, policy)


def _description(row: FileRow) -> str:
    return f"{row.series_description} {row.protocol}".lower().replace("_", " ")


def _reject_by_type(stack: Stack) -> str:
    row = stack.rows[0]
    types = set(row.image_type)
    rules = (
        ("LOCALIZER" in types or bool(_LOCALIZER.search(_description(row))), "localizer"),
        (bool(types & NOT_MAGNITUDE_TYPES), "not_magnitude"),
        ("MOSAIC" in types, "mosaic"),
        (bool(types & DIXON_OTHER_TYPES), "dixon"),
        (_is_computed(row), "derived"),
        (bool(row.b_value), "diffusion"),
        (stack.num_echoes > MAX_ECHOES, "multi_echo"),
    )
    return next((code for fired, code in rules if fired), "")


def _is_computed(row: FileRow) -> bool:
    """Whether the image was computed from others; Dixon images and recompressed ones only bear the name."""
    types = set(row.image_type)
    if types & (DIXON_WATER_TYPES | DIXON_IN_PHASE_TYPES):
        return False
    return bool(types & DERIVED_TYPES - {"DERIVED"}) or ("DERIVED" in types and not _is_recompressed(row))


def _is_recompressed(row: FileRow) -> bool:
    """Whether ``DERIVED`` may mean no more than that an archive compressed a primary image."""
    return row.image_type[:2] == ("DERIVED", "PRIMARY") and row.transfer_syntax.startswith(COMPRESSED_SYNTAXES)


def _reject_by_plane(stack: Stack) -> str:
    normal = np.abs(slice_normal(stack.rows[0].orientation))
    if np.argmax(normal) != 0 or normal[0] < SAGITTAL_COSINE:
        return "not_sagittal" if len(stack.rows) >= MIN_SLICES else "localizer"
    if _num_positions(stack) < MIN_SLICES:
        return "too_few_slices"
    return "body_part" if _OTHER_BODY.search(stack.rows[0].body_part.lower()) else ""


def _reject_by_sequence(stack: Stack) -> str:
    row = stack.rows[0]
    sequence = set(row.scanning_sequence)
    if "EP" in sequence:
        return "echo_planar"
    if "GR" in sequence and "SE" not in sequence:
        return "gradient_echo"
    return "acquisition_3d" if row.acquisition_type == "3D" else ""


def _judge_contrast(stack: Stack, policy: Policy) -> Verdict:
    row = stack.rows[0]
    stir = _is_stir(row)
    suppressed = _is_fat_suppressed(row)
    weighting, evidence, confidence = _weighting(row)
    flags = _flags(stack)
    verdict = Verdict(stack, "", (*evidence, *flags), "flagged" if flags and confidence == "high" else confidence)
    if stir:
        verdict = replace(verdict, evidence=(*verdict.evidence, "stir"))
        code = "inversion_recovery" if policy.stir == "exclude" else ""
        return replace(verdict, code=code, contrast="t2_fatsat_sagittal")
    if weighting == "t2":
        return replace(verdict, contrast="t2_fatsat_sagittal" if suppressed else "t2_sagittal")
    if weighting == "t1":
        return replace(verdict, code="fat_suppressed") if suppressed else replace(verdict, contrast="t1_sagittal")
    return replace(verdict, code=weighting)


def _is_stir(row: FileRow) -> bool:
    """Fat is nulled by inversion; at an unknown inversion time an inversion sequence is taken as such."""
    inversion = row.inversion_time_ms
    nulls_fat = inversion is not None and STIR_INVERSION_MS[0] <= inversion <= STIR_INVERSION_MS[1]
    return nulls_fat or bool(_STIR.search(_description(row))) or ("IR" in row.scanning_sequence and not inversion)


def _is_fat_suppressed(row: FileRow) -> bool:
    water = bool(DIXON_WATER_TYPES & set(row.image_type))
    return water or "FS" in row.scan_options or bool(_FAT_SUPPRESSED.search(_description(row)))


def _weighting(row: FileRow) -> tuple[str, tuple[str, ...], str]:
    """Return ``t2``, ``t1`` or a code; the evidence; the confidence."""
    echo, repetition, inversion = row.echo_time_ms, row.repetition_time_ms, row.inversion_time_ms or 0.0
    if echo is None or repetition is None:
        return (*_weighting_by_description(row), "low")
    evidence = ("physics", f"te={echo:g}", f"tr={repetition:g}")
    if T1_FLAIR_INVERSION_MS[0] <= inversion <= T1_FLAIR_INVERSION_MS[1] and echo <= T1_MAX_ECHO_MS:
        return "t1", (*evidence, f"ti={inversion:g}"), "high"
    if "IR" in row.scanning_sequence or inversion:
        return "inversion_recovery", evidence, "high"
    if echo >= T2_MIN_ECHO_MS and repetition >= T2_MIN_REPETITION_MS:
        return "t2", evidence, "high"
    if echo <= T1_MAX_ECHO_MS and repetition <= T1_MAX_REPETITION_MS:
        return "t1", evidence, "high"
    if echo <= PD_MAX_ECHO_MS and repetition >= T2_MIN_REPETITION_MS:
        return "proton_density", evidence, "high"
    return "unknown_contrast", evidence, "high"


def _weighting_by_description(row: FileRow) -> tuple[str, tuple[str, ...]]:
    text = _description(row)
    if _SAYS_T2.search(text) and not _SAYS_OTHER.search(text):
        return "t2", ("description",)
    if _SAYS_T1.search(text) and not _SAYS_T2.search(text):
        return "t1", ("description",)
    return "unknown_contrast", ("description",)


def _flags(stack: Stack) -> tuple[str, ...]:
    row = stack.rows[0]
    oblique = abs(slice_normal(row.orientation)[0]) < SAGITTAL_SURE_COSINE
    recompressed = "DERIVED" in row.image_type and _is_recompressed(row)
    named = {
        "recompressed": recompressed,
        "oblique": oblique,
        "contrast_agent": bool(row.contrast_agent),
        "echoes": stack.num_echoes > 1,
    }
    return tuple(name for name, fired in named.items() if fired)


def read_overrides(path: Path) -> dict[str, str]:
    """Read an override file: CSV with columns ``series`` and ``action``.

    Parameters
    ----------
    path
        ``series`` is a SeriesInstanceUID or a ``series_id`` of the stack report; ``action`` is ``use`` or ``skip``.

    Raises
    ------
    OverrideError
        With every faulty line.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"))))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        msg = f"override file {path} cannot be read ({type(error).__name__}); it is a CSV with columns series,action"
        raise OverrideError(msg) from None
    overrides: dict[str, str] = {}
    faults = []
    for line, row in enumerate(rows, start=2):
        series, action = (row.get("series") or "").strip(), (row.get("action") or "").strip().lower()
        if not series or action not in {"use", "skip"} or series in overrides:
            faults.append(str(line))
        overrides[series] = action
    if faults or not rows:
        msg = (
            f"override file {path}, line(s) {', '.join(faults) or '1'}: required are columns series,action with one "
            "line per series (SeriesInstanceUID or series_id) and the action use or skip"
        )
        raise OverrideError(msg)
    return overrides
