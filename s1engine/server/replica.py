"""One replica: the server's whole application over an engine of its own, called by a front.

What the application sends comes back as lists of ASGI messages, held until the engine has begun
with the request (or there is nothing to begin with): until then the front may send the request to
another replica, and the client does not notice. Text that comes faster than it is taken travels in
fewer and larger messages: each costs Ray more than the token in it costs the engine (REST). Knows
nothing of Ray but the name that it has there.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from s1engine.config import EngineConfig
from s1engine.engine.assembly import StreamEvent
from s1engine.engine.remote_engine import RemoteLLMEngine
from s1engine.engine.request import Request
from s1engine.server.admission import Admission
from s1engine.server.affinity import Trail
from s1engine.server.app import create_app
from s1engine.server.scaling import RUNNING, WAITING
from s1engine.server.tracing import tracing_to

Message = dict[str, Any]

REST = 3.0  # pause after a message of a stream, as a multiple of what handing it to Ray took

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaOptions:
    """What every replica is started with."""

    config: EngineConfig
    max_queued: int
    efforts: dict[str, int | None]
    timeout: float | None
    traces_endpoint: str | None = None


class ReplicaLostError(RuntimeError):
    """The replica cannot answer; it had not begun, unless the front knows better.

    Args:
        name: of the replica, if it lives and should be avoided.
    """

    def __init__(self, name: str | None = None) -> None:
        super().__init__(name)
        self.name = name


class Outbox:
    """Messages of one answer between the application and the call that takes them away."""

    def __init__(self) -> None:
        self._messages: list[Message] = []
        self._news = asyncio.Event()
        self._open = False
        self.begun = False

    def begin(self) -> None:
        """The engine has begun: what there is may go."""
        if not self.begun:
            self.begun = True
            self.release()

    def release(self) -> None:
        """Nothing is held any more."""
        self._open = True
        self._news.set()

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """ASGI's send."""
        last = self._messages[-1] if self._messages else {}
        if message["type"] == last.get("type") == "http.response.body":
            last["body"] = last.get("body", b"") + message.get("body", b"")
            last["more_body"] = message.get("more_body", False)
        else:
            self._messages.append(dict(message))
        if self._open:
            self._news.set()

    async def take(self) -> list[Message]:
        """What has come since; waits for it. The first time it may be empty: begun."""
        await self._news.wait()
        self._news.clear()
        messages, self._messages = self._messages, []
        return messages


_outbox: ContextVar[Outbox | None] = ContextVar("outbox", default=None)


class ReplicaEngine(RemoteLLMEngine):
    """An engine that tells a request's outbox when it has begun."""

    async def run(self, request: Request) -> AsyncGenerator[StreamEvent, None]:
        outbox = _outbox.get()
        async with contextlib.aclosing(super().run(request)) as events:
            async for event in events:
                if outbox is not None:
                    outbox.begin()
                yield event


class Replica:
    """The deployment: Ray Serve calls its methods on one event loop."""

    async def __init__(self, options: ReplicaOptions) -> None:  # type: ignore[misc]
        from ray import serve

        self._name = serve.get_replica_context().replica_id.unique_id
        self._engine = await asyncio.to_thread(ReplicaEngine, options.config)
        endpoint = options.traces_endpoint
        app = create_app(
            self._engine,
            admission=Admission(options.config.max_num_seqs + options.max_queued),
            efforts=options.efforts,
            timeout=options.timeout,
            tracing=None if endpoint is None else tracing_to(endpoint),
        )
        await self._engine.start()
        self._app = app

    async def check_health(self) -> None:
        """Ray replaces a replica that raises."""
        if not self._engine.healthy:
            raise RuntimeError("the engine is not running")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """For ``scaling``; the name is Ray's."""
        stats = self._engine.stats()
        return {RUNNING: stats.num_running, WAITING: stats.num_waiting}

    async def answer(
        self, scope: Message, body: bytes, way: Trail, avoid: list[str]
    ) -> AsyncGenerator[list[Message], None]:
        """Messages of the answer to one HTTP request. ``way`` and ``avoid`` are the router's.

        Raises ReplicaLostError if the engine has died before it began.
        """
        outbox = Outbox()
        token = _outbox.set(outbox)
        work = asyncio.ensure_future(self._work(scope, body, outbox))
        _outbox.reset(token)
        work.add_done_callback(lambda _: outbox.release())
        loop = asyncio.get_running_loop()
        try:
            done = False
            while not done:
                messages = await outbox.take()
                done = work.done()  # then nothing comes any more
                if done and not outbox.begun and self._engine.failure is not None:
                    raise ReplicaLostError(self._name)
                begin = loop.time()
                yield self._named(messages)
                if not done:
                    await asyncio.sleep(REST * (loop.time() - begin))
            if (error := work.exception()) is not None:
                logger.error("the application failed", exc_info=error)
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    async def _work(self, scope: Message, body: bytes, outbox: Outbox) -> None:
        requests = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if requests:
                return requests.pop()
            await asyncio.Event().wait()  # a client that leaves cancels the call
            raise AssertionError

        await self._app({"type": "http", "asgi": {"version": "3.0"}, **scope}, receive, outbox.send)

    def _named(self, messages: list[Message]) -> list[Message]:
        for message in messages:
            if message["type"] == "http.response.start":
                name = (b"x-replica", self._name.encode())
                message["headers"] = [*message.get("headers", ()), name]
        return messages

    async def metrics(self) -> tuple[str, bytes]:
        """Name and metrics in Prometheus' text format."""
        scope = {"method": "GET", "path": "/metrics", "query_string": b"", "headers": []}
        parts = [message async for taken in self.answer(scope, b"", [], []) for message in taken]
        return self._name, b"".join(part.get("body", b"") for part in parts)

    async def end_thinking(self, name: str) -> bool:
        """Tells a live request to answer now. False if it is not here."""
        return self._engine.end_thinking(name)
