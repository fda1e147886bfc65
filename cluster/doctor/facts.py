"""What the doctor asks of a node, what a node tells, and all of it together: plain data that travels as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from cluster.ray.upload import Upload
from lbp_ray.config import FrozenModel

Mode = Literal["here", "ray", "slurm"]
"""Where facts come from: this machine alone, the nodes of a running Ray cluster, or a SLURM job step."""


class Ask(FrozenModel):
    """What every node is asked to look at."""

    mode: Mode = "here"
    probe: str
    """Random name: of the folder that the probe of shared storage leaves, and what its token file holds."""
    storage: tuple[Path, ...] = ()
    """Existing folders that every node must be able to write to."""
    absent: tuple[str, ...] = ()
    """Folders to write to that are not there, nor the folders above them."""
    inputs: tuple[Path, ...] = ()
    """Files and folders that every node must be able to read."""
    weights: str | None = None
    """``imagenet`` or the path of a state dict; None where a study needs no file."""
    ports: tuple[int, ...] = ()
    """TCP ports that must be free."""
    meet_s: float = 30.0
    """Seconds that the nodes of a SLURM step wait for each other: they start together, but Python may load slowly."""
    trial_cpus: float = 1.0
    """CPUs of one worker of a trial."""
    trial_gpus: float | None = None
    """GPUs of one worker of a trial; None where no study says."""


class Offer(FrozenModel):
    """What a node lends, by whoever hands it out."""

    source: Literal["Ray", "SLURM"]
    cpus: float = 0.0
    gpus: float = 0.0
    memory_bytes: int | None = None
    """For processes, the object store included; None where it is not said."""
    object_store_bytes: int | None = None


class StorageFacts(FrozenModel):
    """One shared folder as a node sees it."""

    path: Path
    error: str = ""
    """Why a file could not be written, flushed and renamed over an older one; empty if it could."""
    token_seen: bool = False
    """Whether the token that the first machine wrote is there."""
    free_bytes: int = 0
    free_files: int | None = None
    """None where the file system has no such limit."""
    clock_offset_s: float | None = None
    """The node's clock minus the time that the storage gives to a new file."""


class GpuFacts(FrozenModel):
    """GPUs as the driver, the environment and PyTorch see them."""

    driver: tuple[str, ...] = ()
    """Models that ``nvidia-smi`` lists."""
    visible: str | None = None
    """``CUDA_VISIBLE_DEVICES``; None where it is not set."""
    usable: int | None = None
    """GPUs on which PyTorch could allocate; None where nothing suggests a GPU."""
    error: str = ""


class WeightsFacts(FrozenModel):
    """The file of pretrained weights."""

    path: Path
    sha256: str = ""
    error: str = ""


class MachineFacts(FrozenModel):
    """CPUs, memory and limits of a node."""

    cpu_count: int
    cpus_allowed: int
    """By the process's affinity."""
    cpu_quota: float | None = None
    """By cgroup."""
    memory_bytes: int
    memory_available: int
    memory_limit: int | None = None
    """By cgroup."""
    vectors: str | None = None
    """Vector instructions that PyTorch computes with, named as it names them; None where that is not known."""
    shm_bytes: int = 0
    """Size of /dev/shm."""
    open_files: int
    """Hard limit; -1: none."""
    processes: int
    """Hard limit; -1: none."""


class TempFacts(FrozenModel):
    """The folder for temporary files."""

    path: Path
    error: str = ""
    free_bytes: int = 0
    used_share: float = 0.0
    spare_error: str = ""
    """Why /tmp, which this project takes where `path` is too long for sockets, cannot be written to."""


class TokenFacts(FrozenModel):
    """Ray's token authentication as a process finds it; never the token itself."""

    required: bool
    """Whether ``RAY_AUTH_MODE`` is ``token``."""
    file: Path
    mode: int | None = None
    """Permission bits; None where there is no such file."""
    is_mine: bool = True
    is_named: bool = False
    """Whether ``RAY_AUTH_TOKEN_PATH`` names the file, and no variable holds the token."""


class NodeFacts(FrozenModel):
    """All that one node tells."""

    name: str
    address: str = ""
    """What the node's own name resolves to."""
    versions: dict[str, str | None]
    """Package → version; None where it is not installed."""
    code: str
    """Hash of this project's source files."""
    codecs: dict[str, tuple[str, ...]]
    """Transfer syntax → decoders."""
    machine: MachineFacts
    temp: TempFacts
    gpus: GpuFacts = GpuFacts()
    storage: tuple[StorageFacts, ...] = ()
    unreadable: dict[str, str] = Field(default_factory=dict)
    """Input → why it cannot be read."""
    weights: WeightsFacts | None = None
    busy_ports: dict[int, str] = Field(default_factory=dict)
    """Port → why it cannot be bound."""
    unreachable: dict[str, str] = Field(default_factory=dict)
    """Other node → why no connection to it came about."""
    clock_synchronised: bool | None = None
    """None where the kernel does not tell."""
    token: TokenFacts
    offer: Offer | None = None
    step_nodes: int = 1
    """Nodes of the SLURM step that the node belongs to."""


class Survey(FrozenModel):
    """All that was found out, ready to be judged."""

    ask: Ask
    nodes: tuple[NodeFacts, ...]
    silent: dict[str, str] = Field(default_factory=dict)
    """Node that gave no facts → why."""
    departed: tuple[str, ...] = ()
    """Hosts that were in the Ray cluster and are not any more."""
    storage_errors: dict[str, str] = Field(default_factory=dict)
    """Folder into which this machine could not write the token → why."""
    echoes: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Folder → nodes whose files this machine found there."""
    upload: Upload | None = None
    proxied: str = ""
    """Variable that would send a submission through a proxy."""
