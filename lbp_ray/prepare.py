"""Store, labels and annotations → everything that all trials of a study share, validated before any training."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from lbp_ray.cohort import CohortError, label_exams
from lbp_ray.nets.weights import load_backbone_weights, weights_sha256
from lbp_ray.result import FunnelStep
from lbp_ray.roi import CropRequest, Crops, build_crops
from lbp_ray.runs import RunError, RunPaths
from lbp_ray.splits import HOLDOUT, SplitError, check_split, holdout_commitment, make_split, split_hash
from preprocess.commit import canonical_json, committed_directory, content_id
from preprocess.midsagittal.choose import CONTRAST
from preprocess.midsagittal.match import load_templates
from preprocess.store.read import SliceStore

if TYPE_CHECKING:
    from pathlib import Path

    from lbp_ray.study import StudyConfig


@dataclass(frozen=True)
class Split:
    """A committed split: folds of every analysed exam, and labels outside the hold-out only."""

    table: pd.DataFrame
    """``study_id``, ``patient_id``, ``fold``, ``label`` (missing in the hold-out)."""
    split_hash: str
    holdout_commitment: str
    folder: Path

    @classmethod
    def open(cls, folder: Path) -> Split:
        """Read a committed split; refuse one that leaks or was edited.

        Raises
        ------
        lbp_ray.splits.SplitError
            If a patient stands in two folds.
        RunError
            If the table does not match its hash.
        """
        table = pd.read_parquet(folder / "split.parquet")
        meta = json.loads((folder / "split.json").read_text())
        check_split(table)
        if split_hash(table, _training_labels(table)) != meta["split_hash"]:
            msg = f"{folder / 'split.parquet'} was changed after it was made; delete {folder} and run the study again"
            raise RunError(msg)
        return cls(table, meta["split_hash"], meta["holdout_commitment"], folder)


@dataclass(frozen=True)
class Prepared:
    """A study ready to train."""

    paths: RunPaths
    midsagittal: Path
    crops: Crops
    split: Split
    weights_hash: str
    store_hash: str
    funnel: tuple[FunnelStep, ...]
    groups: dict[str, int]
    acquisition: dict[str, str]
    statements: tuple[str, ...] = ()
    """What the report must say of this preparation, beside the configuration's own statements."""


def prepare(config: StudyConfig) -> Prepared:
    """Open the store, cut the crops, label the exams, split the patients and check the weights.

    Every step is content-addressed: what exists already is opened, not made again.

    Raises
    ------
    ValueError
        Of the room at fault: an incomplete store, a questionnaire row without an exam, absent weights, a leaky split.
    """
    paths = RunPaths(config.paths.runs, config.name)
    weights = load_backbone_weights(config.recipe.weights, seed=config.recipe.weights_seed)
    store = SliceStore.open(config.paths.store, contrast=CONTRAST)
    midsagittal = config.paths.midsagittal or find_midsagittal_artefact(config.paths.store, store.content_hash)
    crops = _crops(config, paths, store, midsagittal)
    exams = _exams(config.paths.questionnaire, store)
    task = exams[exams["label"].notna()]
    analysed = task[task["study_id"].isin(crops.table["study_id"])]
    template_patients = frozenset(load_templates(midsagittal / "templates.npz").patient_ids)
    split = _split(config, paths, analysed, template_patients)
    statements = _check_templates(config, split, template_patients)
    inside = int((split.table["fold"] != HOLDOUT).sum())
    reasons = crops.excluded[crops.excluded["study_id"].isin(task["study_id"])]["reason"].value_counts()
    funnel = (
        FunnelStep(name="exams with a sagittal T2 stack", count=len(store.manifest), reason=""),
        FunnelStep(name="with questionnaire", count=len(exams), reason="no questionnaire row"),
        FunnelStep(name="symptomatic or asymptomatic", count=len(task), reason="other questionnaire groups"),
        FunnelStep(name="with crops", count=len(analysed), reason=", ".join(f"{k}: {v}" for k, v in reasons.items())),
        FunnelStep(name="cross-validated", count=inside, reason=f"{len(analysed) - inside} in the sealed hold-out"),
    )
    return Prepared(
        paths=paths,
        midsagittal=midsagittal,
        crops=crops,
        split=split,
        weights_hash=weights_sha256(weights),
        store_hash=store.content_hash,
        funnel=funnel,
        groups={str(name): int(count) for name, count in exams["group"].value_counts().items()},
        acquisition=_acquisition(store.manifest),
        statements=statements,
    )


def _crops(config: StudyConfig, paths: RunPaths, store: SliceStore, midsagittal: Path) -> Crops:
    request = CropRequest(config.roi.height_px, config.roi.width_px, config.offsets_mm, config.roi.tolerance_mm)
    folder = paths.crops(request.address(store, midsagittal, config.paths.annotations))
    return build_crops(
        store, midsagittal, config.paths.annotations, request, folder=folder, progress=config.compute.verbose
    )


