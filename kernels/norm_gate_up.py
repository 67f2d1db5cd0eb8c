"""The first half of an MLP for the few rows of a decode step: RMSNorm, gate and up, SwiGLU.

    n = x / sqrt(mean(x^2) + eps) * norm,  gate = n Wg^T,  up = n Wu^T
    out = gate / (1 + exp(-gate)) * up

A program owns the same rows of Wg and of Wu, so that the two meet in its registers. Summed in
float32, rounded once; for more than a few tokens a kernel of its own norms them first.
"""

import triton
import triton.language as tl
from torch import Tensor

from s1engine.kernels import launch_table
from s1engine.kernels.rms_norm import rms_norm
from s1engine.kernels.skinny_gemm import (
    add_parts,
    check_rows,
    halves,
    multiply_rows,
    part_of,
    tile_bytes,
)


@triton.jit(do_not_specialize=["tokens"])
def _norm_gate_up_kernel(
    x_ptr,  # [T, K], normed if DOT
    norm_ptr,  # [K]; not read if DOT
    w_ptr,  # [2 F, K]: gate, up
    scale_ptr,  # one for each row of w, float32; not read unless w is e4m3
    out_ptr,  # [T, F]
    part_ptr,
    arrived_ptr,
    tokens,
    x_stride,
    eps,
    F: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    PAIRS: tl.constexpr = ROWS // 2
    tile, split = tl.program_id(0), tl.program_id(1)
    token, r = tl.arange(0, TOKENS), tl.arange(0, ROWS)
    row = tl.minimum(tile * PAIRS + r % PAIRS, F - 1) + r // PAIRS * F
    first, end = part_of(split, K, BLOCK_K, SPLITS)
    acc, squares = multiply_rows(
        x_ptr, norm_ptr, w_ptr, scale_ptr, row, tl.minimum(token, tokens - 1), x_stride, first, end,
        K, ROWS, TOKENS, BLOCK_K, not DOT, DOT, PDL,
    )  # fmt: skip
    acc, squares, last = add_parts(
        acc, squares, part_ptr, arrived_ptr, tile, split, ROWS, TOKENS, SPLITS, not DOT
    )
    if last:
        if not DOT:
            acc *= tl.rsqrt(squares / K + eps)
        gate, up = halves(acc, PAIRS, TOKENS)
        out = gate / (1.0 + tl.exp(-gate)) * up
        column = tile * PAIRS + tl.arange(0, PAIRS)
        inside = (column < F)[:, None] & (token < tokens)[None, :]
        at = out_ptr + token[None, :].to(tl.int64) * F + column[:, None]
        tl.store(at, out.to(out_ptr.dtype.element_ty), mask=inside)


def norm_gate_up(
    x: Tensor,
    norm: Tensor,
    eps: float,
    weight: Tensor,
    workspace: tuple[Tensor, Tensor],
    scale: Tensor | None = None,
) -> Tensor:
    """x [T, K], norm [K], weight [2F, K] -> [T, F]; the rest as for ``linear``."""
    tokens, k = check_rows(x, weight, norm, scale=scale)
    f = weight.shape[0] // 2
    assert weight.shape[0] == 2 * f
    out = x.new_empty((tokens, f))
    tiles = launch_table.skinny_gemm_tiles(tokens, 2 * f, k, tile_bytes(x, weight))
    if tiles.dot:
        x = rms_norm(x, norm, eps)
    _norm_gate_up_kernel[(launch_table.cdiv(f, tiles.rows // 2), tiles.splits)](
        x, norm, weight, x if scale is None else scale, out, *workspace, tokens, x.stride(0), eps,
        F=f, K=k, **tiles.options(),
    )  # fmt: skip
    return out
