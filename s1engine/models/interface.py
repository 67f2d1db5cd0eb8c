"""What the runner and the engine need of a model, whatever computes it.

``ModelFacts`` are known before the weights are read. A ``CausalLM`` computes steps: the native
``Decoder``, or ``TransformersDecoder`` around a module of transformers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from s1engine.ops import AttentionMetadata, Ops
from s1engine.ops.kv_quant import stored_dim


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """A decoder-only transformer, seen from outside: vocabulary, KV cache, ends and defaults."""

    architecture: str
    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    """Longest context of the model, yarn's extension included."""
    eos_token_ids: tuple[int, ...]
    torch_dtype: torch.dtype
    """The checkpoint's dtype."""
    generation_defaults: dict[str, Any]
    """Fields of SamplingParams as the model's authors recommend them; temperature 0 if they
    recommend no sampling."""
    layer_windows: tuple[int, ...]
    """Sliding window of each layer in tokens; 0: full attention. A query at position p sees the
    keys p - window + 1 to p."""

    @property
    def max_window(self) -> int:
        """The largest window if every layer has one, else 0: older keys serve no layer."""
        return max(self.layer_windows) if all(self.layer_windows) else 0

    def kv_bytes_per_token(self, cache_dtype: torch.dtype) -> int:
        """Bytes of one token in a KV cache of this dtype, over all layers."""
        row = stored_dim(self.head_dim, cache_dtype) * cache_dtype.itemsize
        return 2 * self.num_layers * self.num_kv_heads * row


class CausalLM(Protocol):
    """A model ready to run. Immutable: whatever changes between steps is an argument."""

    ops: Ops
    dtype: torch.dtype
    device: torch.device

    @property
    def config(self) -> ModelFacts:
        """The model, or this rank's part of it."""

    def forward(
        self, input_ids: Tensor, kv: Sequence[tuple[Tensor, Tensor]], meta: AttentionMetadata
    ) -> Tensor:
        """input_ids [T] int32 -> hidden states after the last layer [T, H]. Writes K and V of these
        tokens into ``kv``, the (k_cache, v_cache) of each layer."""

    def logits(self, hidden: Tensor, vocab_limit: int) -> Tensor:
        """hidden [B, H] -> float32 [B, vocab_limit]."""
