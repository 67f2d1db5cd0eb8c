"""A plan as text for a terminal, and as a page of figures."""

from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import Any

from s1engine.charts.figure import Figure, Mark, Series
from s1engine.charts.html_page import figure_card, render_page
from s1engine.charts.text_table import fact_line, table_lines

Case = dict[str, Any]
Value = Callable[[dict[str, Any]], float]

COLUMNS = (
    ("GPUs", 4), ("req/s", 7), ("budget", 7), ("tokens/s", 18), ("busy", 5), ("TTFT s", 14),
    ("TPOT ms", 13), ("E2E s", 15), ("E2E s, roofline", 15),
)  # fmt: skip


def plan_lines(plan: dict[str, Any]) -> Iterator[str]:
    """The facts of the engine and the workload, a row for each case, the assumptions."""
    yield "plan"
    yield from _engine_lines(plan["engine"])
    yield from _workload_lines(plan["workload"])
    yield ""
    yield "simulated, p50 / p99; tokens/s and, after |, their limit by roofline"
    yield from table_lines(COLUMNS, [_case_cells(case) for case in plan["cases"]])
    yield ""
    yield "assumed"
    yield from (f"  {line}" for line in plan["assumptions"])


def _engine_lines(engine: dict[str, Any]) -> Iterator[str]:
    weights = engine["dtype"] if engine["weights"] == "auto" else engine["weights"]
    ranks = engine["tensor_parallel_size"]
    per_engine = f", each engine on {ranks}" if ranks > 1 else ""
    yield fact_line("device", f"{engine['gpu']['name']}{per_engine}")
    per_gpu = f", {_gb(engine['weight_bytes_per_gpu'])} on each GPU" if ranks > 1 else ""
    yield fact_line("weights", f"{_gb(engine['weight_bytes'])} in {weights}{per_gpu}")
    per_token = f"{engine['kv_bytes_per_token']:,} bytes in {engine['kv_cache_dtype']}"
    yield fact_line("KV of a token", per_token)
    yield fact_line("KV cache", f"{engine['kv_cache_tokens']:,} tokens")
    longest, batch = engine["max_model_len"], engine["largest_batch_at_max_model_len"]
    yield fact_line(
        "largest batch",
        f"{engine['largest_batch']:,} of this workload, {batch:,} of {longest:,} tokens",
    )
    yield fact_line("one sequence alone", f"{engine['tokens_per_s_alone']:,.1f} tokens/s")


def _workload_lines(work: dict[str, Any]) -> Iterator[str]:
    source = work["trace"] or "random"
    yield fact_line(
        "workload",
        f"{work['requests']:,} requests, {source}: mean {work['mean_input']:,.0f} tokens in and "
        f"{work['mean_output']:,.0f} out, {work['thinking_share']:.0%} of that thinking",
    )
    if work["left_out"]:
        yield fact_line("left out", f"{work['left_out']:,} requests longer than the context")


def _gb(size: float) -> str:
    return f"{size / 1e9:,.3g} GB"


def _case_cells(case: Case) -> tuple[str, ...]:
    simulated, bound = case["simulated"], case["roofline"]
    rate, budget = case["requests_per_s"], case["thinking_budget"]
    return (
        str(case["gpus"]),
        "-" if rate is None else f"{rate:g}",
        "-" if budget is None else str(budget),
        f"{simulated['tokens_per_s']:,.0f} | {bound['capacity_tokens_per_s']:,.0f}",
        f"{simulated['busy']:.0%}",
        _percentiles(simulated["ttft_s"], 1),
        _percentiles(simulated["tpot_s"], 1000),
        _percentiles(simulated["e2e_s"], 1),
        _percentiles(bound["e2e_s"], 1),
    )


def _percentiles(values: dict[str, float], scale: float) -> str:
    return f"{values['p50'] * scale:.3g} / {values['p99'] * scale:.3g}"


# --- the page ---


def write_plan_page(path: Path, plan: dict[str, Any], model: str) -> None:
    """Writes one HTML file that needs no network."""
    path.write_text(render_page(f"Plan: {model}", _body(plan, model)), encoding="utf-8")


def _body(plan: dict[str, Any], model: str) -> Iterator[str]:
    yield '<p class="eyebrow">Plan, nothing measured</p>'
    yield f"<h1>{escape(model)} on {escape(plan['engine']['gpu']['name'])}</h1>"
    yield '<section class="pair">'
    yield from (figure_card(figure, 450, 330) for figure in plan_figures(plan["cases"]))
    yield "</section>"
    yield f'<section class="card"><pre>{escape(chr(10).join(plan_lines(plan)))}</pre></section>'


def plan_figures(cases: list[Case]) -> list[Figure]:
    """Figures against the number of GPUs if it varies, else against the rate."""
    by_gpus = len({case["gpus"] for case in cases}) > 1

    def p99(name: str, scale: float = 1) -> Value:
        return lambda summary: scale * float(summary[name]["p99"])

    def tokens_per_s(summary: dict[str, Any]) -> float:
        return float(summary["tokens_per_s"])

    return [
        _figure(name, title, cases, by_gpus, value)
        for name, title, value in (
            ("throughput", "Output tokens a second", tokens_per_s),
            ("e2e", "Slowest of a hundred requests, seconds", p99("e2e_s")),
            ("tpot", "Milliseconds a token, 99th percentile", p99("tpot_s", 1000)),
            ("ttft", "Seconds to the first token, 99th percentile", p99("ttft_s")),
        )
    ]


def _figure(name: str, title: str, cases: list[Case], by_gpus: bool, value: Value) -> Figure:
    x_label = "GPUs" if by_gpus else "requests a second"
    groups: dict[str, list[Mark]] = {}
    for case in cases:
        x = case["gpus"] if by_gpus else case["requests_per_s"]
        if x is None:
            continue
        for source in ("simulated", "roofline"):
            marks = groups.setdefault(f"{source}{_series_suffix(case, by_gpus)}", [])
            y = value(case[source])
            marks.append(Mark(x, y, f"{x:g} {x_label}", ((title, f"{y:,.3g}"),)))
    series = tuple(
        Series(label, color, tuple(sorted(marks, key=lambda mark: mark.x)))
        for color, (label, marks) in enumerate(groups.items())
    )
    note = "By the scheduler in virtual time, and in closed form."
    return Figure(name, title, note, x_label, title, series, decimal=not by_gpus, percent=False)


def _series_suffix(case: Case, by_gpus: bool) -> str:
    """Names the rate and the budget, which cases at the same x differ in."""
    words = []
    if by_gpus and case["requests_per_s"] is not None:
        words.append(f"{case['requests_per_s']:g}/s")
    if case["thinking_budget"] is not None:
        words.append(f"{case['thinking_budget']:,} thinking tokens")
    return "".join(f", {word}" for word in words)
