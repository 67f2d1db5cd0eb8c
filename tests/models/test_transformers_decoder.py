"""Models that transformers computes with our paged attention, against transformers alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from s1engine.errors import ModelError
from s1engine.models.implementation import read_facts
from s1engine.models.model_config import ModelConfig
from s1engine.models.paged_interface import marked_window, window_mask
from s1engine.models.transformers_config import TransformersConfig
from s1engine.models.transformers_decoder import TransformersDecoder
from s1engine.models.transformers_loader import load_transformers_decoder
from s1engine.ops import Ops
from s1engine.ops.cpu_ops import CpuOps
from s1engine.ops.torch_ops import TorchOps
from tests.models.harness import Rows, oracle, oracle_logits, run_in_chunks
from tests.tiny_models import TRANSFORMERS_SIZES, make_transformers_model

TOLERANCE = 1e-4
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
# Latent attention: queries and keys of 16, values of 8.
LATENT = {"num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "v_head_dim": 8}
LATENT |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "n_group": 1, "topk_group": 1}
# Wide full layers, narrow ones with windows that reuse the keys of others.
GEMMA_4 = {"head_dim": 8, "global_head_dim": 16, "num_hidden_layers": 6, "sliding_window": 8}
GEMMA_4 |= {
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "vocab_size_per_layer_input": 96,
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", {"head_dim": 16}),
    "llama": ("llama", {}),
    "qwen3-moe": ("qwen3_moe", {"num_experts": 4, "head_dim": 16, **EXPERTS}),
    "gpt-oss": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16,
                            "sliding_window": 8}),
    "cohere2": ("cohere2", {"sliding_window": 8, "logit_scale": 0.5}),
    "granite": ("granite", {"logits_scaling": 4.0, "attention_multiplier": 0.3}),
    "glm4": ("glm4", {"head_dim": 16}),
    "olmo3": ("olmo3", {"sliding_window": 8}),
    "gpt-neox": ("gpt_neox", {}),
    "phi": ("phi", {}),
    "gemma3": ("gemma3_text", {"head_dim": 16, "final_logit_softcapping": 2.0}),
    "gemma4": ("gemma4_text", {**GEMMA_4, "num_kv_shared_layers": 0}),
    "deepseek-v3": ("deepseek_v3", {"n_routed_experts": 4, **EXPERTS, **LATENT}),
}  # fmt: skip


def load(path: Path, ops: Ops | None = None) -> TransformersDecoder:
    config = TransformersConfig.from_dir(path)
    return load_transformers_decoder(
        config, torch.float32, "cpu", ops or TorchOps(), lambda facts: None
    )


def prompt_of(length: int) -> list[int]:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(96, (length,), generator=generator).tolist()


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() < TOLERANCE
    assert expected.std() > 0.1, "these logits would look alike whatever the model does"


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model_type, overrides = MODELS[request.param]
    return make_transformers_model(tmp_path_factory.mktemp("model"), model_type, **overrides)


def test_logits_equal_transformers(model: Path) -> None:
    """Whole prompts, chunks, and rows of different lengths side by side."""
    decoder, reference = load(model, CpuOps()), oracle(model)
    prompts = [prompt_of(length) for length in (1, 24, 60)]
    expected = [oracle_logits(reference, prompt) for prompt in prompts]
    for chunk_sizes in ([60] * 3, [1, 5, 33], [1, 1, 17]):
        for actual, logits in zip(
            run_in_chunks(decoder, prompts, chunk_sizes), expected, strict=True
        ):
            assert_close(actual, logits)


def test_greedy_generation_equals_transformers(model: Path) -> None:
    decoder, reference, count = load(model), oracle(model), 12
    prompts = [prompt_of(length) for length in (3, 20)]
    rows = Rows(decoder, len(prompts), 20 + count)
    chunks, outputs = prompts, [list(prompt) for prompt in prompts]
    for _ in range(count):
        chunks = [[int(logits[-1].argmax())] for logits in rows.step(chunks)]
        for output, chunk in zip(outputs, chunks, strict=True):
            output += chunk
    for prompt, output in zip(prompts, outputs, strict=True):
        whole = reference.generate(
            torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None
        )
        assert output == whole[0].tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_passes_the_self_check(tmp_path: Path, dtype: torch.dtype) -> None:
    path = make_transformers_model(tmp_path, "qwen3_moe", num_experts=4, **EXPERTS)
    config = TransformersConfig.from_dir(path)
    decoder = load_transformers_decoder(config, dtype, "cpu", CpuOps(), lambda facts: None)
    assert decoder.dtype == dtype
    logits = run_in_chunks(decoder, [prompt_of(20)], [7])[0]
    expected = oracle_logits(oracle(path), prompt_of(20))
    assert 0 < (logits - expected).norm() < 0.1 * expected.norm()


def test_facts_are_those_of_the_module(tmp_path: Path) -> None:
    config = load(
        make_transformers_model(tmp_path, *MODELS["gpt-oss"][:1], **MODELS["gpt-oss"][1])
    ).config
    assert (config.head_dim, config.num_kv_heads) == (16, 2)
    assert config.layer_windows == (8, 0) and config.max_window == 0
    module = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert config.num_parameters == sum(p.numel() for p in module.parameters())


def test_mxfp4_experts_are_expanded(tmp_path: Path) -> None:
    """As OpenAI publishes gpt-oss: two values a byte and a power of two for 32 of them."""
    sizes = {"num_local_experts": 2, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    sizes |= {
        "hidden_size": 64,
        "intermediate_size": 32,
        "head_dim": 16,
        "tie_word_embeddings": False,
    }
    plain, packed = (
        make_transformers_model(tmp_path / "plain", "gpt_oss", **sizes),
        tmp_path / "packed",
    )
    tensors, stored = load_file(plain / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors[name].shape
        blocks = torch.randint(256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        scales = torch.randint(122, 127, blocks.shape[:3], dtype=torch.uint8)
        tensors[name] = mxfp4_values(blocks, scales).transpose(1, 2).contiguous()
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    packed.mkdir()
    kept = {name: tensor for name, tensor in tensors.items() if f"{name}_blocks" not in stored}
    save_file({**kept, **stored}, packed / "model.safetensors", {"format": "pt"})
    fields = json.loads((plain / "config.json").read_text())
    fields["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": []}
    (packed / "config.json").write_text(json.dumps(fields))
    prompt = prompt_of(20)
    actual = run_in_chunks(load(packed, CpuOps()), [prompt], [7])[0]
    assert_close(actual, oracle_logits(oracle(plain), prompt))
    assert TransformersConfig.from_dir(packed).num_parameters == sum(
        tensor.numel() for tensor in tensors.values()
    )


def mxfp4_values(blocks: Tensor, scales: Tensor) -> Tensor:
    """blocks [E, N, K / 32, 16], scales [E, N, K / 32] -> [E, N, K] float32; the low half of a byte
    is first (OCP Microscaling Formats, 1.0)."""
    positive = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    table = torch.cat((positive, -positive))
    halves = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2).long()
    return (table[halves] * 2.0 ** (scales.float() - 127)[..., None]).flatten(2)


# --- windows from masks ---


def mask_of(allows: Callable[[Any, Any], Any], last: int) -> int | None:
    config = AutoConfig.for_model("llama", max_position_embeddings=last)
    return marked_window(
        window_mask(mask_function=lambda b, h, q, k: (k <= q) & allows(q, k), config=config)
    )


@given(last=st.integers(2, 400), window=st.integers(1, 500))
def test_the_window_of_a_mask(last: int, window: int) -> None:
    read = mask_of(lambda q, k: k > q - window, last)
    assert read == (window if window < last else 0)


@given(last=st.integers(8, 400), chunk=st.integers(2, 100))
def test_other_masks_have_no_window(last: int, chunk: int) -> None:
    """Chunked attention, holes, and keys after the query."""
    if chunk < last // 2:
        assert mask_of(lambda q, k: q // chunk == k // chunk, last) is None
    assert mask_of(lambda q, k: k != last // 4, last) is None
    config = AutoConfig.for_model("llama", max_position_embeddings=last)
    both = window_mask(mask_function=lambda b, h, q, k: k >= 0, config=config)
    assert marked_window(both) is None and marked_window(torch.zeros(1, 1, 4, 4)) is None


# --- what is refused ---

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "mamba": ("mamba", {}, "architectures MambaForCausalLM keeps state outside attention"),
    "jamba": ("jamba", {"num_experts": 2}, "architectures JambaForCausalLM keeps state"),
    "qwen3-next": ("qwen3_next", {"num_experts": 2, **EXPERTS}, "'linear_attention'"),
    "llama4": ("llama4_text", {}, "layer_types 'chunked_attention'"),
    "falcon": ("falcon", {}, "architectures FalconForCausalLM does not attend by"),
    "gemma2": ("gemma2", {"head_dim": 16}, "attn_logit_softcapping is set"),
    "longrope": (
        "phi3",
        {"original_max_position_embeddings": 64,
         "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0,
                             "original_max_position_embeddings": 64,
                             "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}},
        "rope_parameters rope_type 'longrope'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_would_be_wrong_are_refused_by_name(tmp_path: Path, name: str) -> None:
    model_type, overrides, reason = REFUSED[name]
    config = AutoConfig.for_model(model_type, **{**TRANSFORMERS_SIZES, **overrides})
    config.architectures = [type(AutoModelForCausalLM.from_config(config)).__name__]
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"config.json: .*{reason}"):
        read_facts(tmp_path, "transformers")


@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_encoders_are_refused_by_name(tmp_path: Path, model_type: str) -> None:
    config = AutoConfig.for_model(model_type)
    config.architectures = ["BartForCausalLM" if model_type == "bart" else "T5Model"]
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"architectures|is_encoder_decoder"):
        read_facts(tmp_path, "transformers")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model_type": "unheard-of"}, "model_type 'unheard-of' is unknown to transformers"),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}}, "is never run"),
        ({"architectures": ["LlamaModel"]}, "architectures .*'LlamaModel'.* no causal language"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config 'gptq' is not"),
        ({"num_hidden_layers": "two"}, "is refused by transformers"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
         "rope_parameters rope_type 'dynamic'"),
    ],
)  # fmt: skip
def test_unknown_fields_are_refused_by_name(
    tmp_path: Path, fields: dict[str, Any], reason: str
) -> None:
    file = make_transformers_model(tmp_path, "llama") / "config.json"
    (tmp_path / "code.py").write_text("raise AssertionError('code of a model directory was run')")
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    with pytest.raises(ModelError, match=reason):
        read_facts(tmp_path, "transformers")


def test_a_missing_tensor_is_refused_by_name(tmp_path: Path) -> None:
    make_transformers_model(tmp_path, "qwen3")
    file = tmp_path / "config.json"
    fields = {**json.loads(file.read_text()), "attention_bias": True}
    file.write_text(json.dumps(fields))
    with pytest.raises(ModelError, match=r"tensor 'model\.layers\.0\.self_attn.*bias' is missing"):
        load(tmp_path)


def test_tokens_that_see_their_neighbours_fail_the_self_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """State that is not in the KV cache: each token takes a part of the one before."""
    make_transformers_model(tmp_path, "llama")
    forward = LlamaDecoderLayer.forward

    def shifted(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        before = torch.nn.functional.pad(hidden_states, (0, 0, 1, 0))[:, :-1]
        return forward(self, hidden_states + 0.5 * before, *args, **kwargs)

    load(tmp_path)
    monkeypatch.setattr(LlamaDecoderLayer, "forward", shifted)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM .*it gives other results"):
        load(tmp_path)


def test_layers_that_do_not_attend_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_transformers_model(tmp_path, "llama")
    monkeypatch.setattr(
        LlamaDecoderLayer, "forward", lambda self, hidden_states, **_: hidden_states
    )
    with pytest.raises(ModelError, match="0 of 2 layers attend"):
        load(tmp_path)


# --- which implementation ---


def test_auto_is_native_where_it_can_be(tmp_path: Path) -> None:
    llama = make_transformers_model(tmp_path / "llama", "llama")
    phi = make_transformers_model(tmp_path / "phi", "phi")
    assert isinstance(read_facts(llama, "auto"), ModelConfig)
    assert isinstance(read_facts(llama, "transformers"), TransformersConfig)
    assert isinstance(read_facts(phi, "auto"), TransformersConfig)
    with pytest.raises(ModelError, match=r"architectures .*PhiForCausalLM.* is not supported"):
        read_facts(phi, "native")


def test_the_two_implementations_have_equal_facts(tmp_path: Path) -> None:
    path = make_transformers_model(tmp_path, "qwen3", head_dim=16)
    native, other = read_facts(path, "native"), read_facts(path, "transformers")
    for name in ("vocab_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
                 "max_position_embeddings", "eos_token_ids", "torch_dtype", "architecture",
                 "generation_defaults", "layer_windows", "num_parameters"):  # fmt: skip
        assert getattr(native, name) == getattr(other, name), name
