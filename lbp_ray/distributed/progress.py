"""What a study shows while its trials run: counts, slices per second and remaining time, on the console and as gauges.

A cell's name, its epoch and means over its fold are all that is shown; nothing here knows an exam or a patient.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter, defaultdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO, get_args

from ray import tune
from ray.util.metrics import Gauge

from lbp_ray.distributed.tuning import reason_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lbp_ray.selection import Stage

State = Literal["done", "failed", "running", "to do"]
"""Of a trial, in the order in which people read them."""

REDRAW_S = 0.5
"""Least time between two drawings of the table on a terminal, in seconds."""

QUIET_S = 60.0
"""After so many seconds without a line, a log is told of an epoch, so that long trials give a sign of life."""

MAX_ROWS = 12
"""Running trials that the table names; the others are counted."""


class Tally:
    """The state of a study's trials, what they last reported and what their epochs cost.

    Parameters
    ----------
    num_slices
        Slice count of each trial that is to run, by its name; an epoch costs in proportion to it.
    epochs
        Planned epochs of a trial, by stage.
    done
        Trials that earlier runs committed.
    """

    def __init__(self, num_slices: Mapping[str, int], epochs: Mapping[Stage, int], *, done: int = 0) -> None:
        self._num_slices, self._epochs, self._done_before = num_slices, epochs, done
        self._states: dict[str, State] = dict.fromkeys(num_slices, "to do")
        self.latest: dict[str, dict[str, Any]] = {}
        """Last report of each running trial."""
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._units: Counter[str] = Counter()
        self._at_once = 1

    @property
    def total(self) -> int:
        """Trials of the study."""
        return self._done_before + len(self._states)

    @property
    def counts(self) -> dict[State, int]:
        """Trials in each state."""
        found = Counter(self._states.values())
        found["done"] += self._done_before
        return {state: found[state] for state in get_args(State)}

    @property
    def running(self) -> list[str]:
        """Names of the running trials."""
        return [name for name, state in self._states.items() if state == "running"]

    def move(self, name: str, state: State) -> None:
        """Note that a trial has started, is done, has failed for good, or waits again after a failure."""
        if state == "to do":
            self._at_once = 1  # a node may be lost: as many as before may never run again
        self._states[name] = state
        self.latest.pop(name, None)
        self._at_once = max(self._at_once, len(self.running))

    def report(self, name: str, record: dict[str, Any]) -> None:
        """Note an epoch; one that was trained before this run has no seconds and costs nothing."""
        self.latest[name] = record
        if record["seconds"] > 0:
            self._seconds[record["stage"]] += record["seconds"]
            self._units[record["stage"]] += self._num_slices[name]

    @property
    def slices_per_second(self) -> dict[str, float]:
        """Speed of each stage: of all running trials together, as of the latest epoch of each."""
        speeds = dict.fromkeys(self._epochs, 0.0)
        for record in self.latest.values():
            if record["seconds"] > 0:
                speeds[record["stage"]] += record["slices"] / record["seconds"]
        return {str(stage): speed for stage, speed in speeds.items()}

    @property
    def seconds_left(self) -> float | None:
        """Estimate of the time until the last trial is done; None before an epoch of every stage was measured."""
        waiting = [name for name, state in self._states.items() if state in ("running", "to do")]
        rests = [self._rest(name) for name in waiting]
        known = [rest for rest in rests if rest is not None]
        if len(known) < len(rests):
            return None
        return max([sum(known) / self._at_once, *known]) if known else 0.0

    def _rest(self, name: str) -> float | None:
        """Seconds that one trial still takes."""
        passed, rest = self.latest.get(name, {}).get("epoch", 0), 0.0
        for stage, planned in self._epochs.items():
            left = max(0, planned - passed)
            passed = max(0, passed - planned)
            if left and not self._units[stage]:
                return None
            if left:
                rest += left * self._num_slices[name] * self._seconds[stage] / self._units[stage]
        return rest


def status(tally: Tally) -> str:
    """Return one line: trials in each state, slices per second and remaining time."""
    counts = ", ".join(f"{number} {state}" for state, number in tally.counts.items())
    speeds = ", ".join(f"{stage} {_speed(speed)}" for stage, speed in tally.slices_per_second.items() if speed)
    return f"{counts}; slices/s: {speeds or 'not known yet'}; time left: {_duration(tally.seconds_left)}"


def table(tally: Tally, elapsed_s: float) -> list[str]:
    """Return the rows of the table that a terminal shows: the study, then the running trials."""
    speeds = tally.slices_per_second
    head = [*tally.counts, *(f"slices/s {stage}" for stage in speeds), "elapsed", "time left"]
    values = [*map(str, tally.counts.values()), *(_speed(speed) if speed else "-" for speed in speeds.values())]
    values += [_duration(elapsed_s), _duration(tally.seconds_left)]
    widths = [max(len(name), len(value)) for name, value in zip(head, values, strict=True)]
    rows = ["  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)) for cells in (head, values)]
    running = tally.running
    rows += [f"  {name}  {_epoch(tally.latest.get(name))}" for name in running[:MAX_ROWS]]
    return [*rows, f"  and {len(running) - MAX_ROWS} more"] if len(running) > MAX_ROWS else rows


def _epoch(record: dict[str, Any] | None) -> str:
    return "starting" if record is None else f"{record['stage']} epoch {record['epoch']}: {_describe(record)}"


def _describe(record: dict[str, Any]) -> str:
    return (
        f"train loss {record['train_loss']:.3f}, validation loss {record['validation_loss']:.3f}, "
        f"validation AUC {record['validation_auc']:.3f}"
    )


def _speed(slices_per_second: float) -> str:
    return f"{slices_per_second:,.0f}" if slices_per_second >= 100 else f"{slices_per_second:.3g}"


def _duration(seconds: float | None) -> str:
    return "not known yet" if seconds is None else str(timedelta(seconds=round(seconds)))


class Console:
    """A stream of lines, below which a terminal keeps a table; None takes neither."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.redraws = stream is not None and stream.isatty()
        """Whether the table is drawn; a log has lines only."""
        self._height = 0

    def line(self, text: str) -> None:
        """Write a line that stays."""
        self._write(f"{text}\n", height=0)

    def table(self, rows: Sequence[str]) -> None:
        """Draw the table over the one before; rows are cut, because a wrapped one would be two to go back over."""
        if self.redraws:
            width = shutil.get_terminal_size().columns - 1
            self._write("".join(f"{row[:width]}\n" for row in rows), height=len(rows))

    def _write(self, text: str, *, height: int) -> None:
        if self._stream is not None:
            back = f"\x1b[{self._height}F\x1b[J" if self._height else ""
            try:
                self._stream.write(back + text)
                self._stream.flush()
            except (OSError, ValueError):  # a terminal or pipe that is gone, letters that it does not know
                self._stream, self.redraws = None, False
            self._height = height


