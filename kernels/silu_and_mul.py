"""SwiGLU's elementwise half: out = gate / (1 + exp(-gate)) * up, in float32, rounded once.

Knows one matrix [T, 2F] whose rows hold the gate and then the up projection of a token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from s1engine.kernels import launch_table
from s1engine.kernels.pdl import grid_dependency_wait, launch_dependents


@triton.jit
def _silu_and_mul_kernel(
    gate_up_ptr,  # [T, 2 DIM]
    out_ptr,  # [T, DIM]
    stride,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    grid_dependency_wait(PDL)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < DIM
    at = gate_up_ptr + token * stride + column
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + DIM, mask=inside, other=0.0).to(tl.float32)
    launch_dependents(PDL)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + token * DIM + column, out.to(out_ptr.dtype.element_ty), mask=inside)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2F] -> [T, F]."""
    tokens, dim = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.shape[1] == 2 * dim and gate_up.stride(1) == 1
    out = torch.empty((tokens, dim), dtype=gate_up.dtype, device=gate_up.device)
    tile = min(launch_table.SILU_TILE, launch_table.next_power_of_2(dim))
    _silu_and_mul_kernel[(tokens, triton.cdiv(dim, tile))](
        gate_up, out, gate_up.stride(0), DIM=dim, TILE=tile, **launch_table.SILU.options()
    )
    return out
