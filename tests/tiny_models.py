"""Tiny random models that transformers writes to disk: the loader reads them, the oracle runs them.

Biases and norm weights are random too, since their usual starting values (zeros, ones) would hide
a forgotten one. The directories hold no tokenizer.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

FAMILIES = ("qwen2", "qwen3", "llama", "mistral")

_CLASSES: dict[str, tuple[type[PretrainedConfig], type[PreTrainedModel]]] = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
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
    config = config_class(**{**_SIZES, **_FAMILY_SIZES[family], **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
    path = tmp_path / f"{family}-{seed}"
    model.type(dtype).save_pretrained(path, max_shard_size=max_shard_size)
    return path
