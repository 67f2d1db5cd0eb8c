"""Time of work on this machine's device, and the device's limits.

On CUDA one graph holds many launches over buffers that together exceed the L2 cache, so that
neither launch gaps nor cached operands distort the time; on the CPU it is wall-clock time. All
figures are medians.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Launch = Callable[[], object]
COLD_BYTES = 256 * 2**20  # more than any L2 cache
LAUNCHES = 24  # in one graph
ROUNDS = 20


def seconds(
    launches: Sequence[Launch], device: str, rounds: int = ROUNDS, in_graph: int = LAUNCHES
) -> float:
    """Median time of one launch; all launches do the same work on different buffers."""
    if device == "cuda":
        return _graph_seconds(launches, rounds, in_graph)
    launches[0]()
    times = []
    for i in range(rounds):
        begin = time.perf_counter()
        launches[i % len(launches)]()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _graph_seconds(launches: Sequence[Launch], rounds: int, in_graph: int) -> float:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for launch in launches[:2]:
            launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(in_graph):
            launches[i % len(launches)]()
    graph.replay()
    times: list[float] = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / in_graph)
    return statistics.median(times)


def copies(nbytes: float, device: str) -> int:
    """Number of buffer sets of that size to rotate through, so that each is cold when used."""
    return 1 if device == "cpu" else int(min(max(COLD_BYTES // max(nbytes, 1) + 1, 2), LAUNCHES))


def ceilings(device: str) -> dict[str, Any]:
    """Measured limits: read and copy bytes/s, matrix FLOP/s, and on CUDA the time from one kernel
    of a graph to the next."""
    size = 2**30 if device == "cuda" else 2**26
    x = torch.ones(size, dtype=torch.float32, device=device)
    y = torch.empty_like(x)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    side = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    limits: dict[str, Any] = {
        "read_bytes_per_s": x.nbytes / seconds([lambda: x.sum()], device, 5),
        "copy_bytes_per_s": 2 * x.nbytes / seconds([lambda: y.copy_(x)], device, 5),
        "matmul_flop_per_s": 2 * side**3 / seconds([lambda: a @ b], device, 5),
        "matmul_dtype": str(dtype).removeprefix("torch."),
    }
    if device == "cuda":
        one = torch.zeros(1, device=device)
        limits["graph_kernel_s"] = seconds([lambda: one.add_(1)], device)
    return limits
