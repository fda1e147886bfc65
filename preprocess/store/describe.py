"""What a store holds, in words: counts, ranges and what was not taken, one part of the manifest at a time."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from preprocess.store.read import SliceStore, complete_partitions, stored_series

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

COUNTED = ("contrast", "confidence", "manufacturer", "dtype")
"""Columns whose values are counted."""

RANGES = {
    "num_slices": "slices",
    "rows": "rows",
    "columns": "columns",
    "spacing_slice_mm": "slice pitch (mm)",
    "spacing_row_mm": "row spacing (mm)",
    "spacing_column_mm": "column spacing (mm)",
    "echo_time_ms": "echo time (ms)",
    "repetition_time_ms": "repetition time (ms)",
    "field_strength_t": "field strength (T)",
}
"""Columns described by their smallest and largest value, and how they are called."""


@dataclass
class _Totals:
    """What is kept of all parts: counts, ranges, and one column for distinct patients."""

    counts: dict[str, Counter[str]] = field(default_factory=lambda: {name: Counter() for name in COUNTED})
    low: dict[str, float] = field(default_factory=dict)
    high: dict[str, float] = field(default_factory=dict)
    marks: Counter[str] = field(default_factory=Counter)
    patients: list[Any] = field(default_factory=list)
    exams: int = 0
    series: int = 0
    shard_bytes: int = 0

    def add(self, manifest: pd.DataFrame) -> None:
        for name, counter in self.counts.items():
            counter.update(manifest[name].astype(str).tolist())
        for name in RANGES:
            values = manifest[name].dropna()
            if len(values):
                self.low[name] = min(self.low.get(name, values.min()), values.min())
                self.high[name] = max(self.high.get(name, values.max()), values.max())
        evidence = [set(codes.split(";")) for codes in manifest["evidence"]]
        self.marks["flagged"] += int((manifest["confidence"] == "flagged").sum())
        self.marks["oblique"] += sum("oblique" in codes for codes in evidence)
        self.marks["uneven"] += int(manifest["uneven_spacing"].sum())
        self.marks["with gaps"] += int((manifest["missing_mm"].str.len() > 0).sum())
        self.marks["lossy"] += int(manifest["lossy"].sum())
        self.patients.append(pa.array(manifest["patient_id"].unique(), pa.string()))
        self.exams += manifest["study_id"].nunique()
        self.series += len(manifest)
        self.shard_bytes += int(manifest["shard_bytes"].sum())


def describe_store(path: Path) -> str:
    """Describe a store.

    Parameters
    ----------
    path
        A complete slice store; every part of it is checked as `SliceStore.open` does.

    Returns
    -------
    str
        Lines for people: counts, ranges and pseudonymous names of artefacts; no row of any study.

    Raises
    ------
    preprocess.store.StoreError
        If the folder is no complete store.
    """
    totals = _Totals()
    for partition in complete_partitions(path):
        totals.add(SliceStore.open(path, partition=partition).manifest)
    patients = pc.count_distinct(pa.chunked_array(totals.patients, pa.string())).as_py()
    lines = [
        f"{path}  hash {stored_series(path)[1]}",
        f"{patients} patients, {totals.exams} exams, {totals.series} series",
        *(f"{name}: {_counted(counter)}" for name, counter in totals.counts.items()),
        *(
            f"{title}: {totals.low[name]:g}"
            + ("" if totals.low[name] == totals.high[name] else f" to {totals.high[name]:g}")
            for name, title in RANGES.items()
            if name in totals.low
        ),
        ", ".join(f"{name} {totals.marks[name]}" for name in ("flagged", "oblique", "uneven", "with gaps", "lossy")),
        *_candidate_lines(path),
        *_midsagittal_lines(path),
        f"on disk: pixels {_size(totals.shard_bytes)}, manifest {_size(_folder_bytes(path / 'manifest'))}",
    ]
    return "\n".join(lines)


def _counted(counter: Counter[str]) -> str:
    return ", ".join(f"{value or '(none)'} {count}" for value, count in sorted(counter.items()))


def _candidate_lines(path: Path) -> list[str]:
    """Count the stacks that were not taken, by code."""
    codes: Counter[str] = Counter()
    for part in sorted((path / "candidates").glob("[!.]*.parquet")):
        codes.update(pq.read_table(part, columns=["code"])["code"].to_pylist())
    codes.pop("converted", None)
    return [f"candidates not taken: {_counted(codes)}"] if codes else []


def _midsagittal_lines(path: Path) -> list[str]:
    """One line per mid-sagittal artefact beside the store."""
    lines = []
    for meta_path in sorted(path.with_suffix(".midsagittal").glob("[!.]*/meta.json")):
        meta = json.loads(meta_path.read_text())
        lines.append(
            f"mid-sagittal {meta_path.parent.name}: {meta.get('studies', '?')} studies, "
            f"{len(meta.get('templates', ()))} templates, {meta.get('flagged', '?')} flagged, "
            f"{meta.get('corrections', '?')} corrected, {_size(_folder_bytes(meta_path.parent))}"
        )
    return lines


def _folder_bytes(folder: Path) -> int:
    return sum(entry.stat().st_size for entry in folder.iterdir() if entry.is_file())


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
