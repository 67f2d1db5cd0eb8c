"""What replicas behind one address cost: streams over HTTP, one server beside fronts with replicas.

Each number of replicas is a server of its own (0: ``serve`` alone), asked the same requests, one
server after the other, in several rounds. Client, front, replicas, engines and Ray share this
machine, so where it has two cores nothing is gained by a second replica. Ratios above 1 are costs
for latencies, below 1 for rates.
"""

import argparse
import asyncio
import statistics
from typing import Any

from s1engine.bench.load_generator import play, random_asks
from s1engine.bench.serve import report, served

OF_ONE = 6  # requests of each stream
FIGURES = ("output_throughput", "median_ttft_ms", "median_tpot_ms", "p99_tpot_ms", "median_e2el_ms")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``s1engine bench replicas``."""
    parser.add_argument("--model", default=None, help="default: bundled s1-nano")
    parser.add_argument(
        "--server-flags", default="", help='of every server, e.g. "--dtype float32"'
    )
    parser.add_argument("--replicas", default="0,1,2", help="numbers, comma-separated, 0 first")
    parser.add_argument("--streams", default="1,16", help="at a time, comma-separated")
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Medians over rounds for each number of replicas and of streams, and ratios to the first."""
    numbers = [int(text) for text in args.replicas.split(",")]
    streams = [int(text) for text in args.streams.split(",")]
    runs = []
    for number in numbers:
        flags = [*args.server_flags.split(), *(["--replicas", str(number)] if number else [])]
        with served(args.model, flags) as (url, _):
            runs += [{"replicas": number, **_play(url, count, args)} for count in streams]
    alone = runs[: len(streams)]
    for one in runs:
        before = next(other for other in alone if other["streams"] == one["streams"])
        one["ratio"] = {  # None: short answers came at once, in no time a token
            name: round(one[name] / before[name], 2) if before[name] else None for name in FIGURES
        }
    shape = {"input_len": args.input_len, "output_len": args.output_len, "rounds": args.rounds}
    return {"model": args.model, **shape, "runs": runs}


def _play(url: str, streams: int, args: argparse.Namespace) -> dict[str, Any]:
    """So many streams at a time; the first round warms up."""
    asks = random_asks(OF_ONE * streams, args.input_len, args.output_len, 0.0, 300, 0)
    extra = {"ignore_eos": True, "temperature": 0}
    found = []
    for _ in range(args.rounds + 1):
        took = asyncio.run(play(url, asks, extra=extra, max_concurrency=streams))
        found.append(report(asks, took, [99.0], {}))
    names = (*FIGURES, "tokens_per_event")
    medians = {name: round(statistics.median(one[name] for one in found[1:]), 2) for name in names}
    return {"streams": streams, "failed": sum(one["failed"] for one in found), **medians}
