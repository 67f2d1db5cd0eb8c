"""Rotary embedding of q and k, and the write of k and v into their KV slots, in one pass.

    (x[i], x[i + D/2]) <- (x[i] cos - x[i + D/2] sin, x[i + D/2] cos + x[i] sin)

for the angle of pair i at the token's position, in float32, rounded once (then by a cache in fp8).
A program owns some heads of one token, all of one kind: query heads are turned, key heads turned
and stored, value heads stored. Knows slots, not sequences.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from s1engine.kernels import launch_table
from s1engine.kernels.kv_quant import quantize
from s1engine.kernels.pdl import grid_dependency_wait, launch_dependents


@triton.jit
def _load_halves(x_ptr, head, pair, inside, DIM: tl.constexpr):
    """Both halves of some heads, [HEADS, DIM / 2] each."""
    at = x_ptr + head[:, None] * DIM + pair[None, :]
    return tl.load(at, mask=inside, other=0.0), tl.load(at + DIM // 2, mask=inside, other=0.0)


@triton.jit
def _store_halves(x_ptr, stride, head, pair, first, second, inside, DIM: tl.constexpr):
    at = x_ptr + head[:, None] * stride + pair[None, :]
    tl.store(at, quantize(first, x_ptr), mask=inside)
    tl.store(at + DIM // 2, quantize(second, x_ptr), mask=inside)


@triton.jit
def _rotate(x_ptr, table_ptr, head, pair, inside, DIM: tl.constexpr):
    """Turns some heads in place and returns their halves."""
    first, second = _load_halves(x_ptr, head, pair, inside, DIM)
    cos = tl.load(table_ptr + pair)[None, :]
    sin = tl.load(table_ptr + DIM // 2 + pair)[None, :]
    low, high = first.to(tl.float32), second.to(tl.float32)
    first = (low * cos - high * sin).to(x_ptr.dtype.element_ty)
    second = (high * cos + low * sin).to(x_ptr.dtype.element_ty)
    _store_halves(x_ptr, DIM, head, pair, first, second, inside, DIM)
    return first, second


@triton.jit
def _rope_write_kernel(
    q_ptr,  # [T, NUM_HEADS, DIM], in place
    k_ptr,  # [T, NUM_KV_HEADS, DIM], in place
    v_ptr,  # [T, NUM_KV_HEADS, DIM]
    cos_sin_ptr,  # [max_positions, DIM] float32
    k_cache_ptr,  # [num_blocks, NUM_KV_HEADS, BLOCK_SIZE, DIM]
    v_cache_ptr,
    position_ptr,  # [T] int32
    slot_ptr,  # [T] int64
    q_stride,
    k_stride,
    v_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    PDL: tl.constexpr,
):
    grid_dependency_wait(PDL)
    Q_PARTS: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    KV_PARTS: tl.constexpr = (NUM_KV_HEADS + HEADS - 1) // HEADS
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    pair = tl.arange(0, DIM // 2)
    table_ptr = cos_sin_ptr + tl.load(position_ptr + token).to(tl.int64) * DIM
    if part < Q_PARTS:
        head = part * HEADS + tl.arange(0, HEADS)
        inside = (head < NUM_HEADS)[:, None]
        _rotate(q_ptr + token * q_stride, table_ptr, head, pair, inside, DIM)
    else:
        slot = tl.load(slot_ptr + token)
        block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
        place = block * (NUM_KV_HEADS * BLOCK_SIZE * DIM) + offset * DIM
        head = (part - Q_PARTS) % KV_PARTS * HEADS + tl.arange(0, HEADS)
        inside = (head < NUM_KV_HEADS)[:, None]
        stride = BLOCK_SIZE * DIM
        if part < Q_PARTS + KV_PARTS:
            k1, k2 = _rotate(k_ptr + token * k_stride, table_ptr, head, pair, inside, DIM)
            _store_halves(k_cache_ptr + place, stride, head, pair, k1, k2, inside, DIM)
        else:
            v1, v2 = _load_halves(v_ptr + token * v_stride, head, pair, inside, DIM)
            _store_halves(v_cache_ptr + place, stride, head, pair, v1, v2, inside, DIM)
    launch_dependents(PDL)


def rope_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
) -> None:
    """q [T, Hq, D], k, v [T, Hkv, D] with contiguous heads; caches [num_blocks, Hkv, S, D]."""
    tokens, num_heads, dim = q.shape
    num_kv_heads, block_size = k_cache.shape[1], k_cache.shape[2]
    assert dim in launch_table.HEAD_DIMS and block_size in launch_table.BLOCK_SIZES
    assert k.shape == v.shape == (tokens, num_kv_heads, dim)
    assert q.stride()[1:] == k.stride()[1:] == v.stride()[1:] == (dim, 1)
    assert q.dtype == k.dtype == v.dtype and k_cache.dtype == v_cache.dtype
    assert k_cache.dtype in (q.dtype, torch.float8_e4m3fn)
    assert k_cache.shape == v_cache.shape and k_cache.shape[3] == dim
    assert k_cache.is_contiguous() and v_cache.is_contiguous()
    assert cos_sin.dtype == torch.float32 and cos_sin.is_contiguous() and cos_sin.shape[1] == dim
    assert positions.shape == slot_mapping.shape == (tokens,)
    heads = min(launch_table.ROPE_HEADS, launch_table.next_power_of_2(num_heads))
    parts = triton.cdiv(num_heads, heads) + 2 * triton.cdiv(num_kv_heads, heads)
    _rope_write_kernel[(tokens, parts)](
        q,
        k,
        v,
        cos_sin,
        k_cache,
        v_cache,
        positions,
        slot_mapping,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        DIM=dim,
        BLOCK_SIZE=block_size,
        HEADS=heads,
        **launch_table.ROPE.options(),
    )
