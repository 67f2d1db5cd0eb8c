"""Reading config.json; unsupported fields are refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from s1engine.errors import ModelError
from s1engine.models.model_config import ModelConfig
from s1engine.models.rope import Rope

QWEN2_5_7B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 152064,
}

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "max_position_embeddings": 1024,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 100,
}


def small(architecture: str, **fields: Any) -> dict[str, Any]:
    return {"architectures": [architecture], **SMALL, **fields}


def parse(path: Path, config: Any) -> ModelConfig:
    (path / "config.json").write_text(json.dumps(config))
    return ModelConfig.from_dir(path)


def test_qwen2_5(tmp_path: Path) -> None:
    config = parse(tmp_path, QWEN2_5_7B)
    assert config.architecture == "Qwen2ForCausalLM"
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (28, 28, 4)
    assert (config.head_dim, config.hidden_size, config.intermediate_size) == (128, 3584, 18944)
    assert (config.qkv_bias, config.o_bias, config.qk_norm) == (True, False, False)
    assert config.rope == Rope(theta=1e6)
    assert config.rms_norm_eps == 1e-6
    assert config.eos_token_ids == (151645,)
    assert config.torch_dtype == torch.bfloat16
    assert config.max_position_embeddings == 32768
    assert not config.tie_word_embeddings
    assert config.num_parameters == 7_615_616_512  # as the model's card counts: 7.61 B
    assert config.kv_bytes_per_token(torch.bfloat16) == 57_344


def test_qwen3(tmp_path: Path) -> None:
    config = parse(tmp_path, small("Qwen3ForCausalLM", num_key_value_heads=2, attention_bias=True))
    assert (config.qk_norm, config.qkv_bias, config.o_bias) == (True, True, True)
    assert config.head_dim == 128
    assert config.tensor_shapes()["model.layers.1.self_attn.k_proj.weight"] == (256, 64)
    assert config.tensor_shapes()["model.layers.1.self_attn.k_norm.weight"] == (128,)


def test_llama(tmp_path: Path) -> None:
    config = parse(tmp_path, small("LlamaForCausalLM", head_dim=None, dtype="float16"))
    assert (config.num_kv_heads, config.head_dim) == (4, 16)
    assert (config.qkv_bias, config.o_bias, config.qk_norm) == (False, False, False)
    assert config.torch_dtype == torch.float16
    assert config.eos_token_ids == ()


def test_mistral_with_a_window_that_never_closes(tmp_path: Path) -> None:
    for fields in ({"sliding_window": None}, {"sliding_window": 1024}, {}):
        assert not parse(tmp_path, small("MistralForCausalLM", **fields)).qkv_bias


def test_yarn_extends_the_context(tmp_path: Path) -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = parse(tmp_path, {**QWEN2_5_7B, "rope_scaling": scaling})
    assert config.max_position_embeddings == 131072


def test_remote_code_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('was run')")
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    assert parse(tmp_path, {**QWEN2_5_7B, "auto_map": auto_map}).num_layers == 28


REFUSALS: dict[str, tuple[str, dict[str, Any]]] = {
    # fields of a Qwen2 config, and the words that the error must hold
    "other-architecture": ("architectures", {"architectures": ["GPT2LMHeadModel"]}),
    "two-architectures": ("architectures", {"architectures": ["LlamaForCausalLM", "X"]}),
    "no-architecture": ("architectures", {"architectures": None}),
    "nested-architecture": ("architectures", {"architectures": [["LlamaForCausalLM"]]}),
    "window-text": ("use_sliding_window", {"use_sliding_window": "yes"}),
    "layers": ("layer_types", {"layer_types": ["full_attention", "sliding_attention"]}),
    "layers-unknown": ("'chunked_attention'", {"layer_types": ["chunked_attention"] * 28}),
    "layers-without-window": ("no sliding_window", {"layer_types": ["sliding_attention"] * 28}),
    "layers-text": ("layer_types", {"layer_types": 3}),
    "quantized": ("quantization_config", {"quantization_config": {"quant_method": "gptq"}}),
    "activation": ("hidden_act", {"hidden_act": "gelu"}),
    "norm-flag": ("use_post_norm", {"use_post_norm": True}),
    "softcapping": ("attn_logit_softcapping", {"attn_logit_softcapping": 50.0}),
    "logit-softcapping": ("final_logit_softcapping", {"final_logit_softcapping": 30.0}),
    "multiplier": ("residual_multiplier", {"residual_multiplier": 0.22}),
    "experts": ("num_experts", {"num_experts": 8}),
    "no-rope": ("no_rope_layers", {"no_rope_layers": [1, 0]}),
    "head-bias": ("lm_head_bias", {"lm_head_bias": True}),
    "mixture": ("mixture of experts", {"architectures": ["GptOssForCausalLM"]}),
    "head-sizes": ("head sizes", {"architectures": ["Gemma4ForConditionalGeneration"]}),
    "mlp-bias": ("mlp_bias", {"mlp_bias": True}),
    "not-causal": ("is_causal", {"is_causal": False}),
    "bidirectional": ("use_bidirectional_attention", {"use_bidirectional_attention": True}),
    "dtype": ("torch_dtype", {"torch_dtype": "float8_e4m3fn"}),
    "dtype-list": ("torch_dtype", {"torch_dtype": ["bfloat16"]}),
    "zero-layers": ("num_hidden_layers", {"num_hidden_layers": 0}),
    "many-layers": ("num_hidden_layers", {"num_hidden_layers": 10**9}),
    "float-hidden": ("hidden_size", {"hidden_size": 3584.0}),
    "bool-vocab": ("vocab_size", {"vocab_size": True}),
    "negative-inner": ("intermediate_size", {"intermediate_size": -1}),
    "missing-vocab": ("vocab_size is missing", {"vocab_size": None}),
    "positions": ("max_position_embeddings", {"max_position_embeddings": 2**40}),
    "kv-heads": ("num_key_value_heads", {"num_key_value_heads": 3}),
    "heads": ("num_attention_heads", {"num_attention_heads": 27, "num_key_value_heads": 27}),
    "odd-head": ("head_dim", {"head_dim": 127}),
    "eps": ("rms_norm_eps", {"rms_norm_eps": 0}),
    "eps-nan": ("rms_norm_eps", {"rms_norm_eps": float("nan")}),
    "theta": ("rope_theta", {"rope_theta": -1.0}),
    "tie": ("tie_word_embeddings", {"tie_word_embeddings": 1}),
    "eos-large": ("eos_token_id", {"eos_token_id": 152064}),
    "eos-text": ("eos_token_id", {"eos_token_id": ["<eos>"]}),
    "rope-kind": ("'dynamic'", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    "rope-longrope": ("short_factor", {"rope_parameters": {"rope_type": "longrope"}}),
    "rope-longrope-numbers": (
        "long_factor",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "short_factor": [1] * 64,
                "long_factor": [1],
            }
        },
    ),
    "rope-beta": (
        "llama_4_scaling_beta",
        {"rope_parameters": {"rope_type": "default", "llama_4_scaling_beta": 0.1}},
    ),
    "rope-sections": ("full_attention", {"rope_parameters": {"full_attention": {}}}),
    "rope-no-kind": ("rope_type", {"rope_scaling": {"factor": 2.0}}),
    "rope-text": ("rope_scaling", {"rope_scaling": "linear"}),
    "rope-unknown": ("mrope_section", {"rope_scaling": {"type": "default", "mrope_section": [1]}}),
    "rope-factor": ("factor", {"rope_scaling": {"type": "linear", "factor": 0.5}}),
    "rope-no-factor": ("factor is missing", {"rope_scaling": {"type": "yarn"}}),
    "rope-partial": ("partial_rotary_factor", {"partial_rotary_factor": 0.5}),
    "rope-betas": (
        "beta_fast",
        {"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": 1, "beta_slow": 2}},
    ),
    "rope-llama3": (
        "high_freq_factor",
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8,
                "low_freq_factor": 4,
                "high_freq_factor": 4,
            }
        },
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_by_name(tmp_path: Path, case: str) -> None:
    words, fields = REFUSALS[case]
    with pytest.raises(ModelError) as refusal:
        parse(tmp_path, {**QWEN2_5_7B, **fields})
    assert words in str(refusal.value)
    assert str(tmp_path / "config.json") in str(refusal.value)


def test_windows(tmp_path: Path) -> None:
    """As transformers' classes give them to the layers, with their defaults."""
    mistral = small("MistralForCausalLM", max_position_embeddings=8192)
    assert parse(tmp_path, mistral).layer_windows == (4096, 4096)
    assert parse(tmp_path, {**mistral, "sliding_window": 512}).max_window == 512
    assert parse(tmp_path, {**mistral, "sliding_window": None}).layer_windows == (0, 0)
    assert parse(tmp_path, {**mistral, "sliding_window": 8192}).layer_windows == (0, 0)
    with pytest.raises(ModelError, match="sliding_window must be an integer"):
        parse(tmp_path, {**mistral, "sliding_window": "wide"})
    qwen = {**QWEN2_5_7B, "sliding_window": 4096, "max_window_layers": 26}
    assert parse(tmp_path, qwen).max_window == 0
    windows = parse(tmp_path, {**qwen, "use_sliding_window": True}).layer_windows
    assert windows == (0,) * 26 + (4096, 4096)
    gemma = parse(tmp_path, small("Gemma3ForCausalLM", num_hidden_layers=12))
    assert gemma.layer_windows == ((4096,) * 5 + (0,)) * 2
    assert gemma.max_window == 0
    olmo = small("Olmo3ForCausalLM", layer_types=["sliding_attention"] * 2, sliding_window=64)
    assert parse(tmp_path, olmo).max_window == 64


