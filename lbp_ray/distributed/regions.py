"""A region finder spread over Ray: networks as Tune trials of Ray Train workers, masks by actors holding a network."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from ray import tune
from ray.train.torch import get_device
from tqdm import tqdm

from lbp_ray.distributed.tuning import run_trials
from lbp_ray.distributed.workers import run_workers
from lbp_ray.segment.network import FoldPlace, FoldSpec, SegmentError, place_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lbp_ray.runs import RunPaths
    from lbp_ray.segment.config import RegionCompute
    from lbp_ray.segment.masks import MaskShard, Network

WAITING = {"memory": 1.0}
"""What a trial takes that only waits for its network's workers: a byte, because Tune refuses to give nothing."""


def train_worker(config: dict[str, Any]) -> None:
    """Train one network as one of its workers; what Ray Train runs."""
    from lbp_ray.segment.fold import train_fold

    spec: FoldSpec = config["spec"]
    place: FoldPlace = config["place"]
    given = {"checkpoint_s": config["checkpoint_s"], "device": str(get_device())}
    for record in train_fold(spec, config["folder"], place, **given):
        ray.train.report(asdict(record))


def network_trial(
    cells: dict[str, tuple[FoldSpec, FoldPlace]], folder: Path, compute: RegionCompute, storage: Path
) -> Callable[[dict[str, str]], None]:
    """Return the function that Tune runs once per network: it starts the network's workers and waits for them.

    Parameters
    ----------
    cells
        Specification and place of each network, by its name.
    folder
        Committed training set.
    compute
        Workers, GPUs and retries.
    storage
        Where Ray Train keeps its own records.
    """

    def trial(cell: dict[str, str]) -> None:
        spec, place = cells[cell["name"]]
        given = {"spec": spec, "place": place, "folder": folder, "checkpoint_s": compute.checkpoint_s}
        run_workers(train_worker, given, spec.name, compute=compute, storage=storage)

    return trial


class Progress(tune.Callback):
    """One bar over the epochs of all networks, and a line per finished network."""

    def __init__(self, *, total: int, disable: bool) -> None:
        pace_s = 0.2 if sys.stderr.isatty() else 15.0
        self._bar = tqdm(total=total, desc="networks", unit="epoch", disable=disable, mininterval=pace_s)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:  # noqa: ANN401
        """Show the epoch that a network has just reported."""
        self._bar.set_postfix_str(f"{trial} epoch {result['epoch']}: {_describe(result)}", refresh=False)
        self._bar.update()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:  # noqa: ANN401
        """Print a finished network's last epoch."""
        if not self._bar.disable:
            self._bar.write(f"{trial} done after {trial.last_result['epoch']} epochs: {_describe(trial.last_result)}")

    def on_experiment_end(self, trials: list[Any], **_: Any) -> None:  # noqa: ANN401
        """Leave the bar as it stands."""
        self._bar.close()


def _describe(result: dict[str, Any]) -> str:
    dice = result["validation_dice"]
    return f"train loss {result['train_loss']:.4f}" + ("" if dice is None else f", left-out Dice {dice:.3f}")


