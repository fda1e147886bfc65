"""How much ``ray job submit --working-dir`` would send, counted by Ray's own rules of what stays behind."""

from __future__ import annotations

import logging
import zlib
from pathlib import Path
from typing import Any

from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE, get_runtime_env_default_excludes
from ray._private.runtime_env import packaging

from lbp_ray.config import FrozenModel

LIMIT_BYTES: int = DASHBOARD_CLIENT_MAX_SIZE
"""Largest request that Ray's job server takes; the upload is one, zipped."""

NAMED_FILES = 3
"""Largest files that are named."""

_PIECE_BYTES = 2**20

_quiet = logging.getLogger(__name__)
_quiet.addHandler(logging.NullHandler())
_quiet.propagate = False


class Upload(FrozenModel):
    """What ``ray job submit --working-dir`` would send."""

    folder: Path
    zipped_bytes: int
    """Counting stops beyond the limit."""
    limit_bytes: int
    """What Ray's job server takes."""
    largest: tuple[tuple[str, int], ...] = ()
    """Largest files and their sizes in bytes."""


def measure_upload(folder: Path) -> Upload:
    """Count the bytes of a working directory as they would be sent, up to the limit.

    Parameters
    ----------
    folder
        What would stand after ``--working-dir``.
    """
    files: list[Path] = []

    def note(path: Path) -> None:
        if path.is_file():
            files.append(path)

    private: Any = packaging
    left_out = [private._get_excludes(folder, get_runtime_env_default_excludes())]
    private._dir_travel(folder, left_out, note, include_gitignore=True, logger=_quiet)
    sizes = sorted(((path.stat().st_size, path) for path in files), reverse=True)
    zipped = 0
    for _, path in sizes:
        zipped += _zipped_bytes(path)
        if zipped > LIMIT_BYTES:
            break
    largest = tuple((str(path.relative_to(folder)), size) for size, path in sizes[:NAMED_FILES])
    return Upload(folder=folder, zipped_bytes=zipped, limit_bytes=LIMIT_BYTES, largest=largest)


def _zipped_bytes(path: Path) -> int:
    squeeze, total = zlib.compressobj(), 0
    with path.open("rb") as file:
        while (piece := file.read(_PIECE_BYTES)) and total <= LIMIT_BYTES:
            total += len(squeeze.compress(piece))
    return total + len(squeeze.flush())
