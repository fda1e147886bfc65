"""Runs on every node of a job: starts Ray with what was granted there, and ends it when the batch step lets go.

``python -m cluster.slurm.node`` is a step of its own (srun). Its standard input brings the token in the first line and
then stays open: its end is the signal to stop, and it also comes when the batch step is killed. Standard library only.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.slurm.container import container_prefix
from cluster.slurm.grant import Grant, GrantError, look_at_node, read_grant
from cluster.slurm.processes import adopt_orphans, end_descendants

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

LONGEST_FOLDER = 39
"""Longest temporary folder, in bytes, below which the paths of Ray's sockets stay within the 107 that Linux allows."""

END_S = 5.0
"""Seconds that Ray's processes get to end: SLURM kills a cancelled job after KillWait, 30 s unless configured."""

HEAD_WAIT_S = 300.0
"""Seconds that a worker waits for the head."""

ATTEMPTS = 3
"""Starts of Ray on a node, the first included, before the node is given up."""

POLL_S = 0.2
"""Seconds between two looks at what runs."""

GUARDED = ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "RAY_JOB_ID", "RAY_NAMESPACE")
"""Variables of another Ray cluster that a user's shell may hold."""


def private_folder(name: str, base: str | None = None) -> Path:
    """Return where a job keeps its temporary files on one node: short, for the sake of socket paths.

    Parameters
    ----------
    name
        Name of the folder, unique to the job.
    base
        Temporary folder of this machine; None asks for it.
    """
    folder = Path(base or tempfile.gettempdir()) / name
    return folder if len(os.fsencode(folder)) <= LONGEST_FOLDER else Path("/tmp") / name


@contextmanager
def kept_private(folder: Path, token: str) -> Iterator[Path]:
    """Make a folder that only its owner can enter, with the token in it; both are gone after the block.

    Yields
    ------
    Path
        The token's file, mode 0600.
    """
    if folder.is_dir() and not folder.is_symlink() and folder.stat().st_uid == os.getuid():
        shutil.rmtree(folder)  # left by an earlier run of this job that was killed
    folder.mkdir(mode=0o700)
    try:
        file = folder / "token"
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
            opened.write(token)
        yield file
    finally:
        for _ in range(3):  # a process that is being killed may still write
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                break
            time.sleep(POLL_S)


def clear_up(base: Path) -> None:
    """Remove this user's folders of jobs that have ended: one that SLURM killed could not remove its own."""
    for folder in base.glob("lbp-*.*"):
        match = re.fullmatch(r"lbp-(\d+)\.(\d+|b)", folder.name)
        with contextlib.suppress(OSError):  # gone meanwhile
            if match and folder.lstat().st_uid == os.getuid() and _has_ended(match[1]):
                shutil.rmtree(folder)


def _has_ended(job: str) -> bool:
    command = ["squeue", "--noheader", "--format=%i", "--states=all", f"--jobs={job}"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    if listed.returncode:
        return "Invalid job id" in listed.stderr
    return not listed.stdout.strip()


def ray_environment(environment: Mapping[str, str], token: Path) -> dict[str, str]:
    """Return the environment of a process that belongs to this job's Ray cluster, and to no other."""
    kept = {name: value for name, value in environment.items() if name not in GUARDED}
    return kept | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path.cwd()), environment.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",
        "TMPDIR": str(token.parent),  # what a killed process leaves goes with the folder
    }


def start_arguments(grant: Grant, folder: Path, *, head: str, ports: Sequence[int], is_head: bool) -> list[str]:
    """Return the ``ray start`` of one node.

    Parameters
    ----------
    grant
        What Ray may use of the node.
    folder
        Private temporary folder.
    head
        Address of the head.
    ports
        Ports on the head: Ray's own, the dashboard's and the Ray client's.
    is_head
        Whether this node is the head.
    """
    if is_head:
        port, dashboard, client = ports
        role = ["--head", f"--node-ip-address={head}", f"--port={port}", f"--ray-client-server-port={client}"]
        role += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    else:
        role = [f"--address={head}:{ports[0]}"]
    return [
        "start",
        *role,
        f"--num-cpus={grant.cpus}",
        f"--num-gpus={grant.gpus}",
        f"--memory={grant.memory}",
        f"--object-store-memory={grant.object_store}",
        f"--temp-dir={folder / 'ray'}",
        "--min-worker-port=0",  # with fixed ports, the workers of two jobs on one node would meet
        "--max-worker-port=0",
        "--dashboard-agent-listen-port=0",
        "--disable-usage-stats",
        "--block",
    ]


