"""Causal attention of rows of any number of tokens over paged contexts, in one launch.

    out[t, h] = softmax(q[t, h] K[h / G]^T * scale) V[h / G]   over the positions up to t's own

Row b's tokens are the last ones of its context: prompts, chunks after a cached prefix, forced
phrases and single decode tokens mix freely. A program owns QUERIES tokens of one row with the G
query heads of one KV head, packed into the M rows of a matrix product.

Which row a program serves follows from its number without a table made by the host: row b begins at
program cu_seqlens_q[b] // QUERIES + b, which leaves each row at least the programs that it needs.
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
def _find_row(cu_ptr, program, rows, ROWS: tl.constexpr, QUERIES: tl.constexpr):
    """The row that a program serves."""
    b = tl.arange(0, ROWS)
    first = tl.load(cu_ptr + b, mask=b < rows, other=0) // QUERIES + b
    return tl.sum(((first <= program) & (b < rows)).to(tl.int32)) - 1


@triton.jit(do_not_specialize=["rows"])
def _paged_prefill_kernel(
    q_ptr,  # [T, Hkv * GROUP, DIM], tokens q_stride apart
    k_cache_ptr,  # [num_blocks, Hkv, BLOCK_SIZE, DIM]
    v_cache_ptr,
    table_ptr,  # [B, max_blocks] int32
    cu_ptr,  # [B + 1] int32
    context_ptr,  # [B] int32
    out_ptr,  # [T, Hkv * GROUP * DIM]
    rows,
    q_stride,
    table_stride,
    block_stride,
    scale,
    GROUP: tl.constexpr,
    M: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    grid_dependency_wait(PDL)
    QUERIES: tl.constexpr = M // GROUP
    program, head = tl.program_id(0), tl.program_id(1)
    b = _find_row(cu_ptr, program, rows, ROWS, QUERIES)
    begin, end = tl.load(cu_ptr + b), tl.load(cu_ptr + b + 1)
    token = begin + (program - begin // QUERIES - b) * QUERIES  # the program's first
    if token < end:
        context = tl.load(context_ptr + b)
        before = context - end  # position of token t is before + t
        packed, dim = tl.arange(0, M), tl.arange(0, DIM)
        mine = token + packed // GROUP
        inside = ((mine < end) & (packed < QUERIES * GROUP))[:, None]
        column = (head * GROUP + packed % GROUP)[:, None] * DIM + dim[None, :]
        q = tl.load(
            q_ptr + mine[:, None].to(tl.int64) * q_stride + column, mask=inside, other=0.0
        )  # [M, DIM]
        q = cast_query(q, k_cache_ptr)
        m = tl.full([M], LOWEST, tl.float32)
        total = tl.zeros([M], tl.float32)
        acc = tl.zeros([M, DIM], tl.float32)
        position = before + mine
        seen_by_all = before + token + 1  # of the context
        seen = before + tl.minimum(token + QUERIES, end)
        full, tiles = seen_by_all // TILE, tl.cdiv(seen, TILE)
        table_ptr += b.to(tl.int64) * table_stride
        k_cache_ptr += head * (BLOCK_SIZE * DIM)
        v_cache_ptr += head * (BLOCK_SIZE * DIM)
        block = tl.load(table_ptr)
        for tile in range(full):
            place = block.to(tl.int64) * block_stride + tile * TILE % BLOCK_SIZE * DIM
            following = tile + 1
            block = tl.load(table_ptr + following * TILE // BLOCK_SIZE, following < tiles, other=0)
            acc, m, total = online_softmax_tile(
                q, k_cache_ptr + place, v_cache_ptr + place, acc, m, total, scale, position, 0,
                DIM, TILE, False,
            )  # fmt: skip
        for tile in range(full, tiles):
            place = block.to(tl.int64) * block_stride + tile * TILE % BLOCK_SIZE * DIM
            following = tile + 1
            block = tl.load(table_ptr + following * TILE // BLOCK_SIZE, following < tiles, other=0)
            acc, m, total = online_softmax_tile(
                q, k_cache_ptr + place, v_cache_ptr + place, acc, m, total, scale,
                position - tile * TILE, context - tile * TILE, DIM, TILE, True,
            )  # fmt: skip
        out = acc / tl.maximum(total, 1.0e-30)[:, None]
        stride = tl.num_programs(1) * (GROUP * DIM)
        at_out = mine[:, None].to(tl.int64) * stride + column
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
) -> Tensor:
    """q [T, Hq, D] over caches [num_blocks, Hkv, S, D] -> [T, Hq * D]; cu_seqlens_q[B] is T."""
    tokens, num_heads, dim = q.shape
    _, num_kv_heads, block_size, _ = k_cache.shape
    rows, group = context_lens.shape[0], num_heads // num_kv_heads
    assert num_heads == group * num_kv_heads and group <= launch_table.MAX_GROUP
    assert dim in launch_table.HEAD_DIMS and block_size in launch_table.BLOCK_SIZES
    assert 0 < rows <= launch_table.MAX_BATCH_ROWS
    assert q.stride()[1:] == (dim, 1) and k_cache.dtype == v_cache.dtype
    assert k_cache.dtype in (q.dtype, torch.float8_e4m3fn)
    assert k_cache.shape == v_cache.shape and k_cache.shape[3] == dim
    assert k_cache.is_contiguous() and v_cache.is_contiguous()
    assert block_table.dtype == cu_seqlens_q.dtype == context_lens.dtype == torch.int32
    assert cu_seqlens_q.shape == (rows + 1,) and block_table.shape[0] == rows
    assert block_table.stride(1) == 1
    stored = k_cache.element_size()
    tiles = launch_table.prefill_tiles(
        dim, block_size, group, q.element_size(), stored, max_seqlen_q
    )
    out = torch.empty((tokens, num_heads * dim), dtype=q.dtype, device=q.device)
    programs = tokens // (tiles.block_m // group) + rows
    _paged_prefill_kernel[(programs, num_kv_heads)](
        q,
        k_cache,
        v_cache,
        block_table,
        cu_seqlens_q,
        context_lens,
        out,
        rows,
        q.stride(0),
        block_table.stride(0),
        k_cache.stride(0),
        scale * LOG2E,
        GROUP=group,
        M=tiles.block_m,
        DIM=dim,
        BLOCK_SIZE=block_size,
        TILE=tiles.block_n,
        ROWS=launch_table.padded_batch_rows(rows),
        **tiles.launch.options(),
    )
    return out
