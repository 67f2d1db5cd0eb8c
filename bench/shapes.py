"""Shapes of the Qwen2.5 family, for models with random weights.

The cost of a kernel or a step depends on shapes only, so speed can be measured without a
checkpoint.
"""

from dataclasses import replace
from typing import Any

import torch

from s1engine.config import BUNDLED_MODEL
from s1engine.models.model_config import ModelConfig
from s1engine.models.rope import Rope
from s1engine.models.weight_bytes import weight_bytes

# hidden size, inner size, layers, query heads, KV heads, head size, vocabulary, tied embeddings
_SIZES: dict[str, tuple[int, int, int, int, int, int, int, bool]] = {
    "25M": (512, 1536, 8, 8, 2, 64, 4096, True),  # not of the family: 50 MB in bf16
    "0.5B": (896, 4864, 24, 14, 2, 64, 151_936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 128, 151_936, True),
    "7B": (3584, 18_944, 28, 28, 4, 128, 152_064, False),
    "14B": (5120, 13_824, 48, 40, 8, 128, 152_064, False),
    "32B": (5120, 27_648, 64, 40, 8, 128, 152_064, False),
}
NAMES = ("nano", *_SIZES)


def shape(name: str) -> ModelConfig:
    """Configuration of that size of Qwen2.5; ``nano``: the bundled model."""
    nano = ModelConfig.from_dir(BUNDLED_MODEL)
    if name == "nano":
        return nano
    hidden, inner, layers, heads, kv_heads, head_dim, vocab, tied = _SIZES[name]
    sizes: dict[str, Any] = {
        "architecture": "Qwen2ForCausalLM",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "qkv_bias": True,
        "o_bias": False,
        "qk_norm": False,
        "rope": Rope(theta=1e6),
        "layer_windows": (0,) * layers,
        "max_position_embeddings": 32_768,
    }
    return replace(nano, **sizes)


def matrix_shapes(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Rows and columns of the matrices of a layer, and of the head."""
    hidden, inner = model.hidden_size, model.intermediate_size
    return {
        "qkv": ((model.num_heads + 2 * model.num_kv_heads) * model.head_dim, hidden),
        "o": (hidden, model.num_heads * model.head_dim),
        "gate_up": (2 * inner, hidden),
        "down": (hidden, inner),
        "lm_head": (model.vocab_size, hidden),
    }


def step_bytes(
    model: ModelConfig, itemsize: int, batch: int, context: int, quantization: str | None = None
) -> float:
    """Bytes that one decode step reads: every weight except the input embedding (a step gathers a
    few rows of it), and the KV cache of all sequences."""
    embedding = 0 if model.tie_word_embeddings else model.vocab_size * model.hidden_size
    kv = 2 * model.num_layers * model.num_kv_heads * model.head_dim * batch * context
    if quantization is None:
        return itemsize * (model.num_parameters - embedding + kv)
    dtype = {2: torch.bfloat16, 4: torch.float32}[itemsize]
    return weight_bytes(model, dtype, quantization).total + itemsize * (kv - embedding)
