"""The batch step of a job: Ray on all its nodes, the command beside it, and an end that leaves nothing.

``python -m cluster.slurm.allocation --gpus 4,4 -- COMMAND`` runs inside a job; ``python -m cluster slurm`` writes the
job that does so. Standard library only.

Signals: SIGUSR1 (the time limit is near, or SLURM pre-empts) stops the command and requeues the job; SIGTERM (scancel)
ends everything. A trial that is stopped goes on from the checkpoint of its last epoch.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cluster.slurm.container import bound_folders, container_prefix
from cluster.slurm.grant import Allocation, GrantError, Node, read_allocation
from cluster.slurm.node import HEAD_WAIT_S, POLL_S, kept_private, private_folder, ray_environment
from cluster.slurm.processes import adopt_orphans, end_descendants

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    Reason = Literal["time", "cancelled"]

FIRST_PORT, LAST_PORT = 20000, 31999
"""Range of the head's ports: below what Linux hands out by itself."""

PORTS = 3
"""Ports of one job on its head: Ray's own, the dashboard's and the Ray client's, which cannot be left out."""

STOP_S = 30.0
"""Seconds that the command gets to end when the time limit is near, before it is killed."""

CANCEL_S = 6.0
"""Seconds that everything gets to end after scancel: SLURM kills after KillWait, 30 s unless configured."""

MOST_RESTARTS = 30
"""Requeues after which a job ends instead: one that never finishes would be requeued for ever."""

TRY_AGAIN = 75
"""Exit status of a temporary failure (a lost head, a requeue that SLURM refuses): the same command goes on."""

CANCELLED = 128 + signal.SIGTERM
"""Exit status after scancel."""


OF_THE_BATCH_STEP = ("SLURM_CPUS_PER_TASK", "SLURM_TRES_PER_TASK", "SLURM_GPUS_PER_NODE")
"""Options of the job that srun would read from the environment; they need not hold on every node."""

MEMORY = ("SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU", "SLURM_MEM_PER_GPU")
"""Memory of the first component of a heterogeneous job; of any other, these names with ``_HET_GROUP_1`` and so on."""


class ClusterError(RuntimeError):
    """Ray did not start on the nodes."""


@dataclass(frozen=True)
class Ending:
    """What becomes of the job."""

    status: int
    """Exit status; what SLURM reports unless the job is requeued."""
    requeue: bool
    """Whether SLURM is asked to run the job again."""


def decide(status: int | None, reason: Reason | None, restarts: int) -> Ending:
    """Return what becomes of a job.

    Parameters
    ----------
    status
        Exit status of the command; negative when a signal killed it, None when it did not run.
    reason
        Which signal stopped the job; None when none did.
    restarts
        How many times it has been requeued.
    """
    if reason == "cancelled":
        return Ending(CANCELLED, requeue=False)
    if status == 0:
        return Ending(0, requeue=False)
    if reason == "time" or status == TRY_AGAIN:
        return Ending(TRY_AGAIN, requeue=restarts < MOST_RESTARTS)
    return Ending(1 if status is None else 128 - status if status < 0 else status, requeue=False)


def choose_ports(job_id: int, is_free: Callable[[int], bool]) -> tuple[int, ...]:
    """Return the head's ports: those of the job's number, or the next free block of them.

    Raises
    ------
    ClusterError
        If no block is free.
    """
    blocks = (LAST_PORT + 1 - FIRST_PORT) // PORTS
    for step in range(blocks):
        first = FIRST_PORT + (job_id + step) % blocks * PORTS
        ports = tuple(range(first, first + PORTS))
        if all(is_free(port) for port in ports):
            return ports
    msg = f"no free ports between {FIRST_PORT} and {LAST_PORT} on {socket.gethostname()}"
    raise ClusterError(msg)


def is_free(port: int) -> bool:
    """Whether nothing listens on a port of this node, on any address."""
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def step_command(node: Node, arguments: Sequence[str], *, gpus: int) -> list[str]:
    """Return the srun that runs this project's step on one node, with all that the job has there."""
    return [
        "srun",
        "--overlap",  # the batch step and the command share the first node with it
        *([] if node.group is None else [f"--het-group={node.group}"]),
        "--nodes=1",
        "--ntasks=1",
        f"--nodelist={node.name}",
        f"--cpus-per-task={node.cpus}",
        *([f"--gpus-per-node={gpus}"] if gpus else []),
        "--cpu-bind=none",
        "--mem=0",
        "--export=ALL",
        "--kill-on-bad-exit=0",
        sys.executable,
        "-m",
        "cluster.slurm.node",
        *arguments,
    ]


def step_environment(environment: Mapping[str, str], node: Node) -> dict[str, str]:
    """Return the environment of a node's step: the batch step's, but with the memory of the node's own component."""
    kept = {name: value for name, value in environment.items() if name not in OF_THE_BATCH_STEP}
    if node.group is None:
        return kept
    own = {name: environment.get(f"{name}_HET_GROUP_{node.group}") for name in MEMORY}
    return {name: value for name, value in (kept | own).items() if value is not None}


