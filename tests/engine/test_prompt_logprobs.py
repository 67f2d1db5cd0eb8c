"""Log-probabilities of prompts: those of transformers' own model, the same bit for bit in any
chunks and batches, cached or preempted, and computed once."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from s1engine.config import BUNDLED_MODEL
from s1engine.engine.llm import LLM
from s1engine.errors import RequestError
from s1engine.ops.cpu_ops import CpuOps
from s1engine.ops.torch_ops import TorchOps
from s1engine.prompt_logprobs import PromptLogprob, PromptLogprobs, PromptLogprobsPart
from s1engine.runner import prompt_scores
from s1engine.sampling_params import MAX_LOGPROBS, SamplingParams, ThinkingBudget
from tests.tiny_models import make_model
from tests.tiny_tokenizer import save_tokenizer

VOCAB = 200  # ids of the prompts
prompts = st.lists(st.integers(5, VOCAB), min_size=1, max_size=90)


def score(llm: LLM, prompt: Sequence[int], k: int = 2, **fields: object) -> PromptLogprobs:
    params = SamplingParams(prompt_logprobs=k, max_tokens=0, **fields)  # type: ignore[arg-type]
    (output,) = llm.generate([list(prompt)], params)
    assert output.prompt_logprobs is not None
    return output.prompt_logprobs


@pytest.fixture(scope="module", params=["native", "transformers", "windows"])
def measured(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[LLM, torch.nn.Module]]:
    """An engine that computes a prompt in chunks, and transformers' model in float64."""
    path, options = BUNDLED_MODEL, {}
    if request.param == "windows":
        folder = tmp_path_factory.mktemp("windows")
        path = make_model(folder, "mistral", sliding_window=32, vocab_size=330)
        save_tokenizer(path)
    elif request.param == "transformers":
        options = {"model_impl": "transformers"}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    with LLM(path, dtype="float32", max_num_seqs=4, max_num_batched_tokens=24, **options) as llm:
        yield llm, model.eval()


@settings(max_examples=8)
@given(prompts, st.integers(0, MAX_LOGPROBS))
def test_they_are_those_of_transformers(
    measured: tuple[LLM, torch.nn.Module], prompt: list[int], k: int
) -> None:
    llm, model = measured
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0]
    want = logits[:, : llm.engine.compiler.text.vocab_limit].log_softmax(-1)
    first, *rest = score(llm, prompt, k)
    assert first is None and len(rest) == len(prompt) - 1
    for at, (token, got) in enumerate(zip(prompt[1:], rest, strict=True)):
        assert got is not None and got.token_id == token and len(got.top) == k
        assert got.logprob == pytest.approx(float(want[at, token]), abs=2e-4)
        assert abs(got.rank - 1 - int((want[at] > want[at, token]).sum())) <= 1  # near-ties
        best = want[at].topk(k).values if k else ()
        assert [value for _, value in got.top] == pytest.approx([float(b) for b in best], abs=2e-4)
        for token_id, value in got.top:
            assert value == pytest.approx(float(want[at, token_id]), abs=2e-4)


mixed = st.lists(
    st.tuples(
        prompts,
        st.builds(
            SamplingParams,
            temperature=st.sampled_from([0.0, 1.0]),
            seed=st.integers(0, 9),
            max_tokens=st.sampled_from([0, 0, 1, 40]),
            prompt_logprobs=st.sampled_from([None, 0, 3]),
            n=st.sampled_from([1, 1, 2]),
            repetition_penalty=st.sampled_from([1.0, 1.5]),
            logit_bias=st.sampled_from([{}, {7: 5.0}]),
            logprobs=st.sampled_from([None, 1]),
        ),
    ),
    min_size=1,
    max_size=7,
)


@settings(max_examples=15)
@given(mixed)
def test_batched_chunked_preempted_and_cached_equal_alone_and_cold(
    llm: LLM, tight: LLM, asked: list[tuple[list[int], SamplingParams]]
) -> None:
    tokens, params = [p for p, _ in asked], [p for _, p in asked]
    crowds = [one.generate(tokens, params) for one in (tight, llm, llm)]
    tight.engine.scheduler.check_integrity()
    for i, (prompt, one) in enumerate(asked):
        llm.engine.scheduler.clear_cache()
        (alone,) = llm.generate([prompt], one)
        for crowd in crowds:
            assert crowd[i].outputs == alone.outputs
            assert crowd[i].prompt_logprobs == alone.prompt_logprobs
            if one.prompt_logprobs is not None:
                assert crowd[i].usage.cached_tokens == 0
        for sample in alone.outputs if one.max_tokens == 0 else ():
            assert sample.token_ids == [] and sample.finish_reason == "length"


