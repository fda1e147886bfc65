"""Ray Tune over the trials that are missing, gone on with where Tune itself would give up."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from ray import tune
from ray.exceptions import OutOfMemoryError, RayError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


REASON_LENGTH = 200
"""Characters of an error's last line that are shown."""


MEMORY = f"{OutOfMemoryError.__module__}.{OutOfMemoryError.__qualname__}"
"""How a text names the error of a node's memory; PyTorch has one of a GPU's."""


def reason_of(error: str) -> str:
    """Return the gist of an error's text: its last line, or a sentence where Ray's own goes on for a page."""
    if MEMORY in error:
        return "its node's memory was full and Ray ended it (docs/howto-when-it-fails.md, Memory)"
    lines = error.strip().splitlines()
    return lines[-1][:REASON_LENGTH] if lines else "no error was reported"


def run_trials(
    trial: Any,  # noqa: ANN401  (Tune does not type what it runs)
    missing: Callable[[], list[str]],
    *,
    storage: Path,
    callbacks: Callable[[list[str]], list[tune.Callback]],
    retries: int,
    restarts: int = 0,
    **limits: Any,  # noqa: ANN401
) -> list[str]:
    """Run each missing trial once.

    Parameters
    ----------
    trial
        What Tune runs, given ``{"name": name}``.
    missing
        Lists the names of trials that are not committed.
    storage
        Where Tune keeps its own records.
    callbacks
        Makes those of a list of names.
    retries
        How often in a row, no trial committed meanwhile, what is missing is begun again after Tune ended. It ends, and
        with it every trial, where Ray lost a process that only waits for a trial, as where its node's memory was full:
        it takes actor and task errors as a trial's, and no others.
    restarts
        How often Tune starts a failed trial again.
    **limits
        Of `ray.tune.TuneConfig`.

    Returns
    -------
    list of str
        Why trials failed for good, one reason each.
    """
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # callbacks are the console; Tune's own boxes stay away
    left, names = retries, missing()
    while names:
        tuner = tune.Tuner(
            trial,
            param_space={"name": tune.grid_search(names)},
            tune_config=tune.TuneConfig(
                **limits,
                trial_name_creator=lambda trial: str(trial.config["name"]),
                trial_dirname_creator=lambda trial: str(trial.config["name"]),
            ),
            run_config=tune.RunConfig(
                # Tasks of an array start together, and a study may begin again within a second.
                name=f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid4().hex[:8]}",
                storage_path=str(storage),
                failure_config=tune.FailureConfig(max_failures=restarts),
                callbacks=callbacks(names),
                verbose=0,
            ),
        )
        try:
            return [reason_of(str(error)) for error in tuner.fit().errors]
        except RuntimeError as error:
            lost = error.__cause__
            if not isinstance(lost, RayError):
                raise
            before, names = names, missing()
            left = retries if len(names) < len(before) else left - 1
            if left < 0:
                return [reason_of(f"{type(lost).__module__}.{type(lost).__qualname__}: {lost}")]
            if names:
                told = f"Ray lost a process that waits for a trial ({type(lost).__name__})"
                sys.stdout.write(f"{told}; what is missing begins again, from its checkpoints\n")
    return []
