"""Matrices as the CPU kernels read them: panels of 16 outputs side by side (csrc/cpu/kernels.hpp).

Owns the layouts and the way into them, written in torch: packing happens once, at load. What the
numbers mean does not change.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from s1engine.ops.quantization import QuantizedMatrix

PANEL = 16
_FORMATS = {"native": 0, "int8": 1, "int4": 2}  # WeightFormat


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """W [N, K] in panels."""

    format: int  # WeightFormat
    dtype: torch.dtype  # of what it is multiplied with
    panels: Tensor  # [ceil(N / 16), bytes of a panel] uint8
    scales: Tensor | None  # [ceil(N / 16), K / group, 16] bfloat16
    shape: tuple[int, int]
    group: int

    def __getitem__(self, rows: slice) -> "PackedMatrix":
        """The first rows: panels of which a part may lie beyond the end."""
        assert rows.start is None and rows.step is None and 0 < rows.stop <= self.shape[0]
        return PackedMatrix(
            self.format,
            self.dtype,
            self.panels,
            self.scales,
            (rows.stop, self.shape[1]),
            self.group,
        )


def pack(weight: Tensor | QuantizedMatrix) -> PackedMatrix:
    """weight [N, K]: float32, float16, bfloat16, or integers with scales."""
    if isinstance(weight, QuantizedMatrix):
        return _pack_integers(weight)
    columns = weight.shape[1] + weight.shape[1] % 2 * (weight.dtype is torch.bfloat16)
    width = 2 if weight.dtype is torch.bfloat16 else 1
    return PackedMatrix(
        _FORMATS["native"],
        weight.dtype,
        _panels(weight, columns, width),
        None,
        (weight.shape[0], weight.shape[1]),
        1,
    )


def _pack_integers(weight: QuantizedMatrix) -> PackedMatrix:
    k = weight.shape[1]
    if weight.format == "int8":
        stored = weight.values.to(torch.uint8) + 128  # wraps: value + 128
    else:
        values = (weight.values + 8).to(torch.uint8).view(len(weight.values), k // 8, 2, 4)
        stored = (values[:, :, 0] | values[:, :, 1] << 4).flatten(1)
    return PackedMatrix(
        _FORMATS[weight.format],
        weight.dtype,
        _panels(stored, stored.shape[1], 4),
        _panels(weight.scales, weight.scales.shape[1], 1).view(torch.bfloat16),
        (weight.shape[0], weight.shape[1]),
        weight.group,
    )


def _panels(x: Tensor, columns: int, width: int) -> Tensor:
    """x [N, K] -> [ceil(N / 16), bytes of 16 x ``columns`` elements] uint8, in the order [columns /
    width, 16, width], padded with zeros."""
    n, k = x.shape
    count = -(-n // PANEL)
    out = torch.zeros(count, columns // width, PANEL, width, dtype=x.dtype)
    whole = n // PANEL
    source = x if k == columns else torch.nn.functional.pad(x, (0, columns - k))
    source = source.unflatten(1, (-1, width))  # [N, columns / width, width]
    out[:whole].copy_(source[: whole * PANEL].unflatten(0, (-1, PANEL)).transpose(1, 2))
    if n % PANEL:
        out[whole, :, : n % PANEL] = source[whole * PANEL :].transpose(0, 1)
    return out.view(torch.uint8).view(count, -1)