def find_midsagittal_artefact(store: Path, store_hash: str) -> Path:
    """Return the only mid-sagittal artefact beside a store that was made from it as it stands.

    Raises
    ------
    RunError
        If there is none or a choice of several.
    """
    parent = store.with_suffix(".midsagittal")
    metas = {path.parent: json.loads(path.read_text()) for path in sorted(parent.glob("[!.]*/meta.json"))}
    found = [folder for folder, meta in metas.items() if meta["store"] == store_hash]
    if len(found) == 1:
        return found[0]
    msg = (
        f"{len(found)} mid-sagittal artefacts of this store under {parent}{_listed(found, metas)}, exactly one is "
        "required; run `python -m preprocess` with --templates, or name one as paths.midsagittal"
    )
    raise RunError(msg)


def _listed(found: list[Path], metas: dict[Path, dict[str, Any]]) -> str:
    """Tell several artefacts apart by what differs."""
    notes = [f"{folder.name} with {metas[folder].get('corrections', 0)} correction(s)" for folder in found]
    return f" ({', '.join(notes)})" if notes else ""


def _exams(questionnaire: Path, store: SliceStore) -> pd.DataFrame:
    if not questionnaire.is_file():
        msg = f"questionnaire not found: {questionnaire}; `python -m preprocess link` writes it"
        raise CohortError(msg)
    rows = pd.read_csv(questionnaire)
    absent = [name for name in ("study_id", "patient_id") if name not in rows]
    if absent:
        msg = f"{questionnaire} lacks {', '.join(absent)}: it is not linked; run `python -m preprocess link` on it"
        raise CohortError(msg)
    unknown = rows[~rows["study_id"].isin(store.manifest["study_id"])]
    if len(unknown):
        msg = (
            f"{questionnaire}: {len(unknown)} row(s) match no exam of the store, e.g. line {unknown.index[0] + 2} "
            f"(study {unknown['study_id'].iloc[0]}); link again with this store's key, or remove them"
        )
        raise CohortError(msg)
    return label_exams(rows)


def _split(config: StudyConfig, paths: RunPaths, analysed: pd.DataFrame, templates: frozenset[str]) -> Split:
    """Open the split of these exams, or draw it; other templates do not draw another, which would unseal patients."""
    exams = analysed[["study_id", "patient_id", "label"]].astype({"label": int})
    address = content_id(
        {
            "questionnaire": hashlib.sha256(config.paths.questionnaire.read_bytes()).hexdigest(),
            "studies": exams["study_id"].tolist(),
            "split": config.split.model_dump(mode="json"),
        }
    )
    folder = paths.split(address)
    if not folder.is_dir():
        wanted = config.split
        split = make_split(
            exams,
            folds=wanted.folds,
            holdout_fraction=wanted.holdout_fraction,
            seed=wanted.seed,
            never_holdout=frozenset() if config.midsagittal.allow_holdout_templates else templates,
        )
        table = split.merge(exams[["study_id", "label"]], on="study_id")
        table["label"] = table["label"].astype("Int64").mask(table["fold"] == HOLDOUT)
        meta = {
            "split_hash": split_hash(table, _training_labels(table)),
            "holdout_commitment": holdout_commitment(table),
        }
        with committed_directory(folder, point="split") as partial:
            table.to_parquet(partial / "split.parquet", index=False)
            (partial / "split.json").write_text(canonical_json(meta))
    return Split.open(folder)


def _check_templates(config: StudyConfig, split: Split, templates: frozenset[str]) -> tuple[str, ...]:
    """Refuse sealed patients whose slices are templates; where they are allowed, return what the report must say.

    Raises
    ------
    SplitError
        Naming the first such patient.
    """
    sealed = split.table.loc[split.table["fold"] == HOLDOUT, "patient_id"]
    shown = sorted(templates & set(sealed))
    if not shown:
        return ()
    if config.midsagittal.allow_holdout_templates:
        return (
            f"{len(shown)} patient(s) of the sealed hold-out gave template slices for the mid-sagittal choice: "
            "the hold-out is not untouched.",
        )
    msg = (
        f"patient {shown[0]} ({len(shown)} such patient(s)) is sealed in {split.folder}, but a slice of theirs is a "
        "mid-sagittal template: the hold-out would not be untouched; choose templates of other patients, or set "
        "midsagittal.allow_holdout_templates=true and have the report say so"
    )
    raise SplitError(msg)


def _training_labels(table: pd.DataFrame) -> dict[str, int]:
    inside = table[table["fold"] != HOLDOUT]
    return dict(zip(inside["study_id"], inside["label"].astype(int).tolist(), strict=True))


def _acquisition(manifest: pd.DataFrame) -> dict[str, str]:
    """Describe the acquisition by ranges over the cohort."""
    wanted = {
        "rows": "image rows",
        "columns": "image columns",
        "num_slices": "slices per stack",
        "spacing_row_mm": "row spacing (mm)",
        "spacing_column_mm": "column spacing (mm)",
        "spacing_slice_mm": "slice pitch (mm)",
        "echo_time_ms": "echo time (ms)",
        "repetition_time_ms": "repetition time (ms)",
    }
    facts = {}
    for column, title in wanted.items():
        if column in manifest and manifest[column].notna().any():
            low, high = manifest[column].min(), manifest[column].max()
            facts[title] = f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
    return facts
