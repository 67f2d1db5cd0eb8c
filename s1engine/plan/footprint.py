"""What a model takes of memory, in which formats, and how it is dealt out to ranks.

Reads no weights: shapes alone. Knows nothing of time.
"""

from dataclasses import dataclass
from math import prod

import torch

from s1engine.errors import RequestError
from s1engine.models.config import ModelConfig
from s1engine.ops.quantization import FORMATS, FP8, HEAD_FORMATS, bytes_per_weight
from s1engine.runner.device import resolve_cache_dtype

HEADS = {fmt: head or "auto" for fmt, head in HEAD_FORMATS.items()}
"""A head's format, where it is not the layers'."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """A model in bytes, over all its ranks where nothing else is said."""

    layers: int
    ranks: int
    """GPUs that share every layer: heads, inner size and vocabulary are split among them."""
    layer_weights: int
    """Elements of the matrices that every token passes."""
    layer_bytes: float
    """Of these matrices."""
    head_weights: int
    head_bytes: float
    rest_bytes: float
    """Norms and biases, and an embedding that is not the head: every rank has all of it."""
    hidden_bytes: int
    """Of the hidden states of one token."""
    cache_dtype: torch.dtype
    kv_bytes_per_token: int
    attention_flops: int
    """For one pair of a query and a key, over all heads and layers."""
    activation_bytes: float
    """On one rank in the largest step, logits included."""

    @property
    def weight_bytes(self) -> float:
        """Over all ranks."""
        return self.layer_bytes + self.head_bytes + self.ranks * self.rest_bytes

    @property
    def weight_bytes_per_rank(self) -> float:
        return self.weight_bytes / self.ranks


def footprint(
    model: ModelConfig,
    dtype: torch.dtype,
    *,
    weights: str = "auto",
    kv_cache_dtype: str = "auto",
    ranks: int = 1,
    max_samples: int = 256,
    max_num_batched_tokens: int = 2048,
) -> Footprint:
    """Raises RequestError if the ranks cannot share the heads."""
    check_ranks(model, ranks)
    size, cache_dtype = dtype.itemsize, resolve_cache_dtype(kv_cache_dtype, dtype)
    shapes = model.tensor_shapes()
    matrices = [s for n, s in shapes.items() if ".layers." in n and len(s) == 2]
    layer_weights = sum(map(prod, matrices))
    embedding = model.vocab_size * model.hidden_size
    untied = 0 if model.tie_word_embeddings else embedding
    vectors = model.num_parameters - layer_weights - embedding - untied
    widest = 2 * model.intermediate_size // ranks + 4 * model.hidden_size
    return Footprint(
        layers=model.num_layers,
        ranks=ranks,
        layer_weights=layer_weights,
        layer_bytes=sum(prod(s) * _bytes(weights, s[1], size) for s in matrices),
        head_weights=embedding,
        head_bytes=embedding * _bytes(HEADS.get(weights, weights), model.hidden_size, size),
        rest_bytes=(vectors + untied) * size,
        hidden_bytes=model.hidden_size * size,
        cache_dtype=cache_dtype,
        kv_bytes_per_token=model.kv_bytes_per_token(cache_dtype),
        attention_flops=4 * model.num_layers * model.num_heads * model.head_dim,
        activation_bytes=max_num_batched_tokens * widest * size
        + 3 * 4 * max_samples * model.vocab_size,  # logits in float32, and two copies
    )


def _bytes(weights: str, columns: int, size: int) -> float:
    """Of one weight, its share of the scales included."""
    return bytes_per_weight(weights, columns) if weights in (*FORMATS, FP8) else size


def divisors(model: ModelConfig) -> list[int]:
    """Numbers of ranks that can share the model, up to 8."""
    return [n for n in range(1, 9) if model.num_kv_heads % n == 0 and model.num_heads % n == 0]


def check_ranks(model: ModelConfig, ranks: int) -> None:
    if ranks not in divisors(model):
        fits = ", ".join(map(str, divisors(model)))
        raise RequestError(
            f"tensor_parallel_size {ranks} does not divide {model.num_heads} query heads and "
            f"{model.num_kv_heads} KV heads, or is above 8; there are {fits}",
            param="tensor_parallel_size",
        )