def test_chunks_of_logits_change_nothing(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = list(range(5, 80))
    whole = score(llm, prompt)
    monkeypatch.setattr(prompt_scores, "MAX_SCORED_LOGITS", 3 * llm.engine.model_config.vocab_size)
    assert score(llm, prompt) == whole


def test_a_scored_prompt_fills_the_cache_and_never_reads_it(llm: LLM) -> None:
    llm.engine.scheduler.clear_cache()
    prompt, one = list(range(5, 70)), SamplingParams(max_tokens=1, temperature=0)
    score(llm, prompt)
    assert llm.generate([prompt], one)[0].usage.cached_tokens == 64
    both = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    assert llm.generate([prompt], both)[0].usage.cached_tokens == 0


def test_a_preempted_request_keeps_its_scores(tight: LLM, llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=250, ignore_eos=True, prompt_logprobs=1)
    tokens = [[5 + i] * 60 for i in range(6)]
    before = tight.engine.scheduler.stats().num_preemptions
    got = tight.generate(tokens, params)
    assert tight.engine.scheduler.stats().num_preemptions > before
    for prompt, output in zip(tokens, got, strict=True):
        assert output.prompt_logprobs == score(llm, prompt, 1)


def test_a_stream_has_them_on_the_first_chunk_of_each_sample(llm: LLM) -> None:
    params = SamplingParams(max_tokens=3, n=2, prompt_logprobs=1, temperature=0)
    *chunks, output = llm.stream(list(range(5, 50)), params)
    for index in range(2):
        first, *rest = [chunk for chunk in chunks if chunk.index == index]  # type: ignore[union-attr]
        assert first.prompt_logprobs == output.prompt_logprobs  # type: ignore[union-attr]
        assert all(chunk.prompt_logprobs is None for chunk in rest)  # type: ignore[union-attr]


@pytest.mark.parametrize("budget", [None, 0, 5])
def test_only_what_the_user_gave_is_scored(llm: LLM, budget: int | None) -> None:
    thinking = None if budget is None else ThinkingBudget(max_tokens=budget, answer_reserve=4)
    params = SamplingParams(prompt_logprobs=0, max_tokens=30, thinking=thinking)
    prompt = list(range(5, 40))
    (output,) = llm.generate([prompt], params)
    assert output.prompt_logprobs == score(llm, prompt, 0)
    with pytest.raises(RequestError, match="max_tokens"):
        score(llm, prompt, 0, thinking=ThinkingBudget(min_tokens=4))


def test_a_prompt_may_fill_the_context(tight: LLM) -> None:
    scores = score(tight, [7] * tight.engine.max_model_len, 0)
    assert len(scores) == tight.engine.max_model_len
    with pytest.raises(RequestError, match="context"):
        score(tight, [7] * (tight.engine.max_model_len + 1))


@given(st.integers(1, 5), st.integers(1, 70), st.integers(0, 9), st.integers(0, 2**32))
def test_native_scores_are_those_of_tensor_operations(
    rows: int, vocab: int, k: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    logits = random.integers(-20, 20, (rows, vocab)).astype(np.float32) / 4
    logits[random.random((rows, vocab)) < 0.05] = np.nan
    targets = torch.from_numpy(random.integers(0, vocab + 2, rows))
    k = min(k, vocab)
    got = CpuOps().score_rows(torch.from_numpy(logits), targets, k)
    want = TorchOps().score_rows(torch.from_numpy(logits), targets, k)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-6, atol=4e-6)


@given(st.lists(st.integers(1, 6), max_size=4), st.integers(0, 3), st.integers(0, 2**32))
def test_packed_parts_are_what_was_packed(counts: list[int], k: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    parts, want, first = [], [], 1
    for n in counts:
        logprobs = random.normal(size=n).astype(np.float32)
        ranks = random.integers(1, 99, n).astype(np.int32)
        top = random.normal(size=(n, k)).astype(np.float32)
        ids = random.integers(0, 99, (n, k)).astype(np.int32)
        parts.append(PromptLogprobsPart.pack(1, first, logprobs, ranks, top, ids))
        for i in range(n):
            pairs = tuple(zip(ids[i].tolist(), top[i].tolist(), strict=True))
            want.append(PromptLogprob(first + i, float(logprobs[i]), int(ranks[i]), pairs))
        first += n
    items = PromptLogprobs(list(range(first)), parts)
    assert list(items) == [None, *want] and items[-1] == [None, *want][-1]
    assert items[1:] == want
