"""``python -m cluster doctor``: ask every node, judge, print what is wrong with its cause and what to do."""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.doctor import differ, reach, room, safety
from cluster.doctor.facts import Ask, Mode, Survey
from cluster.doctor.nodes import Answers, ask_here, ask_ray, ask_slurm
from cluster.doctor.probe import collect, existing, leave_token
from cluster.doctor.render import render
from cluster.ray.proxy import proxy_of_job_server
from cluster.ray.upload import measure_upload
from lbp_ray.config import load_config
from lbp_ray.study import StudyConfig
from preprocess.job import in_ray_job

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from cluster.doctor.findings import Finding

JUDGES = (*differ.JUDGES, *reach.JUDGES, *room.JUDGES, *safety.JUDGES)
"""Every check, in the order in which findings are shown."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.description = __doc__
    parser.add_argument(
        "--on",
        choices=("here", "ray", "slurm"),
        help="this machine, the Ray cluster of RAY_ADDRESS, or a SLURM step (default: ray where RAY_ADDRESS is set, "
        "else here)",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="check what this study reads, writes and asks for")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace single values of the file")
    parser.add_argument(
        "--storage", type=Path, action="append", default=[], metavar="FOLDER", help="shared folder to try out as well"
    )
    parser.add_argument(
        "--port",
        type=int,
        action="append",
        default=[],
        metavar="N",
        help="port that must be free on every node (make head: 6379, 8265)",
    )
    parser.add_argument(
        "--srun", action="append", default=[], metavar="OPTION", help="for srun, e.g. --srun=--nodes=2; may be repeated"
    )
    parser.add_argument(
        "--container", type=Path, metavar="IMAGE", help="look from inside this Apptainer image, as trials would (slurm)"
    )


def run(parsed: argparse.Namespace) -> int:
    """Ask, judge and print; return 0, 1 for a blocker, or 2 for a command that cannot be carried out."""
    mode: Mode = parsed.on or ("ray" if "RAY_ADDRESS" in os.environ else "here")
    try:
        config = load_config(StudyConfig, parsed.config, parsed.overrides) if parsed.config else None
        ask = plan(mode, config, storage=parsed.storage, ports=parsed.port)
        if parsed.container and mode != "slurm":
            msg = (
                f"--container is for --on slurm; elsewhere: apptainer exec {parsed.container} python -m cluster doctor"
            )
            raise ValueError(msg)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    survey = examine(ask, parsed.srun, parsed.container)
    findings = judge(survey)
    sys.stdout.write(render(survey, findings, checks=len(JUDGES)))
    return int(any(finding.level == "blocker" for finding in findings))


def plan(mode: Mode, config: StudyConfig | None, *, storage: Sequence[Path], ports: Sequence[int]) -> Ask:
    """Decide what every node shall look at.

    Raises
    ------
    ValueError
        If a folder is named by a relative path.
    """
    relative = [str(path) for path in storage if not path.is_absolute()]
    if relative:
        msg = f"--storage must be an absolute path, the same on every node; found {', '.join(relative)}"
        raise ValueError(msg)
    written = {path: existing(path) for path in [*([config.paths.runs] if config else []), *storage]}
    ask = Ask(
        mode=mode,
        probe=secrets.token_hex(8),
        storage=tuple(dict.fromkeys(folder for folder in written.values() if folder)),
        absent=tuple(str(path) for path, folder in written.items() if folder is None),
        ports=tuple(ports),  # a study starts Ray on free ones
    )
    return ask if config is None else ask.model_copy(update=_study(config))


def _study(config: StudyConfig) -> dict[str, object]:
    paths = config.paths.model_dump(exclude={"runs"}, exclude_none=True).values()
    recipe = config.recipe
    return {
        "inputs": tuple(paths),
        "weights": None if recipe.weights == "random" else recipe.weights,
        "trial_cpus": float(recipe.threads),
        "trial_gpus": None if config.compute.gpus_per_trial == "auto" else config.compute.gpus_per_worker,
    }


def examine(ask: Ask, srun: Sequence[str] = (), container: Path | None = None) -> Survey:
    """Collect the facts of all nodes, and leave nothing behind."""
    errors = {str(folder): error for folder in ask.storage if (error := leave_token(folder, ask.probe))}
    try:
        answers = _answers(ask, srun, container)
    finally:
        echoes = {str(folder): collect(folder, ask.probe) for folder in ask.storage}
    submits = ask.mode != "slurm" and not in_ray_job()
    return Survey(
        ask=ask,
        nodes=answers.nodes,
        silent=answers.silent,
        departed=answers.departed,
        storage_errors=errors,
        echoes=echoes,
        upload=measure_upload(Path.cwd()) if submits else None,
        proxied=proxied() if ask.mode != "slurm" else "",
    )


def _answers(ask: Ask, srun: Sequence[str], container: Path | None) -> Answers:
    if ask.mode == "slurm":
        return ask_slurm(ask, srun, container)
    return ask_ray(ask) if ask.mode == "ray" else ask_here(ask)


def proxied() -> str:
    """Return the variable that would send a job submission through a proxy, or nothing."""
    proxy = proxy_of_job_server()
    return proxy.variable if proxy else ""


def judge(survey: Survey) -> list[Finding]:
    """Let every judge speak: blockers first."""
    found = [finding for judgement in JUDGES for finding in judgement(survey)]
    return sorted(found, key=lambda finding: finding.level)
