"""One exam, DICOM → probability and evidence, by the networks of a finished study.

``python -m lbp_ray.predict DICOM_DIR --result RUNS/demo/results/ID --out DIR``
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from pydantic import ValidationError

from lbp_ray.config import FrozenModel
from lbp_ray.ensemble import ensemble_threshold
from lbp_ray.features import BATCH_SIZE
from lbp_ray.metrics import study_scores
from lbp_ray.nets.resnet import build_backbone, load_head, standardise
from lbp_ray.out_of_fold import collect
from lbp_ray.roi.box import Box, Excluded, choose_neighbours
from lbp_ray.roi.centres import Centre, Flagged
from lbp_ray.roi.contact_sheet import tile
from lbp_ray.roi.crops import CropRequest, place_crop
from lbp_ray.roi.regions import FLAGS, MODEL, RegionsMeta
from lbp_ray.splits import HOLDOUT
from lbp_ray.study import StudyRule
from preprocess.commit import write_atomic
from preprocess.exam import ConvertedExam, convert_exam
from preprocess.midsagittal.choose import TEMPLATE, load_midsagittal
from preprocess.midsagittal.match import MidsagittalChoice, find_midsagittal, load_templates
from preprocess.store.png import encode_png

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lbp_ray.cell import TrialSpec
    from lbp_ray.prepare import Prepared
    from lbp_ray.study import StudyConfig

SPACING_TOLERANCE = 0.05
"""Largest relative difference of an exam's pixel spacing to the study's; beyond it a box shows other anatomy."""

PREDICTOR_FILE = "predictor.json"
"""Name of the predictor's description inside a result folder."""


class PredictError(ValueError):
    """An exam or a study that no prediction can be made with."""


class SliceCountPredictor(FrozenModel):
    """The fold networks of one slice count."""

    models: tuple[Path, ...]
    threshold: float
    """Of the averaged scores, as `lbp_ray.ensemble.ensemble_threshold` takes it."""


class Predictor(FrozenModel):
    """All that a prediction needs of a finished study; no store, no label."""

    name: str
    statements: tuple[str, ...]
    templates: Path
    box_height_px: int
    box_width_px: int
    spacing_mm: tuple[float, float]
    """Row and column spacing of the study's images."""
    centroid_mm: tuple[float, float]
    """Mean box centroid of the study, from the image centre, rows then columns."""
    slice_pitch_mm: float
    tolerance_mm: float
    lowest_mid_score: float
    """Lowest mid-sagittal score among the study's own exams; an exam below it is unlike all of them."""
    lowest_mid_margin: float
    """Lowest margin of the chosen slice over distant ones among them."""
    study_rule: StudyRule
    study_rule_k: int
    by_slice_count: dict[int, SliceCountPredictor]
    box_mm: tuple[float, float] | None = None
    """Height and width of a physical box, resampled onto the pixels above; None: the box is those pixels."""
    regions: Path | None = None
    """Regions whose final network places the box; None takes the study's mean place."""

    def request(self, num_slices: int) -> CropRequest:
        """Return the crop that networks of one slice count were trained on."""
        reach = num_slices // 2
        offsets = tuple(step * self.slice_pitch_mm for step in range(-reach, reach + 1))
        return CropRequest(self.box_height_px, self.box_width_px, offsets, self.tolerance_mm, self.box_mm)

    @classmethod
    def load(cls, result_folder: Path) -> Predictor:
        """Read a result folder's predictor.

        Raises
        ------
        PredictError
            If the folder is not a finished result, one of another version, or no network was kept.
        """
        path = result_folder / PREDICTOR_FILE
        if not path.is_file():
            msg = f"{path} not found: give the folder of a finished study's result, as printed at its end"
            raise PredictError(msg)
        try:
            predictor = cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            msg = f"{path} was written by another version of this program; run the study again, it only aggregates"
            raise PredictError(msg) from error
        if not predictor.by_slice_count:
            msg = f"{path}: the study kept no network; run it again with compute.keep_models=first_seed"
            raise PredictError(msg)
        return predictor


