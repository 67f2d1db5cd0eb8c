"""What is particular to a KV cache in fp8: values on the way in, and what is computed with them.

Stored is e4m3 within +-448, read are 16 bits or, beside float32 queries, 32. Those 16 bits are
fp16: a Hopper turns e4m3 into it in one instruction, into bf16 in several by way of float32, and
either holds every e4m3. Knows no layout: with one byte a value, that of the other types holds.
"""

import triton
import triton.language as tl

FP8_LIMIT: tl.constexpr = tl.constexpr(448.0)  # the largest finite e4m3


@triton.jit
def quantize(x, at):
    """x in the type that ``at`` points to, at the largest value of fp8 where it is beyond."""
    if at.dtype.element_ty == tl.float8e4nv:
        x = tl.minimum(tl.maximum(x.to(tl.float32), -FP8_LIMIT), FP8_LIMIT)
    return x.to(at.dtype.element_ty)


@triton.jit
def cast_query(q, cache_ptr):
    """Queries in the type that a product with what ``cache_ptr`` points to is computed in."""
    if cache_ptr.dtype.element_ty == tl.float8e4nv and q.dtype == tl.bfloat16:
        q = q.to(tl.float16)
    return q
