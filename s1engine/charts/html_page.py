"""A page of HTML that needs no network, and a figure on it."""

from collections.abc import Iterable
from html import escape
from importlib import resources
from string import Template

from s1engine.charts import svg
from s1engine.charts.figure import Figure


def page(title: str, body: Iterable[str]) -> str:
    """A whole page of this style. ``title`` is text, ``body`` is HTML."""
    return Template(_asset("page.html")).substitute(
        title=escape(title),
        style=_asset("style.css"),
        script=_asset("script.js"),
        body="\n".join(body),
    )


def _asset(name: str) -> str:
    return (resources.files("s1engine.charts") / "page" / name).read_text(encoding="utf-8")


def card(figure: Figure, width: int, height: int) -> str:
    """A figure with its title, note and legend, as HTML."""
    return (
        f'<div class="card" id="{figure.name}"><h2>{escape(figure.title)}</h2>'
        f'<p class="note">{escape(figure.note)}</p>{svg.legend(figure)}'
        f"{svg.draw(figure, width, height)}</div>"
    )