def describe_predictor(
    config: StudyConfig, prepared: Prepared, specs: Sequence[TrialSpec], folders: Sequence[Path]
) -> Predictor:
    """Collect what a finished study's networks need to judge a new exam.

    Parameters
    ----------
    config, prepared
        The study.
    specs, folders
        Its trials and where they are committed.
    """
    outside = collect(specs, folders, prepared.analysed, config.evaluation)
    inside = prepared.split.table.loc[prepared.split.table["fold"] != HOLDOUT, "study_id"]
    table = prepared.crops.table
    table = table[table["study_id"].isin(inside)]
    spacing = (float(table["row_spacing_mm"].median()), float(table["column_spacing_mm"].median()))
    rows = (table["centroid_row"] - table["image_rows"] / 2) * table["row_spacing_mm"]
    columns = (table["centroid_column"] - table["image_columns"] / 2) * table["column_spacing_mm"]
    middle = load_midsagittal(prepared.midsagittal)
    # Numbers of an exam whose slice was corrected are those of a slice that was wrong.
    middle = middle[middle["study_id"].isin(inside) & (middle["source"] == TEMPLATE)]
    predictors = {}
    for count in config.slice_counts:
        chosen = [folder for spec, folder in zip(specs, folders, strict=True) if spec.cell.num_slices == count]
        models = tuple(folder / "model.pt" for folder in chosen if (folder / "model.pt").is_file())
        if models:
            threshold = ensemble_threshold(outside[outside["num_slices"] == count], config.evaluation)
            predictors[count] = SliceCountPredictor(models=models, threshold=threshold)
    return Predictor(
        name=config.name,
        statements=(*config.statements, *prepared.statements, *_judging_statements(config)),
        templates=prepared.midsagittal / "templates.npz",
        box_height_px=config.roi.height_px,
        box_width_px=config.roi.width_px,
        spacing_mm=spacing,
        centroid_mm=(float(rows.mean()), float(columns.mean())),
        slice_pitch_mm=config.roi.slice_pitch_mm,
        tolerance_mm=config.roi.tolerance_mm,
        lowest_mid_score=float(middle["score"].min()),
        lowest_mid_margin=float(middle["margin"].min()),
        study_rule=config.recipe.study_rule,
        study_rule_k=config.recipe.study_rule_k,
        by_slice_count=predictors,
        box_mm=config.roi.size_mm,
        regions=None if prepared.regions is None else prepared.regions.folder,
    )


def _judging_statements(config: StudyConfig) -> tuple[str, ...]:
    """Say what of the study's networks and threshold a reader of a single prediction must know."""
    recipe, told = config.recipe, []
    ways = {"epochs": recipe.selection, "thresholds": config.evaluation.threshold_source}
    chosen = [name for name, how in ways.items() if how == "same_fold"]
    if chosen:
        told.append(
            f"The {' and '.join(chosen)} of the study were chosen on the folds that judged them (same_fold): its "
            "figures are optimistic, and the threshold may not carry over."
        )
    if recipe.checkpoint_top_k > 1:
        told.append(
            f"The study averaged {recipe.checkpoint_top_k} epochs of each network; predictions use the best one only."
        )
    return tuple(told)


class Prediction(FrozenModel):
    """A probability and what it rests on; holds no identifier of the exam."""

    study: str
    probability: float
    """Study probability by the study's rule, averaged over the fold networks."""
    threshold: float
    positive: bool
    slice_probabilities: tuple[float, ...]
    """Of each slice, right to left, averaged over the fold networks."""
    slice_offsets_mm: tuple[float, ...]
    mid_slice: int
    num_slices_in_stack: int
    mid_score: float
    mid_margin: float
    box: Box
    crop_source: str
    """``mean_box`` (the study's average place), ``model`` (the study's segmenter) or ``given``."""
    num_models: int
    warnings: tuple[str, ...]
    """What makes this exam unlike the study's; look at the picture before anything else."""
    statements: tuple[str, ...]
    files: dict[str, int]
    """Code → number of files of the folder."""


