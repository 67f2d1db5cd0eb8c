"""Decode steps without Python: the same outputs as steps through Python, bit for bit, and the
interpreter's lock is free meanwhile."""

import math
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s1engine import _core
from s1engine.config import BUNDLED_MODEL, EngineConfig
from s1engine.engine.llm_engine import LLMEngine
from s1engine.eval.arithmetic import generate
from s1engine.models.model_config import ModelConfig
from s1engine.outputs import RequestOutput
from s1engine.runner.decode_loop import DecodeLoop
from s1engine.sampling_params import SamplingParams, ThinkingBudget

QUESTIONS = [question.question for question in generate(5, 12)]


class LoopSpy:
    """Counts how the steps of a loop end."""

    def __init__(self, loop: DecodeLoop) -> None:
        self._loop = loop
        self.interrupt = loop.interrupt
        self.num_decoded = self.num_planned = self.num_masked = 0
        self.entered = threading.Event()

    @property
    def logprobs(self) -> bytes:
        return self._loop.logprobs

    def run(
        self,
        scheduler: _core.Scheduler,
        seconds: float,
        time_to_deadline: float,
        allowed_tokens: dict[int, np.ndarray],
    ) -> bytes | list[int]:
        self.entered.set()
        self.num_masked += bool(allowed_tokens)
        planned = self._loop.run(scheduler, seconds, time_to_deadline, allowed_tokens)
        if isinstance(planned, bytes):
            self.num_decoded += 1
        else:
            self.num_planned += 1
        return planned


def make_engine(**options: object) -> tuple[LLMEngine, LoopSpy]:
    config = EngineConfig(device="cpu", dtype="float32", **options)  # type: ignore[arg-type]
    engine = LLMEngine(config)
    assert engine.runner.decode_loop is not None
    spy = LoopSpy(engine.runner.decode_loop)
    engine.runner.decode_loop = spy  # type: ignore[assignment]
    return engine, spy


@pytest.fixture(scope="module", params=["ample", "tight", "drafts"])
def native(request: pytest.FixtureRequest) -> Iterator[tuple[LLMEngine, LoopSpy]]:
    """Engines with ample memory; with little of it, so that it preempts; with drafts."""
    token = ModelConfig.from_dir(BUNDLED_MODEL).kv_bytes_per_token(torch.float32)
    tight = {
        "max_num_seqs": 6,
        "max_num_batched_tokens": 24,
        "max_model_len": 448,
        "kv_cache_memory_gb": 672 * token / 2**30,
    }
    options = {"ample": {}, "tight": tight, "drafts": {"num_speculative_tokens": 3}}
    engine, spy = make_engine(**{"max_num_seqs": 8, "max_model_len": 448, **options[request.param]})
    yield engine, spy
    engine.close()


budgets = st.none() | st.one_of(
    st.builds(ThinkingBudget, max_tokens=st.integers(0, 60)),
    st.builds(ThinkingBudget, num_waits=st.integers(0, 2)),
    st.just(ThinkingBudget(checkpoints=(8, 24))),
)
requests = st.lists(
    st.tuples(
        st.integers(0, len(QUESTIONS) - 1),
        st.booleans(),  # does it stream?
        st.builds(
            SamplingParams,
            temperature=st.sampled_from([0.0, 1.0]),
            top_p=st.sampled_from([1.0, 0.9]),
            seed=st.integers(0, 9),
            max_tokens=st.integers(20, 90),
            n=st.sampled_from([1, 1, 2]),
            logprobs=st.sampled_from([None, None, 1, 3]),
            frequency_penalty=st.sampled_from([0.0, 0.0, 0.7]),
            logit_bias=st.sampled_from([{}, {}, {65: 3.0}]),
            stop=st.sampled_from([(), (), ("1",)]),
            regex=st.sampled_from([None, None, "[ab]{3,9}", "[0-9]{12,}"]),
            thinking=budgets,
        ),
    ),
    min_size=1,
    max_size=6,
)


def facts(output: RequestOutput) -> list[object]:
    samples = [*output.outputs, *(checkpoint.output for checkpoint in output.checkpoints)]
    return [
        (s.token_ids, s.text, s.reasoning, s.forced, s.logprobs, s.finish_reason, s.thinking)
        for s in samples
    ]


def outputs(
    engine: LLMEngine, asked: list[tuple[int, bool, SamplingParams]], max_seconds: float
) -> list[list[object]]:
    """Of all requests, which join step by step, so that batches of every size decode."""
    engine.scheduler.clear_cache()
    waiting = [
        engine.make_request(
            [{"role": "user", "content": QUESTIONS[question]}], params, stream=stream
        )
        for question, stream, params in asked
    ]
    ids = [request.request_id for request in waiting]
    ends: dict[str, list[object]] = {}
    while waiting or engine.has_unfinished:
        if waiting:
            engine.add_request(waiting.pop())
        for request_id, event in engine.step(max_seconds):
            assert not isinstance(event, Exception)
            if isinstance(event, RequestOutput):
                ends[request_id] = facts(event)
    engine.scheduler.check_integrity()
    return [ends[request_id] for request_id in ids]


