"""Defaults and the maximum of thinking, requests too small to end it, and the text of prompts."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s1engine.config import EngineConfig
from s1engine.engine.llm import LLM
from s1engine.engine.request import Request
from s1engine.engine.request_compiler import RequestCompiler
from s1engine.errors import RequestError
from s1engine.outputs import CompletionOutput
from s1engine.sampling_params import UNLIMITED, SamplingParams, ThinkingBudget

CHAT = [{"role": "user", "content": "a=3 b=a+4 c=b*2 c?"}]


def compile_with(llm: LLM, params: SamplingParams, prompt: Any = CHAT, **options: Any) -> Request:
    """A request compiled by an engine with these options."""
    own = llm.engine.compiler
    compiler = RequestCompiler(own.text, own.max_model_len, EngineConfig(**options))
    return compiler.compile(prompt, params)


def generate(llm: LLM, *requests: Request) -> list[CompletionOutput]:
    return [out.outputs[0] for out in llm.generate_requests([*requests], progress=False)]


# --- defaults and the maximum ---

budgets = st.none() | st.integers(0, 300)


@given(
    default=budgets,
    waits=st.integers(0, 5),
    cap=st.none() | st.integers(1, 300),
    asked=budgets | st.just(UNLIMITED),
    own_waits=st.none() | st.integers(0, 5),
    checkpoints=st.sets(st.integers(0, 200), max_size=3),
)
def test_a_default_is_as_good_as_a_field(
    llm: LLM,
    default: int | None,
    waits: int,
    cap: int | None,
    asked: int | None,
    own_waits: int | None,
    checkpoints: set[int],
) -> None:
    if asked is not None:
        checkpoints = {at for at in checkpoints if at <= asked}
    options = {
        "default_thinking_token_budget": default,
        "default_num_waits": waits,
        "max_thinking_token_budget": cap,
    }
    budget = ThinkingBudget(
        max_tokens=asked, num_waits=own_waits, checkpoints=tuple(sorted(checkpoints))
    )
    found = compile_with(llm, SamplingParams(max_tokens=500, thinking=budget), **options).budget
    wanted = asked if asked is not None else default
    if asked is None and default is not None:
        wanted = max([default, *checkpoints])  # a default contradicts no field
    wanted = min((n for n in (wanted, cap) if n is not None), default=None)
    explicit = ThinkingBudget(
        max_tokens=wanted, num_waits=waits if own_waits is None else own_waits
    )
    expected = compile_with(llm, SamplingParams(max_tokens=500, thinking=explicit)).budget
    assert found is not None and expected is not None
    assert found.max_thinking == expected.max_thinking
    assert found.num_waits == expected.num_waits
    assert cap is None or found.max_thinking <= cap


@settings(max_examples=10)
@given(st.integers(1, 40), st.integers(0, 2))
def test_a_request_without_fields_keeps_to_the_defaults(llm: LLM, budget: int, waits: int) -> None:
    params = SamplingParams(temperature=0, max_tokens=160)
    explicit = SamplingParams(
        temperature=0,
        max_tokens=160,
        thinking=ThinkingBudget(max_tokens=budget, num_waits=waits),
    )
    by_default = {"default_thinking_token_budget": budget, "default_num_waits": waits}
    asked, default, capped = generate(
        llm,
        compile_with(llm, explicit),
        compile_with(llm, params, **by_default),
        compile_with(llm, params, max_thinking_token_budget=budget, default_num_waits=waits),
    )
    assert asked.token_ids == default.token_ids == capped.token_ids
    for sample in (default, capped):
        assert sample.thinking is not None and asked.thinking == sample.thinking
        assert sample.thinking.tokens <= budget == sample.thinking.budget


def test_only_requests_that_think_get_defaults(llm: LLM) -> None:
    options = {"default_thinking_token_budget": 5, "default_num_waits": 2}
    assert compile_with(llm, SamplingParams(), "a=3 b=a+4 b?", **options).budget is None
    own = llm.engine.compiler
    compiler = RequestCompiler(own.text, own.max_model_len, EngineConfig(**options))
    assert compiler.compile(CHAT, SamplingParams(), enable_thinking=False).budget is None


def test_a_minimum_above_the_maximum_is_refused_and_above_the_default_holds(llm: LLM) -> None:
    params = SamplingParams(thinking=ThinkingBudget(min_tokens=50))
    with pytest.raises(RequestError, match="max_thinking_token_budget") as error:
        compile_with(llm, params, max_thinking_token_budget=49)
    assert error.value.param == "min_thinking_tokens"
    found = compile_with(llm, params, default_thinking_token_budget=20).budget
    assert found is not None and (found.min_thinking, found.max_thinking) == (50, 50)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("default_thinking_token_budget", -1),
        ("default_num_waits", -1),
        ("default_num_waits", 1.5),
        ("max_thinking_token_budget", 0),
        ("generation_config", "vllm"),
    ],
)
def test_bad_options_are_named(option: str, value: Any) -> None:
    with pytest.raises(RequestError) as error:
        EngineConfig(**{option: value})
    assert error.value.param == option


# --- too few tokens to end the thinking ---


def test_few_tokens_cut_the_thinking(llm: LLM) -> None:
    """Whatever the server's defaults: as many tokens as asked for, the first of a longer run."""
    compiler = llm.engine.compiler
    (whole,) = generate(llm, compiler.compile(CHAT, SamplingParams(temperature=0, max_tokens=300)))
    for options in (
        {},
        {"default_thinking_token_budget": 0, "default_num_waits": 3},
        {"max_thinking_token_budget": 1},
    ):
        sizes = range(1, 7)
        params = [SamplingParams(temperature=0, max_tokens=n) for n in sizes]
        cut = generate(llm, *(compile_with(llm, p, **options) for p in params))
        for n, sample in zip(sizes, cut, strict=True):
            assert len(sample.token_ids) == n and sample.finish_reason == "length"
            assert sample.thinking is not None and sample.thinking.tokens <= n
            if not options:
                assert sample.token_ids == whole.token_ids[:n]
                assert (sample.thinking.end_reason, sample.text) == ("length", "")


