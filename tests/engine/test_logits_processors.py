"""Logits processors: what they see, what they may do, and whom their errors concern."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from s1engine import _core
from s1engine.engine.llm import LLM
from s1engine.engine.request import drafting_mode
from s1engine.errors import RequestError, RequestFailedError
from s1engine.outputs import CompletionOutput
from s1engine.runner.interface import NewRequest
from s1engine.sampling_params import LogitsProcessor, SamplingParams, ThinkingBudget

Logits = NDArray[np.float32]
PROMPTS = ["a=3 b=a+4 b?", "q=1 w=q*7 e=w-5 e?", "x?"]


def identity(token_ids: NDArray[np.int32], logits: Logits) -> Logits:
    return logits.copy()


def untouched(token_ids: NDArray[np.int32], logits: Logits) -> None:
    pass


def ban(*ids: int) -> LogitsProcessor:
    def process(token_ids: NDArray[np.int32], logits: Logits) -> None:
        logits[list(ids)] = -np.inf

    return process


def first(llm: LLM, prompt: str, params: SamplingParams) -> CompletionOutput:
    return llm.generate(prompt, params)[0].outputs[0]


@settings(max_examples=12, deadline=None)
@given(
    temperature=st.sampled_from([0.0, 1.0, 3.0]),
    top_k=st.sampled_from([0, 5]),
    repetition=st.sampled_from([1.0, 1.3]),
    bias=st.sampled_from([{}, {20: 3.0}]),
    logprobs=st.sampled_from([None, 3]),
    thinks=st.booleans(),
    process=st.sampled_from([identity, untouched]),
)
def test_processors_that_change_nothing_change_nothing(
    llm: LLM, tight: LLM, temperature: float, top_k: int, repetition: float,
    bias: dict[int, float], logprobs: int | None, thinks: bool, process: LogitsProcessor,
) -> None:  # fmt: skip
    fields: dict[str, Any] = {
        "temperature": temperature, "top_k": top_k, "repetition_penalty": repetition,
        "logit_bias": bias, "logprobs": logprobs, "seed": 7, "max_tokens": 20, "ignore_eos": True,
        "thinking": ThinkingBudget(num_waits=1, answer_reserve=1) if thinks else None,
    }  # fmt: skip
    plain = SamplingParams(**fields)
    processed = SamplingParams(**fields, logits_processors=[process])
    alone = [first(llm, prompt, plain) for prompt in PROMPTS]
    mixed = tight.generate(PROMPTS * 2, [processed] * 3 + [plain] * 3)  # some are preempted
    for want, got in zip(alone * 2, mixed, strict=True):
        assert got.outputs[0].token_ids == want.token_ids
        assert got.outputs[0].logprobs == want.logprobs


def test_a_ban_is_a_bias_of_minus_a_hundred(llm: LLM) -> None:
    fields: dict[str, Any] = {"temperature": 0.7, "seed": 1, "max_tokens": 16, "ignore_eos": True}
    likely = set(first(llm, PROMPTS[0], SamplingParams(**fields)).token_ids)
    biased = SamplingParams(**fields, logit_bias=dict.fromkeys(likely, -100.0))
    banned = SamplingParams(**fields, logits_processors=ban(*likely))
    want, got = (first(llm, PROMPTS[0], params) for params in (biased, banned))
    assert got.token_ids == want.token_ids
    assert not likely & set(got.token_ids)


def test_processors_run_in_order_before_the_other_rules(llm: LLM) -> None:
    """A processor lifts a token, the next one halves what it sees, the bias decides."""

    def lift(token_ids: NDArray[np.int32], logits: Logits) -> None:
        logits[:] = 0
        logits[30] = 40

    def halve(token_ids: NDArray[np.int32], logits: Logits) -> Logits:
        assert logits[30] == 40
        return logits / np.float32(2)

    for bias, winner in ((19.0, 30), (21.0, 31)):
        params = SamplingParams(
            temperature=0, max_tokens=2, ignore_eos=True, logit_bias={31: bias},
            logits_processors=(lift, halve),
        )  # fmt: skip
        assert first(llm, "x?", params).token_ids == [winner, winner]


def test_a_processor_sees_every_token_of_its_sequence(llm: LLM, tight: LLM) -> None:
    """Forced tokens, waits and what a preemption recomputes included; samples see their own."""
    seen: dict[int, list[list[int]]] = {}

    def recorder(number: int) -> LogitsProcessor:
        def process(token_ids: NDArray[np.int32], logits: Logits) -> None:
            assert not token_ids.flags.writeable and token_ids.dtype == np.int32
            seen.setdefault(number, []).append(token_ids.tolist())

        return process

    thinking = ThinkingBudget(max_tokens=12, num_waits=1, answer_reserve=1)
    params = [
        SamplingParams(
            temperature=1, seed=i, max_tokens=40, thinking=thinking, logits_processors=recorder(i)
        )
        for i in range(8)
    ]
    for engine in (tight, llm):
        outputs = engine.generate(PROMPTS[:2] * 4, params)
        for number, output in enumerate(outputs):
            histories = seen.pop(number)
            whole = output.prompt_token_ids + output.outputs[0].token_ids
            assert all(history == whole[: len(history)] for history in histories)
            lengths = [len(history) for history in histories]
            assert lengths == sorted(lengths)
        assert not seen


def raising(token_ids: NDArray[np.int32], logits: Logits) -> None:
    if len(token_ids) % 3 == 0:
        raise KeyError("mine")


def of_shape(token_ids: NDArray[np.int32], logits: Logits) -> Logits:
    return logits[:-1]


def of_dtype(token_ids: NDArray[np.int32], logits: Logits) -> Any:
    return logits.astype(np.float64)


def of_type(token_ids: NDArray[np.int32], logits: Logits) -> Any:
    return logits.tolist()


def nothing_left(token_ids: NDArray[np.int32], logits: Logits) -> None:
    logits[:] = -np.inf


def not_a_number(token_ids: NDArray[np.int32], logits: Logits) -> None:
    logits[3] = np.nan


def infinite(token_ids: NDArray[np.int32], logits: Logits) -> None:
    logits[3] = np.inf


FAULTY = [raising, of_shape, of_dtype, of_type, nothing_left, not_a_number, infinite]


@pytest.mark.parametrize("process", FAULTY)
@pytest.mark.parametrize("max_tokens", [1, 12])
def test_an_error_fails_its_own_request(
    llm: LLM, process: Callable[..., Any], max_tokens: int
) -> None:
    plain = SamplingParams(temperature=1, seed=3, max_tokens=12, ignore_eos=True)
    faulty = SamplingParams(
        temperature=1, seed=3, max_tokens=max_tokens, ignore_eos=True, logits_processors=process
    )
    want = [first(llm, prompt, plain).token_ids for prompt in PROMPTS]
    prompt = [5, 6, 7] if process is raising else PROMPTS[0]
    engine = llm.engine

    def run() -> dict[str, Any]:
        for i, text in enumerate(PROMPTS):
            engine.add_request(engine.make_request(text, plain, request_id=f"plain {i}"))
        engine.add_request(engine.make_request(prompt, faulty, request_id="faulty"))
        events: dict[str, Any] = {}
        while engine.has_unfinished:
            for name, event in engine.step():
                assert name not in events, "one event for each request"
                events[name] = event
        return events

    events = llm.call(lambda _: run())
    error = events.pop("faulty")
    assert isinstance(error, RequestFailedError)
    if process is raising:
        assert isinstance(error.__cause__, KeyError)
    else:
        assert isinstance(error.__cause__, ValueError)
        assert process.__name__ in str(error.__cause__)
    assert [events[f"plain {i}"].outputs[0].token_ids for i in range(3)] == want


@pytest.mark.parametrize("value", [3, "text", [None], {"a": 1}, [identity] * 17])
def test_what_is_not_callable_is_refused(value: Any) -> None:
    with pytest.raises(RequestError) as error:
        SamplingParams(logits_processors=value)
    assert error.value.param == "logits_processors"


def test_requests_with_processors_draft_nothing_and_take_single_steps() -> None:
    params = SamplingParams(logits_processors=[identity])
    assert drafting_mode(params) is _core.Drafting.NEVER
    assert NewRequest(0, params, seed=0, token_ids=[1], prompt_len=1).needs_single_step
