"""The hold-out: opened by one command, recorded before it is judged, and told when it is no longer untouched."""

from __future__ import annotations

import fcntl
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from cohort_factory import make_cohort, sealed_exams, study_config
from finished_factory import chance, commit_result, commit_split, holdout_rows, out_of_fold_rows
from store_factory import pseudonym

from lbp_ray.finished import FinishedError
from lbp_ray.intervals import WIDENED
from lbp_ray.metrics import all_metrics, fit_threshold
from lbp_ray.prepare import prepare, seal
from lbp_ray.result import METRIC_NAMES, StudyResult, Unsealed, table_hashes
from lbp_ray.splits import HOLDOUT, LEDGER, LedgerError, read_ledger
from lbp_ray.unseal import LOCK, UnsealError, describe, main, unseal


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """No weights are needed."""
    monkeypatch.setattr("lbp_ray.prepare.load_backbone_weights", lambda *_, **__: {"weight": torch.zeros(1)})


@pytest.fixture
def rendered(monkeypatch):
    """What reports were rendered with, instead of rendering them."""
    calls = []
    monkeypatch.setattr("lbp_ray.finished.write_report", lambda *_, **given: calls.append(given) or "page")
    return calls


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_cohort(tmp_path_factory.mktemp("data"))


@pytest.fixture
def finish(data, tmp_path):
    """Finish a study of random scores; returns configuration, sealed study and result folder."""

    def run(evaluation=None, **changes):
        evaluation = {"bootstrap_resamples": 20, **(evaluation or {})}
        config = study_config(data, tmp_path, **{"seeds": (0, 1), "evaluation": evaluation, **changes})
        study = seal(config)
        tables = {
            "outside": out_of_fold_rows(config, study.split, chance(1)),
            "holdout": holdout_rows(config, sorted(sealed_studies(study.split)), chance(2)),
        }
        return config, study, commit_result(tmp_path / "result", config, study.split, **tables)

    return run


@pytest.fixture
def finished(finish):
    return finish()


def sealed_labels(split):
    """Labels of the sealed exams, in the order of their pseudonyms."""
    exams = sorted(sealed_exams(split), key=lambda number: pseudonym("s", number))
    return np.array([number % 2 for number in exams])


def table_of(folder, name):
    """One of a result's tables, with the score of each study by the any-slice rule."""
    table = pd.read_parquet(folder / f"{name}.parquet")
    models = table.groupby(["study_id", "fold", "seed"])["probability"]
    return table.assign(score=models.transform("max"))


def estimates(metrics):
    return {value.name: value.estimate for value in metrics}


def ledger_of(config):
    return config.paths.runs / LEDGER


def sealed_studies(split):
    return set(split.table.loc[split.table["fold"] == HOLDOUT, "study_id"])


def edit_result(folder, *, hashes, **changes):
    """Save a result as if it had been made with other hashes."""
    result = StudyResult.load(folder / "result.json")
    changes["hashes"] = result.hashes | hashes
    result.model_copy(update=changes).save(folder / "result.json")


def rewritten(config, tmp_path, change=lambda rows: rows):
    """Return the configuration with a questionnaire file of other bytes."""
    path = tmp_path / "again.csv"
    change(pd.read_csv(config.paths.questionnaire)).assign(note="again").to_csv(path, index=False)
    return config.model_copy(update={"paths": config.paths.model_copy(update={"questionnaire": path})})


@pytest.mark.parametrize("slices", [1, 3])
def test_the_holdout_is_judged_by_the_mean_of_all_models_study_scores(finish, slices):
    _, study, folder = finished = finish(slice_counts=(slices,))
    told = unseal(finished[0], folder)
    (part,) = told.slice_counts
    mean = table_of(folder, "holdout").groupby("study_id")["score"].mean().to_numpy()
    labels = sealed_labels(study.split)
    expected = all_metrics(labels, mean, (mean >= part.threshold).astype(int))
    assert estimates((*part.metrics, part.accuracy)).items() <= expected.items()
    assert (part.num_slices, part.num_studies, part.num_positive, told.num_lost) == (slices, 4, sum(labels), 0)
    assert sum(part.confusion.model_dump().values()) == 4
    assert (part.roc.x[-1], part.roc.y[-1], part.precision_recall.x[0]) == (1, 1, 1)


