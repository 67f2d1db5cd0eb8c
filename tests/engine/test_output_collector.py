"""Records are joined until they are read: a reader that reads rarely gets the same output as one
that reads after each step."""

import struct
from collections import defaultdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s1engine import _core
from s1engine.engine.core_output import (
    SEQUENCE_BITS,
    EngineCoreOutput,
    decode_core_outputs,
    request_number,
    sequence_id,
)
from s1engine.engine.llm import LLM
from s1engine.engine.llm_engine import LLMEngine
from s1engine.engine.request_output import RequestOutputBuilder
from s1engine.sampling_params import SamplingParams, ThinkingBudget

FORCED = _core.MARK_FORCED


def record(sequence: int, tokens: list[int], marks: list[int], state: int, ended: bool) -> bytes:
    head = struct.pack("<q6i4B", sequence, 0, len(tokens), *[state] * 4, 0, ended, 0, 0)
    return head + struct.pack(f"<{len(tokens)}i", *tokens) + bytes(marks)


def make_collector(*requests: int) -> _core.OutputCollector:
    made = _core.OutputCollector(sequence_bits=SEQUENCE_BITS)
    for number in requests:
        made.open(number)
    return made


steps = st.lists(  # each: new marks by sequence, and the requests that are read after it
    st.tuples(
        st.dictionaries(
            st.tuples(st.integers(0, 2), st.integers(0, 2)),
            st.lists(st.sampled_from([0, 1, FORCED, 1 | FORCED]), min_size=1, max_size=3),
        ),
        st.sets(st.integers(0, 2)),
    ),
    max_size=12,
)


@given(steps, st.sets(st.integers(0, 2)))
def test_no_token_is_lost_and_forced_steps_stay_separate(
    played: list[tuple[dict[tuple[int, int], list[int]], set[int]]], opened: set[int]
) -> None:
    collector = make_collector(*opened)
    sent: dict[int, list[EngineCoreOutput]] = defaultdict(list)
    got: dict[int, list[EngineCoreOutput]] = defaultdict(list)

    def read(number: int) -> None:
        for output in decode_core_outputs(collector.collect(number)):
            assert request_number(output.seq_id) == number
            got[output.seq_id].append(output)

    begun: set[int] = set()
    for state, (gains, reads) in enumerate(played):
        records = b""
        for (number, index), marks in gains.items():
            one = record(sequence_id(number, index), [state] * len(marks), marks, state, False)
            sent[sequence_id(number, index)] += decode_core_outputs(one)
            records += one
        named = {number for number, _ in gains} & opened
        assert set(collector.add(records)) == named - begun
        begun |= named
        for number in reads:
            read(number)
    for number in range(3):
        read(number)
    for sequence, single in sent.items():
        joined = got[sequence]
        if request_number(sequence) not in opened:
            assert not joined
            continue
        assert [t for one in joined for t in one.token_ids] == [
            t for one in single for t in one.token_ids
        ]
        assert b"".join(one.marks for one in joined) == b"".join(one.marks for one in single)
        assert joined[-1].thinking_tokens == single[-1].thinking_tokens
        assert joined[0].num_cached == single[0].num_cached
        forced = [one.marks for one in single if one.num_sampled < len(one.marks)]
        assert [one.marks for one in joined if one.num_sampled < len(one.marks)] == forced


def test_a_first_token_and_an_end_are_urgent() -> None:
    collector = make_collector(1, 2)
    both = record(sequence_id(1, 0), [5], [0], 0, False) + record(
        sequence_id(2, 0), [5], [0], 0, False
    )
    assert collector.add(both) == [1, 2] and not collector.has_pending
    assert collector.add(both) == [] and collector.has_pending
    collector.close(2)
    assert collector.pop_pending() == [1] and not collector.has_pending
    assert collector.add(both) == [] and collector.pop_pending() == [1]
    assert collector.add(record(sequence_id(1, 0), [6], [0], 0, True)) == [1]
    [joined] = decode_core_outputs(collector.collect(1))
    assert joined.token_ids == [5, 5, 5, 6] and joined.finish_reason == "stop"
    assert not collector.collect(1) and not collector.collect(2)


@given(st.binary(max_size=60))
def test_noise_is_rejected(noise: bytes) -> None:
    whole = record(sequence_id(1, 0), [1, 2], [0, 0], 0, False)
    for bad in (whole[:-1], whole + whole[:9], whole[:8] + b"\xff" * 8):
        with pytest.raises(ValueError, match="cut off"):
            make_collector(1).add(bad)
    try:
        make_collector(1).add(noise)
    except ValueError as error:
        assert "cut off" in str(error)


@pytest.mark.parametrize("waits", [0, 2])
def test_joined_records_read_like_single_ones(llm: LLM, waits: int) -> None:
    """Reading all steps of a request at once gives the same text and marks as step by step."""
    llm.call(lambda engine: check_joined(engine, waits))


def check_joined(engine: LLMEngine, waits: int) -> None:
    thinking = ThinkingBudget(num_waits=waits)
    asked = SamplingParams(temperature=1, seed=1, max_tokens=120, thinking=thinking)
    chat = [{"role": "user", "content": "a=3 b=a+4 c=b*2 c?"}]
    request = engine.make_request(chat, asked, stream=True)
    engine.add_request(request)
    collector = make_collector(request.number)
    step_by_step, at_once = (RequestOutputBuilder(request, engine.tokenizer) for _ in range(2))
    outputs: list[Any] = []
    while engine.has_unfinished:
        step = engine.step_core()
        for output in step.decode() if step else ():
            outputs += step_by_step.add(output, 0.0)
        collector.add(step.records if step else b"")
    engine.step()
    joined = list(decode_core_outputs(collector.collect(request.number)))
    assert len(joined) <= 2 * waits + 3
    events = [event for output in joined for event in at_once.add(output, 0.0)]
    assert events[-1] == outputs[-1]
    assert outputs[-1].outputs[0].thinking.end_reason == "natural"