def wait_for_port(host: str, port: int, stop: threading.Event, limit_s: float = HEAD_WAIT_S) -> bool:
    """Return whether something listens at an address before time is up or the batch step lets go."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end and not stop.is_set():
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=2):
            return True
        stop.wait(POLL_S)
    return False


def run_ray(command: list[str], environment: dict[str, str], log: Path, stop: threading.Event) -> int:
    """Run Ray until it ends or `stop` is set; what is left of it is ended.

    Returns
    -------
    int
        0 when stopped, else the exit status of Ray, never 0.
    """
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    while process.poll() is None and not stop.wait(POLL_S):
        pass
    status = process.poll()
    end_descendants(grace_s=END_S)
    return 0 if status is None or stop.is_set() else status or 1


def serve(parsed: argparse.Namespace, token: str, stop: threading.Event) -> int:
    """Keep Ray running on this node until the batch step lets go; a worker's Ray that dies is started again."""
    here = socket.gethostname()
    grant = read_grant(os.environ, look_at_node(), gpus_asked=parsed.gpus)
    folder = private_folder(parsed.folder_name)
    clear_up(folder.parent)
    with kept_private(folder, token) as file:
        log = folder / "ray.out"
        prefix = container_prefix(parsed.container, [*parsed.bind, folder], gpus=grant.gpus)
        ray = start_arguments(grant, folder, head=parsed.head, ports=parsed.ports, is_head=parsed.is_head)
        for _ in range(1 if parsed.is_head else ATTEMPTS):
            if not parsed.is_head and not wait_for_port(parsed.head, parsed.ports[0], stop):
                where = f"{parsed.head}:{parsed.ports[0]}"
                return 0 if stop.is_set() else _fail(here, f"no head answers at {where}; a firewall between nodes?")
            status = run_ray([*prefix, "ray", *ray], ray_environment(os.environ, file), log, stop)
            if status == 0:
                return 0
            _fail(here, f"Ray ended with status {status}; the last it said:\n{_tail(log)}")
        return status


def _tail(log: Path, lines: int = 20) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def _fail(here: str, message: str) -> int:
    sys.stderr.write(f"node {here}: {message}\n")
    sys.stderr.flush()
    return 1


def hold_on_to_input(stop: threading.Event) -> str:
    """Read the token, and set `stop` when standard input ends or a signal asks for it."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda *_: stop.set())
    token = sys.stdin.readline().strip()

    def wait() -> None:
        sys.stdin.read()
        stop.set()

    threading.Thread(target=wait, daemon=True).start()
    return token


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse what the batch step passes."""
    parser = argparse.ArgumentParser(prog="python -m cluster.slurm.node", description=__doc__)
    parser.add_argument("--folder-name", required=True, help="name of this node's temporary folder")
    parser.add_argument("--head", required=True, help="address of the head")
    parser.add_argument("--ports", type=int, nargs="+", required=True, help="ports on the head")
    parser.add_argument("--is-head", action="store_true", help="this node is the head")
    parser.add_argument("--gpus", type=int, required=True, help="GPUs that the job asked for on this node")
    parser.add_argument("--container", type=Path, help="Apptainer image that Ray runs in")
    parser.add_argument("--bind", type=Path, action="append", default=[], help="folder that the container sees")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run this node's Ray and return the exit status."""
    parsed = parse(arguments)
    stop = threading.Event()
    token = hold_on_to_input(stop)
    adopt_orphans()
    try:
        return serve(parsed, token, stop)
    except (GrantError, OSError) as error:
        return _fail(socket.gethostname(), str(error))


if __name__ == "__main__":
    # Not sys.exit: a thread that still reads standard input would be waited for by the interpreter's end.
    code = main()
    sys.stderr.flush()
    os._exit(code)
