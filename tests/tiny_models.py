"""Tiny random models that transformers writes to disk: the loader reads them, the oracle runs them.

Biases and norm weights are random too, since their usual starting values (zeros, ones) would hide
a forgotten one. The directories hold no tokenizer.
"""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Ministral3Config,
    Ministral3ForCausalLM,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SeedOssConfig,
    SeedOssForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

FAMILIES = ("qwen2", "qwen3", "llama", "mistral")

_CLASSES: dict[str, tuple[type[PretrainedConfig], type[PreTrainedModel]]] = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "ministral3": (Ministral3Config, Ministral3ForCausalLM),
    "phi3": (Phi3Config, Phi3ForCausalLM),
    "seed_oss": (SeedOssConfig, SeedOssForCausalLM),
    "smollm3": (SmolLM3Config, SmolLM3ForCausalLM),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM),
    "olmo3": (Olmo3Config, Olmo3ForCausalLM),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM),
    "mistral3": (Mistral3Config, Mistral3ForConditionalGeneration),
    "gemma3_wrapper": (Gemma3Config, Gemma3ForConditionalGeneration),
}

YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "llama_4_scaling_beta": 0.2,
}

_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}

_TEXT_PARTS: dict[str, dict[str, Any]] = {  # of multimodal models
    "mistral3": {
        "model_type": "ministral3",
        "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "gemma3_wrapper": {},
}

_SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
}

_FAMILY_SIZES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {"head_dim": 16},  # not hidden_size / num_attention_heads
    "llama": {},
    "mistral": {"sliding_window": None},
    "ministral3": {"head_dim": 8, "rope_parameters": YARN},
    "phi3": {},
    "seed_oss": {"head_dim": 12},
    "smollm3": {"num_hidden_layers": 4},
    "olmo2": {},
    "olmo3": {"num_hidden_layers": 4, "sliding_window": 16},
    "gemma3": {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 16},
    "mistral3": {"head_dim": 8},
    "gemma3_wrapper": {"head_dim": 16, "sliding_window": 16},
}


def make_model(
    tmp_path: Path,
    family: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    **overrides: Any,
) -> Path:
    """Write a random model of ``family`` with config fields ``overrides``; return its directory."""
    config_class, model_class = _CLASSES[family]
    fields = {**_SIZES, **_FAMILY_SIZES[family], **overrides}
    if family in _TEXT_PARTS:
        tied = fields.get("tie_word_embeddings", False)
        fields = {
            "text_config": {**fields, **_TEXT_PARTS[family]},
            "vision_config": _VISION,
            "tie_word_embeddings": tied,
        }
    config = config_class(**fields)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
    path = tmp_path / f"{family}-{seed}"
    model.type(dtype).save_pretrained(path, max_shard_size=max_shard_size)
    return state_greedy(path)


def state_greedy(path: Path) -> Path:
    """Have the model's directory state ``do_sample: false``, which transformers leaves out."""
    file = path / "generation_config.json"
    fields = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**fields, "do_sample": False}))
    return path


TRANSFORMERS_SIZES: dict[str, Any] = {**_SIZES, "max_position_embeddings": 128}


def make_transformers_model(path: Path, model_type: str, **overrides: Any) -> Path:
    """Write a random causal language model of transformers' ``model_type``."""
    config = AutoConfig.for_model(model_type, **{**TRANSFORMERS_SIZES, **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(path)
    return state_greedy(path)
