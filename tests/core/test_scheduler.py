"""The scheduler on a mock model: under any batching, preemption, chunking and caching, every
sequence equals the slow reference, and no block is lost."""

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from s1engine import _core
from s1engine.engine.core_output import EngineCoreOutput, decode_core_outputs
from tests.core import reference
from tests.core.paged_mock import EOS, PagedMock, hashed_model
from tests.core.scenarios import (
    ENDS,
    FORMATS,
    TRIGGER,
    Spec,
    budgets,
    check_equals_reference,
    engines,
    make_mock,
    marker_formats,
    play,
    scenarios,
    spares,
    thinking_ends,
)


@given(scenarios(1, 6), spares, engines, st.integers(0, 99))
def test_every_sequence_equals_the_reference(
    scenario: list[Spec], spare: int, engine: dict[str, Any], seed: int
) -> None:
    model = hashed_model(seed, favourites=(TRIGGER, EOS))
    mock = make_mock(scenario, spare, engine)
    play(mock, model, scenario)
    event(f"preempted: {mock.scheduler.stats().num_preemptions > 0}")
    event(f"prefix hits: {mock.scheduler.stats().prefix_hits > 0}")
    check_equals_reference(mock, model, scenario)
    assert mock.scheduler.stats().num_free_blocks == mock.max_blocks


@given(scenarios(1, 6), spares, engines, st.integers(0, 99))
def test_samples_that_do_not_count_are_sampled_again(
    scenario: list[Spec], spare: int, engine: dict[str, Any], seed: int
) -> None:
    noise = random.Random(seed)
    model = hashed_model(seed, favourites=(TRIGGER, EOS))
    mock = make_mock(scenario, spare, engine)
    forward = mock.forward

    def undecided(model: reference.Model) -> np.ndarray:
        sampled = forward(model)
        dropped = [noise.random() < 0.3 for _ in sampled]
        event(f"dropped: {any(dropped)}")
        return np.where(dropped, _core.NO_TOKEN, sampled)

    mock.forward = undecided  # type: ignore[method-assign]
    play(mock, model, scenario)
    check_equals_reference(mock, model, scenario)
    assert mock.scheduler.stats().num_free_blocks == mock.max_blocks


@given(scenarios(2, 6), spares, engines, st.data())
def test_abort_at_any_moment_loses_nothing(
    scenario: list[Spec], spare: int, engine: dict[str, Any], data: st.DataObject
) -> None:
    model = hashed_model(0, favourites=(TRIGGER, EOS))
    mock = make_mock(scenario, spare, engine)
    victims = data.draw(st.dictionaries(st.integers(0, 20), st.integers(0, len(scenario) - 1)))
    for seq_id, spec in enumerate(scenario):
        spec.add_to(mock.scheduler, seq_id)
    aborted = set()
    for step in range(10_000):
        if not mock.scheduler.has_unfinished():
            break
        mock.scheduler.schedule(mock.batch)
        sampled = mock.forward(model) if mock.batch.num_rows else None
        if step in victims:  # between schedule and update, the hardest moment
            mock.scheduler.finish(victims[step], _core.FinishReason.ABORT)
            aborted.add(victims[step])
        if sampled is not None:
            mock.scheduler.update(sampled)
        mock.scheduler.check_integrity()
    for seq_id in set(range(len(scenario))) - aborted:
        result, _ = scenario[seq_id].expected(model)
        assert mock.scheduler.collect_output_dict(seq_id)["token_ids"] == result.token_ids
    for seq_id in range(len(scenario)):
        mock.scheduler.remove(seq_id)
    assert mock.scheduler.stats().num_free_blocks == mock.max_blocks


