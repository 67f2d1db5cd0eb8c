"""Launches that a kernel could have, beside the one that ``kernels/config.py`` gives it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any
from unittest.mock import patch

from s1engine.bench.shapes import matrix_shapes
from s1engine.kernels import config
from s1engine.models.model_config import ModelConfig

PRODUCTS = ("qkv", "o", "gate_up", "down")
KERNELS = (*PRODUCTS, "decode", "splits", "head")


@dataclass(frozen=True, slots=True)
class Choice:
    """A launch of one kernel: a function of ``config`` for its shape alone, None: the table's."""

    kernel: str
    name: str
    value: Callable[..., Any] | None = None


@contextmanager
def launched(chosen: Sequence[Choice], model: ModelConfig) -> Iterator[None]:
    """Kernels of that model are launched so within."""
    by_kernel = {choice.kernel: choice.value for choice in chosen if choice.value is not None}
    shapes = matrix_shapes(model)
    by_shape = {shapes[name]: by_kernel[name] for name in PRODUCTS if name in by_kernel}
    linear, fused = config.linear, config.fused

    def linear_of(tokens: int, n: int, k: int, itemsize: int) -> config.Rows:
        tiles: config.Rows = by_shape.get((n, k), linear)(tokens, n, k, itemsize)
        return tiles

    def fused_of(tokens: int, n: int, k: int) -> bool:
        return by_shape.get((n, k)) is not cublas and fused(tokens, n, k)

    with (
        patch.object(config, "linear", linear_of),
        patch.object(config, "fused", fused_of),
        patch.object(config, "decode", by_kernel.get("decode", config.decode)),
        patch.object(config, "splits", by_kernel.get("splits", config.splits)),
        patch.object(config, "head", by_kernel.get("head", config.head)),
    ):
        yield


def choices(kernel: str, batch: int, kv_heads: int) -> list[Choice]:
    """The table's first."""
    if kernel in PRODUCTS:
        found = [*_sums(kernel, batch, (4, 8)), *_dots(kernel, batch, (1, 2))]
        found += [Choice(kernel, "cuBLAS", cublas)] if batch > config.MAX_VECTORS else []
    elif kernel == "head":
        found = [*_sums(kernel, batch, (4,)), *_dots(kernel, batch, (1,))]
    else:
        found = list(_splits(batch, kv_heads) if kernel == "splits" else _attention())
    return [Choice(kernel, "table"), *found]


def cublas(*_: int) -> config.Rows:
    """Stands for a product that is not launched by us."""
    raise AssertionError("left to cuBLAS")


def _sums(kernel: str, batch: int, programs: Sequence[int]) -> Iterator[Choice]:
    """On CUDA cores, for few tokens."""
    if batch <= config.MAX_VECTORS:
        padded = config.next_power_of_2(batch)
        for rows, block_k, warps, per in product((4, 8), (256, 512, 1024), (2, 4), programs):
            yield _tiles(kernel, rows, padded, block_k, per, config.Launch(warps))


def _dots(kernel: str, batch: int, programs: Sequence[int]) -> Iterator[Choice]:
    """On tensor cores."""
    padded = max(16, config.next_power_of_2(batch))
    rows_of = (64, 128) if batch > config.MAX_VECTORS else (64,)
    for rows, block_k, stages, per in product(rows_of, (64, 128), (3, 4, 5), programs):
        launch = config.Launch(8 if rows == 128 and padded == 64 else 4, stages)
        yield _tiles(kernel, rows, padded, block_k, per, launch)


def _tiles(
    kernel: str, rows: int, padded: int, block_k: int, per: int, launch: config.Launch
) -> Choice:
    """``per``: programs an SM at most; those of the head do not split K."""

    def linear(tokens: int, n: int, k: int, itemsize: int) -> config.Rows:
        return config.tiled(n, k, rows, padded, block_k, per, launch)

    def head(tokens: int, k: int, itemsize: int) -> config.Rows:
        return config.Rows(rows, padded, block_k, 1, launch)

    how = "dot" if padded > config.MAX_VECTORS else "sum"
    name = (
        f"{how} {rows}x{block_k} warps {launch.num_warps} stages {launch.num_stages} per SM {per}"
    )
    return Choice(kernel, name, head if kernel == "head" else linear)


def _attention() -> Iterator[Choice]:
    for block_n, warps, stages in product((32, 64), (2, 4, 8), (2, 3, 4)):
        tiles = config.Attention(16, block_n, config.Launch(warps, stages))
        name = f"{block_n} warps {warps} stages {stages}"
        yield Choice("decode", name, lambda *_, tiles=tiles: tiles)


def _splits(batch: int, kv_heads: int) -> Iterator[Choice]:
    own = config.splits(batch, kv_heads)
    for other in (own // 2, own * 2, own * 4):
        if 1 <= other <= config.MAX_SPLITS:
            yield Choice("splits", str(other), lambda *_, other=other: other)
