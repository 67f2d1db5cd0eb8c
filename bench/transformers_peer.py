"""Models of the same shapes in transformers, for comparison on the same machine."""

from typing import Any

import torch

from s1engine.models.model_config import ModelConfig


def transformers_model(
    model: ModelConfig, dtype: torch.dtype, device: str, new_tokens: int
) -> tuple[Any, Any]:
    """A random Qwen2 of that shape, and options for greedy generation of ``new_tokens``."""
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    own = Qwen2Config(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        tie_word_embeddings=model.tie_word_embeddings,
        dtype=dtype,
    )
    with torch.device(device):
        peer: Any = Qwen2ForCausalLM(own)
    options = GenerationConfig(
        max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0
    )
    return peer.to(dtype).eval(), options
