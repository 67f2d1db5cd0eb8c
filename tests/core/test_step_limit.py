"""Steps stay short while a reader or a deadline waits: the scheduler against a model of step times
that it does not know. The clock is simulated."""

import itertools
import math
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from s1engine import _core
from tests.core import reference
from tests.core.paged_mock import PagedMock, hashed_model
from tests.core.scenarios import (
    FORMATS,
    TRIGGER,
    Spec,
    check_equals_reference,
    engines,
    scenarios,
    spares,
    thinking_ends,
)

MIN_CHUNK = 16


@dataclass(frozen=True)
class StepTimes:
    """A device: seconds of a step, of a decoding row, of a prompt token, and of a prompt token for
    each token before it."""

    step: float
    row: float
    token: float
    context: float

    def of(self, rows: list[tuple[int, int]]) -> float:
        """Time of a step of rows (tokens, context)."""
        attention = sum(n * (context + (n - 1) / 2) for n, context in rows)
        decodes = sum(n == 1 for n, _ in rows)
        tokens = sum(n for n, _ in rows if n > 1)
        return self.step + self.row * decodes + self.token * tokens + self.context * attention


devices = st.builds(
    StepTimes,
    step=st.floats(1e-3, 5e-3),
    row=st.floats(1e-5, 1e-4),
    token=st.floats(3e-5, 5e-4),
    context=st.floats(0, 2e-7),
)


class TimedMock(PagedMock):
    """A mock engine with a clock, which a step advances by what the device needs."""

    def __init__(self, device: StepTimes, max_step_time: float, **engine: Any) -> None:
        super().__init__(
            **{
                "num_blocks": 2000,
                "block_size": 16,
                "min_reserve": 0.0,
                "enable_prefix_caching": False,
                "max_num_batched_tokens": 2048,
                **engine,
            },
            max_step_time=max_step_time,
        )
        self.device = device
        self.now = 0.0

    def add(self, seq_id: int, length: int, new_tokens: int, *, interactive: bool = False) -> None:
        prompt = np.full(length, 5 + seq_id % 9, np.int32)
        self.scheduler.add(seq_id, prompt, max_len=length + new_tokens, interactive=interactive)

    def timed_step(self, deadline: float = math.inf, disturbance: float = 1.0) -> float:
        """One step. Returns its time."""
        self.scheduler.schedule(self.batch, deadline - self.now)
        rows = self.batch.num_rows
        if rows == 0:
            return 0.0
        lengths = np.diff(self.buffers["cu_seqlens_q"][: rows + 1])
        contexts = self.buffers["context_lens"][:rows] - lengths
        self.rows = list(zip(lengths.tolist(), contexts.tolist(), strict=True))
        self.scheduler.update(np.full(self.batch.num_samples, 9, np.int64))
        time = self.device.of(self.rows) * disturbance
        self.scheduler.record_step_time(time)
        self.scheduler.check_integrity()
        self.now += time
        return time


def teach(mock: TimedMock) -> None:
    """A reader's stream beside prompts, until step times are known."""
    for seq_id in range(1000, 1003):
        mock.add(seq_id, 2000, 1)
        while mock.scheduler.stats().num_waiting or any(n > 1 for n, _ in mock.rows):
            mock.timed_step()


def smallest(device: StepTimes, rows: int) -> float:
    """Time of a step of decodes and the smallest chunk at the longest context."""
    return device.of([(1, 4000)] * rows + [(MIN_CHUNK, 2000)])


@settings(max_examples=15)
@given(devices, st.integers(1, 6), st.floats(10e-3, 60e-3))
def test_steps_are_short_while_a_reader_waits(
    device: StepTimes, readers: int, limit: float
) -> None:
    """Once step times are learnt: near the limit, unless the smallest chunk needs more; each
    reader gets a token in every step; and the chunks are as large as that allows."""
    mock = TimedMock(device, limit)
    for seq_id in range(readers):
        mock.add(seq_id, 20, 3000, interactive=True)
    mock.timed_step()
    teach(mock)
    mock.add(5000, 1900, 1)
    steps = []
    while mock.scheduler.num_computed(5000) < 1900:
        time = mock.timed_step()
        assert [n for n, _ in mock.rows].count(1) >= readers
        assert time <= max(1.4 * limit, smallest(device, readers))
        steps.append(time)
        if 5000 in mock.scheduler.finished:
            break
    full = [time for time in steps[1:-1]]
    if full and limit > 2 * smallest(device, readers):
        assert sum(full) / len(full) > 0.6 * limit


@given(devices, st.lists(st.integers(1, 3000), min_size=1, max_size=5))
def test_without_readers_and_deadlines_chunks_fill_the_step(
    device: StepTimes, prompts: list[int]
) -> None:
    """The plan is the same as without a limit."""
    plans = []
    for limit in (0.0, 0.02):
        mock = TimedMock(device, limit)
        for seq_id, length in enumerate(prompts):
            mock.add(seq_id, length, 4)
        plans.append([])
        while mock.scheduler.has_unfinished():
            mock.timed_step()
            plans[-1].append(mock.rows)
    assert plans[0] == plans[1]