def predict_exam(
    predictor: Predictor, exam: ConvertedExam, *, num_slices: int, centroid: tuple[float, float] | None = None
) -> tuple[Prediction, np.ndarray]:
    """Score one exam.

    Parameters
    ----------
    predictor
        A finished study's.
    exam
        The converted sagittal T2 stack.
    num_slices
        One of the study's slice counts.
    centroid
        Row and column of the lumbar region's centre in canonical pixels; None asks the study's segmenter, or takes the
        mean place of a study without one.

    Returns
    -------
    Prediction
        With its evidence.
    numpy.ndarray
        (H, W, 3) uint8 picture: the mid-sagittal slice with its box, and the crops.

    Raises
    ------
    PredictError
        If spacing, size or neighbours do not fit the study, or the segmenter's mask is one that a person must see.
    """
    if num_slices not in predictor.by_slice_count:
        msg = f"the study has networks for {sorted(predictor.by_slice_count)} slices, {num_slices} was asked for"
        raise PredictError(msg)
    _require_spacing(predictor, exam)
    middle = find_midsagittal(exam.pixels_SHW, exam.spacing_mm, load_templates(predictor.templates))
    chosen = predictor.by_slice_count[num_slices]
    try:
        centre = _centre(predictor, exam, middle.slice_index, centroid)
        box, crops_KHW, indices = _cut(predictor.request(num_slices), exam, middle.slice_index, centre)
    except Excluded as verdict:
        hint = "; look at the exam and give the centre of its lumbar region" if isinstance(verdict, Flagged) else ""
        msg = f"the exam cannot be cropped ({verdict.reason}): {verdict}{hint}"
        raise PredictError(msg) from verdict
    scores_MK = np.stack([slice_probabilities(path, crops_KHW) for path in chosen.models])
    probability = _study_probability(predictor, scores_MK)
    positions = np.array(exam.record.positions_mm)
    codes = pd.Series(list(exam.codes.values())).value_counts()
    prediction = Prediction(
        study=predictor.name,
        probability=probability,
        threshold=chosen.threshold,
        positive=probability >= chosen.threshold,
        slice_probabilities=tuple(scores_MK.mean(axis=0).tolist()),
        slice_offsets_mm=tuple((positions[indices] - positions[middle.slice_index]).tolist()),
        mid_slice=middle.slice_index,
        num_slices_in_stack=len(positions),
        mid_score=middle.score,
        mid_margin=middle.margin,
        box=box,
        crop_source=centre.source,
        num_models=len(chosen.models),
        warnings=_warnings(predictor, middle),
        statements=predictor.statements,
        files={str(code): int(count) for code, count in codes.items()},
    )
    return prediction, _picture(exam.pixels_SHW[middle.slice_index], box, centre.mask_HW, crops_KHW)


def _require_spacing(predictor: Predictor, exam: ConvertedExam) -> None:
    if predictor.box_mm is not None:
        return
    off = np.abs(np.divide(exam.spacing_mm, predictor.spacing_mm) - 1)
    if (off > SPACING_TOLERANCE).any():
        found, wanted = (
            " x ".join(f"{value:.3f}" for value in pair) for pair in (exam.spacing_mm, predictor.spacing_mm)
        )
        msg = (
            f"the exam's pixel spacing is {found} mm, the study's {wanted} mm: its fixed box would show other anatomy, "
            "and nothing is resampled silently; resample the exam, or use a study of this protocol"
        )
        raise PredictError(msg)


def _warnings(predictor: Predictor, middle: MidsagittalChoice) -> tuple[str, ...]:
    measured = {
        "score": (middle.score, predictor.lowest_mid_score),
        "margin": (middle.margin, predictor.lowest_mid_margin),
    }
    return tuple(
        f"the mid-sagittal {name} {found:.3f} is below the study's lowest, {lowest:.3f}: check the chosen slice"
        for name, (found, lowest) in measured.items()
        if found < lowest
    )


def _centre(predictor: Predictor, exam: ConvertedExam, mid_index: int, centroid: tuple[float, float] | None) -> Centre:
    shape = (exam.pixels_SHW.shape[1], exam.pixels_SHW.shape[2])
    if centroid is None and predictor.regions is not None:
        return _segmented(predictor.regions, exam, mid_index)
    source = "mean_box" if centroid is None else "given"
    if centroid is None:
        row, column = (
            size / 2 + offset / spacing
            for size, offset, spacing in zip(shape, predictor.centroid_mm, exam.spacing_mm, strict=True)
        )
        centroid = (row, column)
    if not all(0 <= place <= size for place, size in zip(centroid, shape, strict=True)):
        msg = f"the centre {centroid[0]:g}, {centroid[1]:g} lies outside the image of {shape[0]} x {shape[1]} pixels"
        raise PredictError(msg)
    return Centre(*centroid, source=source, region_slice=mid_index)


def _segmented(regions: Path, exam: ConvertedExam, mid_index: int) -> Centre:
    """Ask the study's final segmenter; raises `Flagged` for a mask that a person must see."""
    from lbp_ray.segment.infer import Segmenter  # a study without a segmenter needs none of its libraries
    from lbp_ray.segment.region import describe_mask, flags_of

    if not (regions / "final.pt").is_file():
        msg = f"the segmenter {regions / 'final.pt'} is gone; make the regions again, or give the region's centre"
        raise PredictError(msg)
    meta = RegionsMeta.model_validate_json((regions / "regions.json").read_bytes())
    (mask_HW,) = Segmenter.load(regions).masks([exam.pixels_SHW[mid_index]])
    region = describe_mask(mask_HW, exam.spacing_mm)
    flags = flags_of(region, meta.plausible)
    if flags:
        codes = flags.split("+")
        raise Flagged(f"roi_{codes[0]}", "; ".join(FLAGS[code] for code in codes), mid_index, mask_HW)
    return Centre(region.centroid_row, region.centroid_column, MODEL, mid_index, mask_HW=mask_HW)


