"""How the KV cache stores a head vector (K or V of one token and KV head): as it is, or in 8 bits.

    int8   x ~ scale * q,  q = round(x / scale),  scale = max |x| / 127
    fp8    x ~ e4m3(x), within +-448

An int8 vector has its own scale, a float32 in four more elements behind its integers. So a vector
depends on its token alone, a block is one piece of memory and a cache one tensor. fp8 has no scale:
it would shift the range of e4m3, which K and V hardly leave (what does is clamped), but not make it
finer.

The dtype of the cache selects the format. Other implementations agree with this one bit for bit.
"""

import torch
from torch import Tensor

from s1engine.errors import RequestError
from s1engine.ops.quantization import FP8_LIMIT

EIGHT_BIT_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}  # by name in kv_cache_dtype
INT8_LIMIT = 127.0
SCALE_BYTES = 4


def stored_dim(head_dim: int, dtype: torch.dtype) -> int:
    """Elements of a stored head vector in a cache of this dtype."""
    return head_dim + SCALE_BYTES if dtype is torch.int8 else head_dim


def check_covered(cache_dtype: torch.dtype, dtype: torch.dtype, covered: str, device: str) -> None:
    """Raises RequestError unless the cache's dtype is the model's or ``covered``, the one 8-bit
    format of ``device``."""
    if cache_dtype not in (dtype, EIGHT_BIT_DTYPES[covered]):
        (name,) = [name for name, kind in EIGHT_BIT_DTYPES.items() if kind is cache_dtype]
        raise RequestError(
            f"kv_cache_dtype {name} is not covered on {device}; covered: auto, {covered}",
            param="kv_cache_dtype",
        )


def quantize(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [..., D] -> stored [..., stored_dim]."""
    if dtype is torch.int8:
        wide = x.to(torch.float32)
        # The smallest scale is a normal number, so zeros need no special case.
        scale = wide.abs().amax(-1, keepdim=True) / INT8_LIMIT
        scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
        return torch.cat(((wide / scale).round().to(torch.int8), scale.view(torch.int8)), dim=-1)
    if dtype is torch.float8_e4m3fn:
        return x.to(torch.float32).clamp(-FP8_LIMIT, FP8_LIMIT).to(dtype)
    return x


def dequantize(stored: Tensor) -> Tensor:
    """stored [..., stored_dim] -> [..., D], float32 or float64."""
    if stored.dtype is torch.int8:
        scale = stored[..., -SCALE_BYTES:].clone(memory_format=torch.contiguous_format)
        return stored[..., :-SCALE_BYTES].to(torch.float32) * scale.view(torch.float32)
    return stored if stored.dtype is torch.float64 else stored.to(torch.float32)
