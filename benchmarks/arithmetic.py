"""What a study costs here: its counts, by `lbp_ray.plan.counts`, times the measured cost of an image and of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lbp_ray.native import for_device
from lbp_ray.plan.counts import Counts, count
from lbp_ray.plan.flops import image_cost
from lbp_ray.plan.sizes import OULU_STUDIES, StudySizes, oulu_config, sizes_of

if TYPE_CHECKING:
    from collections.abc import Mapping

CROP = (400, 200)
"""Rows and columns of the Oulu study's crops."""


def oulu_sizes(**changes: object) -> StudySizes:
    """Return the Oulu study's sizes, some of them replaced."""
    return sizes_of(for_device(oulu_config(), gpu=True), studies=OULU_STUDIES).model_copy(update=changes)


def count_lines(sizes: StudySizes) -> dict[str, str]:
    """Return every count with its arithmetic, for printing."""
    counts = count(sizes)
    runs, inside = sizes.folds * sizes.seeds, counts.developed
    summed, spelled = sum(sizes.slice_counts), "+".join(map(str, sizes.slice_counts))
    fold = inside / sizes.folds
    forward, training, _ = image_cost(sizes.height_px, sizes.width_px)
    rest = f"{counts.training_images:,} x {training / 1e9:.3f} GFLOP + {counts.evaluation_images:,} x "
    rest += f"{forward / 1e9:.3f} GFLOP"
    return {
        "frozen_passes": f"{sizes.frozen_epochs} epochs x {runs} fold-seed pairs x {inside} studies x ({spelled}) "
        f"slices = {counts.frozen_passes:,}",
        "distinct_slices": f"{sizes.studies} x {max(sizes.slice_counts)} = {counts.distinct_slices:,}",
        "training_images": f"{runs} x {inside - fold:.1f} x {summed} = {counts.training_images:,}",
        "evaluation_images": f"{runs} x ({fold:.1f} + {counts.holdout}) x {summed} = {counts.evaluation_images:,}",
        "head_steps": f"{sizes.frozen_epochs} x {counts.unfrozen_steps:,} = {counts.head_steps:,}",
        "flop_network_in_the_loop": f"{counts.frozen_passes:,} x {forward / 1e9:.3f} GFLOP + {rest} = "
        f"{counts.naive_flop / 1e15:.4g} PFLOP",
        "flop_cached": f"{counts.distinct_slices:,} x {forward / 1e9:.3f} GFLOP + {rest} = "
        f"{counts.cached_flop / 1e15:.4g} PFLOP",
    }


@dataclass(frozen=True)
class Costs:
    """Seconds of one image or step, as measured."""

    forward_s: float
    """One image through the network."""
    training_s: float
    """One image forward and backward."""
    extraction_s: float
    """One image through the network that extracts."""
    adam_s: float
    """One optimiser step of all weights."""
    heads_s: float
    """Frozen epochs of all trials on cached features."""

    @classmethod
    def of(cls, seconds: Mapping[str, float]) -> Costs:
        """Gather the fields by their names without ``_s``."""
        return cls(**{f"{name}_s": float(value) for name, value in seconds.items()})

    def frozen_s(self, counts: Counts, *, cached: bool) -> float:
        """Return the seconds of the frozen stage: every pass, or every slice once and the heads."""
        if cached:
            return counts.distinct_slices * self.extraction_s + self.heads_s
        return counts.frozen_passes * self.forward_s

    def study_s(self, counts: Counts, *, cached: bool) -> float:
        """Return the seconds of a whole study."""
        unfrozen_s = counts.training_images * self.training_s + counts.unfrozen_steps * self.adam_s
        return self.frozen_s(counts, cached=cached) + unfrozen_s + counts.evaluation_images * self.forward_s

    def line(self, counts: Counts, *, cached: bool) -> str:
        """Return the sum with its terms."""
        if cached:
            frozen = f"{counts.distinct_slices:,} x {1e3 * self.extraction_s:.4g} ms + {self.heads_s:.4g} s of heads"
        else:
            frozen = f"{counts.frozen_passes:,} x {1e3 * self.forward_s:.4g} ms"
        return (
            f"{frozen} + {counts.training_images:,} x {1e3 * self.training_s:.4g} ms + {counts.unfrozen_steps:,} steps "
            f"x {1e3 * self.adam_s:.4g} ms + {counts.evaluation_images:,} x {1e3 * self.forward_s:.4g} ms = "
            f"{self.study_s(counts, cached=cached):,.0f} s"
        )
