"""A plan as a page: throughput and latency against GPUs, or against the rate of requests."""

from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import Any

from s1engine.eval.figures import Figure, Mark, Series
from s1engine.eval.report import card, page
from s1engine.plan import table

Case = dict[str, Any]
Value = Callable[[dict[str, Any]], float]


def write_page(path: Path, plan: dict[str, Any], model: str) -> None:
    """One HTML file that needs no network."""
    path.write_text(page(f"Plan: {model}", _body(plan, model)), encoding="utf-8")


def _body(plan: dict[str, Any], model: str) -> Iterator[str]:
    yield '<p class="eyebrow">Plan, nothing measured</p>'
    yield f"<h1>{escape(model)} on {escape(plan['engine']['gpu']['name'])}</h1>"
    yield '<section class="pair">'
    yield from (card(figure, 450, 330) for figure in figures(plan["cases"]))
    yield "</section>"
    yield f'<section class="card"><pre>{escape(chr(10).join(table.lines(plan)))}</pre></section>'


def figures(cases: list[Case]) -> list[Figure]:
    """Against the number of GPUs if there are several, else against the rate."""
    by_gpus = len({case["gpus"] for case in cases}) > 1
    across = "GPUs" if by_gpus else "requests a second"
    return [
        _figure("throughput", "Output tokens a second", across, cases, by_gpus, _tokens),
        _figure("e2e", "Slowest of a hundred requests, seconds", across, cases, by_gpus, _e2e),
        _figure("tpot", "Milliseconds a token, 99th percentile", across, cases, by_gpus, _tpot),
        _figure(
            "ttft", "Seconds to the first token, 99th percentile", across, cases, by_gpus, _ttft
        ),
    ]


def _tokens(found: dict[str, Any]) -> float:
    return float(found["tokens_per_s"])


def _e2e(found: dict[str, Any]) -> float:
    return float(found["e2e_s"]["p99"])


def _tpot(found: dict[str, Any]) -> float:
    return 1000 * float(found["tpot_s"]["p99"])


def _ttft(found: dict[str, Any]) -> float:
    return float(found["ttft_s"]["p99"])


def _figure(
    name: str, title: str, across: str, cases: list[Case], by_gpus: bool, value: Value
) -> Figure:
    groups: dict[str, list[Mark]] = {}
    for case in cases:
        x = case["gpus"] if by_gpus else case["requests_per_s"]
        if x is None:
            continue
        for how in ("simulated", "roofline"):
            label = _series(case, by_gpus)
            marks = groups.setdefault(f"{how}{label}", [])
            y = value(case[how])
            marks.append(Mark(x, y, f"{x:g} {across}", ((title, f"{y:,.3g}"),)))
    series = tuple(
        Series(label, color, tuple(sorted(marks, key=lambda mark: mark.x)))
        for color, (label, marks) in enumerate(groups.items())
    )
    note = "By the scheduler in virtual time, and in closed form."
    return Figure(name, title, note, across, title, series, decimal=not by_gpus, percent=False)


def _series(case: Case, by_gpus: bool) -> str:
    """What tells a case from others at the same place."""
    words = []
    if by_gpus and case["requests_per_s"] is not None:
        words.append(f"{case['requests_per_s']:g}/s")
    if case["thinking_budget"] is not None:
        words.append(f"{case['thinking_budget']:,} thinking tokens")
    return "".join(f", {word}" for word in words)
