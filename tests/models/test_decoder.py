"""The decoder against transformers: same weights, same prompts, same logits and tokens."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from s1engine.models.decoder import Decoder
from s1engine.models.loader import load_decoder
from s1engine.models.model_config import ModelConfig
from s1engine.ops.cpu_ops import CpuOps
from tests.models.harness import Rows, load, oracle, oracle_logits, run_in_chunks
from tests.tiny_models import make_model

TOLERANCE = 1e-4

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {
    "rope_type": "longrope",
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.2],
    "long_factor": [1.0, 2.0, 5.0],
}
LINEAR = {"rope_type": "linear", "factor": 2.5}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": {"rope_theta": 1e6, **YARN}}),
    "qwen3": ("qwen3", {}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "qwen3-bias": ("qwen3", {"attention_bias": True}),
    "llama": ("llama", {"rms_norm_eps": 1e-2}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_theta": 1e4, **LINEAR}}),
    "llama-bias": ("llama", {"attention_bias": True}),
    "mistral": ("mistral", {"num_key_value_heads": 1}),
    "mistral-head-dim": ("mistral", {"head_dim": 12, "sliding_window": 256}),
    "mistral-window": ("mistral", {"sliding_window": 16}),
    "qwen2-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    ),
    "ministral3": ("ministral3", {}),
    "mistral3": ("mistral3", {}),
    "phi3": ("phi3", {"sliding_window": 33}),
    "phi3-partial": (
        "phi3",
        {
            "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5},
            "num_key_value_heads": 4,
        },
    ),
    "seed-oss": ("seed_oss", {}),
    "seed-oss-o-bias": ("seed_oss", {"attention_out_bias": True, "attention_bias": False}),
    "smollm3": ("smollm3", {}),
    "smollm3-window": (
        "smollm3",
        {"use_sliding_window": True, "sliding_window": 16, "no_rope_layers": [1, 0, 0, 1]},
    ),
    "olmo2": ("olmo2", {"attention_bias": True}),
    "olmo3": ("olmo3", {}),
    "olmo3-yarn": ("olmo3", {"rope_parameters": {"full_attention": {"rope_theta": 1e5, **YARN}}}),
    "gemma3": ("gemma3", {"sliding_window_pattern": 2}),
    "gemma3-linear": (
        "gemma3",
        {
            "layer_types": ["full_attention", "sliding_attention"],
            "rope_parameters": {"full_attention": {"rope_theta": 1e5, **LINEAR}},
        },
    ),
    "gemma3-wrapper": ("gemma3_wrapper", {"tie_word_embeddings": True}),
}

SHORT, LONG = 24, 150


def prompt_of(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(96, (length,), generator=generator).tolist()


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() < TOLERANCE
    assert expected.std() > 0.1, "these logits would look alike whatever the model does"


@pytest.fixture(scope="module", params=VARIANTS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, overrides = VARIANTS[request.param]
    return make_model(tmp_path_factory.mktemp("model"), family, **overrides)


def test_logits_equal_transformers(model: Path) -> None:
    """Whole prompts, chunks, and rows of different lengths side by side."""
    decoder, reference = load(model), oracle(model)
    prompts = [prompt_of(length, seed=length) for length in (1, SHORT, LONG, 7)]
    expected = [oracle_logits(reference, prompt) for prompt in prompts]
    for prompt, logits in zip(prompts, expected, strict=True):
        assert_close(run_in_chunks(decoder, [prompt], [LONG])[0], logits)
    for chunk_sizes in ([LONG] * 4, [1, 5, 33, 2], [1, 1, 40, 7]):
        for actual, logits in zip(
            run_in_chunks(decoder, prompts, chunk_sizes), expected, strict=True
        ):
            assert_close(actual, logits)


NEW_ON_THE_CPU = ("ministral3", "phi3-partial", "olmo3", "gemma3", "smollm3-window")


@pytest.mark.parametrize("variant", NEW_ON_THE_CPU)
def test_the_kernels_of_the_cpu_give_these_logits(tmp_path: Path, variant: str) -> None:
    family, overrides = VARIANTS[variant]
    path = make_model(tmp_path, family, **overrides)
    prompts = [prompt_of(length, seed=length) for length in (1, SHORT, LONG)]
    actual = run_in_chunks(load(path, ops=CpuOps()), prompts, [1, 5, 33])
    for prompt, logits in zip(prompts, actual, strict=True):
        assert_close(logits, oracle_logits(oracle(path), prompt))


def test_attention_sinks_are_those_of_gpt_oss(tmp_path: Path) -> None:
    """A Llama whose attention is that of gpt-oss."""
    path = make_model(tmp_path, "llama", num_hidden_layers=4)
    reference = oracle(path)
    with torch.no_grad():
        for layer in reference.model.layers:
            layer.self_attn.sinks = torch.nn.Parameter(torch.randn(4) * 2)
    reference.save_pretrained(path)
    AttentionInterface.register("with_sinks", gpt_oss_attention)
    reference.set_attn_implementation("with_sinks")
    config = replace(ModelConfig.from_dir(path), attention_sinks=True)
    decoder = load_decoder(path, config, torch.float32, "cpu", CpuOps())
    prompt = prompt_of(60)
    assert_close(run_in_chunks(decoder, [prompt], [17])[0], oracle_logits(reference, prompt))
    for layer in reference.model.layers:
        layer.self_attn.sinks.data.fill_(-torch.inf)
    without = oracle_logits(reference, prompt)
    assert (without - oracle_logits(oracle(path), prompt)).abs().max() < TOLERANCE


def gpt_oss_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> Any:
    count, context = query.shape[2], key.shape[2]
    mask = torch.full((count, context), -torch.inf).triu(context - count + 1)[None, None]
    kwargs = {key: kwargs[key] for key in ("scaling", "dropout") if key in kwargs}
    return eager_attention_forward(module, query, key, value, mask, **kwargs)


def generate(decoder: Decoder, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Greedy continuations of all prompts in one batch."""
    rows = Rows(decoder, len(prompts), max(map(len, prompts)) + count)
    chunks, outputs = prompts, [[] for _ in prompts]
    for _ in range(count):
        chunks = [[int(logits[-1].argmax())] for logits in rows.step(chunks)]
        for output, chunk in zip(outputs, chunks, strict=True):
            output += chunk
    return outputs


