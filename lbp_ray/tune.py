"""The study: plan fold x seed x slice-count trials, run what is missing on Ray Tune, aggregate, report.

``python -m lbp_ray.tune --config configs/demo.yaml [section.key=value ...]``
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune
from tqdm import tqdm

from lbp_ray.aggregate import aggregate
from lbp_ray.cell import Cell, Shared, TrialPlace, TrialSpec
from lbp_ray.config import load_config
from lbp_ray.distributed.extract import ensure_features
from lbp_ray.distributed.waiter import waiting_trial
from lbp_ray.distributed.worker import load_trial_data
from lbp_ray.features import features_id
from lbp_ray.native import native_dtype
from lbp_ray.predict import PREDICTOR_FILE, describe_predictor
from lbp_ray.prepare import Prepared, prepare
from lbp_ray.report import render_console, write_report
from lbp_ray.result import StudyResult
from lbp_ray.runs import RunError, RunPaths
from lbp_ray.study import StudyConfig
from preprocess.commit import write_atomic
from preprocess.job import connect


def plan_trials(config: StudyConfig, *, crops_hash: str, split_hash: str, weights_hash: str) -> list[TrialSpec]:
    """List every trial of a study, in a fixed order. Pure: nothing is read or written.

    Parameters
    ----------
    config
        The study.
    crops_hash, split_hash, weights_hash
        What the trials are computed from.

    Returns
    -------
    list of TrialSpec
        Slice counts x folds x seeds.
    """
    return [
        TrialSpec(
            cell=Cell(num_slices=num_slices, fold=fold, seed=seed),
            recipe=config.recipe,
            crops_hash=crops_hash,
            split_hash=split_hash,
            weights_hash=weights_hash,
        )
        for num_slices in config.slice_counts
        for fold in range(config.split.folds)
        for seed in config.seeds
    ]


def place_of(spec: TrialSpec, paths: RunPaths, config: StudyConfig) -> TrialPlace:
    """Return where a trial commits, and whether its network stays."""
    keep = config.compute.keep_models
    kept = keep == "all" or (keep == "first_seed" and spec.cell.seed == config.seeds[0])
    return TrialPlace(
        final=paths.trial(spec.cell.name, spec.trial_id),
        checkpoint=paths.checkpoint(spec.cell.name, spec.trial_id),
        keep_model=kept,
    )


class Progress(tune.Callback):
    """One bar over the study's cells, with the latest epoch beside it, and a line per finished cell."""

    def __init__(self, *, total: int, done: int, disable: bool) -> None:
        pace_s = 0.2 if sys.stderr.isatty() else 15.0
        self._bar = tqdm(total=total, initial=done, desc="trials", unit="trial", disable=disable, mininterval=pace_s)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:  # noqa: ANN401
        """Show the epoch that a trial has just reported."""
        self._bar.set_postfix_str(f"{trial} epoch {result['epoch']}: {_describe(result)}", refresh=False)
        self._bar.update(0)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:  # noqa: ANN401
        """Count a finished trial and print its last epoch."""
        self._bar.update()
        if not self._bar.disable:
            self._bar.write(f"{trial} done after {trial.last_result['epoch']} epochs: {_describe(trial.last_result)}")

    def on_experiment_end(self, trials: list[Any], **_: Any) -> None:  # noqa: ANN401
        """Leave the bar as it stands."""
        self._bar.close()


def _describe(result: dict[str, Any]) -> str:
    return (
        f"train loss {result['train_loss']:.3f}, validation loss {result['validation_loss']:.3f}, "
        f"validation AUC {result['validation_auc']:.3f}"
    )


def run_study(config: StudyConfig) -> Path:
    """Run a whole study, or what is missing of it, and return the path of its report.

    Parameters
    ----------
    config
        The study.

    Raises
    ------
    ValueError
        Of the room at fault, before any training where it can be known.
    RunError
        If trials failed after all retries; running the same command again runs only those.
    """
    config = with_native_dtype(config)
    prepared = prepare(config)
    specs = plan_trials(
        config,
        crops_hash=prepared.crops.crops_hash,
        split_hash=prepared.split.split_hash,
        weights_hash=prepared.weights_hash,
    )
    missing = [spec for spec in specs if not place_of(spec, prepared.paths, config).is_complete]
    shared = _shared(config, prepared)
    if missing or (shared.features is not None and not shared.features.is_dir()):
        with connect():
            _require_slot(config)
            _run_missing(config, prepared, shared, missing, total=len(specs))
    torch.set_num_threads(config.recipe.threads)
    folders = [place_of(spec, prepared.paths, config).final for spec in specs]
    data = load_trial_data(shared.crops, shared.split, shared.features)
    result_folder = aggregate(config, prepared, specs, folders, data)
    predictor = describe_predictor(config, prepared, specs, folders)
    write_atomic(result_folder / PREDICTOR_FILE, predictor.model_dump_json(indent=1).encode())
    return write_study_report(result_folder, prepared.crops.folder)


