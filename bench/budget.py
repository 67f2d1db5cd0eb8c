"""Cost and savings of budget forcing.

Overhead: a batch with budgets and waits against the same batch without, with equal numbers of
tokens. Savings: native forcing against the passes of s1's script (bench/two_pass.py), and
checkpoints of one trace against one run for each budget; same engine and questions, with and
without the prefix cache. Tokens must agree; times and computed tokens are reported.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from s1engine.bench.two_pass import think_in_passes
from s1engine.engine.llm import LLM
from s1engine.eval.arithmetic import generate
from s1engine.sampling_params import SamplingParams, ThinkingBudget

MAX_TOKENS = 400
BUDGET = 320
SWEEP = (8, 16, 32, 64, 96, 128)


def conversations(count: int) -> list[list[dict[str, Any]]]:
    """Unseen questions of the arithmetic task, as chats."""
    return [[{"role": "user", "content": q.question}] for q in generate(0, count)]


@dataclass
class Measured:
    """Result, computed tokens and seconds of one variant over all rounds."""

    result: Any = None
    computed_tokens: int = 0
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Seconds of the median round."""
        return statistics.median(self.seconds)


def measure_in_turns(
    llm: LLM, variants: dict[str, Callable[[], Any]], rounds: int
) -> dict[str, Measured]:
    """Run the variants in turns, each with an empty prefix cache, after one warm-up round."""
    measured = {name: Measured() for name in variants}
    for round_number in range(rounds + 1):
        for name, run_variant in variants.items():
            one = measured[name]
            llm.engine.scheduler.clear_cache()
            before = llm.engine.scheduler.stats().num_computed_tokens
            begin = time.perf_counter()
            one.result = run_variant()
            if round_number:
                one.seconds.append(time.perf_counter() - begin)
            one.computed_tokens = llm.engine.scheduler.stats().num_computed_tokens - before
    return measured


def compare(measured: dict[str, Measured], ours: str, other: str) -> dict[str, Any]:
    """Times and ratios, above 1 where ours is faster. Raises RuntimeError if the tokens differ."""
    a, b = measured[ours], measured[other]
    if a.result != b.result:
        raise RuntimeError(f"{ours} and {other} generated different tokens")
    return {
        f"{ours}_s": round(a.median, 4),
        f"{other}_s": round(b.median, 4),
        "time_ratio": round(b.median / a.median, 2),
        "computed_token_ratio": round(b.computed_tokens / a.computed_tokens, 2),
    }


def overhead(llm: LLM, batch: int, rounds: int) -> dict[str, Any]:
    """Tokens per second with and without budgets; every request generates 256 tokens."""
    chats = conversations(batch)
    budget = ThinkingBudget(max_tokens=200, num_waits=3, answer_reserve=1)
    common: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "max_tokens": 256}
    plain, forced = SamplingParams(**common), SamplingParams(**common, thinking=budget)
    measured = measure_in_turns(
        llm,
        {
            "plain": lambda: llm.chat(chats, plain, progress=False, enable_thinking=False),
            "forced": lambda: llm.chat(chats, forced, progress=False),
        },
        rounds,
    )
    tokens = {
        name: sum(len(o.outputs[0].token_ids) for o in one.result) for name, one in measured.items()
    }
    rate = {name: tokens[name] / one.median for name, one in measured.items()}
    used = [output.outputs[0].thinking for output in measured["forced"].result]
    return {
        "batch": batch,
        "waits_used": sum(thinking.waits_used for thinking in used),
        "plain_tokens_per_s": round(rate["plain"], 1),
        "forced_tokens_per_s": round(rate["forced"], 1),
        "ratio": round(rate["forced"] / rate["plain"], 4),
    }


def native_against_passes(llm: LLM, batch: int, num_waits: int, rounds: int) -> dict[str, Any]:
    """Forcing in the scheduler against s1's passes."""
    chats = conversations(batch)
    budget = ThinkingBudget(max_tokens=BUDGET, num_waits=num_waits, answer_reserve=1)
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, thinking=budget)
    prompts = [llm.engine.make_request(chat, params).prompt.tolist() for chat in chats]

    def native() -> list[list[int]]:
        outputs = llm.chat(chats, params, progress=False)
        return [output.outputs[0].token_ids for output in outputs]

    def passes() -> list[list[int]]:
        limits = {"budget": BUDGET, "num_waits": num_waits, "max_tokens": MAX_TOKENS}
        return [state.token_ids for state in think_in_passes(llm, prompts, **limits)]

    measured = measure_in_turns(llm, {"native": native, "passes": passes}, rounds)
    return {"num_waits": num_waits, **compare(measured, "native", "passes")}


def checkpoints_against_runs(llm: LLM, batch: int, rounds: int) -> dict[str, Any]:
    """Answers at every budget of a sweep: from checkpoints of one trace, and from a run for
    each."""
    chats = conversations(batch)

    def params(maximum: int, checkpoints: tuple[int, ...] = ()) -> SamplingParams:
        budget = ThinkingBudget(max_tokens=maximum, checkpoints=checkpoints)
        return SamplingParams(temperature=0, max_tokens=MAX_TOKENS, thinking=budget)

    def checkpoints() -> list[list[list[int]]]:
        outputs = llm.chat(chats, params(SWEEP[-1], SWEEP[:-1]), progress=False)
        smaller = [[c.output.token_ids for c in output.checkpoints] for output in outputs]
        largest = [output.outputs[0].token_ids for output in outputs]
        return [[*some, last] for some, last in zip(smaller, largest, strict=True)]

    def runs() -> list[list[list[int]]]:
        all_runs = [llm.chat(chats, params(budget), progress=False) for budget in SWEEP]
        by_chat = zip(*all_runs, strict=True)
        return [[output.outputs[0].token_ids for output in outputs] for outputs in by_chat]

    measured = measure_in_turns(llm, {"checkpoints": checkpoints, "runs": runs}, rounds)
    return {"budgets": SWEEP, **compare(measured, "checkpoints", "runs")}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run all three comparisons."""
    native, sweeps = [], []
    for cached in (False, True):
        llm = LLM(args.model, progress=False, enable_prefix_caching=cached)
        setting = {"prefix_cache": cached}
        for num_waits in (int(text) for text in args.num_waits.split(",")):
            native.append(setting | native_against_passes(llm, args.batch, num_waits, args.rounds))
        sweeps.append(setting | checkpoints_against_runs(llm, args.batch, args.rounds))
    return {
        "overhead": overhead(LLM(args.model, progress=False), args.batch, 3 * args.rounds),
        "batch": args.batch,
        "native_against_passes": native,
        "checkpoints_against_runs": sweeps,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``s1engine bench budget``."""
    parser.add_argument("--model", default=None, help="default: bundled s1-nano")
    parser.add_argument("--batch", type=int, default=64, help="requests at once")
    parser.add_argument("--num-waits", default="1,2,4", help="comma-separated")
    parser.add_argument("--rounds", type=int, default=3)
