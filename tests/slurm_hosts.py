"""A real SLURM on one machine: a controller, and hosts with a network, a process table and shared memory of their own.

Needs root and the programs of the packages slurm-wlm, munge, iproute2 and util-linux.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
from typing import TYPE_CHECKING

import hosts
from hosts import OTHER_USER, Hosts, closed_folder, end, places, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["OTHER_USER", "Slurm", "closed_folder", "missing_requirement", "slurm"]

PROGRAMS = (*hosts.PROGRAMS, "slurmctld", "slurmd", "sbatch", "munged", "ss")

FIRST_PORT = 16900
"""First of the controllers' ports, which all listen on this machine."""

CONFIGURATION = """
ClusterName=test
SlurmctldHost={here}({bridge})
SlurmctldPort={port}
SlurmdPort=16818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=15
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1
ReturnToService=2
SlurmdTimeout=30
KillWait=30
MessageTimeout=60
GresTypes=gpu
SlurmdParameters=config_overrides
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP GraceTime=10
PartitionName=urgent Nodes=ALL State=UP PriorityTier=10
"""

CGROUP = "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\nConstrainCores=no\nConstrainRAMSpace=no\nConstrainDevices=no\n"
"""Must exist; nothing is mounted or constrained."""


def missing_requirement() -> str | None:
    """Return why a real SLURM cannot run here, or None."""
    return hosts.missing_requirement(PROGRAMS)


class Slurm(Hosts):
    """A running cluster."""

    @property
    def environment(self) -> dict[str, str]:
        """What a login node has in its environment."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf"), "TMPDIR": str(self.folder / "t")}

    def ask(self, *command: str) -> str:
        """Run a SLURM command and return what it prints."""
        given = {**os.environ, **self.environment}
        return subprocess.run(command, env=given, check=True, capture_output=True, text=True, timeout=60).stdout


@contextlib.contextmanager
def slurm(count: int = 2, *, cpus: int = 4, gpus: int = 2, kinds: tuple[str, ...] = ()) -> Iterator[Slurm]:
    """Run a cluster for the duration of the block; nothing of it is left after.

    Parameters
    ----------
    count
        Number of hosts.
    cpus, gpus
        What every host claims to have; the GPUs are copies of /dev/null.
    kinds
        GPU type of every host; empty gives them none.
    """
    with places(count, Slurm) as (cluster, undo):
        assert isinstance(cluster, Slurm)
        _write_configuration(cluster, cpus=cpus, gpus=gpus, kinds=kinds)
        _start_controller(cluster, undo)
        for name in cluster.names:
            cluster.start(name, f"slurmd -D -f {cluster.folder}/slurm.conf -N {name}")
            undo.callback(cluster.kill, name)
        _wait_until_idle(cluster)
        undo.callback(cancel_all, cluster)
        yield cluster


def _write_configuration(cluster: Slurm, *, cpus: int, gpus: int, kinds: tuple[str, ...]) -> None:
    folder = cluster.folder
    for name in ("state", "dev", "munge", *(f"spool/{host}" for host in cluster.names)):
        (folder / name).mkdir()
    for number in range(gpus):
        os.mknod(folder / "dev" / f"nvidia{number}", 0o20666, os.makedev(1, 3))
    typed = dict(zip(cluster.names, (f"{kind}:" for kind in kinds), strict=True)) if kinds else {}
    nodes = "\n".join(
        f"NodeName={name} NodeAddr={cluster.address(name)} NodeHostname={name} CPUs={cpus} RealMemory=8000 "
        f"Gres=gpu:{typed.get(name, '')}{gpus} State=UNKNOWN"
        for name in cluster.names
    )
    here = socket.gethostname()
    port = FIRST_PORT + cluster.number
    text = CONFIGURATION.format(here=here, bridge=cluster.bridge, port=port, folder=folder, nodes=nodes)
    devices = "\n".join(
        f"NodeName={name} Name=gpu {f'Type={typed[name][:-1]} ' if typed else ''}File={folder}/dev/nvidia[0-{gpus - 1}]"
        for name in cluster.names
    )
    (folder / "slurm.conf").write_text(text)
    (folder / "gres.conf").write_text(f"{devices}\n")
    (folder / "cgroup.conf").write_text(CGROUP)


def _start_controller(cluster: Slurm, undo: contextlib.ExitStack) -> None:
    munge = cluster.folder / "munge"
    (munge / "key").write_bytes(secrets.token_bytes(128))
    (munge / "key").chmod(0o400)
    munge.chmod(0o755)
    named = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    files = [f"--{option}={munge / name}" for option, name in named.items()]
    commands = {
        "munged": ["munged", "--foreground", "--force", *files],
        "slurmctld": ["slurmctld", "-D", "-c", "-f", str(cluster.folder / "slurm.conf")],
    }
    for name, command in commands.items():
        with (cluster.folder / "log" / f"{name}.out").open("wb") as log:
            orphaned_never = ["setpriv", "--pdeathsig=KILL", *command]
            process = subprocess.Popen(orphaned_never, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        undo.callback(end, process)
        wait_for(lambda: (munge / "socket").exists(), "munged's socket")


def _wait_until_idle(cluster: Slurm) -> None:
    def idle() -> bool:
        with contextlib.suppress(subprocess.CalledProcessError):
            return cluster.ask("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == str(len(cluster.names))
        return False

    wait_for(idle, f"{len(cluster.names)} idle hosts; see {cluster.folder}/log")


def cancel_all(cluster: Slurm) -> None:
    """End every job of a cluster, and wait until it is gone."""
    if jobs := cluster.ask("squeue", "-h", "-o", "%i").split():
        cluster.ask("scancel", *jobs)
        with contextlib.suppress(TimeoutError):
            wait_for(lambda: not cluster.ask("squeue", "-h", "-o", "%i").split(), "end of the jobs", limit_s=40)