def test_the_threshold_is_fitted_on_seed_averaged_scores_outside_the_holdout(finish):
    config, _, folder = finish({"threshold_criterion": "sensitivity", "threshold_target": 0.9}, slice_counts=(3,))
    table = table_of(folder, "out_of_fold").drop_duplicates(["study_id", "seed"]).groupby("study_id")
    labels, scores = table["label"].first().to_numpy(dtype=int), table["score"].mean().to_numpy()
    (part,) = unseal(config, folder).slice_counts
    expected = fit_threshold(labels, scores, criterion="sensitivity", target=0.9)
    assert part.threshold == pytest.approx(expected, abs=1e-15)
    assert part.threshold_source == "out_of_fold"


def test_the_threshold_may_be_the_mean_of_all_models(finish):
    config, _, folder = finish({"ensemble_threshold": "mean_of_seeds"})
    models = table_of(folder, "out_of_fold").drop_duplicates(["fold", "seed"])
    (part,) = unseal(config, folder).slice_counts
    assert part.threshold == pytest.approx(models["threshold"].mean())
    assert part.threshold_source == "mean_of_models"


def test_each_model_alone_stands_beside_their_mean(finished):
    """By the threshold that its own fold was judged by."""
    config, study, folder = finished
    outside, holdout = (table_of(folder, name).groupby(["fold", "seed"]) for name in ("out_of_fold", "holdout"))
    thresholds, labels = outside["threshold"].first(), sealed_labels(study.split)
    expected = [
        all_metrics(labels, rows["score"].to_numpy(), (rows["score"] >= thresholds[model]).to_numpy(dtype=int))
        for model, rows in holdout
    ]
    for value in unseal(config, folder).slice_counts[0].metrics:
        assert value.per_seed == tuple(model[value.name] for model in expected)
        assert value.mean == pytest.approx(np.mean([model[value.name] for model in expected]))


def test_each_fold_alone_is_told_and_none_is_taken(finished):
    config, study, folder = finished
    (part,) = unseal(config, folder).slice_counts
    assert [choice.fold for choice in part.choices] == [0, 1]
    rows = table_of(folder, "holdout").query("fold == 1")
    mean = rows.groupby("study_id")["score"].mean().to_numpy()
    threshold = table_of(folder, "out_of_fold").query("fold == 1").groupby("seed")["threshold"].first().mean()
    choice = part.choices[1]
    expected = all_metrics(sealed_labels(study.split), mean, (mean >= threshold).astype(int))
    assert choice.threshold == threshold
    assert estimates(choice.metrics).items() <= expected.items()
    assert all(value.interval is None and len(value.per_seed) == 2 for value in choice.metrics)
    assert all(value.per_seed == part.metrics[place].per_seed[2:] for place, value in enumerate(choice.metrics))


def test_slices_are_the_units_where_the_study_is_judged_by_slices(finish):
    config, study, folder = finish({"level": "slice"}, slice_counts=(3,))
    (part,) = unseal(config, folder).slice_counts
    mean = table_of(folder, "holdout").groupby(["study_id", "slice_index"])["probability"].mean().to_numpy()
    expected = all_metrics(np.repeat(sealed_labels(study.split), 3), mean, (mean >= part.threshold).astype(int))
    assert estimates(part.metrics).items() <= expected.items()
    assert (part.num_studies, sum(part.confusion.model_dump().values())) == (4, 12)


def test_nothing_was_chosen_on_the_holdout_so_the_literal_study_has_intervals_there(finish):
    config, _, folder = finish(
        {"threshold_source": "same_fold"}, recipe={"weights": "random", "selection": "same_fold"}
    )
    told = unseal(config, folder)
    assert all(value.interval is not None for value in told.slice_counts[0].metrics)
    assert not any(WIDENED in value.interval.method for value in told.slice_counts[0].metrics)
    assert "optimistic" in describe(told)


