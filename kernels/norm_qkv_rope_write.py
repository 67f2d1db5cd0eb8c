"""All that comes before attention for the few rows of a decode step, in one kernel, or in two for
more than a few tokens, which are normed first.

    n = x / sqrt(mean(x^2) + eps) * norm,  (q, k, v) = n W^T + bias
    q, k turned by the angles of their token's position as in ``rope_write``
    k, v written to their token's KV slot

A program owns PAIRS pairs of rows of W, each the two rows that rotation mixes, so rotation happens
in its registers; a pair of v turns by the angle 0. Pairs are addressed where they stand, DIM / 2
apart: the weights keep their order. Models that norm q and k per head are not covered.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from s1engine.kernels import launch_table
from s1engine.kernels.kv_quant import quantize
from s1engine.kernels.rms_norm import rms_norm
from s1engine.kernels.skinny_gemm import (
    add_parts,
    check_rows,
    halves,
    multiply_rows,
    part_of,
    tile_bytes,
)


@triton.jit
def _store_pair(at, first, second, inside, HALF: tl.constexpr):
    tl.store(at, quantize(first, at), mask=inside)
    tl.store(at + HALF, quantize(second, at), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _norm_qkv_rope_write_kernel(
    x_ptr,  # [T, K], normed if DOT
    norm_ptr,  # [K]; not read if DOT
    w_ptr,  # [(NUM_HEADS + 2 NUM_KV_HEADS) DIM, K]
    scale_ptr,  # one for each row of w, float32; not read unless w is e4m3
    bias_ptr,  # one for each row of w; not read unless HAS_BIAS
    cos_sin_ptr,  # [max_positions, DIM] float32
    position_ptr,  # [T] int32
    slot_ptr,  # [T] int64
    q_ptr,  # [T, NUM_HEADS, DIM]
    k_cache_ptr,  # [num_blocks, NUM_KV_HEADS, BLOCK_SIZE, DIM]
    v_cache_ptr,
    part_ptr,
    arrived_ptr,
    tokens,
    x_stride,
    eps,
    K: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    PAIRS: tl.constexpr = ROWS // 2
    HALF: tl.constexpr = DIM // 2
    ALL: tl.constexpr = (NUM_HEADS + 2 * NUM_KV_HEADS) * HALF
    tile, split = tl.program_id(0), tl.program_id(1)
    token, r = tl.arange(0, TOKENS), tl.arange(0, ROWS)
    of_row = tl.minimum(tile * PAIRS + r % PAIRS, ALL - 1)
    row = of_row // HALF * DIM + of_row % HALF + r // PAIRS * HALF
    begin_k, end_k = part_of(split, K, BLOCK_K, SPLITS)
    acc, squares = multiply_rows(
        x_ptr, norm_ptr, w_ptr, scale_ptr, row, tl.minimum(token, tokens - 1), x_stride,
        begin_k, end_k, K, ROWS, TOKENS, BLOCK_K, not DOT, DOT, PDL,
    )  # fmt: skip
    acc, squares, last = add_parts(
        acc, squares, part_ptr, arrived_ptr, tile, split, ROWS, TOKENS, SPLITS, not DOT
    )
    if last:
        if not DOT:
            acc *= tl.rsqrt(squares / K + eps)
        first, second = halves(acc, PAIRS, TOKENS)
        pair = tile * PAIRS + tl.arange(0, PAIRS)
        head, i = pair // HALF, pair % HALF
        if HAS_BIAS:
            at_bias = bias_ptr + head * DIM + i
            first += tl.load(at_bias, mask=pair < ALL, other=0.0).to(tl.float32)[:, None]
            second += tl.load(at_bias + HALF, mask=pair < ALL, other=0.0).to(tl.float32)[:, None]

        live = token < tokens
        inside = (pair < ALL)[:, None] & live[None, :]
        turned = inside & (head < NUM_HEADS + NUM_KV_HEADS)[:, None]
        position = tl.load(position_ptr + token, mask=live, other=0).to(tl.int64)
        angle = cos_sin_ptr + position[None, :] * DIM + i[:, None]
        cos = tl.load(angle, mask=turned, other=1.0)
        sin = tl.load(angle + HALF, mask=turned, other=0.0)
        first, second = first * cos - second * sin, second * cos + first * sin

        at = token.to(tl.int64)[None, :] * (NUM_HEADS * DIM) + (head * DIM + i)[:, None]
        _store_pair(q_ptr + at, first, second, inside & (head < NUM_HEADS)[:, None], HALF)
        slot = tl.load(slot_ptr + token, mask=live, other=0)
        block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
        at = block[None, :] * (NUM_KV_HEADS * BLOCK_SIZE * DIM) + offset[None, :] * DIM
        kv_head = (head - NUM_HEADS) % NUM_KV_HEADS
        at += (kv_head * (BLOCK_SIZE * DIM) + i)[:, None]
        is_key = turned & (head >= NUM_HEADS)[:, None]
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
    """x [T, K], weight [(Hq + 2 Hkv) D, K], caches [num_blocks, Hkv, S, D] -> q [T, Hq, D].

    ``workspace`` and ``scale`` as for ``linear``.
    """
    tokens, k = check_rows(x, weight, norm, bias, scale)
    _, num_kv_heads, block_size, dim = k_cache.shape
    num_heads = weight.shape[0] // dim - 2 * num_kv_heads
    assert weight.shape[0] == (num_heads + 2 * num_kv_heads) * dim and num_heads > 0
    assert dim in launch_table.HEAD_DIMS and block_size in launch_table.BLOCK_SIZES
    assert k_cache.shape == v_cache.shape and k_cache.dtype == v_cache.dtype
    assert k_cache.dtype in (x.dtype, torch.float8_e4m3fn)
    assert k_cache.is_contiguous() and v_cache.is_contiguous()
    assert cos_sin.dtype == torch.float32 and cos_sin.is_contiguous() and cos_sin.shape[1] == dim
    assert positions.dtype == torch.int32 and slot_mapping.dtype == torch.int64
    assert positions.shape == slot_mapping.shape == (tokens,)
    q = x.new_empty((tokens, num_heads, dim))
    tiles = launch_table.skinny_gemm_tiles(tokens, weight.shape[0], k, tile_bytes(x, weight))
    if tiles.dot:
        x = rms_norm(x, norm, eps)
    programs = launch_table.cdiv(weight.shape[0], tiles.rows)
    _norm_qkv_rope_write_kernel[(programs, tiles.splits)](
        x, norm, weight, x if scale is None else scale, x if bias is None else bias, cos_sin,
        positions, slot_mapping, q, k_cache, v_cache, *workspace, tokens, x.stride(0), eps,
        K=k, NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, DIM=dim, BLOCK_SIZE=block_size,
        HAS_BIAS=bias is not None, **tiles.options(),
    )  # fmt: skip
    return q
