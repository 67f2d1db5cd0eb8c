"""GPUs by their data sheets, and the shares of these figures that a plan assumes.

Constants only. ``s1engine bench qualify`` measures every share on a GPU.
"""

from dataclasses import dataclass

from s1engine.errors import RequestError

CPU = "cpu"  # this machine, by calibration instead of a data sheet
MAX_GPUS = 64


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU by its data sheet."""

    name: str
    memory_gb: float
    """10^9 bytes, as on the label."""
    read_gb_per_s: float
    bf16_tflops: float
    """Dense peak of the tensor cores."""
    link_gb_per_s: float
    """Between GPUs, one direction."""
    link_us: float
    """Latency of an empty all-reduce; an estimate, in no data sheet."""


_NVLINK_US, _PCIE_US = 8.0, 25.0
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", 80, 2039, 312, 300, _NVLINK_US),
        Gpu("H100", 80, 3350, 989, 450, _NVLINK_US),
        Gpu("H200", 141, 4800, 989, 450, _NVLINK_US),
        Gpu("H20", 96, 4000, 148, 450, _NVLINK_US),
        Gpu("B200", 180, 8000, 2250, 900, _NVLINK_US),
        Gpu("L40S", 48, 864, 362, 32, _PCIE_US),
        Gpu("L4", 24, 300, 121, 32, _PCIE_US),
    )
}
"""SXM versions where they exist."""

READ_SHARE = 0.79
"""Of the bandwidth, for reading weights or cached keys and values: 88 % of what a copy reaches,
which is 90 % of the data sheet."""
MATMUL_SHARE = 0.79
"""Of the peak, in products of large matrices (780 of 989 TFLOP/s on an H100)."""
ATTENTION_SHARE = 0.455
"""Of the peak, in attention over a prompt (450 of 989 TFLOP/s)."""
LINK_SHARE = 0.8
"""Of the link's bandwidth, in an all-reduce."""
KERNELS_PER_LAYER, OTHER_KERNELS, KERNEL_GAP_US = 5, 3, 1.5
"""Kernels of a step, and the idle time between two of them in a graph."""
WEIGHTS = ("fp8", "int8", "int4")
"""Weight formats besides that of the checkpoint."""


def find_gpu(name: str) -> Gpu:
    """Finds a GPU by name, ignoring case. Raises RequestError."""
    for known, gpu in GPUS.items():
        if known.lower() == name.lower():
            return gpu
    raise RequestError(
        f"gpu: {name!r} is unknown; there are {', '.join(GPUS)} and {CPU}", param="gpu"
    )
