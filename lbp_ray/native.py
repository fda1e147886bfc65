"""What a device computes natively, and how a CPU's memory is used."""

from __future__ import annotations

import ctypes
import sys
from typing import TYPE_CHECKING, Literal, get_args

import torch

from lbp_ray.runs import RunError
from preprocess.commit import canonical_json, write_atomic

if TYPE_CHECKING:
    from pathlib import Path

    from lbp_ray.study import StudyConfig

Dtype = Literal["float32", "bfloat16"]


def native_dtype(wanted: Literal["float32", "bfloat16", "auto"], *, gpu: bool) -> Dtype:
    """Return the type that was asked for; ``auto`` becomes what the device computes natively.

    Parameters
    ----------
    wanted
        A type, or ``auto``.
    gpu
        The work runs on GPUs, which are taken to compute bfloat16.
    """
    if wanted != "auto":
        return wanted
    flags: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    native = gpu or flags.get("avx512_bf16", False) or flags.get("amx_bf16", False)
    return "bfloat16" if native else "float32"


KEPT_TYPE = "dtype.json"
"""File in the folder of a study, or of a region finder: what ``auto`` became when it first ran on CPUs."""


def kept_dtype(wanted: Literal["float32", "bfloat16", "auto"], folder: Path, *, gpu: bool, option: str) -> Dtype:
    """Return the type that was asked for; on CPUs ``auto`` stays what it became first, which is said.

    A trial's address names the type: a study that goes on from a CPU of another model would train every trial anew.
    What ``images_per_pass: auto`` becomes follows from the type and the configuration, and stays with it.

    Parameters
    ----------
    wanted
        A type, with which nothing is read or written, or ``auto``.
    folder
        The study's own, which holds `KEPT_TYPE`.
    gpu
        The trials run on GPUs: all are taken to compute bfloat16, and nothing is read or written.
    option
        Names what is decided, for the console.

    Raises
    ------
    RunError
        If `KEPT_TYPE` names no type.
    """
    if gpu or wanted != "auto":
        return native_dtype(wanted, gpu=gpu)
    file, own = folder / KEPT_TYPE, native_dtype("auto", gpu=False)
    reason = f"as when it first ran on CPUs, which {file} keeps"
    if not file.exists():
        write_atomic(file, canonical_json({"cpu": own}).encode())
        does = "computes" if own == "bfloat16" else "does not compute"
        reason = f"this node's CPU {does} bfloat16 natively; {file} keeps it for later runs"
    dtype = _read_type(file)
    sys.stdout.write(f"{option}: auto is {dtype}: {reason}\n")
    if (dtype, own) == ("bfloat16", "float32"):
        sys.stdout.write(
            "warning: this node's CPU only emulates bfloat16, which is slow: run on nodes like the first, or set "
            f"{option}=float32, which trains everything anew\n"
        )
    return dtype


def _read_type(file: Path) -> Dtype:
    types: dict[str, Dtype] = {canonical_json({"cpu": dtype}): dtype for dtype in get_args(Dtype)}
    text = file.read_text().strip()
    if text not in types:
        msg = f"{file} must hold {' or '.join(types)}, found {text[:80]!r}; delete it and the type is decided anew"
        raise RunError(msg)
    return types[text]


PASS_BYTES = 1_280_000
"""Input pixels of a pass on a CPU, in bytes of the autocast type: 4 images of 400 x 200 in float32, 8 in bfloat16. A
ResNet50 keeps 125 times as much for its backward pass where convolutions carry BatchNorm, else 250 times."""

KEPT_TOP_BYTES = 256 * 2**20
"""How much more memory than asked for is taken from the system at a time."""


def images_per_pass(dtype: Dtype, pixels: int) -> int:
    """Return how many images go through a network at once, so that a worker on a CPU stays small.

    Parameters
    ----------
    dtype
        Autocast type.
    pixels
        Of an image; twice as many where BatchNorm is computed apart from its convolution.
    """
    return max(1, PASS_BYTES // (pixels * (2 if dtype == "bfloat16" else 4)))


def for_device(config: StudyConfig, *, gpu: bool) -> StudyConfig:
    """Replace what a recipe leaves to the trials' device (``auto``): the type, and how much of a batch it takes.

    Parameters
    ----------
    config
        The study.
    gpu
        The trials run on GPUs.
    """
    recipe, roi = config.recipe, config.roi
    dtype, most = native_dtype(recipe.unfrozen_dtype, gpu=gpu), recipe.images_per_pass
    if most == "auto":
        whole = gpu or config.compute.workers > 1 or recipe.unfrozen_batchnorm == "train"
        kept = 1 if recipe.carries_norms else 2
        most = None if whole else images_per_pass(dtype, kept * roi.height_px * roi.width_px)
    update = {"unfrozen_dtype": dtype, "images_per_pass": most}
    return config.model_copy(update={"recipe": recipe.model_copy(update=update)})


def keep_freed_memory() -> bool:
    """Let this process keep memory that it frees, and return whether the C library could be told.

    Each training step frees and asks for the same large blocks. glibc hands them back to the system every time, which
    must then fill them with zeros anew: 10 to 40 per cent of a step's CPU time.
    """
    tell = getattr(ctypes.CDLL(None), "mallopt", None)  # musl and macOS have none
    if tell is None:
        return False
    m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3  # of malloc.h
    largest = 2**31 - 1
    options = ((m_mmap_threshold, largest), (m_trim_threshold, largest), (m_top_pad, KEPT_TOP_BYTES))
    return [tell(option, value) for option, value in options] == [1, 1, 1]