MATRICES = {1: (2, 2, 12, 37), 3: (8, 6, 6, 33), 5: (11, 17, 3, 22)}
"""Slice count → TP, FP, FN, TN on 14 symptomatic and 39 asymptomatic, as Table 5 of the Oulu thesis implies them."""

TABLE_5 = {
    1: (0.500, 0.755, 0.143, 0.949, 0.546, 0.153),
    3: (0.571, 0.846, 0.571, 0.846, 0.709, 0.418),
    5: (0.393, 0.880, 0.786, 0.564, 0.675, 0.309),
}
"""Slice count → precision, NPV, recall, specificity, balanced accuracy, MCC as printed there."""


@pytest.fixture
def thesis(data, tmp_path):
    """A study whose networks disagree about its 53 sealed exams, and agree on average on the thesis's decisions."""
    config = study_config(data, tmp_path, seeds=(0, 1), slice_counts=(1, 3, 5), evaluation={"bootstrap_resamples": 20})
    number = np.arange(93)
    fold = np.where(number < 53, HOLDOUT, number % 2)
    label = np.where(number < 53, number < 14, number % 4 < 2).astype(int)
    names = [f"s{row:02d}" for row in number]
    table = pd.DataFrame({"study_id": names, "patient_id": names, "fold": fold, "label": label})
    split = commit_split(tmp_path / config.name / "splits" / "made", table)
    answers = {"low_back_pain": 1 + label, "frequency": 4 * label, "intensity": 8 * label}
    answers |= {"previous_episodes": label, "pain_now": label}
    table[["study_id", "patient_id"]].assign(**answers).to_csv(tmp_path / "answers.csv", index=False)
    config = config.model_copy(
        update={"paths": config.paths.model_copy(update={"questionnaire": tmp_path / "answers.csv"})}
    )

    def sealed(rows):
        tp, fp, fn, _ = MATRICES[int(rows["num_slices"].iloc[0])]
        row = rows["study_id"].str[1:].astype(int)
        called = (row < tp) | ((row >= tp + fn) & (row < tp + fn + fp))
        swing = np.where((rows["fold"] + rows["seed"] + row) % 2, 0.3, -0.3)
        middle = rows["slice_index"] == rows["num_slices"] // 2
        return np.where(middle, np.where(called, 0.6, 0.4) + swing, 0.05)

    tables = {
        "outside": out_of_fold_rows(config, split, lambda rows: np.where(rows["label"] == 1, 0.5, 0.1)),
        "holdout": holdout_rows(config, names[:53], sealed),
    }
    return config, commit_result(tmp_path / "result", config, split, **tables)


def test_the_published_table_comes_out_of_a_holdout_with_its_confusion_matrices(thesis):
    told = unseal(*thesis)
    assert [part.num_slices for part in told.slice_counts] == [1, 3, 5]
    for part in told.slice_counts:
        assert tuple(part.confusion.model_dump().values()) == MATRICES[part.num_slices]
        found = estimates(part.metrics)
        assert tuple(round(found[name], 3) for name in METRIC_NAMES[2:]) == TABLE_5[part.num_slices]
        assert all(value.per_seed != (value.estimate,) * 4 for value in part.metrics)


def test_every_opening_is_recorded_and_the_second_is_told_as_the_second(finished, tmp_path, capsys, rendered):
    config, study, folder = finished
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    arguments = ["--config", str(path), "--result", str(folder)]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    assert "opening 1 of this hold-out" in first
    assert "roc_auc" in first
    assert main(arguments) == 0
    assert "It had been opened before" in capsys.readouterr().out
    assert [len(call["unsealed"]) for call in rendered] == [1, 2]
    openings = read_ledger(ledger_of(config))
    assert [(opening.line, opening.number) for opening in openings] == [(1, 1), (2, 2)]
    assert {opening.split_hash for opening in openings} == {study.split.split_hash}
    assert all(list(opening.studies) == sorted(sealed_studies(study.split)) for opening in openings)
    assert {opening.result_hash for opening in openings} == {StudyResult.load(folder / "result.json").result_hash}
    assert all(opening.user and opening.time for opening in openings)
    assert sorted(item.name for item in folder.glob("unsealed-*")) == ["unsealed-01.json", "unsealed-02.json"]


