"""The engine behind await: streams, cancellation, failure, many requests at once."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from s1engine.config import EngineConfig
from s1engine.engine.async_engine import AsyncLLMEngine
from s1engine.engine.llm import LLM
from s1engine.errors import EngineDeadError, RequestError
from s1engine.outputs import Chunk, RequestOutput
from s1engine.sampling_params import SamplingParams

CHAT: list[dict[str, Any]] = [{"role": "user", "content": "a=3 b=a+4 c=b*2 c?"}]
GREEDY = SamplingParams(temperature=0, max_tokens=80)


@asynccontextmanager
async def running() -> AsyncIterator[AsyncLLMEngine]:
    config = EngineConfig(dtype="float32", max_num_seqs=16, max_num_batched_tokens=256)
    engine = AsyncLLMEngine(config)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.shutdown()


def run_with_engine(test: Callable[[AsyncLLMEngine], Awaitable[None]]) -> None:
    async def main() -> None:
        async with running() as engine:
            await asyncio.wait_for(test(engine), 60)

    asyncio.run(main())


async def output_of(engine: AsyncLLMEngine, params: SamplingParams = GREEDY) -> RequestOutput:
    events = [event async for event in engine.generate(CHAT, params)]
    assert len(events) == 1 and isinstance(events[0], RequestOutput)
    return events[0]


async def until_idle(engine: AsyncLLMEngine) -> None:
    while engine.engine.has_unfinished:
        await asyncio.sleep(0.01)


def test_many_at_once_equal_the_offline_engine(llm: LLM) -> None:
    wanted = llm.chat(CHAT, GREEDY, progress=False)[0].outputs[0]

    async def test(engine: AsyncLLMEngine) -> None:
        outputs = await asyncio.gather(*(output_of(engine) for _ in range(20)))
        assert all(output.outputs[0] == wanted for output in outputs)

    run_with_engine(test)


def test_a_stream_joins_to_the_output() -> None:
    async def test(engine: AsyncLLMEngine) -> None:
        events = [event async for event in engine.generate(CHAT, GREEDY, stream=True)]
        last = events.pop()
        assert isinstance(last, RequestOutput) and len(events) > 5
        chunks = [event for event in events if isinstance(event, Chunk)]
        assert "".join(chunk.text for chunk in chunks) == last.outputs[0].text
        assert "".join(chunk.reasoning for chunk in chunks) == last.outputs[0].reasoning

    run_with_engine(test)


def test_closing_a_stream_aborts_it_and_no_other(llm: LLM) -> None:
    wanted = llm.chat(CHAT, GREEDY, progress=False)[0].outputs[0]

    async def test(engine: AsyncLLMEngine) -> None:
        canary = asyncio.create_task(output_of(engine))
        endless = SamplingParams(temperature=1, max_tokens=1500, ignore_eos=True, n=3)
        stream = engine.generate(CHAT, endless, stream=True)
        await anext(stream)
        await stream.aclose()
        task = asyncio.create_task(output_of(engine, endless))
        await asyncio.sleep(0.1)
        task.cancel()
        assert (await canary).outputs[0] == wanted
        await until_idle(engine)
        engine.engine.scheduler.check_integrity()
        stats = engine.engine.scheduler.stats()
        assert stats.num_free_blocks == engine.engine.runner.num_blocks

    run_with_engine(test)


def test_a_bad_request_is_refused_before_it_starts() -> None:
    async def test(engine: AsyncLLMEngine) -> None:
        with pytest.raises(RequestError):
            await output_of(engine, SamplingParams(logit_bias={10**6: 1.0}))
        assert (await output_of(engine)).outputs[0].finish_reason == "stop"

    run_with_engine(test)


def test_end_thinking_reaches_a_live_request() -> None:
    async def test(engine: AsyncLLMEngine) -> None:
        params = SamplingParams(
            temperature=1, seed=1, max_tokens=1500, logit_bias={1: -100, 2: -100}
        )
        request = engine.engine.make_request(CHAT, params, stream=True)
        sample = None
        async for event in engine.generate_request(request):
            engine.end_thinking(request.request_id)
            if isinstance(event, Chunk) and event.text:
                break
            sample = event
        assert isinstance(sample, Chunk)
        assert not engine.end_thinking("no such request")

    run_with_engine(test)


def test_a_failing_step_ends_all_streams_and_health(caplog: pytest.LogCaptureFixture) -> None:
    async def test(engine: AsyncLLMEngine) -> None:
        def fail(step: Any) -> Any:
            raise RuntimeError("the device is gone")

        assert engine.healthy
        engine.engine.runner.execute = fail  # type: ignore[method-assign, assignment]
        with pytest.raises(EngineDeadError) as error:
            await output_of(engine)
        assert "gone" in str(error.value.__cause__)
        assert not engine.healthy
        with pytest.raises(EngineDeadError):
            await output_of(engine)

    run_with_engine(test)
