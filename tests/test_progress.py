"""What a study shows while it runs: counts, slices per second and remaining time, drawn or written line by line."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace

import pytest
from ray import tune
from ray.exceptions import OutOfMemoryError
from study_factory import make_data, make_spec, random_backbone, with_features

from lbp_ray.cell import TrialPlace
from lbp_ray.distributed import progress, worker
from lbp_ray.distributed.progress import Console, Progress, Tally, status, table
from lbp_ray.distributed.tuning import reason_of, run_trials
from lbp_ray.resident import Resident

EPOCHS = {"frozen": 10, "unfrozen": 2}


def record(epoch, seconds, *, stage="frozen", slices=100):
    losses = {"train_loss": 0.5, "validation_loss": 0.6, "validation_auc": 0.7}
    return {"epoch": epoch, "stage": stage, "slices": slices, "seconds": seconds, **losses}


def tally(*names, done=0):
    return Tally({name: int(name[1]) for name in names}, EPOCHS, done=done)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def trial(name, *, error_file=None, last=None):
    named = SimpleNamespace(last_result=last, error_file=error_file)
    return type("Trial", (SimpleNamespace,), {"__str__": lambda self: name})(**vars(named))


@pytest.fixture
def exported(monkeypatch):
    """Let gauges write into a dictionary: (name, values of its labels) → value."""
    values = {}

    class Gauge:
        def __init__(self, name, description, tag_keys):
            self.name, self.keys = name, tag_keys

        def set(self, value, tags=None):
            tags = tags or {}
            assert set(tags) == set(self.keys)
            values[self.name, *tags.values()] = value

    monkeypatch.setattr(progress, "Gauge", Gauge)
    return values


def test_counts_follow_the_trials_and_sum_to_the_study():
    study = tally("k1-a", "k1-b", "k3-a", done=5)
    for name, state in [("k1-a", "running"), ("k1-b", "running"), ("k1-a", "done"), ("k1-b", "failed")]:
        study.move(name, state)
    assert study.counts == {"done": 6, "failed": 1, "running": 0, "to do": 1}
    assert sum(study.counts.values()) == study.total


def test_speed_adds_what_runs_now_stage_by_stage():
    study = tally("k1-a", "k1-b", "k1-c")
    for name, last in [
        ("k1-a", record(1, 2.0)),
        ("k1-b", record(2, 4.0)),
        ("k1-c", record(11, 50.0, stage="unfrozen")),
    ]:
        study.move(name, "running")
        study.report(name, last)
    assert study.slices_per_second == {"frozen": 75.0, "unfrozen": 2.0}
    study.move("k1-a", "done")
    assert study.slices_per_second["frozen"] == 25.0


def test_time_left_is_not_known_before_each_stage_was_measured():
    study = tally("k1-a", "k1-b")
    study.move("k1-a", "running")
    study.report("k1-a", record(1, 2.0))
    assert study.seconds_left is None
    study.report("k1-a", record(11, 30.0, stage="unfrozen"))
    assert study.seconds_left is not None


def test_time_left_counts_epochs_slices_and_trials_at_once():
    study = tally("k1-a", "k1-b", "k3-a")
    study.move("k1-a", "running")
    study.report("k1-a", record(1, 2.0))
    study.report("k1-a", record(11, 30.0, stage="unfrozen"))
    small, large = 10 * 2 + 2 * 30, 3 * (10 * 2 + 2 * 30)
    assert study.seconds_left == 30 + small + large
    study.move("k1-b", "running")  # two at once from now on, and the largest cannot be shared
    assert study.seconds_left == max((30 + small + large) / 2, large)


def test_all_done_leaves_no_time():
    study = tally("k1-a")
    study.move("k1-a", "running")
    study.move("k1-a", "done")
    assert study.seconds_left == 0
    assert status(study).startswith("1 done, 0 failed, 0 running, 0 to do; ")


def test_epochs_of_an_earlier_run_are_no_speed():
    study = tally("k1-a")
    study.move("k1-a", "running")
    study.report("k1-a", record(10, 0.0, slices=0))
    assert study.slices_per_second == {"frozen": 0.0, "unfrozen": 0.0}
    study.report("k1-a", record(11, 30.0, stage="unfrozen"))
    assert study.seconds_left == 30


def test_after_a_failure_no_more_trials_at_once_are_expected_than_run():
    study = tally("k1-a", "k1-b")
    for name in ("k1-a", "k1-b"):
        study.move(name, "running")
        study.report(name, record(10, 2.0))
        study.report(name, record(11, 30.0, stage="unfrozen"))
    assert study.seconds_left == 30
    study.move("k1-b", "to do")
    assert study.seconds_left == 30 + 10 * 2 + 2 * 30


def test_table_has_one_row_for_the_study_and_one_per_running_trial():
    study = tally(*(f"k1-{number:02d}" for number in range(20)), done=3)
    for number in range(14):
        study.move(f"k1-{number:02d}", "running")
    study.report("k1-00", record(4, 0.001))
    head, values, first, *others = table(study, 3725.4)
    assert re.split("  +", head.strip())[:4] == ["done", "failed", "running", "to do"]
    assert re.split("  +", values.strip()) == ["3", "0", "14", "6", "100,000", "-", "1:02:05", "not known yet"]
    assert first == "  k1-00  frozen epoch 4: train loss 0.500, validation loss 0.600, validation AUC 0.700"
    assert len(others) == progress.MAX_ROWS
    assert others[-1] == "  and 2 more"


def test_terminal_is_redrawn_in_place_and_rows_are_cut(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    console = Console(Terminal())
    console.table(["a" * 50, "b"])
    console.line("stays")
    console.table(["c"])
    console.table(["d"])
    assert console._stream.getvalue() == f"{'a' * 19}\nb\n\x1b[2F\x1b[Jstays\nc\n\x1b[1F\x1b[Jd\n"


def test_log_has_one_line_per_change_and_no_control_characters(exported):
    stream = io.StringIO()
    console = Progress(tally("k1-a", "k1-b"), study="small", stream=stream)
    console.on_trial_start(0, [], trial("k1-a"))
    for epoch in range(1, 11):
        console.on_trial_result(0, [], trial("k1-a"), record(epoch, 1.0))
        console.on_step_end(0, [])
    console.on_trial_complete(0, [], trial("k1-a", last=record(10, 1.0)))
    console.on_experiment_end([])
    lines = stream.getvalue().splitlines()
    assert [line.split(" | ")[0] for line in lines] == [
        "k1-a started",
        "k1-a done after 10 epochs: train loss 0.500, validation loss 0.600, validation AUC 0.700",
    ]
    assert lines[1].split(" | ")[1].startswith("1 done, 0 failed, 0 running, 1 to do; slices/s: ")
    assert "\x1b" not in stream.getvalue()


def test_long_trial_gives_a_sign_of_life(exported, monkeypatch):
    stream = io.StringIO()
    console = Progress(tally("k1-a"), study="small", stream=stream)
    monkeypatch.setattr(progress, "QUIET_S", 0.0)
    console.on_trial_result(0, [], trial("k1-a"), record(3, 1.0))
    assert stream.getvalue().startswith("k1-a at frozen epoch 3: train loss 0.500")


def test_failures_are_named_with_their_last_line(exported, tmp_path):
    stream = io.StringIO()
    console = Progress(tally("k1-a"), study="small", stream=stream)
    (tmp_path / "error.txt").write_text("Traceback\n  many lines\nTrialError: the loss is not finite\n")
    broken = trial("k1-a", error_file=str(tmp_path / "error.txt"))
    console.on_trial_start(0, [], broken)
    console.on_trial_recover(0, [], broken)
    console.on_trial_error(0, [], broken)
    _, again, failed = stream.getvalue().splitlines()
    assert again.startswith("k1-a failed and will be started again: TrialError: the loss is not finite | 0 done")
    assert failed.startswith("k1-a failed for good: TrialError: the loss is not finite | 0 done, 1 failed")


def test_a_second_failure_is_named_by_its_own_error(exported, tmp_path):
    """Tune appends it to the first one's."""
    stream = io.StringIO()
    first = "Failure # 1 (occurred at noon)\nray.exceptions.OutOfMemoryError: full\n"
    (tmp_path / "error.txt").write_text(f"{first}Failure # 2 (occurred later)\nTrialError: the loss is not finite\n")
    console = Progress(tally("k1-a"), study="small", stream=stream)
    console.on_trial_error(0, [], trial("k1-a", error_file=str(tmp_path / "error.txt")))
    assert "failed for good: TrialError: the loss is not finite" in stream.getvalue()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ("ray.exceptions.OutOfMemoryError: full\nRefer to docs", "its node's memory was full and Ray ended it"),
        ("torch.OutOfMemoryError: CUDA out of memory", "torch.OutOfMemoryError: CUDA out of memory"),
        ("Traceback\nValueError: " + 300 * "x", f"ValueError: {188 * 'x'}"),
        ("\n", "no error was reported"),
    ],
)
def test_reason_of_an_error_is_one_short_line(error, reason):
    assert reason_of(error).partition(" (docs/")[0] == reason
    assert "\n" not in reason_of(error)


