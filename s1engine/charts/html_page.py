"""HTML: a page that needs no network, a figure on a card, a table."""

from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from string import Template

from s1engine.charts.figure import Figure
from s1engine.charts.svg import draw_svg, svg_legend


def render_page(title: str, body: Iterable[str]) -> str:
    """A whole page. ``title`` is text, ``body`` is HTML."""
    return Template(_asset("page.html")).substitute(
        title=escape(title),
        style=_asset("style.css"),
        script=_asset("script.js"),
        body="\n".join(body),
    )


def _asset(name: str) -> str:
    return (resources.files("s1engine.charts") / "page" / name).read_text(encoding="utf-8")


def figure_card(figure: Figure, width: int, height: int) -> str:
    """A figure with its title, note and legend."""
    return (
        f'<div class="card" id="{figure.name}"><h2>{escape(figure.title)}</h2>'
        f'<p class="note">{escape(figure.note)}</p>{svg_legend(figure)}'
        f"{draw_svg(figure, width, height)}</div>"
    )


def table_card(name: str, title: str, note: str, headings: Sequence[str], rows: str) -> str:
    """A table with its title and note. All are text except ``rows``, which is <tr> elements."""
    heads = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    return (
        f'<div class="card"><h2>{escape(title)}</h2><p class="note">{escape(note)}</p>'
        f'<div class="scroll"><table id="{name}"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></div>"
    )


def number_cell(value: float | None, layout: str | None = None) -> str:
    """A <td> in format ``layout``; None: three digits, or whole from 100: 0.0115, 2.02, 1,410."""
    if value is None:
        return "<td><small>none</small></td>"
    chosen = layout or ("{:,.0f}" if value >= 100 else "{:.3g}")
    return f"<td>{chosen.format(value)}</td>"
