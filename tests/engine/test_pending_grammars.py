"""Grammars of clients are compiled by turns."""

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from s1engine.engine.live_request import MAX_SUBMITTED, LiveRequest, PendingGrammars


class SlowCompiler:
    """Compiles one grammar at a time, when the test says so."""

    def __init__(self) -> None:
        self.submitted: list[tuple[str, Future[Any]]] = []

    def submit(self, grammar: str) -> "Future[Any]":
        self.submitted.append((grammar, Future()))
        return self.submitted[-1][1]


def live_request(client: int) -> LiveRequest:
    request: Any = SimpleNamespace(client=client, params=SimpleNamespace(grammar=str(client)))
    return LiveRequest(request, 0)


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=30))
def test_a_client_waits_for_one_grammar_of_each_other(moves: list[tuple[int, bool]]) -> None:
    """Requests come at once, some leave; the rest is compiled by turns, each once."""
    compiler: Any = SlowCompiler()
    pending = PendingGrammars(compiler)
    stay = []
    for client, leaves in moves:
        live = live_request(client)
        pending.add(live)
        if leaves:
            assert pending.remove(live)
        else:
            stay.append(live)
    num_before = len(compiler.submitted)
    ready: list[LiveRequest] = []
    for done in range(len(moves) + 1):
        assert len(compiler.submitted) - done <= MAX_SUBMITTED
        if done < len(compiler.submitted):
            compiler.submitted[done][1].set_result(None)
        ready += pending.pop_ready(wait=False)
        pending.pop_ready(wait=False)
    assert len(ready) == len(stay) and len(pending) == 0
    order = [client for client, _ in compiler.submitted[num_before:]]
    for client in set(order):
        before = order[: order.index(client)]
        assert all(before.count(other) <= 1 for other in set(order))
