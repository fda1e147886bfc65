"""Slice stores made directly, without DICOM: what tests of the rooms after the store start from."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

import numpy as np

from preprocess.store.schema import SeriesRecord
from preprocess.store.write import create_store, write_manifest_part, write_series

if TYPE_CHECKING:
    from pathlib import Path

_EMPTY = {"str": "", "int": 0, "float": 0.0, "bool": False, "tuple[float, ...]": ()}


def pseudonym(kind, number):
    """26 characters as real pseudonyms have, of which the first differs between neighbouring numbers."""
    digits = f"{number:05d}".translate(str.maketrans("0189", "wxyz"))  # base32 has no such digits
    return f"{'abcdefghijklmnopqrstuvwxyz234567'[number % 32]}{kind}{digits}".ljust(26, "a")


def make_record(number, pixels_SHW, *, spacing_mm=(4.0, 1.0, 1.0), **given):
    """Record of a sagittal series of exam `number`; `given` overrides any field."""
    count, height, width = pixels_SHW.shape
    affine = np.zeros((4, 4))
    affine[[0, 2, 1, 3], [0, 1, 2, 3]] = spacing_mm[0], -spacing_mm[1], spacing_mm[2], 1
    values = {field.name: _EMPTY.get(str(field.type)) for field in fields(SeriesRecord)}
    values |= {
        "patient_id": pseudonym("p", number),
        "study_id": pseudonym("s", number),
        "series_id": pseudonym("t", number),
        "contrast": "t2_sagittal",
        "confidence": "high",
        "num_slices": count,
        "rows": height,
        "columns": width,
        "dtype": pixels_SHW.dtype.name,
        "spacing_slice_mm": spacing_mm[0],
        "spacing_row_mm": spacing_mm[1],
        "spacing_column_mm": spacing_mm[2],
        "positions_mm": tuple(spacing_mm[0] * np.arange(count)),
        "affine": tuple(affine.ravel()),
        "rescale_slope": (1.0,) * count,
        "rescale_intercept": (0.0,) * count,
        "manufacturer": "ge",
    }
    return SeriesRecord(**(values | given))


def make_store(path: Path, series) -> Path:
    """Write a store of (record, pixels) pairs."""
    create_store(path, key_id="test")
    for record, pixels_SHW in series:
        write_series(path, record, pixels_SHW)
    for part in sorted({record.study_id[0] for record, _ in series}):
        write_manifest_part(path, part)
    return path
