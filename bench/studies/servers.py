"""Servers side by side: the same model, the same streams, by turns.

Each answers the same text prompts, of one token a letter, through ``/v1/completions``, to the same
client on the same machine, with the same number of tokens. All servers run; in each round each
answers once, the others idle. So what disturbs the machine hits all of them, and ``--baseline``
shows by ratios what a change cost. Missing servers are reported as absent.
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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from s1engine.bench.cpu_cases import CASES
from s1engine.bench.cpu_engines import environments
from s1engine.bench.cpu_section import Section, SectionOptions
from s1engine.bench.load_generator import LoadRequest, send_requests
from s1engine.bench.random_checkpoint import random_checkpoint
from s1engine.bench.serve import report, serve_command
from s1engine.bench.shapes import NAMES, shape
from s1engine.errors import RequestError

LETTERS = "cdefghijklmnopqrstuvwxyz"
START_S = 300.0
WARM_TOKENS = 8
MARGIN = 8  # spare tokens of context


@dataclass(frozen=True)
class ServerCommand:
    """How one server is started, and the further fields of its requests."""

    command: list[str]
    extra: dict[str, Any]
    environment: dict[str, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the study."""
    parser.add_argument("--servers", default=",".join(SERVERS), help="which ones")
    parser.add_argument("--shape", default="25M", choices=NAMES)
    parser.add_argument("--streams", default="1,16,64", help="loads, one after the other")
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--llama-server", type=Path, help="llama.cpp's own server")
    parser.add_argument(
        "--baseline", type=Path, metavar="FOLDER", help="virtual environment of another s1engine"
    )
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--work", type=Path, default=Path("build/bench_cpu"), help="models, logs")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Medians over rounds, by server and load."""
    args.work.mkdir(parents=True, exist_ok=True)
    folders = environments(args.peer)
    loads = [int(word) for word in args.streams.split(",")]
    names = args.servers.split(",")
    for name in names:
        if name not in SERVERS:
            known = ", ".join(SERVERS)
            raise RequestError(f"server {name!r} is none of {known}", param="servers")
    servers = {name: SERVERS[name](args, folders, max(loads)) for name in names}
    urls: dict[str, str] = {}
    failures: list[str] = []
    with contextlib.ExitStack() as running:
        for name, server in servers.items():
            if server is not None:
                try:
                    log = args.work / f"server-{name}.log"
                    urls[name] = running.enter_context(_running(server, log))
                except RuntimeError as error:
                    failures.append(f"{name}: {error}")
                    print(failures[-1], file=sys.stderr)
        extras = {name: server.extra for name, server in servers.items() if server is not None}
        rows = [row for streams in loads for row in _measure_load(args, urls, extras, streams)]
    return {
        "shape": args.shape,
        "input_len": args.input_len,
        "output_len": args.output_len,
        "rounds": args.rounds,
        "absent": [name for name, server in servers.items() if server is None],
        "failures": failures,
        "rows": rows,
    }


def _measure_load(
    args: argparse.Namespace, urls: dict[str, str], extras: dict[str, Any], streams: int
) -> list[dict[str, Any]]:
    """Medians of one load, by server; the first, short round warms up."""
    rng = random.Random(streams)
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in urls}
    order = list(urls)
    for turn in range(args.rounds + 1):
        prompts = ["".join(rng.choices(LETTERS, k=args.input_len)) for _ in range(streams)]
        length = args.output_len if turn else WARM_TOKENS
        requests = [LoadRequest(0.0, prompt, length) for prompt in prompts]
        for name in order:
            extra = {"temperature": 0, **extras[name]}
            timings = asyncio.run(send_requests(urls[name], requests, extra=extra))
            if turn:
                rounds[name].append(report(requests, timings, [99], {}))
        order.reverse()  # no server always follows the same one
    return [_row(name, streams, of_server) for name, of_server in rounds.items()]


def _row(name: str, streams: int, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """One server's medians of one load."""
    names = ("output_throughput", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_itl_ms")
    row = {
        "server": name,
        "streams": streams,
        **{name: _median(rounds, name) for name in names},
        "failed": sum(r["failed"] for r in rounds),
        "output_tokens": sum(r["total_output_tokens"] for r in rounds),
    }
    print(json.dumps(row), file=sys.stderr)
    return row


def _median(rounds: list[dict[str, Any]], name: str) -> float | None:
    values = [r[name] for r in rounds if name in r]
    return round(statistics.median(values), 2) if values else None


@contextlib.contextmanager
def _running(server: ServerCommand, log: Path) -> Iterator[str]:
    """Run the server and its children; yields its address once it answers."""
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
    return random_checkpoint(shape(args.shape), args.shape, args.work).resolve()


def _ours(args: argparse.Namespace, folders: dict[str, Path], streams: int) -> ServerCommand:
    flags = ["--dtype", "bfloat16", "--max-model-len", str(_max_len(args))]
    flags += ["--max-num-seqs", str(streams)]
    command = serve_command(str(_source(args)), *flags, "--port")
    return ServerCommand(command, {"ignore_eos": True}, {"OMP_NUM_THREADS": str(args.threads)})


def _baseline(
    args: argparse.Namespace, folders: dict[str, Path], streams: int
) -> ServerCommand | None:
    if args.baseline is None:
        return None
    ours = _ours(args, folders, streams)
    python = str((args.baseline / "bin" / "python").absolute())
    return replace(ours, command=[python, *ours.command[1:]])


def _llama_cpp(
    args: argparse.Namespace, folders: dict[str, Path], streams: int
) -> ServerCommand | None:
    if args.llama_server is None or "llama.cpp" not in folders:
        return None
    options = SectionOptions(folders, args.work, args.threads, 1, 0.0, False)
    section = Section(options, args.shape, shape(args.shape), "bf16", "16", CASES["16"])
    command = [str(args.llama_server), "-m", str(section.converted("llama.cpp") / "model.gguf")]
    command += ["-t", str(args.threads), "-np", str(streams), "-c", str(streams * _max_len(args))]
    return ServerCommand([*command, "--port"], {"ignore_eos": True}, {})


def _transformers(
    args: argparse.Namespace, folders: dict[str, Path], streams: int
) -> ServerCommand | None:
    program = folders["transformers"] / "bin" / "transformers"
    if not program.exists():
        return None
    source = str(_source(args))
    command = [str(program), "serve", source, "--device", "cpu", "--dtype", "bfloat16", "--port"]
    endless = json.dumps({"do_sample": False, "eos_token_id": None})
    extra = {"model": source, "generation_config": endless}
    return ServerCommand(
        command, extra, {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    )


SERVERS: dict[str, Callable[[argparse.Namespace, dict[str, Path], int], ServerCommand | None]] = {
    "s1engine": _ours,
    "baseline": _baseline,
    "llama.cpp": _llama_cpp,
    "transformers": _transformers,
}
