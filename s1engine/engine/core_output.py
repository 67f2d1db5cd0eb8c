"""What sequences gained in a step, read from the records that the scheduler writes.

The layout is that of csrc/core/core_output.hpp. A sequence's id says what it is to its request,
so a record needs no table to be understood, in whatever process it is read.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from s1engine import _core
from s1engine.outputs import RowLogprobs

_HEADER = struct.Struct("<q6i3B")
_CHILD_BITS = 7  # 0: the sample itself, i: its child at the i-th checkpoint
_INDEX_BITS = 7
SEQUENCE_BITS = _CHILD_BITS + _INDEX_BITS  # of an id, below the request's number

FINISH_REASONS = (None, "stop", "length", "abort")
END_REASONS = tuple(name.lower() for name in _core.EndReason.__members__)
THINKING = list(_core.Phase.__members__).index("THINKING")


def sequence_id(number: int, index: int, child: int = 0) -> int:
    """Id of sample ``index`` of request ``number``, or of its child at checkpoint ``child`` - 1."""
    return (number << _INDEX_BITS | index) << _CHILD_BITS | child


def request_number(sequence: int) -> int:
    """The request that a sequence belongs to."""
    return sequence >> SEQUENCE_BITS


def sample_index(sequence: int) -> int:
    """Which sample of its request a sequence is, or descends from."""
    return sequence >> _CHILD_BITS & (1 << _INDEX_BITS) - 1


def branch_number(sequence: int) -> int:
    """0 for a sample, else the number of its checkpoint, counted from 1."""
    return sequence & (1 << _CHILD_BITS) - 1


@dataclass(slots=True)
class EngineCoreOutput:
    """One record."""

    seq_id: int
    req_index: int
    thinking_tokens: int
    max_thinking: int
    waits_used: int
    num_cached: int
    thinking: bool  # does it still think?
    finish_reason: str | None
    end_reason: str | None
    token_ids: list[int]
    marks: bytes
    rows: list[RowLogprobs] = field(default_factory=list)  # of the sampled tokens, if asked for

    @property
    def num_sampled(self) -> int:
        """How many of its tokens were not forced."""
        return sum(not mark & _core.MARK_FORCED for mark in self.marks)


@dataclass(slots=True)
class EngineCoreOutputs:
    """What one step gave, for whoever makes text of it. Times are monotonic, in seconds."""

    start_time: float
    end_time: float
    admitted: list[int]  # sequences that were scheduled anew
    new_branches: list[int]  # children that came off since the step before
    records: bytes
    logprobs: dict[int, RowLogprobs]  # by req_index

    def decode(self) -> Iterator[EngineCoreOutput]:
        """The records, each with its log-probabilities."""
        for progress in decode_core_outputs(self.records):
            row = self.logprobs.get(progress.req_index) if self.logprobs else None
            if row is not None and progress.num_sampled:
                progress.rows.append(row)  # else what was sampled gave way to what was forced
            yield progress


def decode_core_outputs(records: bytes) -> Iterator[EngineCoreOutput]:
    """The records of one step."""
    at = 0
    while at < len(records):
        head = _HEADER.unpack_from(records, at)
        sequence, req_index, count, thought, maximum, waits, cached, phase, finish, end = head
        at += _HEADER.size
        tokens = struct.unpack_from(f"<{count}i", records, at)
        at += 4 * count
        marks = records[at : at + count]
        at += count
        yield EngineCoreOutput(
            seq_id=sequence,
            req_index=req_index,
            thinking_tokens=thought,
            max_thinking=maximum,
            waits_used=waits,
            num_cached=cached,
            thinking=phase == THINKING,
            finish_reason=FINISH_REASONS[finish],
            end_reason=END_REASONS[end] if end else None,
            token_ids=list(tokens),
            marks=marks,
        )
