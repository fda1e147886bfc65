"""What the report says of where crops come from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lbp_ray.report.words import listed, number, p_value

if TYPE_CHECKING:
    from lbp_ray.result import CropProvenance, SegmenterScores, StudyResult

ASSOCIATION_LEVEL = 0.05
"""A p-value at or below this is called a difference between the classes; the value itself is always printed."""

SOURCE_NAMES = {
    "annotation": "hand annotation",
    "out_of_fold": "segmenter, out of fold",
    "model": "final segmenter",
    "manual": "placed or corrected by hand",
}
"""How a crop source is written for a reader."""


def source_name(code: str) -> str:
    """Write a crop source for a reader."""
    return SOURCE_NAMES.get(code, code)


def crop_sentences(result: StudyResult) -> list[str]:
    """Say where the crops come from, whether that depends on the label, and how good the segmenter is.

    Parameters
    ----------
    result
        A result that `check_reportable` accepted.
    """
    if result.crops is None:
        return []
    scores = result.crops.segmenter
    return [_association_sentence(result.crops), *(_segmenter_sentences(scores) if scores else [])]


def association_warning(result: StudyResult) -> list[str]:
    """Return the sentence that warns of sources that differ between the classes; nothing where they do not."""
    crops = result.crops
    differs = crops is not None and crops.p_value is not None and crops.p_value <= ASSOCIATION_LEVEL
    return [_association_sentence(crops)] if crops is not None and differs else []


def _association_sentence(crops: CropProvenance) -> str:
    names = listed([source_name(source.name) for source in crops.sources])
    if crops.p_value is None:
        return f"All crops have one source, {names}: it cannot tell the classes apart."
    test = f"{p_value(crops.p_value)}, {crops.num_permutations} shuffles of the labels among patients"
    if crops.p_value <= ASSOCIATION_LEVEL:
        return (
            f"Warning: the sources of the crops ({names}) differ between symptomatic and asymptomatic studies ({test}):"
            " scores may rest on how an exam was cropped."
        )
    return (
        f"The sources of the crops ({names}) are not distinguishable between symptomatic and asymptomatic studies "
        f"({test})."
    )


def _segmenter_sentences(scores: SegmenterScores) -> list[str]:
    errors = [
        f"± {number(error, 3)} over {count} {unit}"
        for error, count, unit in (
            (scores.standard_error_images, scores.num_images, "images"),
            (scores.standard_error_folds, scores.num_folds, "folds"),
        )
        if error is not None
    ]
    spread = f" (standard error {listed(errors)})" if errors else ""
    return [
        f"On annotated slices of patients that it never saw, the segmenter reaches a Dice of {number(scores.dice, 3)}"
        f"{spread}; a fixed mean box reaches {number(scores.baseline_dice, 3)}.",
        f"Its centroids are off by {number(scores.centroid_error_median_mm, 1)} mm (median) and "
        f"{number(scores.centroid_error_p95_mm, 1)} mm (95th percentile).",
    ]