@settings(max_examples=15)
@given(devices, st.integers(0, 99))
def test_a_step_ends_before_the_next_deadline(device: StepTimes, seed: int) -> None:
    """Or misses it by less than the limit; a chunk of a size never measured, by half its time."""
    rng, limit = random.Random(seed), 0.02
    mock = TimedMock(device, limit)
    mock.add(0, 20, 3000, interactive=True)
    mock.timed_step()
    teach(mock)
    mock.scheduler.finish(0, _core.FinishReason.ABORT)
    for seq_id in range(1, 10):
        mock.add(seq_id, rng.randint(100, 1900), 1)
        deadline = mock.now + rng.random()
        while mock.scheduler.has_unfinished():
            time = mock.timed_step(deadline)
            bound = max(1.1 * limit, smallest(device, 1))
            assert time <= bound or mock.now <= deadline + max(bound, 0.5 * time)
            deadline = deadline if mock.now < deadline else math.inf


def test_the_first_chunk_is_the_smallest_and_chunks_at_most_double() -> None:
    """Nothing is known of prompts when the first one joins a stream."""
    mock = TimedMock(StepTimes(1e-3, 1e-5, 1e-5, 0.0), 1.0)
    mock.add(0, 1, 1000, interactive=True)
    for _ in range(3):
        mock.timed_step()
    mock.add(1, 1900, 1)
    chunks = []
    while 1 not in mock.scheduler.finished:
        mock.timed_step()
        chunks.append(mock.rows[-1][0])
    assert chunks[0] == MIN_CHUNK
    for before, after in itertools.pairwise(chunks):
        assert after < 4 * before  # one power of two
    assert len(chunks) < 10


def test_a_delayed_step_hardly_shrinks_chunks() -> None:
    mock = TimedMock(StepTimes(2e-3, 1e-4, 1e-4, 1e-8), 0.02)
    mock.add(0, 20, 3000, interactive=True)
    mock.timed_step()
    teach(mock)
    mock.add(1, 1900, 1)
    mock.timed_step()
    before = mock.rows[-1][0]
    mock.timed_step(disturbance=50.0)
    mock.timed_step()
    assert mock.rows[-1][0] >= 0.7 * before
    for _ in range(3):
        mock.timed_step()
    assert mock.rows[-1][0] >= 0.85 * before


@settings(max_examples=15)
@given(devices, st.integers(1, 6), st.floats(1e-4, 5e-3))
def test_no_prompt_starves(device: StepTimes, readers: int, limit: float) -> None:
    """A limit that not even decodes keep: every step still computes the smallest chunk, and the
    prompts go in order."""
    mock = TimedMock(device, limit)
    for seq_id in range(readers):
        mock.add(seq_id, 20, 3000, interactive=True)
    while any(n > 1 for n, _ in mock.rows) if mock.now else True:
        mock.timed_step()
    ended = []
    for seq_id in (100, 101, 102):
        mock.add(seq_id, 160, 1)
    for _ in range(40):
        mock.timed_step()
        assert [n for n, _ in mock.rows].count(1) >= readers
        ended += mock.scheduler.finished
    assert ended == [100, 101, 102]


def test_a_forced_phrase_does_not_wait_behind_a_prompt() -> None:
    """The few tokens that end the thinking join the next step, though chunks fill it."""
    mock = TimedMock(StepTimes(2e-3, 1e-4, 1e-4, 0.0), 4e-3)
    forced_end = (TRIGGER, 7, 8, 9)
    budget = reference.Budget(500, 0, 0, (), forced_end)
    Spec([5] * 20, 100, FORMATS[0], budget, extra={"interactive": True}).add_to(mock.scheduler, 0)
    mock.timed_step()
    mock.timed_step()
    mock.add(1, 1900, 1)
    mock.timed_step()
    mock.scheduler.limit_thinking(0, 0, _core.EndReason.DEADLINE)
    mock.timed_step()
    before = mock.scheduler.num_computed(0)
    mock.timed_step()
    assert mock.scheduler.num_computed(0) >= before + len(forced_end)
    assert mock.scheduler.num_computed(1) < 1900


@given(scenarios(1, 5), spares, engines, st.floats(1e-4, 1.0), st.integers(0, 99))
def test_limits_and_deadlines_change_no_token(
    scenario: list[Spec], spare: int, engine: dict[str, Any], limit: float, seed: int
) -> None:
    """Step times are random, and so are deadlines and who reads."""
    rng = random.Random(seed)
    model = hashed_model(seed, favourites=(2, 1))
    longest = max(-(-spec.max_len // engine["block_size"]) for spec in scenario)
    mock = PagedMock(
        ends=thinking_ends(scenario[0].fmt),
        num_blocks=longest + spare,
        max_step_time=limit,
        **engine,
    )
    for seq_id, spec in enumerate(scenario):
        spec.extra["interactive"] = rng.random() < 0.5
        spec.add_to(mock.scheduler, seq_id)
    for _ in range(10_000):
        if not mock.scheduler.has_unfinished():
            break
        mock.scheduler.schedule(mock.batch, rng.choice([math.inf, -1.0, rng.random()]))
        assert mock.batch.num_rows > 0
        mock.scheduler.update(mock.forward(model))
        mock.scheduler.record_step_time(rng.random() ** 4)
        mock.scheduler.check_integrity()
    check_equals_reference(mock, model, scenario)