@given(
    budgets(), st.just(FORMATS[0]) | marker_formats(), *[st.integers(0, n) for n in (25, 30, 99)]
)
def test_lowering_the_maximum_at_any_moment_is_obeyed(
    budget: reference.Budget, fmt: reference.Format, limit: int, when: int, seed: int
) -> None:
    model = hashed_model(seed, favourites=(TRIGGER,))
    mock = PagedMock(ends=thinking_ends(fmt))
    spec = Spec([5, 6], 4, fmt, budget)
    spec.add_to(mock.scheduler, 0)
    before = None
    for step in range(10_000):
        if not mock.scheduler.has_unfinished():
            break
        if step == when:
            state = mock.scheduler.collect_output_dict(0)
            before = state["thinking_tokens"] if state["phase"].name == "THINKING" else None
            mock.scheduler.limit_thinking(0, limit, _core.EndReason.DEADLINE)
        mock.step(model)
        mock.scheduler.check_integrity()
    out = mock.scheduler.collect_output_dict(0)
    assert out["phase"].name == "ANSWERING"
    if before is not None:
        assert out["thinking_tokens"] <= max(limit, before)
        if limit < budget.max_thinking and out["end_reason"].name != "NATURAL":
            assert out["end_reason"].name == "DEADLINE"


BRANCH = 1000  # ids of checkpoint branches: BRANCH * (parent + 1) + index


@given(scenarios(1, 4), spares, engines, st.integers(0, 99), st.data())
def test_checkpoints_equal_separate_runs(
    scenario: list[Spec], spare: int, engine: dict[str, Any], seed: int, data: st.DataObject
) -> None:
    model = hashed_model(seed, favourites=(TRIGGER, EOS))
    mock = make_mock(scenario, spare, engine)
    budgets_of: dict[int, list[int]] = {}
    for seq_id, spec in enumerate(scenario):
        if spec.budget is None or spec.budget.max_thinking <= spec.budget.min_thinking:
            continue
        below = st.integers(spec.budget.min_thinking, spec.budget.max_thinking - 1)
        chosen = sorted(data.draw(st.sets(below, max_size=4)))
        ids = [BRANCH * (seq_id + 1) + i for i in range(len(chosen))]
        spec.extra["checkpoints"] = list(zip(chosen, ids, strict=True))
        budgets_of[seq_id] = chosen
    play(mock, model, scenario)
    for seq_id, chosen in budgets_of.items():
        spec = scenario[seq_id]
        parent = mock.scheduler.collect_output_dict(seq_id)
        assert parent["token_ids"] == spec.expected(model)[0].token_ids
        forked = len(chosen) - parent["checkpoints_left"]
        event(f"forked: {forked}")
        for i, maximum in enumerate(chosen):
            assert spec.budget is not None
            alone = Spec(
                spec.prompt,
                0,
                spec.fmt,
                replace(spec.budget, max_thinking=maximum),
                spec.prompt_thinking,
            )
            wanted, finish = alone.expected(model, spec.max_len)
            branch = BRANCH * (seq_id + 1) + i
            got = mock.scheduler.collect_output_dict(branch) if i < forked else parent
            assert got["token_ids"] == wanted.token_ids or i >= forked
            assert got["finish_reason"].name == finish
            assert got["waits_used"] == wanted.waits_used
            assert got["thinking_tokens"] == wanted.thinking_tokens <= maximum
            if i >= forked:  # never parted: the parent itself equals the separate run
                assert parent["end_reason"].name == "NATURAL"
                assert spec.expected(model)[0].token_ids == wanted.token_ids
    assert mock.scheduler.stats().num_free_blocks == mock.max_blocks


def test_branches_reuse_what_their_parent_computed() -> None:
    mock = PagedMock(num_blocks=64, block_size=4, ends=ENDS)
    budget = reference.Budget(60, 0, 0, (), (TRIGGER,))
    spec = Spec([5, 6, 7], 2, FORMATS[0], budget, extra={"checkpoints": [(20, 1), (40, 2)]})
    spec.add_to(mock.scheduler, 0)
    mock.run_to_end(lambda ids: [EOS if TRIGGER in ids else 9 + len(ids) % 4])
    stats = mock.scheduler.stats()
    assert mock.scheduler.collect_output_dict(0)["checkpoints_left"] == 0
    assert stats.num_computed_tokens < 3 + 60 + 3 * (4 + 5)  # a block and an answer for each


