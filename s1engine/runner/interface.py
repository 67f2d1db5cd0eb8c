"""What engine and runner exchange: one ``SchedulerOutput`` in, one ``ModelRunnerOutput`` out.

Owns no buffers. The rows and tokens of a step stand in the runner's own batch buffers, where the
C++ scheduler writes them (``Scheduler.schedule``), so nothing of them is copied into these objects.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from s1engine import _core
from s1engine.runner.decode_loop import DecodeLoop
from s1engine.runner.device_batch import DeviceBatchBuffer
from s1engine.runner.input_batch import InputBatch
from s1engine.runner.kv_cache import KVCache
from s1engine.runner.prompt_scores import PromptScores
from s1engine.sampling_params import NO_PENALTIES, SamplingParams


@dataclass(slots=True)
class NewRequest:
    """A sequence that entered the persistent batch in this step."""

    req_index: int
    params: SamplingParams
    seed: int
    token_ids: list[int]  # prompt, and what was generated before a preemption
    prompt_len: int
    ends: Sequence[int] = ()  # banned while the sequence must not end yet (min_tokens)

    @property
    def needs_single_step(self) -> bool:
        """Is it sampled by rules that only a single step applies: bias, penalties, logits
        processors, log-probabilities?"""
        params = self.params
        ruled = params.logit_bias or params.penalties != NO_PENALTIES or params.logits_processors
        return bool(ruled) or params.logprobs is not None


@dataclass(slots=True)
class SchedulerOutput:
    """One step, besides the batch that the scheduler has written into the runner's buffers."""

    new_requests: list[NewRequest]
    appended: tuple[np.ndarray, np.ndarray] | None = None
    """req_index and id [n] int32 of every token appended since the step before, ~id where one
    was dropped again; for penalties and logits processors."""
    allowed_tokens: dict[int, np.ndarray] = field(default_factory=dict)
    """By req_index, the ids that a grammar allows next: a bitmask [ceil(V / 8)] uint8, the lowest
    bit of a byte first. Other rows are free."""
    has_structured_output: bool = False
    """Does a sequence follow a grammar now, or later on?"""
    undecided: set[int] = field(default_factory=set)
    """req_index of rows whose allowed tokens are not known in time: their sample does not count."""
    device_batch: DeviceBatchBuffer | None = None
    """Rows of a multi-step decode, written by ``Scheduler.begin_multi_step``; None: one step."""
    num_steps: int = 1
    num_prompt_logprobs: int = 0
    """Likeliest tokens wanted of each prompt token that the step scores."""


@dataclass(slots=True)
class ModelRunnerOutput:
    """What the device sampled."""

    token_ids: np.ndarray
    """Of one step [n] int64, a token for each row that samples; of a multi-step decode [steps,
    rows] int32, NO_TOKEN where a row decided nothing."""
    logprobs: bytes = b""
    """Of rows that want them (logprob_records.py)."""
    prompt_scores: PromptScores | None = None
    """Of ``ScheduledBatch.scored_spans``."""
    failures: dict[int, Exception] = field(default_factory=dict)
    """By req_index, of rows that could not be sampled as asked: their logits processors failed."""
    recorded_now: bool = False
    """The step was recorded or compiled as well, so it took longer than others of its size."""
    device_seconds: float = 0.0
    """Time of a multi-step decode on the device."""

    def drop(self, undecided: set[int], req_indices: np.ndarray) -> None:
        """Drops the samples of these rows of a single step; ``req_indices`` [n] are those of
        all samples. Log-probabilities of a row without a token are never read."""
        ids = self.token_ids.copy()
        ids[np.isin(req_indices, list(undecided))] = _core.NO_TOKEN
        self.token_ids = ids


class Runner(Protocol):
    """What an engine needs of a runner. The runner owns all buffers; the scheduler writes into
    ``batch.core`` and into device batches, between the runner's calls."""

    batch: InputBatch
    dtype: torch.dtype  # of the model's computations
    kv_cache: KVCache  # of this rank
    max_model_len: int
    num_blocks: int
    max_window: int  # the largest sliding window if every layer has one, else 0
    max_steps: int  # of one launch of a multi-step decode; 1: the host decides every step
    decode_loop: DecodeLoop | None  # on the CPU: takes decode steps by one native call

    def next_batch(self) -> _core.ScheduledBatch:
        """``batch.core``, for the scheduler to write the next step: waits until the device of every
        rank has copied the last one. It may still be computing it."""

    def execute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        """Computes the step in ``batch`` and samples its rows."""

    def device_batch(self, num_rows: int) -> DeviceBatchBuffer | None:
        """Buffers for a multi-step decode of so many rows; None: only single steps cover them."""

    def begin_multi_step(self, step: SchedulerOutput) -> None:
        """Launches the first ``num_steps`` steps of ``step.device_batch``; waits for nothing."""

    def extend_multi_step(self, num_steps: int) -> None:
        """Launches further steps of the same rows, before the earlier ones are collected."""

    def collect(self) -> ModelRunnerOutput:
        """Waits for the oldest launch that is in flight."""

    def abandon_step(self) -> None:
        """After a step that an exception ended: waits for what the device has launched, and forgets
        it. Raises EngineDeadError if no step can follow."""

    def check_health(self) -> None:
        """Raises EngineDeadError if a step cannot be computed any more."""

    def profile_step_costs(self) -> list[tuple[int, float]]:
        """Points (tokens, seconds) of a line: how long steps take. Before the first step only."""

    def warm_up(self, num_rows: int) -> None:
        """Computes what the first steps of up to ``num_rows`` decoding rows would record or load.
        Between steps; changes no later output."""

    def close(self) -> None:
        """Ends processes that belong to it. No step may follow."""
