"""The router over a fake pool: what passes on, what goes elsewhere, which errors clients get."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import Message

from s1engine.server.admission import Admission
from s1engine.server.router.affinity import PrefixHashes
from s1engine.server.router.proxy import ForwardedRequest, ReplicaLostError
from s1engine.server.router.replica_gate import CLIENT
from s1engine.server.router.router import LIMITS, TRIES, create_router

Play = Callable[[list[str]], AsyncGenerator[Message, None]]

STREAM = [(b"content-type", b"text/event-stream; charset=utf-8")]
PLAIN = [(b"content-type", b"application/json")]
METRICS = b"""# HELP s1engine:x_total How many.
# TYPE s1engine:x_total counter
s1engine:x_total{model_name="m"} %d
"""


def start(headers: Sequence[tuple[bytes, bytes]]) -> Message:
    return {"type": "http.response.start", "status": 200, "headers": list(headers)}


def body(text: bytes, more: bool = False) -> Message:
    return {"type": "http.response.body", "body": text, "more_body": more}


class FakeReplicaPool:
    """Two replicas; the next of ``plays`` answers each request; ``calls`` records them."""

    def __init__(self, *plays: Play) -> None:
        self.up = self.wanted = 2
        self.calls: list[tuple[ForwardedRequest, list[str]]] = []
        self.closed = 0
        self._plays = list(plays)

    async def start(self) -> None: ...

    async def shutdown(self) -> None: ...

    async def forward(
        self, request: ForwardedRequest, hashes: PrefixHashes, avoid: Sequence[str]
    ) -> AsyncGenerator[Message, None]:
        self.calls.append((request, list(avoid)))
        try:
            async for message in self._plays.pop(0)(list(avoid)):
                yield message
        finally:
            self.closed += 1

    async def metrics(self) -> list[tuple[str, bytes]]:
        return [("a", METRICS % 3), ("b", METRICS % 4)]

    async def end_thinking(self, name: str) -> bool:
        return name == "live"


async def whole(_: list[str]) -> AsyncGenerator[Message, None]:
    yield start(PLAIN)
    yield body(b'{"fine":true}')


async def lost(_: list[str]) -> AsyncGenerator[Message, None]:
    raise ReplicaLostError("a")
    yield start(PLAIN)


async def lost_begun(_: list[str]) -> AsyncGenerator[Message, None]:
    yield start(PLAIN)
    raise ReplicaLostError


async def lost_in_a_stream(_: list[str]) -> AsyncGenerator[Message, None]:
    yield start(STREAM)
    yield body(b"data: 1\n\ndata: 2\n\n", more=True)
    raise ReplicaLostError


async def lost_in_a_file(_: list[str]) -> AsyncGenerator[Message, None]:
    yield start(PLAIN)
    yield body(b"{", more=True)
    raise ReplicaLostError


def ask(
    pool: FakeReplicaPool, path: str = "/v1/completions", method: str = "POST", **options: Any
) -> httpx.Response:
    """One request to a router over the pool."""
    admission = options.pop("admission", Admission(LIMITS))
    router = create_router(pool, admission, options.pop("keys", ()))

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(router)
        async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
            return await client.request(method, path, **options)

    answer = asyncio.run(send())
    assert admission.num_in_flight == 0 and pool.closed == len(pool.calls)
    return answer


def test_a_request_reaches_a_replica_whole() -> None:
    pool = FakeReplicaPool(whole)
    answer = ask(
        pool, "/v1/models?x=1", json={"a": 1}, headers={"x-request-id": "mine"}, keys=["k", "l"]
    )
    assert answer.status_code == 401 and not pool.calls
    headers = {"x-request-id": "mine", "authorization": "Bearer l"}
    answer = ask(pool, "/v1/models?x=1", json={"a": 1}, headers=headers, keys=["k", "l"])
    assert answer.json() == {"fine": True} and answer.headers["x-request-id"] == "mine"
    ((request, _),) = pool.calls
    assert json.loads(request.body) == {"a": 1}
    assert (request.method, request.target) == ("POST", "/v1/models?x=1")
    assert [v for k, v in request.headers if k == CLIENT] == [b"1"]
    assert [v for k, v in request.headers if k == b"x-request-id"] == [b"mine"]


def test_a_request_that_has_not_begun_goes_to_another_replica() -> None:
    pool = FakeReplicaPool(lost, whole)
    assert ask(pool).json() == {"fine": True}
    assert [avoid for _, avoid in pool.calls] == [[], ["a"]]


def test_a_request_that_loses_every_replica_is_tried_a_few_times() -> None:
    pool = FakeReplicaPool(*[lost] * 9)
    answer = ask(pool)
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "no_replica"
    assert int(answer.headers["retry-after"]) > 0 and len(pool.calls) == TRIES


def test_a_begun_request_is_not_sent_twice() -> None:
    pool = FakeReplicaPool(lost_begun, whole)
    answer = ask(pool)
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "replica_lost"
    assert len(pool.calls) == 1


@pytest.mark.parametrize(
    ("path", "end"),
    [
        ("/v1/chat/completions", [{"error": {"code": "replica_lost"}}, "[DONE]"]),
        ("/v1/completions", [{"error": {"code": "replica_lost"}}, "[DONE]"]),
        ("/v1/messages", [{"type": "error", "error": {"code": "replica_lost"}}]),
        ("/v1/responses", [{"type": "error", "code": "replica_lost", "sequence_number": 2}]),
    ],
)
def test_a_broken_stream_ends_as_its_api_says(path: str, end: list[Any]) -> None:
    answer = ask(FakeReplicaPool(lost_in_a_stream), path)
    assert len(answer.headers.get_list("x-request-id")) == 1
    lines = [line for line in answer.text.splitlines() if line.startswith("data: ")]
    found = [json.loads(x) if x[0] == "{" else x for x in (line[6:] for line in lines[2:])]
    assert [_like(one, other) for one, other in zip(found, end, strict=True)] == [True] * len(end)


def _like(found: Any, wanted: Any) -> bool:
    """Does ``found`` contain everything in ``wanted``?"""
    if isinstance(wanted, dict):
        return all(_like(found[key], value) for key, value in wanted.items())
    return bool(found == wanted)


def test_a_body_that_was_cut_off_does_not_look_whole() -> None:
    with pytest.raises(ReplicaLostError):
        ask(FakeReplicaPool(lost_in_a_file))


def test_a_client_that_leaves_ends_the_call() -> None:
    async def waiting(_: list[str]) -> AsyncGenerator[Message, None]:
        yield start(STREAM)
        yield body(b"data: 1\n\n", more=True)
        await asyncio.Event().wait()

    pool = FakeReplicaPool(waiting)
    admission = Admission(LIMITS)
    router = create_router(pool, admission)
    sent: list[Message] = []

    async def leave_after_one() -> None:
        left = asyncio.Event()
        requests = [{"type": "http.request", "body": b"{}", "more_body": False}]

        async def receive() -> Message:
            if requests:
                return requests.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)
            if message["type"] == "http.response.body":
                left.set()

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        await router({**scope, "query_string": b""}, receive, send)

    asyncio.run(asyncio.wait_for(leave_after_one(), 10))
    assert pool.closed == 1 and admission.num_in_flight == 0 and len(sent) == 2


def test_a_draining_router_rejects_requests() -> None:
    admission = Admission(LIMITS)
    admission.draining = True
    answer = ask(FakeReplicaPool(whole), admission=admission)
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "shutting_down"
    assert ask(FakeReplicaPool(), "/health", "GET", admission=admission).status_code == 503


def test_health_says_how_many_are_up() -> None:
    pool = FakeReplicaPool()
    pool.up = 1
    answer = ask(pool, "/health", "GET")
    assert answer.status_code == 200 and answer.json() == {"replicas": 1, "wanted": 2}
    pool.up = 0
    assert ask(pool, "/health", "GET").status_code == 503
    answer = ask(pool)
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "no_replica"


def test_ending_the_thinking_asks_the_replicas() -> None:
    assert ask(FakeReplicaPool(), "/v1/requests/live/end_thinking").json()["ending"]
    gone = ask(FakeReplicaPool(), "/v1/requests/gone/end_thinking")
    assert gone.status_code == 404 and gone.json()["error"]["param"] == "name"


def test_metrics_of_all_replicas_are_one_collection() -> None:
    text = ask(FakeReplicaPool(), "/metrics", "GET").text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    values = {s.labels["replica"]: s.value for s in families["s1engine:x"].samples}
    assert values == {"a": 3, "b": 4}
    assert families["s1engine:replicas"].samples[0].value == 2
    assert text.count("# TYPE s1engine:x_total counter") == 1
