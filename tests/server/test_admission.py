"""Admission: never more samples than the limit, and clients share the engine fairly."""

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s1engine.server.admission import Admission, NotAdmitted, Ticket
from s1engine.server.middleware import ApiKey


@given(st.integers(1, 20), st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6), st.booleans())))
def test_samples_never_exceed_the_limit(limit: int, moves: list[tuple[int, int, bool]]) -> None:
    admission = Admission(limit)
    admitted: list[Ticket] = []
    for client, samples, leaves in moves:
        if leaves and admitted:
            ticket = admitted.pop(samples % len(admitted))
            ticket.used = samples
            admission.release(ticket)
            admission.release(ticket)  # a second time changes nothing
            continue
        try:
            admitted.append(admission.admit(str(client), samples, prompt_tokens=10))
        except NotAdmitted as refused:
            assert refused.status == 429 and refused.retry_after > 0
            assert admitted and sum(t.samples for t in admitted) + samples > limit
        assert admission.num_samples == sum(t.samples for t in admitted)
        assert admission.num_samples <= limit or len(admitted) == 1
    for ticket in admitted:
        admission.release(ticket)
    assert admission.num_samples == 0 and not admission._clocks and not admission._num_tickets


@given(st.lists(st.integers(1, 50), min_size=2, max_size=4))
def test_backlogged_clients_get_equal_shares(backlogs: list[int]) -> None:
    """A client is never ahead of a waiting one by more than one request."""
    admission = Admission(10**6)
    tickets = [admission.admit(str(c), 1, 100) for c, n in enumerate(backlogs) for _ in range(n)]
    served = [0] * len(backlogs)
    for ticket in sorted(tickets, key=lambda t: t.start):
        admission.record_start(ticket)
        client = int(ticket.client)
        waiting = [served[c] for c, n in enumerate(backlogs) if served[c] < n]
        assert served[client] <= min(waiting)
        served[client] += 1


def test_a_newcomer_does_not_wait_for_another_clients_backlog() -> None:
    admission = Admission(1000)
    backlog = [admission.admit("greedy", 1, 1000) for _ in range(100)]
    admission.record_start(backlog[3])
    newcomer = admission.admit("modest", 1, 1000)
    assert backlog[3].start <= newcomer.start < backlog[5].start


def test_a_client_pays_for_what_it_used() -> None:
    admission = Admission(1000)
    long, short = admission.admit("long", 1, 10), admission.admit("short", 1, 10)
    held = [admission.admit("long", 1, 10), admission.admit("short", 1, 10)]
    long.used, short.used = 5000, 20
    admission.release(long)
    admission.release(short)
    assert admission.admit("short", 1, 10).start < admission.admit("long", 1, 10).start
    assert held[0].start == held[1].start


def test_draining_rejects_new_requests_and_waits_for_running_ones() -> None:
    async def main() -> None:
        admission = Admission(10)
        assert await admission.drain(5)
        admission = Admission(10)
        ticket = admission.admit("a", 1, 1)
        draining = asyncio.create_task(admission.drain(60))
        await asyncio.sleep(0)
        with pytest.raises(NotAdmitted) as refused:
            admission.admit("b", 1, 1)
        assert refused.value.status == 503 and not draining.done()
        admission.release(ticket)
        assert await draining

    asyncio.run(main())


def test_draining_ends_after_its_timeout() -> None:
    async def main() -> None:
        admission = Admission(10)
        admission.admit("a", 1, 1)
        assert not await admission.drain(0.01)

    asyncio.run(main())


@pytest.mark.parametrize("header", [b"authorization", b"x-api-key"])
@pytest.mark.parametrize(("key", "client"), [("one", "0"), ("two", "1"), ("", None), ("on", None)])
def test_a_key_identifies_its_client(header: bytes, key: str, client: str | None) -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["state"]["client"])

    async def send(message: Any) -> None:
        seen.append(message.get("status"))

    async def main() -> None:
        value = (b"Bearer " if header == b"authorization" else b"") + key.encode()
        scope = {"type": "http", "path": "/v1/models", "headers": [(header, value)]}
        await ApiKey(app, ["one", "two"])(scope, send, send)  # type: ignore[arg-type]

    asyncio.run(main())
    assert seen[0] == (client if client is not None else 401)
