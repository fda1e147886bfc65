"""Where each study's box is centred, and who says so: an annotation, a predicted mask, or a person's override.

One kind of source serves a whole study; only what a person decides about single exams stands beside it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lbp_ray.roi.annotations import AnnotatedSlice, AnnotationError, annotations_sha256, mask_centroid, read_annotations
from lbp_ray.roi.box import Excluded
from lbp_ray.roi.overrides import EXCLUDE, Override, OverrideTargets, read_overrides
from lbp_ray.roi.regions import FLAGS, RegionError, mask_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import pandas as pd

    from lbp_ray.roi.annotations import CentreRule
    from lbp_ray.roi.regions import Regions
    from preprocess.store.read import SliceStore

ANNOTATION = "annotation"
"""Crop source: shapes that a person drew."""

MANUAL = "manual"
"""Crop source: a person's override or corrected mask, beside predicted ones."""

NO_SLICE = -1
"""Region slice of a centre that was given as a number."""


class Flagged(Excluded):
    """A study whose predicted region a person must look at; it is never cropped by it until then."""

    def __init__(self, reason: str, detail: str, slice_index: int, mask_HW: np.ndarray) -> None:
        super().__init__(reason, detail)
        self.slice_index = slice_index
        self.mask_HW = mask_HW


@dataclass(frozen=True)
class Centre:
    """Where one study's box is centred."""

    row: float
    """Continuous pixel coordinates of the store, as `column`."""
    column: float
    source: str
    """`ANNOTATION`, ``out_of_fold``, ``model`` or `MANUAL`."""
    region_slice: int
    """Slice that the region was drawn or found on; `NO_SLICE` where there is none."""
    flags: str = ""
    """Codes of a flagged mask that a person accepted, joined by ``+``."""
    mask_HW: np.ndarray | None = None
    """The predicted or corrected mask."""
    is_accepted: bool = False
    """Whether an override says to crop by the predicted mask, whatever speaks against it."""
    replaces: Centre | None = None
    """Of a centre by hand: that of the predicted mask, where there is one and it is not flagged."""


@dataclass(frozen=True)
class Centres:
    """Where every study's box is centred."""

    inputs: dict[str, str]
    """Content ids of all files that it is made from."""
    overrides: Mapping[str, Override]
    find: Callable[[Mapping[str, Any], int, bool], Centre]
    """Manifest row, mid-sagittal slice, whether a person accepted a flagged mask → centre; raises `Excluded`."""
    unflagged: Callable[[str], Centre | None] = lambda _: None
    """Series → centre of its predicted mask, None where it has none or a person must look at it first."""

    def of(self, row: Mapping[str, Any], mid_index: int) -> Centre:
        """Return the centre of one series.

        Parameters
        ----------
        row
            Its row of the store's manifest.
        mid_index
            Its mid-sagittal slice: of several annotated slices the nearest to it counts.

        Raises
        ------
        Excluded
            If it has none; `Flagged` if a person must look at its mask first.
        """
        override = self.overrides.get(str(row["study_id"]))
        if override is None:
            return self.find(row, mid_index, False)
        if override.action == EXCLUDE:
            raise Excluded("override_exclude", "excluded by the override file")
        if override.centre is None:
            return self.find(row, mid_index, True)
        replaces = self.unflagged(str(row["series_id"]))
        return Centre(*override.centre, source=MANUAL, region_slice=NO_SLICE, replaces=replaces)


def annotated_centres(store: SliceStore, annotations: Path, rule: CentreRule, overrides: Path | None = None) -> Centres:
    """Centre every box on the shapes drawn on its study.

    Of several annotated slices of a series the sound one nearest to the mid-sagittal slice counts, the lower of two.

    Parameters
    ----------
    store
        Slice store.
    annotations
        Linked CVAT file.
    rule
        Centroid of the shapes' union, or mean of the five rectangles' centres.
    overrides
        Override file, or None.
    """
    annotated: dict[str, list[AnnotatedSlice]] = {}
    for item in read_annotations(annotations):
        annotated.setdefault(item.series_id, []).append(item)

    def find(row: Mapping[str, Any], mid_index: int, _accepted: bool) -> Centre:
        found = annotated.get(str(row["series_id"]), [])
        if not found:
            raise Excluded("no_annotation", "no annotated slice of this series")
        faults: list[str] = []
        for item in sorted(found, key=lambda item: (abs(item.slice_index - mid_index), item.slice_index)):
            try:
                return _annotated_centre(item, row, rule)
            except AnnotationError as error:
                faults.append(str(error))
        raise Excluded("faulty_annotation", "; ".join(faults))

    inputs = {"annotations": annotations_sha256(annotations), "centre": rule}
    targets = OverrideTargets(_shapes(store), frozenset(), frozenset())
    return Centres(*_with_overrides(inputs, overrides, targets), find=find)


