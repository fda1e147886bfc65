"""What stands before a command that runs in an Apptainer image, and which folders it sees. Standard library only."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def bound_folders(environment: Mapping[str, str]) -> list[Path]:
    """Return what a container must see of shared storage: the clone, which is the working folder, data and weights."""
    named = (environment.get(name) for name in ("LBP_RAY_ROOT", "TORCH_HOME"))
    return [Path.cwd(), *(Path(folder) for folder in named if folder)]


def container_prefix(image: Path | None, folders: Sequence[Path], *, gpus: int) -> list[str]:
    """Return what to put before a command so that it runs inside an Apptainer image; nothing without one.

    Parameters
    ----------
    image
        The image.
    folders
        What the container sees of the node, beside the home and working folders that Apptainer binds itself.
    gpus
        GPUs granted on the node; with any, the driver's libraries come along.
    """
    if image is None:
        return []
    binds = [f"--bind={folder}" for folder in dict.fromkeys(folders)]
    program = "singularity" if shutil.which("singularity") and not shutil.which("apptainer") else "apptainer"
    return [program, "exec", *(["--nv"] if gpus else []), *binds, str(image)]
