"""What clients may fill together: bodies, log-probabilities and answers that are not read."""

import itertools
import json
import select
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s1engine.server.admission import NotAdmitted
from s1engine.server.body_route import LARGE_BODY_BYTES
from s1engine.server.buffer_budget import BufferBudget, BufferLease
from s1engine.server.json_pieces import PIECE_BYTES, LazyList, json_pieces
from s1engine.server.logprob_limit import MAX_LOGPROBS_OF_REQUEST
from tests.hostile.conftest import Target

SCALARS = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=20,
)


@settings(max_examples=25)
@given(value=VALUES, items=st.lists(VALUES, max_size=4), long=st.booleans())
def test_pieces_join_to_the_value(value: Any, items: list[Any], long: bool) -> None:
    """Also of lists that are made while they are sent."""
    whole = {"a": value, "b": [{"c": items}], "d": items, "e": "x" * (2 * PIECE_BYTES * long)}
    lazy = {**whole, "b": [{"c": LazyList(iter(items))}], "d": LazyList(iter(items))}
    pieces = [*json_pieces(lazy)]
    assert json.loads(b"".join(pieces)) == whole
    assert all(len(piece) == PIECE_BYTES for piece in pieces[:-1])


def test_a_large_list_is_not_made_at_once() -> None:
    made = itertools.count()
    pieces = json_pieces({"a": LazyList({"b": next(made)} for _ in range(10**5))})
    next(pieces)
    assert next(made) < PIECE_BYTES


@given(sizes=st.lists(st.integers(0, 60), max_size=20), ends=st.lists(st.booleans(), max_size=20))
def test_a_budget_is_never_exceeded_nor_lost(sizes: list[int], ends: list[bool]) -> None:
    budget = BufferBudget(100)
    leases: dict[BufferLease, int] = {}
    for size, ended in itertools.zip_longest(sizes, ends[: len(sizes)], fillvalue=False):
        lease = BufferLease(budget)
        fits = sum(leases.values()) + size <= 100
        try:
            lease.reserve(size)
        except NotAdmitted as refused:
            assert not fits and refused.status == 503
        else:
            assert fits
            leases[lease] = size
        if ended and leases:
            leases.popitem()[0].release()
        assert budget.used == sum(leases.values())
    for lease in leases:
        lease.release()
        lease.release()
    assert budget.used == 0


# --- a server ---

HEAD = (
    "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    "Authorization: Bearer {key}\r\nContent-Length: {length}\r\n\r\n"
)
BEGIN = b'{"prompt":"'
LOGPROBS: dict[str, Any] = {
    "prompt": "a=1",
    "max_tokens": 200,
    "logprobs": 20,
    "n": 4,
    "ignore_eos": True,
}


def begin_body(target: Target, part: bytes, length: int) -> socket.socket:
    """A connection with a body that has begun; it sends what the server takes."""
    url = httpx.URL(target.url)
    connection = socket.create_connection((url.host, url.port), 60)
    key = target.http.headers["Authorization"].split()[1]
    connection.sendall(HEAD.format(key=key, length=length).encode() + part)
    return connection


def buffered(target: Target) -> float:
    lines = target.http.get("/metrics").text.splitlines()
    line = next(line for line in lines if line.startswith("s1engine:buffered_bytes{"))
    return float(line.split()[-1])


@pytest.fixture
def filled(target: Target) -> Iterator[None]:
    """Bodies that never end hold the budget: the first that does not fit is refused. They come one
    after another, since bodies that grow together refuse each other and leave room."""
    part = BEGIN + b"a" * (3 * 2**20)
    held: list[socket.socket] = []
    try:
        while not held or not refused_or_held(target, held[-1], len(held) * len(part)):
            held.append(begin_body(target, part, 4 * 2**20))
            assert len(held) < 64, "the budget does not fill"
        yield
    finally:
        for connection in held:
            connection.close()


def refused_or_held(target: Target, connection: socket.socket, size: int) -> bool:
    """Waits for the answer to an unfinished body (True), or until ``size`` bytes are held."""
    while buffered(target) < size:
        if select.select([connection], [], [], 0)[0]:
            return True
    return False


def test_unfinished_bodies_are_bounded_together(target: Target, filled: None) -> None:
    """Beyond the budget 503, while the canary is answered."""
    with target.watched():
        body = BEGIN + b"a" * (3 * 2**20) + b'"}'  # as large as those that have filled the budget
        refused = target.http.post("/v1/completions", content=body)
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "buffers_full"
    assert int(refused.headers["retry-after"]) > 0


def test_the_budget_is_empty_when_all_clients_are_gone(target: Target) -> None:
    for _ in range(1000):
        if buffered(target) == 0:
            return
    raise AssertionError(f"{buffered(target)} bytes are held for no client")


def test_many_log_probabilities_are_refused_by_name(target: Target) -> None:
    body = {"prompt": ["a=1"] * 8, "max_tokens": 2000, "logprobs": 20, "n": 128}
    answer = target.http.post("/v1/completions", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "logprobs"
    assert str(MAX_LOGPROBS_OF_REQUEST) in answer.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_a_large_answer_delays_no_one(target: Target, chat: bool, stream: bool) -> None:
    body = {**LOGPROBS, "stream": stream}
    if chat:
        body |= {"messages": [{"role": "user", "content": body.pop("prompt")}]}
        body |= {"logprobs": True, "top_logprobs": 20}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    with target.watched():
        answer = target.http.post(path, json=body)
    assert answer.status_code == 200 and len(answer.content) > 4 * PIECE_BYTES
    if not stream:
        choices = answer.json()["choices"]
        for choice in choices:
            own = choice["logprobs"]
            thinking = own.get("reasoning", [] if chat else {"tokens": []})
            rows = [own["content"], thinking] if chat else [own["tokens"], thinking["tokens"]]
            assert sum(map(len, rows)) == LOGPROBS["max_tokens"]
        assert len(choices) == LOGPROBS["n"]


def test_a_large_body_gets_the_answer_of_a_small_one(target: Target) -> None:
    small = {"prompt": "a=1 a?", "max_tokens": 4, "temperature": 0}
    large = {**small, "metadata": {"a": "b" * LARGE_BODY_BYTES}}
    texts = [
        target.http.post("/v1/completions", json=body).json()["choices"][0]["text"]
        for body in (small, large)
    ]
    assert texts[0] == texts[1]
    cut = json.dumps(large)[:-1].encode()
    answer = target.http.post("/v1/completions", content=cut)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "body"