class Ends:
    """Instead of Ray Tune: every run commits some of the trials that it is given, then ends as it is told to."""

    def __init__(self, monkeypatch, *ends):
        self.left, self.ends, self.given = ["a", "b", "c"], list(ends), []
        monkeypatch.setattr(tune, "Tuner", lambda *_, param_space, **__: self.begin(param_space["name"]["grid_search"]))

    def begin(self, names):
        self.given.append(names)
        return self

    def fit(self):
        committed, cause = self.ends.pop(0)
        self.left = self.left[committed:]
        if cause is not None:
            raise RuntimeError("Caught unexpected exception") from cause
        return SimpleNamespace(errors=[ValueError("the loss is not finite")] if self.left else [])

    def run(self, tmp_path, retries):
        return run_trials(None, lambda: self.left, storage=tmp_path, callbacks=lambda _: [], retries=retries)


LOST = OutOfMemoryError("full")


@pytest.mark.parametrize(
    ("ends", "given", "reasons"),
    [
        ([(0, LOST), (3, None)], ["abc", "abc"], []),
        ([(1, LOST), (2, None)], ["abc", "bc"], []),
        ([(3, LOST)], ["abc"], []),
        ([(0, LOST), (1, LOST), (0, LOST), (0, LOST)], ["abc", "abc", "bc", "bc"], ["its node's memory was full"]),
        ([(1, None)], ["abc"], ["the loss is not finite"]),
    ],
    ids=["all again", "what is missing", "nothing is missing", "twice in a row and a trial between", "a trial's error"],
)
def test_what_is_missing_begins_again_where_tune_gave_up(monkeypatch, tmp_path, capsys, ends, given, reasons):
    ended = Ends(monkeypatch, *ends)
    assert [reason.partition(" and Ray")[0] for reason in ended.run(tmp_path, retries=1)] == reasons
    assert ["".join(names) for names in ended.given] == given
    assert capsys.readouterr().out.count("begins again") == len(given) - 1


