"""Open a study's sealed hold-out, once, when every choice is made: nothing else holds its labels against a score.

``python -m lbp_ray.unseal --config configs/oulu_honest.yaml --result RUNS/oulu_honest/results/ID``

Every opening is written to one ledger before a score is judged: who, when, for which result, which exams. A
second opening is recorded, and told, as the second, also where another split sealed some of the same exams: open
the study that you will sign first.
"""

from __future__ import annotations

import fcntl
import getpass
import sys
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import product
from typing import TYPE_CHECKING

import pandas as pd

from lbp_ray.cohort import label_exams
from lbp_ray.ensemble import MODEL, ensemble_threshold, model_means, model_thresholds
from lbp_ray.finished import Finished, run_on_result
from lbp_ray.out_of_fold import with_study_scores
from lbp_ray.prepare import answers_hash, read_questionnaire
from lbp_ray.result import HoldoutChoice, HoldoutResult, MetricSummary, Unsealed
from lbp_ray.splits import HOLDOUT, Opening, last_hash, opening_number, read_ledger
from lbp_ray.summaries import THRESHOLD_OF, judge, summarise, the_eight
from preprocess.commit import canonical_json, write_atomic

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from lbp_ray.study import EvaluationConfig, StudyConfig


LOCK = ".holdout_ledger.lock"
"""File of a root that whoever opens a hold-out holds meanwhile; it is empty and stays."""


class UnsealError(ValueError):
    """A hold-out that cannot be opened as it is."""


