"""The region finder as a user runs it, on a real Ray cluster: networks, masks, page, a study cropped by them, kills."""

from __future__ import annotations

import json
import shutil
import signal
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest
from river import expect, prepare_cohort, result_folder, run, study_arguments

from lbp_ray.roi.regions import MODEL, OUT_OF_FOLD, Regions, mask_of
from lbp_ray.segment.network import SegmentError
from lbp_ray.splits import HOLDOUT

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STUDY = study_arguments("recipe.frozen_epochs=2", "slice_counts=[1]", "evaluation.permutations=0")
FINDER = ("--config", "configs/roi_demo.yaml", "folds.study=small", "folds.folds=2", "recipe.epochs=2")
SMALLER = ("recipe.input_px=64", "recipe.learning_rate_drops=[]", "recipe.dtype=float32", "name=roi")


def find_regions(root, *overrides):
    """Run the region finder; return its regions and its output."""
    output = expect(root, "lbp_ray.segment", *FINDER, *SMALLER, *overrides)
    folder = next(line.removeprefix("regions: ") for line in output.splitlines() if line.startswith("regions: /"))
    return Regions.open(root.__class__(folder)), output


@pytest.fixture(scope="module")
def root(module_folder):
    """Root of a cohort of which some exams are not annotated, with a sealed split."""
    prepare_cohort(module_folder, "phantom_tiny", "cohort.annotated=20")
    expect(module_folder, "lbp_ray.seal", *STUDY)
    return module_folder


@pytest.fixture(scope="module")
def found(root):
    return find_regions(root)


def test_every_exam_has_a_mask_and_every_annotated_slice_a_score(root, found):
    regions, output = found
    table = regions.table
    assert len(table) == 28  # 24 of the task, 4 others
    assert set(table["source"]) == {OUT_OF_FOLD, MODEL}
    trained = set(regions.meta.trained_patients)
    assert (table["source"] == OUT_OF_FOLD).tolist() == table["patient_id"].isin(trained).tolist()
    assert len(regions.scores) == 20
    assert regions.scores["dice"].between(0, 1).all()
    split = pd.read_parquet(next((root / "runs" / "small" / "splits").glob("*/split.parquet")))
    assert not trained & set(split.loc[split["fold"] == HOLDOUT, "patient_id"])
    assert "Dice, mean" in output
    assert {"report.html", "worst.png", "contact_sheet.png", "review.csv", "final.pt", "history.parquet"} <= {
        path.name for path in regions.folder.iterdir()
    }
    assert not (regions.folder / "fold00.pt").exists()


def test_masks_are_those_of_the_network_of_their_fold(root, found):
    """The committed mask of an exam is what its network says, alone and without Ray."""
    from lbp_ray.segment.infer import Segmenter
    from lbp_ray.segment.region import without_specks
    from preprocess.store.read import SliceStore

    regions, _ = found
    row = regions.table[regions.table["fold"] == 1].iloc[0]
    (model,) = (root / "runs" / "roi" / "trials").glob("roi-fold01-*/model.pt")
    recipe = regions.meta.recipe
    segmenter = Segmenter(model, input_px=recipe["input_px"], bfloat16=recipe["dtype"] == "bfloat16")
    image = SliceStore.open(root / "store.zarr").read_slice(row["series_id"], int(row["slice_index"]))
    mask = without_specks(segmenter.masks([image])[0])
    assert (mask == mask_of(row)).mean() > 0.99  # another batch rounds bfloat16 otherwise


def test_the_same_command_again_does_nothing(root, found):
    regions, _ = found
    again, output = find_regions(root)
    assert again.meta == regions.meta
    assert "done after" not in output


def test_two_workers_give_what_one_gives(root, found):
    """Ray Train with two workers of one thread: same batches, same curve but for rounding."""
    two = find_regions(root, "name=two", "compute.workers=2")[0]
    curves = [
        pd.read_parquet(item.folder / "history.parquet").sort_values(["fold", "epoch"]) for item in (found[0], two)
    ]
    first = [curve[curve["epoch"] == 1]["train_loss"].to_numpy() for curve in curves]
    np.testing.assert_allclose(first[1], first[0], rtol=1e-3)
    last = [curve[curve["epoch"] == 2]["train_loss"].to_numpy() for curve in curves]
    np.testing.assert_allclose(last[1], last[0], rtol=2e-2)  # differences of rounding grow with every step


def test_a_study_is_cropped_by_the_regions(root, found):
    regions, _ = found
    overrides = root / "overrides.csv"  # two epochs find little: a person accepts what was flagged
    flagged = regions.table[(regions.table["flags"] != "") & (regions.table["components"] > 0)]
    rows = "".join(f"{study},use,,\n" for study in flagged["study_id"])
    overrides.write_text(f"study_id,action,centre_row,centre_column\n{rows}")
    chosen = ("roi.source=model", "roi.label_blind=true", f"paths.regions={regions.folder}")
    output = expect(root, "lbp_ray.tune", *STUDY, *chosen, f"paths.roi_overrides={overrides}")
    assert "report:" in output
    result = json.loads((result_folder(root) / "result.json").read_text())
    assert any("label" in statement for statement in result["statements"])
    (crops,) = (root / "runs" / "crops").iterdir()
    table = pd.read_parquet(crops / "crops.parquet")
    assert set(table["crop_source"]) <= {OUT_OF_FOLD, MODEL}
    page = (result_folder(root) / "report" / "report.html").read_text()
    assert "out of fold" in page or "out_of_fold" in page


