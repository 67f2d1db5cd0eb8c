"""One key floods the server in every way; another is admitted, and answered, at once."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import pytest

from tests.hostile.conftest import Target

PATH = "/v1/completions"
LONG = {"prompt": "a=1 b=2 c=3 ", "max_tokens": 3000, "ignore_eos": True}
MAX_ANSWER_S = 2.0  # on a machine that has other work; behind the flood it takes twice as long
PAUSE_S = 0.2  # of a flooder: the test itself needs a processor

Flood = Callable[[Target, threading.Event], None]


def repeat(body: dict[str, Any]) -> Flood:
    """Send this body all the time, and leave before most answers come."""

    def flood(target: Target, ended: threading.Event) -> None:
        headers = dict(target.http.headers)
        with httpx.Client(base_url=target.url, headers=headers, timeout=5) as http:
            while not ended.wait(PAUSE_S):
                with suppress(httpx.TimeoutException):
                    assert http.post(PATH, json=body).status_code in (200, 400, 429)

    return flood


def read_nothing(target: Target, ended: threading.Event) -> None:
    """Open a stream and keep it, unread."""
    body = json.dumps({**LONG, "n": 4, "stream": True}).encode()
    url = httpx.URL(target.url)
    head = f"POST {PATH} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer one\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((url.host, url.port or 0)) as connection:
        connection.sendall(head.encode() + body)
        ended.wait()


FLOODS: dict[str, Flood] = {
    "many small": repeat({"prompt": "a=1", "max_tokens": 2}),
    "large n": repeat({**LONG, "n": 30}),
    "long prompts": repeat({"prompt": "a=1 b=2 " * 220, "max_tokens": 1}),
    "many prompts": repeat({**LONG, "prompt": ["a", "b"] * 12}),
    "too large": repeat({**LONG, "n": 128}),
    "unread": read_nothing,
}


@contextmanager
def flooded(target: Target) -> Iterator[None]:
    """Within it, the client of ``target`` floods the server in all ways at once."""
    ended = threading.Event()
    threads = [threading.Thread(target=flood, args=(target, ended)) for flood in FLOODS.values()]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def send(http: httpx.Client, body: dict[str, Any], key: str) -> httpx.Response:
    return http.post(PATH, json=body, headers={"Authorization": f"Bearer {key}"})


def gauges(target: Target, name: str) -> list[float]:
    """Values of a metric."""
    lines = target.http.get("/metrics").text.splitlines()
    return [float(line.split()[-1]) for line in lines if line.startswith(f"s1engine:{name}")]


def test_a_key_is_answered_while_another_floods(shared: Target) -> None:
    """Its requests are admitted, and have their first token, without waiting for the flood's."""
    answers = 0

    def ask(http: httpx.Client) -> None:
        nonlocal answers
        assert send(http, {"prompt": "b=2", "max_tokens": 1}, "two").status_code == 200
        answers += 1

    with flooded(shared):
        while sum(gauges(shared, "key_sequences")) < 28:  # the queue is as full as one key may
            pass
        with shared.watched(ask, MAX_ANSWER_S):
            while answers < 8:
                assert send(shared.http, {"prompt": "a=1", "n": 40}, "two").status_code == 400
        assert send(shared.http, {"prompt": "b=2", "max_tokens": 8, "n": 4}, "two").is_success
        refusals = shared.http.get("/metrics").text
    assert 'code="key_queue_full"' in refusals and 'code="too_many_sequences"' in refusals
    while gauges(shared, "key_sequences"):  # all that the flood left is undone
        pass


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"n": 33}, "n"),
        ({"prompt": ["a"] * 33}, "prompt"),
        ({"prompt": ["a"] * 3, "n": 11}, "n"),
        ({"thinking_checkpoints": [*range(1, 34)]}, "thinking_checkpoints"),
        ({"n": 10**15}, "n"),
    ],
)
def test_a_request_has_a_bounded_number_of_sequences(
    shared: Target, more: dict[str, Any], param: str
) -> None:
    """With several keys one request may have half of the queue."""
    answer = shared.http.post(PATH, json={"prompt": "a", "max_tokens": 1, **more})
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert (error["param"], error["code"]) == (param, "too_many_sequences")


@pytest.mark.parametrize(
    ("key", "priority", "status"),
    [("one", -1, 403), ("one", 0, 200), ("one", 3, 200), ("first", -1, 200), ("first", 3, 200)],
)
def test_priority_before_others_needs_a_key_that_may(
    shared: Target, key: str, priority: int, status: int
) -> None:
    body = {"prompt": "a", "max_tokens": 1, "priority": priority}
    answer = send(shared.http, body, key)
    assert answer.status_code == status
    if status != 200:
        assert answer.json()["error"]["param"] == "priority"
