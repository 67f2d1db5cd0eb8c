"""What the server costs: tokens a second of many streams over HTTP, against the engine alone.

Both do the same requests, in turns, on the same machine; the client is on it too. The engine alone
is ``LLM.generate``, which makes no chunks. Processor time of each process is told apart, because
it, unlike the rate, says little of whatever else runs on the machine. What a request costs besides
its tokens is told by requests of one token each.
"""

import argparse
import asyncio
import os
import statistics
import time
from pathlib import Path
from typing import Any

from s1engine.bench.load_generator import Ask, play, random_asks
from s1engine.bench.serve import served
from s1engine.engine.llm import LLM
from s1engine.sampling_params import SamplingParams


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``s1engine bench http``."""
    parser.add_argument("--model", default=None, help="default: bundled s1-nano")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--input-len", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--requests", type=int, default=1000, help="of one token each")
    parser.add_argument("--rounds", type=int, default=3)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Medians over rounds, the two ways by turns."""
    asks = random_asks(args.streams, args.input_len, args.output_len, 0.0, 300, 0)
    rates: dict[str, list[float]] = {"offline": [], "http": []}
    cpu: dict[str, list[float]] = {"offline": [], "http": [], "engine": [], "client": []}
    short = random_asks(args.requests, args.input_len, 1, 0.0, 300, 1)
    each: dict[str, list[float]] = {"http": [], "engine": [], "client": []}
    per_event: list[float] = []
    llm = LLM(args.model, progress=False)
    tokens = args.streams * args.output_len
    with served(args.model, []) as (url, pid):
        engine = _child(pid)
        for turn in range(args.rounds + 1):  # the first warms up
            marks = [time.process_time()]
            offline = _offline(llm, asks)
            marks += [time.process_time()]
            (http, tokens_per_event), used = _metered(pid, engine, url, asks)
            _, used_by_short = _metered(pid, engine, url, short)
            if turn:
                cpu["offline"].append(1e6 * (marks[1] - marks[0]) / tokens)
                for who, seconds in used.items():
                    cpu[who].append(1e6 * seconds / tokens)
                for who, seconds in used_by_short.items():
                    each[who].append(1e6 * seconds / len(short))
                rates["offline"].append(offline)
                rates["http"].append(http)
                per_event.append(tokens_per_event)
    medians = {way: statistics.median(values) for way, values in rates.items()}
    return {
        "streams": args.streams,
        "output_len": args.output_len,
        "tokens_per_s": {way: round(rate, 1) for way, rate in medians.items()},
        "ratio": round(medians["http"] / medians["offline"], 3),
        "requests": args.requests,
        "cpu_us_per_request": {who: round(statistics.median(v), 1) for who, v in each.items()},
        "cpu_us_per_token": {who: round(statistics.median(v), 2) for who, v in cpu.items()},
        "tokens_per_event": round(statistics.median(per_event), 2),
    }


def _metered(
    pid: int, engine: int, url: str, asks: list[Ask]
) -> tuple[tuple[float, float], dict[str, float]]:
    """What ``_http`` gives, and the processor seconds of the three processes."""
    before = (_cpu_s(pid), _cpu_s(engine), time.process_time())
    result = _http(url, asks)
    after = (_cpu_s(pid), _cpu_s(engine), time.process_time())
    used = (b - a for a, b in zip(before, after, strict=True))
    return result, dict(zip(("http", "engine", "client"), used, strict=True))


def _child(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def _cpu_s(pid: int) -> float:
    """Processor seconds of a process so far, all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _offline(llm: LLM, asks: list[Ask]) -> float:
    params = SamplingParams(temperature=0, max_tokens=asks[0].max_tokens, ignore_eos=True)
    begin = time.perf_counter()
    prompts: list[Any] = [ask.prompt for ask in asks]
    outputs = llm.generate(prompts, params, progress=False)
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