def test_an_end_that_does_not_fit_is_cut_too(llm: LLM) -> None:
    """The model ends its thinking by the last token that it has: alone, in company, drafted."""
    compiler = llm.engine.compiler
    start = compiler.compile(CHAT, SamplingParams(temperature=0, max_tokens=300))
    (whole,) = generate(llm, start)
    assert whole.thinking is not None and whole.thinking.end_reason == "natural"
    prompt = start.prompt.tolist() + whole.token_ids[: whole.thinking.tokens]
    rest = whole.token_ids[whole.thinking.tokens :]
    params = [SamplingParams(temperature=0, max_tokens=n) for n in range(1, 6)]
    for sample, n in zip(
        generate(llm, *(compiler.compile(prompt, p) for p in params)), range(1, 6), strict=True
    ):
        assert sample.token_ids == rest[:n] and sample.finish_reason == "length"


@pytest.mark.parametrize("asked", [{"min_tokens": 1}, {"max_tokens": 0}, {"num_waits": 0}])
def test_a_thinking_field_that_cannot_be_kept_is_refused(llm: LLM, asked: dict[str, int]) -> None:
    params = SamplingParams(max_tokens=1, thinking=ThinkingBudget(**asked))
    with pytest.raises(RequestError) as error:
        llm.engine.compiler.compile(CHAT, params)
    assert error.value.param == "max_tokens"


# --- the assistant's own turn ---


def test_a_continued_turn_keeps_its_tokens(llm: LLM) -> None:
    """An answer cut anywhere and sent back goes on as it would have."""
    compiler, tokenizer = llm.engine.compiler, llm.engine.tokenizer

    def continued(text: str, max_tokens: int) -> Request:
        chat = [*CHAT, {"role": "assistant", "content": text}]
        return compiler.compile(chat, SamplingParams(temperature=0, max_tokens=max_tokens))

    begun = "Final Answer: c="
    request = continued(begun, 12)
    (whole,) = generate(llm, request)
    assert request.budget is None and len(whole.token_ids) > 1
    for n in range(1, len(whole.token_ids)):
        text = tokenizer.decode(whole.token_ids[:n], skip_special_tokens=False)
        longer = continued(begun + text, 12 - n)
        if longer.prompt.tolist() != request.prompt.tolist() + whole.token_ids[:n]:
            assert (
                tokenizer.encode(begun + text)[len(tokenizer.encode(begun)) :]
                != (whole.token_ids[:n])
            )
            continue  # the text has other tokens than the model wrote
        assert generate(llm, longer)[0].token_ids == whole.token_ids[n:]


def test_a_continued_turn_thinks_where_its_thinking_is_open(llm: LLM) -> None:
    compiler = llm.engine.compiler
    begun = [*CHAT, {"role": "assistant", "content": "b=3+4=7"}]
    assert compiler.compile(begun, SamplingParams()).budget is None
    for fields, param in (
        ({"enable_thinking": True}, "enable_thinking"),
        ({}, "thinking_token_budget"),
    ):
        thinking = None if fields else ThinkingBudget(max_tokens=9)
        with pytest.raises(RequestError, match="continued") as error:
            compiler.compile(begun, SamplingParams(thinking=thinking), **fields)
        assert error.value.param == param
    fresh = {"add_generation_prompt": True}
    assert compiler.compile(begun, SamplingParams(), template_kwargs=fresh).budget is not None
    opened = [*CHAT, {"role": "assistant", "content": "<|im_start|>think\nb=3"}]
    budget = compiler.compile(opened, SamplingParams()).budget
    assert budget is not None and budget.tokens_thought > 0
