"""A quantity with its range."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from lbp_ray.config import FrozenModel

if TYPE_CHECKING:
    from collections.abc import Sequence


class PlanError(ValueError):
    """A plan that cannot be made as asked."""


class Span(FrozenModel):
    """Lowest, middle and highest value of a quantity; the unit stands in the name of what holds it."""

    low: float
    middle: float
    high: float

    @classmethod
    def of(cls, rounds: Sequence[float]) -> Span:
        """Return minimum, median and maximum of a measurement's rounds."""
        return cls(low=min(rounds), middle=statistics.median(rounds), high=max(rounds))

    @classmethod
    def exactly(cls, value: float) -> Span:
        """Return a value without a range."""
        return cls(low=value, middle=value, high=value)

    def __add__(self, other: Span) -> Span:
        return Span(low=self.low + other.low, middle=self.middle + other.middle, high=self.high + other.high)

    def __mul__(self, factor: float) -> Span:
        return Span(low=self.low * factor, middle=self.middle * factor, high=self.high * factor)

    def under(self, amount: float) -> Span:
        """Return an amount divided by this rate: the highest rate gives the lowest quotient."""
        return Span(low=amount / self.high, middle=amount / self.middle, high=amount / self.low)

    def at_least(self, other: Span) -> Span:
        """Return the larger of two, value by value: the time of what runs side by side."""
        return Span(
            low=max(self.low, other.low), middle=max(self.middle, other.middle), high=max(self.high, other.high)
        )


NONE = Span.exactly(0.0)
"""No time at all."""
