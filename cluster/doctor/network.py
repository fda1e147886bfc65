"""Whether the nodes of a step reach each other: each listens, writes where, and connects to all the others."""

from __future__ import annotations

import socket
import threading
import time
from typing import TYPE_CHECKING

from cluster.doctor.probe import probe_folder, refresh
from preprocess.commit import write_atomic

if TYPE_CHECKING:
    from pathlib import Path

    from cluster.doctor.facts import Ask

POLL_S = 0.3
"""Seconds between two looks for the others."""

CONNECT_S = 5.0
"""Seconds to wait for one connection: a firewall drops packets without a word."""


def meet(ask: Ask, name: str, *, nodes: int) -> dict[str, str]:
    """Connect to every other node of a step and be there for them.

    Parameters
    ----------
    ask
        Whose shared storage the nodes meet on; without any they don't.
    name
        This node's.
    nodes
        How many will come.

    Returns
    -------
    dict
        Node → why it was not reached. A node that never came is not in it: it gives no facts either.
    """
    if nodes < 2 or not ask.storage or not probe_folder(ask.storage[0], ask.probe).is_dir():
        return {}
    folder = probe_folder(ask.storage[0], ask.probe)
    with socket.create_server(("", 0)) as listener:
        threading.Thread(target=_welcome, args=(listener,), daemon=True).start()
        try:
            write_atomic(folder / f"address-{name}", f"{_own_address()} {listener.getsockname()[1]}".encode())
            met = _wait_for(folder, "address-", nodes, ask.meet_s)
            failed = {other: why for other in met - {name} if (why := _connect(folder / f"address-{other}"))}
            write_atomic(folder / f"met-{name}", b"")
            _wait_for(folder, "met-", len(met), ask.meet_s)  # the others may still be on their way here
        except OSError:  # storage that cannot be written to is found by its own check
            return {}
    return failed


def _own_address() -> str:
    """Return the address under which this machine goes out, as Ray chooses it; no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outward:
        try:
            outward.connect(("198.51.100.1", 53))
        except OSError:
            return socket.gethostname()
        return str(outward.getsockname()[0])


def _welcome(listener: socket.socket) -> None:
    while True:
        try:
            listener.accept()[0].close()
        except OSError:  # closed: everybody was here
            return


def _wait_for(folder: Path, prefix: str, count: int, limit_s: float) -> set[str]:
    deadline = time.monotonic() + limit_s
    while True:
        refresh(folder)
        found = {path.name.removeprefix(prefix) for path in folder.glob(f"{prefix}*")}
        if len(found) >= count or time.monotonic() > deadline:
            return found
        time.sleep(POLL_S)


def _connect(place: Path) -> str:
    host, port = place.read_text().split()
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        return f"{host} port {port}: {error.strerror or error}"
    return ""
