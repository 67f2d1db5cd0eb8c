"""What the server costs: tokens a second of many streams over HTTP, against the engine alone.

Both do the same requests, in turns, on the same machine; the client is on it too. The engine alone
is ``LLM.generate``, which makes no chunks. Processor time of each process is told apart, because
it, unlike the rate, says little of whatever else runs on the machine.
"""

import argparse
import asyncio
import os
import statistics
import time
from pathlib import Path
from typing import Any

from s1engine.bench.load import Ask, play, random_asks
from s1engine.bench.serve import served
from s1engine.engine.llm import LLM
from s1engine.sampling_params import SamplingParams


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``s1engine bench http``."""
    parser.add_argument("--model", default=None, help="default: bundled s1-nano")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--input-len", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Medians over rounds, the two ways by turns."""
    asks = random_asks(args.streams, args.input_len, args.output_len, 0.0, 300, 0)
    rates: dict[str, list[float]] = {"offline": [], "http": []}
    cpu: dict[str, list[float]] = {"offline": [], "http": [], "engine": []}  # us a token
    per_event: list[float] = []
    llm = LLM(args.model, progress=False)
    tokens = args.streams * args.output_len
    with served(args.model, []) as (url, pid):
        engine = _child(pid)
        for turn in range(args.rounds + 1):  # the first warms up
            marks = [time.process_time()]
            offline = _offline(llm, asks)
            marks += [time.process_time(), _cpu_s(pid), _cpu_s(engine)]
            http, tokens_per_event = _http(url, asks)
            marks += [_cpu_s(pid), _cpu_s(engine)]
            if turn:
                cpu["offline"].append(1e6 * (marks[1] - marks[0]) / tokens)
                cpu["http"].append(1e6 * (marks[4] - marks[2]) / tokens)
                cpu["engine"].append(1e6 * (marks[5] - marks[3]) / tokens)
                rates["offline"].append(offline)
                rates["http"].append(http)
                per_event.append(tokens_per_event)
    medians = {way: statistics.median(values) for way, values in rates.items()}
    return {
        "streams": args.streams,
        "output_len": args.output_len,
        "tokens_per_s": {way: round(rate, 1) for way, rate in medians.items()},
        "ratio": round(medians["http"] / medians["offline"], 3),
        "cpu_us_per_token": {who: round(statistics.median(v), 2) for who, v in cpu.items()},
        "tokens_per_event": round(statistics.median(per_event), 2),
    }


def _child(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def _cpu_s(pid: int) -> float:
    """Processor seconds of a process so far, all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _offline(llm: LLM, asks: list[Ask]) -> float:
    params = SamplingParams(temperature=0, max_tokens=asks[0].max_tokens, ignore_eos=True)
    begin = time.perf_counter()
    outputs = llm.generate([ask.prompt for ask in asks], params, progress=False)
    seconds = time.perf_counter() - begin
    return sum(len(output.outputs[0].token_ids) for output in outputs) / seconds


def _http(url: str, asks: list[Ask]) -> tuple[float, float]:
    """Tokens a second, and tokens an event."""
    begin = time.perf_counter()
    took = asyncio.run(play(url, asks, extra={"temperature": 0, "ignore_eos": True}))
    seconds = time.perf_counter() - begin
    assert not any(one.error for one in took), [one.error for one in took if one.error][:1]
    tokens = sum(one.output_tokens for one in took)
    return tokens / seconds, tokens / sum(len(one.events) for one in took)
