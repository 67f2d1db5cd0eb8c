"""What the sequences of a step gained: the output of the engine core, before any text.

The scheduler writes one binary record per sequence (layout: csrc/core/core_output.hpp). The id of a
sequence encodes its request, its sample and its checkpoint branch, so any process can decode a
record without a table.
"""

import struct
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from typing import get_args

from s1engine import _core
from s1engine.logprob_records import unpack_logprobs
from s1engine.outputs import EndReason, FinishReason, RowLogprobs
from s1engine.prompt_logprobs import PromptLogprobsPart

_HEADER = struct.Struct("<q6i4B")
_BRANCH_BITS = 7  # 0: the sample itself, i: its branch at checkpoint i - 1
_INDEX_BITS = 7
SEQUENCE_BITS = _BRANCH_BITS + _INDEX_BITS  # of an id, below the request's number

FINISH_REASONS: tuple[FinishReason | None, ...] = (None, *get_args(FinishReason))  # by code
END_REASONS: tuple[EndReason | None, ...] = (None, *get_args(EndReason))
THINKING = list(_core.Phase.__members__).index("THINKING")


def sequence_id(number: int, index: int, branch: int = 0) -> int:
    """Id of sample ``index`` of a request, or of its branch at checkpoint ``branch - 1``."""
    return (number << _INDEX_BITS | index) << _BRANCH_BITS | branch


def request_number(seq_id: int) -> int:
    """Number of the request that a sequence belongs to."""
    return seq_id >> SEQUENCE_BITS


def sample_index(seq_id: int) -> int:
    """Index of the sample that a sequence is, or branched off from."""
    return seq_id >> _BRANCH_BITS & (1 << _INDEX_BITS) - 1


def branch_number(seq_id: int) -> int:
    """0 for a sample, else the number of its checkpoint, counted from 1."""
    return seq_id & (1 << _BRANCH_BITS) - 1


@dataclass(slots=True)
class EngineCoreOutput:
    """One record: the new tokens of one sequence, and its state after them."""

    seq_id: int
    req_index: int
    thinking_tokens: int
    max_thinking: int
    waits_used: int
    num_cached: int
    thinking: bool  # still in the thinking phase
    finish_reason: FinishReason | None
    end_reason: EndReason | None
    num_held: int  # sampled tokens that may begin an end marker: not in token_ids yet
    token_ids: list[int]
    marks: bytes
    logprobs: list[RowLogprobs] = field(default_factory=list)  # of the sampled tokens, if asked for

    @property
    def num_sampled(self) -> int:
        """Number of tokens that were sampled, not forced."""
        return sum(not mark & _core.MARK_FORCED for mark in self.marks)


class HeldLogprobs:
    """Log-probabilities of the held tokens of one sequence: tokens that may begin an end marker."""

    def __init__(self) -> None:
        self._held: list[RowLogprobs] = []

    def settle(self, output: EngineCoreOutput) -> list[RowLogprobs]:
        """One row for each sampled token of a record; ``output.logprobs`` holds those of its steps.
        Rows of dropped tokens are forgotten."""
        rows = [*self._held, *output.logprobs]
        settled = output.num_sampled
        self._held = rows[settled : settled + output.num_held]
        return rows[:settled]


@dataclass(slots=True)
class EngineCoreOutputs:
    """The output of one step. Times are monotonic, in seconds."""

    start_time: float
    end_time: float
    admitted: list[int]  # sequences that entered the persistent batch
    new_branches: list[int]  # checkpoint branches created since the step before
    records: bytes
    logprobs: bytes  # of sampled tokens (logprob_records.py)
    prompt_logprobs: list[PromptLogprobsPart] = field(default_factory=list)

    def decode(self, wanted: Container[int] | None = None) -> Iterator[EngineCoreOutput]:
        """The records, each with its log-probabilities. ``wanted``: ids of sequences; None: all."""
        outputs = decode_core_outputs(self.records, wanted)
        return self._with_logprobs(outputs) if self.logprobs else outputs

    def _with_logprobs(self, outputs: Iterator[EngineCoreOutput]) -> Iterator[EngineCoreOutput]:
        rows = unpack_logprobs(self.logprobs)
        for output in outputs:
            row = rows.get(output.req_index)
            # Without either, a forced token replaced the sampled one.
            if row is not None and (output.num_sampled or output.num_held):
                output.logprobs.append(row)
            yield output


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The load of an engine, and counters since its start."""

    num_blocks: int
    num_free_blocks: int
    num_pinned_blocks: int
    num_running: int
    num_waiting: int
    num_preemptions: int
    num_computed_tokens: int
    num_sampled_tokens: int
    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    num_undrafted: int
    prefix_queries: int
    prefix_hits: int
    num_restarts: int = 0  # of the engine's process; the other counters start anew with each


def decode_core_outputs(
    records: bytes, wanted: Container[int] | None = None
) -> Iterator[EngineCoreOutput]:
    """Decodes the records of one step. ``wanted``: ids of sequences; None: all."""
    at = 0
    while at < len(records):
        head = _HEADER.unpack_from(records, at)
        (
            seq_id,
            req_index,
            count,
            thinking_tokens,
            maximum,
            waits,
            cached,
            phase,
            finish,
            end,
            held,
        ) = head
        at += _HEADER.size
        if wanted is not None and seq_id not in wanted:
            at += 5 * count
            continue
        tokens = struct.unpack_from(f"<{count}i", records, at)
        at += 4 * count
        marks = records[at : at + count]
        at += count
        yield EngineCoreOutput(
            seq_id=seq_id,
            req_index=req_index,
            thinking_tokens=thinking_tokens,
            max_thinking=maximum,
            waits_used=waits,
            num_cached=cached,
            thinking=phase == THINKING,
            finish_reason=FINISH_REASONS[finish],
            end_reason=END_REASONS[end],
            num_held=held,
            token_ids=list(tokens),
            marks=marks,
        )
