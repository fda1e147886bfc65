"""Store, labels and annotations → everything that all trials of a study share, validated before any training."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from lbp_ray.cohort import CohortError, label_exams, summarise_cohort
from lbp_ray.cohort.questionnaire import RANGES
from lbp_ray.duplicates import check_duplicates
from lbp_ray.nets.weights import load_backbone_weights, weights_sha256
from lbp_ray.result import FunnelStep
from lbp_ray.roi.centres import annotated_centres, predicted_centres
from lbp_ray.roi.crops import CropRequest, Crops, build_crops
from lbp_ray.roi.provenance import check_regions, find_regions, manual_statements, open_regions
from lbp_ray.runs import RunError, RunPaths
from lbp_ray.splits import (
    HOLDOUT,
    Split,
    SplitError,
    find_split,
    holdout_commitment,
    make_split,
    read_ledger,
    require_no_holdout,
    sealed_among,
    split_hash,
    training_labels,
)
from preprocess.commit import canonical_json, committed_directory, content_id
from preprocess.midsagittal.choose import CONTRAST, load_midsagittal
from preprocess.midsagittal.match import load_templates
from preprocess.store.read import SliceStore

if TYPE_CHECKING:
    from pathlib import Path

    from lbp_ray.result import CohortSummary, Duplicates
    from lbp_ray.roi.regions import Regions
    from lbp_ray.study import RoiConfig, StudyConfig


@dataclass(frozen=True)
class Sealed:
    """A study whose patients are split, before anything is cropped: nothing later decides who is sealed."""

    paths: RunPaths
    store: SliceStore
    midsagittal: Path
    exams: pd.DataFrame
    """Every exam with a questionnaire: ``study_id``, ``patient_id``, ``group``, ``label``."""
    split: Split
    """Of the exams of the binary task that have a mid-sagittal slice."""
    statements: tuple[str, ...]


@dataclass(frozen=True)
class Prepared:
    """A study ready to train."""

    paths: RunPaths
    midsagittal: Path
    crops: Crops
    split: Split
    """As it was sealed."""
    analysed: Split
    """Those of its exams that have crops."""
    weights_hash: str
    store_hash: str
    funnel: tuple[FunnelStep, ...]
    groups: dict[str, int]
    acquisition: dict[str, str]
    duplicates: Duplicates
    """Among the analysed exams and the hold-out's."""
    cohort: CohortSummary
    """Of all who were asked and graded, sealed ones among them."""
    questionnaire_hash: str
    """`answers_hash` of it: an opening wants the very answers that the study was made with."""
    regions: Regions | None = None
    """The predicted masks that the study is cropped by; None where it is cropped by annotations."""
    statements: tuple[str, ...] = ()
    """What the report must say of this preparation, beside the configuration's own statements."""


def seal(config: StudyConfig) -> Sealed:
    """Open the store, label the exams and split the patients: all that may be decided before anything is trained.

    The split is drawn from all labelled exams with a mid-sagittal slice, whatever becomes of their crops, so that
    whatever helps to crop can be kept from the sealed patients. One that exists is opened, not drawn again. A cohort
    that grew draws another, and the report says so where exams of it were opened before.

    Raises
    ------
    ValueError
        Of the room at fault: an incomplete store, a questionnaire row without an exam, too few patients, a leaky split,
        a changed ledger.
    """
    paths = RunPaths(config.paths.runs, config.name)
    store = SliceStore.open(config.paths.store, contrast=CONTRAST)
    midsagittal = config.paths.midsagittal or find_midsagittal_artefact(config.paths.store, store.content_hash)
    exams = _exams(config.paths.questionnaire, store, strict_gt30=config.cohort.strict_gt30)
    chosen = store.manifest[store.manifest["series_id"].isin(load_midsagittal(midsagittal)["series_id"])]
    task = exams[exams["label"].notna() & exams["study_id"].isin(chosen["study_id"])]
    owners = load_templates(midsagittal / "templates.npz").patient_ids
    shown = frozenset(store.manifest.loc[store.manifest["patient_id"].isin(owners), "study_id"])
    split = _split(config, paths, task, shown)
    statements = _check_templates(config, split, shown) + _opened_statements(paths, split)
    return Sealed(paths, store, midsagittal, exams, split, statements)


