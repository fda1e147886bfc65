from __future__ import annotations

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from study_factory import make_data, make_spec, random_backbone, with_features

from lbp_ray.cell import TrialPlace
from lbp_ray.nets.resnet import NUM_FEATURES, TwoLogits, build_two_logit_head, load_head
from lbp_ray.resident import Resident
from lbp_ray.selection import EpochRecord, chosen_epochs, draw_inner, epochs_to_keep, has_stalled, mcc_at_youden
from lbp_ray.study import Recipe
from lbp_ray.training import Training
from lbp_ray.trial import run_trial

FOLDS = [0, 0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, -1, -1]
LITERAL = {"selection": "same_fold", "frozen_epochs": 6, "learning_rate": 1e-3}


def curve(losses, mccs, frozen=100):
    return [
        EpochRecord(epoch, "frozen" if epoch <= frozen else "unfrozen", 1e-4, 0.5, loss, 0.5, loss, mcc)
        for epoch, (loss, mcc) in enumerate(zip(losses, mccs, strict=True), 1)
    ]


CASES = {
    "largest MCC up to the lowest loss": ([0.7, 0.5, 0.4, 0.6], [0.1, 0.3, 0.2, 0.9], {}, [2]),
    "the epoch of lowest loss itself may be it": ([0.7, 0.5, 0.4, 0.6], [0.1, 0.2, 0.3, 0.9], {}, [3]),
    "ties go to the later epoch": ([0.7, 0.5, 0.4, 0.6], [0.3, 0.3, 0.2, 0.9], {}, [2]),
    "equal losses: the first bounds": ([0.5, 0.4, 0.4], [0.1, 0.2, 0.9], {}, [2]),
    "best of several": ([0.7, 0.5, 0.4, 0.6], [0.1, 0.3, 0.2, 0.9], {"checkpoint_top_k": 2}, [2, 3]),
    "fewer epochs than wanted": ([0.4, 0.5], [0.1, 0.9], {"checkpoint_top_k": 5}, [1]),
    "lowest loss": ([0.7, 0.4, 0.5], [0.9, 0.1, 0.2], {"checkpoint": "min_loss"}, [2]),
    "lowest losses, wherever": ([0.7, 0.4, 0.5], [0, 0, 0], {"checkpoint": "min_loss", "checkpoint_top_k": 2}, [2, 3]),
}


@pytest.mark.parametrize(("losses", "mccs", "recipe", "expected"), CASES.values(), ids=CASES)
def test_choice_of_epochs(losses, mccs, recipe, expected):
    assert chosen_epochs(curve(losses, mccs), Recipe(selection="same_fold", **recipe)) == expected


def test_fixed_epochs_take_the_last_whatever_the_curve():
    assert chosen_epochs(curve([0.1, 0.9], [0.9, 0.1]), Recipe()) == [2]


