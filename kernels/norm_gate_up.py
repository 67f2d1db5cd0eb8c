"""The first half of an MLP for the few tokens of a decode step: RMSNorm, gate and up, activation.

    n = x / sqrt(mean(x^2) + eps) * norm,  gate = n Wg^T,  up = n Wu^T
    out = activation(gate) * up                              (silu_and_mul.py)

A program owns the same rows of Wg and of Wu, so both products end in its registers. Summed in
float32, rounded once. On tensor cores a separate kernel norms x first.
"""

import triton
import triton.language as tl
from torch import Tensor

from s1engine.kernels import launch_table
from s1engine.kernels.rms_norm import rms_norm
from s1engine.kernels.silu_and_mul import activate
from s1engine.kernels.skinny_gemm import (
    check_operands,
    reduce_splits,
    skinny_gemm_tile,
    split_range,
    tile_itemsize,
    upper_and_lower,
)


@triton.jit(do_not_specialize=["tokens"])
def _norm_gate_up_kernel(
    x_ptr,  # [T, K], normed if DOT
    norm_ptr,  # [K]; read unless DOT
    w_ptr,  # [2 F, K]: gate, up
    scale_ptr,  # [2 F] float32; read if w is e4m3
    out_ptr,  # [T, F]
    partial_ptr,
    arrivals_ptr,
    tokens,
    x_stride,
    eps,
    F: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    DOT: tl.constexpr,
    GELU: tl.constexpr,
    PDL: tl.constexpr,
):
    PAIRS: tl.constexpr = BLOCK_N // 2
    tile, split = tl.program_id(0), tl.program_id(1)
    token, n = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_N)
    row = tl.minimum(tile * PAIRS + n % PAIRS, F - 1) + n // PAIRS * F
    begin, end = split_range(split, K, BLOCK_K, SPLIT_K)
    acc, squares = skinny_gemm_tile(
        x_ptr, norm_ptr, w_ptr, scale_ptr, row, tl.minimum(token, tokens - 1), x_stride, begin, end,
        K, BLOCK_N, BLOCK_T, BLOCK_K, not DOT, DOT, PDL,
    )  # fmt: skip
    acc, squares, last = reduce_splits(
        acc, squares, partial_ptr, arrivals_ptr, tile, split, BLOCK_N, BLOCK_T, SPLIT_K, not DOT
    )
    if last:
        if not DOT:
            acc *= tl.rsqrt(squares / K + eps)
        gate, up = upper_and_lower(acc, PAIRS, BLOCK_T)
        out = activate(gate, GELU) * up
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
    activation: str = "silu",
) -> Tensor:
    """x [T, K], norm [K], weight [2F, K] -> [T, F]; ``workspace`` and ``scale`` as in linear.
    ``activation``: silu or gelu_tanh."""
    tokens, k = check_operands(x, weight, norm, scale=scale)
    f = weight.shape[0] // 2
    assert weight.shape[0] == 2 * f
    out = x.new_empty((tokens, f))
    tiles = launch_table.skinny_gemm_tiles(tokens, 2 * f, k, tile_itemsize(x, weight))
    if tiles.dot:
        x = rms_norm(x, norm, eps)
    _norm_gate_up_kernel[(launch_table.cdiv(f, tiles.block_n // 2), tiles.split_k)](
        x, norm, weight, x if scale is None else scale, out, *workspace, tokens, x.stride(0), eps,
        F=f, K=k, GELU=activation == "gelu_tanh", **tiles.kwargs(),
    )  # fmt: skip
    return out