def test_greedy_generation_equals_transformers(model: Path) -> None:
    decoder, reference = load(model), oracle(model)
    prompts = [prompt_of(length, seed=100 + length) for length in (3, 30, 11)]
    for prompt, output in zip(prompts, generate(decoder, prompts, 24), strict=True):
        whole = reference.generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None
        )
        assert output == whole[0, len(prompt) :].tolist()


@pytest.mark.parametrize("bound", [24, 160])
def test_longrope_follows_the_bound_of_all_contexts(tmp_path: Path, bound: int) -> None:
    """Up to the original length as in transformers; beyond, contexts longer than it are."""
    path = make_model(
        tmp_path, "phi3", rope_parameters=LONGROPE, original_max_position_embeddings=24
    )
    full = load(path)
    decoder = Decoder(full.config, full.weights, full.ops, max_positions=bound)
    prompt = prompt_of(min(bound, LONG))
    assert_close(run_in_chunks(decoder, [prompt], [17])[0], oracle_logits(oracle(path), prompt))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral", "olmo3", "gemma3"])
def test_low_precision_errs_no_more_than_twice_transformers(
    tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    path = make_model(tmp_path, family, dtype=dtype)
    prompt = prompt_of(60)
    exact = oracle_logits(oracle(path, torch.float32), prompt)
    theirs = (oracle_logits(oracle(path, dtype), prompt) - exact).abs()
    ours = (run_in_chunks(load(path, dtype), [prompt], [17])[0] - exact).abs()
    assert ours.mean() > 0, "not computed in low precision at all"
    assert ours.mean() <= 2 * theirs.mean()
    assert ours.max() <= 2 * theirs.max()


def test_logits_stop_at_the_vocabulary_limit(tmp_path: Path) -> None:
    decoder = load(make_model(tmp_path, "qwen2"))
    hidden = torch.randn(3, 32)
    everything = decoder.logits(hidden, 96)
    assert decoder.logits(hidden, 90).shape == (3, 90)
    torch.testing.assert_close(decoder.logits(hidden, 90), everything[:, :90])


def test_logits_are_float32(tmp_path: Path) -> None:
    decoder = load(make_model(tmp_path, "qwen2"), torch.bfloat16)
    assert decoder.logits(torch.randn(3, 32).bfloat16(), 96).dtype == torch.float32


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    weights = load(make_model(tmp_path, "qwen2", tie_word_embeddings=True)).weights
    assert weights.lm_head is weights.embed


def test_positions_can_be_bounded(tmp_path: Path) -> None:
    path = make_model(tmp_path, "llama")
    full = load(path)
    bounded = Decoder(full.config, full.weights, full.ops, max_positions=40)
    assert bounded.cos_sin[1].shape == (40, 8)
    assert torch.equal(bounded.cos_sin[1], full.cos_sin[1][:40])
