"""Attention of one token a row over its paged context, split along the context (split-KV).

    out[b, h] = softmax(q[b, h] K[b, h / G]^T * scale) V[b, h / G]

A program owns one row of the batch, one KV head with its G query heads, and one of NUM_SPLITS parts
of the context. Splits are whole tiles; how many are used follows from the context length on the
device, so a captured launch fits any length. Each program stores a partial result. The last one to
arrive adds them in a fixed order (equal inputs give equal bits) and resets the counter to 0.

With a WINDOW, the context begins at the window's first tile: blocks before it may be freed. With
SINKS, the softmax has one more logit of its head, without a value.

The next block's id is loaded one tile ahead. Loaded where it is used, it would take pipeline stages
from K and V: half of the buffers at the same number of stages.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from s1engine.kernels import launch_table
from s1engine.kernels.kv_quant import cast_query, check_caches, check_sinks
from s1engine.kernels.online_softmax import LOG2E, LOWEST, add_sinks, online_softmax_tile
from s1engine.kernels.pdl import grid_dependency_wait, launch_dependents


@triton.jit
def _attend_tiles(
    q,  # [BLOCK_M, HEAD_DIM]
    k_ptr,
    v_ptr,
    table_ptr,
    context,
    oldest,  # first key that is seen; read if WINDOWED
    first_tile,
    end_tile,
    scale,
    block_stride,
    BLOCK_M: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """acc, m and total of the tiles first_tile:end_tile of one context."""
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    last = tl.zeros([BLOCK_M], tl.int32)
    full = tl.minimum(end_tile, context // BLOCK_N)
    block = tl.load(table_ptr + first_tile * BLOCK_N // BLOCK_SIZE, first_tile < end_tile, other=0)
    if WINDOWED:  # the first tile of a window begins with keys that are not seen
        if (first_tile < end_tile) & (first_tile * BLOCK_N < oldest):
            place = block.to(tl.int64) * block_stride + first_tile * BLOCK_N % BLOCK_SIZE * HEAD_DIM
            valid = context - first_tile * BLOCK_N
            first = last + oldest - first_tile * BLOCK_N
            acc, m, total = online_softmax_tile(
                q, k_ptr + place, v_ptr + place, acc, m, total, scale, last + valid - 1, valid,
                first, HEAD_DIM, BLOCK_N, True, True,
            )  # fmt: skip
            first_tile += 1
            block = tl.load(
                table_ptr + first_tile * BLOCK_N // BLOCK_SIZE, first_tile < end_tile, other=0
            )
        full = tl.maximum(full, first_tile)
    for tile in range(first_tile, full):
        place = block.to(tl.int64) * block_stride + tile * BLOCK_N % BLOCK_SIZE * HEAD_DIM
        following = tile + 1
        block = tl.load(
            table_ptr + following * BLOCK_N // BLOCK_SIZE, following < end_tile, other=0
        )
        acc, m, total = online_softmax_tile(
            q, k_ptr + place, v_ptr + place, acc, m, total, scale, last, 0, last,
            HEAD_DIM, BLOCK_N, False, False,
        )  # fmt: skip
    if full < end_tile:
        place = block.to(tl.int64) * block_stride + full * BLOCK_N % BLOCK_SIZE * HEAD_DIM
        valid = context - full * BLOCK_N
        acc, m, total = online_softmax_tile(
            q, k_ptr + place, v_ptr + place, acc, m, total, scale, last + valid - 1, valid,
            last, HEAD_DIM, BLOCK_N, True, False,
        )  # fmt: skip
    return acc, m, total


@triton.jit
def _reduce_splits(
    partial_ptr, max_sum_ptr, splits,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr, NUM_SPLITS: tl.constexpr,
):  # fmt: skip
    """acc, m and total of one row and KV head over all splits, in order. The loads bypass the L1
    cache, since other programs have just written the partial results. No load waits for another:
    the maxima of all splits come first, then the partial results in chunks."""
    CHUNK: tl.constexpr = max(min(NUM_SPLITS, 8192 // (BLOCK_M * HEAD_DIM)), 1)  # registers hold it
    row = tl.arange(0, BLOCK_M)
    at = row[None, :, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, None, :]
    all_splits = tl.arange(0, NUM_SPLITS)[:, None]
    maxima = tl.load(
        max_sum_ptr + all_splits * 2 * BLOCK_M + row[None, :],
        mask=all_splits < splits, other=LOWEST, cache_modifier=".cg",
    )  # fmt: skip
    m = tl.max(maxima, axis=0)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    for first in range(0, splits, CHUNK):
        split = first + tl.arange(0, CHUNK)[:, None]
        at_max = max_sum_ptr + split * 2 * BLOCK_M + row[None, :]
        used = split < splits
        m_split = tl.load(at_max, mask=used, other=LOWEST, cache_modifier=".cg")
        total_split = tl.load(at_max + BLOCK_M, mask=used, other=0.0, cache_modifier=".cg")
        inside = (used & (row < GROUP)[None, :])[:, :, None]
        at_acc = partial_ptr + split[:, :, None] * (BLOCK_M * HEAD_DIM) + at
        acc_split = tl.load(at_acc, mask=inside, other=0.0, cache_modifier=".cg")
        share = tl.exp2(m_split - m[None, :])
        total += tl.sum(total_split * share, axis=0)
        acc += tl.sum(acc_split * share[:, :, None], axis=0)
    return acc, m, total


@triton.jit
def _paged_decode_kernel(
    q_ptr,  # [B, Hkv * GROUP, HEAD_DIM], rows q_stride apart
    k_cache_ptr,  # [num_blocks, Hkv, BLOCK_SIZE, HEAD_DIM]
    v_cache_ptr,
    table_ptr,  # [B, max_blocks] int32
    context_ptr,  # [B] int32; 0: the row is idle and gets zeros
    sinks_ptr,  # [Hkv * GROUP] float32; read if SINKS
    partial_ptr,  # [B, Hkv, NUM_SPLITS, BLOCK_M, HEAD_DIM] float32
    max_sum_ptr,  # [B, Hkv, NUM_SPLITS, 2, BLOCK_M] float32: maxima, sums
    arrivals_ptr,  # [B, Hkv] int32, zeros before and after
    out_ptr,  # [B, Hkv * GROUP * HEAD_DIM]
    q_stride,
    table_stride,
    block_stride,
    scale,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    PDL: tl.constexpr,
):
    grid_dependency_wait(PDL)
    b, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    pair = b * tl.num_programs(1) + head  # row and KV head
    context = tl.load(context_ptr + b)
    end_tile = tl.cdiv(context, BLOCK_N)
    oldest, begin_tile, tiles = 0, 0, end_tile
    if WINDOW > 0:
        oldest = tl.maximum(context - WINDOW, 0)
        begin_tile = oldest // BLOCK_N
        tiles = end_tile - begin_tile
    share = tl.maximum(tl.cdiv(tiles, NUM_SPLITS), 1)  # tiles of a split
    splits = tl.maximum(tl.cdiv(tiles, share), 1)  # in use
    if split < splits:
        row, dim = tl.arange(0, BLOCK_M), tl.arange(0, HEAD_DIM)
        in_group = (row < GROUP)[:, None]
        at_q = b.to(tl.int64) * q_stride + (head * GROUP + row)[:, None] * HEAD_DIM + dim[None, :]
        q = cast_query(tl.load(q_ptr + at_q, mask=in_group, other=0.0), k_cache_ptr)
        head_offset = head * (BLOCK_SIZE * HEAD_DIM)
        acc, m, total = _attend_tiles(
            q, k_cache_ptr + head_offset, v_cache_ptr + head_offset,
            table_ptr + b.to(tl.int64) * table_stride, context, oldest,
            begin_tile + split * share, tl.minimum(begin_tile + (split + 1) * share, end_tile),
            scale, block_stride, BLOCK_M, HEAD_DIM, BLOCK_SIZE, BLOCK_N, WINDOW > 0,
        )  # fmt: skip
        launch_dependents(PDL)
        complete = splits == 1
        if splits > 1:
            base = pair.to(tl.int64) * NUM_SPLITS
            partial_base = partial_ptr + base * (BLOCK_M * HEAD_DIM)
            max_sum_base = max_sum_ptr + base * (2 * BLOCK_M)
            at_acc = row[:, None] * HEAD_DIM + dim[None, :]
            tl.store(partial_base + split * (BLOCK_M * HEAD_DIM) + at_acc, acc, mask=in_group)
            tl.store(max_sum_base + split * (2 * BLOCK_M) + row, m)
            tl.store(max_sum_base + split * (2 * BLOCK_M) + BLOCK_M + row, total)
            tl.debug_barrier()  # all of the program's stores come before its arrival
            complete = tl.atomic_add(arrivals_ptr + pair, 1, sem="acq_rel") == splits - 1
            if complete:
                tl.store(arrivals_ptr + pair, 0)
                acc, m, total = _reduce_splits(
                    partial_base, max_sum_base, splits, GROUP, BLOCK_M, HEAD_DIM, NUM_SPLITS
                )
        if complete:
            if SINKS:
                total = add_sinks(total, m, sinks_ptr, head * GROUP + row, row < GROUP)
            out = acc / tl.maximum(total, 1.0e-30)[:, None]
            at_out = (pair * GROUP + row)[:, None].to(tl.int64) * HEAD_DIM + dim[None, :]
            tl.store(out_ptr + at_out, out.to(out_ptr.dtype.element_ty), mask=in_group)


def workspace_sizes(rows: int, kv_heads: int, head_dim: int, group: int) -> tuple[int, int]:
    """Floats for partial results, and counters, of a launch with these shapes."""
    block_m = max(16, launch_table.next_power_of_2(group))
    pairs = rows * kv_heads
    return pairs * launch_table.decode_splits(rows, kv_heads) * block_m * (head_dim + 2), pairs


def paged_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    scale: float,
    partials: Tensor,
    arrivals: Tensor,
    num_splits: int | None = None,
    window: int = 0,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """q [B, Hq, D] over caches [num_blocks, Hkv, S, D] -> ``out`` [B, Hq * D]; None: a new one.

    ``partials`` (float32) and ``arrivals`` (int32, zeros; left zero) have ``workspace_sizes`` or
    more. ``num_splits`` None: the table's. ``window`` 0: none; ``sinks`` [Hq] float32.
    """
    rows, num_heads, dim = q.shape
    _, num_kv_heads, block_size, _ = k_cache.shape
    group = num_heads // num_kv_heads
    assert num_heads == group * num_kv_heads and group <= launch_table.MAX_GROUP
    check_caches(k_cache, v_cache, q.dtype, dim)
    assert q.stride()[1:] == (dim, 1)
    assert block_table.dtype == context_lens.dtype == torch.int32
    assert context_lens.shape == (rows,) and block_table.shape[0] == rows
    assert block_table.stride(1) == 1 and context_lens.is_contiguous()
    check_sinks(window, sinks, num_heads)
    assert partials.dtype == torch.float32 and arrivals.dtype == torch.int32
    tiles = launch_table.decode_tiles(dim, block_size, group, q.element_size(), window > 0)
    num_splits = num_splits or launch_table.decode_splits(rows, num_kv_heads)
    pairs, block_m = rows * num_kv_heads, tiles.block_m
    acc_size = pairs * num_splits * block_m * dim
    assert partials.numel() >= acc_size + pairs * num_splits * 2 * block_m
    assert arrivals.numel() >= pairs
    if out is None:
        out = torch.empty((rows, num_heads * dim), dtype=q.dtype, device=q.device)
    assert out.shape == (rows, num_heads * dim) and out.is_contiguous()
    _paged_decode_kernel[(rows, num_kv_heads, num_splits)](
        q, k_cache, v_cache, block_table, context_lens, q if sinks is None else sinks, partials,
        partials[acc_size:], arrivals, out, q.stride(0), block_table.stride(0), k_cache.stride(0),
        scale * LOG2E,
        GROUP=group, BLOCK_M=block_m, HEAD_DIM=dim, BLOCK_SIZE=block_size, BLOCK_N=tiles.block_n,
        NUM_SPLITS=num_splits, WINDOW=window, SINKS=sinks is not None, **tiles.launch.kwargs(),
    )  # fmt: skip
    return out
