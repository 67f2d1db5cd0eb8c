"""Multi-step decode: however far the device is ahead, and whatever the host decides
meanwhile, every sequence equals the slow reference."""

from typing import Any

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from s1engine import _core
from tests.core import reference
from tests.core.device_mock import DeviceMock
from tests.core.paged_mock import EOS, PagedMock, hashed_model
from tests.core.reference import Model
from tests.core.scenarios import (
    ENDS,
    FORMATS,
    NEWLINES,
    TRIGGER,
    Spec,
    check_equals_reference,
    disturbances,
    engines,
    play,
    scenarios,
    spares,
    specs,
    thinking_ends,
)
from tests.core.test_scheduler import BRANCH

multi_steps = st.fixed_dictionaries(
    {
        "steps": st.sampled_from([1, 2, 7, 32]),
        "max_inline_tokens": st.sampled_from([1, 2, 30]),
        "spare_rows": st.integers(0, 2),
        "seed": st.integers(0, 99),
        "step_time": st.sampled_from([0.0, 1e-4, 1e-3, 1e-2]),
        "max_run_time": st.sampled_from([0.0, 8e-3]),
    }
)


def make_device(
    scenario: list[Spec], spare: int, engine: dict[str, Any], multi_step: dict[str, Any]
) -> DeviceMock:
    longest = max(-(-spec.max_len // engine["block_size"]) for spec in scenario)
    return DeviceMock(
        ends=thinking_ends(scenario[0].fmt),
        newlines=NEWLINES,
        num_blocks=longest + spare,
        **engine,
        **multi_step,
    )


@settings(max_examples=40)
@given(scenarios(1, 5), spares, engines, st.integers(0, 99), multi_steps)
def test_every_sequence_equals_the_reference(
    scenario: list[Spec], spare: int, engine: dict[str, Any], seed: int, multi_step: dict[str, Any]
) -> None:
    model = hashed_model(seed, favourites=(TRIGGER, EOS))
    mock = make_device(scenario, spare, engine, multi_step)
    play(mock, model, scenario)
    event(f"multi-step: {mock.num_device_steps > 0}")
    event(f"preempted: {mock.scheduler.stats().num_preemptions > 0}")
    check_equals_reference(mock, model, scenario)
    assert mock.scheduler.stats().num_free_blocks == mock.max_blocks


@settings(max_examples=60)
@given(scenarios(2, 4), spares, engines, multi_steps, st.data())
def test_decisions_of_the_host_count_at_once(
    scenario: list[Spec],
    spare: int,
    engine: dict[str, Any],
    multi_step: dict[str, Any],
    data: st.DataObject,
) -> None:
    """Aborts change no other sequence; a lowered maximum holds from the host's last token."""
    model = hashed_model(1, favourites=(TRIGGER, EOS))
    mock = make_device(scenario, spare, engine, multi_step)
    disturbed = data.draw(disturbances(len(scenario), last=12))
    for seq_id, spec in enumerate(scenario):
        spec.add_to(mock.scheduler, seq_id)
    for moment in range(10_000):
        if not mock.scheduler.has_unfinished():
            break
        disturbed.apply(mock.scheduler, moment)
        mock.step(model)
        mock.scheduler.check_integrity()
    disturbed.check_results(mock.scheduler, scenario, model)


@settings(max_examples=15)
@given(specs().filter(lambda s: s.budget and s.budget.max_thinking > 4), engines, multi_steps)
def test_checkpoints_fork_where_they_would_without_a_device(
    spec: Spec, engine: dict[str, Any], multi_step: dict[str, Any]
) -> None:
    assert spec.budget is not None
    budgets = range(max(spec.budget.min_thinking, 1), spec.budget.max_thinking, 2)
    spec.extra["checkpoints"] = [(budget, BRANCH + i) for i, budget in enumerate(budgets)]
    model = hashed_model(2, favourites=(TRIGGER, EOS))
    mocks = [
        make_device([spec], 20, engine, multi_step),
        PagedMock(ends=thinking_ends(spec.fmt), num_blocks=99, **engine),
    ]
    outs: list[list[Any]] = []
    for mock in mocks:
        play(mock, model, [spec])
        branches = len(budgets) - mock.scheduler.collect_output_dict(0)["checkpoints_left"]
        outs.append([mock.scheduler.collect_output_dict(BRANCH + i) for i in range(branches)])
        for out in outs[-1]:
            out.pop("num_cached")  # depends on when the branch began
    assert outs[0] == outs[1]


def test_a_loop_ends_the_thinking_at_the_same_token() -> None:
    budget = reference.Budget(200, 0, 0, (), (TRIGGER,))
    spec = Spec([5, 6], 3, FORMATS[0], budget, extra={"loop_repeats": 4})
    outs = []
    for steps in (1, 32):
        multi_step = {"steps": steps, "max_inline_tokens": 4, "spare_rows": 1, "seed": 0}
        engine = {"block_size": 4, "max_num_seqs": 2, "max_num_batched_tokens": 64}
        mock = make_device([spec], 4, engine, multi_step)
        play(mock, lambda ids: [EOS if TRIGGER in ids else 9 + len(ids) % 3], [spec])
        outs.append(mock.scheduler.collect_output_dict(0))
    assert outs[0] == outs[1]
    assert outs[0]["end_reason"].name == "LOOP" and outs[0]["thinking_tokens"] == 12


class PacedDevice(DeviceMock):
    """Launches all that it may, two deep, as the runner does."""

    def step(self, model: Model) -> None:
        if not self.in_flight and not self._begin(model):
            self.scheduler.update(self.forward(model))
            return
        steps = self.scheduler.extend_multi_step(self.batch, self.steps)
        if steps:
            self.in_flight.append(self._take_steps(steps, model))
        self.most_in_flight = self.scheduler.num_steps_in_flight
        self._apply_oldest()


@settings(max_examples=20)
@given(
    step_time=st.floats(2e-4, 2e-2),
    max_steps=st.sampled_from([8, 200]),
    awaited=st.booleans(),
    arrival=st.integers(4, 9),
)
def test_the_steps_in_flight_are_bounded_in_time(
    step_time: float, max_steps: int, awaited: bool, arrival: int
) -> None:
    """And so is the wait of a request that comes at any moment."""
    bound = 8e-3
    mock = PacedDevice(
        ends=ENDS, newlines=NEWLINES, steps=max_steps, max_inline_tokens=1, spare_rows=0, seed=0,
        step_time=step_time, max_run_time=bound, num_blocks=400, block_size=16, max_num_seqs=4,
        max_num_batched_tokens=64,
    )  # fmt: skip
    model = hashed_model(3, favourites=(9,))

    def add(seq_id: int) -> None:
        prompt = np.array([5, 6 + seq_id], np.int32)
        mock.scheduler.add(seq_id, prompt, max_len=2000, interactive=awaited)

    add(0)
    for _ in range(arrival):
        mock.step(model)
    own = bound if awaited else 4 * bound
    least, most = (min(max(int(own / 2 / step_time * x), 1), max_steps) for x in (0.9999, 1.0001))
    assert 2 * least <= mock.most_in_flight <= 2 * most  # two launches
    steps = mock.scheduler.stats().num_steps
    add(1)
    while mock.scheduler.req_index(1) < 0:
        mock.step(model)
    waited = mock.scheduler.stats().num_steps - steps - 1  # without the step that admits it
    assert waited * step_time <= max(own, 2 * step_time) * 1.0001


def test_a_device_that_disagrees_is_detected() -> None:
    mock = PagedMock(ends=ENDS)
    Spec([5], 9, FORMATS[0], None).add_to(mock.scheduler, 0)
    mock.scheduler.schedule(mock.batch)
    device_batch = _core.DeviceBatch(
        fields=np.zeros((len(_core.ROW_FIELDS), 1), np.int32),
        slot_mapping=np.zeros(1, np.int64),
        sample_positions=np.zeros(1, np.int64),
        phrases=np.zeros(9, np.int32),
        null_slot=0,
    )
    limits = {"num_steps": 2, "max_inline_tokens": 1}
    assert mock.scheduler.begin_multi_step(mock.batch, device_batch, **limits) == 2
    with pytest.raises(RuntimeError, match="schedule"):
        mock.scheduler.schedule(mock.batch)
    with pytest.raises(RuntimeError, match="disagree"):
        mock.scheduler.apply_multi_step(np.array([[_core.NO_TOKEN], [6]], np.int32))


def test_phrases_that_do_not_fit_prevent_a_multi_step_decode() -> None:
    mock = PagedMock(ends=ENDS)
    Spec([5], 9, FORMATS[0], reference.Budget(9, 0, 1, (6, 7), (TRIGGER,))).add_to(
        mock.scheduler, 0
    )
    mock.scheduler.schedule(mock.batch)
    device_batch = _core.DeviceBatch(
        fields=np.zeros((len(_core.ROW_FIELDS), 1), np.int32),
        slot_mapping=np.zeros(1, np.int64),
        sample_positions=np.zeros(1, np.int64),
        phrases=np.zeros(3, np.int32),
        null_slot=0,
    )
    limits = {"num_steps": 2, "max_inline_tokens": 1}
    assert mock.scheduler.begin_multi_step(mock.batch, device_batch, **limits) == 0
    mock.scheduler.update(np.array([8], np.int64))
