"""Draws figures as PNG files, for slides and papers."""

from pathlib import Path
from typing import Any

from s1engine.charts.axes import Axis, short_number
from s1engine.charts.figure import Figure, Series

PALETTE = (
    "#2563eb", "#d9480f", "#0f9d76", "#9333ea", "#c2255c", "#0891b2", "#8a6d00", "#57606a",
)  # fmt: skip
INK, FAINT, FRONT = "#1f2328", "#d8dce1", "#8a8f98"


def save_png(figure: Figure, path: Path) -> None:
    """Draws a figure into a file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    canvas, axes = pyplot.subplots(figsize=(7.2, 4.4), layout="constrained")
    _set_axes(figure, axes)
    if figure.front and len(figure.front) > 1:
        axes.plot(*zip(*figure.front, strict=True), ls="--", lw=1, color=FRONT, zorder=1)
    for series in figure.series:
        _draw_series(figure, series, axes)
    axes.legend(frameon=False, fontsize=9)
    canvas.savefig(path, dpi=160)
    pyplot.close(canvas)


def _draw_series(figure: Figure, series: Series, axes: object) -> None:
    color = PALETTE[series.color % len(PALETTE)]
    x, y = [mark.x for mark in series.marks], [mark.y for mark in series.marks]
    bars = None
    if all(mark.low is not None and mark.high is not None for mark in series.marks):
        below = [mark.y - (mark.low or 0) for mark in series.marks]
        above = [(mark.high or 0) - mark.y for mark in series.marks]
        bars = [[max(value, 0) for value in side] for side in (below, above)]
    style = {"marker": "o", "ms": 5.5, "lw": 1.8, "capsize": 2.5, "elinewidth": 1, "color": color}
    line = "-" if figure.joined else ""
    axes.errorbar(x, y, yerr=bars, ls=line, label=series.name, **style)  # type: ignore[attr-defined]


def _set_axes(figure: Figure, axes: object) -> None:
    """Sets scales, ticks and labels."""
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    x_axis, y_axis = figure.axes()
    axes.set_xscale(**_scale(x_axis))
    if not figure.percent:
        axes.set_yscale(**_scale(y_axis))
        axes.plot([y_axis.low, y_axis.high], [y_axis.low, y_axis.high], ls="--", lw=1, color=FRONT)
    for axis, ticks, limits in (
        (x_axis, axes.set_xticks, axes.set_xlim),
        (y_axis, axes.set_yticks, axes.set_ylim),
    ):
        ticks(axis.ticks, [short_number(tick) for tick in axis.ticks])
        limits(0 if axis.has_zero else axis.low, axis.high)
    axes.minorticks_off()
    axes.set_title(figure.title, loc="left", fontsize=12, color=INK, fontweight="bold")
    axes.set_xlabel(figure.x_label, color=INK)
    axes.set_ylabel(figure.y_label, color=INK)
    axes.grid(color=FAINT, lw=0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0, colors=INK)


def _scale(axis: Axis) -> dict[str, Any]:
    """Arguments of matplotlib's set_xscale: linear from 0 to the smallest power, then log."""
    if axis.has_zero:
        return {"value": "symlog", "base": 2, "linthresh": axis.low, "linscale": 0.4}
    return {"value": "log", "base": 2}
