"""Frames between the processes: messages survive any split of the bytes, and noise is rejected."""

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s1engine.engine import messages
from s1engine.engine.core_output import (
    branch_number,
    request_number,
    sample_index,
    sequence_id,
)
from s1engine.engine.llm import LLM
from s1engine.sampling_params import SamplingParams, ThinkingBudget

CHAT = [{"role": "user", "content": "a=3 b=a+4 c=b*2 c?"}]

params = st.builds(
    SamplingParams,
    n=st.integers(1, 128),
    temperature=st.floats(0, 2),
    seed=st.none() | st.integers(-(2**63), 2**64 - 1),
    logit_bias=st.dictionaries(st.integers(0, 50), st.floats(-100, 100), max_size=3),
    stop=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), max_size=3).map(
        tuple
    ),
    logprobs=st.none() | st.integers(0, 20),
    thinking=st.none()
    | st.builds(ThinkingBudget, max_tokens=st.integers(0, 500), num_waits=st.integers(0, 5)),
)


@settings(max_examples=30)
@given(st.lists(params, min_size=1, max_size=4), st.data())
def test_messages_arrive_as_they_were_sent(
    llm: LLM, asked: list[SamplingParams], data: st.DataObject
) -> None:
    sent = [llm.engine.make_request(CHAT, one, cache_salt="x") for one in asked]
    stream = b"".join(messages.encode_frame(messages.AddRequest(request)) for request in sent)
    frames, bodies = messages.FrameReader(), []
    while stream:
        size = data.draw(st.integers(1, 400))
        bodies += frames.feed(stream[:size])
        stream = stream[size:]
    assert len(bodies) == len(sent)
    for request, body in zip(sent, bodies, strict=True):
        message = messages.to_engine_decoder.decode(body)
        assert isinstance(message, messages.AddRequest)
        got = message.request
        assert np.array_equal(got.prompt, request.prompt) and got.prompt.dtype == np.int32
        for name in type(request).__slots__:
            if name != "prompt":
                assert getattr(got, name) == getattr(request, name), name


@given(st.binary(max_size=200))
def test_noise_is_rejected_or_incomplete(noise: bytes) -> None:
    try:
        for body in messages.FrameReader().feed(noise):
            messages.to_engine_decoder.decode(body)
    except (ConnectionError, msgspec.DecodeError):
        pass


def test_an_absurd_length_is_rejected() -> None:
    with pytest.raises(ConnectionError):
        messages.FrameReader().feed(b"\xff\xff\xff\xff")


@given(st.integers(0, 2**48), st.integers(0, 127), st.integers(0, 64))
def test_a_sequence_id_encodes_request_sample_and_branch(
    number: int, index: int, branch: int
) -> None:
    sequence = sequence_id(number, index, branch)
    assert 0 <= sequence < 2**63
    assert request_number(sequence) == number
    assert sample_index(sequence) == index
    assert branch_number(sequence) == branch
