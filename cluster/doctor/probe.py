"""Shared storage tried out: a token left by one machine, read on all; a file of each, written, flushed, renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from typing import TYPE_CHECKING

from cluster.doctor.facts import StorageFacts
from preprocess.commit import write_atomic

if TYPE_CHECKING:
    from pathlib import Path

TOKEN = "token"


def probe_folder(storage: Path, probe: str) -> Path:
    """Return the folder in which a probe takes place."""
    return storage / f".doctor-{probe}"


def existing(path: Path) -> Path | None:
    """Return a folder that a study will write to, or its parent where the study will make it; None without either."""
    return next((folder for folder in (path, path.parent) if folder.is_dir()), None)


def leave_token(storage: Path, probe: str) -> str:
    """Write the token; return why it could not be, or nothing."""
    folder = probe_folder(storage, probe)
    try:
        folder.mkdir()
        write_atomic(folder / TOKEN, probe.encode())
    except OSError as error:
        return str(error)
    return ""


def visit(storage: Path, probe: str, *, node: str) -> StorageFacts:
    """Look for the token, and leave a file that names the node."""
    folder = probe_folder(storage, probe)
    offset = None
    seen = _read(folder / TOKEN) == probe
    try:
        if seen:
            offset = _write_twice(folder, node)
        disk = os.statvfs(storage)
    except OSError as problem:
        return StorageFacts(path=storage, error=str(problem), token_seen=seen)
    return StorageFacts(
        path=storage,
        token_seen=seen,
        free_bytes=disk.f_bavail * disk.f_frsize,
        free_files=disk.f_favail if disk.f_files else None,
        clock_offset_s=offset,
    )


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _write_twice(folder: Path, node: str) -> float:
    """Commit a file as the project does, then replace it; return how far the clock is surely ahead of the storage's."""
    place = folder / f"node-{node}"
    write_atomic(place, b"older")
    before = time.time()
    write_atomic(place, node.encode())
    after = time.time()
    if place.read_text() != node:
        msg = f"{place}: a rename over an older file left the older one"
        raise OSError(msg)
    written = place.stat().st_mtime
    return before - written if written < before else min(0.0, after - written)


def refresh(folder: Path) -> None:
    """Make this machine look at a folder anew: NFS shows an old listing for up to a minute, but not of own changes."""
    with contextlib.suppress(OSError), tempfile.NamedTemporaryFile(dir=folder):
        pass


def collect(storage: Path, probe: str) -> tuple[str, ...]:
    """Return the nodes whose files are there, and remove all that the probe left."""
    folder = probe_folder(storage, probe)
    refresh(folder)
    names = tuple(sorted(path.name.removeprefix("node-") for path in folder.glob("node-*")))
    shutil.rmtree(folder, ignore_errors=True)
    return names
