"""Crops as files that others read: NIfTI, in the coordinates of their series, and PNG.

``python -m lbp_ray.export X.zarr runs/crops/ADDRESS --out DIR --format nifti``
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lbp_ray.roi.crops import Crops
from preprocess.store.export import FORMATS, Stack, export_stack
from preprocess.store.read import SliceStore

if TYPE_CHECKING:
    from preprocess.store.export import Format


UNEVEN_SHARE = 0.01
"""Spread of the distances between a crop's slices, as a share of the series' pitch, above which its note says so."""


def export_crops(store: SliceStore, crops: Crops, out: Path, format: Format) -> int:
    """Write every crop of an artefact.

    Parameters
    ----------
    store
        The store that the crops were cut from.
    crops
        The artefact.
    out
        Folder; receives ``<study_id>/<series_id>.nii.gz`` or ``<study_id>/<series_id>/<slice_index>.png``.
    format
        ``nifti``, ``png`` or ``png16``.

    Returns
    -------
    int
        Number of crops written.
    """
    for number, row in enumerate(crops.table.to_dict("records")):
        stack = crop_stack(
            store, {str(name): value for name, value in row.items()}, np.asarray(crops.pixels_NKHW[number])
        )
        export_stack(stack, out / str(row["study_id"]) / str(row["series_id"]), format)
    return len(crops.table)


def crop_stack(store: SliceStore, row: dict[str, Any], crop_KHW: np.ndarray) -> Stack:
    """Place a crop in the frame of its series: both, exported, lie on each other.

    Parameters
    ----------
    store
        The store that it was cut from.
    row
        Its row of the crops table: ``series_id``, ``slice_index`` and the box.
    crop_KHW
        Its pixels, resampled or not.
    """
    record = store.record(row["series_id"])
    indices = np.asarray(row["slice_index"])
    # The affine's slice step is the mean one: places are counted in such steps, by position and not by number.
    steps = record.num_slices - 1 + len(record.missing_mm)
    places = np.asarray(record.positions_mm) * steps / (record.positions_mm[-1] or 1)
    series_affine = np.reshape(record.affine, (4, 4))
    affine = series_affine.copy()
    # Pixels of a resampled crop are larger or smaller than the series', and centred inside the same box.
    row_step, column_step = row["box_height"] / crop_KHW.shape[1], row["box_width"] / crop_KHW.shape[2]
    first = (row["box_row"] + (row_step - 1) / 2, row["box_column"] + (column_step - 1) / 2)
    affine[:, 3] = series_affine @ [places[indices[0]], *first, 1]
    affine[:, 1] *= row_step
    affine[:, 2] *= column_step
    affine[:, 0] *= np.diff(places[indices]).mean() if len(indices) > 1 else 1
    slope, intercept = (_of_slices(values, indices) for values in (record.rescale_slope, record.rescale_intercept))
    is_uneven = bool(np.ptp(np.diff(places[indices])) > UNEVEN_SHARE) if len(indices) > 2 else False
    return Stack(
        pixels_SHW=crop_KHW,
        affine=affine,
        slope=slope or (1.0,),
        intercept=intercept or (0.0,),
        slice_names=tuple(str(index) for index in indices),
        note="uneven slice spacing: the affine has its mean" if is_uneven else "",
    )


def _of_slices(values: tuple[float, ...], indices: np.ndarray) -> tuple[float, ...]:
    """Values of the chosen slices, where there is one per slice."""
    return values if len(values) < 2 else tuple(values[index] for index in indices)


def main(arguments: list[str] | None = None) -> int:
    """Parse, export, say how many."""
    parser = argparse.ArgumentParser(prog="python -m lbp_ray.export", description=__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("crops", type=Path, help="folder of a crops artefact, below crops/ of the runs")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--format", choices=FORMATS, default="nifti")
    options = parser.parse_args(arguments)
    try:
        store, crops = SliceStore.open(options.store), Crops.open(options.crops)
        written = export_crops(store, crops, options.out, options.format)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"{written} crops written to {options.out}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
