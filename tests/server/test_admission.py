"""The door: never more inside than there are places, and clients share what the engine gives."""

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s1engine.server.admission import Admission, NotAdmitted, Ticket
from s1engine.server.middleware import ApiKey


@given(st.integers(1, 20), st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6), st.booleans())))
def test_there_are_never_more_inside_than_places(
    places: int, moves: list[tuple[int, int, bool]]
) -> None:
    door = Admission(places)
    inside: list[Ticket] = []
    for client, samples, leaves in moves:
        if leaves and inside:
            ticket = inside.pop(samples % len(inside))
            ticket.used = samples
            door.leave(ticket)
            door.leave(ticket)  # a second time changes nothing
            continue
        try:
            inside.append(door.enter(str(client), samples, prompt_tokens=10))
        except NotAdmitted as refused:
            assert refused.status == 429 and refused.retry_after > 0
            assert inside and sum(t.samples for t in inside) + samples > places
        assert door.inside == sum(t.samples for t in inside)
        assert door.inside <= places or len(inside) == 1
    for ticket in inside:
        door.leave(ticket)
    assert door.inside == 0 and not door._clocks and not door._tickets


@given(st.lists(st.integers(1, 50), min_size=2, max_size=4))
def test_backlogged_clients_get_equal_shares(backlogs: list[int]) -> None:
    """Whoever is served next, no client is ahead of another that waits by more than a request."""
    door = Admission(10**6)
    tickets = [door.enter(str(c), 1, 100) for c, n in enumerate(backlogs) for _ in range(n)]
    served = [0] * len(backlogs)
    for ticket in sorted(tickets, key=lambda t: t.start):
        door.began(ticket)
        client = int(ticket.client)
        waiting = [served[c] for c, n in enumerate(backlogs) if served[c] < n]
        assert served[client] <= min(waiting)
        served[client] += 1


def test_a_newcomer_waits_for_nobodys_backlog() -> None:
    door = Admission(1000)
    backlog = [door.enter("greedy", 1, 1000) for _ in range(100)]
    door.began(backlog[3])
    newcomer = door.enter("modest", 1, 1000)
    assert backlog[3].start <= newcomer.start < backlog[5].start


def test_a_client_pays_for_what_it_used() -> None:
    door = Admission(1000)
    long, short = door.enter("long", 1, 10), door.enter("short", 1, 10)
    held = [door.enter("long", 1, 10), door.enter("short", 1, 10)]
    long.used, short.used = 5000, 20
    door.leave(long)
    door.leave(short)
    assert door.enter("short", 1, 10).start < door.enter("long", 1, 10).start
    assert held[0].start == held[1].start


def test_draining_lets_nobody_in_and_waits_for_those_inside() -> None:
    async def main() -> None:
        door = Admission(10)
        assert await door.drain(5)
        door = Admission(10)
        ticket = door.enter("a", 1, 1)
        draining = asyncio.create_task(door.drain(60))
        await asyncio.sleep(0)
        with pytest.raises(NotAdmitted) as refused:
            door.enter("b", 1, 1)
        assert refused.value.status == 503 and not draining.done()
        door.leave(ticket)
        assert await draining

    asyncio.run(main())


def test_draining_ends_with_its_time() -> None:
    async def main() -> None:
        door = Admission(10)
        door.enter("a", 1, 1)
        assert not await door.drain(0.01)

    asyncio.run(main())


@pytest.mark.parametrize("header", [b"authorization", b"x-api-key"])
@pytest.mark.parametrize(("key", "client"), [("one", "0"), ("two", "1"), ("", None), ("on", None)])
def test_a_key_says_which_client_it_is(header: bytes, key: str, client: str | None) -> None:
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
