"""What clients reach where there are replicas: checks the key, chooses nothing, knows no model.

A request is read whole and handed to the fleet with its trail; what the replica's application
answers is passed on as it comes. A replica that is lost costs its own requests an error, those that
it had not begun go elsewhere. Health, metrics and end-now concern all replicas and are answered
here. Knows nothing of Ray.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Protocol

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.types import Receive, Scope, Send

from s1engine.server.admission import Admission, NotAdmitted
from s1engine.server.api.response_formatter import DONE, error_object, sse
from s1engine.server.line import ReplicaLostError
from s1engine.server.metrics import PREFIX
from s1engine.server.middleware import REQUEST_ID, ApiKey, BodyLimit, RequestId
from s1engine.server.router.affinity import PrefixHashes, trail
from s1engine.server.streaming import SEND_TIMEOUT_S, unless_disconnected
from s1engine.server.wire import Message

MAX_INSIDE = 2**30  # requests; the replicas refuse what is too much
TRIES = 3  # replicas that a request is offered to: one that kills them must not kill all
LOST = "the replica that answered was lost"
RETRY_AFTER_S = 5  # of a fleet without a replica, seconds
SCOPE = ("method", "path", "raw_path", "query_string", "scheme", "http_version", "server", "client")


class ReplicaPool(Protocol):
    """The replicas."""

    @property
    def up(self) -> int:
        """How many answer."""

    @property
    def wanted(self) -> int:
        """How many there should be."""

    async def start(self) -> None: ...

    async def shutdown(self) -> None: ...

    def answer(
        self, scope: Message, body: bytes, way: PrefixHashes, avoid: Sequence[str]
    ) -> AsyncGenerator[list[Message], None]:
        """``Line.answer`` of one of them. Raises ReplicaLostError."""

    async def metrics(self) -> list[tuple[str, bytes]]:
        """Name and metrics of each, in Prometheus' text format."""

    async def end_thinking(self, name: str) -> bool:
        """Has a replica with this request been told?"""


def create_router(
    fleet: ReplicaPool, admission: Admission, api_keys: Sequence[str] = ()
) -> Starlette:
    """The ASGI application in front of a fleet, which it starts and shuts down."""

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> Any:
        await fleet.start()
        yield
        await fleet.shutdown()

    front = Router(fleet, admission)
    keys = [Middleware(ApiKey, keys=api_keys)] if api_keys else []
    return Starlette(
        lifespan=lifespan,
        routes=[
            Route("/health", front.health),
            Route("/metrics", front.metrics),
            Route("/v1/requests/{name}/end_thinking", front.end_thinking, methods=["POST"]),
            Mount("/", front.forward),
        ],
        middleware=[Middleware(RequestId), *keys, Middleware(BodyLimit)],
    )


