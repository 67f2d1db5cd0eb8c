"""What budget forcing costs, and what it saves.

Overhead: a batch whose requests carry budgets and waits against the same batch without, both of the
same number of tokens. Saving: native forcing against the way of s1's script (bench/two_pass.py) on
the same engine and questions, with and without the prefix cache; tokens must agree, times and
computed tokens are reported.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

from s1engine.bench.two_pass import think_in_passes
from s1engine.engine.llm import LLM
from s1engine.eval.arithmetic import generate
from s1engine.sampling_params import SamplingParams, ThinkingBudget

MAX_TOKENS = 400
BUDGET = 320


def conversations(count: int) -> list[list[dict[str, Any]]]:
    """Unseen questions of the arithmetic task as chats."""
    return [[{"role": "user", "content": q.question}] for q in generate(0, count)]


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def overhead(llm: LLM, batch: int, rounds: int) -> dict[str, Any]:
    """Seconds per computed token with and without budgets, rounds interleaved."""
    chats = conversations(batch)
    budget = ThinkingBudget(max_tokens=200, num_waits=3, answer_reserve=1)
    common: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "max_tokens": 256}
    plain, forced = SamplingParams(**common), SamplingParams(**common, thinking=budget)
    seconds: dict[str, list[float]] = {"plain": [], "forced": []}
    tokens = {"plain": 0, "forced": 0}
    events = 0
    for round_number in range(rounds + 1):
        for name, params in (("plain", plain), ("forced", forced)):
            llm.engine.scheduler.clear_cache()
            thinks = params.thinking is not None
            begin = time.perf_counter()
            outputs = llm.chat(chats, params, progress=False, enable_thinking=thinks)
            elapsed = time.perf_counter() - begin
            if round_number:  # the first one warms up
                seconds[name].append(elapsed)
            tokens[name] = sum(len(output.outputs[0].token_ids) for output in outputs)
            thinking = [output.outputs[0].thinking for output in outputs]
            events = sum(used.waits_used for used in thinking if used is not None)
    rate = {name: tokens[name] / statistics.median(seconds[name]) for name in seconds}
    return {
        "batch": batch,
        "waits_used": events,
        "plain_tokens_per_s": round(rate["plain"], 1),
        "forced_tokens_per_s": round(rate["forced"], 1),
        "ratio": round(rate["forced"] / rate["plain"], 4),
    }


def native_against_passes(
    llm: LLM, batch: int, num_waits: int, rounds: int, *, cached: bool
) -> dict[str, Any]:
    """Both ways on the same questions; raises if their tokens differ."""
    chats = conversations(batch)
    budget = ThinkingBudget(max_tokens=BUDGET, num_waits=num_waits)
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, thinking=budget)
    prompts = [llm.engine.make_request(chat, params).prompt.tolist() for chat in chats]
    results: dict[str, list[list[int]]] = {}

    def native() -> None:
        outputs = llm.chat(chats, params, progress=False)
        results["native"] = [output.outputs[0].token_ids for output in outputs]

    def passes() -> None:
        states = think_in_passes(
            llm, prompts, budget=BUDGET, num_waits=num_waits, max_tokens=MAX_TOKENS
        )
        results["passes"] = [state.token_ids for state in states]

    ways = {"native": native, "passes": passes}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    computed: dict[str, int] = {}
    for round_number in range(rounds + 1):
        for name, way in ways.items():
            llm.engine.scheduler.clear_cache()
            before = llm.engine.scheduler.stats().num_computed_tokens
            elapsed = timed(way)
            computed[name] = llm.engine.scheduler.stats().num_computed_tokens - before
            if round_number:
                seconds[name].append(elapsed)
    if results["native"] != results["passes"]:
        raise RuntimeError("native forcing and the two-pass way disagree")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "num_waits": num_waits,
        "prefix_cache": cached,
        "native_s": round(medians["native"], 4),
        "passes_s": round(medians["passes"], 4),
        "time_ratio": round(medians["passes"] / medians["native"], 2),
        "computed_token_ratio": round(computed["passes"] / computed["native"], 2),
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Overhead, then the comparison for each number of waits."""
    comparisons = []
    for cached in (False, True):
        llm = LLM(args.model, progress=False, enable_prefix_caching=cached)
        for num_waits in (int(text) for text in args.num_waits.split(",")):
            comparisons.append(
                native_against_passes(llm, args.batch, num_waits, args.rounds, cached=cached)
            )
    llm = LLM(args.model, progress=False)
    return {
        "overhead": overhead(llm, args.batch, 3 * args.rounds),
        "native_against_passes": comparisons,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``s1engine bench budget``."""
    parser.add_argument("--model", default=None, help="default: bundled s1-nano")
    parser.add_argument("--batch", type=int, default=64, help="requests at once")
    parser.add_argument("--num-waits", default="1,2,4", help="comma-separated")
    parser.add_argument("--rounds", type=int, default=3)
