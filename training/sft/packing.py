"""Samples to rows: which samples share a row in which step, and the tensors of a row.

A row is one forward pass of at most ``block_size`` tokens. Its samples do not see each other:
attention runs over each of them alone and positions start again, so a row gives exactly what its
samples give one by one. The order of rows follows from (seed, epoch) only, never from the number of
ranks, so a run can go on with another number.
"""

import bisect
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from s1engine.training.sft.samples import Sample
from s1engine.training.sft.sft_config import SftConfig


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of ``lengths`` in bins of ``capacity`` by best fit, longest first; ties keep their
    order. Every length must be at most ``capacity``."""
    assert all(0 < length <= capacity for length in lengths)
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free, bin), ascending
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        at = bisect.bisect_left(room, (length, -1))
        free, chosen = room.pop(at) if at < len(room) else (capacity, len(bins))
        if chosen == len(bins):
            bins.append([])
        bins[chosen].append(index)
        bisect.insort(room, (free - length, chosen))
    return bins


def epoch_rows(lengths: Sequence[int], config: SftConfig, epoch: int) -> list[list[int]]:
    """The rows of an epoch, shuffled, each a list of sample indices."""
    rng = random.Random(f"{config.seed} {epoch}")
    order = rng.sample(range(len(lengths)), len(lengths))
    if not config.packing:
        return [[index] for index in order]
    bins = pack([lengths[index] for index in order], config.block_size)
    rng.shuffle(bins)
    return [[order[place] for place in found] for found in bins]


def schedule(lengths: Sequence[int], config: SftConfig) -> list[list[list[int]]]:
    """The whole run: [step][row] -> sample indices. A step takes ``batch_rows`` rows; the last one
    of an epoch may have fewer. Epochs have equally many rows, for packing looks at lengths only."""
    steps: list[list[list[int]]] = []
    for epoch in range(config.epochs):
        rows = epoch_rows(lengths, config, epoch)
        steps += [
            rows[begin : begin + config.batch_rows]
            for begin in range(0, len(rows), config.batch_rows)
        ]
    return steps


def efficiency(lengths: Sequence[int], bins: Sequence[Sequence[int]], capacity: int) -> float:
    """Share of the rows' tokens that belong to samples."""
    return sum(lengths) / (len(bins) * capacity)


@dataclass(frozen=True, slots=True)
class PackedRow:
    """The tensors of one row. T tokens, S samples, M tokens with a loss."""

    input_ids: Tensor  # [1, T] int64
    position_ids: Tensor  # [1, T] int64, from 0 in each sample
    lengths: list[int]  # [S], sum T; on the host: attention splits by them
    loss_positions: Tensor  # [M] int64: whose next token is learnt
    loss_targets: Tensor  # [M] int64: that token

    @classmethod
    def make(cls, samples: Sequence[Sample]) -> "PackedRow":
        ids: list[int] = []
        positions: list[int] = []
        where: list[int] = []
        targets: list[int] = []
        for sample in samples:
            begin = max(sample.num_prompt, 1)
            where += range(len(ids) + begin - 1, len(ids) + len(sample.ids) - 1)
            targets += sample.ids[begin:]
            ids += sample.ids
            positions += range(len(sample.ids))
        return cls(
            torch.tensor([ids]),
            torch.tensor([positions]),
            [len(sample.ids) for sample in samples],
            torch.tensor(where),
            torch.tensor(targets),
        )

    def to(self, device: torch.device) -> "PackedRow":
        return PackedRow(
            self.input_ids.to(device),
            self.position_ids.to(device),
            self.lengths,
            self.loss_positions.to(device),
            self.loss_targets.to(device),
        )


def num_targets(sample: Sample) -> int:
    """Tokens of a sample that carry loss."""
    return len(sample.ids) - max(sample.num_prompt, 1)
