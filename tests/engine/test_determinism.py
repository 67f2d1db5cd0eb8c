"""On the CPU a request's tokens and log-probabilities are bitwise the same alone, in a batch, in
chunks, preempted, forked, and after a cache hit, in the dtypes that could lose a last bit."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s1engine.config import BUNDLED_MODEL
from s1engine.engine.llm import LLM
from s1engine.eval.arithmetic import generate
from s1engine.models.model_config import ModelConfig
from s1engine.outputs import RequestOutput
from s1engine.sampling_params import SamplingParams, ThinkingBudget

QUESTIONS = [question.question for question in generate(5, 12)]
KINDS = ("bfloat16", "int8", "int4", "int8 cache")


@pytest.fixture(scope="module", params=KINDS)
def engines(request: pytest.FixtureRequest) -> Iterator[tuple[LLM, LLM]]:
    """One with ample memory, one with little memory and few tokens a step."""
    options = {
        "bfloat16": {},
        "int8": {"quantization": "int8"},
        "int4": {"quantization": "int4"},
        "int8 cache": {"kv_cache_dtype": "int8"},
    }[request.param]
    token = ModelConfig.from_dir(BUNDLED_MODEL).kv_bytes_per_token(torch.bfloat16)
    wide = LLM(progress=False, device="cpu", dtype="bfloat16", max_num_seqs=16, **options)
    tight = LLM(
        progress=False, device="cpu", dtype="bfloat16", max_num_seqs=8, max_num_batched_tokens=24,
        max_model_len=448, kv_cache_memory_gb=672 * token / 2**30, **options,
    )  # fmt: skip
    yield wide, tight
    wide.close()
    tight.close()


requests = st.lists(
    st.tuples(
        st.integers(0, len(QUESTIONS) - 1),
        st.builds(
            SamplingParams,
            temperature=st.sampled_from([0.0, 1.0]),
            seed=st.integers(0, 9),
            max_tokens=st.integers(20, 160),
            min_tokens=st.sampled_from([0, 0, 20]),
            n=st.sampled_from([1, 1, 2]),
            logprobs=st.sampled_from([None, 1]),
            prompt_logprobs=st.sampled_from([None, None, 1]),
            thinking=st.builds(ThinkingBudget, max_tokens=st.integers(0, 60))
            | st.builds(ThinkingBudget, num_waits=st.integers(0, 2))
            | st.just(ThinkingBudget(checkpoints=(8, 24))),
        ),
    ),
    min_size=2,
    max_size=7,
)


def facts(output: RequestOutput) -> list[object]:
    samples = [*output.outputs, *(checkpoint.output for checkpoint in output.checkpoints)]
    own: list[object] = [(sample.token_ids, sample.logprobs) for sample in samples]
    return [*own, output.prompt_logprobs]


@settings(max_examples=10)
@given(requests)
def test_a_request_is_bitwise_the_same_in_any_batch(
    engines: tuple[LLM, LLM], asked: list[tuple[int, SamplingParams]]
) -> None:
    wide, tight = engines
    chats = [[{"role": "user", "content": QUESTIONS[index]}] for index, _ in asked]
    params = [one for _, one in asked]
    wide.engine.scheduler.clear_cache()
    alone = []
    for chat, one in zip(chats, params, strict=True):
        alone += [facts(output) for output in wide.chat([chat], [one], progress=False)]
        wide.engine.scheduler.clear_cache()
    for llm in (wide, wide, tight):  # the second time after a cache hit
        crowd = llm.chat(chats, params, progress=False)
        assert [facts(output) for output in crowd] == alone
