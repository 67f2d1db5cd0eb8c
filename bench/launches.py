"""Launches that a kernel could have, beside the one that ``kernels/launch_table.py`` gives it."""

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
    """A launch of one kernel: a function of ``config`` for its shape alone, None: the table's."""

    kernel: str
    name: str
    value: Callable[..., Any] | None = None


@contextmanager
def use_launches(chosen: Sequence[LaunchCandidate], model: ModelConfig) -> Iterator[None]:
    """Kernels of that model are launched so within."""
    by_kernel = {choice.kernel: choice.value for choice in chosen if choice.value is not None}
    shapes = matrix_shapes(model)
    by_shape = {shapes[name]: by_kernel[name] for name in PRODUCTS if name in by_kernel}
    linear, fused = launch_table.skinny_gemm_tiles, launch_table.fits_skinny_gemm

    def linear_of(tokens: int, n: int, k: int, itemsize: int) -> launch_table.SkinnyTiles:
        tiles: launch_table.SkinnyTiles = by_shape.get((n, k), linear)(tokens, n, k, itemsize)
        return tiles

    def fused_of(tokens: int, n: int, k: int) -> bool:
        return by_shape.get((n, k)) is not cublas and fused(tokens, n, k)

    with (
        patch.object(launch_table, "skinny_gemm_tiles", linear_of),
        patch.object(launch_table, "fits_skinny_gemm", fused_of),
        patch.object(
            launch_table, "decode_tiles", by_kernel.get("decode", launch_table.decode_tiles)
        ),
        patch.object(
            launch_table, "decode_splits", by_kernel.get("splits", launch_table.decode_splits)
        ),
        patch.object(launch_table, "head_tiles", by_kernel.get("head", launch_table.head_tiles)),
    ):
        yield


def launch_candidates(kernel: str, batch: int, kv_heads: int) -> list[LaunchCandidate]:
    """The table's first."""
    if kernel in PRODUCTS:
        found = [*_sums(kernel, batch, (4, 8)), *_dots(kernel, batch, (1, 2))]
        found += (
            [LaunchCandidate(kernel, "cuBLAS", cublas)]
            if batch > launch_table.MAX_CUDA_CORE_TOKENS
            else []
        )
    elif kernel == "head":
        found = [*_sums(kernel, batch, (4,)), *_dots(kernel, batch, (1,))]
    else:
        found = list(_splits(batch, kv_heads) if kernel == "splits" else _attention())
    return [LaunchCandidate(kernel, "table"), *found]


def cublas(*_: int) -> launch_table.SkinnyTiles:
    """Stands for a product that is not launched by us."""
    raise AssertionError("left to cuBLAS")


def _sums(kernel: str, batch: int, programs: Sequence[int]) -> Iterator[LaunchCandidate]:
    """On CUDA cores, for few tokens."""
    if batch <= launch_table.MAX_CUDA_CORE_TOKENS:
        padded = launch_table.next_power_of_2(batch)
        for rows, block_k, warps, per in product((4, 8), (256, 512, 1024), (2, 4), programs):
            yield _tiles(kernel, rows, padded, block_k, per, launch_table.LaunchOptions(warps))


def _dots(kernel: str, batch: int, programs: Sequence[int]) -> Iterator[LaunchCandidate]:
    """On tensor cores."""
    padded = max(16, launch_table.next_power_of_2(batch))
    rows_of = (64, 128) if batch > launch_table.MAX_CUDA_CORE_TOKENS else (64,)
    for rows, block_k, stages, per in product(rows_of, (64, 128), (3, 4, 5), programs):
        launch = launch_table.LaunchOptions(8 if rows == 128 and padded == 64 else 4, stages)
        yield _tiles(kernel, rows, padded, block_k, per, launch)


def _tiles(
    kernel: str, rows: int, padded: int, block_k: int, per: int, launch: launch_table.LaunchOptions
) -> LaunchCandidate:
    """``per``: programs an SM at most; those of the head do not split K."""

    def linear(tokens: int, n: int, k: int, itemsize: int) -> launch_table.SkinnyTiles:
        return launch_table.split_k_tiles(n, k, rows, padded, block_k, per, launch)

    def head(tokens: int, k: int, itemsize: int) -> launch_table.SkinnyTiles:
        return launch_table.SkinnyTiles(rows, padded, block_k, 1, launch)

    how = "dot" if padded > launch_table.MAX_CUDA_CORE_TOKENS else "sum"
    name = (
        f"{how} {rows}x{block_k} warps {launch.num_warps} stages {launch.num_stages} per SM {per}"
    )
    return LaunchCandidate(kernel, name, head if kernel == "head" else linear)


def _attention() -> Iterator[LaunchCandidate]:
    for block_n, warps, stages in product((32, 64), (2, 4, 8), (2, 3, 4)):
        tiles = launch_table.AttentionTiles(16, block_n, launch_table.LaunchOptions(warps, stages))
        name = f"{block_n} warps {warps} stages {stages}"
        yield LaunchCandidate("decode", name, lambda *_, tiles=tiles: tiles)


def _splits(batch: int, kv_heads: int) -> Iterator[LaunchCandidate]:
    own = launch_table.decode_splits(batch, kv_heads)
    for other in (own // 2, own * 2, own * 4):
        if 1 <= other <= launch_table.MAX_DECODE_SPLITS:
            yield LaunchCandidate("splits", str(other), lambda *_, other=other: other)
