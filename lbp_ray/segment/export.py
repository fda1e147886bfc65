"""Predicted masks with their images, to be corrected in CVAT and read in again.

``python -m lbp_ray.segment.export REGIONS --store STORE --out DIR``
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lbp_ray.roi.regions import RegionError, Regions, mask_of
from preprocess.commit import committed_directory
from preprocess.cvat.shapes import REGION, CvatImage, Mask
from preprocess.cvat.write import write_cvat
from preprocess.midsagittal.choose import CONTRAST
from preprocess.store.export import Stack, export_stack
from preprocess.store.read import SliceStore

if TYPE_CHECKING:
    import pandas as pd

ANNOTATIONS, IMAGES = "annotations.xml", "images"
"""What is written: the masks, and the images that they lie on."""


def export_regions(store: SliceStore, regions: Regions, out: Path, *, flagged: bool = False) -> int:
    """Write masks as CVAT 1.1 XML and their slices as PNG.

    Parameters
    ----------
    store
        The store that the regions were made from.
    regions
        The artefact.
    out
        Folder that appears when all is written; receives ``annotations.xml``, in which images are named
        ``<study>/<series>/<slice>.png``, and ``images/`` with 8-bit pictures of these names. An empty mask becomes an
        image without a shape, to be drawn by hand.
    flagged
        Only the masks that are flagged for review.

    Returns
    -------
    int
        Number of images written.

    Raises
    ------
    RegionError
        If the regions were made from another store, `out` holds something already, or no mask is flagged.
    """
    rows = _chosen(store, regions, out, flagged=flagged).to_dict("records")
    with committed_directory(out, point="segment-export") as partial:
        for row in rows:
            _write_slice(store, row, partial / IMAGES)
        write_cvat(partial / ANNOTATIONS, map(cvat_image, rows))
    return len(rows)


def cvat_image(row: dict[Any, Any]) -> CvatImage:
    """Describe one row of the regions table as CVAT's image: one mask labelled ``lumbar``, none where it is empty."""
    mask = mask_of(row)
    shapes = (Mask.from_pixels(REGION, mask),) if mask.any() else ()
    name = f"{row['study_id']}/{row['series_id']}/{row['slice_index']}.png"
    return CvatImage(name, width=int(row["columns"]), height=int(row["rows"]), shapes=shapes)


def _chosen(store: SliceStore, regions: Regions, out: Path, *, flagged: bool) -> pd.DataFrame:
    if regions.meta.store != store.content_hash:
        msg = (
            f"{regions.folder} was made from a store of content {regions.meta.store[:12]}, {store.path} is "
            f"{store.content_hash[:12]}; give the store that `python -m lbp_ray.segment` read"
        )
        raise RegionError(msg)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        msg = (
            f"{out} exists and is not an empty folder: corrections may lie there; choose a folder that is not there yet"
        )
        raise RegionError(msg)
    if out.resolve().is_relative_to(store.path.resolve()) or out.resolve().is_relative_to(regions.folder.resolve()):
        msg = f"{out} lies inside the store or the regions, which hold nothing else; choose a folder outside both"
        raise RegionError(msg)
    if not flagged:
        return regions.table
    chosen = regions.table[regions.table["flags"] != ""]
    if chosen.empty:
        msg = (
            f"no mask of {regions.folder} is flagged, so that there is nothing to correct; leave out --flagged for all"
        )
        raise RegionError(msg)
    return chosen


def _write_slice(store: SliceStore, row: dict[Any, Any], folder: Path) -> None:
    """Write the slice of a mask as an 8-bit PNG, windowed by itself."""
    series_id, index = str(row["series_id"]), int(row["slice_index"])
    record = store.record(series_id)
    slope, intercept = (
        values[index : index + 1] if len(values) > 1 else values
        for values in (record.rescale_slope, record.rescale_intercept)
    )
    stack = Stack(
        pixels_SHW=store.read_slice(series_id, index)[None],
        affine=np.reshape(record.affine, (4, 4)),
        slope=slope or (1.0,),
        intercept=intercept or (0.0,),
        slice_names=(str(index),),
    )
    export_stack(stack, folder / str(row["study_id"]) / series_id, "png")


def main(arguments: list[str] | None = None) -> int:
    """Parse, export, say how many and what to do with them."""
    parser = argparse.ArgumentParser(prog="python -m lbp_ray.segment.export", description=__doc__)
    parser.add_argument("regions", type=Path, help="folder of a regions artefact, below regions/ of the runs")
    parser.add_argument("--store", type=Path, required=True, help="the slice store that it was made from")
    parser.add_argument("--out", type=Path, required=True, help="folder that is not there yet")
    parser.add_argument("--flagged", action="store_true", help="only the masks that are flagged for review")
    options = parser.parse_args(arguments)
    try:
        store, regions = SliceStore.open(options.store, contrast=CONTRAST), Regions.open(options.regions)
        written = export_regions(store, regions, options.out, flagged=options.flagged)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(
        f"{written} masks written to {options.out}: make a CVAT task of {IMAGES}/, upload {ANNOTATIONS} into it, "
        "correct, and give CVAT's export as paths.roi_corrections\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
