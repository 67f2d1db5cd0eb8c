"""What rank 0 tells the other ranks to do: one fixed-size message for each launch.

The arrays behind a command stand in memory that all ranks share; ``CommandsRead`` says when rank 0
may write them again.
"""

import struct
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

NUM_NUMBERS = 6  # of a command, those of StepSizes
_LAYOUT = struct.Struct(f"<{1 + NUM_NUMBERS}q")


class CommandKind(IntEnum):
    """Which call of rank 0's runner the others follow."""

    STEP = 0  # StepSizes: a step of the shared InputBatch
    BEGIN = 1  # rows of the bucket, sequences, steps, filtered: a multi-step decode
    EXTEND = 2  # steps: more of the same rows


class RankCommand(NamedTuple):
    """A kind and its numbers."""

    kind: CommandKind
    numbers: tuple[int, ...]

    def pack(self) -> bytes:
        """``NUM_BYTES`` bytes."""
        return _LAYOUT.pack(self.kind, *self.numbers, *[0] * (NUM_NUMBERS - len(self.numbers)))

    @classmethod
    def unpack(cls, data: bytes) -> "RankCommand":
        """The command that ``pack`` wrote; numbers that were left out are 0."""
        kind, *numbers = _LAYOUT.unpack(data)
        return cls(CommandKind(kind), tuple(numbers))


NUM_BYTES = _LAYOUT.size  # of a packed command


class CommandsRead:
    """How many commands each rank has read the arrays of, in memory that all share.

    Args:
        memory: [8 size] uint8, zeroed.
    """

    def __init__(self, memory: Tensor) -> None:
        self._counts = memory.view(torch.int64).numpy()

    @staticmethod
    def memory_bytes(size: int) -> int:
        """For ``size`` ranks."""
        return 8 * size

    def count(self, rank: int) -> None:
        """The rank has read a command more."""
        self._counts[rank] += 1

    def reached(self, commands: int) -> bool:
        """Has every rank but 0 read so many?"""
        return bool((self._counts[1:] >= commands).all())
