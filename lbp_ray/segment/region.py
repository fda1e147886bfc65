"""What is measured of a mask, and which masks are sent to review instead of being cropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

from lbp_ray.roi.regions import FLAGS, Plausible, RegionError

if TYPE_CHECKING:
    from collections.abc import Sequence

SPECK_SHARE = 0.02
"""Connected parts below this share of a mask's area are specks and dropped.

What is dropped at a distance d from the centroid moves it by about share x d: 2 mm for a part at the very end of a
region 200 mm high. Anything larger is a component, and two of them are a reason for review.
"""

MARGIN = 0.25
"""How far a length may lie below the lowest or above the highest usual one, as a share of that; see below."""

USUAL_PERCENTILES = (5, 95)
"""Percentiles of the annotated regions between which a size is usual."""

_TOUCHING = np.ones((3, 3), dtype=bool)
"""Pixels that share a corner belong together: neighbouring rectangles of a lordotic spine may meet in one."""


@dataclass(frozen=True)
class Region:
    """Size and place of one mask; the names are those of the columns of ``regions.parquet``."""

    area_mm2: float
    height_mm: float
    """Of the bounding box, along the rows (cranial to caudal)."""
    width_mm: float
    """Of the bounding box, along the columns (anterior to posterior)."""
    components: int
    """Connected parts, specks left out; 0 of an empty mask."""
    centroid_row: float
    """Continuous pixel coordinates (0 is the outer edge of the first pixel); NaN of an empty mask."""
    centroid_column: float
    touches_edge: bool
    """Whether a pixel of it lies in the first or last row or column of the image."""


def without_specks(mask_HW: np.ndarray) -> np.ndarray:
    """Return a mask without its specks, the small parts that a network leaves far from the spine.

    Parameters
    ----------
    mask_HW
        (H, W) bool.

    Returns
    -------
    numpy.ndarray
        (H, W) bool: the parts of at least `SPECK_SHARE` of the area; applied twice, it changes nothing more.
    """
    parts_HW, _ = ndimage.label(mask_HW, _TOUCHING)
    sizes = np.bincount(parts_HW.ravel())
    sizes[0] = 0
    return np.asarray((sizes >= max(SPECK_SHARE * sizes.sum(), 1))[parts_HW])


def describe_mask(mask_HW: np.ndarray, spacing_mm: tuple[float, float]) -> Region:
    """Measure a mask, specks left out.

    Parameters
    ----------
    mask_HW
        (H, W) bool, on the pixel grid of the store.
    spacing_mm
        Row spacing, then column spacing: distance of the centres of vertically, then horizontally neighbouring pixels.

    Returns
    -------
    Region
        Zero sizes, no component and a NaN centroid when the mask is empty.
    """
    kept_HW = without_specks(mask_HW)
    rows, columns = np.nonzero(kept_HW)
    if not len(rows):
        return Region(0.0, 0.0, 0.0, 0, float("nan"), float("nan"), touches_edge=False)
    row_mm, column_mm = spacing_mm
    return Region(
        area_mm2=float(len(rows) * row_mm * column_mm),
        height_mm=float((np.ptp(rows) + 1) * row_mm),
        width_mm=float((np.ptp(columns) + 1) * column_mm),
        components=int(ndimage.label(kept_HW, _TOUCHING)[1]),
        centroid_row=float(rows.mean() + 0.5),
        centroid_column=float(columns.mean() + 0.5),
        touches_edge=bool(np.any(kept_HW[[0, -1]]) or np.any(kept_HW[:, [0, -1]])),
    )


def plausible_ranges(annotated: Sequence[Region]) -> Plausible:
    """Derive from the annotated regions between which sizes a mask is plausible.

    Heights and widths may leave the 5th to 95th percentile by `MARGIN` of it, areas by the square of that factor. The
    margin is a factor, not a multiple of the spread, because a handful of annotations says little about the spread but
    much about the size: lumbar heights of adults scatter by some 7 % (one standard deviation), so that a true region
    lies five of them inside, while one that lost two of five levels is flagged. The percentiles keep the bounds from
    growing with the cohort: from 21 annotations on, one that is wrong sets no bound.

    Parameters
    ----------
    annotated
        Regions of the annotated masks, at least one.

    Returns
    -------
    Plausible
        Lowest and highest plausible area, height and width.

    Raises
    ------
    RegionError
        If there is no annotated region, or one is empty.
    """
    empty = sum(region.components == 0 for region in annotated)
    if empty or not annotated:
        msg = (
            f"plausible sizes need annotated regions with pixels, found {len(annotated)} of which {empty} are empty; "
            "read the annotation report and leave faulty ones out"
        )
        raise RegionError(msg)
    bounds = {}
    for name, power in (("area_mm2", 2), ("height_mm", 1), ("width_mm", 1)):
        low, high = np.percentile([getattr(region, name) for region in annotated], USUAL_PERCENTILES)
        bounds[name] = (float(low * (1 - MARGIN) ** power), float(high * (1 + MARGIN) ** power))
    return Plausible(**bounds)


def flags_of(region: Region, plausible: Plausible) -> str:
    """Say why a mask must be reviewed.

    Parameters
    ----------
    region
        What was measured of it.
    plausible
        Ranges of the annotated regions; their ends are still plausible.

    Returns
    -------
    str
        Codes of `lbp_ray.roi.regions.FLAGS`, in its order, joined by ``+``; empty when the mask may be cropped. An
        empty mask is nothing but ``empty``; height and width may disagree, so that one mask can be small and large.
    """
    if not region.components:
        return "empty"
    ranges = [(getattr(region, name), *bounds) for name, bounds in plausible.model_dump().items()]
    raised = {
        "several_components": region.components > 1,
        "small": any(value < low for value, low, _ in ranges),
        "large": any(value > high for value, _, high in ranges),
        "at_edge": region.touches_edge,
    }
    return "+".join(code for code in FLAGS if raised.get(code))
