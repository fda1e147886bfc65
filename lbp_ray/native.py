"""Which arithmetic a device computes natively."""

from __future__ import annotations

from typing import Literal

import torch

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
