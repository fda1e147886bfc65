"""The micro-benchmarks of conversion, crops and storage, in this process, on a synthetic exam."""

from __future__ import annotations

import os
import time
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lbp_ray.metrics import patient_resamples, resampled_metrics
from lbp_ray.phantom.dicom import Identity, write_exam
from lbp_ray.phantom.exam import ExamSpec, Imaging, simulate_exam
from lbp_ray.phantom.tissue import T2
from lbp_ray.plan.probes import ROUNDS
from preprocess.headers.index import index_files, walk
from preprocess.midsagittal.match import MidsagittalChoice, Templates, find_midsagittal, make_templates
from preprocess.pipeline import ConvertJob, convert_tree
from preprocess.store.read import SliceStore
from preprocess.store.write import use_one_thread

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

EXAMS = 4
"""Exams of the measured conversion; what a run costs by itself is shared by them."""

STORAGE_BYTES = 48 * 2**20
"""Size of the file that is written, flushed and read."""

UNITS, RESAMPLES = 400, 100
"""Of the measured bootstrap."""


class Disk(NamedTuple):
    """Rounds of the storage's rates, in bytes per second."""

    read: list[float]
    write: list[float]


class Exams(NamedTuple):
    """Rounds of what conversion, choice and cutting cost, in seconds per unit."""

    convert_slice: list[float]
    header: list[float]
    locate: list[float]
    crop: list[float]
    store_ratio: float


def measure_exams(root: Path, *, matrix: int, slices: int, box: tuple[int, int], offsets: int) -> Exams:
    """Convert, locate and crop synthetic exams, and read what was stored.

    Parameters
    ----------
    root
        Empty folder.
    matrix
        Rows and columns of a slice.
    slices
        Slices of a series, at least eight.
    box
        Height and width of the crops in pixels; cut down to the matrix.
    offsets
        Crops of an exam.
    """
    use_one_thread()
    exam = simulate_exam(ExamSpec(), Imaging(matrix=matrix, slices=(slices, slices)), (T2,))
    tree = root / "dicom"
    for number in range(EXAMS):
        identity = Identity(
            patient_id=f"patient{number}",
            patient_name="",
            accession=f"accession{number}",
            sex="O",
            age_years=46,
            date="20120101",
            time="120000",
            folder=f"exam{number}",
            token=f"exam{number}",
        )
        generator = np.random.default_rng(number)
        write_exam(exam, identity, tree, generator, localizer=False, flipped_share=0.0)
    convert_tree(ConvertJob(tree, root / "warm.zarr"))
    converted, headers, located, cropped = [], [], [], []
    store = SliceStore.open(root / "warm.zarr")
    series = store.manifest["series_id"].tolist()
    templates = _templates(store, series[0])
    for number in range(ROUNDS):
        job = ConvertJob(tree, root / f"{number}.zarr")
        converted.append(_seconds(partial(convert_tree, job)) / (EXAMS * slices))
        headers.append(_seconds(lambda: index_files(str(tree), list(walk(tree)))) / (EXAMS * slices))
        located.append(_seconds(lambda: [_locate(store, name, templates) for name in series]) / EXAMS)
        cropped.append(
            _seconds(lambda: [store.read(name)[:offsets, : box[0], : box[1]].copy() for name in series]) / EXAMS
        )
    pixels = EXAMS * slices * matrix * matrix * 2
    return Exams(converted, headers, located, cropped, float(store.manifest["shard_bytes"].sum()) / pixels)


def _templates(store: SliceStore, series_id: str) -> Templates:
    spacing = _spacing(store, series_id)
    volume = store.read(series_id)
    middle = len(volume) // 2
    return make_templates([(f"t{number}", "nobody", volume[middle + number - 2], spacing) for number in range(4)])


def _spacing(store: SliceStore, series_id: str) -> tuple[float, float]:
    record = store.record(series_id)
    return record.spacing_row_mm, record.spacing_column_mm


def _locate(store: SliceStore, series_id: str, templates: Templates) -> MidsagittalChoice:
    return find_midsagittal(store.read(series_id), _spacing(store, series_id), templates)


def measure_storage(folder: Path, *, crop_bytes: int) -> Disk:
    """Write and flush a file, drop it from the page cache where the system can, and read crops of it at random.

    Parameters
    ----------
    folder
        Where to write; the file is deleted.
    crop_bytes
        Bytes of one crop.
    """
    path = folder / "crops.bin"
    content = np.random.default_rng(0).integers(0, 256, STORAGE_BYTES, dtype=np.uint8).tobytes()
    starts = np.random.default_rng(1).permutation(STORAGE_BYTES // crop_bytes) * crop_bytes
    rates = Disk([], [])
    for _ in range(ROUNDS):
        rates.write.append(STORAGE_BYTES / _seconds(partial(_write, path, content)))
        rates.read.append(len(starts) * crop_bytes / _seconds(partial(_read, path, starts, crop_bytes)))
    path.unlink()
    return rates


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read(path: Path, starts: np.ndarray, crop_bytes: int) -> None:
    pixels = np.memmap(path, dtype=np.uint8, mode="r")
    for start in starts:
        pixels[start : start + crop_bytes].copy()


def measure_bootstrap() -> list[float]:
    """Resample metrics; seconds per unit and resample, one for each round."""
    generator = np.random.default_rng(0)
    labels, scores = np.arange(UNITS) % 5 == 0, generator.random(UNITS)
    weights = patient_resamples(np.arange(UNITS), labels, resamples=RESAMPLES, seed=0)
    work = partial(resampled_metrics, labels.astype(int), scores, (scores > 0.5).astype(int), weights)
    work()
    return [_seconds(work) / (UNITS * RESAMPLES) for _ in range(ROUNDS)]


def _seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun
