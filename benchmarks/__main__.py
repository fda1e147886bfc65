"""Run every benchmark: ``python -m benchmarks [NAME ...] [--quick] [--out FOLDER]``."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import (
    frozen_stage,
    heads,
    intervals,
    optimism,
    peers,
    phantom_speed,
    preprocess_memory,
    preprocess_speed,
    roi_masks,
    scale,
    scaled_study,
    study_cost,
    summary,
    tune_overhead,
)
from lbp_ray.native import native_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BENCHMARKS: dict[str, Callable[..., Iterator[dict[str, object]]]] = {
    "study_cost": study_cost.measure,
    "scaled_study": scaled_study.measure,
    "scale": scale.measure,
    "frozen_stage": frozen_stage.measure,
    "heads": heads.measure,
    "peers": peers.measure,
    "tune_overhead": tune_overhead.measure,
    "intervals": intervals.measure,
    "optimism": optimism.measure,
    "phantom_speed": phantom_speed.measure,
    "preprocess_speed": preprocess_speed.measure,
    "preprocess_memory": preprocess_memory.measure,
    "roi_masks": roi_masks.measure,
}

QUICK = ("study_cost", "scaled_study", "scale", "heads", "peers", "tune_overhead")
"""Those that have a small form, which shows that they run; its figures mean nothing."""


def main(arguments: list[str] | None = None) -> int:
    """Print one JSON line per figure, the machine first, then a table; write all of it and a picture with ``--out``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Speed and memory as ratios.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all by default: {', '.join(BENCHMARKS)}")
    parser.add_argument("--quick", action="store_true", help=f"small sizes, to see that they run: {', '.join(QUICK)}")
    parser.add_argument("--out", type=Path, help="folder for figures.jsonl, table.txt and ratios.png")
    given = parser.parse_args(arguments)
    known = QUICK if given.quick else tuple(BENCHMARKS)
    unknown = [name for name in given.names if name not in known]
    if unknown:
        kind = "quick benchmark" if given.quick else "benchmark"
        sys.stderr.write(f"error: no {kind} {', '.join(unknown)}; there are {', '.join(known)}\n")
        return 2
    lines: list[dict[str, Any]] = [machine()]
    print(json.dumps(lines[0]), flush=True)
    for name in given.names or known:
        for figure in BENCHMARKS[name](**({"quick": True} if given.quick else {})):
            lines.append({"benchmark": name, **figure})
            print(json.dumps(lines[-1]), flush=True)
    print("\n" + summary.table(lines[1:]), end="")
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "figures.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (given.out / "table.txt").write_text(summary.table(lines[1:]))
        summary.plot(lines[1:], given.out / "ratios.png")
        print(f"\nwritten: {given.out}")
    return 0


def machine() -> dict[str, object]:
    """Return what the figures were taken on."""
    described = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    model = re.search(r"model name\s*:\s*(.*)", described)
    return {
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "model": model[1] if model else None,
        "load": round(os.getloadavg()[0], 2),
        "native_dtype": native_dtype("auto", gpu=False),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    sys.exit(main())