@settings(max_examples=5)
@given(requests)
def test_steps_without_python_give_the_same_outputs(
    native: tuple[LLMEngine, LoopSpy], asked: list[tuple[int, bool, SamplingParams]]
) -> None:
    engine, loop = native
    engine.runner.decode_loop = None
    expected = outputs(engine, asked, 0.0)
    engine.runner.decode_loop = loop  # type: ignore[assignment]
    for max_seconds in (0.0, math.inf):
        assert outputs(engine, asked, max_seconds) == expected


@pytest.fixture(scope="module")
def alone() -> Iterator[tuple[LLMEngine, LoopSpy]]:
    engine, spy = make_engine(max_num_seqs=2, max_model_len=2048)
    yield engine, spy
    engine.close()


def start(engine: LLMEngine, max_tokens: int, *, stream: bool = False) -> None:
    """Starts a request and computes its prompt, and records its decode step."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    engine.add_request(engine.make_request("Count.", params, stream=stream))
    engine.step()
    engine.step()


def test_steps_that_report_nothing_are_one_call(alone: tuple[LLMEngine, LoopSpy]) -> None:
    engine, loop = alone
    start(engine, 40)
    calls = loop.num_decoded
    (event,) = engine.step(math.inf)
    assert isinstance(event[1], RequestOutput) and len(event[1].outputs[0].token_ids) == 40
    assert loop.num_decoded == calls + 1 and not engine.has_unfinished


@pytest.mark.parametrize("rule", [{"logprobs": 3}, {"regex": "[0-9]{40}"}])
def test_log_probabilities_and_grammars_need_no_python(
    alone: tuple[LLMEngine, LoopSpy], rule: dict[str, Any]
) -> None:
    engine, loop = alone
    params = SamplingParams(temperature=1, seed=3, max_tokens=30, ignore_eos=True, **rule)
    sampled = engine.scheduler.stats().num_sampled_tokens
    engine.add_request(engine.make_request("1, 2, 3", params))
    while engine.scheduler.stats().num_sampled_tokens < sampled + 2:  # prompt and recording
        engine.step()
    calls, steps = loop.num_decoded, engine.scheduler.stats().num_steps
    masked, planned = loop.num_masked, loop.num_planned
    while engine.has_unfinished:
        engine.step(math.inf)
    natively = engine.scheduler.stats().num_steps - steps
    assert natively > 20 and loop.num_decoded - calls == natively
    assert loop.num_planned == planned
    assert loop.num_masked - masked == ("regex" in rule) * natively


@pytest.mark.parametrize("stream", [False, True])
def test_without_time_a_call_is_one_step(alone: tuple[LLMEngine, LoopSpy], stream: bool) -> None:
    engine, loop = alone
    start(engine, 20, stream=stream)
    before = engine.scheduler.stats().num_steps
    calls = loop.num_decoded
    while engine.has_unfinished:
        engine.step(math.inf if stream else 0.0)  # every step of a stream reports
    assert engine.scheduler.stats().num_steps - before == loop.num_decoded - calls == 18


def test_other_threads_run_during_a_call_and_may_end_it(alone: tuple[LLMEngine, LoopSpy]) -> None:
    """The other thread never gets the interpreter's lock by force here, only if it is released."""
    engine, loop = alone
    interval = sys.getswitchinterval()
    sys.setswitchinterval(100)
    try:
        ended_early = any(_interrupted_before_the_end(engine, loop) for _ in range(20))
    finally:
        sys.setswitchinterval(interval)
    assert ended_early


def _interrupted_before_the_end(engine: LLMEngine, loop: LoopSpy) -> bool:
    start(engine, 2000)
    loop.entered.clear()

    def interrupt() -> None:
        loop.entered.wait()
        engine.interrupt()

    other = threading.Thread(target=interrupt)
    other.start()
    engine.step(math.inf)
    early = engine.has_unfinished
    other.join()
    while engine.has_unfinished:
        engine.step(math.inf)
    return early


def test_a_deadline_ends_a_call(alone: tuple[LLMEngine, LoopSpy]) -> None:
    engine, _ = alone
    budget = ThinkingBudget(deadline_ms=30, num_waits=1000)  # it never ends by itself
    params = SamplingParams(temperature=0, max_tokens=1900, thinking=budget)
    chat = [{"role": "user", "content": QUESTIONS[0]}]
    engine.add_request(engine.make_request(chat, params))
    events = []
    while engine.has_unfinished:
        events += engine.step(math.inf)
    (output,) = [event for _, event in events if isinstance(event, RequestOutput)]
    thinking = output.outputs[0].thinking
    assert thinking is not None and thinking.end_reason == "deadline"
