"""What a grammar costs falls on its own request: masks that are late or fail delay no other one and
change no token, trials are few and killed in time, and accidents decide nothing."""

import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s1engine.engine import grammar_validator, mask_threads, output_processor
from s1engine.engine.grammar import GrammarMatcher
from s1engine.engine.grammar_limits import MAX_TRIALS
from s1engine.engine.grammar_validator import GrammarValidator, UntriedGrammarError
from s1engine.engine.live_request import LiveSequence
from s1engine.engine.llm import LLM
from s1engine.engine.llm_engine import LLMEngine
from s1engine.engine.mask_threads import MaskCost, MaskThreads
from s1engine.errors import RequestError, RequestFailedError, TryAgainError
from s1engine.outputs import RequestOutput
from s1engine.sampling_params import SamplingParams, ThinkingBudget

CHAT = [{"role": "user", "content": "a=3 b=a+4 c=b*2 c?"}]
PLAIN = SamplingParams(temperature=1, seed=5, max_tokens=40)
DIGITS = SamplingParams(
    temperature=1,
    seed=3,
    n=3,
    max_tokens=60,
    logprobs=1,
    regex="[0-9]{8}x",
    thinking=ThinkingBudget(max_tokens=8, checkpoints=(0, 4)),
)
WAIT_S = 60


def properties(count: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(count)}}


def patterns(count: int) -> dict[str, Any]:
    """Takes minutes to compile."""
    return {"allOf": [{"type": "string", "pattern": f".*a.{{{i}}}b"} for i in range(3, count)]}


@pytest.fixture
def validator(llm: LLM) -> Iterator[GrammarValidator]:
    """One with a worker of its own."""
    text = llm.compiler.text
    validator = GrammarValidator(text.tokenizer, text.vocab_limit, text.eos_token_ids)
    yield validator
    if validator._process is not None:
        validator._process.kill()
        validator._process.wait()


def refusal(llm: LLM, **structure: Any) -> RequestError:
    with pytest.raises(RequestError) as error:
        llm.engine.make_request(CHAT, SamplingParams(**structure))
    assert [error.value.param] == list(structure)
    return error.value


# --- what a trial refuses ---


@pytest.mark.parametrize("count", [600, 1200])
def test_a_schema_that_cannot_be_kept_is_refused(llm: LLM, count: int) -> None:
    assert "fails after 1 tokens" in str(refusal(llm, json_schema=properties(count)))


@pytest.mark.parametrize("regex", ["a{1000000}", "(a?){1000}a{1000}", "[ab]{9}a{100000}"])
def test_a_regex_whose_masks_explode_is_refused(llm: LLM, regex: str) -> None:
    assert "too many expressions" in str(refusal(llm, regex=regex))


@pytest.mark.parametrize(
    "structure",
    [
        {"json_schema": properties(200)},
        {"regex": r"(\w|\s){0,3000}x"},
        {"regex": r"[\p{L}\p{N} ,.;]{0,2000}"},
        {"json_schema": {"enum": [f"value {i}" for i in range(2000)]}},
        {"json_schema": {"type": "string", "format": "email", "maxLength": 10_000}},
        {"choice": [f"{i} {'ab' * 20}" for i in range(1000)]},
    ],
)
def test_large_but_usual_structures_are_accepted(llm: LLM, structure: dict[str, Any]) -> None:
    llm.engine.make_request(CHAT, SamplingParams(**structure))


# --- masks ---


def run(engine: LLMEngine, *params: SamplingParams) -> list[Any]:
    """The output, or the failure, of each request; all run at once."""
    requests = [engine.make_request(CHAT, p) for p in params]
    ends: dict[str, Any] = {}
    for request in requests:
        engine.add_request(request)
    while engine.has_unfinished:
        for name, event in engine.step():
            if isinstance(event, RequestOutput | RequestFailedError):
                ends[name] = event
    assert not engine._sequences and not engine._output_processor.has_grammar
    assert engine.scheduler.stats().num_free_blocks == engine.runner.num_blocks
    engine.scheduler.check_integrity()
    return [ends[request.request_id] for request in requests]


