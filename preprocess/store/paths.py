"""Where everything that belongs to one store lies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from preprocess.commit import sweep_partials
from preprocess.store.schema import StoreError
from preprocess.store.write import sweep_store

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class StorePaths:
    """Every path of one store and its siblings."""

    store: Path

    def __post_init__(self) -> None:
        if self.store.suffix != ".zarr":
            msg = f"--out must end in .zarr (its siblings are named after it), found {self.store}"
            raise StoreError(msg)

    @property
    def private(self) -> Path:
        """Key, file report and UID index; mode 0700."""
        return self.store.with_suffix(".private")

    @property
    def key(self) -> Path:
        """Default key file."""
        return self.private / "pseudonym.key"

    @property
    def report(self) -> Path:
        """Shareable report."""
        return self.store.with_suffix(".report")

    @property
    def midsagittal(self) -> Path:
        """Parent of the mid-sagittal artefacts."""
        return self.store.with_suffix(".midsagittal")

    def sweep(self) -> None:
        """Delete what killed runs left half-written."""
        sweep_store(self.store)
        private = [self.private / name for name in ("exams", "slices", "parts", "index", "index/batches")]
        for folder in (self.private, self.report, self.midsagittal, *private):
            sweep_partials(folder)