@pytest.mark.parametrize("checkpoint", ["best_mcc", "min_loss"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_what_is_chosen_in_the_end_was_kept_all_along(checkpoint, top_k):
    recipe = Recipe(selection="same_fold", checkpoint=checkpoint, checkpoint_top_k=top_k)
    generator = np.random.default_rng(0)
    for _ in range(200):
        history = curve(generator.integers(0, 5, 12) / 10, generator.integers(0, 5, 12) / 10)
        kept: set[int] = set()
        for epoch in range(1, 13):
            kept = (kept | {epoch}) & epochs_to_keep(history[:epoch], recipe)
        assert set(chosen_epochs(history, recipe)) <= kept
        assert len(kept) <= 2 * top_k


def test_training_stops_when_unfrozen_epochs_stall():
    losses = [0.9, 0.1, 0.5, 0.4, 0.45, 0.41]  # two frozen epochs first: their losses do not count
    history = curve(losses, [0] * 6, frozen=2)
    assert [has_stalled(history[:count], 2) for count in range(7)] == [False] * 6 + [True]
    assert not has_stalled(history, None)


def test_inner_patients_are_whole_and_of_both_classes():
    patients = np.repeat(np.arange(40), 2)
    labels = np.tile([0.0, 0.0, 0.0, 1.0], 20)  # every other patient has one positive exam
    drawn = draw_inner(patients, labels, fraction=0.1, seed=(0, 3))
    assert (drawn[::2] == drawn[1::2]).all()
    assert [len(set(patients[drawn & (labels == 1)])), drawn.sum()] == [2, 8]
    assert (drawn == draw_inner(patients, labels, fraction=0.1, seed=(0, 3))).all()
    assert (drawn != draw_inner(patients, labels, fraction=0.1, seed=(1, 3))).any()


def test_mcc_at_its_own_threshold():
    labels, scores = np.array([0, 0, 0, 1, 1]), np.array([0.1, 0.2, 0.6, 0.6, 0.7])
    assert mcc_at_youden(labels, scores) == pytest.approx(2 / 3)  # 0.6: tp 2, fp 1, tn 2, fn 0


def test_two_logits_are_a_softmax():
    head = build_two_logit_head(seed=3)
    features = torch.randn(4, NUM_FEATURES)
    softmax = torch.softmax(torch.nn.functional.linear(features, head.weight, head.bias), dim=1)[:, 1]
    torch.testing.assert_close(torch.sigmoid(head(features))[:, 0], softmax)
    assert isinstance(load_head(head.state_dict()), TwoLogits)


@pytest.fixture(scope="module")
def backbone():
    return random_backbone()


@pytest.fixture(scope="module")
def data(backbone):
    return with_features(make_data(FOLDS), backbone)


def place_of(folder, **kept):
    return TrialPlace(folder / "final", folder / "checkpoint.pt", **kept)


def test_a_chosen_frozen_epoch_scores_as_if_training_had_ended_there(data, backbone, tmp_path, monkeypatch):
    monkeypatch.setattr("lbp_ray.training.chosen_epochs", lambda *_: [2])
    monkeypatch.setattr("lbp_ray.training.epochs_to_keep", lambda *_: {2})
    list(run_trial(make_spec(**LITERAL), data, Resident(copy.deepcopy(backbone)), place_of(tmp_path / "a")))
    short = make_spec(**(LITERAL | {"selection": "fixed_epochs", "frozen_epochs": 2, "unfrozen_epochs": 0}))
    monkeypatch.undo()
    list(run_trial(short, data, Resident(copy.deepcopy(backbone)), place_of(tmp_path / "b")))
    for name in ("out_of_fold", "holdout"):
        one, other = (pd.read_parquet(tmp_path / folder / "final" / f"{name}.parquet") for folder in "ab")
        pd.testing.assert_frame_equal(one, other)


def test_several_chosen_epochs_are_averaged(data, backbone, tmp_path):
    spec = make_spec(**LITERAL, checkpoint="min_loss", checkpoint_top_k=3)
    training = Training(spec, data, Resident(copy.deepcopy(backbone)))
    list(training.epochs(tmp_path / "c.pt"))
    each = []
    for epoch in training.scoring_epochs:
        training._restore(epoch)
        each.append(1 / (1 + np.exp(-training.logits(training.validation))))
    assert len(each) == 3
    np.testing.assert_allclose(training.probabilities(training.validation), np.mean(each, axis=0), rtol=1e-12)


def test_selection_resumes_to_the_same_bytes(data, backbone, tmp_path):
    spec = make_spec(**LITERAL, unfrozen_epochs=3)
    tables = []
    for stop in (None, 7, 8):
        folder = tmp_path / str(stop)
        trial = run_trial(spec, data, Resident(copy.deepcopy(backbone)), place_of(folder, keep_model=True))
        for _ in range(stop or 0):
            next(trial)
        trial.close()
        list(run_trial(spec, data, Resident(copy.deepcopy(backbone)), place_of(folder, keep_model=True)))
        tables.append([(folder / "final" / f"{name}.parquet").read_bytes() for name in ("out_of_fold", "history")])
    assert tables[0] == tables[1] == tables[2]


def test_inner_patients_neither_train_nor_leave_the_training_folds(data, backbone):
    spec = make_spec(selection="inner_validation", inner_fraction=0.3)
    training = Training(spec, data, Resident(copy.deepcopy(backbone)))
    train, inner = set(training.train.study_M), set(training.selecting.study_M)
    assert not train & inner
    assert train | inner == set(np.flatnonzero(data.folds_N == 1))


def test_inner_validation_does_not_read_the_evaluated_fold(data, backbone, tmp_path):
    spec = make_spec(selection="inner_validation", inner_fraction=0.3, frozen_epochs=6, learning_rate=1e-3)
    flipped = np.where(data.folds_N == 0, 1 - data.labels_N, data.labels_N)
    tables = []
    for name, labels in (("as_it_is", data.labels_N), ("flipped", flipped)):
        other = type(data)(**{**vars(data), "labels_N": labels})
        list(run_trial(spec, other, Resident(copy.deepcopy(backbone)), place_of(tmp_path / name)))
        tables.append(pd.read_parquet(tmp_path / name / "final" / "out_of_fold.parquet"))
    pd.testing.assert_frame_equal(*tables)


def test_same_fold_selection_does(data, backbone, tmp_path):
    flipped = np.where(data.folds_N == 0, 1 - data.labels_N, data.labels_N)
    chosen = []
    for labels in (data.labels_N, flipped):
        training = Training(
            make_spec(**LITERAL), type(data)(**{**vars(data), "labels_N": labels}), Resident(copy.deepcopy(backbone))
        )
        list(training.epochs(tmp_path / "c.pt"))
        (tmp_path / "c.pt").unlink(missing_ok=True)
        chosen.append([record.selection_mcc for record in training.history])
    assert chosen[0] != chosen[1]
