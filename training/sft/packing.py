"""Samples to rows: which samples share a row in which step, and the tensors of a row.

A row is one forward pass of at most ``block_size`` tokens. Its samples do not see each other:
attention runs over each sample separately and positions restart, so a packed row gives exactly the
loss of its samples. The order of rows follows from (seed, epoch) only, so a run can resume on
another number of ranks.
"""

import bisect
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from s1engine.training.sft.samples import TokenizedSample
from s1engine.training.sft.sft_config import SftConfig

StepRows = list[list[int]]  # sample indices of each row of a step


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of ``lengths`` in bins of ``capacity`` by best fit, longest first; ties keep their
    order. Every length must be at most ``capacity``."""
    assert all(0 < length <= capacity for length in lengths)
    bins: list[list[int]] = []
    open_bins: list[tuple[int, int]] = []  # (free tokens, bin), ascending
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        at = bisect.bisect_left(open_bins, (length, -1))
        free, chosen = open_bins.pop(at) if at < len(open_bins) else (capacity, len(bins))
        if chosen == len(bins):
            bins.append([])
        bins[chosen].append(index)
        bisect.insort(open_bins, (free - length, chosen))
    return bins


def epoch_rows(lengths: Sequence[int], config: SftConfig, epoch: int) -> StepRows:
    """All rows of an epoch, shuffled."""
    rng = random.Random(f"{config.seed} {epoch}")
    order = rng.sample(range(len(lengths)), len(lengths))
    if not config.packing:
        return [[index] for index in order]
    bins = pack([lengths[index] for index in order], config.block_size)
    rng.shuffle(bins)
    return [[order[place] for place in places] for places in bins]


def schedule(lengths: Sequence[int], config: SftConfig) -> list[StepRows]:
    """The rows of every step of the run. A step has ``batch_rows`` rows; the last one of an epoch
    may have fewer. All epochs have the same number of rows, because packing uses lengths only."""
    steps: list[StepRows] = []
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
    """The tensors of one row. T tokens, N samples, M tokens with a loss."""

    input_ids: Tensor  # [1, T] int64
    position_ids: Tensor  # [1, T] int64, from 0 in each sample
    lengths: list[int]  # [N], sum T; on the host: attention splits by them
    loss_positions: Tensor  # [M] int64: positions whose next token is a target
    loss_targets: Tensor  # [M] int64: the target of each

    @classmethod
    def from_samples(cls, samples: Sequence[TokenizedSample]) -> "PackedRow":
        ids: list[int] = []
        positions: list[int] = []
        loss_positions: list[int] = []
        targets: list[int] = []
        for sample in samples:
            begin = sample.loss_start
            loss_positions += range(len(ids) + begin - 1, len(ids) + len(sample.ids) - 1)
            targets += sample.ids[begin:]
            ids += sample.ids
            positions += range(len(sample.ids))
        return cls(
            torch.tensor([ids]),
            torch.tensor([positions]),
            [len(sample.ids) for sample in samples],
            torch.tensor(loss_positions),
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
