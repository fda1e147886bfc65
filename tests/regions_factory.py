"""Committed regions artefacts without a network: masks, folds and flags as a test wants them."""

from __future__ import annotations

import hashlib

import numpy as np
import pandas as pd
from cohort_factory import NUM_EXAMS, SHAPE
from store_factory import pseudonym

from lbp_ray.roi.regions import COLUMNS, MODEL, OUT_OF_FOLD, SCORE_COLUMNS, RegionsMeta
from preprocess.cvat.shapes import rle_from_mask
from preprocess.midsagittal.choose import CONTRAST
from preprocess.store.read import SliceStore


def make_mask(top=4, left=3, bottom=12, right=9):
    """A rectangle of pixels on an image of the cohort."""
    mask = np.zeros(SHAPE[1:], dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


def make_regions(parent, data, midsagittal, *, fold_of=None, masks=None, flags=None, meta=None):
    """Write an artefact of every exam of the cohort.

    `fold_of` names the fold of exams that were trained on (a third by default); the others come from the final model.
    `masks` and `flags` replace those of single exams, `meta` fields of the description.
    """
    fold_of = {number: number % 2 for number in range(0, NUM_EXAMS, 3)} if fold_of is None else fold_of
    rows, scores = [], []
    for number in range(NUM_EXAMS):
        ids = {"study_id": pseudonym("s", number), "patient_id": pseudonym("p", number)}
        place = {**ids, "series_id": pseudonym("t", number), "slice_index": 2}
        fold = fold_of.get(number, -1)
        mask = (masks or {}).get(number, make_mask())
        inside = np.argwhere(mask)
        row, column = (inside.mean(axis=0) + 0.5).tolist() if len(inside) else (np.nan, np.nan)
        height, width = np.ptp(inside, axis=0) + 1.0 if len(inside) else (0.0, 0.0)
        rows.append(
            {
                **place,
                "rows": SHAPE[1],
                "columns": SHAPE[2],
                "source": OUT_OF_FOLD if fold >= 0 else MODEL,
                "fold": fold,
                "mask_rle": rle_from_mask(mask),
                "area_mm2": float(mask.sum()),
                "height_mm": height,
                "width_mm": width,
                "components": int(bool(len(inside))),
                "centroid_row": row,
                "centroid_column": column,
                "flags": (flags or {}).get(number, ""),
            }
        )
        if fold >= 0:
            quality = {"dice": 0.9 + 0.02 * fold, "baseline_dice": 0.7, "centroid_error_mm": 2.0 + fold}
            scores.append({**place, "fold": fold, **quality, "baseline_error_mm": 9.0})
    table = pd.DataFrame(rows, columns=list(COLUMNS)).sort_values("study_id", ignore_index=True)
    frame = pd.DataFrame(scores, columns=list(SCORE_COLUMNS))
    content = {
        "version": 1,
        "store": SliceStore.open(data / "x.zarr", contrast=CONTRAST).content_hash,
        "midsagittal": hashlib.sha256((midsagittal / "midsagittal.parquet").read_bytes()).hexdigest(),
        "annotations": "a" * 64,
        "weights_hash": "w" * 64,
        "recipe": {},
        "num_folds": 2,
        "nested_in": None,
        "trained_patients": tuple(sorted(pseudonym("p", number) for number in fold_of)),
        "plausible": {"area_mm2": (1, 999), "height_mm": (1, 99), "width_mm": (1, 99)},
        "statements": (),
        "environment": {},
    }
    model = RegionsMeta.model_validate(content | (meta or {})).hashed_with(table, frame)
    folder = parent / hashlib.sha256(model.model_dump_json().encode()).hexdigest()[:16]
    folder.mkdir(parents=True)
    table.to_parquet(folder / "regions.parquet")
    frame.to_parquet(folder / "scores.parquet")
    (folder / "regions.json").write_text(model.model_dump_json())
    return folder
