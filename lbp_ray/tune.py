"""The study: plan fold x seed x slice-count trials, run what is missing on Ray Tune, aggregate, report.

``python -m lbp_ray.tune --config configs/demo.yaml [section.key=value ...]``
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune

from lbp_ray.aggregate import aggregate
from lbp_ray.cell import Cell, Shared, TrialPlace, TrialSpec
from lbp_ray.config import load_config
from lbp_ray.distributed.extract import ensure_features
from lbp_ray.distributed.progress import Progress, Tally
from lbp_ray.distributed.trackers import Trackers, require
from lbp_ray.distributed.tuning import run_trials
from lbp_ray.distributed.waiter import largest_share, waiting_trial
from lbp_ray.distributed.worker import load_trial_data
from lbp_ray.features import features_id
from lbp_ray.finished import RESULT_FILE, render_result
from lbp_ray.native import for_device, kept_dtype
from lbp_ray.predict import PREDICTOR_FILE, describe_predictor
from lbp_ray.prepare import Prepared, prepare
from lbp_ray.report import render_console
from lbp_ray.result import StudyResult
from lbp_ray.runs import RunError, RunPaths
from lbp_ray.study import StudyConfig
from preprocess.commit import write_atomic
from preprocess.job import connect

Cells = dict[str, tuple[TrialSpec, TrialPlace]]
"""Specification and place of each cell, by its name."""


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
            workers=config.compute.workers,
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
        If a tracker is not installed, or trials failed after all retries; running the same command again runs only
        those.
    """
    require(config.compute.trackers)
    if config.compute.gpus_per_trial != "auto":
        return _run(config)
    with connect():  # whether there is a GPU decides device and type, and so which trials are missing
        return _run(without_absent_gpus(config))


def without_absent_gpus(config: StudyConfig) -> StudyConfig:
    """Let ``compute.gpus_per_trial: auto`` stand where the cluster has GPUs, else train on CPUs and say so."""
    if ray.cluster_resources().get("GPU", 0.0):  # type: ignore[no-untyped-call]
        return config
    sys.stdout.write("compute.gpus_per_trial: auto found no GPU in the cluster; the trials run on CPUs\n")
    return config.model_copy(update={"compute": config.compute.model_copy(update={"gpus_per_trial": 0.0})})


def tell_of_idle_gpus(config: StudyConfig) -> None:
    """Say that no trial uses the cluster's GPUs, if that is so."""
    gpus = ray.cluster_resources().get("GPU", 0.0)  # type: ignore[no-untyped-call]
    if gpus and not config.compute.gpus_per_trial:
        sys.stdout.write(f"compute.gpus_per_trial is 0: {gpus:g} GPU(s) stay idle; auto would use them\n")


def _run(config: StudyConfig) -> Path:
    prepared = prepare(config)
    gpu = bool(config.compute.gpus_per_trial)
    option, wanted = "recipe.unfrozen_dtype", config.recipe.unfrozen_dtype
    dtype = kept_dtype(wanted, prepared.paths.folder, gpu=gpu, option=option)
    recipe = config.recipe.model_copy(update={"unfrozen_dtype": dtype})
    config = for_device(config.model_copy(update={"recipe": recipe}), gpu=gpu)
    specs = plan_trials(
        config,
        crops_hash=prepared.crops.crops_hash,
        split_hash=prepared.split.split_hash,
        weights_hash=prepared.weights_hash,
    )
    cells = {spec.cell.name: (spec, place_of(spec, prepared.paths, config)) for spec in specs}
    trackers = Trackers(config.compute.trackers, study=config.name, root=prepared.paths.folder, cells=cells)
    shared = _shared(config, prepared)
    if _missing(cells) or (shared.features is not None and not shared.features.is_dir()):
        with connect():
            tell_of_idle_gpus(config)
            trials_at_once(config)
            _run_missing(config, prepared, shared, cells, trackers)
    for _, place in cells.values():
        place.checkpoint.unlink(missing_ok=True)  # of an attempt that another one overtook
    torch.set_num_threads(config.recipe.threads)
    folders = [place_of(spec, prepared.paths, config).final for spec in specs]
    data = load_trial_data(shared.crops, shared.split, shared.features, block_studies=shared.block_studies)
    result_folder = aggregate(config, prepared, specs, folders, data)
    predictor = describe_predictor(config, prepared, specs, folders)
    write_atomic(result_folder / PREDICTOR_FILE, predictor.model_dump_json(indent=1).encode())
    report = write_study_report(result_folder, prepared.crops.folder)
    trackers.tell_result(result_folder)
    return report


