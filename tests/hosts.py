"""Hosts on one machine: each has a network, a process table, a temporary folder and shared memory of its own.

Needs root and the programs of the packages iproute2 and util-linux.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

PROGRAMS = ("ip", "unshare", "nsenter", "setpriv")

NETWORK = "10.77"
"""First half of the hosts' addresses; the third number is the bridge's."""

LOCKS = Path("/var/tmp/lbp-ray-hosts")
"""One empty file per number of a bridge, locked while a test process has it; they stay, so that no lock is lost."""

WAIT_S = 180.0
"""Seconds within which what is waited for must have come, unless told otherwise."""

HOST = """
set -e
hostname {name}
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/resolv.conf /etc/resolv.conf
mount -t tmpfs -o size=2g,mode=1777 tmpfs /dev/shm
mount --bind {folder}/spool/{name}.tmp {folder}/t
{opened}
{main} &
wait
"""
"""What becomes process 1 of a host: its own name, shared memory and temporary folder."""

OPENED = """
mount --bind {python} {folder}/python
mount -t tmpfs -o mode=755 tmpfs {closed}
mkdir -p {python}
mount --move {folder}/python {python}
"""
"""Lets other users reach a Python that lies in somebody's closed home folder."""

ALONE = """
mount --bind {folder}/t /tmp
sleep infinity"""
"""Main process of a host that runs nothing by itself."""

OTHER_USER = 65534
"""Number of a user who owns nothing here."""


def closed_folder(path: Path) -> Path | None:
    """Return the outermost folder on the way to `path` that other users cannot enter, or None."""
    ways = [folder for folder in reversed([path, *path.parents]) if not folder.stat().st_mode & 0o001]
    return ways[0] if ways else None


