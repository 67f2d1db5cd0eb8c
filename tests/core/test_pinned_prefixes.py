"""Pinned and restored prefixes: they are found whatever else runs, and whatever is pinned, every
sequence equals the slow reference."""

from typing import Any

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from s1engine import _core
from tests.core.device_mock import DeviceMock
from tests.core.paged_mock import EOS, PagedMock, hashed_model, windowed
from tests.core.scenarios import (
    FORMATS,
    NEWLINES,
    TRIGGER,
    Spec,
    check_equals_reference,
    engines,
    scenarios,
    thinking_ends,
    tokens,
)
from tests.core.test_multi_step import multi_steps

SALTS = [bytes(16), bytes([1] * 16)]
FIRST_PIN = 10_000  # ids of sequences that pin their prompt
MODEL = hashed_model(5)


def ids(prompt: list[int]) -> np.ndarray:
    return np.array(prompt, np.int32)


def add_pin(mock: PagedMock, seq_id: int, prompt: list[int], salt: bytes = SALTS[0]) -> bool:
    """False: more than may ever be pinned."""
    try:
        mock.scheduler.add(seq_id, ids(prompt), max_len=len(prompt) + 1, pin=True, salt=salt)
    except ValueError as error:
        assert "exceeds" in str(error)
        return False
    return True