def naive_loop(thinking: list[int], repeats: int) -> int | None:
    """Number of tokens after which a phrase of at most 64 occurs ``repeats`` times in a row."""
    for n in range(1, len(thinking) + 1):
        for period in range(1, min(n // repeats, 64) + 1):
            tail = thinking[n - period * repeats : n]
            if tail == tail[:period] * repeats:
                return n
    return None


@given(st.lists(st.integers(5, 7), min_size=1, max_size=50), st.integers(2, 5), st.integers(0, 40))
def test_a_loop_ends_the_thinking_but_not_before_the_minimum(
    script: list[int], repeats: int, minimum: int
) -> None:
    mock = PagedMock(ends=ENDS)
    budget = reference.Budget(60, minimum, 0, (), (TRIGGER,))
    spec = Spec([3, 4], 3, FORMATS[0], budget, extra={"loop_repeats": repeats})
    script = script + [9, 10, 11, 12] * 20  # ends in a loop itself
    spec.add_to(mock.scheduler, 0)
    mock.run_to_end(lambda ids: [script[len(ids) - 2]])
    out = mock.scheduler.collect_output_dict(0)
    looped = naive_loop(script[:60], repeats)
    expected = 60 if looped is None else max(looped, min(minimum, 60))
    assert out["thinking_tokens"] == expected
    assert out["end_reason"].name == ("BUDGET" if expected == 60 else "LOOP") or looped == 60
    assert out["token_ids"][:expected] == script[:expected]


def test_generated_blocks_are_found_again() -> None:
    mock = PagedMock(block_size=4)
    model = hashed_model(1)
    first = Spec([5, 6, 7], 14, FORMATS[0], None)
    first.add_to(mock.scheduler, 0)
    mock.run_to_end(model)
    tokens = mock.scheduler.tokens(0)
    second = Spec([*tokens, 9], 2, FORMATS[0], None)
    second.add_to(mock.scheduler, 1)
    mock.run_to_end(model)
    # all full blocks of what was computed: the last sampled token never was
    assert mock.scheduler.collect_output_dict(1)["num_cached"] == (len(tokens) - 1) // 4 * 4 > 3


def test_tokens_of_a_dropped_marker_are_not_found_again() -> None:
    """The wait text overwrites their place in the cache."""
    texts = [b""] * 10 + [b"a", b"b", b"c"] + [b""] * 3
    fmt = replace(FORMATS[1], markers=(b"abc",), token_bytes=tuple(texts))
    follower = {7: 10, 10: 11, 11: 12}  # the prompt's last token, then "a", "b", "c"

    def model(ids: list[int]) -> list[int]:
        return [follower.get(ids[-1], EOS), *range(16)]

    mock = PagedMock(block_size=1, ends=thinking_ends(fmt))
    budget = reference.Budget(8, min_thinking=0, num_waits=1, wait=(9,), forced_end=(TRIGGER,))
    thinking = Spec([5, 6, 7], 1, fmt, budget)
    thinking.add_to(mock.scheduler, 0)
    mock.run_to_end(model)
    out = mock.scheduler.collect_output_dict(0)
    assert out["token_ids"] == thinking.expected(model)[0].token_ids
    assert out["token_ids"][0] == 9 and 10 not in out["token_ids"]
    Spec([5, 6, 7, 10, 11, 8], 1, fmt, None).add_to(mock.scheduler, 1)
    mock.run_to_end(model)
    assert mock.scheduler.collect_output_dict(1)["num_cached"] == 3


def test_a_salt_separates_caches() -> None:
    mock = PagedMock(block_size=4)
    for seq_id, salt in enumerate((1, 2, 1)):
        Spec([5] * 12, 1, FORMATS[0], None, salt=salt).add_to(mock.scheduler, seq_id)
        mock.run_to_end(hashed_model(0))
    assert [mock.scheduler.collect_output_dict(i)["num_cached"] for i in range(3)] == [0, 0, 8]


def test_least_recently_used_prefix_is_evicted_first() -> None:
    mock = PagedMock(num_blocks=6, block_size=4)
    model = hashed_model(0)
    for seq_id, token in enumerate((5, 6, 7)):  # 3 blocks each, 2 of them full
        Spec([token] * 11, 1, FORMATS[0], None).add_to(mock.scheduler, seq_id)
        mock.run_to_end(model)
    for seq_id, token in ((3, 7), (4, 5)):
        Spec([token] * 11, 1, FORMATS[0], None).add_to(mock.scheduler, seq_id)
        mock.run_to_end(model)
    assert mock.scheduler.collect_output_dict(3)["num_cached"] == 8
    assert mock.scheduler.collect_output_dict(4)["num_cached"] == 4  # the tail went first


def test_lower_priority_number_runs_first_and_is_preempted_last() -> None:
    mock = PagedMock(num_blocks=64, block_size=4, max_num_seqs=1)
    order = []
    for seq_id, priority in enumerate((2, 0, 1)):
        Spec([5, 6 + seq_id], 2, FORMATS[0], None, priority=priority).add_to(mock.scheduler, seq_id)
    while mock.scheduler.has_unfinished():
        order += mock.scheduler.schedule(mock.batch)
        mock.scheduler.update(mock.forward(hashed_model(3)))
    assert order == [1, 2, 0]


def test_decodes_go_on_while_a_long_prompt_is_computed() -> None:
    mock = PagedMock(num_blocks=64, block_size=4, max_num_batched_tokens=8)

    def model(ids: list[int]) -> list[int]:
        return [9]  # never the end

    Spec([5, 6], 30, FORMATS[0], None, extra={"stream_output": True}).add_to(mock.scheduler, 0)
    mock.step(model)
    Spec([7] * 60, 1, FORMATS[0], None).add_to(mock.scheduler, 1)
    for _ in range(8):
        mock.step(model)
        assert [sequence for sequence, _ in mock.scheduler.outputs] == [0]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": [1] * 40, "max_len": 300}, "exceeds the cache"),
        ({"prompt": [1] * 4, "max_len": 3}, "no room"),
        ({"prompt": [1] * 4, "num_to_score": 4}, "to score"),
    ],
)
def test_impossible_sequences_are_refused(kwargs: dict[str, Any], message: str) -> None:
    mock = PagedMock(num_blocks=64, block_size=4)
    prompt = np.array(kwargs.pop("prompt"), np.int32)
    with pytest.raises(ValueError, match=message):
        mock.scheduler.add(0, prompt, **{"max_len": 10, **kwargs})
    assert not mock.scheduler.has_unfinished()
    mock.scheduler.check_integrity()


