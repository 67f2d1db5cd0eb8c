"""Replaying a trace counts the steps that the scheduler would take."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s1engine.bench.studies.draft_acceptance import (
    LIMIT,
    SOURCES,
    EngineDrafter,
    RecordedTrace,
    parts,
    replay,
)
from tests.core.paged_mock import PagedMock, repeating_model


def make_trace(seed: int, length: int) -> RecordedTrace:
    model, tokens = repeating_model(seed), [5, 6, 7]
    while len(tokens) < length:
        tokens.append(model(tokens)[0])
    return RecordedTrace(np.array(tokens, np.int32), 3, length - length // 4)


traces = st.builds(make_trace, st.integers(0, 999), st.integers(8, 120))


@settings(max_examples=30)
@given(traces)
def test_the_engines_drafter_matches_the_scheduler(trace: RecordedTrace) -> None:
    """Where all steps cost the same, the scheduler uses every draft token above its threshold."""
    mock = PagedMock(max_num_batched_tokens=64, max_draft=LIMIT, max_samples=9)
    mock.scheduler.add(0, trace.tokens[:3], max_len=len(trace.tokens))
    mock.run_to_end(lambda ids: [int(trace.tokens[len(ids)])])
    steps = list(replay(trace, EngineDrafter(trace.tokens, least=0.05)))
    stats = mock.scheduler.stats()
    assert stats.num_steps == len(steps)
    assert stats.num_draft_tokens == sum(drafted for _, _, drafted in steps)


@settings(max_examples=10)
@given(traces)
@pytest.mark.parametrize("name", ["latest of 1 to 3, k=4", "vote of all, k=4", "own, least=0.3"])
def test_every_token_comes_from_one_step(name: str, trace: RecordedTrace) -> None:
    steps = list(replay(trace, SOURCES[name](trace.tokens)))
    ends = [position + yielded for position, yielded, _ in steps]
    assert [position for position, _, _ in steps] == [3, *ends[:-1]]
    assert ends[-1] == len(trace.tokens)
    assert all(1 <= yielded <= drafted + 1 for _, yielded, drafted in steps)


def test_parts_are_quarters_after_wait_and_answer() -> None:
    tokens = np.arange(1003, dtype=np.int32)
    part = parts(RecordedTrace(tokens, 3, 803), {103})
    assert part[3] == 0 and part[802] == 3 and part[803] == part[1002] == 4
    assert part[103] == 0 and set(part[104:168]) == {10} and part[168] == 0