def filled(command: Sequence[str], array_index: str | None) -> list[str]:
    """Replace ``{array}`` by the index of this task where the job is an array."""
    return [word if array_index is None else word.replace("{array}", array_index) for word in command]


def own_address(nodes: Sequence[Node]) -> str:
    """Return the address of this node that the other nodes reach: the one its packets to them come from."""
    other = nodes[-1].name
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((_resolvable(other), 9))  # no packet is sent
        address = str(probe.getsockname()[0])
        if not address.startswith("127."):
            return address
        if len(nodes) == 1:
            return "127.0.0.1"  # Ray replaces it by the address it chooses itself
    msg = f"no route from {socket.gethostname()} to node {other}; check that its name or NodeAddr resolves here"
    raise ClusterError(msg)


def _resolvable(node: str) -> str:
    with contextlib.suppress(OSError):
        return socket.gethostbyname(node)
    shown = subprocess.run(["scontrol", "show", "node", node, "--oneliner"], capture_output=True, text=True, check=True)
    fields = dict(part.split("=", 1) for part in shown.stdout.split() if "=" in part)
    return socket.gethostbyname(fields["NodeAddr"])


def hostnames(nodelist: str) -> list[str]:
    """Return the names in SLURM's short form of a list of nodes."""
    command = ["scontrol", "show", "hostnames", nodelist]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


class Signals:
    """Why the job should stop; empty until a signal arrives."""

    def __init__(self) -> None:
        self.reason: Reason | None = None
        signal.signal(signal.SIGUSR1, lambda *_: self._set("time"))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._set("cancelled"))

    @property
    def why(self) -> str:
        """The reason, for the job's log."""
        return "the time limit is near" if self.reason == "time" else "cancelled"

    def _set(self, reason: Reason) -> None:
        if self.reason != "cancelled":
            self.reason = reason


@dataclass(frozen=True)
class Place:
    """Where the job's Ray is, and how to run something beside it."""

    allocation: Allocation
    gpus: tuple[int, ...]
    """GPUs asked for on every node."""
    head: str
    """Address of the head."""
    ports: tuple[int, ...]
    """Ports on the head: Ray's own, the dashboard's and the Ray client's."""
    container: Path | None
    """Apptainer image, if any."""
    token: Path
    """File of the token on this node."""

    @property
    def environment(self) -> dict[str, str]:
        """Environment of the command, which makes it join this Ray."""
        return ray_environment(os.environ, self.token) | {"RAY_ADDRESS": f"{self.head}:{self.ports[0]}"}

    @property
    def ray_folder(self) -> Path:
        """Private folder of Ray on this node, with the sockets through which the command talks to it."""
        return self.token.parent.with_name(folder_name(self.allocation.job_id, 0))

    def run(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start a command beside Ray."""
        folders = [*bound_folders(os.environ), self.token.parent, self.ray_folder]
        prefix = container_prefix(self.container, folders, gpus=self.gpus[0])
        return subprocess.Popen(
            [*prefix, *command], env=self.environment, stdin=subprocess.DEVNULL, start_new_session=True
        )


def folder_name(job_id: int, step: int | str) -> str:
    """Return the name of the temporary folder of a node's step, or of the batch step (``b``)."""
    return f"lbp-{job_id}.{step}"


def start_node(place: Place, index: int, token: str) -> subprocess.Popen[bytes]:
    """Start Ray on one node, the head if `index` is 0; it runs until its standard input ends."""
    node = place.allocation.nodes[index]
    # A name per node: somebody's TMPDIR may lie on storage that the nodes share.
    arguments = [f"--folder-name={folder_name(place.allocation.job_id, index)}", f"--head={place.head}"]
    arguments.append(f"--gpus={place.gpus[index]}")
    arguments += ["--ports", *(str(port) for port in place.ports)]
    if index == 0:
        arguments.append("--is-head")
    if place.container is not None:
        arguments += [f"--container={place.container}", *(f"--bind={folder}" for folder in bound_folders(os.environ))]
    command = step_command(node, arguments, gpus=place.gpus[index])
    environment = step_environment(os.environ, node)
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, start_new_session=True)
    assert process.stdin is not None
    process.stdin.write(f"{token}\n".encode())
    process.stdin.flush()
    return process


@contextmanager
def ray_on_nodes(place: Place, token: str, signals: Signals) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Run Ray on all nodes for the duration of the block."""
    steps = [start_node(place, index, token) for index in range(len(place.allocation.nodes))]
    try:
        yield steps
    finally:
        for step in steps:
            assert step.stdin is not None
            with contextlib.suppress(OSError):
                step.stdin.close()
        limit_s = CANCEL_S if signals.reason == "cancelled" else STOP_S
        end = time.monotonic() + limit_s
        while any(step.poll() is None for step in steps) and time.monotonic() < end:
            time.sleep(POLL_S)


def wait_for(
    process: subprocess.Popen[bytes],
    steps: list[subprocess.Popen[bytes]],
    place: Place,
    signals: Signals,
    *,
    needed: int = 1,
) -> int | None:
    """Return the exit status of a process; None if a signal told the job to stop. A lost node is said once.

    The process is stopped where one of the first `needed` nodes is lost.
    """
    lost: set[int] = set()
    while (status := process.poll()) is None and signals.reason is None:
        for index, step in enumerate(steps):
            if step.poll() is not None and index not in lost:
                lost.add(index)
                say(f"Ray on node {place.allocation.nodes[index].name} has ended with status {step.returncode}")
                if index < needed:
                    stop(process, CANCEL_S)
                    return TRY_AGAIN
        time.sleep(POLL_S)
    return status


def wait_for_head(head: subprocess.Popen[bytes], place: Place, signals: Signals) -> bool:
    """Return whether the head's Ray listens before it ends, time is up or a signal tells the job to stop."""
    end = time.monotonic() + HEAD_WAIT_S
    while head.poll() is None and signals.reason is None and time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection((place.head, place.ports[0]), timeout=2):
            return True
        time.sleep(POLL_S)
    return False