def test_buffers_of_the_wrong_kind_are_refused_by_name() -> None:
    mock = PagedMock()
    buffers = {**mock.buffers, "positions": np.zeros(1, np.int32)}
    with pytest.raises(ValueError, match="positions"):
        _core.ScheduledBatch(buffers, max_tokens=16, max_rows=8, max_blocks=64)


def draw_orders(scenario: list[Spec], data: st.DataObject) -> None:
    """Draws orders, as a fair caller sets them."""
    for spec in scenario:
        spec.extra["order"] = data.draw(st.integers(0, 3))


@given(scenarios(2, 8), spares, engines, st.integers(0, 99), st.data())
def test_with_all_growth_reserved_nothing_is_preempted(
    scenario: list[Spec], spare: int, engine: dict[str, Any], seed: int, data: st.DataObject
) -> None:
    """Priorities and arrivals are equal, and there is one client: a later sequence that precedes,
    or is the first of its client, may still preempt."""
    model = hashed_model(seed, favourites=(TRIGGER, EOS))
    mock = make_mock(scenario, spare, engine | {"min_reserve": 1.0})
    for spec in scenario:
        spec.arrival = spec.priority = spec.extra["client"] = 0
    draw_orders(scenario, data)
    play(mock, model, scenario)
    assert mock.scheduler.stats().num_preemptions == 0
    for seq_id, spec in enumerate(scenario):
        assert (
            mock.scheduler.collect_output_dict(seq_id)["token_ids"]
            == spec.expected(model)[0].token_ids
        )


