"""A finished study by hand: split and tables as a run leaves them, of scores that a test gives, and a drawn result."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
from result_factory import make_result

from lbp_ray.out_of_fold import fold_thresholds, with_study_scores
from lbp_ray.prepare import answers_hash, read_questionnaire
from lbp_ray.result import table_hashes
from lbp_ray.splits import HOLDOUT, Split, holdout_commitment, split_hash, training_labels


def commit_split(folder, table):
    """Commit a split: `table` has ``study_id``, ``patient_id``, ``fold`` and ``label`` (read outside the hold-out)."""
    table = table.assign(label=table["label"].astype("Int64").mask(table["fold"] == HOLDOUT))
    folder.mkdir(parents=True)
    table.to_parquet(folder / "split.parquet", index=False)
    meta = {"split_hash": split_hash(table, training_labels(table)), "holdout_commitment": holdout_commitment(table)}
    (folder / "split.json").write_text(json.dumps(meta))
    return Split.open(folder)


def slices_of(studies, count):
    """One row per slice of each study."""
    return studies.merge(pd.DataFrame({"slice_index": np.arange(count)}), how="cross").assign(num_slices=count)


def out_of_fold_rows(config, split, score):
    """Out-of-fold table; `score` maps rows with fold, label, seed, slice_index and num_slices to probabilities."""
    inside = split.table[split.table["fold"] != HOLDOUT][["study_id", "fold", "label"]].astype({"label": int})
    tables = []
    for count in config.slice_counts:
        for seed in config.seeds:
            rows = slices_of(inside, count).assign(seed=seed)
            rows = with_study_scores(rows.assign(probability=score(rows)), config.recipe)
            levels = {"threshold": "study", "slice_threshold": "slice"}
            made = {name: rows["fold"].map(fold_thresholds(rows, config.evaluation, of)) for name, of in levels.items()}
            tables.append(rows.assign(**made))
    return pd.concat(tables, ignore_index=True)


def holdout_rows(config, studies, score):
    """Hold-out table of some sealed studies, by every fold model and seed."""
    tables = []
    for count in config.slice_counts:
        for seed in config.seeds:
            for fold in range(config.split.folds):
                rows = slices_of(pd.DataFrame({"study_id": studies}), count).assign(seed=seed, fold=fold)
                tables.append(rows.assign(probability=score(rows)))
    return pd.concat(tables, ignore_index=True)


def commit_result(folder, config, split, *, outside, holdout, crops_hash="c"):
    """Write the tables and a result that names them."""
    folder.mkdir(parents=True, exist_ok=True)
    outside.to_parquet(folder / "out_of_fold.parquet", index=False)
    holdout.to_parquet(folder / "holdout.parquet", index=False)
    result = make_result(
        config.slice_counts,
        name=config.name,
        config=config.model_dump(mode="json", exclude={"paths", "compute", "statements"}),
        hashes={
            "split": split.split_hash,
            "crops": crops_hash,
            "questionnaire": answers_hash(read_questionnaire(config.paths.questionnaire)),
            **table_hashes(folder),
        },
        num_holdout_studies=int((split.table["fold"] == HOLDOUT).sum()),
        holdout_commitment=split.holdout_commitment,
        num_folds=config.split.folds,
        seeds=config.seeds,
    )
    result.save(folder / "result.json")
    return folder


def chance(seed=0):
    """Scores that know nothing."""
    generator = np.random.default_rng(seed)
    return lambda rows: generator.random(len(rows))
