"""The plan as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lbp_ray.plan.spans import Span

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lbp_ray.plan.calibration import Calibration
    from lbp_ray.plan.check import Comparison
    from lbp_ray.plan.predict import Plan

UNITS = ((86_400.0, "d"), (3_600.0, "h"), (60.0, "min"), (1.0, "s"))
"""Units of time, the largest first; the largest of which there are two is taken."""


def duration(span: Span) -> str:
    """Write a range of seconds in one unit, e.g. ``4.1-5.0 h``; a range that rounds to one value stands once."""
    scale, unit = next(((scale, unit) for scale, unit in UNITS if span.high >= 2 * scale), UNITS[-1])
    low, high = (
        f"{value / scale:.{0 if value / scale >= 10 or value == 0 else 1}f}" for value in (span.low, span.high)
    )
    return f"{low} {unit}" if low == high else f"{low}-{high} {unit}"


def size(amount: float) -> str:
    """Write bytes with three digits, in powers of 1,000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if amount < 999.5 or unit == "TB":
            break
        amount /= 1000
    return f"{amount:.3g} {unit}" if amount < 999.5 else f"{amount:,.0f} {unit}"


def render_plan(plan: Plan, calibration: Calibration) -> str:
    """Write what is planned, the table of stages, the advice and the assumptions."""
    sizes, counts = plan.sizes, plan.counts
    lines = [
        f"{sizes.studies:,} studies ({counts.holdout:,} sealed) of {sizes.exams:,} exams, crops {sizes.height_px} x "
        f"{sizes.width_px}, {counts.trials} trials, {sizes.frozen_epochs} + {sizes.unfrozen_epochs} epochs, batch "
        f"{sizes.batch_size}, {sizes.dtype}",
        f"on {plan.hardware.name}; {plan.slots} trial(s) at once",
        f"{counts.cached_flop / 1e15:.3g} PFLOP; {counts.naive_flop / 1e15:.4g} if every epoch ran the network "
        f"({counts.flop_ratio:.3g} times as much)",
        "",
        *_table(plan),
    ]
    if plan.advice:
        lines += ["", "what breaks or is wasted, and what to set:", *(f"  - {item}" for item in plan.advice)]
    machine = calibration.machine
    lines += [
        "",
        f"measured on {machine.name} ({machine.device}, {machine.cores} cores, load {machine.load:.1f} before) with "
        f"{calibration.workers} worker(s) at once in {calibration.took_s:.0f} s; ranges are the spread of the rounds:",
        *(f"  {line}" for line in _rates(calibration)),
        "stated, not measured: Ray's start, its cost per trial, aggregation without bootstrap, the report",
    ]
    if machine.device == "cpu" and machine.load > machine.cores / 2:
        lines += ["  other work ran on this machine: these are its costs while it is shared; calibrate it idle"]
    if plan.hardware.assumptions:
        lines += ["assumed:", *(f"  - {item}" for item in plan.hardware.assumptions)]
    return "\n".join(lines)


def _table(plan: Plan) -> list[str]:
    header = ("stage", "work", "time", "bottleneck", "per worker", "on disk")
    rows = [
        (
            stage.name,
            stage.work,
            duration(stage.seconds),
            stage.bottleneck,
            size(stage.worker_bytes),
            size(stage.disk_bytes) if stage.disk_bytes else "",
        )
        for stage in plan.stages
    ]
    most = max(stage.worker_bytes for stage in plan.stages)
    misfits = sum(stage.bottleneck == "memory" for stage in plan.stages)
    verdict = f"{misfits} too large" if misfits else ""
    total = ("total", "", duration(plan.total), verdict, size(most), size(plan.disk_bytes))
    return columns([header, *rows, total])


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align rows of text, with a rule under the first and above the last."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    texts = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    rule = "  ".join("-" * width for width in widths)
    return [texts[0], rule, *texts[1:-1], rule, texts[-1]]


def _rates(calibration: Calibration) -> list[str]:
    costs, one = calibration.costs, 1.0
    rates = {
        "extraction": (costs.extraction_s.under(one), "img/s per worker, folded float32"),
        "unfrozen step": (
            costs.training_s.under(one),
            f"img/s per worker, {calibration.dtype}, batch {calibration.probe_images}",
        ),
        "evaluation": (costs.evaluation_s.under(one), f"img/s per worker, {calibration.dtype}"),
        "Adam": (costs.optimiser_s * 1e3, "ms per step of all weights"),
        "head": (costs.head_step_s * 1e3, "ms per step, scoring included"),
        "worker start": (costs.start_s, "s"),
        "gemm float32": (costs.gemm_float32_flop_s * 1e-9, "GFLOP/s per worker"),
        "gemm bfloat16": (costs.gemm_bfloat16_flop_s * 1e-9, "GFLOP/s per worker"),
        "conversion": (costs.convert_slice_s.under(one), "slices/s per core"),
        "header": (costs.header_s.under(one), "files/s per core"),
        "mid-sagittal": (costs.locate_s.under(one), "exams/s per core"),
        "read": (costs.read_bytes_s * 1e-6, f"MB/s of crops at random, {calibration.storage}"),
        "write": (costs.write_bytes_s * 1e-6, f"MB/s flushed, {calibration.storage}"),
    }
    return [
        f"{name.ljust(14)}{span.middle:>9.4g}  ({span.low:.3g}-{span.high:.3g})  {unit}"
        for name, (span, unit) in rates.items()
    ]


def render_check(comparisons: Sequence[Comparison]) -> str:
    """Write predictions beside what a finished run took."""
    rows = [
        (item.stage, duration(item.predicted), duration(Span.exactly(item.took_s)), f"{item.ratio:.2f}")
        for item in comparisons
    ]
    took = sum(item.took_s for item in comparisons)
    ratio = sum(item.predicted.middle for item in comparisons) / took
    total = ("total", "", duration(Span.exactly(took)), f"{ratio:.2f}")
    return "\n".join(columns([("work of all workers", "predicted", "took", "predicted / took"), *rows, total]))
