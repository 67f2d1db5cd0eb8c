"""Admission: never more sequences than the limit, and no client fills the queue alone."""

import asyncio
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s1engine.errors import RequestError
from s1engine.sampling_params import MAX_CHECKPOINTS, MAX_N
from s1engine.server.admission import Admission, ClientLimits, NotAdmitted, Ticket
from s1engine.server.api.completions import MAX_PROMPTS, CompletionRequest
from s1engine.server.middleware import ApiKey


def admission_of(limit: int, num_clients: int = 1, **limits: Any) -> Admission:
    return Admission(ClientLimits(max_in_flight=limit, num_clients=num_clients, **limits))


@given(
    st.integers(1, 20),
    st.integers(1, 4),
    st.none() | st.integers(1, 9),
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6), st.booleans())),
)
def test_sequences_never_exceed_a_limit(
    limit: int, num_clients: int, each: int | None, moves: list[tuple[int, int, bool]]
) -> None:
    admission = admission_of(limit, num_clients, max_per_client=each)
    largest = admission.limits.largest_request
    admitted: list[Ticket] = []
    for client, sequences, leaves in moves:
        if leaves and admitted:
            ticket = admitted.pop(sequences % len(admitted))
            admission.release(ticket)
            admission.release(ticket)  # a second time changes nothing
            continue
        name, sequences = str(client % num_clients), min(sequences, largest)
        used = Counter[str]()
        for ticket in admitted:
            used[ticket.client] += ticket.sequences
        free = limit - used.total() - sequences
        try:
            admitted.append(admission.admit(name, sequences))
            used[name] += sequences
            assert used[name] <= (each or limit) or len(admitted) == 1
            assert free >= (used[name] if num_clients > 1 else 0) or len(admitted) == 1
        except NotAdmitted as refused:
            assert refused.status == 429 and refused.retry_after > 0 and admitted
            within = used[name] + sequences
            assert free < 0 or within > (each or limit) or (num_clients > 1 and within > free)
        assert admission.num_in_flight == used.total() and admission.in_flight == used
    for ticket in admitted:
        admission.release(ticket)
    assert admission.num_in_flight == 0 and not admission.in_flight


@given(
    st.integers(2, 2000),
    st.integers(1, 5),
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 400), st.booleans()), max_size=60),
)
def test_a_newcomer_finds_room_whatever_others_send(
    limit: int, num_others: int, moves: list[tuple[int, int, bool]]
) -> None:
    """Others ask for as much as they are given; each halves what is free, at most."""
    admission = admission_of(limit, num_others + 1)
    admitted: list[Ticket] = []
    for other, sequences, leaves in moves:
        if leaves and admitted:
            admission.release(admitted.pop(sequences % len(admitted)))
            continue
        sequences = min(sequences, admission.limits.largest_request)
        while sequences:
            try:
                admitted.append(admission.admit(str(other % num_others), sequences))
                break
            except NotAdmitted:
                sequences //= 2
        free = limit - admission.num_in_flight
        assert free >= limit >> num_others
        if free >= 2:
            admission.release(admission.admit("newcomer", free // 2))


def test_priorities_before_others_need_permission() -> None:
    everybody = ClientLimits(max_in_flight=1)
    some = ClientLimits(max_in_flight=1, num_clients=2, priority_clients=frozenset("1"))
    for client, priority in (("0", 0), ("0", 7), ("1", -7)):
        everybody.check_priority(client, priority)
        some.check_priority(client, priority)
    everybody.check_priority("0", -1)
    with pytest.raises(RequestError) as refused:
        some.check_priority("0", -1)
    assert refused.value.param == "priority" and refused.value.code == "priority_not_allowed"


@given(
    st.integers(1, 1000),
    st.integers(1, MAX_PROMPTS),
    st.none() | st.integers(1, MAX_N) | st.integers(10**9, 10**30),
    st.integers(0, MAX_CHECKPOINTS),
)
def test_a_requests_sequences_are_counted_and_bounded(
    limit: int, prompts: int, n: int | None, checkpoints: int
) -> None:
    body = CompletionRequest(
        prompt=["a"] * prompts, n=n, thinking_checkpoints=[*range(1, checkpoints + 1)] or None
    )
    count = prompts * (n or 1) * (1 + checkpoints)
    if count <= limit:
        assert body.num_sequences(limit) == count
        return
    with pytest.raises(RequestError, match=f"may be {limit}") as refused:
        body.num_sequences(limit)
    sizes = {"prompt": prompts, "n": n or 1, "thinking_checkpoints": 1 + checkpoints}
    assert sizes[str(refused.value.param)] == max(sizes.values())


# --- draining ---


def test_draining_rejects_new_requests_and_waits_for_running_ones() -> None:
    async def main() -> None:
        admission = admission_of(10)
        assert await admission.drain(5)
        admission = admission_of(10)
        ticket = admission.admit("a", 1)
        draining = asyncio.create_task(admission.drain(60))
        await asyncio.sleep(0)
        with pytest.raises(NotAdmitted) as refused:
            admission.admit("b", 1)
        assert refused.value.status == 503 and not draining.done()
        admission.release(ticket)
        assert await draining

    asyncio.run(main())


def test_draining_ends_after_its_timeout() -> None:
    async def main() -> None:
        admission = admission_of(10)
        admission.admit("a", 1)
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