@settings(max_examples=15)
@given(st.integers(12, 40), st.integers(4, 12))
def test_long_thinking_causes_few_preemptions(num_seqs: int, longest: int) -> None:
    """All think up to their budget, the worst case. Sequences admitted before the scheduler has
    learnt it are preempted at most once, later ones never."""
    mock = PagedMock(
        ends=ENDS,
        num_blocks=4 * longest,
        block_size=4,
        max_num_seqs=32,
        max_num_batched_tokens=64,
        enable_prefix_caching=False,
    )
    budget = reference.Budget(4 * longest - 12, 4 * longest - 12, 0, (), (TRIGGER,))
    for seq_id in range(num_seqs):
        Spec([5, 6 + seq_id % 9], 2, FORMATS[0], budget).add_to(mock.scheduler, seq_id)
    mock.step(lambda ids: [7])
    first = mock.scheduler.stats().num_running
    mock.run_to_end(lambda ids: [7])
    stats = mock.scheduler.stats()
    event(f"preemptions: {stats.num_preemptions} of {first}")
    assert stats.num_preemptions <= first


@given(st.permutations(range(6)))
def test_order_decides_before_arrival(order: list[int]) -> None:
    mock = PagedMock(num_blocks=64, block_size=4, max_num_seqs=1)
    for seq_id, rank in enumerate(order):
        Spec([5, 6], 2, FORMATS[0], None, extra={"order": rank}).add_to(mock.scheduler, seq_id)
    admitted = []
    while mock.scheduler.has_unfinished():
        admitted += mock.scheduler.schedule(mock.batch)
        mock.scheduler.update(mock.forward(hashed_model(3)))
    assert [order[seq_id] for seq_id in admitted] == sorted(order)


@given(scenarios(1, 4), engines, st.integers(0, 99))
def test_records_equal_the_dict_form(
    scenario: list[Spec], engine: dict[str, Any], seed: int
) -> None:
    """The records of all steps hold what a second scheduler returns per sequence at the end."""
    model = hashed_model(seed, favourites=(TRIGGER, EOS))
    streamed, silent = (make_mock(scenario, 2, engine) for _ in range(2))
    got: dict[int, list[EngineCoreOutput]] = {}
    for seq_id, spec in enumerate(scenario):
        spec.extra["stream_output"] = True
        spec.add_to(streamed.scheduler, seq_id)
        spec.add_to(silent.scheduler, seq_id)
    while streamed.scheduler.has_unfinished():
        streamed.step(model)
        for progress in decode_core_outputs(streamed.scheduler.collect_outputs()):
            got.setdefault(progress.seq_id, []).append(progress)
    silent.run_to_end(model)
    for seq_id in range(len(scenario)):
        wanted, found = silent.scheduler.collect_output_dict(seq_id), got[seq_id][-1]
        assert [t for record in got[seq_id] for t in record.token_ids] == wanted["token_ids"]
        assert [m for record in got[seq_id] for m in record.marks] == wanted["marks"]
        assert found.thinking == (wanted["phase"].name == "THINKING")
        assert (found.finish_reason or "none").upper() == wanted["finish_reason"].name
        assert (found.end_reason or "none").upper() == wanted["end_reason"].name
        assert found.thinking_tokens == wanted["thinking_tokens"]
        assert found.max_thinking == wanted["max_thinking"]
        assert found.waits_used == wanted["waits_used"]
