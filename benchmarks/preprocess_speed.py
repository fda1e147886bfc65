"""DICOM to Zarr beside what a user would take instead, on one tree, interleaved in one run, warm cache.

Ratios are of CPU time (user and system, of this process or of the child) per slice. Nothing but ``preprocess`` checks,
de-identifies, orders, checksums and accounts for its input; the converters write NIfTI, uncompressed unless said.
``dcm2niix`` is taken from the PATH; contenders that are not installed are left out, and said so.
"""

from __future__ import annotations

import resource
import shutil
import subprocess
import tempfile
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pydicom
import zarr

from lbp_ray.config import load_config
from lbp_ray.phantom.config import PhantomConfig
from lbp_ray.phantom.write import write_cohort
from preprocess.headers.index import index_files, walk
from preprocess.pipeline import ConvertJob, convert_tree
from preprocess.store.write import use_one_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROUNDS = 3
COPIES = 3
"""Patients made of each synthetic exam: 84 exams, so that what a part costs by itself is shared by several."""

CONFIG = Path(__file__).parents[1] / "configs" / "phantom_tiny.yaml"
LIMITS = {
    "dcm2niix -z n": 4.0,
    "dcm2niix -z y": 0.5,
    "dicom2nifti": 1 / 1.5,
    "SimpleITK + Zarr": 1.0,
    "pydicom header loop": 1 / 0.9,
}
"""Largest ratio of our CPU time to theirs that was set as the aim."""


def measure() -> Iterator[dict[str, object]]:
    """Yield the ratio to every contender, and the speed-up of a second worker."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        tree, num_slices = make_tree(root)
        yield from _against_others(tree, root / "out", num_slices)
        yield from _second_worker(tree, root / "out", num_slices)


def make_tree(root: Path) -> tuple[Path, int]:
    """Write T2 series of 512 x 512 with the headers of a GE scanner; returns the tree and its number of slices."""
    overrides = [f"out={root / 'phantom'}", "image.matrix=512"]
    write_cohort(load_config(PhantomConfig, CONFIG, overrides), progress=False)
    tree, count = root / "phantom" / "dicom", 0
    for row in index_files(str(tree), list(walk(tree))):
        if row.fault or (row.echo_time_ms or 0) < 70 or "LOCALIZER" in row.image_type:
            (tree / row.path).unlink()
            continue
        for copy in range(1, COPIES):
            _copy(tree / row.path, tree / f"copy{copy}" / row.path, str(copy))
        count += COPIES
    return tree, count


def _copy(path: Path, target: Path, mark: str) -> None:
    """Write an image once more, as another patient's."""
    dataset = pydicom.dcmread(path)
    dataset.PatientID = f"{dataset.PatientID}-{mark}"
    for name in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
        dataset[name].value = f"{dataset[name].value[:60]}.{mark}"
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    target.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(target)


def _against_others(tree: Path, out: Path, num_slices: int) -> Iterator[dict[str, object]]:
    contenders = dict(_contenders(tree, out))
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    _header_loop(tree)
    _preprocess(tree, out)  # warms caches and imports
    for _ in range(ROUNDS):
        for name, run in contenders.items():
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            seconds[name].append(_cpu_seconds(run))
    for ours, others in (
        ("preprocess", ("dcm2niix -z n", "dcm2niix -z y", "dicom2nifti", "SimpleITK + Zarr")),
        ("preprocess headers", ("pydicom header loop",)),
    ):
        for name in others:
            if name not in seconds:
                yield {"figure": f"CPU of {ours} / {name}", "left_out": "not installed"}
                continue
            ratios = np.array(seconds[ours]) / np.array(seconds[name])
            yield {
                "figure": f"CPU of {ours} / {name}, {num_slices} slices of 512 x 512",
                **spread(ratios),
                "limit": round(LIMITS[name], 3),
                "slices_per_cpu_s": {key: round(num_slices / min(seconds[key])) for key in (ours, name)},
            }


