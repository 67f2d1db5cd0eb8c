"""Requests to a server over time: what is asked when, and what each answer took.

A client small enough to share a machine with the server that it measures: one connection a request,
events counted as they come, nothing parsed before the end.
"""

import asyncio
import csv
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

FIRST_ID = 3  # ids below are special in most vocabularies, those of s1-nano included


@dataclass(frozen=True, slots=True)
class Ask:
    """One request."""

    at: float  # seconds since the start
    prompt: list[int] | str  # a text of one token a character
    max_tokens: int


@dataclass(slots=True)
class Took:
    """What became of one; times are monotonic, in seconds."""

    begin: float
    end: float = 0.0
    events: list[float] = field(default_factory=list)  # when each piece of text came
    output_tokens: int = 0
    error: str | None = None

    @property
    def ttft(self) -> float:
        """Seconds to the first piece of text."""
        return self.events[0] - self.begin

    @property
    def tpot(self) -> float:
        """Seconds a token after the first."""
        return (self.end - self.events[0]) / max(self.output_tokens - 1, 1)


def random_asks(
    count: int, input_len: int, output_len: int, spread: float, vocab_size: int, seed: int
) -> list[Ask]:
    """Random prompts, all at once; lengths vary by ``spread`` around what is asked."""
    chance = random.Random(seed)

    def about(length: int) -> int:
        least, most = int(length * (1 - spread)), int(length * (1 + spread))
        return max(chance.randint(least, most), 1)

    return [
        Ask(0.0, _prompt(chance, about(input_len), vocab_size), about(output_len))
        for _ in range(count)
    ]


def _prompt(chance: random.Random, length: int, vocab_size: int) -> list[int]:
    return [chance.randrange(FIRST_ID, vocab_size) for _ in range(length)]


def paced(asks: Sequence[Ask], rate: float, seed: int) -> list[Ask]:
    """The same at ``rate`` requests a second, Poisson; infinite: all at once."""
    chance, at, found = random.Random(seed), 0.0, []
    for ask in asks:
        found.append(Ask(at, ask.prompt, ask.max_tokens))
        at += 0.0 if rate == float("inf") else chance.expovariate(rate)
    return found


def trace_asks(
    path: Path, count: int, time_scale: float, length_scale: float, vocab_size: int, seed: int
) -> list[Ask]:
    """The first ``count`` requests of a recorded trace: its arrival times divided by
    ``time_scale``, its lengths times ``length_scale``, prompts random."""
    chance = random.Random(seed)
    rows = _rows(path)[:count]
    if not rows:
        return []
    start = rows[0][0]
    return [
        Ask(
            (at - start) / time_scale,
            _prompt(chance, max(int(length_in * length_scale), 1), vocab_size),
            max(int(length_out * length_scale), 1),
        )
        for at, length_in, length_out in rows
    ]


def _rows(path: Path) -> list[tuple[float, int, int]]:
    """Arrival (s), input and output tokens, as Azure's (CSV), Mooncake's and LLMServingSim's
    (JSON lines) traces have them."""
    with path.open() as file:
        if path.suffix == ".csv":
            return [
                (
                    datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp(),
                    int(row["ContextTokens"]),
                    int(row["GeneratedTokens"]),
                )
                for row in csv.DictReader(file)
            ]
        return [_from_json(json.loads(line)) for line in file]


def _from_json(row: dict[str, Any]) -> tuple[float, int, int]:
    if "arrival_time_ns" in row:
        return row["arrival_time_ns"] / 1e9, row["input_toks"], row["output_toks"]
    return row["timestamp"] / 1e3, row["input_length"], row["output_length"]


async def play(
    url: str,
    asks: Sequence[Ask],
    *,
    api_key: str | None = None,
    max_concurrency: int | None = None,
    extra: dict[str, Any] | None = None,
) -> list[Took]:
    """Asks each at its time, through ``/v1/completions``, streamed."""
    gate = asyncio.Semaphore(max_concurrency or len(asks) or 1)
    begin = time.monotonic()

    async def one(ask: Ask) -> Took:
        await asyncio.sleep(begin + ask.at - time.monotonic())
        async with gate:
            return await _ask(url, ask, api_key, extra or {})

    return await asyncio.gather(*map(one, asks))


async def _ask(url: str, ask: Ask, api_key: str | None, extra: dict[str, Any]) -> Took:
    took = Took(time.monotonic())
    body = {
        "prompt": ask.prompt,
        "max_tokens": ask.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        **extra,
    }
    try:
        await _stream(url, json.dumps(body).encode(), api_key, took)
    except (OSError, asyncio.IncompleteReadError, ValueError) as error:
        took.error = took.error or f"{type(error).__name__}: {error}"
    took.end = took.events[-1] if took.events else time.monotonic()
    if not took.error and not took.output_tokens:
        took.error = "no tokens"
    return took


async def _stream(url: str, body: bytes, api_key: str | None, took: Took) -> None:
    place = urlsplit(url)
    assert place.hostname is not None
    reader, writer = await asyncio.open_connection(place.hostname, place.port or 80, limit=2**22)
    key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
    head = (
        f"POST {place.path.rstrip('/')}/v1/completions HTTP/1.1\r\nHost: {place.netloc}\r\n{key}"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n"
    )
    try:
        writer.write(head.encode() + body)
        status = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in status.split(b"\r\n", 1)[0]:
            took.error = (await reader.read()).decode(errors="replace")[-300:]
            return
        while True:
            try:
                event = await reader.readuntil(b"\n\n")
            except asyncio.IncompleteReadError:
                if took.output_tokens:  # not everybody says that it is done
                    return
                raise
            data = event[event.index(b"data: ") + 6 :]
            if data.startswith(b"[DONE]"):
                return
            if b'"usage":' in data and (usage := json.loads(data)["usage"]):
                took.output_tokens = usage["completion_tokens"]
            elif b'"error":' in data[:12]:
                took.error = data.decode(errors="replace")
            else:
                took.events.append(time.monotonic())
    finally:
        writer.close()
