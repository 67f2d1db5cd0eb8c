"""A failure, a cancelled task or a lost connection at any step of a request's life leaves nothing
behind, and the next request is answered exactly.

The steps are those that the tracer sees (tracepoints), in a random order, for INJECTION_SECONDS.
"""

import asyncio
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider
from starlette.types import ASGIApp

from s1engine.config import EngineConfig
from s1engine.engine.async_engine import AsyncLLMEngine
from s1engine.engine.process_client import ProcessEngineClient
from s1engine.server import fair_threads
from s1engine.server.admission import Admission, ClientLimits
from s1engine.server.app import create_app
from s1engine.server.buffer_budget import BufferBudget
from s1engine.server.tracing import OtelTracing
from tests.engine.test_interrupts import check_empty
from tests.hostile.asgi import Call, call
from tests.hostile.tracepoints import Place, Tracer

SECONDS = float(os.environ.get("INJECTION_SECONDS", "0.8"))  # of each test
SEED = int(os.environ.get("INJECTION_SEED", "1"))
REGISTERING = (
    *("generation.py", "streaming.py", "admission.py", "tracing.py", "fair_threads.py"),
    *("process_client.py", "async_engine.py", "engine_thread.py"),
)
WAIT_S = 30.0
HELLO = [{"role": "user", "content": "a=3 b=a+4 c=b*2 c?"}]
CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
COMPLETIONS, RESPONSES = "/v1/completions", "/v1/responses"
ASKED: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": HELLO, "max_tokens": 6, "temperature": 0}),
    (COMPLETIONS, {"prompt": "a=1 b=2", "max_tokens": 5, "temperature": 0, "stream": True}),
    (
        CHAT,
        {
            "messages": HELLO, "max_tokens": 12, "temperature": 1, "seed": 3, "n": 2,
            "stream": True, "thinking_token_budget": 5, "num_waits": 1, "timeout": 60,
            "logprobs": True, "top_logprobs": 2,
        },
    ),
    (COMPLETIONS, {"prompt": ["a=1", "b=2"], "max_tokens": 4, "temperature": 0, "stop": ["9"]}),
    (
        CHAT,
        {
            "messages": HELLO, "max_tokens": 9, "temperature": 1, "seed": 1,
            "thinking_token_budget": 2, "structured_outputs": {"regex": "[0-9]{1,3}"},
        },
    ),
    (MESSAGES, {"messages": HELLO, "max_tokens": 20, "stream": True, "temperature": 0}),
    (RESPONSES, {"input": "a=1 a?", "max_output_tokens": 20, "temperature": 0}),
]  # fmt: skip


class Injected(Exception):
    """The failure at a step."""


class SpanCounter(SpanProcessor):
    """Spans that have begun and not ended."""

    open = 0

    def on_start(self, span: Span, parent_context: Any = None) -> None:
        self.open += 1

    def on_end(self, span: ReadableSpan) -> None:
        self.open -= 1


@dataclass
class Server:
    """The application over an engine, in this thread and its event loop."""

    runner: asyncio.Runner
    engine: AsyncLLMEngine | ProcessEngineClient
    admission: Admission
    budget: BufferBudget
    spans: SpanCounter
    app: ASGIApp
    wanted: list[Any]
    places: list[tuple[int, Place]]  # with the index of the request in ASKED

    async def run(self, asked: Call, tracer: Tracer, task_of: list[Any]) -> None:
        """Sends a request; the application may raise."""
        task = asyncio.ensure_future(asked.run(self.app))
        task_of.append(task)
        with tracer.tracing():
            await asyncio.wait([task], timeout=WAIT_S)
        assert task.done(), "the request hangs"
        if not task.cancelled():
            assert isinstance(task.exception(), Injected | None), task.exception()

    async def nothing_is_left(self) -> None:
        own = {asyncio.current_task(), *getattr(self.engine, "_tasks", ())}
        await self.until(lambda: asyncio.all_tasks() <= own)
        assert not self.admission.num_in_flight and not self.admission.in_flight
        assert self.budget.used == 0
        assert self.spans.open == 0
        if isinstance(self.engine, ProcessEngineClient):
            assert not self.engine._streams and not self.engine._numbers
            assert len(self.engine._collector) == 0
        else:
            assert not self.engine._live
            thread = self.engine.thread
            await self.until(lambda: not thread._live and not thread.engine.has_unfinished)
            check_empty(thread.engine)

    async def next_is_answered(self, index: int) -> None:
        """And then the engine is empty too."""
        answered = await call(*ASKED[index]).run(self.app)
        assert summary(answered) == self.wanted[index]
        await self.until(self._is_free)

    def _is_free(self) -> bool:
        stats = self.engine.stats()
        running = stats.num_running + stats.num_waiting
        return stats.num_free_blocks == stats.num_blocks and not running

    async def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < end, asyncio.all_tasks()
            await asyncio.sleep(0.001)


