"""Answers at checkpoints of one trace equal those of separate requests, and can end the thinking.

tests/core proves the scheduler's part on a mock; this file tests text, sampling, streams, requests
with several samples, and the reported output.
"""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s1engine.engine.llm import LLM
from s1engine.engine.llm_engine import LLMEngine
from s1engine.errors import RequestError
from s1engine.eval.arithmetic import generate
from s1engine.outputs import CheckpointOutput, Chunk, RequestOutput
from s1engine.sampling_params import SamplingParams, ThinkingBudget

QUESTIONS = generate(11, 8)


def chat(index: int) -> list[dict[str, Any]]:
    return [{"role": "user", "content": QUESTIONS[index].question}]


def params(thinking: ThinkingBudget, **fields: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 260, **fields}, thinking=thinking)


@st.composite
def sweeps(draw: st.DrawFn) -> tuple[dict[str, Any], list[int]]:
    """Fields of a budget, and checkpoints that fit it."""
    maximum = draw(st.none() | st.integers(1, 150))
    most = 180 if maximum is None else maximum
    least = draw(st.sampled_from([0, 0, min(20, most)]))
    fields = {
        "max_tokens": maximum,
        "min_tokens": least,
        "num_waits": draw(st.integers(0, 3)),
        "wait_text": draw(st.sampled_from(["Wait", "", "Wait, check.\n"])),
    }
    return fields, sorted(draw(st.sets(st.integers(least, most), min_size=1, max_size=5)))


SAMPLING = [{}, {"temperature": 1.2, "seed": 5}, {"repetition_penalty": 1.2, "stop": ("5", "9")}]


@settings(max_examples=20)
@given(st.integers(0, 7), sweeps(), st.sampled_from(SAMPLING))
def test_checkpoints_equal_separate_runs(
    llm: LLM, tight: LLM, index: int, sweep: tuple[dict[str, Any], list[int]], how: dict[str, Any]
) -> None:
    fields, budgets = sweep
    asked = params(ThinkingBudget(**fields, checkpoints=tuple(budgets)), **how)
    for engine in (llm, tight):
        got = engine.chat([chat(index), chat(0)], asked, progress=False)[0]
        assert [checkpoint.budget for checkpoint in got.checkpoints] == budgets
        plain = params(ThinkingBudget(**fields), **how)
        assert got.outputs[0] == llm.chat(chat(index), plain, progress=False)[0].outputs[0]
        for checkpoint in got.checkpoints:
            separate = params(ThinkingBudget(**{**fields, "max_tokens": checkpoint.budget}), **how)
            wanted = llm.chat(chat(index), separate, progress=False)[0].outputs[0]
            branch = checkpoint.output
            assert branch.token_ids == wanted.token_ids and branch.forced == wanted.forced
            assert (branch.text, branch.reasoning) == (wanted.text, wanted.reasoning)
            assert (branch.finish_reason, branch.stop_reason) == (
                wanted.finish_reason,
                wanted.stop_reason,
            )
        engine.engine.scheduler.check_integrity()
        assert not engine.engine.has_unfinished


def test_a_sweep_computes_little_more_than_one_trace(llm: LLM) -> None:
    budgets = (8, 16, 24, 32, 40, 48)
    count = lambda: llm.engine.scheduler.stats().num_computed_tokens  # noqa: E731
    thinking: dict[str, Any] = {"max_tokens": 56, "min_tokens": 8, "num_waits": 3}
    llm.engine.scheduler.clear_cache()
    before = count()
    got = llm.chat(chat(5), params(ThinkingBudget(**thinking, checkpoints=budgets)), progress=False)
    swept = count() - before
    separate = 0
    for budget in (*budgets, 56):
        llm.engine.scheduler.clear_cache()
        before = count()
        own = params(ThinkingBudget(**{**thinking, "max_tokens": budget}))
        llm.chat(chat(5), own, progress=False)
        separate += count() - before
    assert len(got[0].checkpoints) == 6
    assert swept < separate / 2
    assert got[0].usage.checkpoint_tokens > 0


def test_several_samples_have_checkpoints_of_their_own(llm: LLM) -> None:
    thinking = ThinkingBudget(checkpoints=(0, 6), max_tokens=20)
    asked = params(thinking, n=3, temperature=1.3, seed=2)
    got = llm.chat(chat(1), asked, progress=False)[0]
    keys = [(checkpoint.output.index, checkpoint.budget) for checkpoint in got.checkpoints]
    assert keys == [(i, budget) for i in range(3) for budget in (0, 6)]
    assert len(got.outputs) == 3


def test_checkpoints_are_streamed_before_the_end(llm: LLM) -> None:
    thinking = ThinkingBudget(checkpoints=(2, 9, 500), min_tokens=0)
    request = llm.engine.make_request(chat(2), params(thinking, max_tokens=700), stream=True)
    events = list(llm.generate_request(request))
    output = events[-1]
    assert isinstance(output, RequestOutput)
    streamed = [event for event in events if isinstance(event, CheckpointOutput)]
    assert streamed == output.checkpoints
    assert [checkpoint.shared for checkpoint in streamed] == [False, False, True]
    assert streamed[2].output == output.outputs[0]
    chunks = [event for event in events if isinstance(event, Chunk)]
    assert "".join(chunk.text for chunk in chunks) == output.outputs[0].text
    first = next(i for i, event in enumerate(events) if isinstance(event, CheckpointOutput))
    assert any(isinstance(event, Chunk) and event.reasoning for event in events[first:])