def test_the_report_is_rendered_again_with_the_opening(finished, tmp_path, capsys):
    config, _, folder = finished
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert main(["--config", str(path), "--result", str(folder)]) == 0
    assert f"report: {folder / 'report' / 'report.html'}" in capsys.readouterr().out
    (opening,) = read_ledger(ledger_of(config))
    assert f"Opened by {opening.user} at {opening.time}" in (folder / "report" / "report.html").read_text()


def test_no_study_is_named_in_what_is_told(finished):
    config, study, folder = finished
    told = unseal(config, folder)
    text = (folder / "unsealed-01.json").read_text()
    assert not any(name in text for name in study.split.table["study_id"])
    again = Unsealed.load(folder / "unsealed-01.json")
    assert again.slice_counts == told.slice_counts
    assert again.opening == told.opening.model_copy(update={"studies": ()})


@pytest.mark.parametrize("keep", [[1], []], ids=["a line taken out", "a line changed"])
def test_a_changed_ledger_is_refused(finished, keep):
    config, _, folder = finished
    unseal(config, folder)
    unseal(config, folder)
    ledger = ledger_of(config)
    lines = ledger.read_text().splitlines()
    changed = json.dumps(json.loads(lines[0]) | {"user": "nobody"})
    ledger.write_text("\n".join([lines[number] for number in keep] or [changed, lines[1]]))
    for refused in (lambda: unseal(config, folder), lambda: seal(config)):
        with pytest.raises(LedgerError, match="the ledger was changed"):
            refused()


def test_what_an_opening_told_is_never_overwritten(finished):
    config, _, folder = finished
    unseal(config, folder)
    told = (folder / "unsealed-01.json").read_bytes()
    ledger_of(config).unlink()
    with pytest.raises(UnsealError, match=r"unsealed-01.json tells of an opening that .* does not hold \(0 line"):
        unseal(config, folder)
    assert (folder / "unsealed-01.json").read_bytes() == told
    assert not ledger_of(config).exists()


def test_ledger_without_the_opening_of_another_result_is_refused(finished):
    config, _, folder = finished
    unseal(config, folder)
    other = config.paths.runs / "another" / "results" / "0123456789abcdef"
    other.mkdir(parents=True)
    (folder / "unsealed-01.json").rename(other / "unsealed-01.json")
    unseal(config, folder)
    ledger_of(config).unlink()
    (folder / "unsealed-02.json").unlink()
    with pytest.raises(UnsealError, match=r"another/results/.*/unsealed-01.json tells of an opening"):
        unseal(config, folder)


def test_openings_at_once_are_told_one_after_the_other(finished):
    config, _, folder = finished
    with ThreadPoolExecutor(4) as pool:
        told = list(pool.map(lambda _: unseal(config, folder), range(4)))
    assert sorted(item.opening.number for item in told) == [1, 2, 3, 4]
    assert len(read_ledger(ledger_of(config))) == 4
    assert len(list(folder.glob("unsealed-*.json"))) == 4


