"""Requests to a server over time, and the timing of each answer.

The client is small, so that it can share a machine with the server that it measures: one connection
for each request, and only the first bytes of an event are looked at while it streams.
"""

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from s1engine.plan.workload import pace, read_trace

FIRST_ID = 3  # lower ids are special in most vocabularies, in s1-nano's too


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """One request."""

    at: float  # seconds since the start
    prompt: list[int] | str  # a text of one token per character
    max_tokens: int


@dataclass(slots=True)
class RequestTiming:
    """The outcome of one request; times are monotonic, in seconds."""

    begin: float
    end: float = 0.0
    events: list[float] = field(default_factory=list)  # arrival of each piece of text
    output_tokens: int = 0
    error: str | None = None

    @property
    def ttft(self) -> float:
        """Seconds to the first piece of text."""
        return self.events[0] - self.begin

    @property
    def tpot(self) -> float:
        """Seconds per token after the first."""
        return (self.end - self.events[0]) / max(self.output_tokens - 1, 1)


def random_requests(
    count: int, input_len: int, output_len: int, spread: float, vocab_size: int, seed: int
) -> list[LoadRequest]:
    """Random prompts, all at time 0; lengths vary by the share ``spread``."""
    rng = random.Random(seed)

    def about(length: int) -> int:
        least, most = int(length * (1 - spread)), int(length * (1 + spread))
        return max(rng.randint(least, most), 1)

    return [
        LoadRequest(0.0, _prompt(rng, about(input_len), vocab_size), about(output_len))
        for _ in range(count)
    ]


def _prompt(rng: random.Random, length: int, vocab_size: int) -> list[int]:
    return [rng.randrange(FIRST_ID, vocab_size) for _ in range(length)]


def at_rate(requests: Sequence[LoadRequest], rate: float, seed: int) -> list[LoadRequest]:
    """The same requests at a mean ``rate`` a second, Poisson; infinity: all at once."""
    times = pace([request.at for request in requests], rate, seed)
    return [replace(request, at=at) for request, at in zip(requests, times, strict=True)]


def trace_requests(
    path: Path, count: int, time_scale: float, length_scale: float, vocab_size: int, seed: int
) -> list[LoadRequest]:
    """The first ``count`` requests of a recorded trace: arrival times divided by ``time_scale``,
    lengths times ``length_scale``, prompts random."""
    rng = random.Random(seed)
    arrivals = read_trace(path)[:count]
    start = (arrivals[0].at or 0.0) if arrivals else 0.0
    return [
        LoadRequest(
            ((arrival.at or 0.0) - start) / time_scale,
            _prompt(rng, max(int(arrival.input_len * length_scale), 1), vocab_size),
            max(int(arrival.output_len * length_scale), 1),
        )
        for arrival in arrivals
    ]


async def send_requests(
    url: str,
    requests: Sequence[LoadRequest],
    *,
    api_key: str | None = None,
    max_concurrency: int | None = None,
    extra: dict[str, Any] | None = None,
) -> list[RequestTiming]:
    """Send each request at its time to ``/v1/completions``, streamed."""
    gate = asyncio.Semaphore(max_concurrency or len(requests) or 1)
    begin = time.monotonic()

    async def send_at_its_time(request: LoadRequest) -> RequestTiming:
        await asyncio.sleep(begin + request.at - time.monotonic())
        async with gate:
            return await _send(url, request, api_key, extra or {})

    return await asyncio.gather(*map(send_at_its_time, requests))


async def _send(
    url: str, request: LoadRequest, api_key: str | None, extra: dict[str, Any]
) -> RequestTiming:
    timing = RequestTiming(time.monotonic())
    body = {
        "prompt": request.prompt,
        "max_tokens": request.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        **extra,
    }
    try:
        await _stream(url, json.dumps(body).encode(), api_key, timing)
    except (OSError, asyncio.IncompleteReadError, ValueError) as error:
        timing.error = timing.error or f"{type(error).__name__}: {error}"
    timing.end = timing.events[-1] if timing.events else time.monotonic()
    if not timing.error and not timing.output_tokens:
        timing.error = "no tokens"
    return timing


async def _stream(url: str, body: bytes, api_key: str | None, timing: RequestTiming) -> None:
    address = urlsplit(url)
    assert address.hostname is not None
    reader, writer = await asyncio.open_connection(
        address.hostname, address.port or 80, limit=2**22
    )
    key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
    head = (
        f"POST {address.path.rstrip('/')}/v1/completions HTTP/1.1\r\nHost: {address.netloc}\r\n"
        f"{key}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n"
    )
    try:
        writer.write(head.encode() + body)
        status = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in status.split(b"\r\n", 1)[0]:
            timing.error = (await reader.read()).decode(errors="replace")[-300:]
            return
        while True:
            try:
                event = await reader.readuntil(b"\n\n")
            except asyncio.IncompleteReadError:
                if timing.output_tokens:  # some servers end without [DONE]
                    return
                raise
            data = event[event.index(b"data: ") + 6 :]
            if data.startswith(b"[DONE]"):
                return
            if b'"usage":' in data and (usage := json.loads(data)["usage"]):
                timing.output_tokens = usage["completion_tokens"]
            elif b'"error":' in data[:12]:
                timing.error = data.decode(errors="replace")
            else:
                timing.events.append(time.monotonic())
    finally:
        writer.close()