class Progress(tune.Callback):
    """Tells the console and the metrics endpoint of every change that Tune sees.

    Parameters
    ----------
    tally
        The trials, none of them started.
    study
        Name of the study, a label of its gauges.
    stream
        Where the console writes; None is silent, the gauges are set all the same.
    """

    def __init__(self, tally: Tally, *, study: str, stream: TextIO | None) -> None:
        self._tally, self._tags, self._console = tally, {"study": study}, Console(stream)
        self._begun_s = self._drawn_s = self._told_s = time.monotonic()
        keys = ("study",)
        self._trials = Gauge("lbp_ray_trials", "Trials of a study, by state", tag_keys=(*keys, "state"))
        self._speed = Gauge(
            "lbp_ray_slices_per_second",
            "Slices that all running trials of a study train on or score, by stage",
            tag_keys=(*keys, "stage"),
        )
        self._left = Gauge("lbp_ray_seconds_left", "Estimated seconds until a study's trials are done", tag_keys=keys)

    def setup(self, *_: Any, **__: Any) -> None:  # noqa: ANN401
        """Export the counts before the first trial starts."""
        self._changed()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:  # noqa: ANN401
        """Count a trial as running."""
        self._move(trial, "running", "" if self._console.redraws else "started")

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:  # noqa: ANN401
        """Take an epoch that a trial has reported."""
        self._tally.report(str(trial), result)
        self._changed()
        if not self._console.redraws and time.monotonic() - self._told_s > QUIET_S:
            self._tell(f"{trial} at {_epoch(result)}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:  # noqa: ANN401
        """Count a finished trial and print its last epoch."""
        last = trial.last_result
        self._move(trial, "done", f"done after {last['epoch']} epochs: {_describe(last)}")

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:  # noqa: ANN401
        """Say why a trial starts again."""
        self._move(trial, "to do", f"failed and will be started again: {_reason(trial)}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:  # noqa: ANN401
        """Say why a trial failed for good."""
        self._move(trial, "failed", f"failed for good: {_reason(trial)}")

    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:  # noqa: ANN401
        """Redraw the table, so that its times go on between two changes."""
        if time.monotonic() - self._drawn_s > REDRAW_S:
            self._draw()

    def on_experiment_end(self, trials: list[Any], **_: Any) -> None:  # noqa: ANN401
        """Leave the table as it stands at the end."""
        self._draw()

    def _move(self, trial: Any, state: State, told: str) -> None:  # noqa: ANN401  (Tune does not type its trials)
        self._tally.move(str(trial), state)
        self._changed()
        if told:
            self._tell(f"{trial} {told}")

    def _tell(self, text: str) -> None:
        self._told_s = time.monotonic()
        if self._console.redraws:
            self._console.line(text)
            self._draw()
        else:
            self._console.line(f"{text} | {status(self._tally)}")

    def _draw(self) -> None:
        self._drawn_s = time.monotonic()
        self._console.table(table(self._tally, self._drawn_s - self._begun_s))

    def _changed(self) -> None:
        for state, number in self._tally.counts.items():
            self._trials.set(number, tags=self._tags | {"state": state})
        for stage, speed in self._tally.slices_per_second.items():
            self._speed.set(speed, tags=self._tags | {"stage": stage})
        self._left.set(self._tally.seconds_left, tags=self._tags)


def _reason(trial: Any) -> str:  # noqa: ANN401
    """Return the gist of a trial's error, which Tune writes beside the driver first."""
    file = trial.error_file
    text = Path(file).read_text() if file and Path(file).is_file() else ""
    return reason_of(text.rpartition("Failure # ")[2])  # of the last of several
