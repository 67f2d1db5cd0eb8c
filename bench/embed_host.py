"""A product that embeds one engine: the jobs of ``bench embed``, in the engine's own process.

Runs in the engine's own environment, where s1engine may not be installed, so it imports the
standard library only (``cpu_adapter`` loads it). Owns what the product does besides: a busy thread,
an event loop, deadlines. Knows no engine: an adapter is a file with

    PACKAGE                       distribution whose version is reported
    load(path, threads, options)  -> an object with the methods of EmbeddedModel
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

TICK_S = 0.002  # between looks of the event loop at the clock
BUSY_WORK = range(200)  # of one turn of the busy thread


class EmbeddedModel(Protocol):
    """One loaded engine."""

    def encode(self, text: str) -> list[int]:
        """Token ids."""
        ...

    def stream(self, ids: list[int], new: int, rule: str | None = None) -> Iterator[str]:
        """Greedy text, one item a token, ``new`` tokens unless the text ends. ``rule``: one of
        ``penalty``, ``bias``, ``logprobs`` (5 a token). Raises NotImplementedError if it has
        none."""
        ...

    def complete_by(self, ids: list[int], new: int, deadline_s: float) -> int:
        """Generates up to ``new`` tokens and returns within ``deadline_s``; returns their
        number."""
        ...

    concurrent: bool
    """May several threads generate at once?"""


class JobServer:
    """Jobs at one engine. Times are seconds."""

    def __init__(self, adapter: Any) -> None:
        self._adapter = adapter
        self._model: EmbeddedModel | None = None

    def load(self, path: str, threads: int, options: dict[str, Any]) -> dict[str, Any]:
        """Loads, and generates one token: the end of the start."""
        self._model = self._adapter.load(Path(path), threads, options)
        for _ in self._model.stream(self._model.encode("Once upon a time"), 1):
            pass
        return {
            "version": metadata.version(self._adapter.PACKAGE),
            "resident_mib": resident_mib(),
            "concurrent": self._model.concurrent,
        }

    def stream(self, text: str, new: int, rule: str | None, beside: str | None) -> dict[str, Any]:
        """Times from the request to each token. ``beside``: ``busy``, a thread of pure Python;
        ``loop``, an event loop, whose lags come with the times."""
        model = self.model
        ids = model.encode(text)
        if beside == "loop":
            times, lags = asyncio.run(_stream_beside_loop(model, ids, new))
            return {"tokens": len(ids), "times": times, "lags": lags}
        with busy_thread() if beside == "busy" else contextlib.nullcontext():
            return {"tokens": len(ids), "times": token_times(model, ids, new, rule)}

    def deadlines(
        self, text: str, new: int, deadlines: list[float], others: int, long_tokens: int
    ) -> dict[str, Any]:
        """How much later than each deadline its request returned, beside ``others`` streams, or
        while a prompt of ``long_tokens`` tokens arrives halfway to the deadline."""
        model = self.model
        if (others or long_tokens) and not model.concurrent:
            raise NotImplementedError("this engine generates for one thread at a time")
        ids = model.encode(text)
        errors: list[float] = []
        arrived: list[str] = []
        with _streams(model, ids, others):
            for number, deadline in enumerate(deadlines):
                long_ids = model.encode(f"{number} {text * long_tokens}")[:long_tokens]
                arrival = threading.Timer(
                    deadline / 2, lambda ids=long_ids: arrived.extend(model.stream(ids, 1))
                )
                if long_tokens:
                    arrival.start()
                begin = time.perf_counter()
                model.complete_by(ids, new, deadline)
                errors.append(time.perf_counter() - begin - deadline)
                if long_tokens:
                    arrival.join()
        if long_tokens and len(arrived) != len(deadlines):
            raise RuntimeError(f"{len(arrived)} of {len(deadlines)} long prompts were computed")
        return {"errors": errors}

    @property
    def model(self) -> EmbeddedModel:
        """The loaded engine."""
        assert self._model is not None, "load comes first"
        return self._model


def token_times(model: EmbeddedModel, ids: list[int], new: int, rule: str | None) -> list[float]:
    """Seconds from the request to each of its tokens."""
    begin = time.perf_counter()
    return [time.perf_counter() - begin for _ in model.stream(ids, new, rule)]


async def _stream_beside_loop(
    model: EmbeddedModel, ids: list[int], new: int
) -> tuple[list[float], list[float]]:
    """Token times of a stream in a thread, and how late this event loop woke up meanwhile."""
    stream = asyncio.create_task(asyncio.to_thread(token_times, model, ids, new, None))
    lags = []
    while not stream.done():
        begin = time.perf_counter()
        await asyncio.sleep(TICK_S)
        lags.append(max(0.0, time.perf_counter() - begin - TICK_S))
    return stream.result(), lags


@contextlib.contextmanager
def busy_thread() -> Iterator[None]:
    """A thread of this process that computes in Python all the time."""
    ended = threading.Event()

    def work() -> None:
        while not ended.is_set():
            sum(i * i for i in BUSY_WORK)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextlib.contextmanager
def _streams(model: EmbeddedModel, ids: list[int], count: int) -> Iterator[None]:
    """So many threads that stream, one request after the other. Yields once all have a token."""
    ended = threading.Event()
    running = threading.Barrier(count + 1)

    def work(number: int) -> None:
        first = True
        while not ended.is_set():
            for _ in model.stream([*ids[number:], *ids[:number]], 256):
                if first:
                    running.wait()
                    first = False
                if ended.is_set():
                    break

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    running.wait()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def resident_mib() -> float:
    """Resident memory of this process, mapped files included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024