def train_networks(specs: list[FoldSpec], folder: Path, paths: RunPaths, compute: RegionCompute) -> None:
    """Train every network that is not committed yet.

    Raises
    ------
    SegmentError
        If no node or too small a cluster could hold one, or networks failed after all retries.
    """
    places = {spec: place_of(spec, paths) for spec in specs}
    missing = [spec for spec, place in places.items() if not place.final.is_dir()]
    for spec in places.keys() - set(missing):
        places[spec].checkpoint.unlink(missing_ok=True)  # left by a kill right after the commit
    if not missing:
        return
    at_once = workers_that_fit(missing[0].recipe.threads, compute.gpus_per_worker, least=missing[0].workers)
    at_once //= missing[0].workers
    cells = {spec.name: (spec, places[spec]) for spec in missing}
    epochs, verbose = missing[0].recipe.epochs, compute.verbose

    def unfinished() -> list[str]:
        return [name for name, (_, place) in cells.items() if not place.final.is_dir()]

    errors = run_trials(
        tune.with_resources(network_trial(cells, folder, compute, paths.tune / "train"), WAITING),
        unfinished,
        storage=paths.tune,
        callbacks=lambda names: [Progress(total=len(names) * epochs, disable=not verbose)],
        retries=compute.max_failures,
        max_concurrent_trials=at_once,
    )
    if unfinished():
        first = errors[0] if errors else "interrupted"
        msg = (
            f"{len(unfinished())} of {len(missing)} network(s) failed after {compute.max_failures} retries; the first: "
            f"{first}; run the same command again to train only what is missing"
        )
        raise SegmentError(msg)


def workers_that_fit(threads: int, gpus: float, *, least: int = 1) -> int:
    """Count the workers of some size that the cluster's nodes hold; more would wait for ever.

    Parameters
    ----------
    threads, gpus
        CPUs and GPUs of one worker, which cannot be split over nodes.
    least
        How many are needed.

    Raises
    ------
    SegmentError
        If fewer fit.
    """
    needed = {"CPU": float(threads), "GPU": gpus}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    workers = sum(min(int(node.get(name, 0.0) / amount) for name, amount in needed.items() if amount) for node in nodes)
    if workers < least:
        msg = (
            f"{least} worker(s) of {needed} are required, the cluster's nodes hold {workers}; "
            "lower compute.workers, recipe.threads or compute.gpus_per_worker"
        )
        raise SegmentError(msg)
    return workers


@ray.remote(max_restarts=3, max_task_retries=3)
class MaskWorker:
    """Holds a network and a part of the store between shards."""

    def run(self, shard: MaskShard, network: Network, store: Path, out: Path) -> int:
        """Segment and commit one shard; return its number of slices."""
        from lbp_ray.segment.masks import segment_shard

        segment_shard(shard, network, store, out)
        return len(shard.slices)


def segment_store(
    shards: dict[MaskShard, Path], networks: dict[int, Network], store: Path, *, gpus: float, progress: bool
) -> None:
    """Segment every shard that has no file yet: each is one named call of one actor, which alone writes it.

    Parameters
    ----------
    shards
        Shard → its file; those of a killed run are kept.
    networks
        Network of each fold.
    store
        Slice store.
    gpus
        GPUs of each actor.
    progress
        Show a progress bar with slices per second.
    """
    # Shards of one network stand together, so that an actor seldom loads another.
    missing = sorted((shard for shard, path in shards.items() if not path.is_file()), key=lambda shard: shard.fold)
    if not missing:
        return
    threads = networks[missing[0].fold].threads
    room = min(workers_that_fit(threads, gpus), len(missing))
    worker: Any = MaskWorker
    idle = [worker.options(num_cpus=threads, num_gpus=gpus).remote() for _ in range(room)]
    total = sum(len(shard.slices) for shard in shards)
    left = sum(len(shard.slices) for shard in missing)
    waiting = iter(enumerate(missing))
    begun_s = time.monotonic()
    running: dict[Any, Any] = {}
    with tqdm(total=total, initial=total - left, desc="masks", unit="slice", disable=not progress) as bar:
        while True:
            for actor, (number, shard) in zip(list(idle), waiting, strict=False):
                call = actor.run.options(name=f"masks-{number:05d}")
                running[call.remote(shard, networks[shard.fold], store, shards[shard])] = actor
                idle.remove(actor)
            if not running:
                bar.write(
                    f"{left} slices masked by {room} worker(s), {left / (time.monotonic() - begun_s):.1f} per second"
                )
                return
            done, _ = ray.wait(list(running), num_returns=1)
            for reference in done:
                idle.append(running.pop(reference))
                bar.update(ray.get(reference))