def test_agreement_of_checkpoints_ends_the_thinking(llm: LLM) -> None:
    thinking = ThinkingBudget(
        checkpoints=tuple(range(0, 200, 4)), early_exit=2, num_waits=20, wait_text=""
    )
    got = llm.chat(chat(3), params(thinking, stop=("Answer",)), progress=False)[0]
    used = got.outputs[0].thinking
    assert used is not None and used.end_reason == "converged"
    answered = [c.output.text for c in got.checkpoints if c.output.finish_reason == "stop"]
    assert answered[0] == answered[1] == "Final "  # cut there, all answers are one
    assert 4 <= used.tokens < 60 and got.outputs[0].text == "Final "


def test_agreement_respects_the_minimum(llm: LLM) -> None:
    thinking = ThinkingBudget(checkpoints=(40, 44, 60), early_exit=2, min_tokens=40, num_waits=9)
    got = llm.chat(chat(3), params(thinking, stop=("Answer",)), progress=False)[0]
    used = got.outputs[0].thinking
    assert used is not None and used.tokens >= 40


def test_a_loop_is_broken(llm: LLM) -> None:
    newline = llm.engine.tokenizer.encode("\n")[0]
    thinking = ThinkingBudget(loop_repeats=5)
    got = llm.chat(chat(0), params(thinking, logit_bias={newline: 100.0}), progress=False)[0]
    used = got.outputs[0].thinking
    assert used is not None and (used.end_reason, used.tokens) == ("loop", 5)
    calm = llm.chat(chat(0), params(thinking), progress=False)[0].outputs[0].thinking
    assert calm is not None and calm.end_reason != "loop"


def test_a_deadline_leaves_later_checkpoints_unanswered(llm: LLM) -> None:
    thinking = ThinkingBudget(checkpoints=(0, 100), deadline_ms=0, min_tokens=0)
    got = llm.chat(chat(4), params(thinking), progress=False)[0]
    used = got.outputs[0].thinking
    assert used is not None and used.end_reason == "deadline"
    assert [checkpoint.budget for checkpoint in got.checkpoints] == [0]


def test_an_abort_ends_the_branches(llm: LLM) -> None:
    llm.call(check_aborts)


def check_aborts(engine: LLMEngine) -> None:
    free = engine.scheduler.stats().num_free_blocks
    for steps in (1, 4, 9, 14):
        thinking = ThinkingBudget(checkpoints=(0, 3, 6, 200), min_tokens=0)
        request = engine.make_request(chat(6), params(thinking, n=2, temperature=1.0, seed=1))
        engine.add_request(request)
        for _ in range(steps):
            engine.step()
        assert engine.abort(request.request_id) is not None
        engine.scheduler.check_integrity()
        assert engine.scheduler.stats().num_free_blocks == free


def test_deadlines_hold_under_load(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock of one tick per step: requests that wait past their deadline answer too."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    llm.call(lambda engine: check_deadlines(engine, now))


def check_deadlines(engine: LLMEngine, now: list[float]) -> None:
    requests = []
    for i in range(40):  # more than can run at once
        thinking = ThinkingBudget(deadline_ms=1000 * (5 + i % 7), num_waits=50, wait_text="")
        request = engine.make_request(chat(i % 8), params(thinking))
        request.arrival = 0.0
        requests.append(request)
        engine.add_request(request)
    done: dict[str, RequestOutput] = {}
    while engine.has_unfinished:
        now[0] += 1.0
        done |= {name: out for name, out in engine.step() if isinstance(out, RequestOutput)}
    for request in requests:
        used = done[request.request_id].outputs[0].thinking
        assert used is not None and request.thinking_deadline is not None
        assert used.end_reason == "deadline"
        assert used.tokens <= request.thinking_deadline
        assert done[request.request_id].outputs[0].text.startswith("Final Answer:")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"checkpoints": (5, 5)}, "thinking_checkpoints"),
        ({"checkpoints": (5, 4)}, "thinking_checkpoints"),
        ({"checkpoints": (-1,)}, "thinking_checkpoints"),
        ({"checkpoints": (5,), "max_tokens": 4}, "thinking_checkpoints"),
        ({"checkpoints": (5,), "min_tokens": 6}, "thinking_checkpoints"),
        ({"checkpoints": tuple(range(65))}, "thinking_checkpoints"),
        ({"checkpoints": (1.5,)}, "thinking_checkpoints"),
        ({"early_exit": 2}, "thinking_early_exit"),
        ({"early_exit": 1, "checkpoints": (1, 2)}, "thinking_early_exit"),
        ({"loop_repeats": 1}, "thinking_loop_repeats"),
    ],
)
def test_contradictory_budgets_are_rejected(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as error:
        ThinkingBudget(**fields)
    assert error.value.param == param