def test_another_error_of_tune_is_no_lost_process(monkeypatch, tmp_path):
    with pytest.raises(RuntimeError, match="unexpected"):
        Ends(monkeypatch, (0, ValueError("a bug"))).run(tmp_path, retries=1)


def test_nothing_missing_starts_nothing(tmp_path):
    assert run_trials(None, list, storage=tmp_path, callbacks=list, retries=0) == []
    assert not list(tmp_path.iterdir())


def test_gauges_say_what_the_console_says_also_when_it_is_silent(exported):
    console = Progress(tally("k1-a", "k1-b", done=4), study="small", stream=None)
    console.setup()
    assert exported["lbp_ray_trials", "small", "to do"] == 2
    console.on_trial_start(0, [], trial("k1-a"))
    console.on_trial_result(0, [], trial("k1-a"), record(1, 4.0))
    console.on_trial_complete(0, [], trial("k1-a", last=record(1, 4.0)))
    states = {key[2]: value for key, value in exported.items() if key[0] == "lbp_ray_trials"}
    assert states == {"done": 5, "failed": 0, "running": 0, "to do": 1}
    assert exported["lbp_ray_slices_per_second", "small", "frozen"] == 0


@pytest.fixture
def worker_of(monkeypatch, exported):
    """Let the worker train small data without Ray, its metrics going into `exported`."""
    resident = Resident(random_backbone())
    data = with_features(make_data([0, 0, 1, 1, 1, 1, -1, -1]), resident.backbone)

    class Counter(progress.Gauge):
        def inc(self, value, tags):
            self.set(exported.get((self.name, *tags.values()), 0) + value, tags)

    gauge = progress.Gauge
    monkeypatch.setattr(worker, "Gauge", lambda name, description, tag_keys=(): gauge(name, description, tag_keys))
    monkeypatch.setattr(worker, "Counter", Counter)
    monkeypatch.setattr(worker, "trial_data", lambda shared: data)
    monkeypatch.setattr(worker, "resident", lambda shared: resident)
    return worker


def test_epochs_count_their_slices_and_those_of_an_earlier_run_do_not(worker_of, exported, tmp_path):
    spec = make_spec(3, frozen_epochs=2, unfrozen_epochs=2)
    place = TrialPlace(tmp_path / "final", tmp_path / "checkpoint.pt")
    killed = worker_of.train_cell(None, spec, place)
    assert [next(killed)["slices"] for _ in range(2)] == [18, 18]  # 6 studies of 3 slices; 2 are sealed
    killed.close()
    again = list(worker_of.train_cell(None, spec, place))
    assert [(record["slices"], record["seconds"] > 0) for record in again] == [
        (0, False),
        (0, False),
        *[(18, True)] * 2,
    ]
    assert [exported["lbp_ray_slices", stage] for stage in ("frozen", "unfrozen")] == [36, 36]
    assert exported[("lbp_ray_gpu_memory_bytes",)] == 0
    whole = list(worker_of.train_cell(None, spec, place))
    assert {record["slices"] for record in whole} == {0}


def test_console_that_is_gone_is_left_alone(exported):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    console = Progress(tally("k1-a"), study="small", stream=Gone())
    console.on_trial_start(0, [], trial("k1-a"))
    console.on_trial_error(0, [], trial("k1-a"))
    assert exported["lbp_ray_trials", "small", "failed"] == 1