def test_an_opening_waits_for_another_under_way(finished):
    config, _, folder = finished
    lock = ledger_of(config).parent / LOCK
    with ThreadPoolExecutor(1) as pool, lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        waiting = pool.submit(unseal, config, folder)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=2)
        assert read_ledger(ledger_of(config)) == []
        fcntl.flock(file, fcntl.LOCK_UN)
        assert waiting.result(timeout=60).opening.number == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.iloc[1:], r"predicted by 4 models of each of \[3\] slices, found 3"),
        (lambda rows: rows.assign(fold=rows["fold"] * 7), "predicted by 4 models .* found 2"),
        (lambda rows: rows.assign(probability=rows["probability"].mask(rows.index == 5)), "found 3"),
        (lambda rows: rows[rows["study_id"] == rows["study_id"].iloc[0]], "0 are not sealed; .* lost a class"),
        (lambda rows: rows.replace({"study_id": {rows["study_id"].iloc[0]: "x"}}), "1 are not sealed"),
    ],
    ids=["a slice is missing", "another fold", "no number", "one class", "another study"],
)
def test_a_holdout_table_with_gaps_is_refused_and_opens_nothing(finish, change, message):
    config, _, folder = finish(slice_counts=(3,))
    change(pd.read_parquet(folder / "holdout.parquet")).to_parquet(folder / "holdout.parquet")
    edit_result(folder, hashes=table_hashes(folder))
    with pytest.raises(UnsealError, match=message):
        unseal(config, folder)
    assert not ledger_of(config).exists()


def test_a_target_that_no_threshold_reaches_opens_nothing(finish):
    config, _, folder = finish()
    outside = pd.read_parquet(folder / "out_of_fold.parquet")
    wrong = outside.assign(probability=1.0 - outside["label"], study_probability=1.0 - outside["label"])
    wrong.to_parquet(folder / "out_of_fold.parquet")
    strict = {"threshold_criterion": "npv", "threshold_target": 1.0}
    told = StudyResult.load(folder / "result.json").config
    edit_result(folder, hashes=table_hashes(folder), config=told | {"evaluation": told["evaluation"] | strict})
    with pytest.raises(ValueError, match="no threshold reaches npv 1"):
        unseal(config, folder)
    assert not ledger_of(config).exists()


@pytest.mark.parametrize("name", ["holdout", "out_of_fold"])
def test_a_table_that_was_changed_after_the_result_is_refused_and_opens_nothing(finished, name):
    config, _, folder = finished
    table = pd.read_parquet(folder / f"{name}.parquet")
    table.assign(probability=1 - table["probability"]).to_parquet(folder / f"{name}.parquet")
    with pytest.raises(FinishedError, match=rf"{name}.parquet is not the table that result.json was made with"):
        unseal(config, folder)
    assert not ledger_of(config).exists()


def test_a_result_that_names_no_tables_is_refused(finished):
    """Such as one that was saved before its tables were part of it."""
    config, _, folder = finished
    result = StudyResult.load(folder / "result.json")
    kept = {name: value for name, value in result.hashes.items() if name not in table_hashes(folder)}
    result.model_copy(update={"hashes": kept}).save(folder / "result.json")
    with pytest.raises(FinishedError, match="is not the table"):
        unseal(config, folder)


def test_the_result_decides_how_it_is_judged(finished):
    """Another rule, seed, split or level on the command line changes no figure and draws nothing."""
    config, study, folder = finished
    changes = {
        "recipe": config.recipe.model_copy(update={"study_rule": "mean"}),
        "seeds": (7,),
        "slice_counts": (1, 3),
        "split": config.split.model_copy(update={"seed": 5, "folds": 3}),
        "evaluation": config.evaluation.model_copy(update={"interval_level": 0.6, "seed": 9}),
    }
    first = unseal(config, folder).slice_counts
    assert unseal(config.model_copy(update=changes), folder).slice_counts == first
    assert [path.name for path in study.split.folder.parent.iterdir()] == [study.split.folder.name]


def test_another_rewrite_of_the_questionnaire_is_the_same_holdout(finished, tmp_path):
    """One byte more used to commit the split again, with a ledger that knew of no opening."""
    config, study, folder = finished
    unseal(config, folder)
    told = (folder / "unsealed-01.json").read_bytes()
    again = rewritten(config, tmp_path)
    assert seal(again).split.folder == study.split.folder
    assert unseal(again, folder).opening.number == 2
    assert (folder / "unsealed-01.json").read_bytes() == told
    assert len(list(study.split.folder.parent.iterdir())) == 1


