"""A plan as a page: throughput and latency against GPUs, or against the rate of requests."""

from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import Any

from s1engine.charts.figure import Figure, Mark, Series
from s1engine.charts.html_page import card, page

COLUMNS = (
    ("GPUs", 4), ("req/s", 7), ("budget", 7), ("tokens/s", 18), ("busy", 5), ("TTFT s", 14),
    ("TPOT ms", 13), ("E2E s", 15), ("E2E s, roofline", 15),
)  # fmt: skip


def plan_lines(plan: dict[str, Any]) -> Iterator[str]:
    """What fits, then a row for each case."""
    engine, work = plan["engine"], plan["workload"]
    weights = engine["dtype"] if engine["weights"] == "auto" else engine["weights"]
    ranks = engine["tensor_parallel_size"]
    yield "plan"
    shared = f", each engine on {ranks}" if ranks > 1 else ""
    yield _fact("device", f"{engine['gpu']['name']}{shared}")
    each = f", {_gb(engine['weight_bytes_per_gpu'])} on each GPU" if ranks > 1 else ""
    yield _fact("weights", f"{_gb(engine['weight_bytes'])} in {weights}{each}")
    yield _fact(
        "KV of a token", f"{engine['kv_bytes_per_token']:,} bytes in {engine['kv_cache_dtype']}"
    )
    yield _fact("KV cache", f"{engine['kv_cache_tokens']:,} tokens")
    longest, most = engine["max_model_len"], engine["largest_batch_at_max_model_len"]
    yield _fact(
        "largest batch",
        f"{engine['largest_batch']:,} of this workload, {most:,} of {longest:,} tokens",
    )
    yield _fact("one sequence alone", f"{engine['tokens_per_s_alone']:,.1f} tokens/s")
    source = work["trace"] or "drawn"
    yield _fact(
        "workload",
        f"{work['requests']:,} requests, {source}: {work['mean_input']:,.0f} tokens in and "
        f"{work['mean_output']:,.0f} out in the mean, "
        f"{work['thinking_share']:.0%} of that thinking",
    )
    if work["left_out"]:
        yield _fact("left out", f"{work['left_out']:,} requests longer than the context")
    yield ""
    yield "simulated, p50 / p99; tokens/s and, after |, their limit by roofline"
    yield "  " + "  ".join(name.rjust(width) for name, width in COLUMNS)
    yield from map(_row, plan["cases"])
    yield ""
    yield "assumed"
    yield from (f"  {line}" for line in plan["assumptions"])


def _fact(name: str, value: str) -> str:
    return f"  {name:<28}{value}"


def _gb(size: float) -> str:
    return f"{size / 1e9:,.3g} GB"


def _row(case: dict[str, Any]) -> str:
    found, bound = case["simulated"], case["roofline"]
    rate, budget = case["requests_per_s"], case["thinking_budget"]
    cells = (
        str(case["gpus"]),
        "-" if rate is None else f"{rate:g}",
        "-" if budget is None else str(budget),
        f"{found['tokens_per_s']:,.0f} | {bound['capacity_tokens_per_s']:,.0f}",
        f"{found['busy']:.0%}",
        _pair(found["ttft_s"], 1),
        _pair(found["tpot_s"], 1000),
        _pair(found["e2e_s"], 1),
        _pair(bound["e2e_s"], 1),
    )
    return "  " + "  ".join(
        text.rjust(width) for text, (_, width) in zip(cells, COLUMNS, strict=True)
    )


def _pair(values: dict[str, float], scale: float) -> str:
    return f"{values['p50'] * scale:.3g} / {values['p99'] * scale:.3g}"


Case = dict[str, Any]
Value = Callable[[dict[str, Any]], float]


def write_plan_page(path: Path, plan: dict[str, Any], model: str) -> None:
    """One HTML file that needs no network."""
    path.write_text(page(f"Plan: {model}", _body(plan, model)), encoding="utf-8")


def _body(plan: dict[str, Any], model: str) -> Iterator[str]:
    yield '<p class="eyebrow">Plan, nothing measured</p>'
    yield f"<h1>{escape(model)} on {escape(plan['engine']['gpu']['name'])}</h1>"
    yield '<section class="pair">'
    yield from (card(figure, 450, 330) for figure in plan_figures(plan["cases"]))
    yield "</section>"
    yield f'<section class="card"><pre>{escape(chr(10).join(plan_lines(plan)))}</pre></section>'


def plan_figures(cases: list[Case]) -> list[Figure]:
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