def predicted_centres(
    store: SliceStore, regions: Regions, *, overrides: Path | None = None, corrections: Path | None = None
) -> Centres:
    """Centre every box on its study's predicted mask.

    Parameters
    ----------
    store
        Slice store.
    regions
        Masks predicted on it.
    overrides
        Override file, or None.
    corrections
        CVAT file of corrected masks, or None; an image that shows the predicted mask unchanged corrects nothing.

    Raises
    ------
    RegionError
        If a correction cannot be used. One of a mask that is not flagged is refused when crops are built, as is a
        centre by hand: only there is known whether the box leaves the image.
    lbp_ray.roi.overrides.OverrideError
        If an override cannot be used.
    """
    predicted = {str(row["series_id"]): row for row in regions.table.to_dict("records")}
    inputs = {"regions": regions.meta.regions_hash}
    corrected: dict[str, AnnotatedSlice] = {}
    faulty: dict[str, str] = {}
    if corrections is not None:
        inputs["corrections"] = annotations_sha256(corrections)
        corrected, faulty = _read_corrections(corrections, store, predicted)
    with_mask = frozenset(str(row["study_id"]) for row in predicted.values() if row["area_mm2"] > 0)
    targets = OverrideTargets(_shapes(store), with_mask, frozenset(item.study_id for item in corrected.values()))
    inputs, decided = _with_overrides(inputs, overrides, targets)
    undecided = {study: fault for study, fault in faulty.items() if study not in decided}
    if undecided:
        study, fault = next(iter(undecided.items()))
        msg = (
            f"{corrections}: {len(undecided)} image(s) cannot be used, e.g. of study {study}: {fault}; draw the region "
            "in CVAT, or decide about the study in paths.roi_overrides"
        )
        raise RegionError(msg)

    def unflagged(series_id: str) -> Centre | None:
        region = predicted.get(series_id)
        return None if region is None or region["flags"] else _predicted_centre(region, accepted=False)

    def find(row: Mapping[str, Any], _mid_index: int, accepted: bool) -> Centre:
        series_id = str(row["series_id"])
        if series_id in corrected:
            return _corrected_centre(corrected[series_id], unflagged(series_id))
        if series_id not in predicted:
            raise Excluded("no_region", "the regions artefact does not name this series")
        return _predicted_centre(predicted[series_id], accepted=accepted)

    return Centres(inputs, decided, find, unflagged)


def _annotated_centre(annotation: AnnotatedSlice, row: Mapping[str, Any], rule: CentreRule) -> Centre:
    """Return the centre of an annotated slice; raises `AnnotationError` if it cannot be used."""
    if annotation.fault:
        raise AnnotationError(annotation.fault)
    if (annotation.rows, annotation.columns) != (row["rows"], row["columns"]):
        msg = "the annotated image has another size than the store's"
        raise AnnotationError(msg)
    return Centre(*annotation.centre(rule), source=ANNOTATION, region_slice=annotation.slice_index)


def _predicted_centre(region: dict[Any, Any], *, accepted: bool) -> Centre:
    mask_HW, flags = mask_of(region), str(region["flags"])
    if flags and not accepted:
        codes = flags.split("+")
        detail = "; ".join(FLAGS.get(code, code) for code in codes)
        raise Flagged(f"roi_{codes[0]}", detail, int(region["slice_index"]), mask_HW)
    return Centre(
        row=float(region["centroid_row"]),
        column=float(region["centroid_column"]),
        source=str(region["source"]),
        region_slice=int(region["slice_index"]),
        flags=flags,
        mask_HW=mask_HW,
        is_accepted=accepted,
    )


def _corrected_centre(correction: AnnotatedSlice, replaces: Centre | None) -> Centre:
    mask_HW = correction.mask()
    row, column = mask_centroid(mask_HW)
    return Centre(row, column, MANUAL, correction.slice_index, mask_HW=mask_HW, replaces=replaces)


def _read_corrections(
    path: Path, store: SliceStore, predicted: Mapping[str, dict[Any, Any]]
) -> tuple[dict[str, AnnotatedSlice], dict[str, str]]:
    """Return corrected slices by series, and why the image of a study cannot be used."""
    shapes = store.manifest.set_index("series_id")[["rows", "columns"]]
    corrected: dict[str, AnnotatedSlice] = {}
    faulty: dict[str, str] = {}
    for item in read_annotations(path, keep_empty=True):
        if item.series_id not in shapes.index:
            faulty[item.study_id] = "its series is no sagittal T2 series of the store"
        elif item.fault:
            faulty[item.study_id] = item.fault
        elif (item.rows, item.columns) != tuple(shapes.loc[item.series_id]):
            faulty[item.study_id] = "its image has another size than the store's"
        elif item.series_id in corrected:
            faulty[item.study_id] = "two images of its series are in the file"
        elif not item.mask().any():
            faulty[item.study_id] = "its shapes cover no pixel"
        elif not _is_prediction(item, predicted.get(item.series_id)):
            corrected[item.series_id] = item
    return corrected, faulty


def _is_prediction(item: AnnotatedSlice, region: dict[Any, Any] | None) -> bool:
    return region is not None and np.array_equal(item.mask(), mask_of(region))


def _shapes(store: SliceStore) -> dict[str, tuple[int, int]]:
    manifest: pd.DataFrame = store.manifest
    return {
        str(study): (int(rows), int(columns))
        for study, rows, columns in zip(manifest["study_id"], manifest["rows"], manifest["columns"], strict=True)
    }


def _with_overrides(
    inputs: dict[str, str], path: Path | None, targets: OverrideTargets
) -> tuple[dict[str, str], dict[str, Override]]:
    if path is None:
        return inputs, {}
    decided = read_overrides(path, targets)
    return {**inputs, "overrides": hashlib.sha256(path.read_bytes()).hexdigest()}, decided
