"""The promises of budget forcing hold for the whole engine on the bundled model.

tests/core compares the scheduler with s1's algorithm on a mock; here logits, sampling and memory
are real, and s1's own two-pass algorithm runs on the same engine as the reference.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s1engine import _core
from s1engine.bench.two_pass import think_in_passes
from s1engine.engine.llm import LLM
from s1engine.engine.llm_engine import LLMEngine
from s1engine.errors import RequestError
from s1engine.eval.arithmetic import generate
from s1engine.outputs import RequestOutput
from s1engine.sampling_params import SamplingParams, ThinkingBudget

QUESTIONS = generate(7, 12)
EXAMPLES = settings(max_examples=15)


def chat(index: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": QUESTIONS[index].question}]


def greedy(**fields: object) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=300, thinking=ThinkingBudget(**fields))  # type: ignore[arg-type]


@st.composite
def budgets(draw: st.DrawFn) -> SamplingParams:
    maximum = draw(st.none() | st.integers(0, 120))
    return greedy(
        max_tokens=maximum,
        min_tokens=draw(st.integers(0, min(maximum if maximum is not None else 60, 60))),
        num_waits=draw(st.integers(0, 3)),
        wait_text=draw(st.sampled_from(["Wait", "", "Wait, check.\n"])),
    )


def check_promises(output: RequestOutput, params: SamplingParams) -> None:
    sample, budget = output.outputs[0], params.thinking
    assert budget is not None and sample.thinking is not None
    used = sample.thinking
    if budget.max_tokens is not None:
        assert used.tokens <= budget.max_tokens  # 1
    assert used.tokens >= budget.min_tokens  # 2
    if budget.min_tokens == 0:
        assert used.waits_used <= budget.num_waits  # 3
    assert used.end_reason in ("natural", "budget")
    assert sample.text or sample.finish_reason == "stop"  # 4: the model got to answer
    assert used.forced_tokens == sum(sample.forced)  # 6
    assert len(sample.forced) == len(sample.token_ids) <= 300
    assert output.usage.reasoning_tokens == used.tokens


@EXAMPLES
@given(st.lists(st.tuples(st.integers(0, 11), budgets()), min_size=1, max_size=8))
def test_batched_preempted_and_cached_equal_alone_and_cold(
    llm: LLM, tight: LLM, asked: list[tuple[int, SamplingParams]]
) -> None:
    chats = [chat(index) for index, _ in asked]
    params = [p for _, p in asked]
    crowded = tight.chat(chats, params, progress=False)
    tight.engine.scheduler.check_integrity()
    for one, p, got in zip(chats, params, crowded, strict=True):
        llm.engine.scheduler.clear_cache()
        alone = llm.chat(one, p, progress=False)[0]
        check_promises(alone, p)
        assert got.outputs[0] == alone.outputs[0]


def test_the_tight_engine_really_preempts(tight: LLM) -> None:
    """In this test or an earlier one: after a preemption the scheduler admits more carefully."""
    tight.chat([chat(i) for i in range(6)], greedy(min_tokens=190), progress=False)
    assert tight.engine.scheduler.stats().num_preemptions > 0


@pytest.mark.parametrize("num_waits", [0, 1, 3])
@pytest.mark.parametrize("budget", [0, 30, 250])
def test_native_forcing_equals_the_two_pass_way(llm: LLM, budget: int, num_waits: int) -> None:
    chats = [chat(i) for i in range(6)]
    params = greedy(max_tokens=budget, num_waits=num_waits, answer_reserve=1)
    prompts = [llm.engine.make_request(c, params).prompt.tolist() for c in chats]  # type: ignore[arg-type]
    native = llm.chat(chats, params, progress=False)
    passes = think_in_passes(llm, prompts, budget=budget, num_waits=num_waits, max_tokens=300)
    for got, wanted in zip(native, passes, strict=True):
        assert got.outputs[0].token_ids == wanted.token_ids
        assert got.outputs[0].thinking is not None
        assert got.outputs[0].thinking.waits_used == wanted.waits_used


def test_a_dropped_end_is_neither_in_the_output_nor_in_the_cache(llm: LLM) -> None:
    shortest = min(range(12), key=lambda i: len(QUESTIONS[i].steps))  # ends within the budget
    output = llm.chat(chat(shortest), greedy(num_waits=2), progress=False)[0].outputs[0]
    assert llm.engine.format is not None
    wait = llm.engine.tokenizer.encode("Wait")
    places = [i for i, token in enumerate(output.token_ids) if [token] == wait]
    forced = [i for i in places if output.forced[i]]
    assert len(forced) == 2
    for i in forced:
        assert output.token_ids[i - 1] not in llm.engine.format.triggers


def test_a_budget_of_zero_answers_at_once(llm: LLM) -> None:
    output = llm.chat(chat(0), greedy(max_tokens=0), progress=False)[0].outputs[0]
    end = [*llm.engine.format.newline, *llm.engine.format.forced_end()]  # type: ignore[union-attr]
    assert output.token_ids[: len(end)] == end
    assert output.forced == [1] * len(end) + [0] * (len(output.token_ids) - len(end))
    assert output.thinking is not None and output.thinking.end_reason == "budget"
    assert output.text.startswith("Final Answer:") and output.reasoning == ""


def test_max_tokens_alone_still_leaves_an_answer(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=40)
    output = llm.chat(chat(5), params, progress=False)[0].outputs[0]
    assert output.thinking is not None and output.thinking.budget == 40 - 8 - 10
    assert output.text.startswith("Final Answer:")
    assert len(output.token_ids) <= 40


def test_final_text_of_the_request_opens_the_answer(llm: LLM) -> None:
    params = greedy(max_tokens=5, final_text="So: ")
    output = llm.chat(chat(1), params, progress=False)[0].outputs[0]
    assert output.text.startswith("So: ")


def test_thinking_in_the_prompt_is_counted(llm: LLM) -> None:
    request = llm.engine.make_request(chat(3), greedy())  # type: ignore[arg-type]
    thought = llm.engine.tokenizer.encode("\nk=3\n")
    prompt = [*request.prompt.tolist(), *thought]
    output = llm.generate([prompt], greedy(max_tokens=len(thought) + 4), progress=False)[0]
    assert output.outputs[0].thinking is not None
    assert output.outputs[0].thinking.tokens <= len(thought) + 4
    assert sum(1 for f in output.outputs[0].forced if not f) >= 4


def test_a_deadline_in_the_past_answers_after_one_token(llm: LLM) -> None:
    params = greedy(deadline_ms=0)
    sample = llm.chat(chat(9), params, progress=False)[0].outputs[0]
    assert sample.thinking is not None and sample.thinking.end_reason == "deadline"
    assert sample.thinking.tokens <= 1 and sample.text.startswith("Final Answer:")


def test_end_thinking_is_obeyed_in_the_middle(llm: LLM) -> None:
    llm.call(check_end_thinking)


def check_end_thinking(engine: LLMEngine) -> None:
    request = engine.make_request(chat(9), greedy(min_tokens=200))  # type: ignore[arg-type]
    engine.add_request(request)
    for _ in range(10):
        engine.step()
    assert engine.end_thinking(request.request_id)
    events = []
    while engine.has_unfinished:
        events += engine.step()
    sample = events[-1][1].outputs[0]  # type: ignore[union-attr]
    assert sample.thinking is not None and sample.thinking.end_reason == "client"
    assert sample.thinking.tokens < 20 and sample.text.startswith("Final Answer:")


def test_abort_frees_everything_at_any_moment(llm: LLM) -> None:
    llm.call(check_abort)


def check_abort(engine: LLMEngine) -> None:
    free = engine.scheduler.stats().num_free_blocks
    for steps in range(12):
        params = SamplingParams(n=3, temperature=1, seed=1, max_tokens=50)
        request = engine.make_request(chat(4), params)  # type: ignore[arg-type]
        engine.add_request(request)
        for _ in range(steps):
            engine.step()
        output = engine.abort(request.request_id)
        assert output is not None and {o.finish_reason for o in output.outputs} <= {"abort", "stop"}
        engine.scheduler.check_integrity()
        assert not engine.has_unfinished and engine.abort(request.request_id) is None
    assert engine.scheduler.stats().num_free_blocks == free


@pytest.mark.parametrize(
    ("params", "param"),
    [
        (SamplingParams(max_tokens=5, thinking=ThinkingBudget(min_tokens=1)), "max_tokens"),
        (SamplingParams(max_tokens=60, thinking=ThinkingBudget(answer_reserve=60)), "max_tokens"),
        (
            SamplingParams(max_tokens=60, thinking=ThinkingBudget(min_tokens=50)),
            "min_thinking_tokens",
        ),
        (SamplingParams(stop_token_ids=(315,)), "stop_token_ids"),
        (SamplingParams(logit_bias={5000: 1.0}), "logit_bias"),
    ],
)
def test_a_budget_that_cannot_fit_is_rejected_by_name(
    llm: LLM, params: SamplingParams, param: str
) -> None:
    with pytest.raises(RequestError) as error:
        llm.chat(chat(0), params, progress=False)
    assert error.value.param == param


def test_a_prompt_beyond_the_context_is_rejected(llm: LLM) -> None:
    with pytest.raises(RequestError) as error:
        llm.generate("a " * 3000, progress=False)
    assert (error.value.param, error.value.code) == ("prompt", "context_length_exceeded")


def test_thinking_needs_a_format() -> None:
    plain = LLM(progress=False, reasoning_format="none", max_num_seqs=2, max_num_batched_tokens=64)
    with pytest.raises(RequestError) as error:
        plain.chat(chat(0), greedy(max_tokens=3), progress=False)
    assert error.value.param == "thinking_token_budget"
    output = plain.chat(chat(0), SamplingParams(temperature=0, max_tokens=4), progress=False)
    assert output[0].outputs[0].thinking is None


def test_marks_are_known_to_python() -> None:
    assert (_core.MARK_THINK, _core.MARK_DELIMITER, _core.MARK_FORCED) == (1, 2, 4)
