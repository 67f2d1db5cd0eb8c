"""How a row of the KV cache, K or V of one token and KV head, is kept: as it is, or in 8 bits.

    int8   x ~ scale * q,  q = round(x / scale),  scale = max |x| / 127
    fp8    x ~ e4m3(x), within +-448

The scale of an int8 row is its own and stands behind its integers, a float32 in four more elements:
so a row follows from its token alone, a block is still one piece of memory, and a cache still one
tensor. Eight bits of e4m3 are a float already: a scale would shift their range, which values of K
and V hardly leave (what does is clamped), and would not make them any finer, so there is none.

The type of the cache says which it is. Other implementations agree with this one bit for bit.
"""

import torch
from torch import Tensor

from s1engine.errors import RequestError
from s1engine.ops.quantization import FP8_LIMIT

EIGHT_BIT_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}  # by name in kv_cache_dtype
INT8_LIMIT = 127.0
SCALE_BYTES = 4


def row_size(head_dim: int, dtype: torch.dtype) -> int:
    """Elements of a row in a cache of this type."""
    return head_dim + SCALE_BYTES if dtype is torch.int8 else head_dim


def check_covered(cache_dtype: torch.dtype, dtype: torch.dtype, covered: str, device: str) -> None:
    """Raises RequestError unless a cache is in the model's type or in that of 8 bits which the
    device covers."""
    if cache_dtype not in (dtype, EIGHT_BIT_DTYPES[covered]):
        (name,) = [name for name, found in EIGHT_BIT_DTYPES.items() if found is cache_dtype]
        raise RequestError(
            f"kv_cache_dtype {name} is not covered on {device}; covered: auto, {covered}",
            param="kv_cache_dtype",
        )


def quantize(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [..., D] as rows [..., row_size] of a cache."""
    if dtype is torch.int8:
        wide = x.to(torch.float32)
        # The least scale is a normal number, so that zeros need no case of their own.
        scale = wide.abs().amax(-1, keepdim=True) / INT8_LIMIT
        scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
        return torch.cat(((wide / scale).round().to(torch.int8), scale.view(torch.int8)), dim=-1)
    if dtype is torch.float8_e4m3fn:
        return x.to(torch.float32).clamp(-FP8_LIMIT, FP8_LIMIT).to(dtype)
    return x


def dequantize(rows: Tensor) -> Tensor:
    """Rows [..., row_size] of a cache as [..., D], float32 at least."""
    if rows.dtype is torch.int8:
        scale = rows[..., -SCALE_BYTES:].clone(memory_format=torch.contiguous_format)
        return rows[..., :-SCALE_BYTES].to(torch.float32) * scale.view(torch.float32)
    return rows if rows.dtype is torch.float64 else rows.to(torch.float32)
