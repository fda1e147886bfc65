"""One selected stack → one committed series, or the codes of why not."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from preprocess.deidentify import Pseudonymiser, allowed_attributes
from preprocess.geometry import GeometryError
from preprocess.pixels.volume import Volume, VolumeError, load_volume
from preprocess.store.schema import SeriesRecord, content_hash, record_attributes
from preprocess.store.write import write_series

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from preprocess.headers.index import FileRow
    from preprocess.select import Exam, Verdict
    from preprocess.stacks import Stack


@dataclass(frozen=True)
class Identity:
    """Pseudonyms of one stack."""

    patient_id: str
    study_id: str
    series_id: str
    source_id: str
    study_date: str = ""
    """Shifted ISO date; empty where dates are dropped."""

    @classmethod
    def of(cls, names: Pseudonymiser, exam: Exam, stack: Stack, *, shift_dates: bool = False) -> Identity:
        """Compute them."""
        date = min(row.study_date for row in stack.rows) if shift_dates else ""
        return cls(
            patient_id=names.patient(*exam.patient),
            study_id=names.study(exam.study_uid),
            series_id=names.series(stack.study_uid, stack.series_uid, stack.key),
            source_id=names.source([image_name(row) for row in stack.rows]),
            study_date=names.shifted_date(*exam.patient, date) if date else "",
        )


def image_name(row: FileRow) -> str:
    """Object id of an image; of a frame of a multi-frame object with ``#`` and the frame's number from 1."""
    return row.sop_uid if row.frame is None else f"{row.sop_uid}#{row.frame + 1}"


@dataclass(frozen=True)
class Conversion:
    """What became of one stack."""

    codes: dict[str, str]
    """Path → code for every file of the stack."""
    faults: Mapping[str, str] = field(default_factory=dict)
    """Path → code of slices left out of a stored series, where gaps are allowed."""
    stored: bool = False


def convert_stack(
    root: Path, store: Path, verdict: Verdict, identity: Identity, *, allow_gaps: bool, known_faults: Mapping[str, str]
) -> Conversion:
    """Decode a stack and commit it to the store.

    Parameters
    ----------
    root, store
        The tree and the store.
    verdict, identity
        The stack and its pseudonyms.
    allow_gaps, known_faults
        As in `load_volume`.
    """
    stack = verdict.stack
    volume = _load(root, verdict, allow_gaps=allow_gaps, known_faults=known_faults)
    if isinstance(volume, Conversion):
        return volume
    write_series(store, make_record(identity, verdict, volume), volume.pixels_SHW)
    return Conversion(converted_codes(stack, volume.faults), volume.faults, stored=True)


def compare_stack(
    root: Path, committed: Mapping[str, Any], verdict: Verdict, identity: Identity, *, allow_gaps: bool
) -> Conversion:
    """Decode a stack that is in the store already, and see whether it is still what was committed.

    Parameters
    ----------
    root
        The tree.
    committed
        Its row of the manifest.
    verdict, identity, allow_gaps
        As in `convert_stack`.
    """
    volume = _load(root, verdict, allow_gaps=allow_gaps, known_faults={})
    if isinstance(volume, Volume):
        attributes = record_attributes(make_record(identity, verdict, volume))
        if content_hash(attributes, volume.pixels_SHW) == committed["content_hash"]:
            return Conversion(converted_codes(verdict.stack, volume.faults), volume.faults, stored=True)
    return Conversion(faulty_codes(verdict.stack, "changed_after_commit"))


def _load(root: Path, verdict: Verdict, *, allow_gaps: bool, known_faults: Mapping[str, str]) -> Volume | Conversion:
    stack = verdict.stack
    try:
        return load_volume(root, stack, allow_gaps=allow_gaps, known_faults=known_faults)
    except VolumeError as error:
        return Conversion(faulty_codes(stack, error.code, error.faults))
    except GeometryError as error:
        return Conversion(faulty_codes(stack, str(error)))
    except Exception as error:  # its text may quote a header; the type may not
        return Conversion(faulty_codes(stack, f"internal_error:{type(error).__name__}"))


def converted_codes(stack: Stack, faults: Mapping[str, str] | None = None) -> dict[str, str]:
    """Codes of a stack that is in the store."""
    codes = {row.path: "duplicate" for row in stack.duplicates} | {row.path: "converted" for row in stack.rows}
    return codes | dict(faults or {})


def faulty_codes(stack: Stack, code: str, faults: Mapping[str, str] | None = None) -> dict[str, str]:
    """Codes of a stack that is not: files at fault get their own code, their mates ``series_incomplete``."""
    everything = [row.path for row in (*stack.rows, *stack.duplicates)]
    return dict.fromkeys(everything, "series_incomplete" if faults else code) | dict(faults or {})


def make_record(identity: Identity, verdict: Verdict, volume: Volume) -> SeriesRecord:
    """Assemble the store's record of a series from allow-listed facts only."""
    geometry = volume.geometry
    num_slices, rows, columns = volume.pixels_SHW.shape
    attributes: dict[str, Any] = allowed_attributes(verdict.stack.rows)
    incomplete = bool(geometry.missing_mm)
    return SeriesRecord(
        patient_id=identity.patient_id,
        study_id=identity.study_id,
        series_id=identity.series_id,
        source_id=identity.source_id,
        contrast=verdict.contrast,
        confidence="flagged" if incomplete and verdict.confidence == "high" else verdict.confidence,
        evidence=";".join((*verdict.evidence, *(["gap"] if incomplete else []))),
        num_slices=num_slices,
        rows=rows,
        columns=columns,
        dtype=volume.pixels_SHW.dtype.name,
        spacing_slice_mm=geometry.spacing_slice_mm,
        spacing_row_mm=geometry.spacing_row_mm,
        spacing_column_mm=geometry.spacing_column_mm,
        positions_mm=geometry.positions_mm,
        affine=geometry.affine,
        transpose=geometry.transpose,
        flip_rows=geometry.flip_rows,
        flip_columns=geometry.flip_columns,
        uneven_spacing=geometry.uneven,
        missing_mm=geometry.missing_mm,
        inverted=volume.inverted,
        padding_value=volume.padding,
        rescale_slope=volume.rescale_slope,
        rescale_intercept=volume.rescale_intercept,
        study_date=identity.study_date,
        **attributes,
    )
