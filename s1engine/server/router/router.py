"""The router: what clients reach where there are replicas. A streaming reverse proxy.

It checks the API key, reads a request whole and sends it to the replica that the pool chooses by
the hashes of its prefixes. The response passes on as it comes. A lost replica costs the requests it
had begun an error; the others go to another replica. Health, metrics and end-thinking concern all
replicas and are answered here. Knows neither models nor Ray.
"""

import contextlib
import logging
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Protocol

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.types import Message, Receive, Scope, Send

from s1engine.server.admission import Admission, ClientLimits, NotAdmitted
from s1engine.server.anthropic_errors import AnthropicErrors
from s1engine.server.api.response_formatter import DONE, error_object, sse
from s1engine.server.buffer_budget import MAX_BUFFERED_BYTES, BufferBudget
from s1engine.server.metrics import PREFIX
from s1engine.server.middleware import (
    MAX_BODY_BYTES,
    ApiKey,
    BodyLimit,
    RequestId,
    cors_options,
)
from s1engine.server.router.affinity import PrefixHashes, prefix_hashes
from s1engine.server.router.proxy import ForwardedRequest, ReplicaLostError, forwarded_request
from s1engine.server.streaming import unless_disconnected

LIMITS = ClientLimits(max_in_flight=2**30)  # requests; the replicas refuse what is too much
TRIES = 3  # replicas that a request is sent to: one that kills them must not kill all
LOST = "the replica that answered was lost"
RETRY_AFTER_S = 5  # seconds, while there is no replica

logger = logging.getLogger(__name__)


class ReplicaPool(Protocol):
    """The replicas."""

    @property
    def up(self) -> int:
        """How many take requests."""

    @property
    def wanted(self) -> int:
        """How many there should be."""

    async def start(self) -> None: ...

    async def shutdown(self) -> None: ...

    def forward(
        self, request: ForwardedRequest, hashes: PrefixHashes, avoid: Sequence[str]
    ) -> AsyncGenerator[Message, None]:
        """Yield the ASGI messages of one replica's response. Raises ReplicaLostError."""

    async def metrics(self) -> list[tuple[str, bytes]]:
        """Return name and metrics of each replica, in Prometheus' text format."""

    async def end_thinking(self, request_id: str) -> bool:
        """End the thinking of a request; False if no replica runs it."""


def create_router(
    pool: ReplicaPool,
    admission: Admission,
    api_keys: Sequence[str] = (),
    max_body_bytes: int = MAX_BODY_BYTES,
    max_buffered_bytes: int = MAX_BUFFERED_BYTES,
    allowed_origins: Sequence[str] = (),
) -> Starlette:
    """Return the ASGI application in front of a pool, which it starts and shuts down."""

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> Any:
        await pool.start()
        yield
        await pool.shutdown()

    router = Router(pool, admission)
    budget = BufferBudget(max_buffered_bytes)
    limit = Middleware(BodyLimit, budget=budget, max_bytes=max_body_bytes)
    keys = [Middleware(ApiKey, keys=api_keys)] if api_keys else []
    origins = [Middleware(CORSMiddleware, **cors_options(allowed_origins))]
    first = [*(origins if allowed_origins else ()), Middleware(RequestId)]
    return Starlette(
        lifespan=lifespan,
        routes=[
            Route("/health", router.health),
            Route("/metrics", router.metrics),
            Route("/v1/requests/{name}/end_thinking", router.end_thinking, methods=["POST"]),
            Mount("/", router.forward),
        ],
        middleware=[*first, Middleware(AnthropicErrors), *keys, limit],
    )


