"""What a job takes along: the working directory by Ray's own rules, its hash and its size."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ray._private import ray_constants
from ray._private.runtime_env import packaging

from cluster.ray.upload import measure_upload

if TYPE_CHECKING:
    from pathlib import Path

MARK = ".rayignore"
"""File at the root of the clone that keeps data and results out of the upload."""


class PackageError(ValueError):
    """A working directory that must not be sent."""


def code_hash(folder: Path) -> str:
    """Return Ray's own hash of what would be sent: the contents and names of all files that are not left out."""
    private: Any = packaging
    kept_out = os.environ.get(ray_constants.RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"
    excludes = ray_constants.get_runtime_env_default_excludes()
    uri: str = private.get_uri_for_directory(str(folder), include_gitignore=kept_out, excludes=excludes)
    return uri.removeprefix("gcs://_ray_pkg_").removesuffix(".zip")


def require_sendable(folder: Path) -> None:
    """Refuse a folder that is not the root of a clone, or more than the job server takes.

    Raises
    ------
    PackageError
        With the cause and what to do.
    """
    if not (folder / MARK).is_file():
        msg = (
            f"a job sends the folder it is submitted from, and {folder} has no {MARK} that keeps data out of it; "
            "submit from the root of the clone"
        )
        raise PackageError(msg)
    upload = measure_upload(folder)
    if upload.zipped_bytes > upload.limit_bytes:
        largest = ", ".join(f"{name} ({size / 2**20:.0f} MiB)" for name, size in upload.largest)
        msg = (
            f"a job may send {upload.limit_bytes >> 20} MiB (zipped) and {folder} holds more, the largest: {largest}; "
            f"Ray's job server would answer 413; move data and results to shared storage, or name them in {MARK}"
        )
        raise PackageError(msg)
