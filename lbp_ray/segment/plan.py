"""Store, annotations and sealed patients → a training set on disk, and the networks to train on it.

Nothing here reads a questionnaire: a region finder learns from images and masks alone.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from lbp_ray.nets.unet import build_unet
from lbp_ray.nets.weights import VGG11_BN, load_backbone_weights, weights_sha256
from lbp_ray.prepare import find_midsagittal_artefact
from lbp_ray.roi.annotations import annotations_sha256, faults_by_image, read_annotations
from lbp_ray.runs import RunPaths
from lbp_ray.segment.network import APART, FINAL, FoldSpec, SegmentError, place_of
from lbp_ray.segment.samples import Grid
from lbp_ray.splits import HOLDOUT, Split, require_no_holdout
from preprocess.commit import canonical_json, committed_directory, content_id
from preprocess.midsagittal.choose import CONTRAST, load_midsagittal
from preprocess.store.read import SliceStore

if TYPE_CHECKING:
    from pathlib import Path

    from lbp_ray.roi.annotations import AnnotatedSlice
    from lbp_ray.segment.config import SegmentConfig

SET_VERSION = 2
"""Raised by hand when the same inputs give another training set or other networks."""

MAX_LISTED = 20
"""Faulty images named in one message."""


@dataclass(frozen=True)
class Plan:
    """A region finder ready to train."""

    store: SliceStore
    middle: pd.DataFrame
    """One row per sagittal T2 series with a mid slice: ``study_id``, ``patient_id``, ``series_id``, ``slice_index``."""
    annotated: pd.DataFrame
    """Row n describes row n of the training set: those columns of the annotated slice, and ``fold``."""
    fold_of_patient: dict[str, int]
    """Fold whose network never saw a patient; patients that none saw are not in it."""
    folder: Path
    """The training set."""
    set_hash: str
    weights_hash: str
    midsagittal_sha256: str
    annotations_sha256: str
    nested_in: str | None
    num_folds: int
    faults: dict[str, str]
    """Annotated images that are not used → why."""
    statements: tuple[str, ...]

    def model_of(self, patient_id: str) -> int:
        """Return the network to ask about a patient: one that never saw any exam of theirs."""
        return self.fold_of_patient.get(patient_id, FINAL)

    @property
    def trained_patients(self) -> tuple[str, ...]:
        """Every patient that any network is trained on."""
        return tuple(sorted(set(self.annotated.loc[self.annotated["fold"] >= 0, "patient_id"])))


def plan_regions(config: SegmentConfig) -> Plan:
    """Open what is to be segmented, decide who may train what and commit the training set.

    Raises
    ------
    ValueError
        Of the room at fault: an incomplete store, absent weights or annotations, no sealed split, too few patients.
    """
    store = SliceStore.open(config.paths.store, contrast=CONTRAST)
    midsagittal = config.paths.midsagittal or find_midsagittal_artefact(config.paths.store, store.content_hash)
    middle = _middle(store, midsagittal)
    slices, faults = _sound_slices(config.paths.annotations, store)
    lost = f"{len(faults)} annotated images were not used; faults.csv names each with its fault."
    annotated = _annotated(slices, store)
    split = sealed_split(RunPaths(config.paths.runs, config.folds.study)) if config.folds.study else None
    fold_of_patient = assign_folds(config, annotated, split)
    annotated["fold"] = [fold_of_patient.get(patient, APART) for patient in annotated["patient_id"]]
    if split is not None:
        require_no_holdout(split.table, annotated.loc[annotated["fold"] != APART, "study_id"], "region_finder")
    _require_enough(annotated, _num_folds(config, split))
    encoder = None
    if config.recipe.weights != "random":
        encoder = load_backbone_weights(config.recipe.weights, architecture=VGG11_BN)
    initial = build_unet(encoder, seed=config.recipe.seed).state_dict()
    weights_hash = weights_sha256(initial)
    identity = {
        "version": SET_VERSION,
        "store": store.content_hash,
        "annotations": annotations_sha256(config.paths.annotations),
        "input_px": config.recipe.input_px,
        "weights": weights_hash,
        "folds": annotated[["series_id", "slice_index", "fold"]].values.tolist(),
    }
    set_hash = content_id(identity)
    folder = RunPaths(config.paths.runs, config.name).training_set(set_hash)
    if not folder.is_dir():
        _commit_set(folder, store, slices, annotated, initial, config)
    return Plan(
        store=store,
        middle=middle,
        annotated=annotated,
        fold_of_patient=fold_of_patient,
        folder=folder,
        set_hash=set_hash,
        weights_hash=weights_hash,
        midsagittal_sha256=hashlib.sha256((midsagittal / "midsagittal.parquet").read_bytes()).hexdigest(),
        annotations_sha256=str(identity["annotations"]),
        nested_in=split.split_hash if split is not None and config.folds.nested else None,
        num_folds=_num_folds(config, split),
        faults=faults,
        statements=(*config.statements, *([lost] if faults else [])),
    )


def _middle(store: SliceStore, midsagittal: Path) -> pd.DataFrame:
    chosen = load_midsagittal(midsagittal)[["series_id", "slice_index"]]
    rows = store.manifest[["study_id", "patient_id", "series_id"]].merge(chosen, on="series_id", validate="one_to_one")
    if rows.empty:
        msg = f"{midsagittal} names no series of this store; run `python -m preprocess midsagittal` on it"
        raise SegmentError(msg)
    return rows.sort_values("study_id", ignore_index=True)


def _sound_slices(path: Path, store: SliceStore) -> tuple[list[AnnotatedSlice], dict[str, str]]:
    """Annotated slices that can be used, in a fixed order, and why the others cannot, by image."""
    found = read_annotations(path)
    known = set(store.manifest["series_id"])
    strangers = {item.name: "not_in_store" for item in found if item.series_id not in known}
    faults = strangers | faults_by_image(found)
    sound = [item for item in found if not item.fault and item.series_id in known]
    if not sound:
        msg = f"{path}: none of {len(found)} annotated image(s) is sound and of this store; link the annotations again"
        raise SegmentError(f"{msg}{_listed(faults)}")
    if faults:
        sys.stderr.write(f"{path}: {len(faults)} annotated image(s) are not used{_listed(faults)}\n")
    return sorted(sound, key=lambda item: (item.study_id, item.series_id, item.slice_index)), faults


def _listed(faults: dict[str, str]) -> str:
    """Faulty images, a line each, as far as anyone would read."""
    lines = [f"  {name}: {fault}" for name, fault in faults.items()]
    more = [f"  and {len(lines) - MAX_LISTED} more"] if len(lines) > MAX_LISTED else []
    return "".join(f"\n{line}" for line in lines[:MAX_LISTED] + more)


def _annotated(slices: list[AnnotatedSlice], store: SliceStore) -> pd.DataFrame:
    owners = store.manifest.set_index("series_id")
    wrong = [item for item in slices if item.study_id != owners.loc[item.series_id, "study_id"]]
    if wrong:
        msg = (
            f"image {wrong[0].study_id}/{wrong[0].series_id}/{wrong[0].slice_index} ({len(wrong)} such image(s)) names "
            "another study than its series has in the store; link the annotations again"
        )
        raise SegmentError(msg)
    patients = owners["patient_id"]
    rows = [(item.study_id, patients[item.series_id], item.series_id, item.slice_index) for item in slices]
    frame = pd.DataFrame(rows, columns=["study_id", "patient_id", "series_id", "slice_index"])
    repeated = frame[frame.duplicated(["series_id", "slice_index"])]
    if len(repeated):
        msg = f"series {repeated['series_id'].iloc[0]}, slice {repeated['slice_index'].iloc[0]} is annotated twice"
        raise SegmentError(f"{msg} ({len(repeated)} such image(s)); keep one of each")
    return frame


def sealed_split(paths: RunPaths) -> Split:
    """Return the only split that a study has committed.

    Raises
    ------
    SegmentError
        If there is none, or a choice of several.
    """
    found = sorted(paths.splits.glob("[!.]*/split.json"))
    if len(found) == 1:
        return Split.open(found[0].parent)
    if found:
        names = f" ({', '.join(path.parent.name for path in found)})"
        remedy = (
            "delete splits that nothing was trained with; a split with trials or results must stay: where two have "
            "some, seal the study again under another name and give that name as folds.study=…"
        )
    else:
        sealed = sorted({path.parents[2].name for path in paths.root.glob("*/splits/[!.]*/split.json")})
        names = f" (studies with splits under {paths.root}: {', '.join(sealed) or 'none'})"
        remedy = (
            "run `python -m lbp_ray.seal` with the study's configuration first, or name a study that has one as "
            "folds.study=…"
        )
    msg = (
        f"folds.study={paths.study}: {len(found)} sealed splits under {paths.splits}{names}, exactly one is required: "
        f"{remedy}"
    )
    raise SegmentError(msg)


def assign_folds(config: SegmentConfig, annotated: pd.DataFrame, split: Split | None) -> dict[str, int]:
    """Give every patient that some network sees the fold whose network does not see them.

    Parameters
    ----------
    config
        Whether folds are the study's or of their own.
    annotated
        ``patient_id`` of every annotated slice.
    split
        The study's split, whose sealed patients get no fold.

    Returns
    -------
    dict
        Patient → fold. Nested: every patient of the study outside its hold-out, annotated or not. Otherwise annotated
        patients outside hold-out and test.
    """
    fold_of_patient: dict[str, int] = {}
    sealed: set[str] = set()
    if split is not None:
        sealed = set(split.table.loc[split.table["fold"] == HOLDOUT, "patient_id"])
        if config.folds.nested:
            inside = split.table[split.table["fold"] != HOLDOUT]
            return dict(zip(inside["patient_id"], inside["fold"].astype(int), strict=True))
    patients = np.array(sorted(set(annotated["patient_id"]) - sealed))
    order = np.random.Generator(np.random.Philox(key=[config.folds.seed, len(patients)])).permutation(patients)
    kept = order[round(len(order) * config.folds.test_fraction) :]
    for fold, members in enumerate(np.array_split(kept, config.folds.folds)):
        fold_of_patient.update(dict.fromkeys(members.tolist(), fold))
    return fold_of_patient


def _num_folds(config: SegmentConfig, split: Split | None) -> int:
    return int(split.table["fold"].max()) + 1 if split is not None and config.folds.nested else config.folds.folds


def _require_enough(annotated: pd.DataFrame, num_folds: int) -> None:
    folds = annotated.groupby("patient_id")["fold"].nunique()
    assert (folds == 1).all(), "a patient's slices never straddle folds"
    present = sorted(set(annotated["fold"]) - {APART})
    if present != list(range(num_folds)):
        patients = annotated.loc[annotated["fold"] >= 0, "patient_id"].nunique()
        msg = (
            f"{num_folds} folds need an annotated patient each, found {patients} such patient(s) outside hold-out and "
            f"test, in folds {present}; annotate more, or lower folds.folds"
        )
        raise SegmentError(msg)


def _commit_set(
    folder: Path,
    store: SliceStore,
    slices: list[AnnotatedSlice],
    annotated: pd.DataFrame,
    initial: dict[str, torch.Tensor],
    config: SegmentConfig,
) -> None:
    size = config.recipe.input_px
    shape = (len(slices), size, size)
    dtype = np.result_type(*store.manifest["dtype"].unique()) if "dtype" in store.manifest else np.dtype(np.int32)
    with committed_directory(folder, point="training_set") as partial:
        images = np.lib.format.open_memmap(partial / "images.npy", mode="w+", dtype=dtype, shape=shape)
        masks = np.lib.format.open_memmap(partial / "masks.npy", mode="w+", dtype=np.uint8, shape=shape)
        used = np.empty((len(slices), 2), np.int64)
        bar = tqdm(slices, desc="annotated slices", unit="slice", disable=not config.compute.verbose)
        for row, item in enumerate(bar):
            pixels = store.read_slice(item.series_id, item.slice_index)
            if pixels.shape != (item.rows, item.columns):
                msg = (
                    f"series {item.series_id}, slice {item.slice_index}: annotated as {item.rows} x {item.columns}, "
                    f"stored as {pixels.shape[0]} x {pixels.shape[1]} (rows x columns); link the annotations again"
                )
                raise SegmentError(msg)
            grid = Grid(*pixels.shape, size)
            images[row] = grid.resample(pixels).round().numpy().astype(dtype)
            masks[row] = (grid.resample(item.mask()) >= 0.5).numpy()
            used[row] = grid.used
        images.flush()
        masks.flush()
        np.save(partial / "used.npy", used)
        annotated.to_parquet(partial / "slices.parquet", index=False)
        buffer = io.BytesIO()
        torch.save(initial, buffer)
        (partial / "initial.pt").write_bytes(buffer.getvalue())
        (partial / "set.json").write_text(canonical_json({"version": SET_VERSION, "slices": len(slices)}))


def fold_specs(config: SegmentConfig, plan: Plan) -> list[FoldSpec]:
    """List every network of a plan, the final one last. Pure."""
    return [
        FoldSpec(fold=fold, recipe=config.recipe, set_hash=plan.set_hash, workers=config.compute.workers)
        for fold in (*range(plan.num_folds), FINAL)
    ]


def read_history(specs: list[FoldSpec], paths: RunPaths) -> pd.DataFrame:
    """Learning curves of all networks: ``fold`` and the fields of `lbp_ray.segment.loop.EpochRecord`."""
    parts = []
    for spec in specs:
        rows = json.loads((place_of(spec, paths).final / "history.json").read_text())
        parts.append(pd.DataFrame(rows).assign(fold=spec.fold))
    return pd.concat(parts, ignore_index=True)
