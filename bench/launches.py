"""Launches to try for a kernel beside the one of ``kernels/launch_table.py``."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any
from unittest.mock import patch

from s1engine.bench.shapes import matrix_shapes
from s1engine.kernels import launch_table
from s1engine.models.model_config import ModelConfig

PRODUCTS = ("qkv", "o", "gate_up", "down")
KERNELS = (*PRODUCTS, "decode", "splits", "head")


@dataclass(frozen=True, slots=True)
class LaunchCandidate:
    """A launch of one kernel: replaces a function of ``launch_table`` for that kernel's shape;
    None: the table's own."""

    kernel: str
    name: str
    value: Callable[..., Any] | None = None


@contextmanager
def use_launches(candidates: Sequence[LaunchCandidate], model: ModelConfig) -> Iterator[None]:
    """Within the block, kernels of ``model`` are launched by ``candidates``."""
    by_kernel = {one.kernel: one.value for one in candidates if one.value is not None}
    shapes = matrix_shapes(model)
    by_shape = {shapes[name]: by_kernel[name] for name in PRODUCTS if name in by_kernel}
    table_tiles, table_fits = launch_table.skinny_gemm_tiles, launch_table.fits_skinny_gemm

    def tiles(tokens: int, n: int, k: int, itemsize: int) -> launch_table.SkinnyTiles:
        chosen: launch_table.SkinnyTiles = by_shape.get((n, k), table_tiles)(tokens, n, k, itemsize)
        return chosen

    def fits(tokens: int, n: int, k: int) -> bool:
        return by_shape.get((n, k)) is not cublas and table_fits(tokens, n, k)

    replaced = {"decode": "decode_tiles", "splits": "decode_splits", "head": "head_tiles"}
    functions: dict[str, Any] = {"skinny_gemm_tiles": tiles, "fits_skinny_gemm": fits}
    functions |= {replaced[kernel]: by_kernel[kernel] for kernel in replaced if kernel in by_kernel}
    with patch.multiple(launch_table, **functions):
        yield


def launch_candidates(kernel: str, batch: int, kv_heads: int) -> list[LaunchCandidate]:
    """Candidates for ``kernel`` in a step of ``batch`` tokens; the table's own is the first."""
    if kernel in PRODUCTS:
        candidates = [*_cuda_core_tiles(kernel, batch, (4, 8)), *_dot_tiles(kernel, batch, (1, 2))]
        if batch > launch_table.MAX_CUDA_CORE_TOKENS:
            candidates.append(LaunchCandidate(kernel, "cuBLAS", cublas))
    elif kernel == "head":
        candidates = [*_cuda_core_tiles(kernel, batch, (4,)), *_dot_tiles(kernel, batch, (1,))]
    else:
        candidates = list(_splits(batch, kv_heads) if kernel == "splits" else _attention_tiles())
    return [LaunchCandidate(kernel, "table"), *candidates]


def cublas(*_: int) -> launch_table.SkinnyTiles:
    """Marks a product that cuBLAS multiplies."""
    raise AssertionError("left to cuBLAS")


def _cuda_core_tiles(kernel: str, batch: int, programs: Sequence[int]) -> Iterator[LaunchCandidate]:
    """On CUDA cores, for few tokens."""
    if batch <= launch_table.MAX_CUDA_CORE_TOKENS:
        block_t = launch_table.next_power_of_2(batch)
        for block_n, block_k, warps, per_sm in product((4, 8), (256, 512, 1024), (2, 4), programs):
            options = launch_table.LaunchOptions(warps)
            yield _candidate(kernel, block_n, block_t, block_k, per_sm, options)


def _dot_tiles(kernel: str, batch: int, programs: Sequence[int]) -> Iterator[LaunchCandidate]:
    """On tensor cores."""
    block_t = max(16, launch_table.next_power_of_2(batch))
    heights = (64, 128) if batch > launch_table.MAX_CUDA_CORE_TOKENS else (64,)
    for block_n, block_k, stages, per_sm in product(heights, (64, 128), (3, 4, 5), programs):
        options = launch_table.LaunchOptions(8 if block_n == 128 and block_t == 64 else 4, stages)
        yield _candidate(kernel, block_n, block_t, block_k, per_sm, options)


def _candidate(
    kernel: str,
    block_n: int,
    block_t: int,
    block_k: int,
    per_sm: int,
    options: launch_table.LaunchOptions,
) -> LaunchCandidate:
    """``per_sm``: programs an SM at most; the head's do not split K."""

    def split(tokens: int, n: int, k: int, itemsize: int) -> launch_table.SkinnyTiles:
        return launch_table.split_k_tiles(n, k, block_n, block_t, block_k, per_sm, options)

    def head(tokens: int, k: int, itemsize: int) -> launch_table.SkinnyTiles:
        return launch_table.SkinnyTiles(block_n, block_t, block_k, 1, options)

    how = "dot" if block_t > launch_table.MAX_CUDA_CORE_TOKENS else "sum"
    name = (
        f"{how} {block_n}x{block_k} warps {options.num_warps} stages {options.num_stages} "
        f"per SM {per_sm}"
    )
    return LaunchCandidate(kernel, name, head if kernel == "head" else split)


def _attention_tiles() -> Iterator[LaunchCandidate]:
    for block_n, warps, stages in product((32, 64), (2, 4, 8), (2, 3, 4)):
        options = launch_table.LaunchOptions(warps, stages)
        tiles = launch_table.AttentionTiles(16, block_n, options)
        name = f"{block_n} warps {warps} stages {stages}"
        yield LaunchCandidate("decode", name, lambda *_, tiles=tiles: tiles)


def _splits(batch: int, kv_heads: int) -> Iterator[LaunchCandidate]:
    own = launch_table.decode_splits(batch, kv_heads)
    for other in (own // 2, own * 2, own * 4):
        if 1 <= other <= launch_table.MAX_DECODE_SPLITS:
            yield LaunchCandidate("splits", str(other), lambda *_, other=other: other)
