"""The front over a fleet that is only played: what goes on, what goes elsewhere, what is said."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from s1engine.server.admission import Admission
from s1engine.server.line import ReplicaLostError
from s1engine.server.router.affinity import PrefixHashes
from s1engine.server.router.router import MAX_INSIDE, TRIES, create_router
from s1engine.server.wire import Message

Play = Callable[[list[str]], AsyncGenerator[list[Message], None]]

STREAM = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-request-id", b"theirs")]
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
    """Two replicas; each call is played by the next of ``plays``, and kept."""

    def __init__(self, *plays: Play) -> None:
        self.up = self.wanted = 2
        self.calls: list[tuple[Message, bytes, list[str]]] = []
        self.closed = 0
        self._plays = list(plays)

    async def start(self) -> None: ...

    async def shutdown(self) -> None: ...

    async def answer(
        self, scope: Message, body: bytes, way: PrefixHashes, avoid: Sequence[str]
    ) -> AsyncGenerator[list[Message], None]:
        self.calls.append((scope, body, list(avoid)))
        try:
            async for messages in self._plays.pop(0)(list(avoid)):
                yield messages
        finally:
            self.closed += 1

    async def metrics(self) -> list[tuple[str, bytes]]:
        return [("a", METRICS % 3), ("b", METRICS % 4)]

    async def end_thinking(self, name: str) -> bool:
        return name == "live"


async def whole(_: list[str]) -> AsyncGenerator[list[Message], None]:
    yield []
    yield [start(PLAIN), body(b'{"fine":true}')]


async def lost(_: list[str]) -> AsyncGenerator[list[Message], None]:
    raise ReplicaLostError("a")
    yield []


async def lost_begun(_: list[str]) -> AsyncGenerator[list[Message], None]:
    yield []
    raise ReplicaLostError


async def lost_in_a_stream(_: list[str]) -> AsyncGenerator[list[Message], None]:
    yield [start(STREAM), body(b"data: 1\n\ndata: 2\n\n", more=True)]
    raise ReplicaLostError


async def lost_in_a_file(_: list[str]) -> AsyncGenerator[list[Message], None]:
    yield [start(PLAIN), body(b"{", more=True)]
    raise ReplicaLostError


def ask(
    fleet: FakeReplicaPool, path: str = "/v1/completions", method: str = "POST", **options: Any
) -> httpx.Response:
    """One request to a front over the fleet."""
    admission = options.pop("admission", Admission(MAX_INSIDE))
    front = create_router(fleet, admission, options.pop("keys", ()))

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(front)
        async with httpx.AsyncClient(transport=transport, base_url="http://front") as client:
            return await client.request(method, path, **options)

    answer = asyncio.run(send())
    assert admission.inside == 0 and fleet.closed == len(fleet.calls)
    return answer


def test_a_request_reaches_a_replica_whole() -> None:
    fleet = FakeReplicaPool(whole)
    answer = ask(
        fleet, "/v1/models?x=1", json={"a": 1}, headers={"x-request-id": "mine"}, keys=["k", "l"]
    )
    assert answer.status_code == 401 and not fleet.calls
    headers = {"x-request-id": "mine", "authorization": "Bearer l"}
    answer = ask(fleet, "/v1/models?x=1", json={"a": 1}, headers=headers, keys=["k", "l"])
    assert answer.json() == {"fine": True} and answer.headers["x-request-id"] == "mine"
    ((scope, sent, _),) = fleet.calls
    assert json.loads(sent) == {"a": 1}
    assert (scope["method"], scope["path"], scope["query_string"]) == ("POST", "/v1/models", b"x=1")
    assert scope["state"] == {"client": "1"}
    assert [v for k, v in scope["headers"] if k == b"x-request-id"] == [b"mine"]


def test_what_was_not_begun_goes_elsewhere() -> None:
    fleet = FakeReplicaPool(lost, whole)
    assert ask(fleet).json() == {"fine": True}
    assert [avoid for _, _, avoid in fleet.calls] == [[], ["a"]]


def test_a_request_that_loses_every_replica_is_not_offered_for_ever() -> None:
    fleet = FakeReplicaPool(*[lost] * 9)
    answer = ask(fleet)
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "no_replica"
    assert int(answer.headers["retry-after"]) > 0 and len(fleet.calls) == TRIES


def test_what_was_begun_is_not_asked_twice() -> None:
    fleet = FakeReplicaPool(lost_begun, whole)
    answer = ask(fleet)
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "replica_lost"
    assert len(fleet.calls) == 1


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
    """Has it all that is wanted of it?"""
    if isinstance(wanted, dict):
        return all(_like(found[key], value) for key, value in wanted.items())
    return bool(found == wanted)


def test_a_body_that_was_cut_off_does_not_look_whole() -> None:
    with pytest.raises(ReplicaLostError):
        ask(FakeReplicaPool(lost_in_a_file))


def test_a_client_that_leaves_ends_the_call() -> None:
    async def waiting(_: list[str]) -> AsyncGenerator[list[Message], None]:
        yield [start(STREAM), body(b"data: 1\n\n", more=True)]
        await asyncio.Event().wait()

    fleet = FakeReplicaPool(waiting)
    admission = Admission(MAX_INSIDE)
    front = create_router(fleet, admission)
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
        await front({**scope, "query_string": b""}, receive, send)

    asyncio.run(asyncio.wait_for(leave_after_one(), 10))
    assert fleet.closed == 1 and admission.inside == 0 and len(sent) == 2


def test_nobody_comes_in_on_the_way_out() -> None:
    admission = Admission(MAX_INSIDE)
    admission.draining = True
    answer = ask(FakeReplicaPool(whole), admission=admission)
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "shutting_down"
    assert ask(FakeReplicaPool(), "/health", "GET", admission=admission).status_code == 503


def test_health_says_how_many_are_up() -> None:
    fleet = FakeReplicaPool()
    fleet.up = 1
    answer = ask(fleet, "/health", "GET")
    assert answer.status_code == 200 and answer.json() == {"replicas": 1, "wanted": 2}
    fleet.up = 0
    assert ask(fleet, "/health", "GET").status_code == 503
    answer = ask(fleet)
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "no_replica"


def test_end_now_asks_the_replicas() -> None:
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