FAMILY_REFUSALS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mistral-layers": (
        "MistralForCausalLM",
        "layer_types",
        {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "llama-layers": ("LlamaForCausalLM", "layer_types", {"layer_types": ["sliding_attention"] * 2}),
    "llama-window": ("LlamaForCausalLM", "sliding_window", {"sliding_window": 8}),
    "llama-partial": ("LlamaForCausalLM", "partial_rotary_factor", {"partial_rotary_factor": 0.5}),
    "phi3-linear": (
        "Phi3ForCausalLM",
        "'linear'",
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
    ),
    "phi3-odd": ("Phi3ForCausalLM", "partial_rotary_factor", {"partial_rotary_factor": 0.2}),
    "smollm3-layers": ("SmolLM3ForCausalLM", "no_rope_layers", {"no_rope_layers": [1]}),
    "smollm3-numbers": ("SmolLM3ForCausalLM", "no_rope_layers", {"no_rope_layers": [1, 2]}),
    "smollm3-interval": (
        "SmolLM3ForCausalLM",
        "no_rope_layer_interval",
        {"no_rope_layer_interval": 0},
    ),
    "olmo3-rope": ("Olmo3ForCausalLM", "rope_type", {"rope_parameters": {"rope_type": "default"}}),
    "gemma3-bidirectional": (
        "Gemma3ForCausalLM",
        "use_bidirectional_attention",
        {"use_bidirectional_attention": True},
    ),
    "gemma3-softcapping": (
        "Gemma3ForCausalLM",
        "final_logit_softcapping",
        {"final_logit_softcapping": 30.0},
    ),
    "gemma3-activation": ("Gemma3ForCausalLM", "hidden_activation", {"hidden_activation": "gelu"}),
    "gemma3-scale": (
        "Gemma3ForCausalLM",
        "query_pre_attn_scalar",
        {"query_pre_attn_scalar": -1},
    ),
    "wrapper": (
        "Mistral3ForConditionalGeneration",
        "text_config.model_type",
        {"text_config": {"model_type": "qwen2"}},
    ),
    "wrapper-field": (
        "Gemma3ForConditionalGeneration",
        "text_config.attn_logit_softcapping",
        {"text_config": {"model_type": "gemma3_text", **SMALL, "attn_logit_softcapping": 50.0}},
    ),
}


