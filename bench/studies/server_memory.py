"""Memory of a server: what one idle connection, one stream and one queued request hold.

Resident memory of the server's process and of the engine's, before and while many of a kind are
there. Streams run, or wait in the queue, and are read; nothing is asserted of their speed.
"""

import argparse
import asyncio
import json
import re
import time
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from s1engine.bench.serve import served

HEALTH = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]
SETTLE_S = 120.0
POLL_S = 0.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the study."""
    parser.add_argument("--model", default=None, help="default: bundled s1-nano")
    parser.add_argument("--connections", type=int, default=2000)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--queued", type=int, default=512)
    parser.add_argument("--prompt-chars", type=int, default=400)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """KiB of each process for one of a kind, and MiB of both when idle."""
    flags = ["--max-num-seqs", str(args.streams), "--max-queued-requests", str(args.queued)]
    with served(args.model, flags) as (url, pid):
        return asyncio.run(_measure(args, url, pid))


async def _measure(args: argparse.Namespace, url: str, pid: int) -> dict[str, Any]:
    pids = {"server": pid, "engine": _child(pid)}
    host = urlsplit(url)
    await _close([await _send(host.port, _request(args, 1)) for _ in range(args.streams)])
    await _until(url, 0, 0)  # all code is loaded, pools have their size
    idle = {name: _resident_kib(of) for name, of in pids.items()}

    def since(before: dict[str, int], count: int) -> dict[str, float]:
        return {n: round((_resident_kib(of) - before[n]) / count, 1) for n, of in pids.items()}

    running = [await _send(host.port, _request(args, 100_000)) for _ in range(args.streams)]
    await _until(url, args.streams, 0)
    per_stream = since(idle, args.streams)
    before = {name: _resident_kib(of) for name, of in pids.items()}
    queued = [await _send(host.port, _request(args, 100_000)) for _ in range(args.queued)]
    await _until(url, args.streams, args.queued)
    per_queued = since(before, args.queued)
    before = {name: _resident_kib(of) for name, of in pids.items()}
    opened = [await _send(host.port, HEALTH) for _ in range(args.connections)]
    for reader, _ in opened:
        await reader.readuntil(b"\r\n\r\n")
    per_connection = since(before, args.connections)
    await _close(opened + running + queued)
    return {
        "idle_mib": {name: round(kib / 1024) for name, kib in idle.items()},
        "kib_per_idle_connection": per_connection,
        "kib_per_stream": per_stream,
        "kib_per_queued_request": per_queued,
        **{name: getattr(args, name) for name in ("connections", "streams", "queued")},
        "prompt_chars": args.prompt_chars,
    }


def _request(args: argparse.Namespace, max_tokens: int) -> bytes:
    fields = {"prompt": "a=1 " * (args.prompt_chars // 4), "stream": True, "ignore_eos": True}
    body = json.dumps({**fields, "max_tokens": max_tokens}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Content-Type: application/json\r\n\r\n".encode() + body


async def _send(port: int | None, request: bytes) -> Connection:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    await writer.drain()
    return reader, writer


async def _close(connections: list[Connection]) -> None:
    for _, writer in connections:
        writer.close()
    await asyncio.gather(*(w.wait_closed() for _, w in connections), return_exceptions=True)


async def _until(url: str, running: int, waiting: int) -> None:
    """Wait until so many sequences run and wait."""
    deadline = time.monotonic() + SETTLE_S
    while (now := await asyncio.to_thread(_sequences, url)) != (running, waiting):
        assert time.monotonic() < deadline, f"{now}, not {(running, waiting)}"
        await asyncio.sleep(POLL_S)


def _sequences(url: str) -> tuple[int, ...]:
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        text = answer.read().decode()
    names = ("running", "waiting")
    found = [re.search(rf"^s1engine:num_requests_{n}{{.*}} (\S+)", text, re.M) for n in names]
    return tuple(int(float(match[1])) for match in found if match)


def _child(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def _resident_kib(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    match = re.search(r"VmRSS:\s+(\d+)", text)
    assert match
    return int(match[1])
