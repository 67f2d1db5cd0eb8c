"""Latency and throughput of a server under load: random requests, or a recorded trace.

Flags and report follow ``vllm bench serve``. Without --base-url the bench starts a server. The
client shares the machine with that server.
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
from itertools import pairwise
from pathlib import Path
from typing import Any

from s1engine.bench.load_generator import (
    LoadRequest,
    RequestTiming,
    at_rate,
    random_requests,
    send_requests,
    trace_requests,
)
from s1engine.errors import RequestError

METRICS = ("ttft", "tpot", "itl", "e2el")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``s1engine bench serve``."""
    parser.add_argument("--model", default=None, help="of the started server")
    parser.add_argument("--base-url", help="of a running server, without /v1")
    parser.add_argument("--api-key")
    parser.add_argument("--server-flags", default="", help='e.g. "--max-num-seqs 64"')
    parser.add_argument("--dataset-name", choices=("random", "trace"), default="random")
    parser.add_argument("--dataset-path", type=Path, help="trace: Azure, Mooncake, LLMServingSim")
    parser.add_argument(
        "--time-scale", type=float, default=1.0, help="replay this many times faster"
    )
    parser.add_argument("--length-scale", type=float, default=1.0, help="of the trace's lengths")
    parser.add_argument("--random-input-len", type=int, default=64)
    parser.add_argument("--random-output-len", type=int, default=128)
    parser.add_argument("--random-range-ratio", type=float, default=0.0)
    parser.add_argument("--num-prompts", type=int, default=200)
    parser.add_argument("--request-rate", type=float, default=float("inf"))
    parser.add_argument("--max-concurrency", type=int)
    parser.add_argument("--vocab-size", type=int, default=300, help="prompts have lower ids")
    parser.add_argument("--no-ignore-eos", action="store_true", help="answers may end early")
    parser.add_argument(
        "--extra-body", type=json.loads, default={}, help="JSON of further request fields"
    )
    parser.add_argument("--goodput", nargs="*", default=[], metavar="METRIC:MS")
    parser.add_argument("--metric-percentiles", default="99")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Send the load once and report."""
    goals = dict(_goal(text) for text in args.goodput)
    requests = _requests(args)
    extra = {"ignore_eos": not args.no_ignore_eos, "temperature": 0, **args.extra_body}
    with contextlib.ExitStack() as stack:
        url = args.base_url
        if url is None:
            url, _ = stack.enter_context(served(args.model, args.server_flags.split()))
        options: dict[str, Any] = {
            "api_key": args.api_key, "max_concurrency": args.max_concurrency, "extra": extra,
        }  # fmt: skip
        asyncio.run(send_requests(url, requests[:4], **options))  # warm-up
        timings = asyncio.run(send_requests(url, requests, **options))
    percentiles = [float(text) for text in args.metric_percentiles.split(",")]
    return report(requests, timings, percentiles, goals)


def _requests(args: argparse.Namespace) -> list[LoadRequest]:
    if args.dataset_name == "trace":
        if args.dataset_path is None:
            raise RequestError("dataset_path is missing", param="dataset_path")
        scales = (args.time_scale, args.length_scale)
        return trace_requests(
            args.dataset_path, args.num_prompts, *scales, args.vocab_size, args.seed
        )
    requests = random_requests(
        args.num_prompts,
        args.random_input_len,
        args.random_output_len,
        args.random_range_ratio,
        args.vocab_size,
        args.seed,
    )
    return at_rate(requests, args.request_rate, args.seed)


def _goal(text: str) -> tuple[str, float]:
    name, _, limit = text.partition(":")
    if name not in METRICS or name == "itl" or not re.fullmatch(r"\d+(\.\d+)?", limit):
        raise RequestError(f"goodput: {text!r} is not of the form ttft:200", param="goodput")
    return name, float(limit)


def serve_command(*words: str) -> list[str]:
    """``s1engine serve WORDS``, run by this interpreter."""
    start = "import sys; from s1engine.cli import main; sys.exit(main())"
    return [sys.executable, "-c", start, "serve", *words]


@contextlib.contextmanager
def served(model: str | None, flags: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Run a server of this engine on a free port; yields its address and process id."""
    command = serve_command(*([model] if model else []), "--port", "0", *flags)
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        for line in process.stderr:
            print(line, end="", file=sys.stderr)
            match = re.search(r"running on (http://\S+)", line)
            if match:
                yield match.group(1), process.pid
                return
        raise RequestError("the server did not start")
    finally:
        process.terminate()
        process.wait()


def report(
    requests: Sequence[LoadRequest],
    timings: Sequence[RequestTiming],
    percentiles: Sequence[float],
    goals: dict[str, float],
) -> dict[str, Any]:
    """Rates, and latencies in milliseconds, of the requests that were answered."""
    good = [timing for timing in timings if timing.error is None]
    if not good:
        reason = timings[0].error if timings else "none was sent"
        raise RequestError(f"no request was answered: {reason}")
    seconds = max(timing.end for timing in good) - min(timing.begin for timing in good)
    output = sum(timing.output_tokens for timing in good)
    pairs = zip(requests, timings, strict=True)
    prompts = sum(len(request.prompt) for request, timing in pairs if timing.error is None)
    values = {
        "ttft": [1e3 * timing.ttft for timing in good],
        "tpot": [1e3 * timing.tpot for timing in good if timing.output_tokens > 1],
        "itl": [1e3 * (b - a) for timing in good for a, b in pairwise(timing.events)],
        "e2el": [1e3 * (timing.end - timing.begin) for timing in good],
    }
    result: dict[str, Any] = {
        "completed": len(good),
        "failed": len(timings) - len(good),
        "duration_s": round(seconds, 3),
        "total_input_tokens": prompts,
        "total_output_tokens": output,
        "request_throughput": round(len(good) / seconds, 3),
        "output_throughput": round(output / seconds, 1),
        "total_token_throughput": round((output + prompts) / seconds, 1),
        "tokens_per_event": round(output / sum(len(timing.events) for timing in good), 2),
    }
    if goals:
        kept = [
            all(_latency_ms(timing, name) <= limit for name, limit in goals.items())
            for timing in good
        ]
        result["request_goodput"] = round(sum(kept) / seconds, 3)
    for name, latencies in values.items():
        if latencies:
            summary = _summary(latencies, percentiles)
            result |= {f"{key}_{name}_ms": value for key, value in summary.items()}
    return result


def _latency_ms(timing: RequestTiming, name: str) -> float:
    seconds = {"ttft": timing.ttft, "tpot": timing.tpot, "e2el": timing.end - timing.begin}
    return 1e3 * seconds[name]


def _summary(values: list[float], percentiles: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    summary = {"mean": statistics.fmean(values), "median": statistics.median(values)}
    for p in percentiles:
        at = min(int(len(ordered) * p / 100), len(ordered) - 1)
        summary[f"p{p:g}"] = ordered[at]
    return {name: round(value, 2) for name, value in summary.items()}