def answers(output: RequestOutput) -> Any:
    return output.outputs, output.checkpoints


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 99), st.floats(0.2, 0.9))
def test_late_masks_change_no_token(llm: LLM, seed: int, share: float) -> None:
    expected = [answers(output) for output in llm.call(lambda engine: run(engine, PLAIN, DIGITS))]
    noise, mask_of = random.Random(seed), output_processor._mask_of

    def late(sequence: LiveSequence) -> Any:
        mask = mask_of(sequence)
        return None if noise.random() < share else mask

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output_processor, "_mask_of", late)
        outputs = llm.call(lambda engine: run(engine, PLAIN, DIGITS))
    assert [answers(output) for output in outputs] == expected


def test_a_mask_that_never_comes_delays_no_other_request(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    (expected,) = llm.call(lambda engine: run(engine, PLAIN))
    (structured,) = llm.call(lambda engine: run(engine, DIGITS))
    begun, go_on, advance = threading.Event(), threading.Event(), GrammarMatcher.advance

    def stuck(self: GrammarMatcher, tokens: list[int]) -> float:
        begun.set()
        assert go_on.wait(WAIT_S)
        return advance(self, tokens)

    monkeypatch.setattr(GrammarMatcher, "advance", stuck)

    def overtake(engine: LLMEngine) -> None:
        first = engine.make_request(CHAT, DIGITS)
        engine.add_request(first)
        while not begun.is_set():
            engine.step()
        second = engine.make_request(CHAT, PLAIN)
        engine.add_request(second)
        ended: dict[str, Any] = {}
        for _ in range(PLAIN.max_tokens or 0):  # at most one step for each token
            ended |= dict(engine.step())
        assert ended.keys() == {second.request_id}
        assert ended[second.request_id].outputs == expected.outputs
        assert engine.step() == []  # waits a little, and returns
        go_on.set()
        while engine.has_unfinished:
            ended |= dict(engine.step())
        assert answers(ended[first.request_id]) == answers(structured)

    try:
        llm.call(overtake)
    finally:
        go_on.set()


def test_an_abort_forgets_masks_that_have_not_begun(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    begun, go_on = threading.Barrier(3), threading.Event()

    def stuck(self: GrammarMatcher, tokens: list[int]) -> float:
        computed.append(1)
        begun.wait(WAIT_S)
        assert go_on.wait(WAIT_S)
        return 0.0

    monkeypatch.setattr(GrammarMatcher, "advance", stuck)
    threads, cost = MaskThreads(), MaskCost()
    matcher = llm.compiler.grammars.submit("start: /a+/").result()
    first = [threads.advance(cost, matcher.copy(), [1]) for _ in range(2)]
    for _ in range(5):
        threads.advance(cost, matcher.copy(), [1])
    begun.wait(WAIT_S)  # both threads are busy
    cost.closed = True
    go_on.set()
    for job in first:
        job.done.result(WAIT_S)
    threads._fast._threads.shutdown(wait=True)
    assert len(computed) == 2


def test_requests_with_slow_masks_leave_the_threads_of_the_others(llm: LLM) -> None:
    threads, slow = MaskThreads(), MaskCost(num_slow=99)
    matcher = llm.compiler.grammars.submit("start: /a+/").result()
    job = threads.advance(slow, matcher.copy(), [])
    assert job.overdue  # no step waits for it
    job.done.result(WAIT_S)
    names = {thread.name for thread in threads._slow._threads._threads}
    assert names and all("slow" in name for name in names)
    assert not threads._fast._threads._threads


def test_fast_masks_are_computed_inline_until_one_is_not(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, cpu_s = 0.0, mask_threads.INLINE_MASK_S
    monkeypatch.setattr(mask_threads.time, "monotonic", lambda: now)
    monkeypatch.setattr(GrammarMatcher, "advance", lambda *_: cpu_s)
    matcher = llm.compiler.grammars.submit("start: /a+/").result()
    threads, costs = MaskThreads(), [MaskCost(), MaskCost()]

    def is_inline(cost: MaskCost) -> bool:
        job = threads.advance(cost, matcher.copy(), [])
        if job is not None:
            job.done.result(WAIT_S)
        return job is None

    for cost in costs:
        assert [is_inline(cost) for _ in range(5)] == [False] * 3 + [True] * 2
    cpu_s = 0.003
    assert is_inline(costs[0])
    cpu_s = 0.0
    now = mask_threads.INLINE_PAUSE * 0.003 * 0.99  # of all requests
    assert not any(is_inline(cost) for cost in costs for _ in range(2))
    now = mask_threads.INLINE_PAUSE * 0.003 * 1.01
    assert is_inline(costs[1]) and [is_inline(costs[0]) for _ in range(2)] == [False, True]


def test_a_grammar_that_becomes_too_costly_fails_its_request_visibly(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    (expected,) = llm.call(lambda engine: run(engine, PLAIN))
    monkeypatch.setattr(GrammarValidator, "validate", lambda *_, **__: None)
    costly = SamplingParams(
        seed=1, max_tokens=99, regex="[ab]{9}a{100000}", thinking=ThinkingBudget(max_tokens=0)
    )
    plain, failure = llm.call(lambda engine: run(engine, PLAIN, costly))
    assert plain.outputs == expected.outputs
    assert isinstance(failure, RequestFailedError)
    assert "too costly after" in str(failure) and "too many expressions" in str(failure)
    exploding = SamplingParams(max_tokens=9, regex="(a?){1000}a{1000}")
    (failure,) = llm.call(lambda engine: run(engine, exploding))
    assert isinstance(failure, RequestFailedError) and "too costly" in str(failure)


# --- accidents ---


def children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in listed]


def test_an_accident_decides_nothing(
    validator: GrammarValidator, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(grammar_validator.subprocess, "Popen", broken)
        with pytest.raises(TryAgainError, match="regex"):
            validator.validate("start: /a+/", "regex")
    with pytest.raises(UntriedGrammarError):
        validator.validate("start: /a+/", "regex", wait=False)
    validator.validate("start: /a+/", "regex")
    validator.validate("start: /a+/", "regex", wait=False)


def broken(*_: Any, **__: Any) -> None:
    raise OSError("too many open files")


def test_a_trial_that_is_killed_decides_nothing(validator: GrammarValidator) -> None:
    validator.validate("start: /a+/", "regex")
    assert validator._process is not None
    worker, outcome = validator._process.pid, []

    def try_bomb() -> None:
        try:
            validator.validate(bomb(40), "json_schema")
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=try_bomb)
    thread.start()
    while not (trials := children(worker)):
        time.sleep(0)
    os.kill(trials[0], 9)
    thread.join()
    assert isinstance(outcome[0], TryAgainError)
    with pytest.raises(UntriedGrammarError):
        validator.validate(bomb(40), "json_schema", wait=False)


def bomb(count: int) -> str:
    from llguidance import LLMatcher

    grammar: str = LLMatcher.grammar_from_json_schema(patterns(count))
    return grammar


def test_trials_are_few_and_end_with_their_clients(
    validator: GrammarValidator, monkeypatch: pytest.MonkeyPatch
) -> None:
    validator.validate("start: /a+/", "regex")
    assert validator._process is not None
    worker, refused = validator._process.pid, []
    monkeypatch.setattr(grammar_validator, "VERDICT_WAIT_S", 0.3)

    def try_bomb(count: int) -> None:
        with pytest.raises(TryAgainError):
            validator.validate(bomb(count), "json_schema")
        refused.append(count)

    threads = [threading.Thread(target=try_bomb, args=(30 + i,)) for i in range(3 * MAX_TRIALS)]
    for thread in threads:
        thread.start()
    most = 0
    while any(thread.is_alive() for thread in threads):
        most = max(most, len(children(worker)))
    assert len(refused) == len(threads) and 0 < most <= MAX_TRIALS
    monkeypatch.undo()
    validator.validate("start: /b+/", "regex")  # the worker is free again
    while children(worker):
        time.sleep(0)
