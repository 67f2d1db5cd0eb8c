"""The engine in a process of its own: its answers, and the effect on it and on its requests when
one side is slow, closes or is killed."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from s1engine.config import EngineConfig
from s1engine.engine.llm import LLM
from s1engine.engine.process_client import ProcessEngineClient
from s1engine.engine.request import Request
from s1engine.errors import EngineDeadError, ModelError, RequestError
from s1engine.eval.arithmetic import generate
from s1engine.outputs import CheckpointOutput, Chunk, RequestOutput, Timing
from s1engine.sampling_params import SamplingParams, ThinkingBudget

QUESTIONS = [[{"role": "user", "content": item.question}] for item in generate(5, 8)]
ENDLESS = SamplingParams(
    temperature=1, seed=3, max_tokens=1500, ignore_eos=True, logit_bias={1: -100, 2: -100}
)
PARAMS = [
    SamplingParams(temperature=0, max_tokens=80),
    SamplingParams(temperature=1.1, seed=4, max_tokens=80, n=3),
    SamplingParams(temperature=0, max_tokens=80, stop=("Answer", "9")),
    SamplingParams(temperature=1, seed=1, max_tokens=80, logprobs=2),
    SamplingParams(temperature=0, max_tokens=10),
    SamplingParams(temperature=0, max_tokens=90, thinking=ThinkingBudget(num_waits=2)),
    SamplingParams(
        temperature=0, max_tokens=120, thinking=ThinkingBudget(max_tokens=30, checkpoints=(0, 4, 9))
    ),
]
# Its end depends on when its checkpoints answer, and so on other requests.
EARLY = SamplingParams(
    temperature=0,
    max_tokens=200,
    thinking=ThinkingBudget(
        max_tokens=90, num_waits=8, checkpoints=tuple(range(10, 80, 5)), early_exit=2
    ),
)


def run_with_engine(test: Callable[[ProcessEngineClient], Awaitable[None]]) -> None:
    async def main() -> None:
        config = EngineConfig(dtype="float32", max_num_seqs=16, max_num_batched_tokens=256)
        engine = ProcessEngineClient(config)
        await engine.start()
        try:
            await asyncio.wait_for(test(engine), 120)
        finally:
            await engine.shutdown()
        with pytest.raises(ProcessLookupError):
            os.kill(engine.pid, 0)

    asyncio.run(main())


def compile_request(engine: ProcessEngineClient, index: int, *, stream: bool = False) -> Request:
    return engine.compiler.compile(QUESTIONS[index], PARAMS[index], stream=stream)


async def collect(engine: ProcessEngineClient, request: Request) -> tuple[list[Any], RequestOutput]:
    async with contextlib.aclosing(engine.generate_request(request)) as stream:
        events = [event async for event in stream]
    assert isinstance(events[-1], RequestOutput)
    return events[:-1], events[-1]


def comparable(output: RequestOutput) -> RequestOutput:
    """Without the parts that depend on time, names and other requests, such as the last digits of
    log-probabilities."""
    outputs = [replace(sample, logprobs=None) for sample in output.outputs]
    usage = replace(output.usage, cached_tokens=0)
    return replace(output, request_id="", timing=Timing(0, 0, 0), usage=usage, outputs=outputs)


def logprobs(output: RequestOutput) -> list[float]:
    entries = [entry for sample in output.outputs for entry in sample.logprobs or ()]
    return [value for e in entries for value in (e.logprob, *(p for _, p in e.top))]


def check_stream(events: list[Any], output: RequestOutput) -> None:
    for sample in output.outputs:
        own = [e for e in events if isinstance(e, Chunk) and e.index == sample.index]
        assert "".join(chunk.text for chunk in own) == sample.text
        assert "".join(chunk.reasoning for chunk in own) == (sample.reasoning or "")
        assert [t for chunk in own for t in chunk.token_ids] == sample.token_ids
        if sample.logprobs is not None:
            assert [e for chunk in own for e in chunk.logprobs or ()] == sample.logprobs
        assert [chunk.finish_reason for chunk in own if chunk.finish_reason] == [
            sample.finish_reason
        ]
    checkpoints = [e for e in events if isinstance(e, CheckpointOutput)]
    assert sorted(c.budget for c in checkpoints) == [c.budget for c in output.checkpoints]


async def until_free(engine: ProcessEngineClient) -> None:
    last = engine.stats()
    while engine.stats() is last or engine.stats().num_free_blocks < engine.stats().num_blocks:
        await asyncio.sleep(0.01)
    assert engine.stats().num_running == engine.stats().num_waiting == 0


def test_it_answers_like_the_engine_in_this_process(llm: LLM) -> None:
    chats = list(zip(QUESTIONS, PARAMS, strict=False))
    wanted = [llm.chat(chat, params, progress=False)[0] for chat, params in chats]  # each alone
    early = llm.chat(QUESTIONS[7], EARLY, progress=False)[0]

    async def test(engine: ProcessEngineClient) -> None:
        requests = [
            compile_request(engine, i, stream=stream) for i in range(7) for stream in (True, False)
        ]
        got = await asyncio.gather(*(collect(engine, request) for request in requests))
        for request, (events, output) in zip(requests, got, strict=True):
            expected = wanted[PARAMS.index(request.params)]
            timing = output.timing
            assert 0 <= timing.queue_s <= timing.ttft_s <= timing.total_s
            assert comparable(output) == comparable(expected)
            assert logprobs(output) == pytest.approx(logprobs(expected), abs=1e-3)
            if request.stream:
                check_stream(events, output)
            else:
                assert events == []
        await until_free(engine)
        _, output = await collect(engine, engine.compiler.compile(QUESTIONS[7], EARLY))
        assert comparable(output) == comparable(early)
        assert early.outputs[0].thinking.end_reason == "converged"  # type: ignore[union-attr]
        await slow_reader(engine)
        await closed_streams(engine)
        await ends_thinking(engine)
        await refuses_functions(engine)

    run_with_engine(test)


async def slow_reader(engine: ProcessEngineClient) -> None:
    """An unread stream is joined, and delays no other request."""
    request = engine.compiler.compile(
        QUESTIONS[0], SamplingParams(temperature=0, max_tokens=300, ignore_eos=True), stream=True
    )
    stream = engine.generate_request(request)
    events: list[Any] = [await anext(stream)]
    for _ in range(3):
        await collect(engine, compile_request(engine, 0))
    await until_free(engine)  # everything is computed though it was not read
    events += [event async for event in stream]
    check_stream(events[:-1], events[-1])
    chunks = events[:-1]
    assert not any(0 < sum(chunk.forced) < len(chunk.forced) - 1 for chunk in chunks)
    assert len(events) < 8 < len(events[-1].outputs[0].token_ids) == 300


async def closed_streams(engine: ProcessEngineClient) -> None:
    """Closed streams and cancelled tasks leave nothing behind."""
    stream = engine.generate_request(engine.compiler.compile(QUESTIONS[1], ENDLESS, stream=True))
    await anext(stream)
    await stream.aclose()
    task = asyncio.create_task(collect(engine, engine.compiler.compile(QUESTIONS[1], ENDLESS)))
    await asyncio.sleep(0.05)
    task.cancel()
    await until_free(engine)
    assert not engine._streams and not engine._numbers


async def ends_thinking(engine: ProcessEngineClient) -> None:
    request = engine.compiler.compile(QUESTIONS[2], ENDLESS, stream=True)
    output = None
    async for event in engine.generate_request(request):
        assert engine.end_thinking(request.request_id)
        output = event
    assert isinstance(output, RequestOutput)
    thinking = output.outputs[0].thinking
    assert thinking is not None and thinking.end_reason == "client" and thinking.tokens < 1400
    assert not engine.end_thinking(request.request_id)


async def refuses_functions(engine: ProcessEngineClient) -> None:
    params = SamplingParams(logits_processors=lambda token_ids, logits: None)
    with pytest.raises(RequestError) as error:
        await collect(engine, engine.compiler.compile("x?", params))
    assert error.value.param == "logits_processors"


def test_a_killed_engine_ends_its_streams() -> None:
    async def test(engine: ProcessEngineClient) -> None:
        died = asyncio.Event()
        engine.on_failure = died.set
        streams = [
            engine.generate_request(engine.compiler.compile(QUESTIONS[i], ENDLESS, stream=True))
            for i in range(3)
        ]
        for stream in streams:
            await anext(stream)
        assert engine.healthy
        os.kill(engine.pid, signal.SIGKILL)
        for stream in streams:
            with pytest.raises(EngineDeadError):
                async for _ in stream:
                    pass
        await died.wait()
        assert not engine.healthy and engine.failure is not None
        with pytest.raises(EngineDeadError):
            await collect(engine, compile_request(engine, 0))

    run_with_engine(test)


@pytest.mark.parametrize(
    ("options", "error"),
    [({"model": "MISSING"}, ModelError), ({"max_model_len": 10**6}, RequestError)],
)
def test_a_model_that_cannot_be_loaded_is_an_error_here(
    tmp_path: Path, options: dict[str, Any], error: type[Exception]
) -> None:
    if "model" in options:
        options = {"model": str(tmp_path)}
    with pytest.raises(error):
        ProcessEngineClient(EngineConfig(**options))
