"""What is known of a model before its weights are read, whatever computes it.

Loads without torch: a server's process reads facts and computes nothing.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


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
    dtype_name: str
    """The checkpoint's dtype, as torch names it."""
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

    @property
    def torch_dtype(self) -> "torch.dtype":
        """The checkpoint's dtype."""
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype_name)
        return dtype

    def kv_bytes_per_token(self, cache_dtype: "torch.dtype") -> int:
        """Bytes of one token in a KV cache of this dtype, over all layers."""
        from s1engine.ops.kv_quant import stored_dim

        row = stored_dim(self.head_dim, cache_dtype) * cache_dtype.itemsize
        return 2 * self.num_layers * self.num_kv_heads * row
