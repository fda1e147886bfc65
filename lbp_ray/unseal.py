"""Open a study's sealed hold-out, once, when every choice is made: nothing else holds its labels against a score.

``python -m lbp_ray.unseal --config configs/oulu.yaml --result RUNS/oulu/results/ID``

Every opening is written to the study's ledger before a score is judged: who, when, for which result, which exams. A
second opening is recorded, and told, as the second, also where another split sealed some of the same exams.
"""

from __future__ import annotations

import argparse
import getpass
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from lbp_ray.cohort import label_exams
from lbp_ray.config import FrozenModel, load_config
from lbp_ray.intervals import area_interval, compare_areas
from lbp_ray.metrics import all_metrics, patient_resamples, percentile_interval, resampled_metrics, youden_threshold
from lbp_ray.prepare import read_questionnaire
from lbp_ray.result import METRIC_NAMES, Interval, StudyResult, table_hashes
from lbp_ray.runs import RunPaths
from lbp_ray.splits import (
    HOLDOUT,
    LEDGER,
    Opening,
    find_split,
    holdout_commitment,
    last_hash,
    opening_number,
    read_ledger,
)
from lbp_ray.study import StudyConfig
from preprocess.commit import canonical_json, write_atomic

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lbp_ray.metrics import StudyRule
    from lbp_ray.splits import Split
    from lbp_ray.study import EvaluationConfig


class UnsealError(ValueError):
    """A hold-out that cannot be opened as it is."""


class HoldoutResult(FrozenModel):
    """The hold-out judged by one slice count: the mean of all fold models and seeds, one threshold."""

    num_slices: int
    num_studies: int
    num_positive: int
    threshold: float
    """Youden's, of the seed-averaged out-of-fold scores."""
    metrics: dict[str, Interval]
    """The eight, with intervals over the hold-out's patients, conditional on the trained models."""


class Unsealed(FrozenModel):
    """What an opening told; its file leaves out which studies were opened."""

    opening: Opening
    num_lost: int
    """Sealed studies without a crop: not predicted."""
    slice_counts: tuple[HoldoutResult, ...]


def record_opening(path: Path, *, result_hash: str, split_hash: str, studies: Sequence[str]) -> Opening:
    """Append an opening to the ledger and return it."""
    openings = read_ledger(path)
    opening = Opening(
        line=len(openings) + 1,
        number=opening_number(openings, studies),
        user=getpass.getuser(),
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        result_hash=result_hash,
        split_hash=split_hash,
        studies=tuple(sorted(studies)),
        previous=last_hash(openings),
    )
    lines = [canonical_json(line.model_dump(mode="json")) for line in (*openings, opening)]
    write_atomic(path, ("\n".join(lines) + "\n").encode())
    return opening


def unseal(config: StudyConfig, result_folder: Path) -> Unsealed:
    """Open the hold-out of a finished study and judge it as the result was made.

    Parameters
    ----------
    config
        Names the study and its paths. What decides a figure (slice counts, seeds, folds, recipe, evaluation) is read
        from the result.
    result_folder
        The result that the hold-out is opened for.

    Raises
    ------
    ValueError
        If the result is not of this study or its tables were changed, its split is gone, or a hold-out study lacks a
        label or a prediction of any model. Nothing is opened then.
    """
    result = StudyResult.load(result_folder / "result.json")
    _check_result(result, result_folder, config.name)
    made = StudyConfig.model_validate(result.config | {"paths": config.paths.model_dump()})
    paths = RunPaths(config.paths.runs, config.name)
    split = _split_of(result, paths)
    holdout = split.table[split.table["fold"] == HOLDOUT]
    labels = _sealed_labels(config.paths.questionnaire, holdout["study_id"])
    scores = holdout_scores(pd.read_parquet(result_folder / "holdout.parquet"), made)
    ledger = paths.folder / LEDGER
    path = _unused(result_folder, line=len(read_ledger(ledger)) + 1)
    opening = record_opening(
        ledger, result_hash=result.result_hash, split_hash=split.split_hash, studies=holdout["study_id"].tolist()
    )
    outside = pd.read_parquet(result_folder / "out_of_fold.parquet")
    patients = holdout.set_index("study_id")["patient_id"]
    told = Unsealed(
        opening=opening,
        num_lost=int((~holdout["study_id"].isin(scores["study_id"])).sum()),
        slice_counts=tuple(
            _judge(
                scores[scores["num_slices"] == count].assign(
                    label=lambda rows: rows["study_id"].map(labels),
                    patient_id=lambda rows: rows["study_id"].map(patients),
                ),
                outside[outside["num_slices"] == count],
                made.evaluation,
            )
            for count in made.slice_counts
        ),
    )
    write_atomic(path, told.model_dump_json(indent=1, exclude={"opening": {"studies"}}).encode())
    return told


def _check_result(result: StudyResult, folder: Path, name: str) -> None:
    if result.name != name:
        msg = f"{folder} is a result of study {result.name}, the configuration is of {name}; give that study's own"
        raise UnsealError(msg)
    changed = [table for table, found in table_hashes(folder).items() if result.hashes.get(table) != found]
    if changed:
        msg = (
            f"{folder / changed[0]}.parquet is not the table that result.json was made with; delete {folder} and run "
            "the study again, it only aggregates"
        )
        raise UnsealError(msg)


def _split_of(result: StudyResult, paths: RunPaths) -> Split:
    """Open the split that a result was made with; none is ever drawn here."""
    split = find_split(paths.splits, result.hashes["split"])
    if split is None or holdout_commitment(split.table) != result.holdout_commitment:
        msg = (
            f"no split under {paths.splits} is the one that the result was made with "
            f"({result.hashes['split'][:16]}); give the paths.runs that it was made in, or restore the split"
        )
        raise UnsealError(msg)
    if not (split.table["fold"] == HOLDOUT).any():
        msg = "the study sealed no hold-out (split.holdout_fraction is 0): there is nothing to open"
        raise UnsealError(msg)
    return split


