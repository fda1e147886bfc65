"""What was measured on a machine, as a file that another plan can take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import ValidationError

from lbp_ray.config import FrozenModel
from lbp_ray.plan.spans import PlanError, Span
from preprocess.commit import write_atomic

if TYPE_CHECKING:
    from pathlib import Path

CALIBRATION_VERSION = 1
"""Raised by hand when a cost changes its meaning."""


class Machine(FrozenModel):
    """Where and beside what costs were measured."""

    device: Literal["cpu", "cuda"]
    name: str
    """Model of the processor or GPU."""
    cores: int
    """CPU cores that this process may use."""
    gpus: int
    memory_bytes: int
    gpu_memory_bytes: int
    """Of one GPU; 0 without one."""
    torch: str
    load: float
    """Mean number of running processes in the minute before, of everybody."""


class Costs(FrozenModel):
    """What one unit of work costs one worker while all workers of the machine are at it; seconds unless named."""

    extraction_s: Span
    """One image through the folded backbone, float32."""
    evaluation_s: Span
    """One image through the whole network, in the unfrozen epochs' type."""
    training_s: Span
    """One image forward and backward, in the unfrozen epochs' type, without the optimiser."""
    optimiser_s: Span
    """One step of Adam over all weights."""
    head_step_s: Span
    """One step of the last layer on cached features, an epoch's scoring shared out over its steps."""
    permutation_step_s: Span
    """One step of all permutations' last layers at once, scoring shared out likewise; 0 without permutations."""
    start_s: Span
    """A worker from its start to its first work: imports and the network."""
    worker_bytes: int
    """Memory of a worker that has the network, before its first image."""
    gemm_float32_flop_s: Span
    gemm_bfloat16_flop_s: Span
    """Peaks: operations per second of a square matrix product."""
    convert_slice_s: Span
    """One slice from DICOM to the store, header to checksum."""
    header_s: Span
    """One further DICOM file looked at and left aside."""
    locate_s: Span
    """One exam's mid-sagittal slice, its series read from the store."""
    crop_s: Span
    """One exam's crops, its series read from the store."""
    store_ratio: float
    """Bytes stored for each byte of pixels, of a synthetic exam."""
    bootstrap_s: Span
    """One unit (study or slice) in one resample."""
    read_bytes_s: Span
    """Bytes per second of crops read at random, dropped from the page cache where the system allows it."""
    write_bytes_s: Span
    """Bytes per second written and flushed."""


class Calibration(FrozenModel):
    """Costs on one machine, and the settings that they hold for."""

    version: int = CALIBRATION_VERSION
    machine: Machine
    height_px: int
    width_px: int
    """Crop size of all costs of images."""
    probe_images: int
    """Images of a measured batch; at most the recipe's batch size, fewer where those would take too long."""
    batch_size: int
    dtype: Literal["float32", "bfloat16"]
    threads: int
    permutations: int
    workers: int
    """Workers that ran side by side."""
    storage: str
    """Folder that was written to and read from."""
    took_s: float
    costs: Costs

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read a saved calibration.

        Raises
        ------
        PlanError
            If the file is absent, no calibration, or of another version.
        """
        try:
            calibration = cls.model_validate_json(path.read_bytes())
        except OSError as error:
            msg = f"no calibration at {path} ({error.strerror}); write one with --save-calibration {path}"
            raise PlanError(msg) from None
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join(str(part) for part in fault["loc"]) or "file"
            msg = f"{path} is no calibration of this version ({where}: {fault['msg']}); make it anew"
            raise PlanError(msg) from None
        if calibration.version != CALIBRATION_VERSION:
            msg = f"{path} has version {calibration.version}, this program reads {CALIBRATION_VERSION}; make it anew"
            raise PlanError(msg)
        return calibration

    def save(self, path: Path) -> None:
        """Write the calibration as JSON."""
        write_atomic(path, self.model_dump_json(indent=1).encode())