def test_an_undeclared_segmenter_is_refused(root, found):
    chosen = ("roi.source=model", f"paths.regions={found[0].folder}")
    status, output = run(root, "lbp_ray.tune", *STUDY, *chosen)
    assert status == 2
    assert "label_blind" in output


def test_predictions_go_to_cvat_and_come_back(root, found):
    from lbp_ray.roi.annotations import read_annotations

    regions, _ = found
    shutil.rmtree(root / "cvat", ignore_errors=True)
    store = str(root / "store.zarr")
    expect(root, "lbp_ray.segment.export", str(regions.folder), "--store", store, "--out", str(root / "cvat"))
    back = {item.series_id: item.mask() for item in read_annotations(root / "cvat" / "annotations.xml") if item.shapes}
    filled = regions.table[regions.table["components"] > 0]
    assert set(back) == set(filled["series_id"])
    assert all(np.array_equal(back[row["series_id"]], mask_of(row)) for row in filled.to_dict("records"))


def test_no_more_workers_are_asked_for_than_nodes_hold():
    """A worker that fits on no node would be waited for, for ever."""
    import ray

    from lbp_ray.distributed.regions import workers_that_fit

    ray.init(address="local", num_cpus=3, num_gpus=1, include_dashboard=False)
    try:
        assert [workers_that_fit(threads, 0) for threads in (1, 2, 3)] == [3, 1, 1]
        assert workers_that_fit(2, 0.5) == 1
        with pytest.raises(SegmentError, match=r"2 worker\(s\) of .* required, the cluster's nodes hold 1"):
            workers_that_fit(2, 0, least=2)
    finally:
        ray.shutdown()


# --- kill -9 ---------------------------------------------------------------------------------------------------------

TRAINING_POINTS = ["segment:checkpoint", "network:before-rename", "network:after-rename"]
MASK_POINTS = ["regions:shard"]
DRIVER_POINTS = [f"{stage}:{side}-rename" for stage in ("training_set", "regions") for side in ("before", "after")]
POINTS = [*TRAINING_POINTS, *MASK_POINTS, *DRIVER_POINTS]


def without(root: Path, runs: Path, lost: str) -> tuple[str, ...]:
    """Copy finished runs but for the regions and some of what they were made from; return the command's arguments."""
    shutil.copytree(root / "runs", runs, ignore=shutil.ignore_patterns("regions", "tune", "two"))
    for path in runs.glob(f"roi/{lost}"):
        shutil.rmtree(path)
    return (*FINDER, *SMALLER, f"paths.runs={runs}", "compute.checkpoint_s=0")


def finish_and_compare(root: Path, runs: Path, arguments: tuple[str, ...], undisturbed: Path) -> None:
    expect(root, "lbp_ray.segment", *arguments)
    (folder,) = (runs / "regions").glob("[!.]*")
    for name in ("regions.parquet", "scores.parquet", "regions.json", "final.pt"):
        assert (folder / name).read_bytes() == (undisturbed / name).read_bytes(), name
    assert not list(runs.glob("roi/in_progress/*"))


@pytest.mark.parametrize("point", [*TRAINING_POINTS, *MASK_POINTS])
def test_kill_of_a_worker_at_every_commit_point(root, found, tmp_path, point):
    """What is lost before the point is made again, and the regions are those of an undisturbed run."""
    lost = {"network": "trials/roi-fold01-*", "segment": "trials/roi-fold01-*"}
    arguments = without(root, tmp_path / "runs", lost.get(point.partition(":")[0], "nothing"))
    marker = tmp_path / "marker"
    status, output = run(root, "lbp_ray.segment", *arguments, LBP_RAY_KILL_AT=f"{point}@{marker}")
    assert marker.exists(), "the commit point was never reached"
    assert status == 0, output[-2000:]
    finish_and_compare(root, tmp_path / "runs", arguments, found[0].folder)


def test_kill_of_the_driver_at_every_commit_point(root, found, tmp_path):
    """Killed at one point after the other; every run goes on where the kill before left it."""
    arguments = without(root, tmp_path / "runs", "training_sets/*")
    for number, point in enumerate(DRIVER_POINTS):
        marker = tmp_path / f"marker{number}"
        status, output = run(root, "lbp_ray.segment", *arguments, LBP_RAY_KILL_AT=f"{point}@{marker}")
        assert marker.exists(), f"{point} was never reached: {output[-2000:]}"
        assert status == -signal.SIGKILL, point
    finish_and_compare(root, tmp_path / "runs", arguments, found[0].folder)
