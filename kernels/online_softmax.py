"""One tile of attention, and the running softmax that adds tiles up.

    s = q k^T * scale,  m' = max(m, s),  p = 2^(s - m'),  total' = total 2^(m - m') + sum(p),
    acc' = acc 2^(m - m') + p v,  in the end out = acc / total

``scale`` carries log2(e), so exponentials are powers of two. The maximum starts at a finite number:
from -inf an empty part would make (-inf) - (-inf) = NaN. Knows pointers to a tile, not block
tables; both attention kernels are built on it.
"""

import triton
import triton.language as tl

LOG2E = 1.4426950408889634
LOWEST: tl.constexpr = tl.constexpr(-1.0e30)


@triton.jit
def online_softmax_tile(
    q,  # [M, DIM], in the type of the products
    k_ptr,  # first key of the tile, rows DIM apart
    v_ptr,
    acc,  # [M, DIM] float32
    m,  # [M] float32
    total,  # [M] float32
    scale,
    last,  # [M] last column of the tile that each row sees; not read unless MASKED
    valid,  # columns of the tile that hold a token; not read unless MASKED
    DIM: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """acc, m and total after one more tile; an unmasked one is full and loads without predicate."""
    column = tl.arange(0, TILE)
    dim = tl.arange(0, DIM)
    at = column[:, None] * DIM + dim[None, :]
    if MASKED:  # slots beyond the context may hold anything, and 0 times NaN is NaN
        inside = (column < valid)[:, None]
        k = tl.load(k_ptr + at, mask=inside, other=0.0)  # [TILE, DIM]
        v = tl.load(v_ptr + at, mask=inside, other=0.0)
    else:
        k = tl.load(k_ptr + at)
        v = tl.load(v_ptr + at)
    k, v = k.to(q.dtype), v.to(q.dtype)
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [M, TILE]
    if MASKED:
        s = tl.where(column[None, :] <= last[:, None], s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, axis=1))
    shrink = tl.exp2(m - m_new)
    p = tl.exp2(s - m_new[:, None])
    total = total * shrink + tl.sum(p, axis=1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, m_new, total
