"""A request of higher priority preempts running ones of lower priority, a bounded number of times;
no token changes, and every request finishes."""

from typing import Any

from hypothesis import event, given, settings
from hypothesis import strategies as st

from s1engine import _core
from tests.core.paged_mock import EOS, PagedMock, hashed_model
from tests.core.scenarios import (
    FORMATS,
    TRIGGER,
    Spec,
    check_equals_reference,
    engines,
    make_mock,
    scenarios,
    spares,
)

MAX_DISPLACEMENTS = 3
URGENT, NORMAL = 0, 5


def never_ends(ids: list[int]) -> list[int]:
    return [9]


def add(mock: PagedMock, seq_id: int, length: int, new_tokens: int, priority: int) -> None:
    prompt = [5 + seq_id % 9] * length
    Spec(prompt, new_tokens, FORMATS[0], None, priority=priority).add_to(mock.scheduler, seq_id)


def test_a_higher_priority_takes_the_row_of_a_lower_one() -> None:
    """At the next step; among the lower ones it takes that of the last."""
    mock = PagedMock(num_blocks=64, block_size=4, max_num_seqs=2)
    for seq_id in range(3):
        add(mock, seq_id, 4, 40, NORMAL)
    for _ in range(3):
        mock.step(never_ends)
    add(mock, 3, 4, 2, URGENT)
    assert mock.scheduler.schedule(mock.batch) == [3]
    mock.scheduler.update(mock.forward(never_ends))
    assert mock.scheduler.req_index(0) >= 0 and mock.scheduler.req_index(1) < 0
    ended = []
    while mock.scheduler.has_unfinished():
        mock.step(never_ends)
        ended += mock.scheduler.finished
    assert ended == [3, 0, 1, 2]


def test_equal_priorities_do_not_preempt() -> None:
    mock = PagedMock(num_blocks=64, block_size=4, max_num_seqs=1)
    add(mock, 0, 4, 20, NORMAL)
    mock.step(never_ends)
    add(mock, 1, 4, 2, NORMAL)
    mock.run_to_end(never_ends)
    assert mock.scheduler.stats().num_preemptions == 0


def test_a_higher_priority_takes_the_blocks_of_lower_ones() -> None:
    mock = PagedMock(num_blocks=16, block_size=4, max_num_seqs=4, min_reserve=0.0)
    for seq_id in range(3):
        add(mock, seq_id, 12, 8, NORMAL)
    for _ in range(4):
        mock.step(never_ends)
    add(mock, 3, 40, 2, URGENT)
    mock.step(never_ends)
    assert mock.scheduler.req_index(3) >= 0
    mock.run_to_end(never_ends)


def test_nothing_is_preempted_that_would_not_suffice() -> None:
    """The blocks are held by a sequence of the same priority."""
    mock = PagedMock(num_blocks=16, block_size=4, max_num_seqs=4, min_reserve=0.0)
    add(mock, 0, 44, 8, URGENT)
    for _ in range(4):
        mock.step(never_ends)
    add(mock, 1, 4, 4, NORMAL)
    mock.step(never_ends)
    add(mock, 2, 40, 8, URGENT)
    mock.step(never_ends)
    assert mock.scheduler.req_index(1) >= 0 and mock.scheduler.req_index(2) < 0
    mock.run_to_end(never_ends)


def test_a_higher_priority_does_not_wait_behind_the_chunks_of_a_lower_one() -> None:
    """A row is free, but a long prompt fills every step."""
    mock = PagedMock(num_blocks=256, block_size=4, max_num_seqs=4, max_num_batched_tokens=16)
    add(mock, 0, 600, 1, NORMAL)
    mock.step(never_ends)
    add(mock, 1, 8, 3, URGENT)
    for _ in range(3):
        mock.step(never_ends)
    assert mock.scheduler.finished == [1]
    mock.run_to_end(never_ends)