def prepare(config: StudyConfig) -> Prepared:
    """Seal the split, count the cohort, check the weights and cut the crops.

    Every step is content-addressed: what exists already is opened, not made again. An exam that cannot be cropped
    leaves its fold, or the hold-out, with a reason; folds are never drawn anew for it.

    Raises
    ------
    ValueError
        Of the room at fault, as `seal` does; also absent gradings or weights, regions that may not be used, no crop at
        all, the same image under two patients in different folds.
    """
    sealed = seal(config)
    cohort = _summarise_cohort(config, sealed)  # gradings that are not there are told before hours of work
    weights = load_backbone_weights(config.recipe.weights, seed=config.recipe.weights_seed)
    statements = sealed.statements
    regions: Regions | None = None
    if config.roi.source == "model":
        regions = _open_regions(config, sealed)
        statements += check_regions(regions, sealed.split, config.roi)
    crops = _crops(config, sealed, regions)
    statements += (*_resampling_statements(config.roi, crops.table), *manual_statements(crops.table))
    analysed = sealed.split.of_studies(crops.table["study_id"])
    _require_both_classes(analysed.table, sealed.split.table, crops.excluded)
    duplicates, alike = _check_duplicates(config, crops, analysed)
    return Prepared(
        paths=sealed.paths,
        midsagittal=sealed.midsagittal,
        crops=crops,
        split=sealed.split,
        analysed=analysed,
        weights_hash=weights_sha256(weights),
        store_hash=sealed.store.content_hash,
        funnel=_funnel(sealed, crops, analysed),
        groups={str(name): int(count) for name, count in sealed.exams["group"].value_counts().items()},
        acquisition=_acquisition(sealed.store.manifest),
        duplicates=duplicates,
        cohort=cohort,
        questionnaire_hash=answers_hash(read_questionnaire(config.paths.questionnaire)),
        regions=regions,
        statements=statements + alike,
    )


def _open_regions(config: StudyConfig, sealed: Sealed) -> Regions:
    midsagittal = hashlib.sha256((sealed.midsagittal / "midsagittal.parquet").read_bytes()).hexdigest()
    made_from = {"store": sealed.store.content_hash, "midsagittal": midsagittal}
    return open_regions(config.paths.regions or find_regions(sealed.paths.all_regions, **made_from), **made_from)


def _crops(config: StudyConfig, sealed: Sealed, regions: Regions | None) -> Crops:
    roi, given = config.roi, config.paths
    if regions is None:
        centres = annotated_centres(sealed.store, given.annotations, roi.centre, given.roi_overrides)
    else:
        centres = predicted_centres(
            sealed.store, regions, overrides=given.roi_overrides, corrections=given.roi_corrections
        )
    request = CropRequest(roi.height_px, roi.width_px, config.offsets_mm, roi.tolerance_mm, roi.size_mm)
    folder = sealed.paths.crops(request.address(sealed.store, sealed.midsagittal, centres))
    return build_crops(
        sealed.store, sealed.midsagittal, centres, request, folder=folder, progress=config.compute.verbose
    )


def _summarise_cohort(config: StudyConfig, sealed: Sealed) -> CohortSummary:
    """Count the cohort; the acquisition is that of the task's exams."""
    manifest, gradings = sealed.store.manifest, config.paths.gradings
    return summarise_cohort(
        read_questionnaire(config.paths.questionnaire),
        None if gradings is None else read_gradings(gradings),
        manifest[manifest["study_id"].isin(sealed.split.table["study_id"])],
        config.cohort,
    )


def _check_duplicates(config: StudyConfig, crops: Crops, analysed: Split) -> tuple[Duplicates, tuple[str, ...]]:
    rows = crops.table[["study_id"]].reset_index(names="row")
    exams = analysed.table.drop(columns="label").merge(rows, on="study_id").set_index("row")
    return check_duplicates(
        crops.pixels_NKHW,
        exams,
        crops_hash=crops.crops_hash,
        root=analysed.folder / "duplicates",
        refuse=config.split.near_duplicates == "refuse",
    )


