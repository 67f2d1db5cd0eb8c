"""A plan as text for a terminal."""

from collections.abc import Iterator
from typing import Any

COLUMNS = (
    ("GPUs", 4), ("req/s", 7), ("budget", 7), ("tokens/s", 18), ("busy", 5), ("TTFT s", 14),
    ("TPOT ms", 13), ("E2E s", 15), ("E2E s, roofline", 15),
)  # fmt: skip


def lines(plan: dict[str, Any]) -> Iterator[str]:
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
