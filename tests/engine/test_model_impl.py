"""The whole engine over a model that transformers computes, against the native decoder."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from s1engine.engine.llm import LLM
from s1engine.errors import ModelError, RequestError
from s1engine.outputs import CompletionOutput
from s1engine.sampling_params import SamplingParams, ThinkingBudget
from tests.tiny_tokenizer import save_tokenizer

OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "max_num_seqs": 4,
    "max_num_batched_tokens": 24,  # prompts are computed in chunks
    "max_model_len": 256,
    "kv_cache_memory_gb": 0.005,
}


def make_llm(**options: Any) -> LLM:
    return LLM(progress=False, **{**OPTIONS, **options})


@pytest.fixture(scope="module")
def native() -> LLM:
    return make_llm(model_impl="native")


@pytest.fixture(scope="module")
def through() -> LLM:
    return make_llm(model_impl="transformers")


def chats(count: int) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": f"What is {i} + {i * i}?"}] for i in range(count)]


BUDGETS = {
    "free": ThinkingBudget(),
    "small": ThinkingBudget(max_tokens=5),
    "none": ThinkingBudget(max_tokens=0),
    "waits": ThinkingBudget(max_tokens=60, num_waits=2),
    "longer": ThinkingBudget(min_tokens=30, max_tokens=40),
}


@pytest.mark.parametrize("name", BUDGETS)
def test_budgets_are_kept_as_natively(native: LLM, through: LLM, name: str) -> None:
    """More requests than rows, chunked prompts, and the second time from cached blocks."""
    params = SamplingParams(temperature=0, max_tokens=120, thinking=BUDGETS[name])
    expected = samples(native, params)
    assert samples(through, params) == expected
    assert samples(through, params) == expected
    through.engine.scheduler.check_integrity()


def samples(llm: LLM, params: SamplingParams) -> list[tuple[Any, ...]]:
    outputs = llm.chat(chats(6), params, progress=False)
    return [facts(output.outputs[0]) for output in outputs]


def facts(output: CompletionOutput) -> tuple[Any, ...]:
    thinking = output.thinking
    assert thinking is not None
    return output.token_ids, output.text, thinking.tokens, thinking.end_reason


def test_drafts_change_no_token(through: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=80, thinking=ThinkingBudget(num_waits=3))
    drafting = make_llm(model_impl="transformers", num_speculative_tokens=4)
    assert samples(drafting, params) == samples(through, params)


def test_an_int8_cache_serves_too() -> None:
    params = SamplingParams(temperature=0, max_tokens=60)
    native, through = (
        samples(make_llm(model_impl=impl, kv_cache_dtype="int8"), params)
        for impl in ("native", "transformers")
    )
    assert through == native


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts with a tokenizer: no native family."""
    path = tmp_path_factory.mktemp("experts")
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=save_tokenizer(path), hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        max_position_embeddings=256, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, initializer_range=0.25, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def test_experts_generate_what_transformers_generates(experts: Path) -> None:
    llm = make_llm(model=str(experts), reasoning_format="none")
    prompts = [[5, 6, 7], list(range(3, 60)), [9] * 30, [250], list(range(40, 80))]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    outputs = llm.generate(prompts, params, progress=False)  # type: ignore[arg-type]
    module = AutoModelForCausalLM.from_pretrained(experts)
    for prompt, output in zip(prompts, outputs, strict=True):
        whole = module.generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None
        )
        assert list(output.outputs[0].token_ids) == whole[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("param", "value"), [("quantization", "int8"), ("tensor_parallel_size", 2), ("run_ahead", 4)]
)
def test_options_of_native_models_are_refused_by_name(param: str, value: object) -> None:
    with pytest.raises(RequestError, match=f"{param} {value}: Qwen2ForCausalLM is") as error:
        make_llm(model_impl="transformers", **{param: value})
    assert error.value.param == param


def test_native_refuses_other_architectures_by_name(experts: Path) -> None:
    with pytest.raises(ModelError, match="Qwen3MoeForCausalLM"):
        make_llm(model=str(experts), model_impl="native")
    with pytest.raises(RequestError, match="model_impl must be one of"):
        make_llm(model_impl="torch")
