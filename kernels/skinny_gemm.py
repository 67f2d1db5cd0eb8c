"""Rows of a weight times the few tokens of a decode step: what the fused linear layers are made of.

    acc[n, t] = sum over k of w[row[n], k] x[t, k]                       k in begin .. end - 1
    acc[n, t] = sum over k of w[row[n], k] norm[k] x[t, k],  squares[t] = sum over k of x[t, k]^2

One or two tokens are multiplied on CUDA cores, in float32 throughout, which keeps up with the
memory. More are multiplied on tensor cores, the weight as the tall operand, tokens padded to 16.

The second form, on CUDA cores only, is the first half of an RMSNorm before the product: the factor
1 / sqrt(squares / K + eps) is common to a token and is applied at the end, so the norm needs no
pass of its own. For more tokens every program would norm all of them again: on an H200 that took
longer than a separate norm.

A weight may be e4m3 with a scale for each row, w = scale[n] value[n, k]: half the bytes. Values are
converted to the type of x in registers, which is exact, and acc is multiplied by the scale at the
end.

Weights are read once a step, so they leave the L2 cache first. Their first loads are issued before
the wait for the previous kernel. The caller clamps rows and tokens that are out of range instead of
masking them, since their results are not stored.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from s1engine.kernels.pdl import grid_dependency_wait, launch_dependents, prefetch


@triton.jit
def skinny_gemm_tile(
    x_ptr,  # [T, K], tokens x_stride apart
    norm_ptr,  # [K]; read if NORM
    w_ptr,  # [N, K]
    scale_ptr,  # [N] float32; read if w is e4m3
    row,  # [BLOCK_N] of w
    token,  # [BLOCK_T] of x
    x_stride,
    begin,
    end,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NORM: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    """acc [BLOCK_N, BLOCK_T] and, if NORM, squares [1, BLOCK_T], float32. Waits for the previous
    kernel."""
    SCALED: tl.constexpr = w_ptr.dtype.element_ty == tl.float8e4nv
    if SCALED:
        scale = tl.load(scale_ptr + row)
    if DOT:
        acc, squares = _on_tensor_cores(
            x_ptr, w_ptr, row, token, x_stride, begin, end,
            K, BLOCK_N, BLOCK_T, BLOCK_K, NORM, PDL,
        )  # fmt: skip
    else:
        acc, squares = _on_cuda_cores(
            x_ptr, norm_ptr, w_ptr, row, token, x_stride, begin, end,
            K, BLOCK_N, BLOCK_T, BLOCK_K, NORM, PDL,
        )  # fmt: skip
    if SCALED:
        acc *= scale[:, None]
    return acc, squares


@triton.jit
def _on_cuda_cores(
    x_ptr, norm_ptr, w_ptr, row, token, x_stride, begin, end,
    K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A thread multiplies the 16 bytes that it loads at once: axes row, token, vector, element.

    Loaded as matrices and reshaped: for more axes some compilers choose a slow order."""
    VECTOR: tl.constexpr = 128 // w_ptr.dtype.element_ty.primitive_bitwidth
    VECTORS: tl.constexpr = BLOCK_K // VECTOR
    k = begin + tl.arange(0, BLOCK_K)[None, :]
    w_at = w_ptr + row[:, None].to(tl.int64) * K + k
    x_at = x_ptr + token[:, None] * x_stride + k
    acc = tl.zeros([BLOCK_N, BLOCK_T, VECTORS], tl.float32)
    squares = tl.zeros([1, BLOCK_T, VECTORS], tl.float32)
    w = tl.load(w_at, mask=k < end, other=0.0, eviction_policy="evict_first")
    grid_dependency_wait(PDL)
    for first in range(0, end - begin, BLOCK_K):
        x = tl.load(x_at + first, mask=k + first < end, other=0.0).to(tl.float32)
        x = tl.reshape(x, [1, BLOCK_T, VECTORS, VECTOR])
        if NORM:
            squares += tl.sum(x * x, axis=3)
            norm = tl.load(norm_ptr + k + first, mask=k + first < end, other=0.0).to(tl.float32)
            x *= tl.reshape(norm, [1, 1, VECTORS, VECTOR])
        following = first + BLOCK_K
        w_next = tl.load(
            w_at + following, mask=k + following < end, other=0.0, eviction_policy="evict_first"
        )
        acc += tl.sum(tl.reshape(w.to(tl.float32), [BLOCK_N, 1, VECTORS, VECTOR]) * x, axis=3)
        w = w_next
    launch_dependents(PDL)
    return tl.sum(acc, axis=2), tl.sum(squares, axis=2)


