"""RMSNorm, alone or fused with the addition to the residual before it.

    residual += x          (rounded to its type, if there is a residual)
    out = x / sqrt(mean(x^2) + eps) * weight

Computed in float32, rounded once. Rows are tokens, or heads of tokens in a wider buffer.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from s1engine.kernels import launch_table
from s1engine.kernels.pdl import grid_dependency_wait, launch_dependents


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_kernel(
    x_ptr,  # [rows / INNER, INNER, WIDTH]
    residual_ptr,  # [rows, WIDTH], in place; read if HAS_RESIDUAL
    weight_ptr,  # [WIDTH]
    out_ptr,  # [rows, WIDTH]
    rows,
    outer_stride,
    inner_stride,
    residual_stride,
    eps,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_COLUMNS)
    inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
    weight = tl.load(weight_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    grid_dependency_wait(PDL)
    offset = (row // INNER).to(tl.int64) * outer_stride + (row % INNER) * inner_stride
    x = tl.load(x_ptr + offset[:, None] + column[None, :], mask=inside, other=0.0)
    if HAS_RESIDUAL:
        at = residual_ptr + row.to(tl.int64)[:, None] * residual_stride + column[None, :]
        residual = tl.load(at, mask=inside, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(at, x, mask=inside)
    launch_dependents(PDL)
    x = x.to(tl.float32)  # [BLOCK_ROWS, BLOCK_COLUMNS]
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / WIDTH + eps)
    out = x * scale[:, None] * weight[None, :]
    at = out_ptr + row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    tl.store(at, out.to(out_ptr.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """x [T, H] or heads [T, Hq, D], the last dimension contiguous -> the same shape, contiguous.

    With ``residual`` [T, H], x is first added to it in place.
    """
    width = x.shape[-1]
    inner = x.shape[1] if x.ndim == 3 else 1
    assert x.ndim in (2, 3) and x.stride(-1) == 1 and weight.shape == (width,)
    assert weight.dtype == x.dtype and weight.is_contiguous()
    if residual is not None:
        assert x.ndim == 2 and residual.shape == x.shape and residual.dtype == x.dtype
        assert residual.stride(1) == 1
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = x.shape[0] * inner
    block_rows, block_columns, launch = launch_table.norm_tiles(width)
    _rms_norm_kernel[(triton.cdiv(rows, block_rows),)](
        x, x if residual is None else residual, weight, out, rows,
        x.stride(0), x.stride(1) if x.ndim == 3 else 0,
        0 if residual is None else residual.stride(0), eps,
        INNER=inner, WIDTH=width, BLOCK_ROWS=block_rows, BLOCK_COLUMNS=block_columns,
        HAS_RESIDUAL=residual is not None, **launch.kwargs(),
    )  # fmt: skip
    return out
