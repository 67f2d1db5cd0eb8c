"""Attention of one token a row over its paged context, split along the context.

    out[b, h] = softmax(q[b, h] K[b, h / G]^T * scale) V[b, h / G]

A program owns one row, one KV head with its G query heads, and one of NUM_SPLITS parts of the
context. Parts are whole tiles; how many are in use follows from the context's length, read on the
device, so a captured launch fits any length. Each writes a partial result; the one that arrives
last adds them up in a fixed order (equal inputs give equal bits) and sets the counter back to 0.

The id of the next block is loaded one tile ahead. Loaded where it is used, it would take pipeline
stages away from K and V: half of the buffers at the same number of stages.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from s1engine.kernels import launch_table
from s1engine.kernels.kv_quant import cast_query
from s1engine.kernels.online_softmax import LOG2E, LOWEST, online_softmax_tile
from s1engine.kernels.pdl import grid_dependency_wait, launch_dependents


@triton.jit
def _attend_range(
    q,  # [M, DIM]
    k_ptr,
    v_ptr,
    table_ptr,
    context,
    first_tile,
    end_tile,
    scale,
    block_stride,
    M: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Unscaled sum, maximum and weight of the tiles first_tile:end_tile of one context."""
    m = tl.full([M], LOWEST, tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, DIM], tl.float32)
    last = tl.zeros([M], tl.int32)
    full = tl.minimum(end_tile, context // TILE)
    block = tl.load(table_ptr + first_tile * TILE // BLOCK_SIZE, first_tile < end_tile, other=0)
    for tile in range(first_tile, full):
        place = block.to(tl.int64) * block_stride + tile * TILE % BLOCK_SIZE * DIM
        following = tile + 1
        block = tl.load(table_ptr + following * TILE // BLOCK_SIZE, following < end_tile, other=0)
        acc, m, total = online_softmax_tile(
            q, k_ptr + place, v_ptr + place, acc, m, total, scale, last, 0, DIM, TILE, False
        )
    if full < end_tile:
        place = block.to(tl.int64) * block_stride + full * TILE % BLOCK_SIZE * DIM
        valid = context - full * TILE
        acc, m, total = online_softmax_tile(
            q, k_ptr + place, v_ptr + place, acc, m, total, scale, last + valid - 1, valid,
            DIM, TILE, True,
        )  # fmt: skip
    return acc, m, total


@triton.jit
def _sum_parts(
    part_ptr, weight_ptr, parts,
    GROUP: tl.constexpr, M: tl.constexpr, DIM: tl.constexpr, NUM_SPLITS: tl.constexpr,
):  # fmt: skip
    """The parts of one row and head added up, in order. Written by other programs a moment ago,
    so the loads go past the L1 cache. No load waits for another: the maximum comes first, of all
    parts at once, and what is added then comes a CHUNK at a time."""
    CHUNK: tl.constexpr = max(min(NUM_SPLITS, 8192 // (M * DIM)), 1)  # that registers hold
    row = tl.arange(0, M)
    at = row[None, :, None] * DIM + tl.arange(0, DIM)[None, None, :]
    all_parts = tl.arange(0, NUM_SPLITS)[:, None]
    maxima = tl.load(
        weight_ptr + all_parts * 2 * M + row[None, :],
        mask=all_parts < parts, other=LOWEST, cache_modifier=".cg",
    )  # fmt: skip
    m = tl.max(maxima, axis=0)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, DIM], tl.float32)
    for first in range(0, parts, CHUNK):
        part = first + tl.arange(0, CHUNK)[:, None]
        at_weight = weight_ptr + part * 2 * M + row[None, :]
        there = part < parts
        m_part = tl.load(at_weight, mask=there, other=LOWEST, cache_modifier=".cg")
        l_part = tl.load(at_weight + M, mask=there, other=0.0, cache_modifier=".cg")
        mine = (there & (row < GROUP)[None, :])[:, :, None]
        at_part = part_ptr + part[:, :, None] * (M * DIM) + at
        acc_part = tl.load(at_part, mask=mine, other=0.0, cache_modifier=".cg")
        share = tl.exp2(m_part - m[None, :])
        total += tl.sum(l_part * share, axis=0)
        acc += tl.sum(acc_part * share[:, :, None], axis=0)
    return acc, total


@triton.jit
def _paged_decode_kernel(
    q_ptr,  # [B, Hkv * GROUP, DIM], rows q_stride apart
    k_cache_ptr,  # [num_blocks, Hkv, BLOCK_SIZE, DIM]
    v_cache_ptr,
    table_ptr,  # [B, max_blocks] int32
    context_ptr,  # [B] int32; 0: the row is idle and gets zeros
    part_ptr,  # [B, Hkv, NUM_SPLITS, M, DIM] float32
    weight_ptr,  # [B, Hkv, NUM_SPLITS, 2, M] float32: maxima, sums
    arrived_ptr,  # [B, Hkv] int32, zeros before and after
    out_ptr,  # [B, Hkv * GROUP * DIM]
    q_stride,
    table_stride,
    block_stride,
    scale,
    GROUP: tl.constexpr,
    M: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    grid_dependency_wait(PDL)
    b, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    pair = b * tl.num_programs(1) + head  # which row and KV head
    context = tl.load(context_ptr + b)
    tiles = tl.cdiv(context, TILE)
    share = tl.maximum(tl.cdiv(tiles, NUM_SPLITS), 1)  # tiles of a part
    parts = tl.maximum(tl.cdiv(tiles, share), 1)
    if split < parts:
        row, dim = tl.arange(0, M), tl.arange(0, DIM)
        mine = (row < GROUP)[:, None]
        at_q = b.to(tl.int64) * q_stride + (head * GROUP + row)[:, None] * DIM + dim[None, :]
        q = cast_query(tl.load(q_ptr + at_q, mask=mine, other=0.0), k_cache_ptr)
        head_offset = head * (BLOCK_SIZE * DIM)
        acc, m, total = _attend_range(
            q, k_cache_ptr + head_offset, v_cache_ptr + head_offset,
            table_ptr + b.to(tl.int64) * table_stride, context,
            split * share, tl.minimum((split + 1) * share, tiles), scale, block_stride,
            M, DIM, BLOCK_SIZE, TILE,
        )  # fmt: skip
        launch_dependents(PDL)
        finished = parts == 1
        if parts > 1:
            base = pair.to(tl.int64) * NUM_SPLITS
            part_base = part_ptr + base * (M * DIM)
            weight_base = weight_ptr + base * (2 * M)
            at_part = row[:, None] * DIM + dim[None, :]
            tl.store(part_base + split * (M * DIM) + at_part, acc, mask=mine)
            tl.store(weight_base + split * (2 * M) + row, m)
            tl.store(weight_base + split * (2 * M) + M + row, total)
            tl.debug_barrier()  # all of the program's stores come before its arrival
            finished = tl.atomic_add(arrived_ptr + pair, 1, sem="acq_rel") == parts - 1
            if finished:
                tl.store(arrived_ptr + pair, 0)
                acc, total = _sum_parts(part_base, weight_base, parts, GROUP, M, DIM, NUM_SPLITS)
        if finished:
            out = acc / tl.maximum(total, 1.0e-30)[:, None]
            at_out = (pair * GROUP + row)[:, None].to(tl.int64) * DIM + dim[None, :]
            tl.store(out_ptr + at_out, out.to(out_ptr.dtype.element_ty), mask=mine)


def workspace_sizes(rows: int, kv_heads: int, head_dim: int, group: int) -> tuple[int, int]:
    """Floats for partial results, and counters, that a launch of these shapes needs."""
    m = max(16, launch_table.next_power_of_2(group))
    pairs = rows * kv_heads
    return pairs * launch_table.decode_splits(rows, kv_heads) * m * (head_dim + 2), pairs


def paged_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    scale: float,
    parts: Tensor,
    arrived: Tensor,
    num_splits: int | None = None,
) -> Tensor:
    """q [B, Hq, D] over caches [num_blocks, Hkv, S, D] -> [B, Hq * D].

    ``parts`` (float32) and ``arrived`` (int32, zeros; left zero) are as large as
    ``workspace_sizes`` says at least. ``num_splits`` None: the table's.
    """
    rows, num_heads, dim = q.shape
    _, num_kv_heads, block_size, _ = k_cache.shape
    group = num_heads // num_kv_heads
    assert num_heads == group * num_kv_heads and group <= launch_table.MAX_GROUP
    assert dim in launch_table.HEAD_DIMS and block_size in launch_table.BLOCK_SIZES
    assert q.stride()[1:] == (dim, 1) and k_cache.dtype == v_cache.dtype
    assert k_cache.dtype in (q.dtype, torch.float8_e4m3fn)
    assert k_cache.shape == v_cache.shape and k_cache.shape[3] == dim
    assert k_cache.is_contiguous() and v_cache.is_contiguous()
    assert block_table.dtype == context_lens.dtype == torch.int32
    assert context_lens.shape == (rows,) and block_table.shape[0] == rows
    assert block_table.stride(1) == 1 and context_lens.is_contiguous()
    assert parts.dtype == torch.float32 and arrived.dtype == torch.int32
    tiles = launch_table.decode_tiles(dim, block_size, group, q.element_size())
    num_splits = num_splits or launch_table.decode_splits(rows, num_kv_heads)
    pairs, m = rows * num_kv_heads, tiles.block_m
    acc_size = pairs * num_splits * m * dim
    assert parts.numel() >= acc_size + pairs * num_splits * 2 * m and arrived.numel() >= pairs
    out = torch.empty((rows, num_heads * dim), dtype=q.dtype, device=q.device)
    _paged_decode_kernel[(rows, num_kv_heads, num_splits)](
        q,
        k_cache,
        v_cache,
        block_table,
        context_lens,
        parts,
        parts[acc_size:],
        arrived,
        out,
        q.stride(0),
        block_table.stride(0),
        k_cache.stride(0),
        scale * LOG2E,
        GROUP=group,
        M=m,
        DIM=dim,
        BLOCK_SIZE=block_size,
        TILE=tiles.block_n,
        NUM_SPLITS=num_splits,
        **tiles.launch.options(),
    )
    return out
