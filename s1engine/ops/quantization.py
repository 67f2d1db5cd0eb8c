"""Quantized weight matrices: integers or fp8 with a scale for each group of columns.

Owns the meaning of the formats: how a matrix is quantized and what its values stand for. A device
chooses its own layout and product. Knows no model.

All formats are symmetric and round to nearest, at load, from ordinary checkpoints: no calibration.
``int8`` hardly changes a head or an embedding; with ``int4`` these two are ``int8``. ``fp8`` is
e4m3 with one scale for a whole row, and does not quantize these two.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from s1engine.errors import RequestError

FORMATS = ("int8", "int4")  # those in integers
FP8 = "fp8"
FP8_LIMIT = 448.0  # the largest e4m3
HEAD_FORMATS: dict[str, str | None] = {"int4": "int8", FP8: None}
"""Format of head and embedding, which few bits harm most, where it differs; None: unquantized."""
_GROUPS = {"int8": (128, 64, 32), "int4": (32,)}  # columns that share a scale: the first that fits


@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """W [N, K] as values * scales."""

    format: str
    values: Tensor  # [N, K] int8; for int4 within [-8, 7]; for fp8 float8_e4m3fn
    scales: Tensor  # [N, K / group] bfloat16; for fp8 [N, 1] float32
    dtype: torch.dtype  # of the original matrix and of x

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.values.shape[1] // self.scales.shape[1]

    def dequantize(self) -> Tensor:
        """W [N, K] in its dtype."""
        scales = self.scales.float().repeat_interleave(self.group, dim=1)
        return (self.values.float() * scales).to(self.dtype)

    def __getitem__(self, rows: slice) -> "QuantizedMatrix":
        return QuantizedMatrix(self.format, self.values[rows], self.scales[rows], self.dtype)


def quantize(weight: Tensor, fmt: str) -> QuantizedMatrix:
    """Quantize weight [N, K] to ``fmt``. Raises RequestError if K is no multiple of the smallest
    group."""
    if fmt == FP8:
        return _to_fp8(weight)
    n, k = weight.shape
    group = group_size(k, fmt)
    values = torch.empty(n, k, dtype=torch.int8)
    scales = torch.empty(n, k // group, dtype=torch.bfloat16)
    rows = _rows_at_once(k)
    for at in range(0, n, rows):
        part = weight[at : at + rows].float().unflatten(1, (-1, group))
        largest, least = part.amax(2, keepdim=True), part.amin(2, keepdim=True)
        if fmt == "int8":
            scale, low, high = torch.maximum(largest, -least) / 127, -127, 127
        else:  # the value of largest magnitude becomes -8: there is no 8
            scale, low, high = torch.where(largest > -least, largest, least) / -8, -8, 7
        scales[at : at + rows] = scale.squeeze(2)
        scale = scales[at : at + rows].float().unsqueeze(2)
        scale[scale == 0] = 1  # groups of zeros
        whole = (part / scale).round_().clamp_(low, high)
        values[at : at + rows] = whole.flatten(1)
    return QuantizedMatrix(fmt, values, scales, weight.dtype)


def _to_fp8(weight: Tensor) -> QuantizedMatrix:
    """On the weight's device; a row's largest magnitude becomes the largest e4m3."""
    n, k = weight.shape
    values = torch.empty(n, k, dtype=torch.float8_e4m3fn, device=weight.device)
    scales = torch.empty(n, 1, dtype=torch.float32, device=weight.device)
    rows = _rows_at_once(k)
    for at in range(0, n, rows):
        values[at : at + rows], scales[at : at + rows] = quantize_rows_fp8(weight[at : at + rows])
    return QuantizedMatrix(FP8, values, scales, weight.dtype)


def quantize_rows_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, K] -> e4m3 [T, K] and scales [T, 1] float32. A row that is not finite becomes NaN."""
    wide = x.float()
    scales = wide.abs().amax(1, keepdim=True) / FP8_LIMIT
    scales.clamp_(min=torch.finfo(torch.float32).tiny)  # rows of zeros
    return (wide / scales).clamp_(-FP8_LIMIT, FP8_LIMIT).to(torch.float8_e4m3fn), scales


def _rows_at_once(columns: int) -> int:
    """Rows of a piece whose float copies stay in a processor's caches."""
    return max(1, 2**18 // columns)


def bytes_per_weight(fmt: str, columns: int) -> float:
    """Upper bound, with the scales (two bytes each, four for fp8)."""
    if fmt == FP8:
        return 1.0 + 4 / columns
    return {"int8": 1.0, "int4": 0.5}[fmt] + 2 / _GROUPS[fmt][-1]


def group_size(columns: int, fmt: str) -> int:
    """Columns that share a scale in a matrix of ``columns``."""
    for group in _GROUPS[fmt]:
        if columns % group == 0:
            return group
    raise RequestError(
        f"quantization {fmt}: a matrix has {columns} columns, which is no multiple of "
        f"{_GROUPS[fmt][-1]}; use another format, or a number of ranks that leaves more columns",
        param="quantization",
    )