class Router:
    """The handlers, over one pool."""

    def __init__(self, pool: ReplicaPool, admission: Admission) -> None:
        self._pool = pool
        self._admission = admission

    async def health(self, _: Request) -> Response:
        """200 while a replica takes requests and the server does not drain, else 503."""
        ready = self._pool.up > 0 and not self._admission.draining
        body = {"replicas": self._pool.up, "wanted": self._pool.wanted}
        return JSONResponse(body, status_code=200 if ready else 503)

    async def metrics(self, _: Request) -> Response:
        """Every replica's metrics, with the label ``replica``."""
        registry = CollectorRegistry()
        registry.register(_MergedMetrics(await self._pool.metrics(), self._pool.up))
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    async def end_thinking(self, http: Request) -> Response:
        """Make a live request, named by the id in its response, stop thinking and answer now."""
        name = http.path_params["name"]
        if not await self._pool.end_thinking(name):
            message = f"there is no live request {name!r}"
            return JSONResponse(error_object(message, "not_found_error", "name"), status_code=404)
        return JSONResponse({"id": name, "object": "request", "ending": True})

    async def forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send any other request to a replica."""
        try:
            body = await Request(scope, receive).body()
            ticket = self._admission.admit("", int(scope["method"] == "POST"))
        except ClientDisconnect:
            return
        except NotAdmitted as refused:
            await _refuse(scope, send, str(refused), refused.code, refused.retry_after)
            return
        try:
            with contextlib.suppress(ClientDisconnect):
                await unless_disconnected(receive, self._relay(scope, body, send))
        finally:
            self._admission.release(ticket)

    async def _relay(self, scope: Scope, body: bytes, send: Send) -> None:
        response = _RelayedResponse(scope, send)
        request = forwarded_request(scope, body)
        hashes = prefix_hashes(body)
        avoid: list[str] = []
        for _ in range(TRIES):
            if not self._pool.up:
                break
            try:
                async with contextlib.aclosing(
                    self._pool.forward(request, hashes, avoid)
                ) as messages:
                    async for message in messages:
                        await response.relay(message)
                break
            except ReplicaLostError as lost:
                logger.debug("request %s: %s", request.request_id, lost)
                if response.begun:
                    break
                if lost.name is not None:
                    avoid.append(lost.name)
        await response.finish()


class _RelayedResponse:
    """The response to one client, as far as it has come."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.begun = False  # a replica has begun to answer
        self._scope = scope
        self._send = send
        self._start: Message | None = None  # held until the body begins
        self._started = self._ended = self._streams = False
        self._events = 0

    async def relay(self, message: Message) -> None:
        """Send what came from a replica."""
        self.begun = True
        if message["type"] == "http.response.start":
            headers = message["headers"]
            self._streams = any(value.startswith(b"text/event-stream") for _, value in headers)
            self._start = message
            return
        if self._start is not None:
            await self._send(self._start)
            self._start, self._started = None, True
        await self._send(message)
        self._ended = not message["more_body"]
        if self._streams:
            self._events += message["body"].count(b"\n\n")

    async def finish(self) -> None:
        """Send an error if the response has not ended."""
        if self._ended:
            return
        if self._started:
            if not self._streams:
                raise ReplicaLostError  # closes the connection: a cut body must not look complete
            body = _error_events(self._scope["path"], self._events)
            await self._send({"type": "http.response.body", "body": body, "more_body": False})
        elif self.begun:
            await _refuse(self._scope, self._send, LOST, "replica_lost", None)
        else:
            message = "no replica could take the request"
            await _refuse(self._scope, self._send, message, "no_replica", RETRY_AFTER_S)


def _error_events(path: str, num_events: int) -> bytes:
    """The end of a stream that was cut after ``num_events``, in the shape of its API."""
    fields = {"message": LOST, "code": "replica_lost"}
    if path == "/v1/messages":
        return sse({"type": "error", "error": {"type": "api_error", **fields}}, "error")
    if path == "/v1/responses":
        event = {"type": "error", "sequence_number": num_events, **fields, "param": None}
        return sse(event, "error")
    return sse(error_object(LOST, "server_error", code="replica_lost")) + DONE


async def _refuse(
    scope: Scope, send: Send, message: str, code: str, retry_after: int | None
) -> None:
    headers = {} if retry_after is None else {"retry-after": str(retry_after)}
    kind = "server_error" if retry_after is None else "overloaded_error"
    response = JSONResponse(error_object(message, kind, code=code), 503, headers)
    await response(scope, _receive_nothing, send)


async def _receive_nothing() -> Message:
    raise AssertionError("the request has been read")


class _MergedMetrics(Collector):
    """Metrics of all replicas as one collection."""

    def __init__(self, texts: Sequence[tuple[str, bytes]], num_replicas: int) -> None:
        self._texts = texts
        self._num_replicas = num_replicas

    def collect(self) -> Sequence[Metric]:
        families: dict[str, Metric] = {}
        for replica, text in self._texts:
            for family in text_string_to_metric_families(text.decode()):
                merged = families.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                for sample in family.samples:
                    labels = {**sample.labels, "replica": replica}
                    merged.add_sample(sample.name, labels, sample.value)
        up = GaugeMetricFamily(f"{PREFIX}:replicas", "Replicas that answer.", self._num_replicas)
        return [*families.values(), up]
