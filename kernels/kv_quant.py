"""The KV cache inside the kernels: how fp8 values are stored, and the type of products with them.

Stored values are e4m3 within +-448. Products with them use fp16, or float32 beside float32 queries:
Hopper converts e4m3 to fp16 in one instruction but to bf16 in several through float32, and both
types hold every e4m3 exactly. The layout of the cache is that of the other types.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from s1engine.kernels import launch_table

FP8_LIMIT: tl.constexpr = tl.constexpr(448.0)  # the largest finite e4m3


@triton.jit
def quantize(x, at):
    """x in the type that ``at`` points to; fp8 is clamped to its largest finite value."""
    if at.dtype.element_ty == tl.float8e4nv:
        x = tl.minimum(tl.maximum(x.to(tl.float32), -FP8_LIMIT), FP8_LIMIT)
    return x.to(at.dtype.element_ty)


@triton.jit
def cast_query(q, cache_ptr):
    """Queries in the type of products with the cache: fp16 instead of bf16 beside fp8."""
    if cache_ptr.dtype.element_ty == tl.float8e4nv and q.dtype == tl.bfloat16:
        q = q.to(tl.float16)
    return q


def check_sinks(window: int, sinks: Tensor | None, num_heads: int) -> None:
    """Assert a window and sinks [Hq] float32 of attention."""
    assert window >= 0
    assert sinks is None or (sinks.shape == (num_heads,) and sinks.dtype == torch.float32)
    assert sinks is None or sinks.is_contiguous()


def check_caches(k_cache: Tensor, v_cache: Tensor, dtype: torch.dtype, head_dim: int) -> None:
    """Assert caches [num_blocks, Hkv, S, D] that the kernels cover beside q, k, v of ``dtype``."""
    assert k_cache.shape == v_cache.shape and k_cache.shape[3] == head_dim
    assert head_dim in launch_table.HEAD_DIMS and k_cache.shape[2] in launch_table.BLOCK_SIZES
    assert k_cache.dtype == v_cache.dtype and k_cache.dtype in (dtype, torch.float8_e4m3fn)
    assert k_cache.is_contiguous() and v_cache.is_contiguous()