def summary(answered: Call) -> Any:
    """The answer without names and times, joined over the chunks of a stream."""
    assert answered.status == 200 and answered.heads == answered.ends == 1, answered.answer
    if not answered.answer.startswith((b"data:", b"event:")):
        whole = json.loads(answered.answer)
        kept = ("choices", "content", "output", "usage", "stop_reason")
        return strip_names({name: whole[name] for name in kept if name in whole})
    texts: dict[Any, str] = {}
    for event in answered.events():
        for choice in event.get("choices", ()):
            delta = {"text": choice.get("text"), **choice.get("delta", {})}
            for name in ("text", "content", "reasoning"):
                key = choice["index"], name
                texts[key] = texts.get(key, "") + (delta.get(name) or "")
        delta = event.get("delta")
        if isinstance(delta, dict):
            key = event.get("index"), delta.get("type")
            texts[key] = texts.get(key, "") + (delta.get("text") or delta.get("thinking") or "")
    return texts


def strip_names(value: Any) -> Any:
    """Without the ids of items, which are new in each answer, and what depends on the cache."""
    if isinstance(value, dict):
        left_out = ("id", "cached_tokens", "cache_read_input_tokens")
        return {name: strip_names(v) for name, v in value.items() if name not in left_out}
    return [strip_names(v) for v in value] if isinstance(value, list) else value


class InlineExecutor(Executor):
    """Runs functions at once, so that the tracer, which sees one thread, sees them."""

    def __init__(self, *_: Any) -> None: ...

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        done: Future[Any] = Future()
        try:
            done.set_result(function(*args, **kwargs))
        except Exception as error:
            done.set_exception(error)
        return done


@pytest.fixture(scope="module", params=[AsyncLLMEngine, ProcessEngineClient])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    config = EngineConfig(dtype="float32", max_num_seqs=8, device="cpu", max_model_len=256)
    spans, provider = SpanCounter(), TracerProvider()
    provider.add_span_processor(spans)
    with asyncio.Runner() as runner:
        engine = request.param(config)
        runner.run(engine.start())
        admission = Admission(ClientLimits(max_in_flight=32))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fair_threads.futures, "ThreadPoolExecutor", InlineExecutor)
            budget = BufferBudget()
            patch.setattr("s1engine.server.app.BufferBudget", lambda _: budget)
            app = create_app(engine, admission=admission, tracing=OtelTracing(provider))
        server = Server(runner, engine, admission, budget, spans, app, [], [])

        async def alone() -> None:
            for i, asked in enumerate(ASKED):
                tracer = Tracer()
                answered = call(*asked)
                await server.run(answered, tracer, [])
                server.wanted.append(summary(answered))
                server.places += [(i, place) for place in tracer.visits]

        runner.run(alone())
        # Those in the files that register something come first.
        random.Random(SEED).shuffle(server.places)
        server.places.sort(key=lambda at: not at[1].code.co_filename.endswith(REGISTERING))
        yield server
        runner.run(engine.shutdown())


def each_place(server: Server, kind: str) -> None:
    chance = random.Random(SEED)
    begun, done, seen = time.monotonic(), 0, set()
    num_threads = threading.active_count()
    for index, place in server.places:
        if place in seen:
            continue
        seen.add(place)
        asked, task_of = call(*ASKED[index]), []

        def act() -> None:
            if kind == "raise":
                raise Injected(str(place))  # noqa: B023
            if kind == "cancel":
                task_of[0].cancel()  # noqa: B023
            else:
                asked.gone.set()  # noqa: B023

        tracer = Tracer(act, (place, chance.choice((1, 1, 2))))
        try:
            server.runner.run(server.run(asked, tracer, task_of))
            assert asked.heads <= 1 and asked.ends <= 1, asked.answer
            server.runner.run(server.nothing_is_left())
            server.runner.run(server.next_is_answered(chance.randrange(len(ASKED))))
        except BaseException as error:
            error.add_note(f"{kind} {place} of request {index}")
            raise
        done += tracer.acted
        if time.monotonic() - begun > SECONDS:
            break
    print(f"{kind}: {done} of {len(server.places)} places")
    assert done and threading.active_count() <= num_threads


@pytest.mark.parametrize("kind", ["raise", "cancel", "disconnect"])
def test_nothing_is_left_behind(server: Server, kind: str) -> None:
    each_place(server, kind)
