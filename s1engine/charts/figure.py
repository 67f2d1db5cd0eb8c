"""A figure as data: marks in series over two axes. ``svg`` and ``png`` draw the same figure."""

from collections.abc import Iterator
from dataclasses import dataclass

from s1engine.charts.axes import Axis, log_axis, percent_axis


@dataclass(frozen=True, slots=True)
class Mark:
    """One point of a figure."""

    x: float
    y: float
    label: str
    facts: tuple[tuple[str, str], ...]
    """Names and values for the tooltip."""
    low: float | None = None
    high: float | None = None
    """Ends of the error bar."""
    hollow: bool = False
    """A baseline: drawn hollow, not joined to the others."""


@dataclass(frozen=True, slots=True)
class Series:
    """Marks of one color, by ascending x."""

    name: str
    color: int
    """Index into the palette; a series has the same color in every figure."""
    marks: tuple[Mark, ...]


@dataclass(frozen=True, slots=True)
class Figure:
    """Series over two axes."""

    name: str
    title: str
    note: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    decimal: bool = False
    """x ticks at round decimal numbers; else x counts tokens and has ticks at powers of two."""
    percent: bool = True
    """y is an accuracy, from 0 to 100; else it is scaled as x is."""
    joined: bool = True
    """A line joins the marks of a series."""
    front: tuple[tuple[float, float], ...] | None = None
    """The Pareto front, by ascending x."""
    diagonal: bool = False
    """Draw y = x; both axes are equal."""

    def axes(self) -> tuple[Axis, Axis]:
        """The axes of x and y."""
        xs, ys = [mark.x for mark in self._marks()], [mark.y for mark in self._marks()]
        if self.diagonal:
            xs = ys = xs + ys
        x_axis = log_axis(xs, decimal=self.decimal)
        if not self.percent:
            return x_axis, log_axis(ys)
        lows = [mark.y if mark.low is None else mark.low for mark in self._marks()]
        highs = [mark.y if mark.high is None else mark.high for mark in self._marks()]
        return x_axis, percent_axis(lows, highs)

    def _marks(self) -> Iterator[Mark]:
        return (mark for series in self.series for mark in series.marks)
