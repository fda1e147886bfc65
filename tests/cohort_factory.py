"""A linked cohort of tiny exams, labels alternating, and a study of it: what tests of splits and crops start from."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
from store_factory import make_record, make_store, pseudonym

from lbp_ray.prepare import prepare
from lbp_ray.roi.annotations import LEVELS
from lbp_ray.splits import HOLDOUT
from lbp_ray.study import StudyConfig
from preprocess.mapper import map_here
from preprocess.midsagittal.choose import choose_for_store

NUM_EXAMS = 16
SHAPE = (5, 16, 12)
"""Slices, rows, columns of every exam; one pixel is 1 mm."""

TEMPLATES = (0, 1)
"""Exams whose slices are templates unless a test says otherwise."""


def make_cohort(root, annotated=tuple(range(NUM_EXAMS)), records=None):
    """Write store, linked questionnaire and linked annotations; `records` gives exams other manifest fields."""
    generator = np.random.default_rng(0)
    series, answers, images = [], [], []
    for number in range(NUM_EXAMS):
        pixels = generator.integers(1, 999, SHAPE).astype(np.uint16)
        series.append((make_record(number, pixels, **(records or {}).get(number, {})), pixels))
        pain = number % 2
        ids = {"study_id": pseudonym("s", number), "patient_id": pseudonym("p", number)}
        grades = {"frequency": 4 * pain, "intensity": 8 * pain, "previous_episodes": pain, "pain_now": pain}
        answers.append({**ids, "low_back_pain": 1 + pain, **grades})
        if number in annotated:
            boxes = "".join(f'<box label="{level}" xtl="3" ytl="4" xbr="9" ybr="12"/>' for level in LEVELS)
            name = f"{ids['study_id']}/{pseudonym('t', number)}/2.png"
            images.append(f'<image name="{name}" width="12" height="16">{boxes}</image>')
    root.mkdir(parents=True, exist_ok=True)
    make_store(root / "x.zarr", series)
    pd.DataFrame(answers).to_csv(root / "questionnaire.csv", index=False)
    (root / "annotations.xml").write_text(f"<annotations>{''.join(images)}</annotations>")
    return root


def choose_middle(data, runs, owners=TEMPLATES):
    """Choose mid-sagittal slices by templates of some exams; returns the artefact."""
    return choose_for_store(
        data / "x.zarr", data / "middle", [(pseudonym("t", number), 2) for number in owners], map_here
    )


def study_config(data, runs, owners=TEMPLATES, paths=None, **changes):
    """Configure a small study of the cohort; `changes` replaces whole sections."""
    files = {"store": "x.zarr", "questionnaire": "questionnaire.csv", "annotations": "annotations.xml"}
    places = {**{name: data / file for name, file in files.items()}, "midsagittal": choose_middle(data, runs, owners)}
    settings = {
        "name": "small",
        "paths": {**places, "runs": runs, **(paths or {})},
        "roi": {"width_px": 6, "height_px": 8},
        "split": {"folds": 2, "holdout_fraction": 0.25},
        "slice_counts": (1,),
        "recipe": {"weights": "random"},
        "compute": {"verbose": False},
    }
    return StudyConfig.model_validate(settings | changes)


def prepared(data, runs, owners=TEMPLATES, **changes):
    """Prepare a small study of the cohort."""
    return prepare(study_config(data, runs, owners, **changes))


def number_of(study_id):
    """Return the exam's number."""
    return [pseudonym("s", number) for number in range(NUM_EXAMS)].index(study_id)


def sealed_exams(split):
    """Numbers of the exams in the hold-out."""
    return [number_of(study_id) for study_id in split.table.loc[split.table["fold"] == HOLDOUT, "study_id"]]


def commit_trial(spec, folder, study):
    """Leave what a trial leaves: scores of its fold and of the hold-out, drawn at random."""
    folder.mkdir(parents=True)
    chance = np.random.default_rng(spec.cell.fold)
    for name, fold in (("out_of_fold", spec.cell.fold), ("holdout", HOLDOUT)):
        table = study.analysed.table
        rows = table[table["fold"] == fold][["study_id"]].assign(slice_index=2, slice_offset_mm=0.0)
        rows.assign(probability=chance.random(len(rows))).to_parquet(folder / f"{name}.parquet")
    losses = dict.fromkeys(("train_loss", "validation_loss", "validation_auc"), 0.5)
    pd.DataFrame([{"epoch": 1, "stage": "frozen", **losses}]).to_parquet(folder / "history.parquet")
    (folder / "trial.json").write_text(
        json.dumps({"trial_id": spec.trial_id, "epochs": [1], "environment": {"torch": "2"}})
    )
