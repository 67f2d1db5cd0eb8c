"""Causal attention of rows of any number of tokens over paged contexts, in one launch.

    out[t, h] = softmax(q[t, h] K[h / G]^T * scale) V[h / G]   over the positions up to t's own

With a WINDOW, over its last positions only: tiles before all of a program's windows are skipped,
so their blocks may be freed. With SINKS, each softmax has one more logit of its head, without a
value.

The tokens of row b are the last ones of its context: prompts, chunks after a cached prefix, forced
phrases and single decode tokens mix freely. A program owns QUERIES tokens of one row of the batch
with the G query heads of one KV head, packed into BLOCK_M rows of a matrix product.

A program finds its row from its number, without a table made by the host: row b begins at program
cu_seqlens_q[b] // QUERIES + b, which leaves every row at least the programs that it needs.
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
def _find_row(cu_ptr, program, rows, skipped, BLOCK_B: tl.constexpr, QUERIES: tl.constexpr):
    """The row of the batch that a program serves."""
    b = tl.arange(0, BLOCK_B)
    first = (tl.load(cu_ptr + b, mask=b < rows, other=0) - skipped) // QUERIES + b
    return tl.sum(((first <= program) & (b < rows)).to(tl.int32)) - 1


@triton.jit(do_not_specialize=["rows", "skipped"])
def _paged_prefill_kernel(
    q_ptr,  # [T, Hkv * GROUP, HEAD_DIM], tokens q_stride apart
    k_cache_ptr,  # [num_blocks, Hkv, BLOCK_SIZE, HEAD_DIM]
    v_cache_ptr,
    table_ptr,  # [B, max_blocks] int32
    cu_ptr,  # [B + 1] int32
    context_ptr,  # [B] int32
    sinks_ptr,  # [Hkv * GROUP] float32; read if SINKS
    out_ptr,  # [T, Hkv * GROUP * HEAD_DIM]
    rows,
    skipped,  # tokens before the first row
    q_stride,
    table_stride,
    block_stride,
    scale,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    PDL: tl.constexpr,
):
    grid_dependency_wait(PDL)
    QUERIES: tl.constexpr = BLOCK_M // GROUP
    program, head = tl.program_id(0), tl.program_id(1)
    b = _find_row(cu_ptr, program, rows, skipped, BLOCK_B, QUERIES)
    begin, end = tl.load(cu_ptr + b), tl.load(cu_ptr + b + 1)
    first_token = begin + (program - (begin - skipped) // QUERIES - b) * QUERIES
    if first_token < end:
        context = tl.load(context_ptr + b)
        before = context - end  # position of token t is before + t
        packed, dim = tl.arange(0, BLOCK_M), tl.arange(0, HEAD_DIM)
        token = first_token + packed // GROUP
        inside = ((token < end) & (packed < QUERIES * GROUP))[:, None]
        column = (head * GROUP + packed % GROUP)[:, None] * HEAD_DIM + dim[None, :]
        q = tl.load(
            q_ptr + token[:, None].to(tl.int64) * q_stride + column, mask=inside, other=0.0
        )  # [BLOCK_M, HEAD_DIM]
        q = cast_query(q, k_cache_ptr)
        m = tl.full([BLOCK_M], LOWEST, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
        position = before + token
        seen_by_all = before + first_token + 1  # of the context
        seen = before + tl.minimum(first_token + QUERIES, end)
        full, tiles = seen_by_all // BLOCK_N, tl.cdiv(seen, BLOCK_N)
        table_ptr += b.to(tl.int64) * table_stride
        k_cache_ptr += head * (BLOCK_SIZE * HEAD_DIM)
        v_cache_ptr += head * (BLOCK_SIZE * HEAD_DIM)
        oldest = position
        begin_tile, begin_full = 0, 0
        if WINDOW > 0:
            oldest = position - (WINDOW - 1)  # key of each query
            begin_tile = tl.maximum(seen_by_all - WINDOW, 0) // BLOCK_N
            begin_full = tl.cdiv(tl.maximum(seen - WINDOW, 0), BLOCK_N)  # all see it from there on
            begin_full = tl.minimum(begin_full, tiles)
            full = tl.maximum(full, begin_full)
        block = tl.load(table_ptr + begin_tile * BLOCK_N // BLOCK_SIZE)
        if WINDOW > 0:
            for tile in range(begin_tile, begin_full):
                place = block.to(tl.int64) * block_stride + tile * BLOCK_N % BLOCK_SIZE * HEAD_DIM
                following = tile + 1
                block = tl.load(
                    table_ptr + following * BLOCK_N // BLOCK_SIZE, following < tiles, other=0
                )
                acc, m, total = online_softmax_tile(
                    q, k_cache_ptr + place, v_cache_ptr + place, acc, m, total, scale,
                    position - tile * BLOCK_N, context - tile * BLOCK_N, oldest - tile * BLOCK_N,
                    HEAD_DIM, BLOCK_N, True, True,
                )  # fmt: skip
        for tile in range(begin_full, full):
            place = block.to(tl.int64) * block_stride + tile * BLOCK_N % BLOCK_SIZE * HEAD_DIM
            following = tile + 1
            block = tl.load(
                table_ptr + following * BLOCK_N // BLOCK_SIZE, following < tiles, other=0
            )
            acc, m, total = online_softmax_tile(
                q, k_cache_ptr + place, v_cache_ptr + place, acc, m, total, scale, position, 0,
                position, HEAD_DIM, BLOCK_N, False, False,
            )  # fmt: skip
        for tile in range(full, tiles):
            place = block.to(tl.int64) * block_stride + tile * BLOCK_N % BLOCK_SIZE * HEAD_DIM
            following = tile + 1
            block = tl.load(
                table_ptr + following * BLOCK_N // BLOCK_SIZE, following < tiles, other=0
            )
            acc, m, total = online_softmax_tile(
                q, k_cache_ptr + place, v_cache_ptr + place, acc, m, total, scale,
                position - tile * BLOCK_N, context - tile * BLOCK_N, position, HEAD_DIM, BLOCK_N,
                True, False,
            )  # fmt: skip
        if SINKS:
            total = add_sinks(total, m, sinks_ptr, head * GROUP + packed % GROUP, token < end)
        out = acc / tl.maximum(total, 1.0e-30)[:, None]
        stride = tl.num_programs(1) * (GROUP * HEAD_DIM)
        at_out = token[:, None].to(tl.int64) * stride + column
        launch_dependents(PDL)
        tl.store(out_ptr + at_out, out.to(out_ptr.dtype.element_ty), mask=inside)


def paged_prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    context_lens: Tensor,
    max_seqlen_q: int,
    scale: float,
    window: int = 0,
    sinks: Tensor | None = None,
    num_decode_rows: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """q [T, Hq, D] over caches [num_blocks, Hkv, S, D] -> [T, Hq * D]; cu_seqlens_q[B] is T.
    ``window`` 0: none; ``sinks`` [Hq] float32.

    The first ``num_decode_rows`` rows, of one token each, are left out: their part of ``out``
    (None: a new one) is not written."""
    skipped = num_decode_rows
    block_table, context_lens = block_table[skipped:], context_lens[skipped:]
    cu_seqlens_q = cu_seqlens_q[skipped:]
    tokens, num_heads, dim = q.shape
    _, num_kv_heads, block_size, _ = k_cache.shape
    rows, group = context_lens.shape[0], num_heads // num_kv_heads
    assert num_heads == group * num_kv_heads and group <= launch_table.MAX_GROUP
    check_caches(k_cache, v_cache, q.dtype, dim)
    assert 0 < rows <= launch_table.MAX_BATCH_ROWS
    assert q.stride()[1:] == (dim, 1)
    assert block_table.dtype == cu_seqlens_q.dtype == context_lens.dtype == torch.int32
    assert cu_seqlens_q.shape == (rows + 1,) and block_table.shape[0] == rows
    assert block_table.stride(1) == 1
    check_sinks(window, sinks, num_heads)
    tiles = launch_table.prefill_tiles(
        dim,
        block_size,
        group,
        q.element_size(),
        k_cache.element_size(),
        max_seqlen_q,
        window > 0,
    )
    if out is None:
        out = torch.empty((tokens, num_heads * dim), dtype=q.dtype, device=q.device)
    assert out.shape == (tokens, num_heads * dim) and out.is_contiguous()
    programs = (tokens - skipped) // (tiles.block_m // group) + rows
    _paged_prefill_kernel[(programs, num_kv_heads)](
        q, k_cache, v_cache, block_table, cu_seqlens_q, context_lens,
        q if sinks is None else sinks, out, rows, skipped,
        q.stride(0), block_table.stride(0), k_cache.stride(0), scale * LOG2E,
        GROUP=group, BLOCK_M=tiles.block_m, HEAD_DIM=dim, BLOCK_SIZE=block_size,
        BLOCK_N=tiles.block_n, BLOCK_B=launch_table.padded_batch_rows(rows), WINDOW=window,
        SINKS=sinks is not None,
        **tiles.launch.kwargs(),
    )  # fmt: skip
    return out
