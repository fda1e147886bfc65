"""The facts of the node that this runs on, in one call."""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import os
import platform
import shutil
import socket
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pydicom.uid import (
    JPEG2000,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

import cluster
import lbp_ray
import preprocess
from cluster.doctor.facts import NodeFacts, Offer, TempFacts, TokenFacts, WeightsFacts
from cluster.doctor.machine import clock_synchronised, gpu_facts, lender_environment, machine_facts
from cluster.doctor.probe import visit
from preprocess.pixels.codecs import available_plugins

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cluster.doctor.facts import Ask

PACKAGES = (
    "numcodecs",
    "numpy",
    "pandas",
    "pyarrow",
    "pydantic",
    "pydicom",
    "ray",
    "scikit-learn",
    "scipy",
    "torch",
    "torchvision",
    "zarr",
)
"""What a study cannot do without; other versions may give other numbers or unreadable files."""

SYNTAXES = {
    "RLE": RLELossless,
    "JPEG": JPEGBaseline8Bit,
    "lossless JPEG": JPEGLosslessSV1,
    "JPEG-LS": JPEGLSLossless,
    "JPEG 2000": JPEG2000,
    "lossless JPEG 2000": JPEG2000Lossless,
}
"""Compressed DICOM as scanners and archives write it."""

SPARE_TEMP = Path("/tmp")
"""Where Ray's files lie instead where the machine's temporary folder is too deep for sockets."""

IMAGENET_FILE = "resnet50-0676ba61.pth"
"""Torchvision's ResNet50 IMAGENET1K_V1; eight digits of its SHA-256 stand in the name."""


def gather(ask: Ask, name: str, offer: Offer | None = None) -> NodeFacts:
    """Look at this node.

    Parameters
    ----------
    ask
        What to look at.
    name
        How the node is called in findings.
    offer
        What is handed out of it, where the node cannot know.
    """
    offer = offer or slurm_offer(os.environ)
    versions: dict[str, str | None] = {package: _version(package) for package in PACKAGES}
    return NodeFacts(
        name=name,
        address=_address(),
        versions={"python": platform.python_version(), **versions},
        code=_code_hash(),
        codecs={syntax: available_plugins(uid) for syntax, uid in SYNTAXES.items()},
        machine=machine_facts(),
        temp=temp_facts(Path(tempfile.gettempdir())),
        gpus=gpu_facts(
            lender_environment(in_ray=ask.mode == "ray"), expected=bool(offer and offer.gpus) or bool(ask.trial_gpus)
        ),
        storage=tuple(visit(folder, ask.probe, node=name) for folder in ask.storage),
        unreadable={str(path): error for path in ask.inputs if (error := unreadable(path))},
        weights=weights_facts(ask.weights, os.environ) if ask.weights else None,
        busy_ports={port: error for port in ask.ports if (error := busy(port))},
        clock_synchronised=clock_synchronised(),
        token=token_facts(os.environ),
        offer=offer,
        step_nodes=int(os.environ.get("SLURM_STEP_NUM_NODES", "1")),
    )


def slurm_offer(environment: Mapping[str, str]) -> Offer | None:
    """Return what SLURM granted of this node, or None outside of its jobs."""
    if "SLURM_JOB_ID" not in environment:
        return None
    cpus = environment.get("SLURM_CPUS_PER_TASK") or environment.get("SLURM_CPUS_ON_NODE", "0")
    memory_mb = environment.get("SLURM_MEM_PER_NODE", "0")
    return Offer(
        source="SLURM",
        cpus=float(cpus),
        gpus=float(environment.get("SLURM_GPUS_ON_NODE") or 0),
        memory_bytes=int(memory_mb) * 2**20 or None,
    )


def _address() -> str:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _code_hash() -> str:
    """Hash the source files of the three packages as they lie on this node."""
    digest = hashlib.sha256()
    for package in (preprocess, lbp_ray, cluster):
        assert package.__file__ is not None
        root = Path(package.__file__).parent
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{package.__name__}/{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def temp_facts(path: Path) -> TempFacts:
    """Return whether temporary files can be made, and the room for them."""
    if error := _unwritable(path):
        return TempFacts(path=path, error=error)
    usage = shutil.disk_usage(path)
    used = 1 - usage.free / usage.total
    return TempFacts(path=path, free_bytes=usage.free, used_share=used, spare_error=_unwritable(SPARE_TEMP))


def _unwritable(folder: Path) -> str:
    """Return why no file can be made in a folder, or nothing."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(b"x" * 4096)
            file.flush()
    except OSError as error:
        return str(error)
    return ""


def unreadable(path: Path) -> str:
    """Return why a file or folder cannot be read, or nothing."""
    try:
        if path.is_dir():
            next(os.scandir(path), None)
        else:
            with path.open("rb") as file:
                file.read(1)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def weights_facts(weights: str, environment: Mapping[str, str]) -> WeightsFacts:
    """Find and hash the file of pretrained weights where this node would look for it."""
    path = Path(weights)
    if weights == "imagenet":
        cache = environment.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        home = environment.get("TORCH_HOME") or os.path.join(cache, "torch")
        path = Path(os.path.expanduser(home), "hub", "checkpoints", IMAGENET_FILE)
    try:
        with path.open("rb") as file:
            return WeightsFacts(path=path, sha256=hashlib.file_digest(file, "sha256").hexdigest())
    except OSError as error:
        return WeightsFacts(path=path, error=error.strerror or str(error))


def busy(port: int) -> str:
    """Return why a TCP port cannot be listened on, or nothing."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that has just been left is free
        try:
            listener.bind(("", port))
            listener.listen(1)
        except OSError as error:
            return "in use" if error.errno == errno.EADDRINUSE else str(error)
    return ""


def token_facts(environment: Mapping[str, str]) -> TokenFacts:
    """Return how Ray's token is kept; the token itself is not read."""
    named = environment.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    required = environment.get("RAY_AUTH_MODE", "").lower() == "token"
    is_named = bool(named) and "RAY_AUTH_TOKEN" not in environment
    try:
        status = path.stat()
    except OSError:
        return TokenFacts(required=required, file=path, is_named=is_named)
    mode = stat.S_IMODE(status.st_mode)
    return TokenFacts(required=required, file=path, mode=mode, is_mine=status.st_uid == os.getuid(), is_named=is_named)
