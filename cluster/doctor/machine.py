"""CPUs, memory, GPUs, limits and clock of the machine that this runs on."""

from __future__ import annotations

import csv
import ctypes
import math
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cluster.doctor.facts import GpuFacts, MachineFacts

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

NO_LIMIT_BYTES = 2**60
"""Memory limits from here on mean that there is none."""

CUDA_TIMEOUT_S = 120
"""Seconds that PyTorch may take to start and to touch every GPU."""

TIME_ERROR = 5
"""What ``adjtimex`` returns while the clock is not synchronised (Linux, adjtimex(2))."""

TOUCH_EVERY_GPU = """
import torch
count = torch.cuda.device_count()
for index in range(count):
    torch.zeros(1, device=f"cuda:{index}")
print("usable", count)
"""


VECTORS = {"AVX512": {"avx512f", "avx512vl", "avx512bw", "avx512dq", "fma"}, "AVX2": {"avx2", "fma"}}
"""PyTorch's names of vector instructions, the best first, and the CPU's flags that each needs (x86)."""


class Cgroup(NamedTuple):
    """Limits that a control group sets."""

    cpus: float | None
    memory_bytes: int | None


def cgroup(listing: str, root: Path = Path("/sys/fs/cgroup")) -> Cgroup:
    """Read the tightest limits from a process's control groups up to the root.

    Parameters
    ----------
    listing
        Content of ``/proc/self/cgroup``.
    root
        Where control groups are mounted; version 2 wholly, version 1 one folder per controller.
    """
    cpus, memory = math.inf, math.inf
    for line in listing.splitlines():
        _, controllers, inside = line.split(":", 2)
        for name in controllers.split(","):
            for folder in _upwards(root / name, inside):
                cpus = min(cpus, _cpus(folder))
                memory = min(memory, *(_number(folder / file) for file in ("memory.max", "memory.limit_in_bytes")))
    return Cgroup(
        cpus=None if math.isinf(cpus) else cpus, memory_bytes=None if memory >= NO_LIMIT_BYTES else int(memory)
    )


def _upwards(base: Path, inside: str) -> Iterator[Path]:
    here = base / inside.lstrip("/")
    yield here
    while here != base and base in here.parents:
        here = here.parent
        yield here


def _cpus(folder: Path) -> float:
    quota, _, period = _text(folder / "cpu.max").partition(" ")
    if quota.isdigit():
        return int(quota) / int(period)
    old = _number(folder / "cpu.cfs_quota_us")
    return old / _number(folder / "cpu.cfs_period_us") if 0 < old < math.inf else math.inf


def _number(path: Path) -> float:
    text = _text(path)
    return int(text) if text.removeprefix("-").isdigit() else math.inf


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="surrogateescape").strip()
    except OSError:
        return ""


def vectors(cpuinfo: str) -> str | None:
    """Return what ``torch.backends.cpu.get_cpu_capability()`` would; None on other processors than x86.

    Parameters
    ----------
    cpuinfo
        Content of ``/proc/cpuinfo``.
    """
    listed = next((line for line in cpuinfo.splitlines() if line.startswith("flags")), None)
    if listed is None:
        return None
    flags = set(listed.partition(":")[2].split())
    return next((name for name, needed in VECTORS.items() if needed <= flags), "DEFAULT")


def machine_facts() -> MachineFacts:
    """Return CPUs, memory and limits of this machine and process."""
    limits = cgroup(_text(Path("/proc/self/cgroup")))
    lines = (line.split() for line in _text(Path("/proc/meminfo")).splitlines())
    memory = {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines}
    return MachineFacts(
        cpu_count=os.cpu_count() or 1,
        cpus_allowed=len(os.sched_getaffinity(0)),
        cpu_quota=limits.cpus,
        memory_bytes=memory["MemTotal"],
        memory_available=memory["MemAvailable"],
        memory_limit=limits.memory_bytes,
        vectors=vectors(_text(Path("/proc/cpuinfo"))),
        shm_bytes=shutil.disk_usage("/dev/shm").total if os.access("/dev/shm", os.W_OK) else 0,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        processes=resource.getrlimit(resource.RLIMIT_NPROC)[1],
    )


def gpu_facts(environment: Mapping[str, str], *, expected: bool) -> GpuFacts:
    """Return GPUs as the driver and PyTorch see them.

    Parameters
    ----------
    environment
        Variables of the process that hands GPUs out.
    expected
        Whether anybody promised a GPU; without that and without a driver, PyTorch is not started.
    """
    driver = _driver_gpus()
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if not driver and not expected:
        return GpuFacts(visible=visible)
    try:
        touched = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", TOUCH_EVERY_GPU],
            env=dict(environment),
            capture_output=True,
            text=True,
            timeout=CUDA_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return GpuFacts(driver=driver, visible=visible, usable=0, error=f"no answer within {CUDA_TIMEOUT_S} s")
    words = touched.stdout.split()
    if touched.returncode or words[:1] != ["usable"]:
        error = (touched.stderr.strip().splitlines() or [f"exit status {touched.returncode}"])[-1]
        return GpuFacts(driver=driver, visible=visible, usable=0, error=error)
    return GpuFacts(driver=driver, visible=visible, usable=int(words[1]))


def _driver_gpus() -> tuple[str, ...]:
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(row[0].strip() for row in csv.reader(listed.stdout.splitlines()) if row)


def lender_environment(*, in_ray: bool) -> dict[str, str]:
    """Return the variables of the process that lends GPUs out: Ray hides all GPUs from tasks that ask for none."""
    raylet = _text(Path(f"/proc/{os.getppid()}/environ")) if in_ray else ""
    return dict(item.split("=", 1) for item in raylet.split("\0") if "=" in item) or dict(os.environ)


def clock_synchronised() -> bool | None:
    """Whether the kernel holds its clock for synchronised; None where it does not tell."""
    try:
        state: int = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512))  # only asks: its first field is 0
    except AttributeError:
        return None
    return None if state < 0 else state != TIME_ERROR
