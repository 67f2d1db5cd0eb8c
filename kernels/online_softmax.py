"""One tile of attention, with the online softmax that combines tiles.

    s = q k^T * scale,  m' = max(m, s),  p = 2^(s - m'),  total' = total 2^(m - m') + sum(p),
    acc' = acc 2^(m - m') + p v,  at the end out = acc / total

``scale`` includes log2(e), so exponentials are powers of two. The maximum starts at a finite value:
from -inf, an empty split would compute (-inf) - (-inf) = NaN. Knows pointers to a tile, not block
tables; both attention kernels use it.
"""

import triton
import triton.language as tl

LOG2E = 1.4426950408889634
_LOG2E: tl.constexpr = tl.constexpr(LOG2E)
LOWEST: tl.constexpr = tl.constexpr(-1.0e30)


@triton.jit
def online_softmax_tile(
    q,  # [BLOCK_M, HEAD_DIM], in the type of the products
    k_ptr,  # first key of the tile; keys are HEAD_DIM apart
    v_ptr,
    acc,  # [BLOCK_M, HEAD_DIM] float32
    m,  # [BLOCK_M] float32
    total,  # [BLOCK_M] float32
    scale,
    last,  # [BLOCK_M] last key of the tile that each query sees; read if MASKED
    valid,  # keys of the tile that hold a token; read if MASKED
    first,  # [BLOCK_M] first key of the tile that each query sees; read if MASKED and WINDOWED
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """acc, m and total after one more tile. An unmasked tile is full and loads without predicate;
    fp8 is dequantized to the type of q."""
    column = tl.arange(0, BLOCK_N)
    dim = tl.arange(0, HEAD_DIM)
    at = column[:, None] * HEAD_DIM + dim[None, :]
    if MASKED:  # slots beyond the context may hold anything, and 0 times NaN is NaN
        inside = (column < valid)[:, None]
        k = tl.load(k_ptr + at, mask=inside, other=0.0)  # [BLOCK_N, HEAD_DIM]
        v = tl.load(v_ptr + at, mask=inside, other=0.0)
    else:
        k = tl.load(k_ptr + at)
        v = tl.load(v_ptr + at)
    k, v = k.to(q.dtype), v.to(q.dtype)
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [BLOCK_M, BLOCK_N]
    if MASKED:
        s = tl.where(column[None, :] <= last[:, None], s, float("-inf"))
        if WINDOWED:
            s = tl.where(column[None, :] >= first[:, None], s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, axis=1))
    shrink = tl.exp2(m - m_new)
    p = tl.exp2(s - m_new[:, None])
    total = total * shrink + tl.sum(p, axis=1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, m_new, total


@triton.jit
def add_sinks(total, m, sinks_ptr, head, used):
    """The sums [BLOCK_M] with the sink of each query's head: a logit without a value. ``used``:
    queries that exist."""
    sink = tl.load(sinks_ptr + head, mask=used, other=0.0).to(tl.float32)
    return total + tl.exp2(tl.minimum(sink * _LOG2E - m, 126.0))  # an idle row's m is LOWEST
