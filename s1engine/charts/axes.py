"""Axes of a figure: positions of values, and round numbers for the ticks.

A logarithmic axis has ticks at powers of two. If it must show a 0, the 0 is at its left end, before
a gap.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

MAX_TICKS = 9


@dataclass(frozen=True, slots=True)
class Axis:
    """Maps values to [0, 1]."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False
    has_zero: bool = False
    """The left end is 0; a gap separates it from ``low``, the smallest power."""

    def position(self, value: float) -> float:
        """The position of a value, in [0, 1]."""
        if not self.log:
            return (value - self.low) / (self.high - self.low)
        gap = 0.08 if self.has_zero else 0.0
        if value <= 0:
            return 0.0
        share = math.log2(value / self.low) / math.log2(self.high / self.low)
        return gap + (1 - gap) * share


def short_number(value: float) -> str:
    """Formats a number in few characters: 2k for 2048, 0.25 for .25."""
    for size, unit in ((2**20, "M"), (2**10, "k"), (10**6, "M"), (10**3, "k")):
        if value >= size and value % (size / 2) == 0:
            return f"{value / size:g}{unit}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def percent_axis(lows: Sequence[float], highs: Sequence[float]) -> Axis:
    """A linear axis around all values with a margin, within 0 to 100."""
    low = max(0.0, 10 * math.floor((min(lows) - 3) / 10))
    high = min(100.0, 10 * math.ceil((max(highs) + 3) / 10))
    step = 10 if high - low <= 60 else 20
    first = step * math.ceil(low / step)
    return Axis(low, high, tuple(float(t) for t in range(first, int(high) + 1, step)))


def log_axis(values: Sequence[float], *, decimal: bool = False) -> Axis:
    """A logarithmic axis with ticks at powers of two; a 0 among the values is shown. ``decimal``:
    ticks at 1, 2, 5, 10, ...; all values are above 0."""
    return _decimal_axis(values) if decimal else _doubling_axis(values)


def _decimal_axis(values: Sequence[float]) -> Axis:
    positive = [value for value in values if value > 0] or [1.0]
    low, high = min(positive) / 1.15, max(positive) * 1.15
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
    low, high = max(t for t in ticks if t <= low), min(t for t in ticks if t >= high)
    ticks = [tick for tick in ticks if low <= tick <= high]
    if len(ticks) > MAX_TICKS:
        ticks = [tick for tick in ticks if round(math.log10(tick), 6).is_integer()]
    return Axis(low, high, tuple(ticks), log=True)


def _doubling_axis(values: Sequence[float]) -> Axis:
    positive = [value for value in values if value > 0] or [1.0]
    first = math.floor(math.log2(min(positive)) - 0.15)
    last = math.ceil(math.log2(max(positive)) + 0.15)
    step = math.ceil((last - first + 1) / MAX_TICKS)
    ticks = [2.0**power for power in range(first, last + 1, step)]
    has_zero = min(values, default=1) <= 0
    return Axis(2.0**first, 2.0**last, ((0.0,) if has_zero else ()) + tuple(ticks), True, has_zero)
