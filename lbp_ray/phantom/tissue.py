"""Materials and the spin-echo signal: every contrast comes from this one table.

Relaxation times are round figures for 1.5 T. T2 of fat is the *effective* one of a long echo train, in which fat stays
bright.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

FAT_T1_MS, FAT_T2_MS, FAT_DENSITY = 265.0, 135.0, 0.95
"""The fat component that `Tissue.fat_fraction` mixes in."""

FAT_SATURATION_RESIDUAL = 0.07
"""Share of the fat signal that survives fat suppression."""

BACKGROUND = 0
"""Material 0: not part of the spine; what lies around it shows through."""


@dataclass(frozen=True)
class Tissue:
    """One material: a water component and the share of fat mixed into it.

    Parameters
    ----------
    density
        Proton density of the water component, 1 for cerebrospinal fluid.
    t1_ms, t2_ms
        Relaxation times of the water component.
    fat_fraction
        Share of the signal-giving protons that are fat, 0 to 1.
    """

    density: float
    t1_ms: float
    t2_ms: float
    fat_fraction: float = 0.0


@dataclass(frozen=True)
class Contrast:
    """A spin-echo protocol: echo time, repetition time and whether fat is suppressed."""

    name: str
    echo_time_ms: float
    repetition_time_ms: float
    echo_train_length: int
    fat_suppressed: bool = False


T2 = Contrast("t2", 112.7, 3500.0, 27)
T1 = Contrast("t1", 11.4, 620.0, 3)
T2_FAT_SUPPRESSED = Contrast("t2fs", 85.0, 3800.0, 17, fat_suppressed=True)

TISSUES: dict[str, Tissue] = {
    "csf": Tissue(1.0, 3600, 1400),
    "cord": Tissue(0.80, 920, 88),
    "nerve": Tissue(0.78, 900, 92),
    "dura": Tissue(0.30, 900, 35),
    "fat": Tissue(0.90, 500, 60, 0.95),
    "loose": Tissue(0.85, 800, 65, 0.62),
    "muscle": Tissue(0.78, 900, 44, 0.03),
    "cortex": Tissue(0.10, 600, 20, 0.05),
    "ligament": Tissue(0.22, 700, 28, 0.04),
    "vein": Tissue(0.95, 1300, 190, 0.15),
    "vessel": Tissue(0.05, 1300, 60),
    "vessel_wall": Tissue(0.45, 850, 45),
    "zone": Tissue(0.98, 1800, 300),
    "cartilage": Tissue(0.75, 1000, 70),
    "fluid": Tissue(0.97, 2800, 600),
    "bowel": Tissue(0.80, 1000, 75, 0.05),
    "stool": Tissue(0.60, 500, 60, 0.2),
    "gas": Tissue(0.02, 1000, 30),
    "skin": Tissue(0.55, 700, 40),
    "organ": Tissue(0.80, 600, 52, 0.05),
}
"""Materials that do not vary between subjects."""


@dataclass
class Palette:
    """The materials of one subject: names and numbered tissues, at most 256 of them.

    ``structure`` holds, per material, the number of the vertebra or disc it belongs to (0: neither).
    """

    tissues: list[Tissue] = field(default_factory=lambda: [Tissue(0.0, 1000.0, 50.0)])
    structure: list[int] = field(default_factory=lambda: [0])
    names: dict[str, int] = field(default_factory=dict)

    @classmethod
    def common(cls) -> Palette:
        """Start a palette with every tissue of `TISSUES`."""
        palette = cls()
        for name, tissue in TISSUES.items():
            palette.names[name] = palette.add(tissue)
        return palette

    def add(self, tissue: Tissue, structure: int = 0) -> int:
        """Append a material and return its number."""
        self.tissues.append(tissue)
        self.structure.append(structure)
        assert len(self.tissues) <= 256, "materials are stored in one byte"
        return len(self.tissues) - 1

    def __getitem__(self, name: str) -> np.uint8:
        return np.uint8(self.names[name])

    def signals(self, contrast: Contrast) -> NDArray[np.float32]:
        """Signal of every material under a contrast.

        Returns
        -------
        numpy.ndarray
            Shape (number of materials,), float32; material 0 gives 0.
        """
        return np.array([signal(tissue, contrast) for tissue in self.tissues], np.float32)


def signal(tissue: Tissue, contrast: Contrast) -> float:
    """Spin-echo signal of a material: density × (1 − exp(−TR/T1)) × exp(−TE/T2), water and fat added.

    Parameters
    ----------
    tissue
        The material.
    contrast
        Echo time, repetition time and fat suppression.

    Returns
    -------
    float
        Signal, 0 to 1, for a coil of uniform sensitivity.
    """
    water = tissue.density * _spin_echo(tissue.t1_ms, tissue.t2_ms, contrast)
    fat = FAT_DENSITY * _spin_echo(FAT_T1_MS, FAT_T2_MS, contrast)
    if contrast.fat_suppressed:
        fat *= FAT_SATURATION_RESIDUAL
    return float((1 - tissue.fat_fraction) * water + tissue.fat_fraction * fat)


def _spin_echo(t1_ms: float, t2_ms: float, contrast: Contrast) -> float:
    recovered = 1 - np.exp(-contrast.repetition_time_ms / t1_ms)
    return float(recovered * np.exp(-contrast.echo_time_ms / t2_ms))
