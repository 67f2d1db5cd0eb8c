"""Cost of replicas behind one address: HTTP streams to one server and to routers with replicas.

Each number of replicas is a separate server (0: ``serve`` without a router) with the same requests,
one server after the other, in several rounds. Client, router, replicas, engines and Ray share this
machine, so on two cores a second replica gains nothing. A ratio above 1 is a cost for latencies,
below 1 for rates.
"""

import argparse
import asyncio
import statistics
from typing import Any

from s1engine.bench.load_generator import random_requests, send_requests
from s1engine.bench.serve import report, served

REQUESTS_PER_STREAM = 6
FIGURES = ("output_throughput", "median_ttft_ms", "median_tpot_ms", "p99_tpot_ms", "median_e2el_ms")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the study."""
    parser.add_argument("--model", default=None, help="default: bundled s1-nano")
    parser.add_argument("--server-flags", default="", help='of each server, e.g. "--dtype float32"')
    parser.add_argument("--replicas", default="0,1,2", help="numbers, comma-separated, 0 first")
    parser.add_argument("--streams", default="1,16", help="at a time, comma-separated")
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Medians over rounds by number of replicas and of streams, and ratios to the first server."""
    numbers = [int(text) for text in args.replicas.split(",")]
    streams = [int(text) for text in args.streams.split(",")]
    runs = []
    for number in numbers:
        flags = [*args.server_flags.split(), *(["--replicas", str(number)] if number else [])]
        with served(args.model, flags) as (url, _):
            runs += [{"replicas": number, **_measure(url, count, args)} for count in streams]
    alone = runs[: len(streams)]
    for result in runs:
        base = next(other for other in alone if other["streams"] == result["streams"])
        result["ratio"] = {  # None: a short answer arrived in one piece, with no time per token
            name: round(result[name] / base[name], 2) if base[name] else None for name in FIGURES
        }
    shape = {"input_len": args.input_len, "output_len": args.output_len, "rounds": args.rounds}
    return {"model": args.model, **shape, "runs": runs}


def _measure(url: str, streams: int, args: argparse.Namespace) -> dict[str, Any]:
    """Medians of ``streams`` concurrent streams; the first round warms up."""
    requests = random_requests(
        REQUESTS_PER_STREAM * streams, args.input_len, args.output_len, 0.0, 300, 0
    )
    extra = {"ignore_eos": True, "temperature": 0}
    rounds = []
    for _ in range(args.rounds + 1):
        timings = asyncio.run(send_requests(url, requests, extra=extra, max_concurrency=streams))
        rounds.append(report(requests, timings, [99.0], {}))
    names = (*FIGURES, "tokens_per_event")
    medians = {name: round(statistics.median(r[name] for r in rounds[1:]), 2) for name in names}
    return {"streams": streams, "failed": sum(r["failed"] for r in rounds), **medians}