def test_an_overlapping_split_of_the_study_says_that_it_was_opened(finished):
    config, study, folder = finished
    other = config.model_copy(update={"split": config.split.model_copy(update={"seed": 1})})
    assert seal(other).statements == ()
    unseal(config, folder)
    drawn = seal(other)
    shared = sealed_studies(study.split) & sealed_studies(drawn.split)
    assert 0 < len(shared) < len(sealed_studies(study.split))
    assert drawn.statements == (
        f"{len(shared)} sealed exam(s) were opened before, for another study or in another split: the hold-out is not "
        "untouched.",
    )
    assert prepare(other).statements == drawn.statements
    assert seal(config).statements == ()


@pytest.mark.parametrize(("seed", "number"), [(1, 2), (None, 1)], ids=["shares exams", "shares none"])
def test_an_opening_counts_those_of_other_splits_that_share_an_exam(finished, seed, number):
    config, study, folder = finished
    unseal(config, folder)
    seeds = range(1, 100) if seed is None else [seed]
    others = (seal(config.model_copy(update={"split": config.split.model_copy(update={"seed": s})})) for s in seeds)
    split = next(
        other.split
        for other in others
        if bool(sealed_studies(other.split) & sealed_studies(study.split)) == (number == 2)
    )
    edit_result(folder, hashes={"split": split.split_hash}, holdout_commitment=split.holdout_commitment)
    predictions = pd.read_parquet(folder / "holdout.parquet")
    names = dict(zip(sorted(sealed_studies(study.split)), sorted(sealed_studies(split)), strict=True))
    predictions.assign(study_id=predictions["study_id"].map(names)).to_parquet(folder / "holdout.parquet")
    edit_result(folder, hashes=table_hashes(folder))
    opening = unseal(config, folder).opening
    assert (opening.line, opening.number) == (2, number)
    assert (folder / "unsealed-02.json").is_file()


def test_an_answer_changed_after_the_scores_were_known_is_refused_and_opens_nothing(finished, tmp_path):
    config, study, folder = finished
    flipped = min(sealed_studies(study.split))

    def flip(rows):
        return rows.assign(pain_now=rows["pain_now"].where(rows["study_id"] != flipped, 1 - rows["pain_now"]))

    with pytest.raises(UnsealError, match="holds other rows than when the result was made"):
        unseal(rewritten(config, tmp_path, flip), folder)
    assert not ledger_of(config).exists()


def test_a_sealed_exam_without_a_label_is_refused_and_opens_nothing(finished, tmp_path):
    config, study, folder = finished
    lost = min(sealed_studies(study.split))
    changed = rewritten(config, tmp_path, lambda rows: rows[rows["study_id"] != lost])
    with pytest.raises(UnsealError, match="holds other rows than when the result was made"):
        unseal(changed, folder)
    assert not ledger_of(config).exists()


def test_a_result_whose_split_is_gone_is_refused(finished):
    config, study, folder = finished
    shutil.rmtree(study.split.folder)
    with pytest.raises(FinishedError, match=r"no split under .* is the one that the result was made with"):
        unseal(config, folder)
    assert not study.split.folder.exists()
    assert not ledger_of(config).exists()


def test_a_result_of_another_study_is_refused(finished):
    config, _, folder = finished
    with pytest.raises(FinishedError, match="is a result of study small, the configuration is of other"):
        unseal(config.model_copy(update={"name": "other"}), folder)


def test_a_study_without_holdout_has_nothing_to_open(finished):
    config, _, folder = finished
    bare = config.model_copy(update={"split": config.split.model_copy(update={"holdout_fraction": 0.0})})
    split = seal(bare).split
    edit_result(folder, hashes={"split": split.split_hash}, holdout_commitment=split.holdout_commitment)
    with pytest.raises(UnsealError, match="nothing to open"):
        unseal(bare, folder)


def test_a_folder_that_is_no_result_is_named(data, tmp_path):
    with pytest.raises(FinishedError, match=r"nowhere is no result \(no result.json\)"):
        unseal(study_config(data, tmp_path), tmp_path / "nowhere")