def record_opening(path: Path, *, study: str, result_hash: str, split_hash: str, studies: Sequence[str]) -> Opening:
    """Append an opening to the ledger and return it; `study` is the study's name, `studies` are the opened exams."""
    openings = read_ledger(path)
    opening = Opening(
        line=len(openings) + 1,
        number=opening_number(openings, studies),
        study=study,
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
        If the result is not of this study or its tables were changed, its split is gone, no threshold reaches its
        target, or a hold-out study lacks a label or a prediction of any network. Nothing is opened then.
    """
    finished = Finished.open(config, result_folder)
    made, split = finished.config, finished.split
    holdout = split.table[split.table["fold"] == HOLDOUT]
    if holdout.empty:
        msg = "the study sealed no hold-out (split.holdout_fraction is 0): there is nothing to open"
        raise UnsealError(msg)
    _require_same_answers(config.paths.questionnaire, finished.result.hashes["questionnaire"])
    labels = _sealed_labels(made, holdout["study_id"])
    scores = holdout_scores(finished.table("holdout"), made, labels)
    table = finished.table("out_of_fold")
    outside = {count: table[table["num_slices"] == count] for count in made.slice_counts}
    level = made.evaluation.level
    thresholds = {count: ensemble_threshold(outside[count], made.evaluation, level) for count in made.slice_counts}
    with _only_opening(finished.paths.root):
        _require_whole_ledger(finished.paths.ledger, result_folder)
        opening = record_opening(
            finished.paths.ledger,
            study=config.name,
            result_hash=finished.result.result_hash,
            split_hash=split.split_hash,
            studies=holdout["study_id"].tolist(),
        )
    patient_of = dict(zip(holdout["study_id"], holdout["patient_id"], strict=True))
    told = Unsealed(
        opening=opening,
        num_lost=int((~holdout["study_id"].isin(scores["study_id"])).sum()),
        slice_counts=tuple(
            _judge_count(
                scores[scores["num_slices"] == count],
                thresholds[count],
                model_thresholds(outside[count], level),
                patient_of=patient_of,
                evaluation=made.evaluation,
            )
            for count in made.slice_counts
        ),
    )
    told.save(result_folder / f"unsealed-{opening.line:02d}.json")
    return told


@contextmanager
def _only_opening(root: Path) -> Iterator[None]:
    """Hold the ledger's lock: two openings at once would both be told as the first."""
    with (root / LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _require_whole_ledger(ledger: Path, result_folder: Path) -> None:
    """Refuse a ledger that lacks an opening which this result, or one of any study of the root, tells of."""
    lines = [opening.model_copy(update={"studies": ()}) for opening in read_ledger(ledger)]
    told = {*ledger.parent.glob("*/results/*/unsealed-*.json"), *result_folder.glob("unsealed-*.json")}
    for path in sorted(told):
        if Unsealed.load(path).opening not in lines:
            msg = (
                f"{path} tells of an opening that {ledger} does not hold ({len(lines)} line(s)): some were taken out; "
                "restore it from a backup"
            )
            raise UnsealError(msg)


def _require_same_answers(questionnaire: Path, made_with: str) -> None:
    """Refuse answers that were changed since the study was made: its scores are known by now."""
    if answers_hash(read_questionnaire(questionnaire)) != made_with:
        msg = (
            f"{questionnaire} holds other rows than when the result was made: restore it, or run the study again with "
            "this one; it trains only what the labels of the folds change"
        )
        raise UnsealError(msg)


def _sealed_labels(config: StudyConfig, studies: pd.Series[str]) -> pd.Series[int]:
    """Read the labels of the sealed exams, under the rules that the result's cohort was labelled by."""
    rows = read_questionnaire(config.paths.questionnaire)
    exams = label_exams(rows, strict_gt30=config.cohort.strict_gt30)
    labels = exams.set_index("study_id")["label"].reindex(studies)
    absent = labels.index[labels.isna()]
    if len(absent):
        msg = (
            f"{config.paths.questionnaire} labels {len(labels) - len(absent)} of {len(labels)} sealed exams, all are "
            f"required, e.g. study {absent[0]}; give the questionnaire that the study was sealed with"
        )
        raise UnsealError(msg)
    return labels.astype(int)


def holdout_scores(predictions: pd.DataFrame, config: StudyConfig, labels: pd.Series[int]) -> pd.DataFrame:
    """Score the hold-out's studies by each network; refuse a table with gaps.

    Parameters
    ----------
    predictions
        ``holdout.parquet``: one row per slice and network.
    config
        The study, which says how many networks are due.
    labels
        Label of each sealed study.

    Returns
    -------
    pandas.DataFrame
        The same rows with ``study_probability`` and ``label``.

    Raises
    ------
    UnsealError
        If a study is not predicted, slice by slice, by every fold model of every seed, a study is not sealed, or those
        with a crop are of one class.
    """
    _require_all_models(predictions, config)
    known = labels.reindex(predictions["study_id"].unique())
    if known.isna().any() or known.nunique() < 2:
        msg = (
            f"the hold-out's predictions must be of sealed studies of both classes, {int(known.isna().sum())} are not "
            "sealed; a hold-out that lost a class to exams without crops cannot be judged: review those, or seal a "
            "larger one"
        )
        raise UnsealError(msg)
    return with_study_scores(predictions, config.recipe).assign(label=lambda rows: rows["study_id"].map(labels))


def _require_all_models(predictions: pd.DataFrame, config: StudyConfig) -> None:
    due = set(product(range(config.split.folds), config.seeds))
    counts = sorted(set(predictions["num_slices"]))
    keys = ["num_slices", "study_id", *MODEL]
    found = predictions.groupby(keys, as_index=False)["probability"].agg(["size", "count"])
    is_whole = found["size"].eq(found["num_slices"]) & found["count"].eq(found["num_slices"])
    is_due = pd.Series([model in due for model in zip(found["fold"], found["seed"], strict=True)], dtype=bool)
    models = (is_whole & is_due).groupby([found["num_slices"], found["study_id"]]).sum()
    if counts != sorted(config.slice_counts) or (models != len(due)).any() or not (is_whole & is_due).all():
        msg = (
            f"every hold-out study must be predicted by {len(due)} models of each of {list(config.slice_counts)} "
            f"slices, found {int(models.min()) if len(models) else 0} for one and slice counts {counts}; run the study "
            "to its end first"
        )
        raise UnsealError(msg)


def _judge_count(
    scores: pd.DataFrame,
    threshold: float,
    thresholds: pd.Series[float],
    *,
    patient_of: Mapping[str, str],
    evaluation: EvaluationConfig,
) -> HoldoutResult:
    """Judge the hold-out by one slice count: all networks, and each fold's alone, at their thresholds."""
    level, column = evaluation.level, THRESHOLD_OF[evaluation.level]
    averaged = judge(model_means(scores).assign(**{column: threshold}), patient_of, level)
    own = scores.join(thresholds, on=MODEL)
    single = {model: judge(rows, patient_of, level) for model, rows in own.groupby(MODEL, sort=True)}
    choices = []
    for fold in sorted(set(own["fold"])):
        rows, mean = own[own["fold"] == fold], float(thresholds[thresholds.index.isin([fold], level="fold")].mean())
        of_fold = judge(model_means(rows).assign(**{column: mean}), patient_of, level)
        seeds = [judged for model, judged in single.items() if model[0] == fold]
        choices.append(
            HoldoutChoice(
                fold=int(fold),
                threshold=mean,
                confusion=of_fold.confusion,
                metrics=the_eight(summarise(of_fold, seeds, None)),
            )
        )
    summaries = summarise(averaged, list(single.values()), evaluation)
    studies = scores.drop_duplicates("study_id")
    return HoldoutResult(
        num_slices=int(scores["num_slices"].iloc[0]),
        num_studies=len(studies),
        num_positive=int(studies["label"].sum()),
        threshold=threshold,
        threshold_source="out_of_fold" if evaluation.ensemble_threshold == "refit" else "mean_of_models",
        confusion=averaged.confusion,
        metrics=the_eight(summaries),
        accuracy=summaries["accuracy"],
        roc=averaged.roc,
        precision_recall=averaged.precision_recall,
        choices=tuple(choices),
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
        lines += ["", *_count_lines(part)]
    lines += [
        "",
        "mean of all fold models and seeds [interval over patients, conditional on the trained models]; models: mean "
        "± SD of each network alone, at its own threshold; folds: lowest and highest of one fold's seeds alone. To "
        "choose one of the folds by these figures would be optimistic: all are told, none is taken.",
    ]
    return "\n".join(lines)


def _count_lines(part: HoldoutResult) -> Iterable[str]:
    counts = part.confusion
    yield (
        f"{part.num_slices} slice(s): {part.num_studies} studies, {part.num_positive} symptomatic; "
        f"TP {counts.tp}, FP {counts.fp}, FN {counts.fn}, TN {counts.tn} at {part.threshold:.3f} "
        f"({part.threshold_source})"
    )
    for place, value in enumerate(part.metrics):
        folds = [choice.metrics[place].estimate for choice in part.choices]
        yield f"{_metric_line(value)}  folds {min(folds):5.2f} to {max(folds):.2f}"
    yield _metric_line(part.accuracy)


def _metric_line(value: MetricSummary) -> str:
    interval = "" if value.interval is None else f"[{value.interval.low:.2f}, {value.interval.high:.2f}]"
    spread = "" if value.sd is None else f" ± {value.sd:.2f}"
    return f"  {value.name:<18} {value.estimate:5.2f} {interval:<13} models {value.mean:5.2f}{spread}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, open the hold-out, render the report again and return the exit status."""
    return run_on_result(
        lambda config, folder: describe(unseal(config, folder)),
        arguments,
        prog="python -m lbp_ray.unseal",
        description=__doc__,
        replaceable="paths and name",
    )


if __name__ == "__main__":
    sys.exit(main())
