"""One selected stack → one committed series, or the codes of why not. The unit of work of a worker."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preprocess.deidentify import Pseudonymiser, allowed_attributes
from preprocess.geometry import GeometryError
from preprocess.store import SeriesRecord, use_one_thread, write_series
from preprocess.volume import Volume, VolumeError, load_volume

if TYPE_CHECKING:
    from preprocess.select import Exam, Verdict
    from preprocess.stacks import Stack

CONTRAST = "t2_sagittal"
"""What is selected and stored."""


@dataclass(frozen=True)
class Identity:
    """Pseudonyms of one stack."""

    patient_id: str
    study_id: str
    series_id: str
    source_id: str

    @classmethod
    def of(cls, names: Pseudonymiser, exam: Exam, stack: Stack) -> Identity:
        """Compute them."""
        return cls(
            patient_id=names.patient(*exam.patient),
            study_id=names.study(exam.study_uid),
            series_id=names.series(stack.study_uid, stack.series_uid, stack.key),
            source_id=names.source([row.sop_uid for row in stack.rows]),
        )


@dataclass(frozen=True)
class ConvertTask:
    """A stack to convert."""

    root: str
    store: str
    verdict: Verdict
    identity: Identity


def convert_series(task: ConvertTask) -> dict[str, str]:
    """Decode a stack and commit it to the store.

    Returns
    -------
    dict
        Path → code for every file of the stack; all ``converted`` (and ``duplicate``) if it is in the store.
    """
    use_one_thread()
    stack = task.verdict.stack
    try:
        volume = load_volume(Path(task.root), stack)
        write_series(Path(task.store), make_record(task.identity, task.verdict, volume), volume.pixels_SHW)
    except VolumeError as error:
        return faulty_codes(stack, error.code, error.paths)
    except GeometryError as error:
        return faulty_codes(stack, str(error))
    except OSError:
        raise  # the store's disk, not the file's: the run must stop, and can resume
    except Exception as error:  # its text may quote a header; the type may not
        return faulty_codes(stack, f"internal_error:{type(error).__name__}")
    return converted_codes(stack)


def converted_codes(stack: Stack) -> dict[str, str]:
    """Codes of a stack that is in the store."""
    codes = {row.path: "converted" for row in stack.rows}
    return codes | {row.path: "duplicate" for row in stack.duplicates}


def faulty_codes(stack: Stack, code: str, paths: tuple[str, ...] = ()) -> dict[str, str]:
    """Codes of a stack that is not: the files at fault get `code`, their mates ``series_incomplete``."""
    everything = [row.path for row in (*stack.rows, *stack.duplicates)]
    return {path: code if not paths or path in paths else "series_incomplete" for path in everything}


def make_record(identity: Identity, verdict: Verdict, volume: Volume) -> SeriesRecord:
    """Assemble the store's record of a series from allow-listed facts only."""
    geometry = volume.geometry
    num_slices, rows, columns = volume.pixels_SHW.shape
    attributes: dict[str, Any] = allowed_attributes(verdict.stack.rows)
    return SeriesRecord(
        patient_id=identity.patient_id,
        study_id=identity.study_id,
        series_id=identity.series_id,
        source_id=identity.source_id,
        contrast=CONTRAST,
        confidence=verdict.confidence,
        evidence=";".join(verdict.evidence),
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
        inverted=volume.inverted,
        rescale_slope=volume.rescale_slope,
        rescale_intercept=volume.rescale_intercept,
        **attributes,
    )


def without_identifiers(verdict: Verdict) -> Verdict:
    """Drop patient and accession from a verdict before it travels to a worker."""
    stack = verdict.stack
    rows = tuple(replace(row, patient_id="", issuer="", accession="") for row in stack.rows)
    twins = tuple(replace(row, patient_id="", issuer="", accession="") for row in stack.duplicates)
    return replace(verdict, stack=replace(stack, rows=rows, duplicates=twins))
