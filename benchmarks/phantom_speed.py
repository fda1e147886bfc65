"""Seconds per synthetic contrast of 15 slices, one process."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from lbp_ray.phantom.exam import ExamSpec, Imaging, simulate_exam
from lbp_ray.phantom.tissue import T1, T2

if TYPE_CHECKING:
    from collections.abc import Iterator

ROUNDS = 3
SLICES = 15
LIMIT_S = 1.0
"""What one 512 x 512 contrast may take on one core."""


def measure() -> Iterator[dict[str, object]]:
    """Yield CPU seconds per contrast at three matrices, T1 and T2 made together."""
    for matrix in (128, 256, 512):
        imaging = Imaging(matrix=matrix, slices=(SLICES, SLICES))
        seconds = []
        for number in range(ROUNDS):
            begun = time.process_time()
            simulate_exam(ExamSpec(patient_seed=(number,), exam_seed=(number,)), imaging, (T2, T1))
            seconds.append((time.process_time() - begun) / 2)
        yield {
            "figure": f"CPU s per contrast of {SLICES} slices of {matrix} x {matrix}",
            "min": min(seconds),
            "median": float(np.median(seconds)),
            "max": max(seconds),
            "limit": LIMIT_S if matrix == 512 else None,
        }
