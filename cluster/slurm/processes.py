"""Ends what a process has started, and nothing else: no name is searched for, only descendants are. Linux only."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
"""Linux: orphans among the descendants become children of this process instead of init's."""

POLL_S = 0.1
"""Seconds between two looks at processes that should end."""


def adopt_orphans() -> None:
    """Keep every descendant below this process, also when its own parent ends first."""
    library = ctypes.CDLL(None, use_errno=True)
    if library.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def descendants(pid: int, process_table: Path = Path("/proc")) -> set[int]:
    """Return the ids of all processes below `pid` that have not ended."""
    children: dict[int, list[int]] = {}
    for folder in process_table.iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                state, parent = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:2]
                if state != "Z":
                    children.setdefault(int(parent), []).append(int(folder.name))
    found: set[int] = set()
    frontier = [pid]
    while frontier:
        frontier = [child for parent in frontier for child in children.get(parent, [])]
        found.update(frontier)
    return found


def end_descendants(*, grace_s: float) -> None:
    """Ask every descendant of this process to end, and kill those that have not after `grace_s` seconds.

    All children are waited for: read the exit status of one before.

    Parameters
    ----------
    grace_s
        Seconds between SIGTERM and SIGKILL.
    """
    for number, limit_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, grace_s)):
        end = time.monotonic() + limit_s
        asked: set[int] = set()
        while alive := descendants(os.getpid()):
            for pid in alive - asked if number == signal.SIGTERM else alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            asked |= alive
            if time.monotonic() > end:
                break
            time.sleep(POLL_S)
        if not alive:
            break
    with contextlib.suppress(ChildProcessError):  # adopted ones have nobody else to be waited for by
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
