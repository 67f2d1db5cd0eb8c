"""A chart as data: marks in series over two axes. Knows no run and no drawing."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mark:
    """One run in a figure."""

    x: float
    y: float
    label: str
    """What run this is."""
    facts: tuple[tuple[str, str], ...]
    """Its figures by name, for whoever looks closer."""
    low: float | None = None
    high: float | None = None
    hollow: bool = False
    """There to be compared with."""


@dataclass(frozen=True, slots=True)
class Series:
    """Runs that belong together, by ascending x."""

    name: str
    color: int
    """Index into the palette; the same series has the same color in every figure."""
    marks: tuple[Mark, ...]


@dataclass(frozen=True, slots=True)
class Figure:
    """Marks over two axes."""

    name: str
    title: str
    note: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    decimal: bool = False
    """Ticks at round decimal numbers; else x is a number of tokens and goes by doublings."""
    percent: bool = True
    """Is y an accuracy, from 0 to 100? Else it is scaled as x is."""
    joined: bool = True
    """Are the marks of a series joined by a line?"""
    front: tuple[tuple[float, float], ...] | None = None
    """Runs that no other run beats in both directions."""
    diagonal: bool = False
    """Draw y = x."""
