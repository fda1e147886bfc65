"""Open a study's sealed hold-out, once, when every choice is made: nothing else holds its labels against a score.

``python -m lbp_ray.unseal --config configs/oulu.yaml --result RUNS/oulu/results/ID``

Every opening is written to a ledger beside the split before a score is judged: who, when, for which result. A second
opening is recorded, and told, as the second.
"""

from __future__ import annotations

import argparse
import getpass
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from lbp_ray.config import FrozenModel, load_config
from lbp_ray.intervals import area_interval, compare_areas
from lbp_ray.metrics import all_metrics, patient_resamples, percentile_interval, resampled_metrics, youden_threshold
from lbp_ray.prepare import seal
from lbp_ray.result import METRIC_NAMES, Interval, StudyResult
from lbp_ray.splits import HOLDOUT
from lbp_ray.study import StudyConfig
from preprocess.commit import canonical_json, content_id, write_atomic

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lbp_ray.metrics import StudyRule
    from lbp_ray.splits import Split
    from lbp_ray.study import EvaluationConfig


class UnsealError(ValueError):
    """A hold-out that cannot be opened as it is."""


class Opening(FrozenModel):
    """One line of the ledger."""

    number: int
    """1 for the first; from 2 on the hold-out is no longer untouched."""
    user: str
    time: str
    """UTC, ISO 8601."""
    result_hash: str
    """What the hold-out was opened for."""
    previous: str
    """Hash of the line before: no line but the last can be changed or taken out unseen."""


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
    """What an opening told; no study by name."""

    opening: Opening
    num_lost: int
    """Sealed studies without a crop: not predicted."""
    slice_counts: tuple[HoldoutResult, ...]


def read_ledger(path: Path) -> list[Opening]:
    """Read the openings of a hold-out.

    Raises
    ------
    UnsealError
        If a line was changed or taken out.
    """
    openings = [Opening.model_validate_json(line) for line in path.read_text().splitlines()] if path.is_file() else []
    previous = ""
    for number, opening in enumerate(openings, start=1):
        if (opening.number, opening.previous) != (number, previous):
            msg = f"{path}, line {number}: the ledger was changed after it was written; restore it from a backup"
            raise UnsealError(msg)
        previous = content_id(opening.model_dump(mode="json"))
    return openings


def record_opening(path: Path, *, result_hash: str) -> Opening:
    """Append an opening to the ledger and return it."""
    openings = read_ledger(path)
    previous = content_id(openings[-1].model_dump(mode="json")) if openings else ""
    opening = Opening(
        number=len(openings) + 1,
        user=getpass.getuser(),
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        result_hash=result_hash,
        previous=previous,
    )
    lines = [canonical_json(line.model_dump(mode="json")) for line in (*openings, opening)]
    write_atomic(path, ("\n".join(lines) + "\n").encode())
    return opening


def unseal(config: StudyConfig, result_folder: Path) -> Unsealed:
    """Open the hold-out of a finished study and judge it.

    Parameters
    ----------
    config
        The study.
    result_folder
        The result that the hold-out is opened for.

    Raises
    ------
    ValueError
        If the result is not of this study's split, or a hold-out study lacks a prediction of any model.
    """
    result = StudyResult.load(result_folder / "result.json")
    sealed = seal(config)
    if (result.hashes["split"], result.holdout_commitment) != (
        sealed.split.split_hash,
        sealed.split.holdout_commitment,
    ):
        msg = (
            f"{result_folder} was made with split {result.hashes['split'][:16]}, the study's is "
            f"{sealed.split.split_hash[:16]}; give the configuration and data that the result was made with"
        )
        raise UnsealError(msg)
    holdout = sealed.split.table[sealed.split.table["fold"] == HOLDOUT]
    if holdout.empty:
        msg = "the study sealed no hold-out (split.holdout_fraction is 0): there is nothing to open"
        raise UnsealError(msg)
    scores = holdout_scores(pd.read_parquet(result_folder / "holdout.parquet"), config)
    opening = record_opening(ledger_of(sealed.split), result_hash=result.result_hash)
    labels = sealed.exams.set_index("study_id")["label"].astype("Int64")
    outside = pd.read_parquet(result_folder / "out_of_fold.parquet")
    told = Unsealed(
        opening=opening,
        num_lost=int((~holdout["study_id"].isin(scores["study_id"])).sum()),
        slice_counts=tuple(
            _judge(
                count,
                scores[scores["num_slices"] == count],
                outside[outside["num_slices"] == count],
                labels,
                sealed.split,
                config.evaluation,
            )
            for count in config.slice_counts
        ),
    )
    path = result_folder / f"unsealed-{opening.number:02d}.json"
    write_atomic(path, told.model_dump_json(indent=1).encode())
    return told


def ledger_of(split: Split) -> Path:
    """Return the ledger beside a split."""
    return split.folder.with_name(f"{split.folder.name}.ledger.jsonl")


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


def _judge(
    count: int,
    rows: pd.DataFrame,
    outside: pd.DataFrame,
    labels: pd.Series[int],
    split: Split,
    evaluation: EvaluationConfig,
) -> HoldoutResult:
    mean = outside.drop_duplicates(["seed", "study_id"]).groupby("study_id")["study_probability"].mean()
    threshold = youden_threshold(labels.loc[mean.index].to_numpy(dtype=int), mean.to_numpy())
    truth, scores = labels.loc[rows["study_id"]].to_numpy(dtype=int), rows["score"].to_numpy()
    patients = split.table.set_index("study_id").loc[rows["study_id"], "patient_id"].to_numpy()
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
        num_slices=count,
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
            "It had been opened before: choices made since then may rest on it, and it is no independent test."
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
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="as the study was run")
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
