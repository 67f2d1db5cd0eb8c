"""A gated MLP's elementwise half: out = activation(gate) * up, in float32, rounded once.

    SwiGLU  activation(x) = x / (1 + exp(-x))
    GeGLU   activation(x) = x / 2 (1 + tanh(u)) = x / (1 + exp(-2 u)),
            u = sqrt(2 / pi) (x + 0.044715 x^3)

A row of the input [T, 2F] holds a token's gate projection, then its up projection.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from s1engine.kernels import launch_table
from s1engine.kernels.pdl import grid_dependency_wait, launch_dependents


@triton.jit
def activate(x, GELU: tl.constexpr):
    """The activation of float32 x."""
    if GELU:
        return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    else:
        return x / (1.0 + tl.exp(-x))


@triton.jit
def _silu_and_mul_kernel(
    gate_up_ptr,  # [T, 2 F]
    out_ptr,  # [T, F]
    stride,
    F: tl.constexpr,
    BLOCK_F: tl.constexpr,
    GELU: tl.constexpr,
    PDL: tl.constexpr,
):
    grid_dependency_wait(PDL)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = column < F
    at = gate_up_ptr + token * stride + column
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + F, mask=inside, other=0.0).to(tl.float32)
    launch_dependents(PDL)
    out = activate(gate, GELU) * up
    tl.store(out_ptr + token * F + column, out.to(out_ptr.dtype.element_ty), mask=inside)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2F] -> [T, F]."""
    return _launch(gate_up, gelu=False)


def gelu_and_mul(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2F] -> [T, F]."""
    return _launch(gate_up, gelu=True)


def _launch(gate_up: Tensor, *, gelu: bool) -> Tensor:
    tokens, f = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.shape[1] == 2 * f and gate_up.stride(1) == 1
    out = torch.empty((tokens, f), dtype=gate_up.dtype, device=gate_up.device)
    block = min(launch_table.SILU_TILE, launch_table.next_power_of_2(f))
    _silu_and_mul_kernel[(tokens, triton.cdiv(f, block))](
        gate_up, out, gate_up.stride(0), F=f, BLOCK_F=block, GELU=gelu,
        **launch_table.SILU.kwargs(),
    )  # fmt: skip
    return out