def stop(process: subprocess.Popen[bytes], grace_s: float) -> int:
    """Ask a process group to end, kill it after `grace_s` seconds, and return its exit status."""
    for number, limit_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, grace_s)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(limit_s)
    return -signal.SIGKILL


def say(message: str) -> None:
    """Write one line to the job's log."""
    sys.stdout.write(f"[job {os.environ.get('SLURM_JOB_ID')}] {message}\n")
    sys.stdout.flush()


def run(place: Place, token: str, command: Sequence[str], signals: Signals) -> int | None:
    """Start Ray, run the command and return its exit status; None if it did not run to its end."""
    with ray_on_nodes(place, token, signals) as steps:
        # An image sees of Ray's folder what is there when it starts.
        if place.container is not None and not wait_for_head(steps[0], place, signals):
            say(f"Ray does not answer on {place.allocation.nodes[0].name}; its own lines stand above")
            return None
        expected = ",".join(str(number) for number in place.gpus)
        gathering = place.run(["python", "-m", "cluster.slurm.gather", expected])
        if wait_for(gathering, steps, place, signals, needed=len(steps)) != 0:
            if signals.reason is not None:
                say(f"stopping before the command has begun: {signals.why}")
            return None
        _tell(place)
        study = place.run(command)
        status = wait_for(study, steps, place, signals)
        if signals.reason is not None and status is None:
            say(f"stopping the command: {signals.why}")
            return stop(study, STOP_S if signals.reason == "time" else CANCEL_S / 2)
        return status


def _tell(place: Place) -> None:
    job, node, port = place.allocation.job_id, place.allocation.nodes[0].name, place.ports[1]
    say(f"dashboard: ssh -L {port}:127.0.0.1:{port} {node}, then http://127.0.0.1:{port}")
    say(f"its token: srun --jobid={job} --overlap --nodes=1 --ntasks=1 --nodelist={node} cat {place.token}")


def requeue_command(environment: Mapping[str, str]) -> list[str]:
    """Return the command that puts this job, or this task of an array alone, back into the queue.

    One task of an array has the array's own number as its job id, which would requeue all tasks. ``Incomplete`` leaves
    a job alone that scancel has ended meanwhile.
    """
    job = environment["SLURM_JOB_ID"]
    if "SLURM_ARRAY_TASK_ID" in environment:
        job = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return ["scontrol", "requeue", "Incomplete", job]


def conclude(ending: Ending) -> int:
    """Requeue the job if that was decided, and return the exit status of this process."""
    if not ending.requeue:
        return ending.status
    say("requeued: what is missing runs when the job starts again")
    answer = subprocess.run(requeue_command(os.environ), capture_output=True, text=True, check=False)
    if answer.returncode:
        say(f"SLURM does not requeue the job ({answer.stderr.strip()}); submit it again, committed trials stay")
    return ending.status


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line of the batch step."""
    parser = argparse.ArgumentParser(prog="python -m cluster.slurm.allocation", description=__doc__)
    parser.add_argument("--gpus", required=True, help="GPUs of every node, such as 4,4,2")
    parser.add_argument("--container", type=Path, help="Apptainer image that Ray and the command run in")
    parser.add_argument("command", nargs="+", help="what to run, after --")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the job's command on the job's nodes and return the exit status."""
    parsed = parse(arguments)
    adopt_orphans()
    signals = Signals()
    status: int | None = None
    try:
        allocation = read_allocation(os.environ, hostnames)
        gpus = tuple(int(number) for number in parsed.gpus.split(","))
        token = secrets.token_hex(32)
        command = filled(parsed.command, os.environ.get("SLURM_ARRAY_TASK_ID"))
        with kept_private(private_folder(folder_name(allocation.job_id, "b")), token) as file:
            head, ports = own_address(allocation.nodes), choose_ports(allocation.job_id, is_free)
            place = Place(allocation, gpus, head, ports, container=parsed.container, token=file)
            status = run(place, token, command, signals)
            end_descendants(grace_s=CANCEL_S / 2)
    except (ClusterError, GrantError, OSError, subprocess.CalledProcessError) as error:
        say(f"error: {error}")
        return 1
    return conclude(decide(status, signals.reason, allocation.restarts))


if __name__ == "__main__":
    sys.exit(main())
