"""Everything before attention for the few tokens of a decode step: one kernel on CUDA cores, two on
tensor cores, the first of which norms x.

    n = x / sqrt(mean(x^2) + eps) * norm,  (q, k, v) = n W^T + bias
    q and k rotated by the angles of their token's position, as in ``rope_write``
    k and v written to their token's KV slot

A program owns PAIRS pairs of rows of W, D / 2 apart, which rotation mixes, so the rotation happens
in registers; a pair of v is rotated by angle 0. The weight keeps its order of rows. Models that
norm q and k per head are not covered.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from s1engine.kernels import launch_table
from s1engine.kernels.kv_quant import check_caches, quantize
from s1engine.kernels.rms_norm import rms_norm
from s1engine.kernels.skinny_gemm import (
    check_operands,
    reduce_splits,
    skinny_gemm_tile,
    split_range,
    tile_itemsize,
    upper_and_lower,
)


@triton.jit
def _store_pair(at, first, second, inside, HALF: tl.constexpr):
    tl.store(at, quantize(first, at), mask=inside)
    tl.store(at + HALF, quantize(second, at), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _norm_qkv_rope_write_kernel(
    x_ptr,  # [T, K], normed if DOT
    norm_ptr,  # [K]; read unless DOT
    w_ptr,  # [N, K], N = (NUM_HEADS + 2 NUM_KV_HEADS) HEAD_DIM
    scale_ptr,  # [N] float32; read if w is e4m3
    bias_ptr,  # [N]; read if HAS_BIAS
    cos_sin_ptr,  # [max_positions, HEAD_DIM] float32
    position_ptr,  # [T] int32
    slot_ptr,  # [T] int64
    q_ptr,  # [T, NUM_HEADS, HEAD_DIM]
    k_cache_ptr,  # [num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM]
    v_cache_ptr,
    partial_ptr,
    arrivals_ptr,
    tokens,
    x_stride,
    eps,
    K: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    PAIRS: tl.constexpr = BLOCK_N // 2
    HALF: tl.constexpr = HEAD_DIM // 2
    ALL: tl.constexpr = (NUM_HEADS + 2 * NUM_KV_HEADS) * HALF
    tile, split = tl.program_id(0), tl.program_id(1)
    token, n = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_N)
    of_row = tl.minimum(tile * PAIRS + n % PAIRS, ALL - 1)
    row = of_row // HALF * HEAD_DIM + of_row % HALF + n // PAIRS * HALF
    begin, end = split_range(split, K, BLOCK_K, SPLIT_K)
    acc, squares = skinny_gemm_tile(
        x_ptr, norm_ptr, w_ptr, scale_ptr, row, tl.minimum(token, tokens - 1), x_stride,
        begin, end, K, BLOCK_N, BLOCK_T, BLOCK_K, not DOT, DOT, PDL,
    )  # fmt: skip
    acc, squares, last = reduce_splits(
        acc, squares, partial_ptr, arrivals_ptr, tile, split, BLOCK_N, BLOCK_T, SPLIT_K, not DOT
    )
    if last:
        if not DOT:
            acc *= tl.rsqrt(squares / K + eps)
        first, second = upper_and_lower(acc, PAIRS, BLOCK_T)
        pair = tile * PAIRS + tl.arange(0, PAIRS)
        head, i = pair // HALF, pair % HALF
        if HAS_BIAS:
            at_bias = bias_ptr + head * HEAD_DIM + i
            first += tl.load(at_bias, mask=pair < ALL, other=0.0).to(tl.float32)[:, None]
            second += tl.load(at_bias + HALF, mask=pair < ALL, other=0.0).to(tl.float32)[:, None]

        live = token < tokens
        inside = (pair < ALL)[:, None] & live[None, :]
        rotated = inside & (head < NUM_HEADS + NUM_KV_HEADS)[:, None]
        position = tl.load(position_ptr + token, mask=live, other=0).to(tl.int64)
        angle = cos_sin_ptr + position[None, :] * HEAD_DIM + i[:, None]
        cos = tl.load(angle, mask=rotated, other=1.0)
        sin = tl.load(angle + HALF, mask=rotated, other=0.0)
        first, second = first * cos - second * sin, second * cos + first * sin

        at = token.to(tl.int64)[None, :] * (NUM_HEADS * HEAD_DIM) + (head * HEAD_DIM + i)[:, None]
        _store_pair(q_ptr + at, first, second, inside & (head < NUM_HEADS)[:, None], HALF)
        slot = tl.load(slot_ptr + token, mask=live, other=0)
        block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
        at = block[None, :] * (NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM) + offset[None, :] * HEAD_DIM
        kv_head = (head - NUM_HEADS) % NUM_KV_HEADS
        at += (kv_head * (BLOCK_SIZE * HEAD_DIM) + i)[:, None]
        is_key = rotated & (head >= NUM_HEADS)[:, None]
        is_value = inside & (head >= NUM_HEADS + NUM_KV_HEADS)[:, None]
        _store_pair(k_cache_ptr + at, first, second, is_key, HALF)
        _store_pair(v_cache_ptr + at, first, second, is_value, HALF)


def norm_qkv_rope_write(
    x: Tensor,
    norm: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    workspace: tuple[Tensor, Tensor],
    scale: Tensor | None = None,
) -> Tensor:
    """x [T, K], weight [(Hq + 2 Hkv) D, K], caches [num_blocks, Hkv, S, D] -> q [T, Hq, D];
    ``workspace`` and ``scale`` as in ``linear``."""
    tokens, k = check_operands(x, weight, norm, bias, scale)
    _, num_kv_heads, block_size, dim = k_cache.shape
    num_heads = weight.shape[0] // dim - 2 * num_kv_heads
    assert weight.shape[0] == (num_heads + 2 * num_kv_heads) * dim and num_heads > 0
    check_caches(k_cache, v_cache, x.dtype, dim)
    assert cos_sin.dtype == torch.float32 and cos_sin.is_contiguous() and cos_sin.shape[1] == dim
    assert positions.dtype == torch.int32 and slot_mapping.dtype == torch.int64
    assert positions.shape == slot_mapping.shape == (tokens,)
    q = x.new_empty((tokens, num_heads, dim))
    tiles = launch_table.skinny_gemm_tiles(tokens, weight.shape[0], k, tile_itemsize(x, weight))
    if tiles.dot:
        x = rms_norm(x, norm, eps)
    programs = launch_table.cdiv(weight.shape[0], tiles.block_n)
    _norm_qkv_rope_write_kernel[(programs, tiles.split_k)](
        x, norm, weight, x if scale is None else scale, x if bias is None else bias, cos_sin,
        positions, slot_mapping, q, k_cache, v_cache, *workspace, tokens, x.stride(0), eps,
        K=k, NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=dim, BLOCK_SIZE=block_size,
        HAS_BIAS=bias is not None, **tiles.kwargs(),
    )  # fmt: skip
    return q
