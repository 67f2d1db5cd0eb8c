"""Figures as PNG files, for slides and papers; the same content as the page's."""

from pathlib import Path
from typing import Any

from s1engine.charts.axes import Axis, log_axis, percent_axis, short_number
from s1engine.charts.figure import Figure, Series

PALETTE = (
    "#2563eb", "#d9480f", "#0f9d76", "#9333ea", "#c2255c", "#0891b2", "#8a6d00", "#57606a",
)  # fmt: skip
INK, FAINT, FRONT = "#1f2328", "#d8dce1", "#8a8f98"


def save(figure: Figure, path: Path) -> None:
    """Draws one figure into a file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    canvas, axes = pyplot.subplots(figsize=(7.2, 4.4), layout="constrained")
    _dress(figure, axes)
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


def _dress(figure: Figure, axes: object) -> None:
    """Scales, ticks and words."""
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    marks = [mark for series in figure.series for mark in series.marks]
    xs, ys = [mark.x for mark in marks], [mark.y for mark in marks]
    if figure.diagonal:
        xs = ys = xs + ys
    across = log_axis(xs, decimal=figure.decimal)
    axes.set_xscale(**_scale(across))
    if figure.percent:
        lows = [mark.y if mark.low is None else mark.low for mark in marks]
        up = percent_axis(lows, [mark.y if mark.high is None else mark.high for mark in marks])
    else:
        up = log_axis(ys)
        axes.set_yscale(**_scale(up))
        axes.plot([up.low, up.high], [up.low, up.high], ls="--", lw=1, color=FRONT)
    for axis, ticks, limits in (
        (across, axes.set_xticks, axes.set_xlim),
        (up, axes.set_yticks, axes.set_ylim),
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
    """The axis in matplotlib's words: below its smallest power, linear down to a 0."""
    if axis.has_zero:
        return {"value": "symlog", "base": 2, "linthresh": axis.low, "linscale": 0.4}
    return {"value": "log", "base": 2}
