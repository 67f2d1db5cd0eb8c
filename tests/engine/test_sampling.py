"""Sampling in the whole engine: the tokens of a request depend on that request alone."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s1engine.engine.llm import LLM
from s1engine.errors import RequestError
from s1engine.outputs import Chunk, RequestOutput
from s1engine.sampling_params import SamplingParams, ThinkingBudget

PROMPTS = ["a=3 b=a+4 b?", "q=1 w=q*7 e=w-5 e?", "x?", "The answer"]


@st.composite
def sampled(draw: st.DrawFn) -> SamplingParams:
    return SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.7, 1.0, 2.0])),
        max_tokens=draw(st.integers(1, 20)),
        top_k=draw(st.sampled_from([0, 1, 5])),
        top_p=draw(st.sampled_from([1.0, 0.9, 0.3])),
        min_p=draw(st.sampled_from([0.0, 0.1])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3])),
        presence_penalty=draw(st.sampled_from([0.0, 0.5])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.5])),
        logit_bias=draw(st.sampled_from([{}, {20: 3.0, 21: -3.0}])),
        seed=draw(st.integers(0, 5)),
        ignore_eos=True,
        thinking=draw(st.none() | st.just(ThinkingBudget(num_waits=1, answer_reserve=1))),
    )


@settings(max_examples=20)
@given(st.lists(st.tuples(st.sampled_from(PROMPTS), sampled()), min_size=2, max_size=8))
def test_samples_do_not_depend_on_neighbours_or_preemption(
    llm: LLM, tight: LLM, asked: list[tuple[str, SamplingParams]]
) -> None:
    asked = [(prompt, p) for prompt, p in asked if p.thinking is None or (p.max_tokens or 0) > 12]
    if not asked:
        return
    prompts, params = [a for a, _ in asked], [p for _, p in asked]
    crowded = tight.generate(prompts, params, progress=False)
    for prompt, p, got in zip(prompts, params, crowded, strict=True):
        alone = llm.generate(prompt, p, progress=False)[0]
        assert got.outputs[0].token_ids == alone.outputs[0].token_ids


def test_samples_of_one_request_differ_and_repeat(llm: LLM) -> None:
    params = SamplingParams(n=4, temperature=1.5, seed=3, max_tokens=12, ignore_eos=True)
    first, again = (llm.generate(PROMPTS[0], params, progress=False)[0] for _ in range(2))
    texts = [tuple(o.token_ids) for o in first.outputs]
    assert len(set(texts)) == 4
    assert texts == [tuple(o.token_ids) for o in again.outputs]
    assert [o.index for o in first.outputs] == [0, 1, 2, 3]
    assert first.usage.completion_tokens == 48


def test_further_samples_share_the_prompt(llm: LLM) -> None:
    prompt = [5 + i % 200 for i in range(160)]
    llm.engine.scheduler.clear_cache()
    before = llm.engine.scheduler.stats().num_computed_tokens
    params = SamplingParams(n=4, temperature=1.0, seed=3, max_tokens=2, ignore_eos=True)
    llm.generate([prompt], params, progress=False)
    computed = llm.engine.scheduler.stats().num_computed_tokens - before
    assert computed < 2 * len(prompt)


def test_without_a_seed_the_engine_draws_one(llm: LLM) -> None:
    params = SamplingParams(temperature=8.0, max_tokens=16, ignore_eos=True)
    outputs = llm.generate([PROMPTS[0]] * 4, params, progress=False)
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 4


def test_padding_ids_of_the_embedding_are_never_sampled(llm: LLM) -> None:
    params = SamplingParams(temperature=100.0, seed=0, max_tokens=400, ignore_eos=True)
    ids = llm.generate(PROMPTS[0], params, progress=False)[0].outputs[0].token_ids
    assert llm.engine.model_config.vocab_size > llm.engine.tokenizer.num_tokens
    assert max(ids) < llm.engine.tokenizer.num_tokens


def test_logprobs_are_of_the_raw_distribution(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=5, ignore_eos=True)
    output = llm.generate(PROMPTS[0], params, progress=False)[0].outputs[0]
    assert output.logprobs is not None and len(output.logprobs) == 6
    for token, entry in zip(output.token_ids, output.logprobs, strict=True):
        assert entry.token_id == token == entry.top[0][0]  # greedy samples the likeliest
        assert entry.logprob == pytest.approx(entry.top[0][1])
        values = [value for _, value in entry.top]
        assert values == sorted(values, reverse=True) and sum(map(math.exp, values)) <= 1 + 1e-5
    biased = SamplingParams(
        temperature=0, max_tokens=1, logprobs=0, logit_bias={output.token_ids[0]: 5.0}
    )
    again = llm.generate(PROMPTS[0], biased, progress=False)[0].outputs[0].logprobs
    assert again is not None and again[0].top == ()
    assert again[0].logprob == pytest.approx(output.logprobs[0].logprob, abs=1e-5)


def test_forced_tokens_are_marked_beside_logprobs(llm: LLM) -> None:
    params = SamplingParams(
        temperature=0, max_tokens=60, logprobs=1, thinking=ThinkingBudget(max_tokens=4)
    )
    output = llm.generate(PROMPTS[0], params, progress=False)[0].outputs[0]
    assert output.logprobs is not None
    assert [int(entry.forced) for entry in output.logprobs] == output.forced
    assert [entry.token_id for entry in output.logprobs] == output.token_ids
    assert all(entry.logprob == 0.0 for entry in output.logprobs if entry.forced)


def collect(llm: LLM, prompt: str, params: SamplingParams) -> tuple[list[Chunk], RequestOutput]:
    *chunks, output = llm.stream(prompt, params)
    assert isinstance(output, RequestOutput)
    return chunks, output  # type: ignore[return-value]


@settings(max_examples=20)
@given(sampled(), st.sampled_from([(), ("=",), ("\n", "3"), ("b=3",)]))
def test_chunks_join_to_the_whole(llm: LLM, params: SamplingParams, stop: tuple[str, ...]) -> None:
    if params.thinking is not None and (params.max_tokens or 0) <= 12:
        return
    params = SamplingParams(
        temperature=params.temperature,
        max_tokens=params.max_tokens,
        seed=params.seed,
        stop=stop,
        thinking=params.thinking,
    )
    chunks, output = collect(llm, PROMPTS[0], params)
    sample = output.outputs[0]
    assert "".join(chunk.text for chunk in chunks) == sample.text
    assert "".join(chunk.reasoning for chunk in chunks) == (sample.reasoning or "")
    assert [t for chunk in chunks for t in chunk.token_ids] == sample.token_ids
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == sample.finish_reason
    assert not any(text in sample.text for text in stop)
    quiet = llm.generate(PROMPTS[0], params, progress=False)[0].outputs[0]
    assert quiet == sample


def test_stop_strings_end_the_answer_and_not_the_thinking(llm: LLM) -> None:
    chat = [{"role": "user", "content": "a=3 b=a+4 c=b*2 c?"}]
    params = SamplingParams(temperature=0, max_tokens=80, stop=("=", "Answer"))
    sample = llm.chat(chat, params, progress=False)[0].outputs[0]
    assert sample.reasoning is not None and "=" in sample.reasoning
    assert sample.finish_reason == "stop" and sample.stop_reason == "Answer"
    assert sample.text == "Final "


def test_stop_token_ids_are_reported(llm: LLM) -> None:
    free = llm.generate(
        PROMPTS[0], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True), progress=False
    )[0].outputs[0]
    stop = free.token_ids[3]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, stop_token_ids=(stop,))
    sample = llm.generate(PROMPTS[0], params, progress=False)[0].outputs[0]
    assert sample.token_ids == free.token_ids[: free.token_ids.index(stop) + 1]
    assert sample.finish_reason == "stop" and sample.stop_reason == stop


@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "presence_penalty"])
@pytest.mark.parametrize("value", [math.nan, math.inf, "1", True, None, -5.0])
def test_bad_numbers_are_rejected_by_name(field: str, value: object) -> None:
    with pytest.raises(RequestError) as error:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert error.value.param == field


@pytest.mark.parametrize("field", ["n", "max_tokens", "top_k", "logprobs"])
@pytest.mark.parametrize("value", [2**40, -7, 1.5, "1", True])
def test_bad_integers_are_rejected_by_name(field: str, value: object) -> None:
    with pytest.raises(RequestError) as error:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert error.value.param == field


def test_one_params_for_each_prompt_or_an_error(llm: LLM) -> None:
    with pytest.raises(RequestError, match="2 params for 1 prompts"):
        llm.generate("a", [SamplingParams(), SamplingParams()], progress=False)