def pinned_engine(scenario: list[Spec], spare: int, window: int, engine: Any) -> dict[str, Any]:
    """A cache that holds the longest sequence and ``spare`` blocks."""
    longest = max(spec.max_len for spec in scenario)
    blocks = -(-longest // engine["block_size"])
    return engine | {
        "ends": thinking_ends(scenario[0].fmt),
        "num_blocks": blocks + spare,
        "max_blocks": blocks,
        "max_len": longest,
        "max_window": window,
    }


def run_pinning(mock: PagedMock, model: Any, scenario: list[Spec], data: st.DataObject) -> None:
    """Steps until every sequence ended, while prefixes of their prompts are pinned and released at
    random moments."""
    waiting = dict(enumerate(scenario))
    held: list[int] = []
    for step in range(10_000):
        for seq_id in [i for i, s in waiting.items() if s.arrival <= step]:
            waiting.pop(seq_id).add_to(mock.scheduler, seq_id)
        if not waiting and not mock.scheduler.has_unfinished():
            break
        if step < 8:
            spec = scenario[data.draw(st.integers(0, len(scenario) - 1))]
            size = len(spec.prompt) // mock.block_size * mock.block_size
            if size and add_pin(
                mock, FIRST_PIN + step, spec.prompt[:size], bytes([spec.salt] * 16)
            ):
                held.append(FIRST_PIN + step)
        if held and data.draw(st.integers(0, 9)) == 0:
            mock.scheduler.unpin(held.pop())  # perhaps before it is computed
        mock.step(model)
        mock.scheduler.check_integrity()
    else:
        raise AssertionError("the scheduler does not finish")
    stats = mock.scheduler.stats()
    event(f"pinned: {stats.num_pinned_blocks > 0}")
    event(f"preempted: {stats.num_preemptions > 0}")
    assert stats.num_free_blocks == mock.null_block - stats.num_pinned_blocks
    for pin in range(FIRST_PIN, FIRST_PIN + 8):
        mock.scheduler.unpin(pin)
    assert mock.scheduler.stats().num_free_blocks == mock.null_block


@settings(max_examples=50)
@given(scenarios(1, 6), st.integers(0, 20), engines, st.integers(0, 17), st.data())
def test_with_any_pins_every_sequence_equals_the_reference(
    scenario: list[Spec], spare: int, engine: dict[str, Any], window: int, data: st.DataObject
) -> None:
    model = windowed(hashed_model(spare, favourites=(TRIGGER, EOS)), window) if window else MODEL
    mock = PagedMock(**pinned_engine(scenario, spare, window, engine))
    run_pinning(mock, model, scenario, data)
    check_equals_reference(mock, model, scenario)


@settings(max_examples=15)
@given(scenarios(1, 5), st.integers(0, 20), engines, multi_steps, st.data())
def test_with_pins_a_multi_step_decode_equals_the_reference(
    scenario: list[Spec],
    spare: int,
    engine: dict[str, Any],
    multi_step: dict[str, Any],
    data: st.DataObject,
) -> None:
    options = pinned_engine(scenario, spare, 0, engine)
    mock = DeviceMock(newlines=NEWLINES, **options, **multi_step)
    run_pinning(mock, MODEL, scenario, data)
    check_equals_reference(mock, MODEL, scenario)


prefixes = st.lists(tokens, min_size=4, max_size=24).map(lambda ids: ids[: len(ids) // 4 * 4])


@settings(max_examples=40)
@given(prefixes, st.lists(st.lists(tokens, min_size=8, max_size=40), max_size=8), st.data())
def test_a_pinned_prefix_is_found_whatever_was_computed_since(
    prefix: list[int], others: list[list[int]], data: st.DataObject
) -> None:
    """It may be computed twice at once; and it is found under its own salt alone."""
    window = data.draw(st.sampled_from([0, 6]))
    mock = PagedMock(num_blocks=24, block_size=4, max_len=48, max_window=window)
    model = windowed(MODEL, window) if window else MODEL
    for seq_id in range(data.draw(st.integers(0, 2))):
        mock.scheduler.add(seq_id, ids([*prefix, 9]), max_len=len(prefix) + 4)
    assert add_pin(mock, FIRST_PIN, prefix)
    mock.run_to_end(model)
    assert mock.scheduler.num_pinned(FIRST_PIN) == len(prefix) // 4
    assert mock.scheduler.stats().num_pinned_blocks == len(prefix) // 4
    for seq_id, other in enumerate(others, start=10):
        mock.scheduler.add(seq_id, ids(other), max_len=len(other) + 1)
        mock.run_to_end(model)
    for seq_id, salt in ((100, SALTS[0]), (101, SALTS[1])):
        mock.scheduler.add(seq_id, ids([*prefix, 3]), max_len=len(prefix) + 2, salt=salt)
        mock.run_to_end(model)
    found = [mock.scheduler.collect_output_dict(i)["num_cached"] for i in (100, 101)]
    assert found == [len(prefix), 0]
    mock.scheduler.unpin(FIRST_PIN)
    mock.scheduler.unpin(FIRST_PIN)  # a second time changes nothing
    assert mock.scheduler.stats().num_free_blocks == 24


def test_pins_of_one_prefix_count_once_and_last_until_the_last_is_released() -> None:
    mock = PagedMock(num_blocks=16, block_size=4, max_len=20)
    for pin, size in enumerate((8, 16, 16)):
        assert add_pin(mock, pin, [5, 6, 7, 8] * (size // 4))
        mock.run_to_end(MODEL)
    counts = [mock.scheduler.stats().num_pinned_blocks]
    for pin in (1, 0, 2):
        mock.scheduler.unpin(pin)
        mock.scheduler.check_integrity()
        counts.append(mock.scheduler.stats().num_pinned_blocks)
    assert counts == [4, 4, 4, 0]


@pytest.mark.parametrize(
    ("num_blocks", "max_len", "most"), [(16, 20, 8), (16, 40, 6), (16, 64, 0), (16, 0, 0)]
)
def test_pins_leave_half_of_the_cache_and_the_longest_sequence(
    num_blocks: int, max_len: int, most: int
) -> None:
    mock = PagedMock(num_blocks=num_blocks, block_size=4, max_len=max_len)
    assert mock.scheduler.stats().max_pinned_blocks == most
    assert not add_pin(mock, 100, [6] * 4 * (most + 1))
    for block in range(most):
        assert mock.scheduler.can_pin(ids([3 + block] * 4), SALTS[0])
        assert add_pin(mock, block, [3 + block] * 4)
        mock.run_to_end(MODEL)
        assert mock.scheduler.num_pinned(block) == 1
    for block in range(most):
        assert mock.scheduler.can_pin(ids([3 + block] * 4), SALTS[0])  # it is pinned already
    assert not mock.scheduler.can_pin(ids([15] * 4), SALTS[0])
    if most:  # it is computed, but there is no room for the pin
        assert add_pin(mock, 100, [15] * 4)
        mock.run_to_end(MODEL)
        assert mock.scheduler.num_pinned(100) == 0
        assert len(mock.scheduler.cached_blocks(ids([15] * 4), SALTS[0])) == 1


def test_a_prefill_that_is_aborted_pins_nothing() -> None:
    mock = PagedMock(num_blocks=16, block_size=4, max_len=20, max_num_batched_tokens=8)
    assert add_pin(mock, 0, [5] * 16)
    mock.step(MODEL)
    mock.scheduler.finish(0, _core.FinishReason.ABORT)
    mock.scheduler.check_integrity()
    assert mock.scheduler.stats().num_free_blocks == 16


# --- restored prefixes ---


def copied(source: PagedMock, target: PagedMock, prompt: list[int], salt: bytes) -> bool:
    """Restores in ``target`` what ``source`` holds of the prompt."""
    blocks = source.scheduler.cached_blocks(ids(prompt), salt)
    prefix = prompt[: len(blocks) * source.block_size]

    def fill(first: int, into: list[int]) -> None:
        assert len(into) == len(blocks) - first
        for block, other in zip(blocks[first:], into, strict=True):
            for slot in range(source.block_size):
                size = source.block_size
                target.cache[other * size + slot] = source.cache[block * size + slot]

    return target.scheduler.restore(ids(prefix), salt, fill)


@given(st.lists(tokens, min_size=1, max_size=30), st.integers(0, 3), st.sampled_from([1, 4]))
def test_a_restored_prefix_goes_on_as_if_it_had_never_left(
    prompt: list[int], known: int, size: int
) -> None:
    source = PagedMock(num_blocks=64, block_size=size)
    target = PagedMock(num_blocks=64, block_size=size)
    first = Spec(prompt, 9, FORMATS[0], None)
    first.add_to(source.scheduler, 0)
    source.run_to_end(MODEL)
    session = source.scheduler.tokens(0)
    if known:  # the target has a part of it already
        Spec(session[:known], 1, FORMATS[0], None).add_to(target.scheduler, 7)
        target.run_to_end(MODEL)
    assert copied(source, target, session, SALTS[0])
    target.scheduler.check_integrity()
    assert target.scheduler.stats().num_free_blocks == 64
    second = Spec([*session, 9], 6, FORMATS[0], None)
    results = []
    for mock in (source, target):
        second.add_to(mock.scheduler, 1)
        mock.run_to_end(MODEL)
        results.append(mock.scheduler.collect_output_dict(1))
    cached = [result.pop("num_cached") for result in results]  # type: ignore[misc]
    assert results[0] == results[1]
    assert cached[1] >= cached[0] == (len(session) - 1) // size * size


def test_a_restore_that_fails_leaves_nothing_behind() -> None:
    source, target = PagedMock(block_size=4), PagedMock(num_blocks=8, block_size=4)
    prompt = [3 + i % 12 for i in range(30)]
    Spec(prompt, 1, FORMATS[0], None).add_to(source.scheduler, 0)
    source.run_to_end(MODEL)

    def broken(first: int, blocks: list[int]) -> None:
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        target.scheduler.restore(ids(prompt), SALTS[0], broken)
    target.scheduler.check_integrity()
    assert target.scheduler.cached_blocks(ids(prompt), SALTS[0]) == []
    assert target.scheduler.stats().num_free_blocks == 8
    target.scheduler.add(1, ids([5] * 8), max_len=20)
    target.step(MODEL)  # holds two blocks
    assert not copied(source, target, prompt, SALTS[0])
    target.scheduler.check_integrity()
    assert target.scheduler.cached_blocks(ids(prompt), SALTS[0]) == []


def test_a_restored_prefix_can_be_pinned_and_else_is_evicted() -> None:
    source = PagedMock(num_blocks=16, block_size=4)
    prompt = [3 + i % 12 for i in range(16)]
    Spec(prompt, 1, FORMATS[0], None).add_to(source.scheduler, 0)
    source.run_to_end(MODEL)
    for pinned in (False, True):
        target = PagedMock(num_blocks=16, block_size=4, max_len=32)
        assert copied(source, target, prompt, SALTS[0])
        if pinned:
            assert target.scheduler.pin(-1, ids(prompt), SALTS[0])
        for seq_id in range(4):
            target.scheduler.add(seq_id, ids([5 + seq_id] * 28), max_len=30)
            target.run_to_end(MODEL)
        assert len(target.scheduler.cached_blocks(ids(prompt), SALTS[0])) == 4 * pinned
