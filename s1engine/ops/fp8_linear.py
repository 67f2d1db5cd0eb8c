"""Products of fp8 weights with the many tokens of a compute-bound step.

    out = (x / a) values^T * (a s) + bias,  a: a scale for each token, s: one for each row of values

x is rounded to e4m3 like the weights, and fp8 tensor cores multiply twice as fast as 16-bit ones.
Where torch's kernel does not fit, the weights are dequantized to the type of x instead. Steps of
few tokens keep x as it is (``kernels/skinny_gemm.py``). Knows no device.
"""

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import ScalingType, scaled_mm

from s1engine.ops.quantization import QuantizedMatrix, quantize_rows_fp8

MULTIPLE = 16  # of rows and of columns, which torch's kernel requires


def fp8_linear(x: Tensor, weight: QuantizedMatrix, bias: Tensor | None) -> Tensor:
    """x [T, K], weight [N, K] in fp8, bias [N] -> [T, N] in the type of x."""
    if x.dtype is not torch.bfloat16 or any(size % MULTIPLE for size in weight.shape):
        return functional.linear(x, weight.dequantize(), bias)
    values, scales = quantize_rows_fp8(x)
    return scaled_mm(
        values,
        weight.values.t(),
        scales,
        ScalingType.RowWise,
        weight.scales.t(),
        ScalingType.RowWise,
        bias=bias,
        output_dtype=x.dtype,
    )
