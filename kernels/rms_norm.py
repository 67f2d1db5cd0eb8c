"""RMSNorm, alone or fused with the addition to the residual that comes before it.

    residual += x          (rounded to its type, if there is a residual)
    out = x / sqrt(mean(x^2) + eps) * weight

Computed in float32, rounded once. Knows rows, not layers: x may be a view of a wider buffer.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from s1engine.kernels import launch_table
from s1engine.kernels.pdl import grid_dependency_wait, launch_dependents


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_kernel(
    x_ptr,  # [rows / INNER, INNER, DIM]
    residual_ptr,  # [rows, DIM], in place; not read unless HAS_RESIDUAL
    weight_ptr,  # [DIM]
    out_ptr,  # [rows, DIM]
    rows,
    outer_stride,
    inner_stride,
    residual_stride,
    eps,
    INNER: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < DIM)[None, :]
    weight = tl.load(weight_ptr + column, mask=column < DIM, other=0.0).to(tl.float32)
    grid_dependency_wait(PDL)
    offset = (row // INNER).to(tl.int64) * outer_stride + (row % INNER) * inner_stride
    x = tl.load(x_ptr + offset[:, None] + column[None, :], mask=inside, other=0.0)
    if HAS_RESIDUAL:
        at = residual_ptr + row.to(tl.int64)[:, None] * residual_stride + column[None, :]
        residual = tl.load(at, mask=inside, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(at, x, mask=inside)
    launch_dependents(PDL)
    x = x.to(tl.float32)  # [ROWS, COLUMNS]
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / DIM + eps)
    out = x * scale[:, None] * weight[None, :]
    at = out_ptr + row.to(tl.int64)[:, None] * DIM + column[None, :]
    tl.store(at, out.to(out_ptr.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """x [rows, DIM] or [T, INNER, DIM], rows contiguous -> the same shape, contiguous.

    With ``residual`` [rows, DIM], x is first added to it in place.
    """
    dim = x.shape[-1]
    inner = x.shape[1] if x.ndim == 3 else 1
    assert x.ndim in (2, 3) and x.stride(-1) == 1 and weight.shape == (dim,)
    assert weight.dtype == x.dtype and weight.is_contiguous()
    if residual is not None:
        assert x.ndim == 2 and residual.shape == x.shape and residual.dtype == x.dtype
        assert residual.stride(1) == 1
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = x.shape[0] * inner
    tile, columns, launch = launch_table.norm_tiles(dim)
    _rms_norm_kernel[(triton.cdiv(rows, tile),)](
        x,
        x if residual is None else residual,
        weight,
        out,
        rows,
        x.stride(0),
        x.stride(1) if x.ndim == 3 else 0,
        0 if residual is None else residual.stride(0),
        eps,
        INNER=inner,
        DIM=dim,
        ROWS=tile,
        COLUMNS=columns,
        HAS_RESIDUAL=residual is not None,
        **launch.options(),
    )
    return out
