"""MLflow and W&B: told of each committed trial and of the study's result, offline first.

Both are told from the driver, from files that are committed, once: what a killed run did not tell, the next one tells.
They get parameters, learning curves and metrics; no exam, no patient and no path but that of a weights file.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
from ray import tune
from ray.dashboard.modules.job.utils import redact_url_password

from lbp_ray.finished import RESULT_FILE
from lbp_ray.result import StudyResult
from lbp_ray.runs import RunError
from preprocess.commit import write_atomic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from lbp_ray.cell import TrialPlace, TrialSpec

EXPERIMENT = "lbp_ray"
"""Project of all studies in W&B; in MLflow each study is an experiment of its own."""

MOST_PARAMETERS, MOST_METRICS = 100, 1000
"""What MLflow takes in one call."""

MODULES = {"mlflow": ("mlflow", "sqlalchemy", "alembic"), "wandb": ("wandb",)}
"""What each tracker imports; MLflow keeps a local store in SQLite, which its small distribution cannot alone."""


@dataclass(frozen=True)
class Told:
    """What a tracker is told: one trial, or the result of a study."""

    study: str
    kind: str
    """``trial`` or ``result``."""
    name: str
    """Of the folder that it was read from, which holds its content address."""
    parameters: Mapping[str, Any]
    curve: Sequence[Mapping[str, float]]
    """Metrics of each epoch; of a result, its only ones."""


def tell_mlflow(told: Told, folder: Path) -> None:
    """Add a run to MLflow: to SQLite below `folder`, or where ``MLFLOW_TRACKING_URI`` says."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    mlflow: Any = importlib.import_module("mlflow")
    entities: Any = importlib.import_module("mlflow.entities")
    server = os.environ.get("MLFLOW_TRACKING_URI")
    client = mlflow.MlflowClient(server or f"sqlite:///{folder / 'mlflow.db'}")
    known = client.get_experiment_by_name(told.study)
    place = {} if server else {"artifact_location": (folder / "artifacts").as_uri()}  # else in the working directory
    experiment = known.experiment_id if known else client.create_experiment(told.study, **place)
    run = client.create_run(experiment, run_name=told.name, tags={"lbp_ray.kind": told.kind}).info.run_id
    parameters = [entities.Param(name, str(value)) for name, value in told.parameters.items()]
    for part in _parts(parameters, MOST_PARAMETERS):
        client.log_batch(run, params=part)
    now_ms = int(1000 * time.time())
    metrics = [
        entities.Metric(name, value, now_ms, step)
        for step, values in enumerate(told.curve, 1)
        for name, value in values.items()
    ]
    for part in _parts(metrics, MOST_METRICS):
        client.log_batch(run, metrics=part)
    client.set_terminated(run)


def _parts(items: list[Any], size: int) -> list[list[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def tell_wandb(told: Told, folder: Path) -> None:
    """Add a run to W&B: to `folder`, to be sent by ``wandb sync``, unless ``WANDB_MODE`` says ``online``."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    wandb: Any = importlib.import_module("wandb")
    quiet = {"console": "off", "silent": True, "disable_git": True, "disable_code": True}
    run = wandb.init(
        project=EXPERIMENT,
        group=told.study,
        job_type=told.kind,
        name=told.name,
        config=dict(told.parameters),
        dir=str(folder.parent),  # W&B makes a folder of its name in it
        mode=os.environ.get("WANDB_MODE", "offline"),
        reinit="create_new",
        settings=wandb.Settings(**quiet, x_disable_stats=True, x_disable_meta=True),
    )
    for step, values in enumerate(told.curve, 1):
        run.log(dict(values), step=step)
    run.finish()


TELL: dict[str, Callable[[Told, Path], None]] = {"mlflow": tell_mlflow, "wandb": tell_wandb}
"""Tracker → what tells it."""


def require(names: Iterable[str]) -> None:
    """Refuse trackers that are not installed, before anything is computed.

    Raises
    ------
    RunError
        Naming the tracker and what is missing.
    """
    for name in names:
        missing = [module for module in MODULES[name] if importlib.util.find_spec(module) is None]
        if missing:
            msg = (
                f"compute.trackers: {name} needs {', '.join(missing)}, not installed here; "
                "run pip install -e '.[tracking]' in the clone, or take it out of compute.trackers"
            )
            raise RunError(msg)


def trial_told(study: str, spec: TrialSpec, place: TrialPlace) -> Told:
    """Read back a committed trial: its cell and recipe, and its learning curve."""
    history = pd.read_parquet(place.final / "history.parquet").select_dtypes("number")
    curve = [{str(name): float(value) for name, value in row.dropna().items()} for _, row in history.iterrows()]
    parameters = {"trial_id": spec.trial_id, **spec.cell.model_dump(), **spec.recipe.model_dump()}
    return Told(study, "trial", place.final.name, parameters, curve)


def result_told(result_folder: Path) -> Told:
    """Read back a result: its configuration, and each metric of each slice count with its interval."""
    result = StudyResult.load(result_folder / RESULT_FILE)
    metrics: dict[str, float] = {}
    for item in result.slice_counts:
        for metric in item.metrics:
            name = f"k{item.num_slices}/{metric.name}"
            metrics[name] = metric.estimate
            if metric.interval is not None:
                metrics |= {f"{name}_low": metric.interval.low, f"{name}_high": metric.interval.high}
    parameters = {**flat(result.config), "optimistic": result.optimistic, "result_hash": result.result_hash}
    return Told(result.name, "result", result_folder.name, parameters, [metrics])


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn sections into dotted names: ``recipe.threads``."""
    pairs: dict[str, Any] = {}
    for name, value in config.items():
        pairs |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return pairs


class Trackers(tune.Callback):
    """Tells each tracker of what is committed; one that fails stops nothing and is left alone until the next run.

    Parameters
    ----------
    names
        Keys of `TELL`.
    study
        Name of the study.
    root
        The study's own folder; each tracker has one of its name in it.
    cells
        Every trial of the study, by its name.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        study: str,
        root: Path,
        cells: Mapping[str, tuple[TrialSpec, TrialPlace]],
    ) -> None:
        self._folders = {name: root / name for name in names}
        self._study, self._cells = study, cells

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:  # noqa: ANN401
        """Tell of a trial as soon as it is committed."""
        self.tell_trial(str(trial))

    def tell_trial(self, name: str) -> None:
        """Tell of a trial, if it is committed."""
        spec, place = self._cells[name]
        if place.is_complete:
            self._tell(place.final.name, lambda: trial_told(self._study, spec, place))

    def tell_result(self, result_folder: Path) -> None:
        """Tell of every committed trial that was not told, then of the study's result."""
        for name in self._cells:
            self.tell_trial(name)
        self._tell(result_folder.name, lambda: result_told(result_folder))

    def _tell(self, name: str, read: Callable[[], Told]) -> None:
        for tracker, folder in list(self._folders.items()):
            marker = folder / "told" / name
            if marker.is_file():
                continue
            try:
                folder.mkdir(parents=True, exist_ok=True)
                TELL[tracker](read(), folder)
                write_atomic(marker, b"")
            except Exception as error:  # whatever a tracker raises, the study matters more
                del self._folders[tracker]  # a server that does not answer takes minutes to say so, each time
                why = redact_url_password(str(error))
                sys.stderr.write(f"{tracker} was not told of {name} and is left alone, the next run goes on: {why}\n")
