"""Tokens per second of s1-nano (or another model) at several concurrencies, in one process.

Every request decodes the same number of tokens, so the ratio between concurrencies is the gain of
batching.
"""

import argparse
import statistics
import time
from typing import Any

from s1engine.engine.llm import LLM
from s1engine.sampling_params import SamplingParams


def tokens_per_second(llm: LLM, concurrency: int, max_tokens: int) -> float:
    """Output tokens per second of ``concurrency`` equal requests; the time includes prefill."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    prompts = [f"a=3 b=a+{i % 10} c=b*2 c?" for i in range(concurrency)]
    begin = time.perf_counter()
    outputs = llm.generate(prompts, params, progress=False)
    seconds = time.perf_counter() - begin
    return sum(len(output.outputs[0].token_ids) for output in outputs) / seconds


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Median over interleaved rounds for each concurrency."""
    llm = LLM(args.model, progress=False)
    counts = [int(text) for text in args.concurrency.split(",")]
    rates: dict[int, list[float]] = {count: [] for count in counts}
    for count in counts:
        tokens_per_second(llm, count, args.max_tokens)  # warm-up
    for _ in range(args.rounds):
        for count in counts:
            rates[count].append(tokens_per_second(llm, count, args.max_tokens))
    medians = {count: statistics.median(values) for count, values in rates.items()}
    first = medians[counts[0]]
    return {
        "max_tokens": args.max_tokens,
        "tokens_per_s": {str(count): round(rate, 1) for count, rate in medians.items()},
        "ratio": {str(count): round(rate / first, 2) for count, rate in medians.items()},
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``s1engine bench throughput``."""
    parser.add_argument("--model", default=None, help="default: bundled s1-nano")
    parser.add_argument("--concurrency", default="1,16,64", help="comma-separated")
    parser.add_argument("--max-tokens", type=int, default=128, help="tokens of each request")
    parser.add_argument("--rounds", type=int, default=5)
