"""Assertions on dtypes, shapes and strides of tensors whose addresses go to kernels.

Asserts only: a violation is a caller bug. User errors are rejected earlier.
"""

import torch
from torch import Tensor

from s1engine.ops import SamplingMetadata, kv_quant

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Numbers of the dtypes in csrc/cpu/kernels.hpp."""


def row_stride(x: Tensor) -> int:
    """Stride of the rows of a matrix; each row must be contiguous."""
    row, element = x.stride()
    assert element == 1
    return row


def token_stride(x: Tensor) -> int:
    """Stride of the tokens of x [T, H, D]; each token's heads must be contiguous."""
    token, head, element = x.stride()
    assert element == 1 and (head == x.shape[2] or x.shape[1] == 1)
    return token


def cache_sizes(k_cache: Tensor, v_cache: Tensor, q: Tensor) -> tuple[int, int]:
    """Hkv and S of caches that match q."""
    _, num_kv_heads, block_size, row = k_cache.shape
    assert v_cache.shape == k_cache.shape and v_cache.dtype is k_cache.dtype
    assert k_cache.dtype in (q.dtype, torch.int8)
    assert row == kv_quant.stored_dim(q.shape[2], k_cache.dtype)
    assert k_cache.is_contiguous() and v_cache.is_contiguous()
    return num_kv_heads, block_size


def check_index(index: Tensor, dtype: torch.dtype, size: int) -> None:
    assert index.dtype is dtype and index.shape == (size,) and index.is_contiguous()


def check_sampling(meta: SamplingMetadata, rows: int) -> None:
    check_index(meta.temperature, torch.float32, rows)
    check_index(meta.top_k, torch.int32, rows)
    check_index(meta.top_p, torch.float32, rows)
    check_index(meta.min_p, torch.float32, rows)
    check_index(meta.seeds, torch.int64, rows)
    check_index(meta.positions, torch.int64, rows)
