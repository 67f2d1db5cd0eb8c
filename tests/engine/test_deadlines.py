"""Deadlines of whole requests, with a clock that ticks once a step: what ends, when, with what."""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from s1engine.config import EngineConfig
from s1engine.engine.llm import LLM
from s1engine.engine.llm_engine import LLMEngine
from s1engine.engine.request import Request
from s1engine.errors import RequestError
from s1engine.outputs import Chunk, RequestOutput
from s1engine.sampling_params import SamplingParams, ThinkingBudget
from tests.engine.test_interrupts import Interrupter


class Clock:
    """Time that passes when a step is computed: ``tick`` seconds each."""

    def __init__(self, engine: LLMEngine, monkeypatch: pytest.MonkeyPatch, tick: float) -> None:
        self.now = 1000.0
        execute = engine.runner.execute

        def slow(step: Any) -> Any:
            self.now += tick
            return execute(step)

        monkeypatch.setattr(engine.runner, "execute", slow)
        monkeypatch.setattr(engine.runner, "decode_loop", None)  # which knows another clock
        monkeypatch.setattr("time.monotonic", lambda: self.now)


@pytest.fixture(scope="module")
def loaded() -> Iterator[LLMEngine]:
    engine = LLMEngine(
        EngineConfig(max_num_seqs=4, max_num_batched_tokens=64, kv_cache_memory_gb=0.02)
    )
    yield engine
    engine.close()


@pytest.fixture
def engine(loaded: LLMEngine) -> Iterator[LLMEngine]:
    """Afterwards nothing of any request is left, deadlines included."""
    free = loaded.scheduler.stats().num_free_blocks
    yield loaded
    loaded.scheduler.check_integrity()
    assert loaded.scheduler.stats().num_free_blocks == free
    assert not loaded.has_unfinished and len(loaded._deadlines) == 0


def run(engine: LLMEngine, clock: Clock) -> dict[str, tuple[float, RequestOutput]]:
    """Steps to the end. Returns when the last step of each request began, and its output."""
    done = {}
    for _ in range(2000):
        if not engine.has_unfinished:
            return done
        began = clock.now
        for name, event in engine.step():
            if isinstance(event, RequestOutput):
                done[name] = began, event
    raise AssertionError("the engine does not finish")


def plain(**fields: Any) -> SamplingParams:
    return SamplingParams(temperature=0, ignore_eos=True, max_tokens=40, **fields)


def add(engine: LLMEngine, text: str, params: SamplingParams, stream: bool = False) -> Request:
    request = engine.make_request(text, params, enable_thinking=False, stream=stream)
    engine.add_request(request)
    return request


