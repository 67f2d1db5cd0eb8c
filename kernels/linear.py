"""A linear layer for the few tokens of a decode step, fused with the addition to the residual.

    out = x W^T + bias,  or in place  residual += x W^T + bias

Summed in float32, rounded once. A program owns BLOCK_N rows of W and one of SPLIT_K parts of K.
"""

import triton
import triton.language as tl
from torch import Tensor

from s1engine.kernels import launch_table
from s1engine.kernels.skinny_gemm import (
    check_operands,
    reduce_splits,
    skinny_gemm_tile,
    split_range,
    tile_itemsize,
)


@triton.jit(do_not_specialize=["tokens"])
def _linear_kernel(
    x_ptr,  # [T, K]
    w_ptr,  # [N, K]
    scale_ptr,  # [N] float32; read if w is e4m3
    bias_ptr,  # [N]; read if HAS_BIAS
    out_ptr,  # [T, N]; read too if HAS_RESIDUAL
    partial_ptr,
    arrivals_ptr,
    tokens,
    x_stride,
    out_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    tile, split = tl.program_id(0), tl.program_id(1)
    row, token = tile * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_T)
    begin, end = split_range(split, K, BLOCK_K, SPLIT_K)
    acc, squares = skinny_gemm_tile(
        x_ptr, x_ptr, w_ptr, scale_ptr, tl.minimum(row, N - 1), tl.minimum(token, tokens - 1),
        x_stride, begin, end, K, BLOCK_N, BLOCK_T, BLOCK_K, False, DOT, PDL,
    )  # fmt: skip
    acc, squares, last = reduce_splits(
        acc, squares, partial_ptr, arrivals_ptr, tile, split, BLOCK_N, BLOCK_T, SPLIT_K, False
    )
    if last:
        inside = (row < N)[:, None] & (token < tokens)[None, :]
        at = token[None, :].to(tl.int64) * out_stride + row[:, None]
        if HAS_BIAS:
            bias = tl.load(bias_ptr + row, mask=row < N, other=0.0).to(tl.float32)
            acc += bias[:, None]
        if HAS_RESIDUAL:
            acc += tl.load(out_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=inside)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    workspace: tuple[Tensor, Tensor],
    residual: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """x [T, K], weight [N, K], bias [N] -> a new [T, N], or ``residual`` [T, N] with it added.

    ``scale`` [N] or [N, 1] float32: weight is e4m3, each row times its scale.
    ``workspace``: float32 and int32 (zeros, left zero) of SPLIT_K_WORKSPACE's sizes.
    """
    tokens, k = check_operands(x, weight, bias=bias, scale=scale)
    n = weight.shape[0]
    out = x.new_empty((tokens, n)) if residual is None else residual
    assert out.shape == (tokens, n) and out.dtype == x.dtype and out.stride(1) == 1
    tiles = launch_table.skinny_gemm_tiles(tokens, n, k, tile_itemsize(x, weight))
    _linear_kernel[(launch_table.cdiv(n, tiles.block_n), tiles.split_k)](
        x, weight, x if scale is None else scale, x if bias is None else bias, out, *workspace,
        tokens, x.stride(0), out.stride(0), N=n, K=k,
        HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, **tiles.kwargs(),
    )  # fmt: skip
    return out