def missing_requirement(programs: tuple[str, ...] = PROGRAMS) -> str | None:
    """Return why hosts cannot run here, or None."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    absent = [name for name in programs if shutil.which(name) is None]
    if absent:
        return f"needs {', '.join(absent)} (apt-get install slurm-wlm munge iproute2 util-linux)"
    if programs == PROGRAMS and Path(__file__).is_relative_to("/tmp"):
        return "needs the clone elsewhere than in /tmp, of which every host has one of its own"
    probe = subprocess.run(["unshare", "--mount", "--pid", "--net", "--fork", "true"], capture_output=True, check=False)
    return "needs the right to make namespaces" if probe.returncode else None


@dataclass
class Hosts:
    """Running hosts, joined by a bridge to this machine."""

    folder: Path
    """What they share, and their logs."""
    names: tuple[str, ...]
    number: int
    """Number of the bridge; no other test process has it."""
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    """The process that every host hangs on, by the host's name."""

    @property
    def shared(self) -> Path:
        """A folder that every host, every user and this machine see under one path."""
        return self.folder / "shared"

    @property
    def bridge(self) -> str:
        """Address of this machine on the bridge."""
        return f"{NETWORK}.{self.number}.1"

    def address(self, name: str) -> str:
        """Return the address of a host."""
        return f"{NETWORK}.{self.number}.{11 + self.names.index(name)}"

    def wire(self, name: str) -> str:
        """Return the name of a host's network namespace, and of the bridge's end of its wire."""
        return f"sl{self.number}{name}"

    def temporary(self, name: str) -> Path:
        """Return where this machine sees the temporary folder of a host."""
        return self.folder / "spool" / f"{name}.tmp"

    def enter(self, name: str) -> list[str]:
        """Return what to put before a command so that it runs on a host, in this process's folder."""
        return ["nsenter", "--target", str(self.first_process(name)), "--all", f"--wd={Path.cwd()}"]

    def as_user(self, name: str, user: int) -> list[str]:
        """Return what to put before a command so that another user runs it on a host."""
        return [*self.enter(name), "setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]

    def on(self, name: str, *command: str) -> str:
        """Run a command on a host and return what it prints."""
        inside = [*self.enter(name), *command]
        return subprocess.run(inside, check=True, capture_output=True, text=True, timeout=60).stdout

    def first_process(self, name: str) -> int:
        """Return the id, on this machine, of process 1 of a host."""
        pid = self.processes[name].pid
        children = Path(f"/proc/{pid}/task/{pid}/children")
        wait_for(children.read_text, f"process 1 of {name}")
        return int(children.read_text().split()[0])

    def running(self, name: str) -> dict[int, str]:
        """Return the command line of every process of a host, by its id on this machine."""
        space = os.readlink(f"/proc/{self.first_process(name)}/ns/pid")
        found = {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                with contextlib.suppress(OSError):
                    if os.readlink(folder / "ns" / "pid") == space:
                        found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ").strip()
        return found

    def kill(self, name: str) -> None:
        """End a host at once, as a power cut would."""
        self.processes[name].kill()
        self.processes[name].wait()

    def cut(self, name: str, *, healed: bool = False) -> None:
        """Cut a host off the network, or plug it in again."""
        _ip("link", "set", self.wire(name), "up" if healed else "down")

    def start(self, name: str, main: str) -> None:
        """Start a host whose process is the shell command `main`."""
        python = Path(sys.base_prefix)
        closed = closed_folder(python)
        opened = OPENED.format(python=python, closed=closed, folder=self.folder) if closed else ""
        script = HOST.format(name=name, folder=self.folder, opened=opened, main=main)
        spaces = ["--uts", "--mount", "--pid", "--ipc", "--fork", "--kill-child=SIGKILL", "--mount-proc"]
        command = ["ip", "netns", "exec", self.wire(name), "unshare", *spaces, "bash", "-c", script]
        with (self.folder / "log" / f"{name}.out").open("wb") as log:
            self.processes[name] = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)


@contextlib.contextmanager
def hosts(count: int) -> Iterator[Hosts]:
    """Run hosts with nothing on them for the duration of the block; nothing of them is left after."""
    with places(count) as (cluster, undo):
        for name in cluster.names:
            cluster.start(name, ALONE.format(folder=cluster.folder).strip())
            undo.callback(cluster.kill, name)
        for name in cluster.names:
            wait_for(lambda name=name: "sleep infinity" in cluster.running(name).values(), f"{name}; see its log")
        yield cluster


@contextlib.contextmanager
def places(count: int, kind: type[Hosts] = Hosts) -> Iterator[tuple[Hosts, contextlib.ExitStack]]:
    """Make the folders, the bridge and the wires of hosts that are still to be started.

    Yields
    ------
    Hosts
        Of the given kind, n1 and so on.
    contextlib.ExitStack
        What it is told to undo is undone before the wires are taken away.
    """
    with contextlib.ExitStack() as undo:
        number = undo.enter_context(own_number())
        folder = Path(tempfile.mkdtemp(prefix="sl", dir="/var/tmp"))  # paths of sockets must stay short
        undo.callback(shutil.rmtree, folder, ignore_errors=True)
        cluster = kind(folder, tuple(f"n{host}" for host in range(1, count + 1)), number)
        _make_folders(cluster)
        _plug_in(cluster, undo)
        with contextlib.ExitStack() as first:
            yield cluster, first


@contextlib.contextmanager
def own_number() -> Iterator[int]:
    """Hold a number that no other test process of this machine has."""
    LOCKS.mkdir(mode=0o700, exist_ok=True)
    for number in range(1, 250):
        with (LOCKS / str(number)).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            _sweep(number)
            yield number
            return
    msg = f"every number in {LOCKS} is taken"
    raise OSError(msg)


def _sweep(number: int) -> None:
    """Take away what a killed test process with this number has left."""
    spaces = [line.split()[0] for line in _ip("netns", "list").splitlines() if line.startswith(f"sl{number}n")]
    for space in spaces:
        for pid in _ip("netns", "pids", space).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        _ip("netns", "delete", space)
        _drop(space)
    _drop(f"slbr{number}")


def _drop(link: str) -> None:
    subprocess.run(["ip", "link", "delete", link], capture_output=True, check=False)  # the kernel may be first


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def _make_folders(cluster: Hosts) -> None:
    folder = cluster.folder
    folder.chmod(0o755)
    for name in ("log", "t", "python", "shared", *(f"spool/{host}.tmp" for host in cluster.names)):
        (folder / name).mkdir(parents=True)
    for path in (cluster.shared, *(cluster.temporary(name) for name in cluster.names)):
        path.chmod(0o1777)
    lines = [f"127.0.0.1 localhost\n{cluster.bridge} {os.uname().nodename}"]
    lines += [f"{cluster.address(name)} {name}" for name in cluster.names]
    (folder / "hosts").write_text("\n".join(lines) + "\n")
    (folder / "resolv.conf").write_text("options timeout:1 attempts:1\n")


def _plug_in(cluster: Hosts, undo: contextlib.ExitStack) -> None:
    bridge = f"slbr{cluster.number}"
    _ip("link", "add", bridge, "type", "bridge")
    undo.callback(_drop, bridge)
    _ip("address", "add", f"{cluster.bridge}/24", "dev", bridge)
    _ip("link", "set", bridge, "up")
    for name in cluster.names:
        space = wire = cluster.wire(name)
        _ip("netns", "add", space)
        undo.callback(_ip, "netns", "delete", space)
        _ip("link", "add", wire, "type", "veth", "peer", "name", "eth0", "netns", space)
        undo.callback(_drop, wire)
        _ip("link", "set", wire, "master", bridge, "up")
        _ip("-n", space, "address", "add", f"{cluster.address(name)}/24", "dev", "eth0")
        for link in ("lo", "eth0"):
            _ip("-n", space, "link", "set", link, "up")
        _ip("-n", space, "route", "add", "default", "via", cluster.bridge)


def wait_for(condition, what: str, limit_s: float = WAIT_S, step_s: float = 0.1) -> None:
    """Wait until a condition holds; look again after `step_s` seconds.

    Raises
    ------
    TimeoutError
        If it does not within `limit_s` seconds.
    """
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            msg = f"no {what} after {limit_s:.0f} s"
            raise TimeoutError(msg)
        time.sleep(step_s)


def end(process: subprocess.Popen[bytes]) -> None:
    """Ask a process to end, and kill it if it does not."""
    process.terminate()
    try:
        process.wait(timeout=15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