@pytest.mark.parametrize("case", FAMILY_REFUSALS)
def test_a_family_refuses_by_name(tmp_path: Path, case: str) -> None:
    architecture, words, fields = FAMILY_REFUSALS[case]
    with pytest.raises(ModelError) as refusal:
        parse(tmp_path, small(architecture, **fields))
    assert words in str(refusal.value)


CONFIG_CLASSES = {
    "Qwen2ForCausalLM": transformers.Qwen2Config,
    "Qwen3ForCausalLM": transformers.Qwen3Config,
    "LlamaForCausalLM": transformers.LlamaConfig,
    "MistralForCausalLM": transformers.MistralConfig,
    "Ministral3ForCausalLM": transformers.Ministral3Config,
    "Phi3ForCausalLM": transformers.Phi3Config,
    "SeedOssForCausalLM": transformers.SeedOssConfig,
    "SmolLM3ForCausalLM": transformers.SmolLM3Config,
    "Olmo2ForCausalLM": transformers.Olmo2Config,
    "Olmo3ForCausalLM": transformers.Olmo3Config,
    "Gemma3ForCausalLM": transformers.Gemma3TextConfig,
}

INERT = {
    *("attention_dropout", "bos_token_id", "chunk_size_feed_forward", "embd_pdrop", "id2label"),
    *("initializer_range", "is_encoder_decoder", "label2id", "max_window_layers", "model_type"),
    *("output_attentions", "output_hidden_states", "pad_token_id", "pretraining_tp"),
    *("problem_type", "resid_pdrop", "residual_dropout", "return_dict", "transformers_version"),
    *("use_cache", "use_sliding_window", "_sliding_window_pattern", "no_rope_layer_interval"),
    *("dtype", "sliding_window", "original_max_position_embeddings", "max_position_embeddings"),
}
"""Fields that change no logits, or not alone: a window needs its switch, longrope its factors,
lists of layers go before intervals, and yarn may allow more positions."""


