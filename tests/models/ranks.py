"""Ranks of a model as threads of one process: what they compute, without what connects them."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from s1engine.models.collective import Collective
from s1engine.models.shard import Shard

T = TypeVar("T")


class ThreadCollective(Collective):
    """A Collective among threads, each at its own ``shard``, that share ``meeting``."""

    def __init__(self, shard: Shard, meeting: "Meeting") -> None:
        self.shard = shard
        self._meeting = meeting

    def sum(self, x: Tensor) -> Tensor:
        return x.copy_(torch.stack(self._meeting.meet(self.shard.rank, x)).sum(0))

    def gather(self, x: Tensor) -> Tensor:
        return torch.cat(self._meeting.meet(self.shard.rank, x), dim=1)


class Meeting:
    """Where ranks exchange tensors of one shape."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size, timeout=60)
        self._brought: list[Tensor] = [torch.empty(0)] * size

    def meet(self, rank: int, x: Tensor) -> list[Tensor]:
        self._brought[rank] = x.clone()
        self._barrier.wait()
        found = list(self._brought)
        self._barrier.wait()
        assert {part.shape for part in found} == {x.shape}
        return found


def on_ranks(size: int, work: Callable[[ThreadCollective], T]) -> list[T]:
    """What ``work`` returns on each rank."""
    meeting = Meeting(size)
    with ThreadPoolExecutor(size) as pool:
        return list(
            pool.map(work, [ThreadCollective(Shard(r, size), meeting) for r in range(size)])
        )