def with_native_dtype(config: StudyConfig) -> StudyConfig:
    """Replace ``recipe.unfrozen_dtype: auto`` by what the trials' device computes natively."""
    dtype = native_dtype(config.recipe.unfrozen_dtype, gpu=bool(config.compute.gpus_per_trial))
    return config.model_copy(update={"recipe": config.recipe.model_copy(update={"unfrozen_dtype": dtype})})


def _shared(config: StudyConfig, prepared: Prepared) -> Shared:
    recipe = config.recipe
    device = "cuda" if config.compute.gpus_per_trial else "cpu"
    features: Path | None = None
    if recipe.feature_cache:
        address = features_id(
            crops_hash=prepared.crops.crops_hash,
            weights_hash=prepared.weights_hash,
            threads=recipe.threads,
            batchnorm=recipe.frozen_batchnorm,
            device=device,
        )
        features = prepared.paths.features(address)
    return Shared(
        crops=prepared.crops.folder,
        split=prepared.split.folder,
        features=features,
        weights=recipe.weights,
        weights_seed=recipe.weights_seed,
        weights_hash=prepared.weights_hash,
        device=device,
    )


def _require_slot(config: StudyConfig) -> None:
    """Refuse a study that no node could ever start a trial of: Ray would wait for ever."""
    needed = {"CPU": float(config.recipe.threads), "GPU": config.compute.gpus_per_trial}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    if not any(all(node.get(name, 0.0) >= amount for name, amount in needed.items()) for node in nodes):
        offers = [{name: node.get(name, 0.0) for name in needed} for node in nodes]
        msg = f"a trial needs {needed} on one node, the cluster offers {offers}; lower recipe.threads or gpus_per_trial"
        raise RunError(msg)


def _run_missing(
    config: StudyConfig, prepared: Prepared, shared: Shared, missing: list[TrialSpec], *, total: int
) -> None:
    recipe, compute = config.recipe, config.compute
    if shared.features is not None:
        ensure_features(
            shared,
            shared.features,
            shared.features.with_suffix(".shards"),
            threads=recipe.threads,
            gpus=compute.gpus_per_trial,
            progress=compute.verbose,
        )
    if not missing:
        return
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the bar above is the console; Tune's own boxes stay away
    by_name = {spec.cell.name: (spec, place_of(spec, prepared.paths, config)) for spec in missing}
    resources = {"CPU": float(recipe.threads), "GPU": compute.gpus_per_trial}
    trial = waiting_trial(shared, by_name, resources)
    results = tune.Tuner(
        tune.with_resources(trial, tune.PlacementGroupFactory([{}, resources])),
        param_space={"name": tune.grid_search(list(by_name))},
        tune_config=tune.TuneConfig(
            reuse_actors=True,
            trial_name_creator=lambda trial: str(trial.config["name"]),
            trial_dirname_creator=lambda trial: str(trial.config["name"]),
        ),
        run_config=tune.RunConfig(
            name=time.strftime("%Y%m%d-%H%M%S"),
            storage_path=str(prepared.paths.tune),
            failure_config=tune.FailureConfig(max_failures=compute.max_failures),
            callbacks=[Progress(total=total, done=total - len(missing), disable=not compute.verbose)],
            verbose=0,
        ),
    ).fit()
    if results.errors:
        msg = (
            f"{len(results.errors)} of {len(missing)} trial(s) failed after {compute.max_failures} retries; the first: "
            f"{str(results.errors[0]).strip().splitlines()[-1]}; run the same command again to run only what is missing"
        )
        raise RunError(msg)


def write_study_report(result_folder: Path, crops_folder: Path) -> Path:
    """Render the report of a committed result, print its table and return the page's path."""
    result = StudyResult.load(result_folder / "result.json")
    sheet = (crops_folder / "contact_sheet.png").read_bytes()
    page = write_report(result, result_folder / "report", contact_sheet=sheet)
    sys.stdout.write(f"\n{render_console(result)}\n\nreport: {page}\n")
    return page


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, run the study and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m lbp_ray.tune", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="YAML file, e.g. configs/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace single values")
    parsed = parser.parse_args(arguments)
    try:
        run_study(load_config(StudyConfig, parsed.config, parsed.overrides))
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
