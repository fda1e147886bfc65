"""Atomic files and directories, content hashes, and the fail-points that tests kill at.

A file or directory that bears its final name is complete: it was written under a temporary name on the same file
system, flushed to disk and renamed. Nothing else in the project decides what "finished" means.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import uuid
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

KILL_AT_VARIABLE = "LBP_RAY_KILL_AT"
"""Environment variable ``<commit point>@<marker file>``: die there, once, as ``kill -9`` would (tests only)."""

PARTIAL_PREFIX = ".partial-"
"""Names that begin so are unfinished writes; a resumed job may delete them."""


def commit_point(name: str) -> None:
    """Mark a moment at which a killed process must leave something that resumes.

    Parameters
    ----------
    name
        Name of the moment, e.g. ``trial:before-rename``. When `KILL_AT_VARIABLE` names it and its marker file does not
        exist yet, the marker is created and this process kills itself with SIGKILL.
    """
    wanted, _, marker = os.environ.get(KILL_AT_VARIABLE, "").partition("@")
    if wanted != name:
        return
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def fsync_path(path: Path) -> None:
    """Flush one file or directory entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(root: Path) -> None:
    """Flush every file and directory below `root`, and `root` itself."""
    for folder, _, names in os.walk(root):
        for name in names:
            fsync_path(Path(folder, name))
        fsync_path(Path(folder))


@contextmanager
def committed_directory(final: Path, *, point: str) -> Iterator[Path]:
    """Yield a temporary directory that becomes `final` in one rename when the block ends without an error.

    Parameters
    ----------
    final
        The directory's final path. If another process committed it meanwhile, that one stays and ours is dropped:
        content-addressed directories of one name are the same.
    point
        Name for the two commit points ``<point>:before-rename`` and ``<point>:after-rename``.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    ours = f"{PARTIAL_PREFIX}{final.name}-{socket.gethostname()}-"
    for path in final.parent.glob(f"{ours}*"):
        writer = path.name.removeprefix(ours)
        if writer == str(os.getpid()) or not Path("/proc", writer).exists():
            shutil.rmtree(path, ignore_errors=True)  # its writer was killed
    partial = final.parent / f"{ours}{os.getpid()}"
    partial.mkdir()
    try:
        yield partial
        fsync_tree(partial)
        commit_point(f"{point}:before-rename")
        try:
            partial.rename(final)
        except OSError:
            if not final.is_dir():
                raise
        fsync_path(final.parent)
        commit_point(f"{point}:after-rename")
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sweep_partials(folder: Path) -> None:
    """Delete what killed writers left in a folder. Only for the one process that may write there."""
    for leftover in folder.glob(f"{PARTIAL_PREFIX}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Write a whole file so that readers see the old content or the new, never a part.

    Parameters
    ----------
    path
        Final path; its folder is made when missing.
    data
        The content.
    mode
        Permission bits, set before the file has its final name.
    """
    write_pieces(path, [data], mode=mode)


def write_pieces(path: Path, pieces: Iterable[bytes], *, mode: int = 0o644) -> None:
    """Write a file as `write_atomic` does, from pieces that need not all be in memory."""
    with stream_atomic(path, mode=mode) as file:
        for piece in pieces:
            file.buffer.write(piece)


@contextmanager
def stream_atomic(path: Path, *, mode: int = 0o644) -> Iterator[TextIO]:
    """Yield a text file that becomes `path` when the block ends, and vanishes when it raises.

    Parameters
    ----------
    path
        Final path; its folder is made when missing.
    mode
        Permission bits, set before the first byte is written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f"{PARTIAL_PREFIX}{path.name}-{uuid.uuid4().hex[:8]}"
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
        fsync_path(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def canonical_json(value: Any) -> str:  # noqa: ANN401  (any JSON value)
    """Render a JSON value with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def content_id(value: Any) -> str:  # noqa: ANN401  (any JSON value)
    """Return the SHA-256 (hexadecimal) of a JSON value: the address of what was computed from it."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()