def progress_of(config: StudyConfig, cells: Cells, missing: list[str]) -> Progress:
    """Return what tells the console and the metrics endpoint of the trials."""
    recipe = config.recipe
    tally = Tally(
        {name: cells[name][0].cell.num_slices for name in missing},
        {"frozen": recipe.frozen_epochs, "unfrozen": recipe.unfrozen_epochs},
        done=len(cells) - len(missing),
    )
    return Progress(tally, study=config.name, stream=sys.stdout if config.compute.verbose else None)


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
            folded=recipe.fold_extraction,
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
        block_studies=recipe.block,
    )


def trials_at_once(config: StudyConfig) -> int:
    """Count the trials that the cluster's nodes hold, whole GPUs taken where a trial's share is still to be measured.

    Raises
    ------
    RunError
        If it is none: Ray would wait for ever.
    """
    needed = {"CPU": float(config.recipe.threads), "GPU": config.compute.gpus_per_worker}
    offers = [
        {name: float(node["Resources"].get(name, 0.0)) for name in needed}
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"]
    ]
    fit = sum(min(int(offer[name] / amount) for name, amount in needed.items() if amount) for offer in offers)
    workers = config.compute.workers
    if fit < workers:
        msg = (
            f"a trial needs {workers} worker(s) of {needed}, each on one node; the cluster offers {offers}; "
            "lower recipe.threads, compute.gpus_per_trial or compute.workers_per_trial"
        )
        raise RunError(msg)
    return fit // workers


def _missing(cells: Cells) -> list[str]:
    return [name for name, (_, place) in cells.items() if not place.is_complete]


def _run_missing(config: StudyConfig, prepared: Prepared, shared: Shared, cells: Cells, trackers: Trackers) -> None:
    recipe, compute = config.recipe, config.compute
    if shared.features is not None:
        ensure_features(
            shared,
            shared.features,
            recipe=recipe,
            gpus=compute.gpus_per_worker,
            progress=compute.verbose,
        )
    names = _missing(cells)
    if not names:
        return
    trial, limits = _waiting(config, prepared, shared, {name: cells[name] for name in names})
    errors = run_trials(
        trial,
        lambda: _missing(cells),
        storage=prepared.paths.tune,
        callbacks=lambda names: [progress_of(config, cells, names), trackers],
        retries=compute.max_failures,
        # Workers that share a trial are started again by Ray Train.
        restarts=compute.max_failures if compute.workers == 1 else 0,
        **limits,
    )
    unfinished = _missing(cells)
    if unfinished:  # also where Tune was interrupted, which it does not call an error
        first = errors[0] if errors else "interrupted"
        msg = (
            f"{len(unfinished)} of {len(names)} trial(s) failed after {compute.max_failures} retries; the first: "
            f"{first}; run the same command again to run only what is missing"
        )
        raise RunError(msg)


def _waiting(config: StudyConfig, prepared: Prepared, shared: Shared, cells: Cells) -> tuple[Any, dict[str, Any]]:
    """Return what Tune runs, with the resources it takes, and what limits how many run at a time."""
    if config.compute.workers > 1:
        from lbp_ray.distributed.ddp import shared_trial
        from lbp_ray.distributed.regions import WAITING

        trial = shared_trial(shared, cells, config.compute, prepared.paths.tune / "train")
        return tune.with_resources(trial, WAITING), {"max_concurrent_trials": trials_at_once(config)}
    gpus = config.compute.gpus_per_worker
    resources = {"CPU": float(config.recipe.threads), "GPU": gpus}
    if config.compute.gpus_per_trial == "auto":
        most_slices = max((spec for spec, _ in cells.values()), key=lambda spec: spec.cell.num_slices)
        sys.stdout.write("compute.gpus_per_trial: auto measures a trial on one GPU of every node\n")
        resources["GPU"], told = largest_share(shared, most_slices, resources)
        sys.stdout.write(f"compute.gpus_per_trial: auto: {told}\n")
    waiting = waiting_trial(shared, cells, resources)
    return tune.with_resources(waiting, tune.PlacementGroupFactory([{}, resources])), {"reuse_actors": True}


def write_study_report(result_folder: Path, crops_folder: Path) -> Path:
    """Render the report of a committed result, print its table and return the page's path."""
    page = render_result(result_folder, crops_folder)
    result = StudyResult.load(result_folder / RESULT_FILE)
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
