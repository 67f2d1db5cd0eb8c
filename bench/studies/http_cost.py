"""Cost of the server: tokens a second of many streams over HTTP, against the engine alone.

Both answer the same requests, in turns, on one machine, which also runs the client. The engine
alone is ``LLM.generate``, without chunks. CPU time is reported for each process: other load on the
machine hardly changes it. Requests of one token each show the cost of a request without its tokens.
"""

import argparse
import asyncio
import os
import statistics
import time
from pathlib import Path
from typing import Any

from s1engine.bench.load_generator import LoadRequest, random_requests, send_requests
from s1engine.bench.serve import served
from s1engine.engine.llm import LLM
from s1engine.sampling_params import SamplingParams


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the study."""
    parser.add_argument("--model", default=None, help="default: bundled s1-nano")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--input-len", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--requests", type=int, default=1000, help="of one token each")
    parser.add_argument("--rounds", type=int, default=3)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Medians over rounds, offline and HTTP in turns."""
    requests = random_requests(args.streams, args.input_len, args.output_len, 0.0, 300, 0)
    rates: dict[str, list[float]] = {"offline": [], "http": []}
    cpu: dict[str, list[float]] = {"offline": [], "http": [], "engine": [], "client": []}
    short = random_requests(args.requests, args.input_len, 1, 0.0, 300, 1)
    each: dict[str, list[float]] = {"http": [], "engine": [], "client": []}
    per_event: list[float] = []
    llm = LLM(args.model, progress=False)
    tokens = args.streams * args.output_len
    with served(args.model, []) as (url, pid):
        engine = _child(pid)
        for turn in range(args.rounds + 1):  # the first warms up
            before = time.process_time()
            offline = _offline_rate(llm, requests)
            offline_cpu = time.process_time() - before
            (http, tokens_per_event), used = _http_cpu(pid, engine, url, requests)
            _, used_by_short = _http_cpu(pid, engine, url, short)
            if turn:
                cpu["offline"].append(1e6 * offline_cpu / tokens)
                for process, seconds in used.items():
                    cpu[process].append(1e6 * seconds / tokens)
                for process, seconds in used_by_short.items():
                    each[process].append(1e6 * seconds / len(short))
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
        "cpu_us_per_request": {name: round(statistics.median(v), 1) for name, v in each.items()},
        "cpu_us_per_token": {name: round(statistics.median(v), 2) for name, v in cpu.items()},
        "tokens_per_event": round(statistics.median(per_event), 2),
    }


def _http_cpu(
    pid: int, engine: int, url: str, requests: list[LoadRequest]
) -> tuple[tuple[float, float], dict[str, float]]:
    """The result of ``_http_rate``, and CPU seconds of server, engine and client."""
    before = (_cpu_s(pid), _cpu_s(engine), time.process_time())
    result = _http_rate(url, requests)
    after = (_cpu_s(pid), _cpu_s(engine), time.process_time())
    used = (b - a for a, b in zip(before, after, strict=True))
    return result, dict(zip(("http", "engine", "client"), used, strict=True))


def _child(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def _cpu_s(pid: int) -> float:
    """CPU seconds of a process so far, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _offline_rate(llm: LLM, requests: list[LoadRequest]) -> float:
    """Tokens a second."""
    params = SamplingParams(temperature=0, max_tokens=requests[0].max_tokens, ignore_eos=True)
    begin = time.perf_counter()
    prompts: list[Any] = [request.prompt for request in requests]
    outputs = llm.generate(prompts, params, progress=False)
    seconds = time.perf_counter() - begin
    return sum(len(output.outputs[0].token_ids) for output in outputs) / seconds


def _http_rate(url: str, requests: list[LoadRequest]) -> tuple[float, float]:
    """Tokens a second, and tokens per event."""
    begin = time.perf_counter()
    extra = {"temperature": 0, "ignore_eos": True}
    timings = asyncio.run(send_requests(url, requests, extra=extra))
    seconds = time.perf_counter() - begin
    errors = [timing.error for timing in timings if timing.error]
    assert not errors, errors[:1]
    tokens = sum(timing.output_tokens for timing in timings)
    return tokens / seconds, tokens / sum(len(timing.events) for timing in timings)
