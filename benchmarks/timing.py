"""Timing side by side: cases in alternating rounds of one process, ratios per round, and the gemm peak beside them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from lbp_ray.native import native_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

ROUNDS = 3
"""Rounds of a ratio; its spread over them is printed."""

GEMM_SIZE = 2048
"""Rows of the square matrices of the CPU's gemm peak: 4,096 are no faster, 1,024 are slower by a few per cent."""


def spread(values: np.ndarray | Sequence[float]) -> dict[str, float]:
    """Smallest, median and largest of the rounds' ratios, to four significant digits."""
    low, middle, high = np.quantile(np.asarray(values), [0, 0.5, 1])
    return {"min": float(f"{low:.4g}"), "median": float(f"{middle:.4g}"), "max": float(f"{high:.4g}")}


def interleave(
    cases: Mapping[str, Callable[[], object]], *, rounds: int = ROUNDS, clock: Callable[[], float] = time.process_time
) -> dict[str, np.ndarray]:
    """Run every case once per round, in turn, after one round that is not counted.

    Parameters
    ----------
    cases
        Name → what is timed.
    rounds
        Counted rounds.
    clock
        Seconds; by default CPU time of this process, which other processes disturb least.

    Returns
    -------
    dict
        Name → (rounds,) seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, case in cases.items():
            begun = clock()
            case()
            if number:
                seconds[name].append(clock() - begun)
    return {name: np.array(values) for name, values in seconds.items()}


def fastest_type(device: str = "cpu") -> torch.dtype:
    """Return bfloat16 where the device computes it natively, else float32: emulated, it takes some 90 times as long."""
    native = native_dtype("auto", gpu=device.startswith("cuda")) == "bfloat16"
    return torch.bfloat16 if native else torch.float32


def gemm(dtype: torch.dtype, *, size: int = GEMM_SIZE, device: str = "cpu") -> tuple[Callable[[], object], float]:
    """Return a square matrix product and its GFLOP."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
    return lambda: left @ right, 2 * size**3 / 1e9