def _resampling_statements(roi: RoiConfig, table: pd.DataFrame) -> tuple[str, ...]:
    count = int(table["resampled"].sum())
    if not count or roi.size_mm is None:
        return ()
    return (
        f"{count} of {len(table)} crops were resampled linearly from a box of {roi.size_mm[0]:g} x {roi.size_mm[1]:g} "
        f"mm onto {roi.height_px} x {roi.width_px} pixels (rows x columns).",
    )


def _require_both_classes(analysed: pd.DataFrame, drawn: pd.DataFrame, excluded: pd.DataFrame) -> None:
    """Refuse a fold that lost a whole class to exams without a crop: nothing could be scored on it.

    Raises
    ------
    SplitError
        Naming the first such fold and the reasons.
    """
    classes = analysed.groupby("fold")["label"].nunique()
    folds = sorted(set(drawn["fold"]) - {HOLDOUT})
    poor = [fold for fold in folds if classes.get(fold, 0) < 2]
    if poor:
        lost = drawn[(drawn["fold"] == poor[0]) & ~drawn["study_id"].isin(analysed["study_id"])]
        msg = (
            f"fold {poor[0]} has exams of {int(classes.get(poor[0], 0))} class(es) left, two are required: "
            f"{len(lost)} of its exams have no crop ({_reasons(excluded, lost['study_id'])}); review them (review.csv "
            "of the crops, paths.roi_overrides), annotate more, or lower split.folds"
        )
        raise SplitError(msg)


def _funnel(sealed: Sealed, crops: Crops, analysed: Split) -> tuple[FunnelStep, ...]:
    exams, drawn = sealed.exams, sealed.split.table
    task = exams[exams["label"].notna()]
    held = drawn[drawn["fold"] == HOLDOUT]
    inside = drawn[drawn["fold"] != HOLDOUT]
    without = _reasons(crops.excluded, held["study_id"])
    holdout = f"{len(held)} in the sealed hold-out" + (f" (without crops there: {without})" if without else "")
    return (
        FunnelStep(name="exams with a sagittal T2 stack", count=len(sealed.store.manifest), reason=""),
        FunnelStep(name="with questionnaire", count=len(exams), reason="no questionnaire row"),
        FunnelStep(name="symptomatic or asymptomatic", count=len(task), reason="other questionnaire groups"),
        FunnelStep(name="with a mid-sagittal slice", count=len(drawn), reason="no mid-sagittal slice"),
        FunnelStep(name="outside the hold-out", count=len(inside), reason=holdout),
        FunnelStep(
            name="with crops, cross-validated",
            count=int((analysed.table["fold"] != HOLDOUT).sum()),
            reason=_reasons(crops.excluded, inside["study_id"]),
        ),
    )


def _reasons(excluded: pd.DataFrame, studies: pd.Series[str]) -> str:
    """Count why some of these studies have no crop."""
    counts = excluded[excluded["study_id"].isin(studies)]["reason"].value_counts()
    return ", ".join(f"{reason}: {count}" for reason, count in counts.items())


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


def read_questionnaire(questionnaire: Path) -> pd.DataFrame:
    """Read a linked questionnaire.

    Raises
    ------
    CohortError
        If it is absent or not linked.
    """
    return _read_linked(questionnaire, "questionnaire")


def answers_hash(questionnaire: pd.DataFrame) -> str:
    """Return the address of a questionnaire's ids and answers, whatever its order of rows and its other columns."""
    columns = sorted({"study_id", "patient_id", *RANGES} & set(questionnaire.columns))
    return content_id(questionnaire[columns].sort_values("study_id").to_csv(index=False))


def read_gradings(gradings: Path) -> pd.DataFrame:
    """Read linked gradings.

    Raises
    ------
    CohortError
        If they are absent or not linked.
    """
    return _read_linked(gradings, "gradings", otherwise=", and paths.gradings=null goes without where there are none")


def _read_linked(path: Path, content: str, *, otherwise: str = "") -> pd.DataFrame:
    if not path.is_file():
        msg = f"{content} not found: {path}; `python -m preprocess link` writes it{otherwise}"
        raise CohortError(msg)
    rows = pd.read_csv(path)
    absent = [name for name in ("study_id", "patient_id") if name not in rows]
    if absent:
        msg = f"{path} lacks {', '.join(absent)}: it is not linked; run `python -m preprocess link` on it"
        raise CohortError(msg)
    return rows


