"""Rotary embedding of q and k, and the write of k and v into their KV slots, in one pass.

    (x[i], x[i + D/2]) <- (x[i] cos - x[i + D/2] sin, x[i + D/2] cos + x[i] sin)

with the angle of pair i at the token's position, in float32, rounded once, then once more by an fp8
cache. A program owns some heads of one token, all of one kind: it rotates query heads, rotates and
stores key heads, stores value heads. Knows slots, not sequences.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from s1engine.kernels import launch_table
from s1engine.kernels.kv_quant import check_caches, quantize
from s1engine.kernels.pdl import grid_dependency_wait, launch_dependents


@triton.jit
def _load_halves(x_ptr, head, pair, inside, HEAD_DIM: tl.constexpr):
    """Both halves of some heads, [BLOCK_HEADS, HEAD_DIM / 2] each."""
    at = x_ptr + head[:, None] * HEAD_DIM + pair[None, :]
    first = tl.load(at, mask=inside, other=0.0)
    return first, tl.load(at + HEAD_DIM // 2, mask=inside, other=0.0)


@triton.jit
def _store_halves(x_ptr, stride, head, pair, first, second, inside, HEAD_DIM: tl.constexpr):
    at = x_ptr + head[:, None] * stride + pair[None, :]
    tl.store(at, quantize(first, x_ptr), mask=inside)
    tl.store(at + HEAD_DIM // 2, quantize(second, x_ptr), mask=inside)


@triton.jit
def _rotate(x_ptr, cos_sin_ptr, head, pair, inside, HEAD_DIM: tl.constexpr):
    """Rotate some heads in place and return their halves."""
    first, second = _load_halves(x_ptr, head, pair, inside, HEAD_DIM)
    cos = tl.load(cos_sin_ptr + pair)[None, :]
    sin = tl.load(cos_sin_ptr + HEAD_DIM // 2 + pair)[None, :]
    low, high = first.to(tl.float32), second.to(tl.float32)
    first = (low * cos - high * sin).to(x_ptr.dtype.element_ty)
    second = (high * cos + low * sin).to(x_ptr.dtype.element_ty)
    _store_halves(x_ptr, HEAD_DIM, head, pair, first, second, inside, HEAD_DIM)
    return first, second


@triton.jit
def _rope_write_kernel(
    q_ptr,  # [T, NUM_HEADS, HEAD_DIM], in place
    k_ptr,  # [T, NUM_KV_HEADS, HEAD_DIM], in place
    v_ptr,  # [T, NUM_KV_HEADS, HEAD_DIM]
    cos_sin_ptr,  # [max_positions, HEAD_DIM] float32
    k_cache_ptr,  # [num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM]
    v_cache_ptr,
    position_ptr,  # [T] int32
    slot_ptr,  # [T] int64
    q_stride,
    k_stride,
    v_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    PDL: tl.constexpr,
):
    grid_dependency_wait(PDL)
    Q_PROGRAMS: tl.constexpr = (NUM_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    KV_PROGRAMS: tl.constexpr = (NUM_KV_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    token = tl.program_id(0).to(tl.int64)
    program = tl.program_id(1)
    pair = tl.arange(0, HEAD_DIM // 2)
    cos_sin_ptr += tl.load(position_ptr + token).to(tl.int64) * HEAD_DIM
    if program < Q_PROGRAMS:
        head = program * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        inside = (head < NUM_HEADS)[:, None]
        _rotate(q_ptr + token * q_stride, cos_sin_ptr, head, pair, inside, HEAD_DIM)
    else:
        slot = tl.load(slot_ptr + token)
        block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
        place = block * (NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM) + offset * HEAD_DIM
        head = (program - Q_PROGRAMS) % KV_PROGRAMS * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        inside = (head < NUM_KV_HEADS)[:, None]
        stride = BLOCK_SIZE * HEAD_DIM
        if program < Q_PROGRAMS + KV_PROGRAMS:
            k1, k2 = _rotate(k_ptr + token * k_stride, cos_sin_ptr, head, pair, inside, HEAD_DIM)
            _store_halves(k_cache_ptr + place, stride, head, pair, k1, k2, inside, HEAD_DIM)
        else:
            v1, v2 = _load_halves(v_ptr + token * v_stride, head, pair, inside, HEAD_DIM)
            _store_halves(v_cache_ptr + place, stride, head, pair, v1, v2, inside, HEAD_DIM)
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
    check_caches(k_cache, v_cache, q.dtype, dim)
    assert k.shape == v.shape == (tokens, num_kv_heads, dim)
    assert q.stride()[1:] == k.stride()[1:] == v.stride()[1:] == (dim, 1)
    assert q.dtype == k.dtype == v.dtype
    assert cos_sin.dtype == torch.float32 and cos_sin.is_contiguous() and cos_sin.shape[1] == dim
    assert positions.shape == slot_mapping.shape == (tokens,)
    heads = min(launch_table.ROPE_HEADS, launch_table.next_power_of_2(num_heads))
    programs = triton.cdiv(num_heads, heads) + 2 * triton.cdiv(num_kv_heads, heads)
    _rope_write_kernel[(tokens, programs)](
        q, k, v, cos_sin, k_cache, v_cache, positions, slot_mapping,
        q.stride(0), k.stride(0), v.stride(0),
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=dim, BLOCK_SIZE=block_size,
        BLOCK_HEADS=heads, **launch_table.ROPE.kwargs(),
    )  # fmt: skip
