"""Sliding windows: blocks that have left every window are freed, no other block is, and every
sequence equals the slow reference, whatever is cut, preempted, cached, drafted or far ahead."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from s1engine import _core
from tests.core.device_mock import DeviceMock
from tests.core.paged_mock import EOS, PagedMock, hashed_model, repeating_model, windowed
from tests.core.reference import Model
from tests.core.scenarios import (
    NEWLINES,
    TRIGGER,
    Spec,
    check_equals_reference,
    engines,
    play,
    scenarios,
    thinking_ends,
)
from tests.core.test_draft_planner import drafts
from tests.core.test_multi_step import multi_steps
from tests.core.test_scheduler import BRANCH

windows = st.integers(1, 17)


def blocks_of(interval: int, block_size: int) -> int:
    """Blocks that an interval of a sequence touches at most."""
    return (interval + block_size - 2) // block_size + 1


def engine_for(
    scenario: list[Spec], window: int, spare: int, engine: dict[str, Any]
) -> dict[str, Any]:
    """A cache as small as the scheduler accepts, and ``spare`` blocks."""
    size = engine["block_size"]
    longest = max(-(-spec.max_len // size) for spec in scenario)
    step = min(engine["max_num_batched_tokens"], max(spec.max_len for spec in scenario))
    least = min(longest, blocks_of(window - 1 + step, size))
    return engine | {
        "ends": thinking_ends(scenario[0].fmt),
        "max_window": window,
        "num_blocks": least + spare,
        "max_blocks": longest,
    }


class CheckedMock(PagedMock):
    """Compares the blocks of every running sequence with the definition: if the next query,
    or the one before held tokens, is at position p, exactly the blocks with a key from p - W + 1 on
    are held."""

    def forward(self, model: Model) -> np.ndarray:
        held: set[int] = set()
        for seq_id in range(self.num_sequences):
            if self.scheduler.req_index(seq_id) < 0:
                continue
            blocks = self.scheduler.blocks(seq_id)
            settled = self.scheduler.num_settled(seq_id)
            query = min(self.scheduler.num_computed(seq_id), settled - 1)
            oldest = max(query - self.max_window + 1, 0)
            first = oldest // self.block_size
            assert blocks[:first] == [self.null_block] * first
            assert self.null_block not in blocks[first:]
            held.update(blocks[first:])
        assert self.null_block - self.scheduler.stats().num_free_blocks == len(held)
        return super().forward(model)

    num_sequences: int = 0


@given(scenarios(max_size=5), st.integers(0, 8), engines, windows, st.data())
def test_exactly_the_blocks_of_the_windows_are_held(
    scenario: list[Spec], spare: int, engine: dict[str, Any], window: int, data: st.DataObject
) -> None:
    model = windowed(hashed_model(data.draw(st.integers(0, 9)), (TRIGGER, EOS)), window)
    mock = CheckedMock(**engine_for(scenario, window, spare, engine))
    for seq_id, spec in enumerate(scenario):
        spec.add_to(mock.scheduler, seq_id)
    mock.num_sequences = len(scenario)
    mock.run_to_end(model)
    event(f"preempted: {mock.scheduler.stats().num_preemptions > 0}")
    event(f"prefix hits: {mock.scheduler.stats().prefix_hits > 0}")
    check_equals_reference(mock, model, scenario)
    assert mock.scheduler.stats().num_free_blocks == mock.null_block


@given(
    scenarios(max_size=5),
    st.integers(0, 8),
    engines,
    windows,
    st.none() | drafts,
)
def test_every_sequence_equals_the_reference(
    scenario: list[Spec],
    spare: int,
    engine: dict[str, Any],
    window: int,
    draft: dict[str, Any] | None,
) -> None:
    """Sequences arrive at any time; drafts are accepted and rejected."""
    model = windowed(repeating_model(spare, favourites=(TRIGGER,)), window)
    mock = PagedMock(**engine_for(scenario, window, spare, engine), **(draft or {}))
    play(mock, model, scenario)
    event(f"rejected: {mock.scheduler.stats().num_draft_tokens > 0}")
    check_equals_reference(mock, model, scenario)
    assert mock.scheduler.stats().num_free_blocks == mock.null_block


@settings(max_examples=60)
@given(scenarios(max_size=4), st.integers(0, 8), engines, windows, multi_steps)
def test_multi_step_decode_equals_the_reference(
    scenario: list[Spec],
    spare: int,
    engine: dict[str, Any],
    window: int,
    multi_step: dict[str, Any],
) -> None:
    """Blocks are freed while the device is ahead."""
    model = windowed(hashed_model(spare, favourites=(TRIGGER, EOS)), window)
    options = engine_for(scenario, window, spare, engine)
    mock = DeviceMock(newlines=NEWLINES, **options, **multi_step)
    play(mock, model, scenario)
    event(f"multi-step: {mock.num_device_steps > 0}")
    check_equals_reference(mock, model, scenario)


@given(scenarios(max_size=3), st.integers(0, 8), engines, windows, st.data())
def test_checkpoints_equal_separate_runs(
    scenario: list[Spec], spare: int, engine: dict[str, Any], window: int, data: st.DataObject
) -> None:
    """A branch finds what its parent has computed, or computes it anew."""
    model = windowed(hashed_model(spare, favourites=(TRIGGER, EOS)), window)
    mock = PagedMock(**engine_for(scenario, window, spare, engine))
    chosen: dict[int, list[int]] = {}
    for seq_id, spec in enumerate(scenario):
        if spec.budget is None or spec.budget.max_thinking <= spec.budget.min_thinking:
            continue
        below = st.integers(spec.budget.min_thinking, spec.budget.max_thinking - 1)
        chosen[seq_id] = sorted(data.draw(st.sets(below, max_size=4)))
        ids = [BRANCH * (seq_id + 1) + i for i in range(len(chosen[seq_id]))]
        spec.extra["checkpoints"] = list(zip(chosen[seq_id], ids, strict=True))
    play(mock, model, scenario)
    check_equals_reference(mock, model, scenario)
    for seq_id, maxima in chosen.items():
        spec, budget = scenario[seq_id], scenario[seq_id].budget
        assert budget is not None
        left = mock.scheduler.collect_output_dict(seq_id)["checkpoints_left"]
        for i, maximum in enumerate(maxima[: len(maxima) - left]):
            out = mock.scheduler.collect_output_dict(BRANCH * (seq_id + 1) + i)
            alone = replace(spec, budget=replace(budget, max_thinking=maximum))
            assert out["token_ids"] == alone.expected(model, spec.max_len)[0].token_ids


def add_plain(mock: PagedMock, seq_id: int, prompt: list[int], new: int, **kwargs: Any) -> None:
    mock.scheduler.add(
        seq_id, np.array(prompt, np.int32), max_len=len(prompt) + new, stop_tokens=[EOS], **kwargs
    )


PLAIN = windowed(lambda ids: [3 + sum(ids[-3:]) % 13], 8)


def test_a_context_far_longer_than_the_cache_is_computed_in_the_window() -> None:
    """A prompt of 600 tokens and 300 new ones pass through 7 blocks of 4."""
    mock = PagedMock(num_blocks=7, max_window=8, max_num_batched_tokens=16, max_blocks=225)
    add_plain(mock, 0, [3 + i % 13 for i in range(600)], 300)
    mock.run_to_end(PLAIN)
    tokens = mock.scheduler.tokens(0)
    assert len(tokens) == 900 and mock.scheduler.stats().num_preemptions == 0
    assert all(PLAIN(tokens[:i])[0] == tokens[i] for i in range(600, 900))
    with pytest.raises(ValueError, match="exceeds the cache"):
        add_plain(PagedMock(num_blocks=6, max_window=8, max_num_batched_tokens=16), 0, [3] * 600, 9)


def test_many_long_sequences_share_a_small_cache_without_preemption() -> None:
    """Admission counts the window, not the context: 8 sequences of 200 tokens in 40 blocks of 4."""
    mock = PagedMock(num_blocks=40, max_window=8, min_reserve=1.0, max_blocks=60)
    for seq_id in range(8):
        add_plain(mock, seq_id, [3 + seq_id, 4, 5], 200)
    most = 0
    while mock.scheduler.has_unfinished():
        mock.step(PLAIN)
        mock.scheduler.check_integrity()
        most = max(most, mock.scheduler.stats().num_running)
    assert most == 8 and mock.scheduler.stats().num_preemptions == 0


def test_expired_blocks_are_found_until_they_are_evicted() -> None:
    mock = PagedMock(num_blocks=40, max_window=8, max_num_batched_tokens=64, max_blocks=40)
    prompt = [3 + i % 11 for i in range(60)]
    add_plain(mock, 0, prompt, 2)
    mock.run_to_end(PLAIN)
    add_plain(mock, 1, prompt, 2)
    mock.step(PLAIN)
    assert mock.scheduler.num_computed(1) == 60 and mock.scheduler.stats().prefix_hits == 56
    held = [block for block in mock.scheduler.blocks(1) if block != 40]
    assert len(held) <= blocks_of(7 + 4, 4)
    mock.run_to_end(PLAIN)
    for seq_id in range(2, 12):  # evict the head of the prefix
        add_plain(mock, seq_id, [3 + seq_id] * 30, 2)
    mock.run_to_end(PLAIN)
    hits = mock.scheduler.stats().prefix_hits
    add_plain(mock, 20, prompt, 2)
    mock.run_to_end(PLAIN)
    assert mock.scheduler.stats().prefix_hits == hits
    assert mock.scheduler.tokens(20) == mock.scheduler.tokens(0)


def test_a_negative_window_is_rejected() -> None:
    with pytest.raises(ValueError, match="max_window must not be negative"):
        _core.Scheduler(
            num_blocks=4, block_size=4, max_num_seqs=1, max_num_batched_tokens=4, max_window=-1
        )
