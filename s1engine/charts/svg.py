"""Draws figures as inline SVG. The page's style sheet colors them, so they follow its theme."""

from collections.abc import Iterator
from html import escape

from s1engine.charts.axes import Axis, short_number
from s1engine.charts.figure import Figure, Mark, Series

LEFT, RIGHT, TOP, BOTTOM = 58, 18, 14, 50
COLORS = 8  # of the style sheet


class _Plot:
    """Maps a figure's values to positions in the drawing."""

    def __init__(self, figure: Figure, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.x_axis, self.y_axis = figure.axes()

    def x(self, value: float) -> float:
        return round(LEFT + self.x_axis.position(value) * (self.width - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        inner = self.height - TOP - BOTTOM
        return round(self.height - BOTTOM - self.y_axis.position(value) * inner, 1)


def draw_svg(figure: Figure, width: int, height: int) -> str:
    """The figure as one <svg> element with this aspect ratio."""
    plot = _Plot(figure, width, height)
    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(figure.title)}">',
        *_grid(figure, plot),
        *_guides(figure, plot),
        *(part for series in figure.series for part in _series(figure, series, plot)),
        "</svg>",
    ]
    return "\n".join(parts)


def svg_legend(figure: Figure) -> str:
    """The names and colors of the series as an HTML list."""
    items = [
        f'<li data-series="{s.color}"><i class="key s{s.color % COLORS}"></i>{escape(s.name)}</li>'
        for s in figure.series
    ]
    if figure.front is not None:
        items.append('<li class="still"><i class="key front"></i>Pareto front</li>')
    return f'<ul class="legend">{"".join(items)}</ul>'


def _grid(figure: Figure, plot: _Plot) -> Iterator[str]:
    left, right, bottom = LEFT, plot.width - RIGHT, plot.height - BOTTOM
    for tick in plot.y_axis.ticks:
        y = plot.y(tick)
        yield f'<line class="grid" x1="{left}" y1="{y}" x2="{right}" y2="{y}"/>'
        yield f'<text class="tick" x="{left - 10}" y="{y + 4}" text-anchor="end">'
        yield f"{short_number(tick)}</text>"
    for tick in plot.x_axis.ticks:
        x = plot.x(tick)
        yield f'<line class="grid faint" x1="{x}" y1="{TOP}" x2="{x}" y2="{bottom}"/>'
        yield f'<text class="tick" x="{x}" y="{bottom + 19}" text-anchor="middle">'
        yield f"{short_number(tick)}</text>"
    yield f'<line class="axis" x1="{left}" y1="{bottom}" x2="{right}" y2="{bottom}"/>'
    yield from _gap(plot.x_axis, plot, bottom)
    middle = (left + right) / 2
    yield f'<text class="label" x="{middle}" y="{plot.height - 8}" text-anchor="middle">'
    yield f"{escape(figure.x_label)}</text>"
    y = (TOP + bottom) / 2
    yield f'<text class="label" transform="translate(14 {y}) rotate(-90)" text-anchor="middle">'
    yield f"{escape(figure.y_label)}</text>"


def _gap(axis: Axis, plot: _Plot, bottom: int) -> Iterator[str]:
    """Two strokes through the axis, between 0 and the smallest power."""
    if axis.has_zero:
        x = (plot.x(0) + plot.x(axis.low)) / 2
        yield f'<rect class="paper" x="{x - 4}" y="{bottom - 2}" width="8" height="4"/>'
        for dx in (-4, 4):
            yield (
                f'<line class="axis" x1="{x + dx - 3}" y1="{bottom + 6}" x2="{x + dx + 3}" '
                f'y2="{bottom - 6}"/>'
            )


def _guides(figure: Figure, plot: _Plot) -> Iterator[str]:
    if figure.diagonal:
        low, high = plot.x_axis.low, plot.x_axis.high
        corners = f"{plot.x(low)},{plot.y(low)} {plot.x(high)},{plot.y(high)}"
        edge = f"{plot.x(high)},{plot.y(low)}"
        yield f'<polygon class="kept" points="{corners} {edge}"/>'
        yield f'<polyline class="diagonal" points="{corners}"/>'
    if figure.front and len(figure.front) > 1:
        points = " ".join(f"{plot.x(x)},{plot.y(y)}" for x, y in figure.front)
        yield f'<polyline class="front" points="{points}"/>'


def _series(figure: Figure, series: Series, plot: _Plot) -> Iterator[str]:
    yield f'<g class="series s{series.color % COLORS}" data-series="{series.color}">'
    line = [mark for mark in series.marks if not mark.hollow]
    if figure.joined and len(line) > 1:
        points = " ".join(f"{plot.x(mark.x)},{plot.y(mark.y)}" for mark in line)
        yield f'<polyline class="line" points="{points}"/>'
    for mark in series.marks:
        yield from _bar(mark, plot)
    for mark in series.marks:
        yield from _dot(figure, series, mark, plot)
    yield "</g>"


def _bar(mark: Mark, plot: _Plot) -> Iterator[str]:
    if mark.low is not None and mark.high is not None:
        x, low, high = plot.x(mark.x), plot.y(mark.low), plot.y(mark.high)
        yield f'<path class="bar" d="M{x} {low}V{high}M{x - 4} {low}h8M{x - 4} {high}h8"/>'


def _dot(figure: Figure, series: Series, mark: Mark, plot: _Plot) -> Iterator[str]:
    x, y = plot.x(mark.x), plot.y(mark.y)
    if figure.front is not None and (mark.x, mark.y) in figure.front:
        yield f'<circle class="ring" cx="{x}" cy="{y}" r="9"/>'
    facts = "|".join(f"{name}: {value}" for name, value in mark.facts)
    title = f"{series.name}|{mark.label}|{facts}"
    kind = "dot hollow" if mark.hollow else "dot"
    yield (
        f'<circle class="{kind}" cx="{x}" cy="{y}" r="5" tabindex="0" '
        f'data-tip="{escape(title)}" aria-label="{escape(title)}"/>'
    )
