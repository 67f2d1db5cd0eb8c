"""Servers beside each other: the same model, the same streams, one server after the other.

Each takes the same text prompts, of one token a letter, through ``/v1/completions`` with the same
client on the same machine, and answers with as many tokens. A server that is not there is said to
be absent.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from s1engine.bench.cpu_cases import CASES
from s1engine.bench.cpu_engines import environments
from s1engine.bench.cpu_model import model_dir
from s1engine.bench.cpu_section import Plan, Section
from s1engine.bench.load_generator import Ask, play
from s1engine.bench.serve import report, serve_command
from s1engine.bench.shapes import NAMES, shape
from s1engine.errors import RequestError

LETTERS = "cdefghijklmnopqrstuvwxyz"
START_S = 300.0
WARM_TOKENS = 8
MARGIN = 8  # tokens that a server may want beyond a request's


@dataclass(frozen=True)
class Server:
    """How one server is started, and what its requests need beyond ours."""

    command: list[str]
    extra: dict[str, Any]
    environment: dict[str, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``s1engine bench servers``."""
    parser.add_argument("--servers", default=",".join(SERVERS), help="in that order")
    parser.add_argument("--shape", default="25M", choices=NAMES)
    parser.add_argument("--streams", default="1,16,64", help="loads, one after the other")
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--llama-server", type=Path, help="llama.cpp's own server")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--work", type=Path, default=Path("build/bench_cpu"), help="models, logs")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Medians over rounds, by server and load."""
    args.work.mkdir(parents=True, exist_ok=True)
    places = environments(args.peer)
    loads = [int(word) for word in args.streams.split(",")]
    rows: list[dict[str, Any]] = []
    absent: list[str] = []
    failures: list[str] = []
    names = args.servers.split(",")
    for name in names:
        if name not in SERVERS:
            known = ", ".join(SERVERS)
            raise RequestError(f"server {name!r} is none of {known}", param="servers")
    for name in names:
        server = SERVERS[name](args, places, max(loads))
        if server is None:
            absent.append(name)
            continue
        try:
            for row in _measure(args, name, server, loads):
                rows.append(row)
                print(json.dumps(row), file=sys.stderr)
        except (RuntimeError, RequestError) as error:
            failures.append(f"{name}: {error}")
            print(failures[-1], file=sys.stderr)
    return {
        "shape": args.shape,
        "input_len": args.input_len,
        "output_len": args.output_len,
        "absent": absent,
        "failures": failures,
        "rows": rows,
    }


def _measure(
    args: argparse.Namespace, name: str, server: Server, loads: list[int]
) -> Iterator[dict[str, Any]]:
    with _running(server, args.work / f"server-{name}.log") as url:
        for streams in loads:
            yield {"server": name, "streams": streams, **_load(args, server, url, streams)}


def _load(args: argparse.Namespace, server: Server, url: str, streams: int) -> dict[str, Any]:
    """One load: the first, short round warms up."""
    chance = random.Random(streams)
    found: list[dict[str, Any]] = []
    for turn in range(args.rounds + 1):
        prompts = ["".join(chance.choices(LETTERS, k=args.input_len)) for _ in range(streams)]
        asks = [Ask(0.0, prompt, args.output_len if turn else WARM_TOKENS) for prompt in prompts]
        took = asyncio.run(play(url, asks, extra={"temperature": 0, **server.extra}))
        if turn:
            found.append(report(asks, took, [99], {}))
    names = ("output_throughput", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_itl_ms")
    medians = {name: _median(found, name) for name in names}
    tokens = sum(one["total_output_tokens"] for one in found)
    return {**medians, "failed": sum(one["failed"] for one in found), "output_tokens": tokens}


def _median(found: list[dict[str, Any]], name: str) -> float | None:
    values = [one[name] for one in found if name in one]
    return round(statistics.median(values), 2) if values else None


@contextlib.contextmanager
def _running(server: Server, log: Path) -> Iterator[str]:
    """The server's address, once it answers; it and its children end with the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    with log.open("w") as out:
        process = subprocess.Popen(
            [*server.command, port],
            stdout=out,
            stderr=out,
            env={**os.environ, **server.environment},
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_for(url, process, log)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_for(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError, urllib.error.URLError):
            if urllib.request.urlopen(f"{url}/health", timeout=5).status == 200:
                return
        time.sleep(0.2)
    raise RuntimeError(f"the server did not start; its log: {log}")


def _max_len(args: argparse.Namespace) -> int:
    return int(args.input_len) + int(args.output_len) + MARGIN


def _source(args: argparse.Namespace) -> Path:
    return model_dir(shape(args.shape), args.shape, args.work).resolve()


def _ours(args: argparse.Namespace, places: dict[str, Path], streams: int) -> Server:
    flags = ["--dtype", "bfloat16", "--max-model-len", str(_max_len(args))]
    flags += ["--max-num-seqs", str(streams)]
    command = serve_command(str(_source(args)), *flags, "--port")
    return Server(command, {"ignore_eos": True}, {"OMP_NUM_THREADS": str(args.threads)})


def _llama_cpp(args: argparse.Namespace, places: dict[str, Path], streams: int) -> Server | None:
    if args.llama_server is None or "llama.cpp" not in places:
        return None
    plan = Plan(places, args.work, args.threads, 1, 0.0, False)
    section = Section(plan, args.shape, shape(args.shape), "bf16", "16", CASES["16"])
    command = [str(args.llama_server), "-m", str(section.converted("llama.cpp") / "model.gguf")]
    command += ["-t", str(args.threads), "-np", str(streams), "-c", str(streams * _max_len(args))]
    return Server([*command, "--port"], {"ignore_eos": True}, {})


def _transformers(args: argparse.Namespace, places: dict[str, Path], streams: int) -> Server | None:
    program = places["transformers"] / "bin" / "transformers"
    if not program.exists():
        return None
    source = str(_source(args))
    command = [str(program), "serve", source, "--device", "cpu", "--dtype", "bfloat16", "--port"]
    endless = json.dumps({"do_sample": False, "eos_token_id": None})
    extra = {"model": source, "generation_config": endless}
    return Server(command, extra, {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"})


SERVERS: dict[str, Callable[[argparse.Namespace, dict[str, Path], int], Server | None]] = {
    "s1engine": _ours,
    "llama.cpp": _llama_cpp,
    "transformers": _transformers,
}
