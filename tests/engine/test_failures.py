"""A request that fails because of a bug fails alone: its stream gets an error, the others continue
as if it had never existed, and it leaves nothing behind. Compiling a grammar delays no other
request."""

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
from s1engine.engine import spawning
from s1engine.engine.async_engine import AsyncLLMEngine
from s1engine.engine.grammar import GrammarCompiler
from s1engine.engine.llm import LLM
from s1engine.engine.llm_engine import LLMEngine
from s1engine.engine.process_client import ProcessEngineClient
from s1engine.errors import EngineDeadError, RequestError, RequestFailedError
from s1engine.outputs import Chunk, CompletionOutput, RequestOutput
from s1engine.sampling_params import SamplingParams, ThinkingBudget
from s1engine.server.app import create_app
from tests.engine import faults

CHAT: list[dict[str, Any]] = [{"role": "user", "content": "a=3 b=a+4 c=b*2 c?"}]
ROOT = Path(__file__).resolve().parents[2]
GOOD = SamplingParams(temperature=0, max_tokens=60)
REGEX = '{"grammars":[{"lark_grammar":"start: /[0-9]{1,3}/"}]}'
FAILING = SamplingParams(
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
def installed_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    faults.install(monkeypatch)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from([0, *faults.ALONE]), min_size=1, max_size=6), st.integers(0, 40))
def test_it_fails_alone_and_leaves_nothing(
    llm: LLM, faults_of_requests: list[int], late: int
) -> None:
    alone = llm.chat(CHAT, GOOD)[0].outputs
    llm.call(lambda engine: check_alone(engine, alone, faults_of_requests, late))


def check_alone(
    engine: LLMEngine, alone: list[CompletionOutput], faults_of_requests: list[int], late: int
) -> None:
    requests = [
        engine.make_request(CHAT, FAILING if fault else GOOD, priority=fault, stream=fault % 2 == 0)
        for fault in faults_of_requests
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
    for request, fault in zip(requests, faults_of_requests, strict=True):
        end = ended.pop(request.request_id)
        if fault:
            assert isinstance(end, RequestFailedError) and isinstance(end.__cause__, faults.Bug)
        else:
            assert isinstance(end, RequestOutput) and end.outputs == alone
    assert not ended and not engine._sequences and not engine._output_processor._builders
    assert not engine._output_processor.has_grammar
    engine.scheduler.check_integrity()
    assert engine.scheduler.stats().num_free_blocks == engine.runner.num_blocks


def test_a_request_whose_id_is_taken_does_not_end_the_first(llm: LLM) -> None:
    def run(engine: LLMEngine) -> None:
        first = engine.make_request(CHAT, GOOD)
        engine.add_request(first)
        with pytest.raises(RequestError, match="taken") as error:
            engine.add_request(first)
        assert error.value.param == "request_id"
        events = []
        while engine.has_unfinished:
            events += [event for _, event in engine.step()]
        (output,) = events
        assert isinstance(output, RequestOutput) and output.outputs[0].finish_reason == "stop"

    llm.call(run)


def test_offline_it_is_raised_and_nothing_is_left(llm: LLM) -> None:
    with pytest.raises(RequestFailedError):
        llm.chat([CHAT, CHAT], GOOD, progress=False, priority=faults.ADMIT)
    assert not llm.engine.has_unfinished
    assert llm.chat(CHAT, GOOD, progress=False)[0].outputs[0].text


def test_across_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spawning, "PROCESS", "tests.engine.faults")
    monkeypatch.chdir(ROOT)

    async def main() -> None:
        engine = ProcessEngineClient(EngineConfig(**OPTIONS))
        await engine.start()

        async def ask(fault: int) -> Any:
            params = FAILING if fault else GOOD
            request = engine.compiler.compile(CHAT, params, priority=fault, stream=True)
            return [event async for event in engine.generate_request(request)][-1]

        faults_of_requests = [0, *faults.ALONE, 0]
        ends = await asyncio.gather(*map(ask, faults_of_requests), return_exceptions=True)
        for fault, end in zip(faults_of_requests, ends, strict=True):
            assert isinstance(end, RequestFailedError if fault else RequestOutput), (fault, end)
        assert ends[0].outputs == ends[-1].outputs and engine.healthy
        with pytest.raises(EngineDeadError) as died:  # a failing step still ends all requests
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
    with_grammar = SamplingParams(temperature=0, max_tokens=60, grammar=REGEX)

    async def main() -> None:
        engine = AsyncLLMEngine(EngineConfig(**OPTIONS))
        await engine.start()

        async def ask(params: SamplingParams) -> Any:
            return [event async for event in engine.generate(CHAT, params)][-1]

        waiting = asyncio.ensure_future(ask(with_grammar))
        hurried = engine.engine.make_request(CHAT, with_grammar)
        ended = asyncio.ensure_future(anext(engine.generate_request(hurried)))
        leaver = asyncio.ensure_future(ask(with_grammar))
        await asyncio.to_thread(compiling.wait, 60)
        assert (await ask(GOOD)).outputs[0].finish_reason  # a full answer in the meantime
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
    """Without our bound these take minutes, past the limits of the library."""
    grammar = LLMatcher.grammar_from_json_schema(bomb)
    grammars = llm.engine.compiler.grammars.validator
    rejected: list[RequestError] = []

    def try_bomb() -> None:
        with pytest.raises(RequestError) as error:
            grammars.validate(grammar, "json_schema")
        rejected.append(error.value)

    thread = threading.Thread(target=try_bomb)
    thread.start()
    grammars.validate(REGEX, "regex")  # does not wait for the other
    assert not rejected
    thread.join()
    assert "more than 1 s" in str(rejected[0]) and rejected[0].param == "json_schema"
    try_bomb()  # at once: the verdict is cached
    grammars.validate(REGEX, "regex")


def test_a_killed_grammar_worker_is_replaced(llm: LLM) -> None:
    grammars = llm.engine.compiler.grammars.validator
    grammars.validate(REGEX, "regex")
    assert grammars._process is not None
    grammars._process.kill()
    grammars._process.wait()
    grammars.validate(REGEX.replace("3", "4"), "regex")


def test_samples_with_one_grammar_are_independent(llm: LLM) -> None:
    """They begin with copies of one matcher; a second request copies the same one."""
    params = SamplingParams(temperature=1.5, seed=3, n=6, max_tokens=60, grammar=REGEX)
    first, second = llm.chat([CHAT, CHAT], params, progress=False)
    texts = [sample.text for sample in first.outputs]
    assert texts == [sample.text for sample in second.outputs]
    assert all(text.isdecimal() for text in texts) and len(set(texts)) > 1


def test_events_of_a_failed_stream_come_before_its_error(llm: LLM) -> None:
    request = llm.engine.make_request(CHAT, FAILING, priority=faults.ADD_SECOND, stream=True)
    events: list[Any] = []
    with pytest.raises(RequestFailedError):
        for event in llm.generate_request(request):
            events.append(event)
    assert all(isinstance(event, Chunk) for event in events)