def _cut(
    request: CropRequest, exam: ConvertedExam, mid_index: int, centre: Centre
) -> tuple[Box, np.ndarray, np.ndarray]:
    """Return the box, the crops (K, H, W) and their slices (K,)."""
    shape = (exam.pixels_SHW.shape[1], exam.pixels_SHW.shape[2])
    box, _ = place_crop(centre, request, shape, exam.spacing_mm)
    positions = np.array(exam.record.positions_mm)
    indices = choose_neighbours(positions, mid_index, request.offsets_mm, tolerance_mm=request.tolerance_mm)
    return box, request.crop(exam.pixels_SHW[indices], box), indices


def _study_probability(predictor: Predictor, scores_MK: np.ndarray) -> float:
    """Score the exam by each of M networks, then average them, as the threshold's scores were made."""
    model_M = np.repeat(np.arange(len(scores_MK)), scores_MK.shape[1])
    _, scores = study_scores(model_M, scores_MK.ravel(), rule=predictor.study_rule, k=predictor.study_rule_k)
    return float(scores.mean())


def slice_probabilities(
    path: Path, crops_MHW: np.ndarray, *, device: str = "cpu", advance: Callable[[int], object] = lambda _: None
) -> np.ndarray:
    """Score slices by one kept network.

    Parameters
    ----------
    path
        ``model.pt`` of a committed trial.
    crops_MHW
        Stored pixel values.
    device
        Torch device to run on.
    advance
        Told after each batch how many slices it had.

    Returns
    -------
    numpy.ndarray
        (M,) float64.

    Raises
    ------
    PredictError
        If the network is gone.
    """
    if not path.is_file():
        msg = f"the network {path} is gone; run the study again, it trains only what is missing"
        raise PredictError(msg)
    state = torch.load(path, map_location="cpu", weights_only=True)
    backbone, head = build_backbone(state["backbone"]).to(device), load_head(state["head"]).to(device)
    parts = []
    with torch.inference_mode():
        for start in range(0, len(crops_MHW), BATCH_SIZE):
            batch = torch.from_numpy(np.array(crops_MHW[start : start + BATCH_SIZE])).to(device)
            parts.append(torch.sigmoid(head(backbone(standardise(batch))).double())[:, 0].cpu().numpy())
            advance(len(batch))
    return np.concatenate(parts)


def _picture(slice_HW: np.ndarray, box: Box, mask_HW: np.ndarray | None, crops_KHW: np.ndarray) -> np.ndarray:
    return np.concatenate([tile(slice_HW, box, mask_HW), *(tile(crop_HW) for crop_HW in crops_KHW)], axis=1)


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, predict one exam and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m lbp_ray.predict", description=__doc__)
    parser.add_argument("dicom_dir", type=Path, help="folder of one exam")
    parser.add_argument("--result", type=Path, required=True, help="result folder of a finished study")
    parser.add_argument("--out", type=Path, required=True, help="folder for prediction.json and prediction.png")
    parser.add_argument("--num-slices", type=int, help="slice count; the study's largest by default")
    parser.add_argument(
        "--centroid", type=float, nargs=2, metavar=("ROW", "COLUMN"), help="centre of the lumbar region"
    )
    parsed = parser.parse_args(arguments)
    try:
        predictor = Predictor.load(parsed.result)
        prediction, picture = predict_exam(
            predictor,
            convert_exam(parsed.dicom_dir),
            num_slices=parsed.num_slices or max(predictor.by_slice_count),
            centroid=tuple(parsed.centroid) if parsed.centroid else None,
        )
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    write_atomic(parsed.out / "prediction.json", prediction.model_dump_json(indent=1).encode())
    write_atomic(parsed.out / "prediction.png", encode_png(picture))
    sys.stdout.write(_render(prediction) + f"\nevidence: {parsed.out / 'prediction.png'}\n")
    return 0


def _render(prediction: Prediction) -> str:
    slices = ", ".join(
        f"{offset:+.1f} mm: {probability:.3f}"
        for offset, probability in zip(prediction.slice_offsets_mm, prediction.slice_probabilities, strict=True)
    )
    call = "at or above" if prediction.positive else "below"
    return "\n".join(
        [
            f"probability {prediction.probability:.3f} of symptoms, {call} the threshold {prediction.threshold:.3f}",
            f"  {prediction.num_models} networks of study {prediction.study}; slices {slices}",
            f"  mid-sagittal slice {prediction.mid_slice + 1} of {prediction.num_slices_in_stack}, "
            f"score {prediction.mid_score:.3f}, margin {prediction.mid_margin:.3f}; box from {prediction.crop_source}",
            f"  files: {json.dumps(prediction.files)}",
            *(f"  warning: {warning}" for warning in prediction.warnings),
            *(f"  - {statement}" for statement in prediction.statements),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
