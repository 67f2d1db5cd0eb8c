"""Some rows of a weight matrix times the few vectors of a step: what the small linears are made of.

    acc[r, t] = sum over k of w[row[r], k] x[t, k]              k in begin .. end - 1
    acc[r, t] = sum over k of w[row[r], k] norm[k] x[t, k],  squares[t] = sum over k of x[t, k]^2

One or two vectors are multiplied on the CUDA cores, in float32 throughout, which keeps up with the
memory; more of them on the tensor cores, with the weights as the tall operand that they want and
the vectors padded to 16 or more.

The second form, on CUDA cores alone, is the first half of an RMSNorm in front of the product: the
factor 1 / sqrt(squares / K + eps) is the same for a whole row of the result and is applied at its
end, so the norm needs no pass of its own. With more vectors every program would norm all of them
again: on an H200 that took longer than a kernel that norms them once.

Weights may be e4m3 with a scale for each row, w = scale[r] value[r, k]: half the bytes. They turn
into the type of x in registers, which is exact, and acc takes the scale at the end.

Weights are read once in a step, so they are the first to leave the L2 cache, and none waits for the
kernel before: the first are on their way when it ends. Rows and vectors out of range are clamped by
the caller, not masked, since what becomes of them is not stored.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from s1engine.kernels.pdl import grid_dependency_wait, launch_dependents, prefetch


@triton.jit
def multiply_rows(
    x_ptr,  # [tokens, K], rows x_stride apart
    norm_ptr,  # [K]; not read unless NORM
    w_ptr,  # [N, K]
    scale_ptr,  # [N] float32; not read unless w is e4m3
    row,  # [ROWS] of w
    token,  # [TOKENS] of x
    x_stride,
    begin,
    end,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NORM: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    """acc [ROWS, TOKENS] and, in the second form, squares [1, TOKENS], float32; waits for the
    kernel before."""
    SCALED: tl.constexpr = w_ptr.dtype.element_ty == tl.float8e4nv
    if SCALED:
        scale = tl.load(scale_ptr + row)
    if DOT:
        acc, squares = _on_tensor_cores(
            x_ptr, w_ptr, row, token, x_stride, begin, end, K, ROWS, TOKENS, BLOCK_K, NORM, PDL
        )
    else:
        acc, squares = _on_cuda_cores(
            x_ptr, norm_ptr, w_ptr, row, token, x_stride, begin, end,
            K, ROWS, TOKENS, BLOCK_K, NORM, PDL,
        )  # fmt: skip
    if SCALED:
        acc *= scale[:, None]
    return acc, squares


@triton.jit
def _on_cuda_cores(
    x_ptr, norm_ptr, w_ptr, row, token, x_stride, begin, end,
    K: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_K: tl.constexpr,
    NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A thread multiplies the PIECE = 16 bytes that it loads at once: axes row, token, lane, piece.

    Loaded as matrices and reshaped, since of more axes some compilers choose a poor order."""
    PIECE: tl.constexpr = 128 // w_ptr.dtype.element_ty.primitive_bitwidth
    LANES: tl.constexpr = BLOCK_K // PIECE
    k = begin + tl.arange(0, BLOCK_K)[None, :]
    w_at = w_ptr + row[:, None].to(tl.int64) * K + k
    x_at = x_ptr + token[:, None] * x_stride + k
    acc = tl.zeros([ROWS, TOKENS, LANES], tl.float32)
    squares = tl.zeros([1, TOKENS, LANES], tl.float32)
    w = tl.load(w_at, mask=k < end, other=0.0, eviction_policy="evict_first")
    grid_dependency_wait(PDL)
    for first in range(0, end - begin, BLOCK_K):
        x = tl.load(x_at + first, mask=k + first < end, other=0.0).to(tl.float32)
        x = tl.reshape(x, [1, TOKENS, LANES, PIECE])
        if NORM:
            squares += tl.sum(x * x, axis=3)
            norm = tl.load(norm_ptr + k + first, mask=k + first < end, other=0.0).to(tl.float32)
            x *= tl.reshape(norm, [1, 1, LANES, PIECE])
        following = first + BLOCK_K
        w_next = tl.load(
            w_at + following, mask=k + following < end, other=0.0, eviction_policy="evict_first"
        )
        acc += tl.sum(tl.reshape(w.to(tl.float32), [ROWS, 1, LANES, PIECE]) * x, axis=3)
        w = w_next
    launch_dependents(PDL)
    return tl.sum(acc, axis=2), tl.sum(squares, axis=2)


