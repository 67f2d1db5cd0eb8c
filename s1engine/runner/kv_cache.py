"""The memory behind the KV blocks: one K and one V tensor a layer.

Owns tensors only. The BlockManager (csrc/core) decides which sequence has which block.
"""

import torch
from torch import Tensor

from s1engine.models.interface import ModelFacts
from s1engine.ops.kv_quant import stored_dim


class KVCache:
    """K and V of every layer, each [num_blocks, num_kv_heads, block_size, stored_dim] in ``dtype``,
    which is the model's or one of 8 bits (ops/kv_quant).

    Zeroed once: a kernel may read unused slots of a block, and NaN there would survive a mask.
    """

    def __init__(
        self,
        config: ModelFacts,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: str,
    ) -> None:
        row = stored_dim(config.head_dim, dtype)
        shape = (num_blocks, config.num_kv_heads, block_size, row)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.layers: list[tuple[Tensor, Tensor]] = [
            (
                torch.zeros(shape, dtype=dtype, device=device),
                torch.zeros(shape, dtype=dtype, device=device),
            )
            for _ in range(config.num_layers)
        ]

    @property
    def num_tokens(self) -> int:
        """Capacity of all blocks together."""
        return self.num_blocks * self.block_size
