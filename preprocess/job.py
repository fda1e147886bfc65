"""Ray: where the tasks of a conversion run. The only module here that imports ray."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import ray
from ray.exceptions import LocalRayletDiedError, OutOfMemoryError, RayTaskError, WorkerCrashedError
from tqdm import tqdm

from preprocess.mapper import TaskFailure
from preprocess.pipeline import PreprocessError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

IN_FLIGHT_PER_CPU = 4
"""Tasks submitted ahead per CPU of the cluster: enough to keep workers busy, few enough to bound memory."""

MAX_RETRIES = 1
"""Further attempts of a task whose process died (a decoder crash, a lost node)."""

SOCKET_PATH_LIMIT = 43
"""Longest folder of Ray, in bytes, under which its socket paths, 64 bytes longer, have at most Linux's 107."""

PRIVATE_FOLDER_BYTES = len("/lbp-12345678/ray")
"""What stands between the temporary folder of this machine and the socket paths: Ray's folder in one of our own."""

NODE_LOST_STATUS = 75
"""Exit status when this machine's Ray node died: a temporary failure, the same command goes on."""

NODE_LOST = "\nerror: this machine's Ray node or the cluster's head has died; run the same command again, it goes on\n"

NODE_CHECK_S = 5.0
"""Seconds between two looks at this machine's Ray node."""

HEAD_SILENT_S = 40.0
"""Seconds without an answer of the head after which this process ends by itself; Ray would end it after 60, with
status 1."""

REMOVALS, REMOVAL_PAUSE_S = 10, 0.2
"""Attempts to remove what Ray has written, and the seconds between two."""

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def connect(num_cpus: int | None = None) -> Iterator[None]:
    """Join the Ray cluster that RAY_ADDRESS names, or start one on this machine for the duration.

    Parameters
    ----------
    num_cpus
        CPUs of the started cluster; None takes all. Ignored when joining one.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    with ExitStack() as leftovers:
        if "RAY_ADDRESS" not in os.environ:
            # Without a token of its own, Ray leaves one in the home folder that every user of the machine can read.
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
            # Fewer idle processes: nothing here needs the dashboard of a cluster that lives for one command.
            options |= {"address": "local", "include_dashboard": False}
            options |= {"num_cpus": num_cpus, "_temp_dir": leftovers.enter_context(_private_ray_folder())}
        leftovers.callback(ray.shutdown)
        ray.init(**options)
        ended = threading.Event()
        leftovers.callback(ended.set)
        threading.Thread(
            target=_leave_with_node, args=(ray.get_runtime_context().get_node_id(), ended), daemon=True
        ).start()
        try:
            yield
        except LocalRayletDiedError:
            sys.stderr.write(NODE_LOST)
            raise SystemExit(NODE_LOST_STATUS) from None


def _leave_with_node(node_id: str, ended: threading.Event) -> None:
    """End this process when its Ray node dies: Ray Tune would wait for ever on a cluster that cannot answer."""
    while not ended.wait(NODE_CHECK_S):
        silent = threading.Timer(HEAD_SILENT_S, _leave, [ended])
        silent.daemon = True
        silent.start()
        try:
            nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
        finally:
            silent.cancel()
        if any(node["NodeID"] == node_id and not node["Alive"] for node in nodes):
            _leave(ended)


def _leave(ended: threading.Event) -> None:
    if not ended.is_set():
        sys.stderr.write(NODE_LOST)
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(NODE_LOST_STATUS)


@contextmanager
def _private_ray_folder() -> Iterator[str]:
    """Give Ray a folder below one that only its owner can enter: Ray lets everybody write to its own and to all in it.

    Both are gone after the block. A process that is killed leaves them behind.
    """
    base = tempfile.gettempdir()
    fits = len(os.fsencode(base)) + PRIVATE_FOLDER_BYTES <= SOCKET_PATH_LIMIT
    folder = tempfile.mkdtemp(prefix="lbp-", dir=base if fits else "/tmp")
    try:
        yield os.path.join(folder, "ray")  # ray wants a string
    finally:
        for _ in range(REMOVALS):  # a process that is just ending may still write
            shutil.rmtree(folder, ignore_errors=True)
            if not os.path.exists(folder):
                break
            time.sleep(REMOVAL_PAUSE_S)


def in_ray_job() -> bool:
    """Whether this process was started by ``ray job submit``."""
    return "RAY_JOB_ID" in os.environ or "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def require_absolute(paths: Sequence[Path]) -> None:
    """Refuse relative paths inside a Ray job: they would land in its throwaway copy of the working directory.

    Raises
    ------
    PreprocessError
        Naming the path.
    """
    relative = [str(path) for path in paths if not path.is_absolute()]
    if in_ray_job() and relative:
        msg = f"inside a Ray job paths must be absolute, on storage that every node sees; found {', '.join(relative)}"
        raise PreprocessError(msg)


def map_on_ray(
    function: Callable[[Item], Result],
    items: Iterable[tuple[str, Item]],
    *,
    title: str,
    total: int,
    unit: str = "task",
    size: Callable[[Item], int] | None = None,
) -> Iterator[tuple[Item, Result | TaskFailure]]:
    """Run one named Ray task per item, a bounded number at a time, with rate and remaining time.

    A task whose process dies on every attempt yields a `TaskFailure`; an error that the function raises is raised
    here.
    """
    task: Any = ray.remote(num_cpus=1, max_retries=MAX_RETRIES)(_call)
    shared = ray.put(function)
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    limit = IN_FLIGHT_PER_CPU * max(1, int(resources.get("CPU", 1)))
    waiting = iter(items)
    running: dict[Any, Item] = {}
    with tqdm(total=total, desc=title, unit=unit, smoothing=0.1, disable=None) as bar:
        while True:
            for name, item in islice(waiting, limit - len(running)):
                running[task.options(name=name).remote(shared, item)] = item
            if not running:
                return
            done, _ = ray.wait(list(running), num_returns=1)
            for reference in done:
                item = running.pop(reference)
                yield item, _result(reference)
                bar.update(1 if size is None else size(item))


def _call(function: Callable[[Item], Result], item: Item) -> Result:
    return function(item)


def _result(reference: Any) -> Any:  # noqa: ANN401  (whatever the function returns)
    try:
        return ray.get(reference)
    except (WorkerCrashedError, OutOfMemoryError):
        return TaskFailure()
    except RayTaskError as error:
        raise error.cause from None