def spread(values: np.ndarray | list[float]) -> dict[str, float]:
    """Smallest, median and largest of the rounds' ratios."""
    low, middle, high = np.quantile(values, [0, 0.5, 1])
    return {"min": round(float(low), 3), "median": round(float(middle), 3), "max": round(float(high), 3)}


def _contenders(tree: Path, out: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    yield "preprocess", partial(_preprocess, tree, out)
    yield "preprocess headers", partial(_headers, tree)
    yield "pydicom header loop", partial(_header_loop, tree)
    if shutil.which("dcm2niix"):
        for flag in ("n", "y"):
            command = ["dcm2niix", "-z", flag, "-b", "n", "-o", str(out), str(tree)]
            yield f"dcm2niix -z {flag}", partial(subprocess.run, command, check=True, stdout=subprocess.DEVNULL)
    if find_spec("dicom2nifti"):
        yield "dicom2nifti", partial(_dicom2nifti, tree, out)
    if find_spec("SimpleITK"):
        yield "SimpleITK + Zarr", partial(_simple_itk, tree, out)


def _cpu_seconds(run: Callable[[], object]) -> float:
    """User and system time of this process and of the children that it waited for."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    before = sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, kinds))
    run()
    return sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, kinds)) - before


def _preprocess(tree: Path, out: Path) -> None:
    use_one_thread()
    convert_tree(ConvertJob(tree, out / "x.zarr"))


def _headers(tree: Path) -> None:
    index_files(str(tree), list(walk(tree)))


def _header_loop(tree: Path) -> None:
    for path in tree.rglob("*"):
        if path.is_file():
            try:
                pydicom.dcmread(path, stop_before_pixels=True)
            except pydicom.errors.InvalidDicomError:
                continue


def _dicom2nifti(tree: Path, out: Path) -> None:
    import dicom2nifti

    dicom2nifti.convert_directory(str(tree), str(out), compression=False, reorient=False)


def _simple_itk(tree: Path, out: Path) -> None:
    """Read every series with GDCM and write it as our store would, without checks, order or de-identification."""
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    for number, folder in enumerate(sorted({path.parent for path in tree.rglob("*") if path.is_file()})):
        reader = SimpleITK.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
        pixels_SHW = SimpleITK.GetArrayFromImage(reader.Execute())
        array = zarr.create_array(
            str(out / str(number)),
            shape=pixels_SHW.shape,
            dtype=pixels_SHW.dtype,
            chunks=(1, *pixels_SHW.shape[1:]),
            shards=pixels_SHW.shape,
            compressors=[
                zarr.codecs.BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle"),
                zarr.codecs.Crc32cCodec(),
            ],
        )
        array[...] = pixels_SHW


def _second_worker(tree: Path, out: Path, num_slices: int) -> Iterator[dict[str, object]]:
    """Wall time with one worker over that with two, one thread each, start of Ray excluded."""
    from preprocess.job import connect, map_on_ray

    seconds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(ROUNDS):
        for workers in (1, 2):
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            with connect(workers):
                warm = ((f"warm-{index}", index) for index in range(2 * workers))
                list(map_on_ray(_warm_up, warm, title="warm up", total=2 * workers))
                begun = time.perf_counter()
                convert_tree(ConvertJob(tree, out / "x.zarr"), map_on_ray)
                seconds[workers].append(time.perf_counter() - begun)
    speedups = np.array(seconds[1]) / np.array(seconds[2])
    yield {
        "figure": f"wall of one worker / of two, {num_slices} slices of 512 x 512",
        **spread(speedups),
        "limit": 1.7,
        "seconds": {str(workers): round(float(np.median(values)), 2) for workers, values in seconds.items()},
    }


def _warm_up(index: int) -> float:
    """Load what a worker loads, and stay long enough that every worker takes one."""
    import preprocess.settle  # noqa: F401

    time.sleep(1.0)
    return float(index)