@triton.jit
def _on_tensor_cores(
    x_ptr, w_ptr, row, token, x_stride, begin, end,
    K: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_K: tl.constexpr,
    NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    tl.static_assert(not NORM)
    LINE: tl.constexpr = 1024 // w_ptr.dtype.element_ty.primitive_bitwidth  # elements of 128 bytes
    k = tl.arange(0, BLOCK_K)
    w_at = w_ptr + row[:, None].to(tl.int64) * K + k[None, :]
    x_at = x_ptr + token[:, None] * x_stride + k[None, :]
    acc = tl.zeros([ROWS, TOKENS], tl.float32)
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
    return acc, tl.zeros([1, TOKENS], tl.float32)


@triton.jit
def add_parts(
    acc,  # [ROWS, TOKENS]
    squares,  # [1, TOKENS]
    part_ptr,  # [tiles, SPLITS, ROWS + 1, TOKENS] float32
    arrived_ptr,  # [tiles] int32, zeros before and after
    tile,
    split,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,
    NORM: tl.constexpr,
):
    """The sums over all splits, and whether this program is the one that has them: the last to
    arrive. It adds them in the order of the splits, so equal inputs give equal bits. The parts were
    written by other programs a moment ago, so the loads go past the L1 cache."""
    last = True
    if SPLITS > 1:
        r, t = tl.arange(0, ROWS)[:, None], tl.arange(0, TOKENS)[None, :]
        PART: tl.constexpr = (ROWS + 1) * TOKENS
        base = part_ptr + tile * (SPLITS * PART)
        tl.store(base + split * PART + r * TOKENS + t, acc)
        if NORM:
            tl.store(base + split * PART + ROWS * TOKENS + t, squares)
        tl.debug_barrier()  # all of the program's stores come before its arrival
        last = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == SPLITS - 1
        if last:
            tl.store(arrived_ptr + tile, 0)
            acc = tl.zeros([ROWS, TOKENS], tl.float32)
            squares = tl.zeros([1, TOKENS], tl.float32)
            for part in range(SPLITS):
                at = base + part * PART
                acc += tl.load(at + r * TOKENS + t, cache_modifier=".cg")
                if NORM:
                    squares += tl.load(at + ROWS * TOKENS + t, cache_modifier=".cg")
    return acc, squares, last


@triton.jit
def part_of(split, K: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr):
    """Where the sum of a split begins and ends: whole blocks."""
    SHARE: tl.constexpr = ((K + BLOCK_K - 1) // BLOCK_K + SPLITS - 1) // SPLITS * BLOCK_K
    return split * SHARE, tl.minimum((split + 1) * SHARE, K)


@triton.jit
def halves(acc, PAIRS: tl.constexpr, TOKENS: tl.constexpr):
    """acc [2 PAIRS, TOKENS] -> its upper and its lower rows, [PAIRS, TOKENS] each."""
    return tl.split(tl.permute(tl.reshape(acc, [2, PAIRS, TOKENS]), [1, 2, 0]))


def check_rows(
    x: Tensor,
    weight: Tensor,
    norm: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[int, int]:
    """T and K of x [T, K] that fits to weight [N, K], norm [K], bias [N] and scale [N]."""
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


def tile_bytes(x: Tensor, weight: Tensor) -> int:
    """Bytes of an element for ``skinny_gemm_tiles``: 4 if either is float32, else the weight's."""
    return 4 if x.dtype == torch.float32 else weight.element_size()
