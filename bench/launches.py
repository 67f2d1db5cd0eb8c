"""Launches that a kernel could have, beside the one that ``kernels/config.py`` gives it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any
from unittest.mock import patch

from s1engine.kernels import config

PRODUCTS = ("norm_qkv", "linear_o", "norm_gate_up", "linear_down")


@dataclass(frozen=True, slots=True)
class Choice:
    """A launch: what it is called, and the function of ``config`` that it stands in for."""

    name: str
    function: str
    value: Callable[..., Any]

    @contextmanager
    def chosen(self) -> Iterator[None]:
        with patch.object(config, self.function, self.value):
            yield


def _rows(tokens: int) -> Iterator[Choice]:
    """Tiles of the small linears: on CUDA cores for few tokens, on tensor cores for any."""
    if tokens <= config.MAX_VECTORS:
        for rows, block_k, warps, programs in product((4, 8, 16), (256, 512, 1024), (2, 4), (4, 8)):
            padded = config.next_power_of_2(tokens)
            yield _linear(rows, padded, block_k, programs, config.Launch(warps))
    padded = max(16, config.next_power_of_2(tokens))
    for rows, block_k, stages, programs in product((32, 64, 128), (64, 128), (3, 4, 6), (1, 2, 4)):
        launch = config.Launch(8 if rows == 128 and padded == 64 else 4, stages)
        yield _linear(rows, padded, block_k, programs, launch)


def _linear(rows: int, padded: int, block_k: int, programs: int, launch: config.Launch) -> Choice:
    def value(tokens: int, n: int, k: int, itemsize: int) -> config.Rows:
        per_tile = config.cdiv(n, rows), config.cdiv(k, block_k)
        room = config.WORKSPACE[0] // ((rows + 1) * padded)
        splits = config.parts(*per_tile, min(programs * config.SMS, room))
        return config.Rows(rows, padded, block_k, splits, launch)

    how = "dot" if padded > config.MAX_VECTORS else "sum"
    name = f"{how} {rows}x{block_k} w{launch.num_warps} s{launch.num_stages} p{programs}"
    return Choice(name, "linear", value)


def _decode(batch: int, heads: int) -> Iterator[Choice]:
    """Tiles and splits of decode attention."""
    for block_n, warps, stages in product((32, 64), (4, 8), (2, 3, 4)):
        tiles = config.Attention(16, block_n, config.Launch(warps, stages))
        yield Choice(f"n{block_n} w{warps} s{stages}", "decode", lambda *_, tiles=tiles: tiles)
    splits = config.splits(batch, heads)
    for other in (splits // 2, splits * 2, splits * 4):
        if 1 <= other <= config.MAX_SPLITS:
            yield Choice(f"{other} splits", "splits", lambda *_, other=other: other)


def _extend() -> Iterator[Choice]:
    for block_m, block_n, warps, stages in product((64, 128), (32, 64), (4, 8), (2, 3, 4)):
        tiles = config.Attention(block_m, block_n, config.Launch(warps, stages))
        name = f"m{block_m} n{block_n} w{warps} s{stages}"
        yield Choice(name, "extend", lambda *_, tiles=tiles: tiles)


def choices(kernel: str, batch: int, kv_heads: int) -> list[Choice]:
    """Of a kernel named as in ``kernel_work``; the table's own first."""
    if kernel in PRODUCTS:
        return [Choice("table", "linear", config.linear), *_rows(batch)]
    if kernel == "decode":
        return [
            Choice("table", "decode", config.decode),
            *_decode(batch, kv_heads),
        ]
    return [Choice("table", "extend", config.extend), *_extend()]
