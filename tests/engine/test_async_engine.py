"""The engine behind await: streams, cancellation, failure, many requests at once."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from s1engine.config import EngineConfig
from s1engine.engine import embedded
from s1engine.engine.async_engine import AsyncLLMEngine
from s1engine.engine.llm import LLM
from s1engine.engine.llm_engine import LLMEngine
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
        engine.engine.runner.decode_loop = None
        with pytest.raises(EngineDeadError) as error:
            await output_of(engine)
        assert "gone" in str(error.value.__cause__)
        assert not engine.healthy
        with pytest.raises(EngineDeadError):
            await output_of(engine)

    run_with_engine(test)


# --- the same promises as LLM's ---


def test_streams_of_several_loops_in_one_engine(llm: LLM) -> None:
    """Each loop, in a thread of its own, gets the events of its own requests."""
    chats = [[{"role": "user", "content": f"a={i} b=a+4 b?"}] for i in range(4)]
    wanted = [output.outputs for output in llm.chat(chats, GREEDY)]

    async def ask(engine: AsyncLLMEngine, chat: Any) -> Any:
        events = [event async for event in engine.stream(chat, GREEDY)]
        chunks = [event for event in events if isinstance(event, Chunk)]
        assert [t for chunk in chunks for t in chunk.token_ids] == events[-1].outputs[0].token_ids
        return events[-1].outputs

    async def ask_all(engine: AsyncLLMEngine) -> list[Any]:
        return list(await asyncio.gather(*(ask(engine, chat) for chat in chats)))

    async def test(engine: AsyncLLMEngine) -> None:
        others = [asyncio.to_thread(asyncio.run, ask_all(engine)) for _ in range(2)]
        for found in await asyncio.gather(ask_all(engine), *others):
            assert found == wanted

    run_with_engine(test)


def test_cancel_ids_and_calls() -> None:
    async def test(engine: AsyncLLMEngine) -> None:
        endless = SamplingParams(temperature=1, max_tokens=1500, ignore_eos=True)
        stream = engine.stream(CHAT, endless, request_id="same")
        await anext(stream)
        with pytest.raises(RequestError, match="taken") as error:
            await anext(engine.stream(CHAT, GREEDY, request_id="same"))
        assert error.value.param == "request_id"
        assert await engine.cancel("same") and not await engine.cancel("no such request")
        last = [event async for event in stream][-1]
        assert isinstance(last, RequestOutput) and last.outputs[0].finish_reason == "abort"
        async with contextlib.aclosing(engine.stream(CHAT, GREEDY, request_id="same")) as again:
            await anext(again)
        assert not await engine.call(lambda inner: inner.has_unfinished)
        await engine.call(lambda inner: inner.scheduler.check_integrity())
        with pytest.raises(ZeroDivisionError):
            await engine.call(lambda inner: 1 // 0)

    run_with_engine(test)


def test_it_closes_and_starts_again() -> None:
    async def main() -> None:
        engine = AsyncLLMEngine(dtype="float32", max_num_seqs=4)
        with pytest.raises(EngineDeadError, match=r"start\(\)"):
            await output_of(engine)
        async with engine:
            wanted = await output_of(engine)
            stream = engine.stream(CHAT, SamplingParams(max_tokens=1500, ignore_eos=True))
            await anext(stream)
        with pytest.raises(EngineDeadError, match="closed"):
            async for _ in stream:
                pass
        await engine.shutdown()
        with pytest.raises(EngineDeadError, match=r"start\(\)"):
            await output_of(engine)
        async with engine:
            await engine.start()  # runs already
            assert (await output_of(engine)).outputs == wanted.outputs

    asyncio.run(main())


def test_the_model_loads_off_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other coroutines run meanwhile; a cancelled start leaves no engine."""
    loading, go_on = threading.Event(), threading.Event()

    class SlowEngine(LLMEngine):
        def __init__(self, *args: Any, **options: Any) -> None:
            loading.set()
            assert go_on.wait(60)
            super().__init__(*args, **options)

    monkeypatch.setattr(embedded, "LLMEngine", SlowEngine)

    async def main() -> None:
        engine = AsyncLLMEngine(dtype="float32", max_num_seqs=4)
        starting = asyncio.create_task(engine.start())
        await asyncio.to_thread(loading.wait, 60)
        assert not starting.done()
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        go_on.set()
        while any(thread.name == "s1engine-close" for thread in threading.enumerate()):
            await asyncio.sleep(0.01)
        assert not engine.healthy

    asyncio.run(main())
