"""Copies of KV blocks in main memory, token by token, so that they outlive their cache.

The form knows neither blocks nor devices: what a cache of one block size holds fits into another.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from s1engine.ops.kv_quant import dequantize
from s1engine.runner.kv_cache import KVCache

LayerKV = tuple[Tensor, Tensor]
"""K and V of one layer, each [T, Hkv, stored_dim] on the CPU, in the cache's dtype."""


def read_blocks(cache: KVCache, blocks: Sequence[int]) -> list[LayerKV]:
    """Copies K and V of all tokens in ``blocks``, layer by layer."""
    device = cache.layers[0][0].device
    index = torch.tensor(blocks, dtype=torch.int64, device=device)

    def read(stored: Tensor) -> Tensor:
        copied = stored.view(torch.uint8)[index].transpose(1, 2).flatten(0, 1)
        return copied.contiguous().cpu().view(stored.dtype)

    return [(read(k), read(v)) for k, v in cache.layers]


def write_blocks(cache: KVCache, blocks: Sequence[int], kv: Sequence[LayerKV], first: int) -> None:
    """Writes the tokens from ``first`` on into ``blocks``, bit for bit."""
    if not blocks:
        return
    size = len(blocks) * cache.block_size
    device = cache.layers[0][0].device
    index = torch.tensor(blocks, dtype=torch.int64, device=device)
    for layer, copies in zip(cache.layers, kv, strict=True):
        for stored, copied in zip(layer, copies, strict=True):
            tokens = copied[first : first + size].view(torch.uint8)
            rows = tokens.unflatten(0, (len(blocks), cache.block_size)).transpose(1, 2)
            stored.view(torch.uint8)[index] = rows.to(device)


def is_finite(copied: Tensor) -> bool:
    """False if it holds NaN or infinity, which would outlive the tokens in their blocks."""
    return bool(dequantize(copied).isfinite().all())