def _sealed_labels(questionnaire: Path, studies: pd.Series[str]) -> pd.Series[int]:
    labels = label_exams(read_questionnaire(questionnaire)).set_index("study_id")["label"].reindex(studies)
    absent = labels.index[labels.isna()]
    if len(absent):
        msg = (
            f"{questionnaire} labels {len(labels) - len(absent)} of {len(labels)} sealed exams, all are required, e.g. "
            f"study {absent[0]}; give the questionnaire that the study was sealed with"
        )
        raise UnsealError(msg)
    return labels.astype(int)


def _unused(folder: Path, *, line: int) -> Path:
    """Return where an opening is told; what an earlier one told is never overwritten."""
    path = folder / f"unsealed-{line:02d}.json"
    if path.exists():
        msg = f"{path} exists, but the ledger holds {line - 1} line(s): some were taken out; restore it from a backup"
        raise UnsealError(msg)
    return path


def holdout_scores(predictions: pd.DataFrame, config: StudyConfig) -> pd.DataFrame:
    """Average the study scores of all fold models and seeds; labels are not needed.

    Parameters
    ----------
    predictions
        ``holdout.parquet``: one row per slice and model.
    config
        The study, which says how many models are due.

    Returns
    -------
    pandas.DataFrame
        ``num_slices``, ``study_id``, ``score``.

    Raises
    ------
    UnsealError
        If a study is not predicted by every fold model of every seed, or a probability is missing.
    """
    keys = ["num_slices", "seed", "fold", "study_id"]
    rule: StudyRule = config.recipe.study_rule
    studies = predictions.groupby(keys, as_index=False)["probability"].agg(rule)
    due = config.split.folds * len(config.seeds)
    models = studies.groupby(["num_slices", "study_id"])["probability"].agg(["size", "count"])
    counts = set(predictions["num_slices"])
    if counts != set(config.slice_counts) or (models != due).to_numpy().any():
        worst = int(models["count"].min()) if len(models) else 0
        msg = (
            f"every hold-out study must be predicted by {due} models of each of {list(config.slice_counts)} slices, "
            f"found {worst} for one and slice counts {sorted(counts)}; run the study to its end first"
        )
        raise UnsealError(msg)
    mean: pd.DataFrame = studies.groupby(["num_slices", "study_id"], as_index=False)["probability"].mean()
    return mean.rename(columns={"probability": "score"})


def _judge(rows: pd.DataFrame, outside: pd.DataFrame, evaluation: EvaluationConfig) -> HoldoutResult:
    """Judge the hold-out by one slice count; `outside` holds the same count's rows of the out-of-fold table."""
    mean = (
        outside.drop_duplicates(["seed", "study_id"])
        .groupby("study_id")
        .agg(score=("study_probability", "mean"), label=("label", "first"))
    )
    threshold = youden_threshold(mean["label"].to_numpy(dtype=int), mean["score"].to_numpy())
    truth, scores = rows["label"].to_numpy(dtype=int), rows["score"].to_numpy()
    patients = rows["patient_id"].to_numpy()
    decisions = (scores >= threshold).astype(int)
    weights = patient_resamples(patients, truth, resamples=evaluation.bootstrap_resamples, seed=evaluation.seed)
    resampled = resampled_metrics(truth, scores, decisions, weights)
    level = evaluation.interval_level
    found = all_metrics(truth, scores, decisions)
    bounds = {name: percentile_interval(resampled[name], level) for name in METRIC_NAMES}
    bounds["roc_auc"] = area_interval(compare_areas(truth, scores[None], patients), 0, level=level)
    method = f"percentile bootstrap over patients, {evaluation.bootstrap_resamples} resamples"
    methods = dict.fromkeys(METRIC_NAMES, method) | {"roc_auc": "DeLong over patients, on the logit scale"}
    return HoldoutResult(
        num_slices=int(rows["num_slices"].iloc[0]),
        num_studies=len(rows),
        num_positive=int(truth.sum()),
        threshold=threshold,
        metrics={
            name: Interval(estimate=found[name], low=low, high=high, level=level, method=methods[name])
            for name, (low, high) in bounds.items()
        },
    )


def describe(told: Unsealed) -> str:
    """Write what an opening told, for a console."""
    opening = told.opening
    lines = [f"opening {opening.number} of this hold-out, for result {opening.result_hash[:12]}"]
    if opening.number > 1:
        lines.append(
            "It had been opened before, in whole or in part: choices made since then may rest on it, and it is no "
            "independent test."
        )
    if told.num_lost:
        lines.append(f"{told.num_lost} sealed studies have no crop and are not judged.")
    for part in told.slice_counts:
        lines.append(f"\n{part.num_slices} slice(s): {part.num_studies} studies, {part.num_positive} symptomatic")
        lines += [
            f"  {name:<18} {value.estimate:5.2f} [{value.low:.2f}, {value.high:.2f}]"
            for name, value in part.metrics.items()
        ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, open the hold-out and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m lbp_ray.unseal", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the study, e.g. configs/oulu.yaml")
    parser.add_argument("--result", type=Path, required=True, help="folder of the finished result")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="replace single values: paths and name"
    )
    parsed = parser.parse_args(arguments)
    try:
        told = unseal(load_config(StudyConfig, parsed.config, parsed.overrides), parsed.result)
    except (ValueError, FileNotFoundError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(describe(told) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
