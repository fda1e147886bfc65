"""Masks of all shards → the regions artefact: one mask per exam, scores of the annotated slices, pictures, page."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pandas as pd

from lbp_ray.roi.annotations import read_annotations
from lbp_ray.roi.regions import COLUMNS, MODEL, OUT_OF_FOLD, SCORE_COLUMNS, Regions, RegionsMeta, mask_of
from lbp_ray.segment.network import FINAL
from lbp_ray.segment.page import write_page
from lbp_ray.segment.region import Region, describe_mask, flags_of, plausible_ranges
from lbp_ray.segment.review import SliceViews, write_review
from lbp_ray.segment.scores import mean_box, score_slice
from lbp_ray.trial import environment
from preprocess.commit import committed_directory

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from lbp_ray.roi.regions import Plausible
    from lbp_ray.segment.config import SegmentConfig
    from lbp_ray.segment.plan import Plan

ARTEFACT_VERSION = 1
"""Raised by hand when the artefact's files or columns change."""

MEASURES = ("area_mm2", "height_mm", "width_mm", "components", "centroid_row", "centroid_column", "touches_edge")
"""Columns of a shard that make a `Region`."""


def assemble(
    config: SegmentConfig,
    plan: Plan,
    masks: pd.DataFrame,
    history: pd.DataFrame,
    models: dict[int, Path],
    *,
    folder: Path,
) -> Regions:
    """Commit the regions artefact.

    Parameters
    ----------
    config, plan
        What was asked for and planned.
    masks
        Rows of all shards: one per segmented slice.
    history
        Learning curves of all networks.
    models
        State dict of each fold's network and of the final one.
    folder
        Final folder.
    """
    truth = _truth(config, plan)
    spacing = {row["series_id"]: (row["row_mm"], row["column_mm"]) for row in masks.to_dict("records")}
    seen = plan.annotated[plan.annotated["fold"] >= 0]
    keys = [(str(series), int(index)) for series, index in zip(seen["series_id"], seen["slice_index"], strict=True)]
    plausible = plausible_ranges([describe_mask(truth[key], spacing[key[0]]) for key in keys])
    table = _table(plan, masks, plausible)
    predicted = {(str(row["series_id"]), int(row["slice_index"])): mask_of(row) for row in _annotated_rows(plan, masks)}
    scores = _scores(plan, truth, predicted, spacing)
    views = SliceViews(
        image=plan.store.read_slice,
        truth=lambda series_id, index: truth[series_id, index],
        predicted=lambda series_id, index: predicted[series_id, index],
    )
    meta = RegionsMeta(
        version=ARTEFACT_VERSION,
        store=plan.store.content_hash,
        midsagittal=plan.midsagittal_sha256,
        annotations=plan.annotations_sha256,
        weights_hash=plan.weights_hash,
        recipe=config.recipe.model_dump(mode="json"),
        num_folds=plan.num_folds,
        nested_in=plan.nested_in,
        trained_patients=plan.trained_patients,
        plausible=plausible,
        statements=plan.statements,
        environment=environment("cuda" if config.compute.gpus_per_worker else "cpu"),
    ).hashed_with(table, scores)
    with committed_directory(folder, point="regions") as partial:
        table.to_parquet(partial / "regions.parquet", index=False)
        scores.to_parquet(partial / "scores.parquet", index=False)
        history.to_parquet(partial / "history.parquet", index=False)
        faults = pd.DataFrame(list(plan.faults.items()), columns=["image", "fault"])
        faults.to_csv(partial / "faults.csv", index=False)
        (partial / "regions.json").write_text(meta.model_dump_json(indent=1))
        for fold, path in models.items():
            if fold == FINAL or config.compute.keep_models == "all":
                shutil.copyfile(path, partial / ("final.pt" if fold == FINAL else f"fold{fold:02d}.pt"))
        write_review(partial, table, scores, views)
        write_page(partial, Regions(table, scores, meta, partial), history)
    return Regions.open(folder)


def _truth(config: SegmentConfig, plan: Plan) -> dict[tuple[str, int], np.ndarray]:
    wanted = set(zip(plan.annotated["series_id"], plan.annotated["slice_index"], strict=True))
    found = read_annotations(config.paths.annotations)
    return {
        (item.series_id, item.slice_index): item.mask()
        for item in found
        if not item.fault and (item.series_id, item.slice_index) in wanted
    }


def _annotated_rows(plan: Plan, masks: pd.DataFrame) -> list[dict[Any, Any]]:
    """Rows of the masks of annotated slices, each by the network that never saw its patient."""
    rows = plan.annotated[["series_id", "slice_index"]].merge(masks, on=["series_id", "slice_index"], how="left")
    assert rows["fold"].notna().all(), "every annotated slice was segmented"
    return rows.to_dict("records")


def _table(plan: Plan, masks: pd.DataFrame, plausible: Plausible) -> pd.DataFrame:
    table = plan.middle.merge(
        masks.drop(columns=["study_id", "patient_id"]), on=["series_id", "slice_index"], validate="one_to_one"
    )
    assert len(table) == len(plan.middle), "every mid slice was segmented"
    table["source"] = [MODEL if fold == FINAL else OUT_OF_FOLD for fold in table["fold"]]
    regions = (Region(**{name: row[name] for name in MEASURES}) for row in table[list(MEASURES)].to_dict("records"))
    table["flags"] = [flags_of(region, plausible) for region in regions]
    return table[list(COLUMNS)].sort_values("study_id", ignore_index=True)


def _scores(
    plan: Plan,
    truth: dict[tuple[str, int], np.ndarray],
    predicted: dict[tuple[str, int], np.ndarray],
    spacing: dict[str, tuple[float, float]],
) -> pd.DataFrame:
    """Score every annotated slice out of fold, beside the mean box of the same training slices."""
    annotated = plan.annotated
    boxes = {}
    for fold in sorted(set(annotated["fold"])):
        training = annotated[(annotated["fold"] >= 0) & (annotated["fold"] != fold)]
        places = zip(training["series_id"], training["slice_index"], strict=True)
        boxes[fold] = mean_box((truth[series, index], spacing[series]) for series, index in places)
    rows = []
    for row in annotated.to_dict("records"):
        key = row["series_id"], row["slice_index"]
        box = boxes[row["fold"]].mask(truth[key].shape, spacing[key[0]])
        place = {str(name): value for name, value in row.items()} | {"fold": plan.model_of(row["patient_id"])}
        rows.append(score_slice(place, truth[key], predicted[key], box, spacing[key[0]]))
    return pd.DataFrame(rows)[list(SCORE_COLUMNS)]