def _exams(questionnaire: Path, store: SliceStore, *, strict_gt30: bool) -> pd.DataFrame:
    rows = read_questionnaire(questionnaire)
    unknown = rows[~rows["study_id"].isin(store.manifest["study_id"])]
    if len(unknown):
        msg = (
            f"{questionnaire}: {len(unknown)} row(s) match no exam of the store, e.g. line {unknown.index[0] + 2} "
            f"(study {unknown['study_id'].iloc[0]}); link again with this store's key, or remove them"
        )
        raise CohortError(msg)
    return label_exams(rows, strict_gt30=strict_gt30)


def _split(config: StudyConfig, paths: RunPaths, task: pd.DataFrame, shown: frozenset[str]) -> Split:
    """Open the split of these exams, or draw it; other templates do not draw another, which would unseal patients."""
    wanted = config.split
    exams = task[["study_id", "patient_id", "label"]].astype({"label": int})
    address = content_id(
        {
            "questionnaire": hashlib.sha256(config.paths.questionnaire.read_bytes()).hexdigest(),
            "studies": exams["study_id"].tolist(),
            "split": wanted.model_dump(mode="json", include={"seed", "folds", "holdout_fraction"}),
        }
    )
    folder = paths.split(address)
    if folder.is_dir():
        return _of_these_labels(Split.open(folder), exams)
    never = frozenset(exams.loc[exams["study_id"].isin(shown), "patient_id"])
    split = make_split(
        exams,
        folds=wanted.folds,
        holdout_fraction=wanted.holdout_fraction,
        seed=wanted.seed,
        never_holdout=frozenset() if config.midsagittal.allow_holdout_templates else never,
    )
    table = split.merge(exams[["study_id", "label"]], on="study_id")
    table["label"] = table["label"].astype("Int64").mask(table["fold"] == HOLDOUT)
    meta = {"split_hash": split_hash(table, training_labels(table)), "holdout_commitment": holdout_commitment(table)}
    same = find_split(paths.splits, meta["split_hash"])
    if same is not None:
        return same
    with committed_directory(folder, point="split") as partial:
        table.to_parquet(partial / "split.parquet", index=False)
        (partial / "split.json").write_text(canonical_json(meta))
    return Split.open(folder)


def _of_these_labels(split: Split, exams: pd.DataFrame) -> Split:
    """Refuse a committed split whose training labels are not those that the questionnaire's rules give now.

    Raises
    ------
    SplitError
        Naming the first such exam.
    """
    labels = training_labels(split.table)
    own = dict(zip(exams["study_id"], exams["label"].tolist(), strict=True))
    wrong = [study for study, label in labels.items() if own.get(study) != label]
    if wrong:
        msg = (
            f"{split.folder} was committed with other labels than the questionnaire's rules give now, e.g. of study "
            f"{wrong[0]} ({len(wrong)} such exam(s)); set the cohort section as it was, or give the study another name"
        )
        raise SplitError(msg)
    return split


def _opened_statements(paths: RunPaths, split: Split) -> tuple[str, ...]:
    """Return what the report must say where exams of this hold-out were opened for another study or split."""
    own = (paths.study, split.split_hash)
    others = [item for item in read_ledger(paths.ledger) if (item.study, item.split_hash) != own]
    sealed = split.table["study_id"][split.table["fold"] == HOLDOUT]
    count = len(set(sealed) & {study for item in others for study in item.studies})
    if not count:
        return ()
    return (
        f"{count} sealed exam(s) were opened before, for another study or in another split: the hold-out is not "
        "untouched.",
    )


def _check_templates(config: StudyConfig, split: Split, shown: frozenset[str]) -> tuple[str, ...]:
    """Refuse sealed exams of patients whose slices are templates; if they are allowed, return what the report must say.

    Raises
    ------
    SplitError
        Naming the first such patient.
    """
    if not config.midsagittal.allow_holdout_templates:
        require_no_holdout(split.table, shown, "templates")
    patients = sealed_among(split.table, shown)["patient_id"].nunique()
    if not patients:
        return ()
    return (
        f"{patients} patient(s) of the sealed hold-out gave template slices for the mid-sagittal choice: "
        "the hold-out is not untouched.",
    )


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
