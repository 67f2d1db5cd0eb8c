"""Weight matrices packed for the CPU kernels: panels of 16 outputs (csrc/cpu/kernels.hpp).

Owns the layouts and the packing, in torch, once at load. Packing changes no value.
"""

import mmap
import weakref
from dataclasses import dataclass, replace
from threading import Lock

import torch
from torch import Tensor
from torch.nn import functional

from s1engine.ops.quantization import QuantizedMatrix

PANEL = 16
AREA = 2**26  # bytes: many huge pages of 2**21
ALIGNMENT = 64
_FORMATS = {"native": 0, "int8": 1, "int4": 2}  # WeightFormat


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """W [N, K] in panels."""

    format: int  # WeightFormat
    dtype: torch.dtype  # of x
    panels: Tensor  # [ceil(N / 16), bytes of a panel] uint8
    scales: Tensor | None  # [ceil(N / 16), K / group, 16] bfloat16
    shape: tuple[int, int]
    group: int

    def __getitem__(self, rows: slice) -> "PackedMatrix":
        """The first rows; the last panel may hold rows beyond them."""
        assert rows.start is None and rows.step is None and 0 < rows.stop <= self.shape[0]
        return replace(self, shape=(rows.stop, self.shape[1]))


def pack(weight: Tensor | QuantizedMatrix) -> PackedMatrix:
    """Pack weight [N, K]: float32, float16, bfloat16, or integers with scales."""
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
        stored = weight.values.to(torch.uint8) + 128  # wraps around to value + 128
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
    count, whole = -(-n // PANEL), n // PANEL
    unit = {2: torch.int16, 4: torch.int32}[width * x.dtype.itemsize]  # one unit: width elements
    source = (x if k == columns else functional.pad(x, (0, columns - k))).view(unit)
    out = _huge_pages.allocate(count * source.shape[1] * PANEL * unit.itemsize)
    panels = out.view(unit).view(count, -1, PANEL)
    panels[:whole].copy_(source[: whole * PANEL].unflatten(0, (-1, PANEL)).transpose(1, 2))
    if n % PANEL:
        panels[whole, :, : n % PANEL] = source[whole * PANEL :].T
    return out.view(count, -1)


class _HugePages:
    """Allocates zeros on huge pages, because weights are read in long streams. Small matrices share
    an area, because a huge page must lie in it completely. An area lives as long as any of them."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._area: weakref.ref[mmap.mmap] | None = None
        self._used = 0

    def allocate(self, size: int) -> Tensor:
        """[size] uint8, aligned to ALIGNMENT."""
        if not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.zeros(size, dtype=torch.uint8)
        with self._lock:
            area = self._area() if self._area is not None else None
            if area is None or self._used + size > len(area):
                area = _new_area(max(size, AREA))
                self._area, self._used = weakref.ref(area), 0
            begin = self._used
            self._used += -(-size // ALIGNMENT) * ALIGNMENT
        return torch.frombuffer(area, dtype=torch.uint8, count=size, offset=begin)


def _new_area(size: int) -> mmap.mmap:
    """An anonymous mapping. The kernel allocates pages on the first write: unused ones are free."""
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared: no huge pages
    area.madvise(mmap.MADV_HUGEPAGE)
    return area


_huge_pages = _HugePages()
