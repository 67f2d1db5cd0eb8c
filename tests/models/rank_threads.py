"""Ranks of a model as threads of one process."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from s1engine.models.collective import SharedCollective
from s1engine.models.shard import Shard

T = TypeVar("T")


def on_ranks(size: int, work: Callable[[SharedCollective], T]) -> list[T]:
    """Runs ``work`` on each rank; returns the results in order."""
    memory = torch.zeros(SharedCollective.memory_bytes(size), dtype=torch.uint8)
    ranks = [SharedCollective(Shard(rank, size), memory) for rank in range(size)]

    def run(rank: SharedCollective) -> T:
        try:
            return work(rank)
        except BaseException:
            rank.abort()  # so the others do not wait
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, ranks))
