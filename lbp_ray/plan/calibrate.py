"""All micro-benchmarks in one run, with as many workers at once as a study would have. Without Ray."""

from __future__ import annotations

import multiprocessing
import os
import platform
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from tqdm import tqdm

from lbp_ray.plan import files, probes
from lbp_ray.plan.calibration import Calibration, Costs, Machine
from lbp_ray.plan.spans import PlanError, Span

if TYPE_CHECKING:
    from lbp_ray.plan.sizes import StudySizes

WORKER_BYTES = 2 * 2**30
"""Memory that a calibrating worker may need: fewer run side by side where there is less."""


def calibrate(sizes: StudySizes, *, storage: Path, device: str = "cpu", progress: bool = True) -> Calibration:
    """Measure this machine for a study.

    Parameters
    ----------
    sizes
        Crop size, batch size, type, threads and permutations that are measured.
    storage
        Folder whose file system is measured, e.g. that of the runs; the nearest one above it that exists is used.
    device
        ``cpu`` or ``cuda``. On CPUs as many workers run at once as trials would, on a GPU one.
    progress
        Show a progress bar.

    Raises
    ------
    PlanError
        If a trial takes more threads than there are cores, a worker dies, or the folder cannot be
        written to.
    """
    begun = time.monotonic()
    machine = this_machine(device)
    if sizes.threads > machine.cores:
        msg = (
            f"a trial takes {sizes.threads} threads, this machine has {machine.cores} core(s); lower recipe.threads, "
            "or give the --calibration of a larger machine"
        )
        raise PlanError(msg)
    request = _request(sizes, machine.device)
    by_memory = max(1, int(available_bytes() // WORKER_BYTES))
    workers = 1 if device == "cuda" else max(1, min(machine.cores // sizes.threads, by_memory))
    existing = next(folder for folder in (storage, *storage.parents) if folder.is_dir())
    bar: tqdm[Any] = tqdm(total=len(probes.PROBES) + 3, desc="calibration", unit="probe", disable=not progress)
    with bar:
        measured, start_s, worker_bytes = _networks(request, workers, bar)
        disk = _storage(existing, sizes)
        bar.update()
        with tempfile.TemporaryDirectory() as folder:
            exams = files.measure_exams(
                Path(folder),
                matrix=max(sizes.rows, sizes.columns),
                slices=max(sizes.stored_slices, 8),
                box=(sizes.height_px, sizes.width_px),
                offsets=max(sizes.slice_counts),
            )
        bar.update()
        bootstrap = files.measure_bootstrap()
        bar.update()
    seconds = {name: Span.of([value for part in parts for value in part.seconds]) for name, parts in measured.items()}
    costs = Costs(
        extraction_s=seconds["extraction"],
        evaluation_s=seconds["evaluation"],
        training_s=seconds["training"],
        optimiser_s=seconds["optimiser"],
        head_step_s=seconds["heads"],
        permutation_step_s=seconds["permutation"],
        start_s=Span.of(start_s),
        worker_bytes=worker_bytes,
        gemm_float32_flop_s=seconds["gemm_float32"].under(1.0),
        gemm_bfloat16_flop_s=seconds["gemm_bfloat16"].under(1.0),
        convert_slice_s=Span.of(exams.convert_slice),
        header_s=Span.of(exams.header),
        locate_s=Span.of(exams.locate),
        crop_s=Span.of(exams.crop),
        store_ratio=exams.store_ratio,
        bootstrap_s=Span.of(bootstrap),
        read_bytes_s=Span.of(disk.read),
        write_bytes_s=Span.of(disk.write),
    )
    return Calibration(
        machine=machine,
        height_px=sizes.height_px,
        width_px=sizes.width_px,
        probe_images=min(part.images for part in measured["training"]),
        batch_size=sizes.batch_size,
        dtype=sizes.dtype,
        threads=sizes.threads,
        permutations=sizes.permutations,
        workers=workers,
        storage=str(existing),
        took_s=time.monotonic() - begun,
        costs=costs,
    )


def _request(sizes: StudySizes, device: Literal["cpu", "cuda"]) -> probes.Request:
    """Return what the probes of networks are asked."""
    return probes.Request(
        height_px=sizes.height_px,
        width_px=sizes.width_px,
        batch_size=sizes.batch_size,
        images_per_pass=sizes.images_per_pass,
        carries_norms=sizes.carries_norms,
        dtype=sizes.dtype,
        threads=sizes.threads,
        permutations=sizes.permutations,
        device=device,
    )


def _storage(existing: Path, sizes: StudySizes) -> files.Disk:
    """Measure the file system of a folder, and leave nothing in it."""
    try:
        with tempfile.TemporaryDirectory(dir=existing, prefix=".calibration-") as folder:
            return files.measure_storage(Path(folder), crop_bytes=sizes.height_px * sizes.width_px * 2)
    except OSError as error:
        msg = f"{existing} cannot be written to ({error.strerror}); name another folder as paths.runs"
        raise PlanError(msg) from None


def _networks(
    request: probes.Request, workers: int, bar: tqdm[Any]
) -> tuple[dict[str, list[probes.Measured]], list[float], int]:
    """Run every probe in all workers at once: their answers, seconds that each took to start, and their memory."""
    context = multiprocessing.get_context("spawn")
    begun = time.time()
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=probes.begin, initargs=(request, context.Barrier(workers))
    )
    measured: dict[str, list[probes.Measured]] = {}
    with pool:
        try:
            ready = list(pool.map(probes.started, range(workers)))
            for name in probes.PROBES:
                bar.set_postfix_str(name)
                measured[name] = list(pool.map(probes.probe, [name] * workers))
                bar.update()
        except BrokenProcessPool:
            msg = (
                f"one of {workers} calibrating worker(s) died, most likely for want of memory; plan for a smaller crop "
                "or batch, or give --calibration of another machine"
            )
            raise PlanError(msg) from None
    return measured, [moment - begun for moment, _ in ready], max(memory for _, memory in ready)


def this_machine(device: str) -> Machine:
    """Describe the machine that this process runs on."""
    gpu = torch.cuda.get_device_properties(0) if device == "cuda" else None
    return Machine(
        device="cpu" if gpu is None else "cuda",
        name=_processor() if gpu is None else gpu.name,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        gpus=torch.cuda.device_count() if gpu is not None else 0,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpu_memory_bytes=0 if gpu is None else gpu.total_memory,
        torch=torch.__version__,
        load=os.getloadavg()[0],
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def available_bytes() -> int:
    """Return the memory that new processes can have."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
