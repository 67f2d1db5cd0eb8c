"""A request that fails by a bug of ours fails alone: its stream gets an error, the others go on as
if it had never been there, and nothing of it is left. A grammar that is being compiled holds up
nobody."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher

from s1engine.config import EngineConfig
from s1engine.engine import process_client
from s1engine.engine.async_engine import AsyncLLMEngine
from s1engine.engine.grammar import GrammarCompiler
from s1engine.engine.llm import LLM
from s1engine.engine.process_client import ProcessEngineClient
from s1engine.errors import EngineDeadError, RequestError, RequestFailedError
from s1engine.outputs import Chunk, RequestOutput
from s1engine.sampling_params import SamplingParams, ThinkingBudget
from s1engine.server.app import create_app
from tests.engine import faults

CHAT: list[dict[str, Any]] = [{"role": "user", "content": "a=3 b=a+4 c=b*2 c?"}]
ROOT = Path(__file__).resolve().parents[2]
GOOD = SamplingParams(temperature=0, max_tokens=60)
REGEX = '{"grammars":[{"lark_grammar":"start: /[0-9]{1,3}/"}]}'
FATED = SamplingParams(
    temperature=1,
    seed=1,
    n=3,
    max_tokens=90,
    stop=("zzz",),
    grammar=REGEX,
    thinking=ThinkingBudget(max_tokens=20, checkpoints=(0, 5)),
)
OPTIONS: dict[str, Any] = {"dtype": "float32", "max_num_seqs": 16, "max_num_batched_tokens": 256}
# Minutes to compile, or gigabytes.
PATTERNS = [{"type": "string", "pattern": f".*a.{{{i}}}b"} for i in range(3, 40)]
LARGE = 10**18
BOMBS = [
    {"allOf": PATTERNS},
    {"type": "integer", "minimum": -LARGE, "maximum": LARGE, "multipleOf": 999983},
]


@pytest.fixture(autouse=True)
def faulty(monkeypatch: pytest.MonkeyPatch) -> None:
    faults.install(monkeypatch)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from([0, *faults.ALONE]), min_size=1, max_size=6), st.integers(0, 40))
def test_it_fails_alone_and_leaves_nothing(llm: LLM, fates: list[int], late: int) -> None:
    engine = llm.engine
    alone = llm.chat(CHAT, GOOD, progress=False)[0].outputs
    requests = [
        engine.make_request(CHAT, FATED if fate else GOOD, priority=fate, stream=fate % 2 == 0)
        for fate in fates
    ]
    for request in requests[1:]:
        engine.add_request(request)
    ended: dict[str, Any] = {}
    steps = 0
    while engine.has_unfinished or steps <= late:
        if steps == late:
            engine.add_request(requests[0])
        steps += 1
        for name, event in engine.step():
            assert name not in ended, "an event after the end"
            if isinstance(event, RequestOutput | RequestFailedError):
                ended[name] = event
    for request, fate in zip(requests, fates, strict=True):
        end = ended.pop(request.request_id)
        if fate:
            assert isinstance(end, RequestFailedError) and isinstance(end.__cause__, faults.Bug)
        else:
            assert isinstance(end, RequestOutput) and end.outputs == alone
    assert not ended and not engine._sequences and not engine._output_processor._builders
    assert not engine._output_processor.has_grammar
    engine.scheduler.check_integrity()
    assert engine.scheduler.stats().num_free_blocks == engine.runner.num_blocks


def test_a_request_whose_id_is_taken_does_not_end_the_first(llm: LLM) -> None:
    first = llm.engine.make_request(CHAT, GOOD)
    llm.engine.add_request(first)
    llm.engine.add_request(first)
    events = []
    while llm.engine.has_unfinished:
        events += [event for _, event in llm.engine.step()]
    failure, output = events
    assert isinstance(failure, RequestFailedError) and isinstance(output, RequestOutput)


def test_offline_it_is_raised_and_nothing_is_left(llm: LLM) -> None:
    with pytest.raises(RequestFailedError):
        llm.chat([CHAT, CHAT], GOOD, progress=False, priority=faults.SEAT)
    assert not llm.engine.has_unfinished
    assert llm.chat(CHAT, GOOD, progress=False)[0].outputs[0].text


def test_across_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_client, "PROCESS", "tests.engine.faults")
    monkeypatch.chdir(ROOT)

    async def main() -> None:
        engine = ProcessEngineClient(EngineConfig(**OPTIONS))
        await engine.start()

        async def ask(fate: int) -> Any:
            params = FATED if fate else GOOD
            request = engine.compiler.compile(CHAT, params, priority=fate, stream=True)
            return [event async for event in engine.generate_request(request)][-1]

        fates = [0, *faults.ALONE, 0]
        ends = await asyncio.gather(*map(ask, fates), return_exceptions=True)
        for fate, end in zip(fates, ends, strict=True):
            assert isinstance(end, RequestFailedError if fate else RequestOutput), (fate, end)
        assert ends[0].outputs == ends[-1].outputs and engine.healthy
        with pytest.raises(EngineDeadError) as died:  # what concerns all is still told to all
            await ask(faults.STEP)
        assert "Bug" in str(died.value.__cause__) and not engine.healthy
        await engine.shutdown()

    asyncio.run(main())


def test_over_http_it_is_an_error_of_one_request() -> None:
    async def main() -> None:
        engine = AsyncLLMEngine(EngineConfig(**OPTIONS))
        await engine.start()
        transport = httpx.ASGITransport(create_app(engine))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
            body = {"messages": CHAT, "max_tokens": 60, "priority": faults.ADD}
            whole = await http.post("/v1/chat/completions", json=body)
            assert whole.status_code == 500
            assert whole.json()["error"]["code"] == "request_failed"
            stream = await http.post("/v1/chat/completions", json={**body, "stream": True})
            assert '"request_failed"' in stream.text and stream.text.endswith("data: [DONE]\n\n")
            assert (await http.post("/v1/completions", json={"prompt": "a"})).status_code == 200
            assert (await http.get("/health")).status_code == 200
            metrics = (await http.get("/metrics")).text
            assert 'requests_refused_total{code="request_failed",model_name="s1-nano"} 2' in metrics
        await engine.shutdown()

    asyncio.run(main())


# --- grammars ---


def test_streams_go_on_while_a_grammar_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    compiling, go_on = threading.Event(), threading.Event()
    compile_grammar = GrammarCompiler._compile

    def slowly(self: GrammarCompiler, grammar: str) -> Any:
        compiling.set()
        assert go_on.wait(60)
        return compile_grammar(self, grammar)

    monkeypatch.setattr(GrammarCompiler, "_compile", slowly)
    guided = SamplingParams(temperature=0, max_tokens=60, grammar=REGEX)

    async def main() -> None:
        engine = AsyncLLMEngine(EngineConfig(**OPTIONS))
        await engine.start()

        async def ask(params: SamplingParams) -> Any:
            return [event async for event in engine.generate(CHAT, params)][-1]

        waiting = asyncio.ensure_future(ask(guided))
        hurried = engine.engine.make_request(CHAT, guided)
        ended = asyncio.ensure_future(anext(engine.generate_request(hurried)))
        leaver = asyncio.ensure_future(ask(guided))
        await asyncio.to_thread(compiling.wait, 60)
        assert (await ask(GOOD)).outputs[0].finish_reason  # a whole answer meanwhile
        assert engine.end_thinking(hurried.request_id)
        leaver.cancel()
        assert (await ask(GOOD)).outputs[0].finish_reason
        assert not waiting.done() and not ended.done()
        go_on.set()
        answer = (await waiting).outputs[0]
        assert answer.text.isdecimal() and answer.thinking.end_reason != "client"
        first = await ended
        assert isinstance(first, RequestOutput) and first.outputs[0].thinking is not None
        assert first.outputs[0].thinking.end_reason == "client"
        while engine.engine.has_unfinished:
            await asyncio.sleep(0.01)
        engine.engine.scheduler.check_integrity()
        assert not engine.engine._sequences and not engine.engine._pending_grammars
        await engine.shutdown()

    asyncio.run(main())


@pytest.mark.parametrize("bomb", BOMBS, ids=["patterns", "multiples"])
def test_a_grammar_that_takes_too_long_is_refused_in_time(llm: LLM, bomb: Any) -> None:
    """Without a bound these run for long, past the limits that the library has."""
    grammar = LLMatcher.grammar_from_json_schema(bomb)
    check = llm.engine.compiler.grammars
    refused: list[RequestError] = []

    def ask() -> None:
        with pytest.raises(RequestError) as error:
            check.validate(grammar)
        refused.append(error.value)

    asking = threading.Thread(target=ask)
    asking.start()
    check.validate(REGEX)  # another does not wait for it
    assert not refused
    asking.join()
    assert "more than 1 s" in str(refused[0]) and refused[0].param == "response_format"
    ask()  # at once: the verdict is kept
    check.validate(REGEX)


def test_a_checker_that_was_killed_is_replaced(llm: LLM) -> None:
    check = llm.engine.compiler.grammars._validator
    check.validate(REGEX)
    assert check._process is not None
    check._process.kill()
    check._process.wait()
    check.validate(REGEX.replace("3", "4"))


def test_samples_that_follow_one_grammar_are_apart(llm: LLM) -> None:
    """They begin with copies of one guide, and a second request with the same as the first."""
    params = SamplingParams(temperature=1.5, seed=3, n=6, max_tokens=60, grammar=REGEX)
    first, second = llm.chat([CHAT, CHAT], params, progress=False)
    texts = [sample.text for sample in first.outputs]
    assert texts == [sample.text for sample in second.outputs]
    assert all(text.isdecimal() for text in texts) and len(set(texts)) > 1


def test_events_of_a_failed_stream_come_before_its_error(llm: LLM) -> None:
    request = llm.engine.make_request(CHAT, FATED, priority=faults.ADD_SECOND, stream=True)
    events: list[Any] = []
    with pytest.raises(RequestFailedError):
        for event in llm.generate_request(request):
            events.append(event)
    assert all(isinstance(event, Chunk) for event in events)