def test_a_request_ends_at_its_deadline_with_its_output_so_far(
    engine: LLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first step that begins at the deadline or after it, though others wait and run."""
    clock = Clock(engine, monkeypatch, 1.0)
    whole = add(engine, "a=3 b=a+4 c=", plain())
    tokens = run(engine, clock)[whole.request_id][1].outputs[0].token_ids
    begin = clock.now
    requests = {
        seconds: add(engine, "a=3 b=a+4 c=", plain(deadline_ms=1000 * seconds))
        for seconds in (0, 1, 3, 7, 12, 20, 33)
    }
    done = run(engine, clock)
    for seconds, request in requests.items():
        at, output = done[request.request_id]
        (sample,) = output.outputs
        assert sample.finish_reason == "deadline"
        assert at == begin + seconds
        assert sample.token_ids == tokens[: len(sample.token_ids)]
        assert len(sample.token_ids) <= seconds
    assert len(done[requests[3].request_id][1].outputs[0].token_ids) > 0


def test_no_deadline_passes_unnoticed_while_another_prompt_is_computed(
    engine: LLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(engine, monkeypatch, 1.0)
    begin = clock.now
    add(engine, "b=3 " * 200, plain())
    request = add(engine, "a=3", plain(deadline_ms=2000))
    at, output = run(engine, clock)[request.request_id]
    assert at == begin + 2
    assert output.outputs[0].finish_reason == "deadline"


def test_a_first_token_deadline_ends_requests_without_a_token(
    engine: LLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(engine, monkeypatch, 1.0)
    begin = clock.now
    requests = [add(engine, "a=3 b=", plain(first_token_deadline_ms=3000)) for _ in range(7)]
    done = run(engine, clock)
    for i, request in enumerate(requests):
        at, output = done[request.request_id]
        (sample,) = output.outputs
        if i < 4:  # rows
            assert sample.finish_reason == "length" and len(sample.token_ids) == 40
        else:
            assert sample.finish_reason == "deadline" and sample.token_ids == []
            assert at == begin + 3


def test_a_request_that_waits_for_its_grammar_ends_too(
    engine: LLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    Clock(engine, monkeypatch, 1.0)
    monkeypatch.setattr(engine._pending_grammars, "pop_ready", lambda wait: [])
    request = add(engine, "a=3", SamplingParams(regex="[0-9]+", n=2, deadline_ms=0))
    ((name, output),) = engine.step()
    assert name == request.request_id and isinstance(output, RequestOutput)
    assert [sample.finish_reason for sample in output.outputs] == ["deadline"] * 2


def test_all_samples_and_checkpoints_end(
    engine: LLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(engine, monkeypatch, 1.0)
    for seconds in (0, 1, 2, 3, 4):
        thinking = ThinkingBudget(checkpoints=(0, 2, 5, 400), min_tokens=0)
        params = SamplingParams(thinking=thinking, n=3, deadline_ms=1000 * seconds, seed=1)
        request = engine.make_request([{"role": "user", "content": "a=3 b=a+4 b?"}], params)
        engine.add_request(request)
        _, output = run(engine, clock)[request.request_id]
        assert len(output.outputs) == 3
        assert "deadline" in [sample.finish_reason for sample in output.outputs]


def test_a_stream_ends_with_a_chunk_that_says_so(
    engine: LLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    Clock(engine, monkeypatch, 1.0)
    add(engine, "a=3 b=", plain(deadline_ms=5000), stream=True)
    chunks, text = [], ""
    while engine.has_unfinished:
        for _, event in engine.step():
            if isinstance(event, Chunk):
                chunks.append(event)
            else:
                assert isinstance(event, RequestOutput)
                text = event.outputs[0].text
    assert chunks[-1].finish_reason == "deadline"
    assert "".join(chunk.text for chunk in chunks) == text


def test_thinking_ends_early_enough_for_the_answer(
    engine: LLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At one second a token, an answer of at most 10 tokens is reserved 10 seconds."""
    clock = Clock(engine, monkeypatch, 1.0)
    thinking = ThinkingBudget(num_waits=50, wait_text="", answer_reserve=10)
    for seconds in (40, 60, 90):
        params = SamplingParams(temperature=0, thinking=thinking, deadline_ms=1000 * seconds)
        begin = clock.now
        request = engine.make_request([{"role": "user", "content": "a=3 b=a+4 b?"}], params)
        engine.add_request(request)
        at, output = run(engine, clock)[request.request_id]
        (sample,) = output.outputs
        assert sample.thinking is not None and sample.thinking.end_reason == "deadline"
        assert seconds / 3 < sample.thinking.tokens < seconds - 10
        assert sample.text.startswith("Final Answer:")
        assert sample.finish_reason == "stop" and at < begin + seconds


def test_arrival_counts_from_the_request_not_from_its_turn(
    engine: LLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(engine, monkeypatch, 1.0)
    request = engine.make_request("a=3", plain(deadline_ms=1500), enable_thinking=False)
    clock.now += 2  # in a queue of the caller
    engine.add_request(request)
    _, output = run(engine, clock)[request.request_id]
    assert output.outputs[0].finish_reason == "deadline" and output.outputs[0].token_ids == []


@pytest.mark.parametrize("name", ["deadline_ms", "first_token_deadline_ms"])
@pytest.mark.parametrize("value", [-1, 1.5, True, "5"])
def test_a_deadline_is_a_number_of_milliseconds(name: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name


def test_an_embedded_engine_returns_the_partial_output(llm: LLM) -> None:
    (output,) = llm.generate(["a=3 b="], SamplingParams(deadline_ms=0))
    assert output.outputs[0].finish_reason == "deadline"


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(1, 250))
def test_an_interrupted_expiry_is_completed(engine: LLMEngine, at: int) -> None:
    """By the next step: one last event for each request, its partial output or its failure."""
    params = SamplingParams(temperature=0, n=2, deadline_ms=0)
    names = ["first", "second"]
    for name, text in zip(names, ("a=3", "b=4"), strict=True):
        engine.add_request(engine.make_request(text, params, request_id=name))
    events: list[Any] = Interrupter(at).during(engine.step)[1] or []
    while engine.has_unfinished:
        events += engine.step()
    events += engine.step()
    assert sorted(name for name, _ in events) == sorted(names)
    failures = [event for _, event in events if not isinstance(event, RequestOutput)]
    assert len(failures) <= 1
    for _, event in events:
        if isinstance(event, RequestOutput):
            assert [sample.finish_reason for sample in event.outputs] == ["deadline"] * 2
