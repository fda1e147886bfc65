"""Peak memory of the process that starts a conversion, and of a worker, at two sizes of a simulated tree each.

The tree is simulated: its names come from a generator, and header rows are written without files behind them. What is
measured is the project's own code on them: the driver's walk, batches, parts and totals, and a worker that settles one
part. Each size runs in a fresh process; the line through two sizes is extended to 300 million files.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preprocess import pipeline
from preprocess.deidentify import Pseudonymiser
from preprocess.headers.index import FileRow, WalkedFile
from preprocess.partitions import BASE32, BatchOutcome, IndexTask, write_batch
from preprocess.select import Policy
from preprocess.settle import Part, PartOutcome, SettleJob, settle_part
from preprocess.store.write import create_store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TARGET_FILES = 300_000_000
DRIVER_FILES = (2_000_000, 6_000_000)
FILES_PER_FOLDER = 150
PART_ROWS = (20_000, 120_000)
TARGET_ROWS = TARGET_FILES // len(BASE32) ** 2
"""Header rows of one of 1,024 parts."""

ROWS_PER_BATCH = 1_024
DRIVER_LIMIT_MB, WORKER_LIMIT_MB = 2048.0, 400.0
KEY = bytes(range(32))


def measure() -> Iterator[dict[str, object]]:
    """Yield both lines."""
    for what, sizes, target, limit_mb in (
        ("driver", DRIVER_FILES, TARGET_FILES, DRIVER_LIMIT_MB),
        ("worker", PART_ROWS, TARGET_ROWS, WORKER_LIMIT_MB),
    ):
        peaks = [_peak_mb(what, size) for size in sizes]
        slope = (peaks[1] - peaks[0]) / (sizes[1] - sizes[0])
        yield {
            "figure": f"peak memory of the {what}, MB, extended to {target} {'files' if what == 'driver' else 'rows'}",
            "measured": dict(zip(map(str, sizes), [round(peak) for peak in peaks], strict=True)),
            "bytes_each": round(slope * 1e6, 2),
            "extended": round(peaks[1] + slope * (target - sizes[1])),
            "limit": limit_mb,
        }


def _peak_mb(what: str, size: int) -> float:
    command = [sys.executable, "-m", "benchmarks.preprocess_memory", what, str(size)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(json.loads(output.splitlines()[-1]))


def run_driver(num_files: int) -> None:
    """Walk a simulated tree through the driver's own functions; tasks return what real ones would, and do nothing."""

    def walk(root: Path) -> Iterator[WalkedFile]:
        for number in range(num_files):
            yield WalkedFile(f"{number // FILES_PER_FOLDER:08d}/series/{number:09d}.dcm")

    def mapper(function: Any, items: Any, **_: object) -> Iterator[tuple[Any, Any]]:  # noqa: ANN401
        for name, item in items:
            if isinstance(item, Part):
                yield item, PartOutcome(item.name, Counter(converted=item.num_rows), 1, frozenset())
            else:
                pair = BASE32[int(name[-2:]) % 32] + BASE32[int(name[-4:-2]) % 32]
                yield item, BatchOutcome("batch", {pair: len(item)})

    pipeline.walk = walk
    with tempfile.TemporaryDirectory() as folder:
        task = IndexTask("/tree", folder, KEY, 2)
        names, parts, _ = pipeline._index(task, Path("/tree"), num_files, mapper)
        job = SettleJob(Path("/tree"), Path(folder), Path(folder), KEY, Policy(), frozenset(names))
        pipeline._settle(job, parts, mapper)


def run_worker(num_rows: int) -> None:
    """Settle one part whose stacks are all axial: what is left is what grows with the number of rows."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        names = _write_part(root, num_rows)
        job = SettleJob(root, root / "x.zarr", root, KEY, Policy(), frozenset(names))
        settle_part(job, Part("aa", num_rows))


def _write_part(root: Path, num_rows: int) -> list[str]:
    """Write header rows of studies of one part, in a process of its own, whose memory does not count."""
    command = [sys.executable, "-m", "benchmarks.preprocess_memory", "rows", str(num_rows), str(root)]
    names: list[str] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return names


def write_rows(num_rows: int, root: Path) -> None:
    """Make a store and the header rows of studies whose pseudonyms begin with ``aa``; print the batches."""
    pseudonyms, names = Pseudonymiser(KEY), []
    create_store(root / "x.zarr", key_id=pseudonyms.key_id, part_characters=2)
    task = IndexTask("/tree", str(root / "index"), KEY, 2)
    rows: list[FileRow] = []
    for number in range(10**9):
        study_uid = f"1.2.826.0.1.3680043.8.498.{number:024d}"
        if pseudonyms.study(study_uid).startswith("aa"):
            rows += [_row(study_uid, image) for image in range(FILES_PER_FOLDER)]
        if len(rows) >= ROWS_PER_BATCH or (rows and len(names) * ROWS_PER_BATCH + len(rows) >= num_rows):
            names.append(f"batch{len(names):06d}")
            write_batch(task, names[-1], rows, "simulated")
            rows = []
        if len(names) * ROWS_PER_BATCH >= num_rows:
            break
    print(json.dumps(names))


def _row(study_uid: str, number: int) -> FileRow:
    return FileRow(
        f"{study_uid[-10:]}/series/IM{number:06d}.dcm",
        524_288,
        mtime_ns=1_700_000_000_000_000_000,
        sop_class="1.2.840.10008.5.1.4.1.1.4",
        sop_uid=f"{study_uid}.{number // 15}.{number}",
        study_uid=study_uid,
        series_uid=f"{study_uid}.{number // 15}",
        patient_id=study_uid[-8:],
        accession=study_uid[-9:],
        acquisition_date="20200131",
        acquisition_time=f"10{number // 15:02d}00",
        modality="MR",
        manufacturer="GE MEDICAL SYSTEMS",
        series_description="Ax T2 FSE",
        photometric="MONOCHROME2",
        image_type=("ORIGINAL", "PRIMARY", "OTHER"),
        scanning_sequence=("SE",),
        rows=512.0,
        columns=512.0,
        echo_time_ms=112.7,
        repetition_time_ms=3500.0,
        position_mm=(-100.0, -100.0, 4.0 * (number % 15)),
        orientation=(1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
        spacing_mm=(0.5469, 0.5469),
    )


RUNS: dict[str, Callable[[int], None]] = {"driver": run_driver, "worker": run_worker}


if __name__ == "__main__":
    if sys.argv[1] == "rows":
        write_rows(int(sys.argv[2]), Path(sys.argv[3]))
    else:
        RUNS[sys.argv[1]](int(sys.argv[2]))
        # Not getrusage: its peak counts the parent's pages between fork and exec.
        status = Path("/proc/self/status").read_text()
        print(json.dumps(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024))  # type: ignore[index]