@triton.jit
def _on_tensor_cores(
    x_ptr, w_ptr, row, token, x_stride, begin, end,
    K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    tl.static_assert(not NORM)
    LINE: tl.constexpr = 1024 // w_ptr.dtype.element_ty.primitive_bitwidth  # elements of 128 bytes
    k = tl.arange(0, BLOCK_K)
    w_at = w_ptr + row[:, None].to(tl.int64) * K + k[None, :]
    x_at = x_ptr + token[:, None] * x_stride + k[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    ahead = begin + tl.arange(0, 4 * BLOCK_K // LINE) * LINE
    prefetch(w_ptr + row[:, None].to(tl.int64) * K + tl.minimum(ahead, K - 1)[None, :], PDL)
    grid_dependency_wait(PDL)
    for first in range(begin, end, BLOCK_K):
        if K % BLOCK_K == 0:
            w = tl.load(w_at + first, eviction_policy="evict_first")
            x = tl.load(x_at + first)
        else:
            inside = (first + k < K)[None, :]
            w = tl.load(w_at + first, mask=inside, other=0.0, eviction_policy="evict_first")
            x = tl.load(x_at + first, mask=inside, other=0.0)
        acc = tl.dot(w.to(x.dtype), tl.trans(x), acc, input_precision="ieee")
    launch_dependents(PDL)
    return acc, tl.zeros([1, BLOCK_T], tl.float32)


@triton.jit
def reduce_splits(
    acc,  # [BLOCK_N, BLOCK_T]
    squares,  # [1, BLOCK_T]
    partial_ptr,  # [tiles, SPLIT_K, BLOCK_N + 1, BLOCK_T] float32
    arrivals_ptr,  # [tiles] int32, zeros before and after
    tile,
    split,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SPLIT_K: tl.constexpr,
    NORM: tl.constexpr,
):
    """acc and squares summed over all splits, and whether this program has them: the last to
    arrive has. It adds in the order of the splits, so equal inputs give equal bits. Its loads
    bypass the L1 cache, since other programs have just written the partial sums."""
    last = True
    if SPLIT_K > 1:
        n, t = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_T)[None, :]
        PARTIAL: tl.constexpr = (BLOCK_N + 1) * BLOCK_T
        base = partial_ptr + tile * (SPLIT_K * PARTIAL)
        tl.store(base + split * PARTIAL + n * BLOCK_T + t, acc)
        if NORM:
            tl.store(base + split * PARTIAL + BLOCK_N * BLOCK_T + t, squares)
        tl.debug_barrier()  # all of the program's stores come before its arrival
        last = tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel") == SPLIT_K - 1
        if last:
            tl.store(arrivals_ptr + tile, 0)
            acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
            squares = tl.zeros([1, BLOCK_T], tl.float32)
            for part in range(SPLIT_K):
                at = base + part * PARTIAL
                acc += tl.load(at + n * BLOCK_T + t, cache_modifier=".cg")
                if NORM:
                    squares += tl.load(at + BLOCK_N * BLOCK_T + t, cache_modifier=".cg")
    return acc, squares, last


@triton.jit
def split_range(split, K: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr):
    """Begin and end of a split of K: whole blocks."""
    SHARE: tl.constexpr = ((K + BLOCK_K - 1) // BLOCK_K + SPLIT_K - 1) // SPLIT_K * BLOCK_K
    return split * SHARE, tl.minimum((split + 1) * SHARE, K)


@triton.jit
def upper_and_lower(acc, PAIRS: tl.constexpr, BLOCK_T: tl.constexpr):
    """acc [2 PAIRS, BLOCK_T] -> its upper and its lower rows, [PAIRS, BLOCK_T] each."""
    return tl.split(tl.permute(tl.reshape(acc, [2, PAIRS, BLOCK_T]), [1, 2, 0]))


def check_operands(
    x: Tensor,
    weight: Tensor,
    norm: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[int, int]:
    """T and K of x [T, K], which must fit weight [N, K], norm [K], bias [N] and scale [N]."""
    tokens, k = x.shape
    assert x.stride(1) == 1 and weight.shape[1] == k and weight.is_contiguous()
    assert weight.dtype == (x.dtype if scale is None else torch.float8_e4m3fn)
    if scale is not None:
        assert scale.numel() == weight.shape[0] and scale.dtype == torch.float32
        assert scale.is_contiguous()
    for vector, size in ((norm, k), (bias, weight.shape[0])):
        if vector is not None:
            assert vector.shape == (size,) and vector.dtype == x.dtype and vector.is_contiguous()
    return tokens, k


def tile_itemsize(x: Tensor, weight: Tensor) -> int:
    """``itemsize`` for ``skinny_gemm_tiles``: 4 if x is float32, else the weight's."""
    return 4 if x.dtype == torch.float32 else weight.element_size()
