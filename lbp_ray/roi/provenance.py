"""Which regions a study may crop by: made from its own images, by networks that saw nothing they must not.

Refused, or stated in the report: a segmenter trained on sealed patients, or one whose folds are not the study's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lbp_ray.roi.centres import MANUAL
from lbp_ray.roi.regions import OUT_OF_FOLD, RegionError, Regions, RegionsMeta
from lbp_ray.splits import HOLDOUT, SplitError, require_no_holdout, sealed_among

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

    from lbp_ray.splits import Split
    from lbp_ray.study import RoiConfig


def find_regions(root: Path, *, store: str, midsagittal: str) -> Path:
    """Return the only regions artefact that was made from a store and a mid-sagittal choice.

    Parameters
    ----------
    root
        Folder of all regions.
    store
        Content hash of the store.
    midsagittal
        SHA-256 of the mid-sagittal table.

    Raises
    ------
    RegionError
        If there is none or a choice of several.
    """
    metas = {
        path.parent: RegionsMeta.model_validate_json(path.read_bytes())
        for path in sorted(root.glob("[!.]*/regions.json"))
    }
    found = [folder for folder, meta in metas.items() if (meta.store, meta.midsagittal) == (store, midsagittal)]
    if len(found) == 1:
        return found[0]
    listed = f" ({', '.join(folder.name for folder in found)})" if found else f", {len(metas)} of other inputs"
    msg = (
        f"{len(found)} regions artefacts of this store and mid-sagittal choice under {root}{listed}, exactly one is "
        "required; run `python -m lbp_ray.segment`, or name one as paths.regions"
    )
    raise RegionError(msg)


def open_regions(folder: Path, *, store: str, midsagittal: str) -> Regions:
    """Open regions and refuse those of other images.

    Parameters
    ----------
    folder
        Regions artefact.
    store
        Content hash of the store.
    midsagittal
        SHA-256 of the mid-sagittal table.

    Raises
    ------
    RegionError
        If they are no regions, were edited, were made from another store or mid-sagittal choice, or hold a mask by a
        network that was trained on its patient.
    """
    regions = Regions.open(folder)
    for name, found, wanted in (
        ("store", regions.meta.store, store),
        ("mid-sagittal choice", regions.meta.midsagittal, midsagittal),
    ):
        if found != wanted:
            msg = (
                f"{folder} was made from another {name} ({found[:12]}, the study's is {wanted[:12]}); run "
                "`python -m lbp_ray.segment` on the study's own, or name other regions as paths.regions"
            )
            raise RegionError(msg)
    scored = regions.scores.loc[regions.scores["fold"] >= 0, "patient_id"]
    seen = regions.table["patient_id"].isin({*regions.meta.trained_patients, *scored})
    out_of_fold = (regions.table["source"] == OUT_OF_FOLD) & (regions.table["fold"] >= 0)
    wrong = regions.table[seen & ~out_of_fold]
    if len(wrong):
        msg = (
            f"{folder}: {len(wrong)} mask(s) come from a network that was trained on their own patient, e.g. of study "
            f"{wrong['study_id'].iloc[0]}; run `python -m lbp_ray.segment` again"
        )
        raise RegionError(msg)
    return regions


def check_regions(regions: Regions, split: Split, roi: RoiConfig) -> tuple[str, ...]:
    """Refuse regions by networks that saw what this study must keep from them; return what the report must say.

    Parameters
    ----------
    regions
        What the study is to be cropped by.
    split
        Its folds and sealed patients.
    roi
        What the study declares and allows.

    Raises
    ------
    RegionError
        If a sealed patient was trained on and that is not allowed, or the segmenter is neither nested in the study's
        folds nor declared label-blind.
    """
    return (
        *regions.meta.statements,
        *_sealed_statements(regions, split.table, allowed=roi.allow_holdout_training),
        *_nesting_statements(regions, split, label_blind=roi.label_blind),
    )


def manual_statements(crops: pd.DataFrame) -> tuple[str, ...]:
    """Return what the report must say of crops by hand.

    Parameters
    ----------
    crops
        Table of the crops artefact.
    """
    count = int((crops["crop_source"] == MANUAL).sum())
    return (f"{count} of {len(crops)} crops were placed or corrected by hand.",) if count else ()


def _sealed_statements(regions: Regions, table: pd.DataFrame, *, allowed: bool) -> tuple[str, ...]:
    # By their names in the store and in the split: a linked questionnaire may join patients.
    trained = [
        exams.loc[exams["patient_id"].isin(regions.meta.trained_patients), "study_id"]
        for exams in (regions.table, table)
    ]
    shown = set().union(*trained)
    if not allowed:
        try:
            require_no_holdout(table, shown, "region_finder")
        except SplitError as error:
            msg = f"{regions.folder}: {error}"
            raise RegionError(msg) from error
    patients = sealed_among(table, shown)["patient_id"].nunique()
    if not patients:
        return ()
    return (
        f"The segmenter that placed the crops was trained on {patients} patient(s) of the sealed hold-out: the "
        "hold-out is not untouched.",
    )


def _nesting_statements(regions: Regions, split: Split, *, label_blind: bool) -> tuple[str, ...]:
    if regions.meta.nested_in == split.split_hash:
        _require_own_folds(regions, split.table)
        return ()
    if label_blind:
        return (
            "The segmenter that placed the crops is not nested in this study's folds: it may have seen images of "
            "patients that the study is tested on, though never the patient that it crops. It is declared to have seen "
            "no pain label.",
        )
    nesting = "the folds of another split" if regions.meta.nested_in else "folds of its own"
    msg = (
        f"{regions.folder} has {nesting}, so that it saw images of patients that this study is tested on. Either nest "
        "it (train it on this study's folds: for every fold a segmenter that saw none of its patients), or set "
        "roi.label_blind=true, which declares that it was trained on images and outlines alone and never saw a pain "
        "label; the report then says so"
    )
    raise RegionError(msg)


def _require_own_folds(regions: Regions, split: pd.DataFrame) -> None:
    """Check that each mask comes from the network of its patient's own outer fold."""
    inside = split[split["fold"] != HOLDOUT].drop_duplicates("patient_id")
    joined = regions.table.merge(inside[["patient_id", "fold"]], on="patient_id", suffixes=("", "_of_patient"))
    wrong = joined[joined["fold"] != joined["fold_of_patient"]]
    if len(wrong):
        msg = (
            f"{regions.folder} claims to be nested in this study's folds, but {len(wrong)} mask(s) come from another "
            f"fold's network, e.g. of study {wrong['study_id'].iloc[0]}; run `python -m lbp_ray.segment` again"
        )
        raise RegionError(msg)