def other_than(value: Any) -> Any:
    match value:
        case bool():
            return not value
        case int() | float():
            return value * 2 + 2
        case str():
            return "unheard-of"
        case None:
            return 7.0
    return None


@pytest.mark.parametrize("architecture", CONFIG_CLASSES)
def test_every_field_of_transformers_class_is_known(tmp_path: Path, architecture: str) -> None:
    """Each field has the class's default, and with another value it changes the model or is
    refused by name."""
    config = CONFIG_CLASSES[architecture](
        **{**SMALL, "num_hidden_layers": 8, "num_key_value_heads": 2, "eos_token_id": 1}
    )
    fields = {**json.loads(config.to_json_string(use_diff=False)), "architectures": [architecture]}
    fields["sliding_window"] = fields.get("sliding_window") and 512
    fields = {key: value for key, value in fields.items() if key[0] != "_"}
    model = parse(tmp_path, fields)
    for key, value in fields.items():
        if key not in SMALL and key not in ("architectures", "sliding_window", "rope_parameters"):
            rest = {name: field for name, field in fields.items() if name != key}
            if key not in ("eos_token_id", "num_key_value_heads", "layer_types"):
                assert parse(tmp_path, rest) == model, f"the default of {key}"
        other = other_than(value)
        if key in INERT or other is None:
            continue
        try:
            changed = parse(tmp_path, {**fields, key: other})
        except ModelError as refusal:
            assert key in str(refusal) or value is None or key in SMALL
        else:
            assert changed != model, f"{key} is ignored"


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"a": \xff}', "[" * 100_000])
def test_broken_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=r"config\.json"):
        ModelConfig.from_dir(tmp_path)


def test_a_missing_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json: no such file"):
        ModelConfig.from_dir(tmp_path)
