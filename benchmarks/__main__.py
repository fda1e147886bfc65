"""Run every benchmark: ``python -m benchmarks [NAME ...]``."""

from __future__ import annotations

import json
import os
import platform
import sys
from typing import TYPE_CHECKING

from benchmarks import frozen_stage, phantom_speed, preprocess_memory, preprocess_speed, roi_masks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BENCHMARKS: dict[str, Callable[[], Iterator[dict[str, object]]]] = {
    "frozen_stage": frozen_stage.measure,
    "phantom_speed": phantom_speed.measure,
    "preprocess_speed": preprocess_speed.measure,
    "preprocess_memory": preprocess_memory.measure,
    "roi_masks": roi_masks.measure,
}


def main() -> int:
    """Print one JSON line per figure, the machine first."""
    wanted = sys.argv[1:] or list(BENCHMARKS)
    unknown = [name for name in wanted if name not in BENCHMARKS]
    if unknown:
        sys.stderr.write(f"error: no benchmark {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}\n")
        return 2
    print(json.dumps({"machine": platform.machine(), "cpus": os.cpu_count(), "python": platform.python_version()}))
    for name in wanted:
        for figure in BENCHMARKS[name]():
            print(json.dumps({"benchmark": name, **figure}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