@given(st.integers(1, 3), st.integers(1, 30))
def test_a_sequence_is_displaced_a_bounded_number_of_times(rows: int, pause: int) -> None:
    """Urgent requests come all the time, yet those that run at last are left alone."""
    mock = PagedMock(num_blocks=64, block_size=4, max_num_seqs=rows)
    for seq_id in range(rows):
        add(mock, seq_id, 4, 60, NORMAL)
    mock.step(never_ends)
    urgent, steps = 100, 0
    while any(mock.scheduler.num_computed(seq_id) < 63 for seq_id in range(rows)):
        if steps % (4 + pause) == 0 and mock.scheduler.stats().num_waiting == 0:
            add(mock, urgent, 4, 2, URGENT)
            urgent += 1
        mock.step(never_ends)
        mock.scheduler.check_integrity()
        steps += 1
        assert steps < 10_000
        if not mock.scheduler.has_unfinished():
            break
    assert mock.scheduler.stats().num_preemptions <= MAX_DISPLACEMENTS * rows


@settings(max_examples=60)
@given(scenarios(2, 8), spares, engines, st.integers(0, 99), st.data())
def test_priorities_change_no_token(
    scenario: list[Spec], spare: int, engine: dict[str, Any], seed: int, data: st.DataObject
) -> None:
    """Requests of many priorities arrive while others run; all finish, as the reference says."""
    model = hashed_model(seed, favourites=(TRIGGER, EOS))
    for spec in scenario:
        spec.arrival = data.draw(st.integers(0, 12))
        spec.priority = data.draw(st.integers(0, 4))
    mock = make_mock(scenario, spare, engine)
    waiting = dict(enumerate(scenario))
    displaced = 0
    for step in range(10_000):
        for seq_id in [i for i, spec in waiting.items() if spec.arrival <= step]:
            waiting.pop(seq_id).add_to(mock.scheduler, seq_id)
        if not waiting and not mock.scheduler.has_unfinished():
            break
        before = mock.scheduler.stats().num_preemptions
        mock.step(model)
        mock.scheduler.check_integrity()
        displaced += mock.scheduler.stats().num_preemptions - before
    else:
        raise AssertionError("the scheduler does not finish")
    event(f"preempted: {displaced > 0}")
    check_equals_reference(mock, model, scenario)
    assert mock.scheduler.stats().num_free_blocks == mock.max_blocks


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6)), min_size=2, max_size=8))
def test_with_one_row_requests_end_in_order_of_priority(requests: list[tuple[int, int]]) -> None:
    """(priority, arrival): whatever runs has the highest priority, as long as nothing was displaced
    too often."""
    mock = PagedMock(num_blocks=64, block_size=4, max_num_seqs=1)
    waiting = dict(enumerate(requests))
    live: dict[int, int] = {}
    displaced: dict[int, int] = {}
    runs = -1
    for step in range(1000):
        for seq_id in [i for i, (_, arrival) in waiting.items() if arrival <= step]:
            live[seq_id] = waiting.pop(seq_id)[0]
            add(mock, seq_id, 3, 4, live[seq_id])
        if not waiting and not live:
            return
        if not live:
            continue
        admitted = mock.scheduler.schedule(mock.batch)
        if admitted:
            if runs in live:
                displaced[runs] = displaced.get(runs, 0) + 1
            runs = admitted[0]
        if displaced.get(runs, 0) < MAX_DISPLACEMENTS:
            assert live[runs] == min(live.values())
        mock.scheduler.update(mock.forward(never_ends))
        for seq_id in mock.scheduler.finished:
            del live[seq_id]
    raise AssertionError("the scheduler does not finish")


def test_a_finish_by_deadline_says_so() -> None:
    mock = PagedMock()
    add(mock, 0, 4, 20, NORMAL)
    mock.step(never_ends)
    mock.scheduler.finish(0, _core.FinishReason.DEADLINE)
    assert mock.scheduler.collect_output_dict(0)["finish_reason"].name == "DEADLINE"
    assert not mock.scheduler.has_unfinished()
