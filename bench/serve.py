"""Latency and throughput of a server under traffic: random, or replayed from a recorded trace.

Flags and report are those of ``vllm bench serve`` where it has them. Without --base-url a server is
started for the run. The client runs on the same machine, so it takes a part of it.
"""

import argparse
import asyncio
import contextlib
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from s1engine.bench.load_generator import Ask, Took, paced, play, random_asks, trace_asks
from s1engine.errors import RequestError

METRICS = ("ttft", "tpot", "itl", "e2el")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``s1engine bench serve``."""
    parser.add_argument("--model", default=None, help="of the server that is started")
    parser.add_argument("--base-url", help="a server that runs already, without /v1")
    parser.add_argument("--api-key")
    parser.add_argument("--server-flags", default="", help='e.g. "--max-num-seqs 64"')
    parser.add_argument("--dataset-name", choices=("random", "trace"), default="random")
    parser.add_argument("--dataset-path", type=Path, help="trace: Azure, Mooncake, LLMServingSim")
    parser.add_argument("--time-scale", type=float, default=1.0, help="replay so much faster")
    parser.add_argument("--length-scale", type=float, default=1.0, help="of the trace's lengths")
    parser.add_argument("--random-input-len", type=int, default=64)
    parser.add_argument("--random-output-len", type=int, default=128)
    parser.add_argument("--random-range-ratio", type=float, default=0.0)
    parser.add_argument("--num-prompts", type=int, default=200)
    parser.add_argument("--request-rate", type=float, default=float("inf"))
    parser.add_argument("--max-concurrency", type=int)
    parser.add_argument("--vocab-size", type=int, default=300, help="ids of prompts stay below")
    parser.add_argument("--no-ignore-eos", action="store_true", help="let answers end early")
    parser.add_argument("--extra-body", type=json.loads, default={}, help="JSON of more fields")
    parser.add_argument("--goodput", nargs="*", default=[], metavar="METRIC:MS")
    parser.add_argument("--metric-percentiles", default="99")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Plays the load once and reports."""
    goals = dict(_goal(text) for text in args.goodput)
    asks = _asks(args)
    extra = {"ignore_eos": not args.no_ignore_eos, "temperature": 0, **args.extra_body}
    with contextlib.ExitStack() as stack:
        url = args.base_url
        if url is None:
            url, _ = stack.enter_context(served(args.model, args.server_flags.split()))
        how: dict[str, Any] = {"api_key": args.api_key, "max_concurrency": args.max_concurrency}
        asyncio.run(play(url, asks[:4], extra=extra, **how))  # warm-up
        took = asyncio.run(play(url, asks, extra=extra, **how))
    percentiles = [float(text) for text in args.metric_percentiles.split(",")]
    return report(asks, took, percentiles, goals)


def _asks(args: argparse.Namespace) -> list[Ask]:
    if args.dataset_name == "trace":
        if args.dataset_path is None:
            raise RequestError("dataset_path is missing", param="dataset_path")
        scales = (args.time_scale, args.length_scale)
        return trace_asks(args.dataset_path, args.num_prompts, *scales, args.vocab_size, args.seed)
    asks = random_asks(
        args.num_prompts,
        args.random_input_len,
        args.random_output_len,
        args.random_range_ratio,
        args.vocab_size,
        args.seed,
    )
    return paced(asks, args.request_rate, args.seed)


def _goal(text: str) -> tuple[str, float]:
    name, _, limit = text.partition(":")
    if name not in METRICS or name == "itl" or not re.fullmatch(r"\d+(\.\d+)?", limit):
        raise RequestError(f"goodput: {text!r} is not of the form ttft:200", param="goodput")
    return name, float(limit)


def serve_command(*words: str) -> list[str]:
    """``s1engine serve WORDS`` by this interpreter, whatever is on the path."""
    start = "import sys; from s1engine.cli import main; sys.exit(main())"
    return [sys.executable, "-c", start, "serve", *words]


@contextlib.contextmanager
def served(model: str | None, flags: Sequence[str]) -> Iterator[tuple[str, int]]:
    """A server of this engine on a free port; yields its address and process id."""
    command = serve_command(*([model] if model else []), "--port", "0", *flags)
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        for line in process.stderr:
            print(line, end="", file=sys.stderr)
            found = re.search(r"running on (http://\S+)", line)
            if found:
                yield found.group(1), process.pid
                return
        raise RequestError("the server did not start")
    finally:
        process.terminate()
        process.wait()


def report(
    asks: Sequence[Ask], took: Sequence[Took], percentiles: Sequence[float], goals: dict[str, float]
) -> dict[str, Any]:
    """Rates, and latencies in milliseconds, of the requests that were answered."""
    good = [one for one in took if one.error is None]
    if not good:
        raise RequestError(f"no request was answered: {took[0].error if took else 'none asked'}")
    seconds = max(one.end for one in good) - min(one.begin for one in good)
    output = sum(one.output_tokens for one in good)
    prompts = sum(len(a.prompt) for a, t in zip(asks, took, strict=True) if t.error is None)
    values = {
        "ttft": [1e3 * one.ttft for one in good],
        "tpot": [1e3 * one.tpot for one in good if one.output_tokens > 1],
        "itl": [
            1e3 * (b - a) for one in good for a, b in zip(one.events, one.events[1:], strict=False)
        ],
        "e2el": [1e3 * (one.end - one.begin) for one in good],
    }
    result: dict[str, Any] = {
        "completed": len(good),
        "failed": len(took) - len(good),
        "duration_s": round(seconds, 3),
        "total_input_tokens": prompts,
        "total_output_tokens": output,
        "request_throughput": round(len(good) / seconds, 3),
        "output_throughput": round(output / seconds, 1),
        "total_token_throughput": round((output + prompts) / seconds, 1),
        "tokens_per_event": round(output / sum(len(one.events) for one in good), 2),
    }
    if goals:
        kept = [all(_of(one, name) <= limit for name, limit in goals.items()) for one in good]
        result["request_goodput"] = round(sum(kept) / seconds, 3)
    for name, found in values.items():
        if found:
            result |= {f"{key}_{name}_ms": n for key, n in _summary(found, percentiles).items()}
    return result


def _of(took: Took, name: str) -> float:
    seconds = {"ttft": took.ttft, "tpot": took.tpot, "e2el": took.end - took.begin}
    return 1e3 * seconds[name]


def _summary(values: list[float], percentiles: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    summary = {"mean": statistics.fmean(values), "median": statistics.median(values)}
    for p in percentiles:
        at = min(int(len(ordered) * p / 100), len(ordered) - 1)
        summary[f"p{p:g}"] = ordered[at]
    return {name: round(value, 2) for name, value in summary.items()}