class Router:
    """The handlers, over one fleet."""

    def __init__(self, fleet: ReplicaPool, admission: Admission) -> None:
        self._fleet = fleet
        self._admission = admission

    async def health(self, _: Request) -> Response:
        """200 while a replica answers and requests are taken, else 503; how many answer."""
        ready = self._fleet.up > 0 and not self._admission.draining
        body = {"replicas": self._fleet.up, "wanted": self._fleet.wanted}
        return JSONResponse(body, status_code=200 if ready else 503)

    async def metrics(self, _: Request) -> Response:
        """Every replica's metrics, told apart by the label ``replica``."""
        registry = CollectorRegistry()
        registry.register(_Replicas(await self._fleet.metrics(), self._fleet))
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    async def end_thinking(self, http: Request) -> Response:
        """Tells a live request, by the id in its answer, to stop thinking and answer now."""
        name = http.path_params["name"]
        if not await self._fleet.end_thinking(name):
            message = f"there is no live request {name!r}"
            return JSONResponse(error_object(message, "not_found_error", "name"), status_code=404)
        return JSONResponse({"id": name, "object": "request", "ending": True})

    async def forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Any other request: a replica answers it."""
        try:
            body = await Request(scope, receive).body()
            ticket = self._admission.enter("", int(scope["method"] == "POST"), 0)
        except ClientDisconnect:
            return
        except NotAdmitted as refused:
            await _refuse(scope, send, str(refused), refused.code, refused.retry_after)
            return
        try:
            with contextlib.suppress(ClientDisconnect, OSError):  # TimeoutError is an OSError
                await unless_disconnected(receive, self._relay(scope, body, send))
        finally:
            self._admission.leave(ticket)

    async def _relay(self, scope: Scope, body: bytes, send: Send) -> None:
        passed = _Passed(scope, send)
        call = _call(scope)
        way = trail(body)
        avoid: list[str] = []
        for _ in range(TRIES):
            if not self._fleet.up:
                break
            try:
                async with contextlib.aclosing(
                    self._fleet.answer(call, body, way, avoid)
                ) as answer:
                    async for messages in answer:
                        await passed.on(messages)
                break
            except ReplicaLostError as lost:
                if passed.begun:
                    break
                if lost.name is not None:
                    avoid.append(lost.name)
        await passed.finish()


def _call(scope: Scope) -> Message:
    """What a replica is told of a request: its id as a header, its client by number."""
    call = {name: scope[name] for name in SCOPE if name in scope}
    state = scope["state"]
    call["headers"] = [(name, value) for name, value in scope["headers"] if name != REQUEST_ID]
    call["headers"].append((REQUEST_ID, state["request_id"].encode()))
    call["state"] = {name: state[name] for name in ("client",) if name in state}
    return call


class _Passed:
    """What has been passed on to one client."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.begun = False
        self._scope = scope
        self._send = send
        self._started = self._ended = self._streams = False
        self._events = 0

    async def on(self, messages: list[Message]) -> None:
        """Passes on what has come from a replica, which has begun if it is the first."""
        self.begun = True
        for message in messages:
            if message["type"] == "http.response.start":
                self._started = True
                headers = message["headers"]
                self._streams = any(value.startswith(b"text/event-stream") for _, value in headers)
                message["headers"] = [header for header in headers if header[0] != REQUEST_ID]
            else:
                self._ended = not message.get("more_body", False)
                self._events += message.get("body", b"").count(b"\n\n") if self._streams else 0
            async with asyncio.timeout(SEND_TIMEOUT_S):
                await self._send(message)

    async def finish(self) -> None:
        """Says what is the matter if the answer has no end."""
        if self._ended:
            return
        if not self._started:
            if self.begun:
                await _refuse(self._scope, self._send, LOST, "replica_lost", None)
            else:
                message = "no replica could take the request"
                await _refuse(self._scope, self._send, message, "no_replica", RETRY_AFTER_S)
            return
        if not self._streams:
            raise ReplicaLostError  # a body that was cut off must not look whole
        body = _failed(self._scope["path"], self._events)
        await self._send({"type": "http.response.body", "body": body, "more_body": False})


def _failed(path: str, events: int) -> bytes:
    """The end of a stream that cannot go on, in the shape of its API, after so many events."""
    fields = {"message": LOST, "code": "replica_lost"}
    if path == "/v1/messages":
        return sse({"type": "error", "error": {"type": "api_error", **fields}}, "error")
    if path == "/v1/responses":
        return sse({"type": "error", "sequence_number": events, **fields, "param": None}, "error")
    return sse(error_object(LOST, "server_error", code="replica_lost")) + DONE


async def _refuse(
    scope: Scope, send: Send, message: str, code: str, retry_after: int | None
) -> None:
    headers = {} if retry_after is None else {"retry-after": str(retry_after)}
    kind = "server_error" if retry_after is None else "overloaded_error"
    answer = JSONResponse(error_object(message, kind, code=code), 503, headers)
    await answer(scope, _never, send)


async def _never() -> Message:
    raise AssertionError("the request has been read")


class _Replicas(Collector):
    """Metrics of all replicas as one collection."""

    def __init__(self, texts: Sequence[tuple[str, bytes]], fleet: ReplicaPool) -> None:
        self._texts = texts
        self._fleet = fleet

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
        up = GaugeMetricFamily(f"{PREFIX}:replicas", "Replicas that answer.", self._fleet.up)
        return [*families.values(), up]
