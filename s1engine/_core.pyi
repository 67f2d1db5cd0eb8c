# Types of the extension (csrc/bindings.cpp). Contracts: csrc/core/*.hpp and csrc/cpu/ops.hpp.

from collections.abc import Callable
from enum import Enum
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

MARK_THINK: int
MARK_DELIMITER: int
MARK_REGION: int
MARK_FORCED: int

class Phase(Enum):
    OFF = ...
    THINKING = ...
    ANSWERING = ...

class EndReason(Enum):
    NONE = ...
    NATURAL = ...
    BUDGET = ...
    DEADLINE = ...
    CLIENT = ...
    LOOP = ...
    CONVERGED = ...
    LENGTH = ...
    ABORT = ...
    OVERLOAD = ...

class FinishReason(Enum):
    NONE = ...
    STOP = ...
    LENGTH = ...
    ABORT = ...
    DEADLINE = ...

class Drafting(Enum):
    NEVER = ...
    THINKING = ...
    ALWAYS = ...

class BudgetFormat:
    def __init__(
        self,
        *,
        triggers: list[int],
        natural_end: list[int],
        newline: list[int],
        newline_always: bool,
        ends_in_newline: NDArray[np.uint8],
        end_markers: list[bytes] = [],
        token_bytes: list[bytes] = [],
        after_marker: list[int] = [],
    ) -> None: ...
    @property
    def triggers(self) -> list[int]: ...
    @property
    def end_table(self) -> NDArray[np.uint8]: ...
    @property
    def end_depths(self) -> NDArray[np.int32]: ...
    @property
    def end_token_lens(self) -> NDArray[np.uint8]: ...

class BudgetParams:
    def __init__(
        self,
        *,
        format: BudgetFormat,
        wait: list[int],
        forced_end: list[int],
        delimiter_len: int,
        min_thinking: int,
        num_waits: int,
    ) -> None: ...

class BudgetState:
    def __init__(
        self, *, phase: Phase, thinking_tokens: int, max_thinking: int, tail_newline: bool
    ) -> None: ...
    @property
    def phase(self) -> Phase: ...
    @property
    def end_reason(self) -> EndReason: ...
    @property
    def thinking_tokens(self) -> int: ...
    @property
    def max_thinking(self) -> int: ...
    @property
    def waits_used(self) -> int: ...
    @property
    def match(self) -> int: ...
    @property
    def held(self) -> int: ...
    @property
    def starts(self) -> int: ...

END_COMPLETE: int
MAX_END_MARKER_BYTES: int

def start_thinking(params: BudgetParams, state: BudgetState) -> list[int]: ...
def advance(params: BudgetParams, state: BudgetState, sampled: int) -> list[int]: ...
def bans_triggers(params: BudgetParams, state: BudgetState) -> bool: ...
def ban_code(params: BudgetParams, state: BudgetState) -> int: ...
def limit_thinking(state: BudgetState, max_thinking: int, reason: EndReason) -> None: ...

class ScheduledBatch:
    def __init__(
        self,
        buffers: dict[str, NDArray[Any]],
        *,
        max_tokens: int,
        max_rows: int,
        max_blocks: int,
        max_samples: int = 0,
    ) -> None: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def num_samples(self) -> int: ...
    @property
    def num_banned(self) -> int: ...
    @property
    def num_scored(self) -> int: ...
    @property
    def scored_spans(self) -> list[tuple[int, int, int]]: ...
    @property
    def max_seqlen_q(self) -> int: ...
    @property
    def num_decode_rows(self) -> int: ...

ROW_FIELDS: tuple[str, ...]
NO_TOKEN: int
NO_REQ_INDEX: int
BAN_ENDS: int

class DeviceBatch:
    def __init__(
        self,
        *,
        fields: NDArray[np.int32],
        slot_mapping: NDArray[np.int64],
        sample_positions: NDArray[np.int64],
        phrases: NDArray[np.int32],
        null_slot: int,
    ) -> None: ...
    @property
    def num_phrases(self) -> int: ...

class AcceptanceStats:
    def __init__(self) -> None: ...
    def record(self, bucket: int, accepted: bool) -> None: ...
    def as_prior(self) -> AcceptanceStats: ...

class Drafter:
    MIN_MATCH: int
    MAX_MATCH: int
    MAX_OCCURRENCES: int
    def __init__(self, prior: AcceptanceStats | None = None) -> None: ...
    def propose(
        self, tokens: NDArray[np.int32], *, limit: int, min_probability: float = 0.0
    ) -> list[tuple[int, int, float]]: ...
    def record(self, bucket: int, accepted: bool) -> None: ...

class StepCost:
    def __init__(self, points: list[tuple[int, float]], *, max_tokens: int) -> None: ...
    def estimate(self, *, rows: int, tokens: int, drafted: int) -> float: ...
    def record(self, *, rows: int, tokens: int, drafted: int, time: float) -> None: ...

class SchedulerStats:
    num_steps: int
    num_computed_tokens: int
    num_sampled_tokens: int
    num_forced_tokens: int
    num_preemptions: int
    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    num_undrafted: int
    prefix_queries: int
    prefix_hits: int
    num_running: int
    num_waiting: int
    num_free_blocks: int
    num_pinned_blocks: int
    max_pinned_blocks: int

class CoreOutputDict(TypedDict):
    token_ids: list[int]
    marks: list[int]
    phase: Phase
    finish_reason: FinishReason
    end_reason: EndReason
    thinking_tokens: int
    max_thinking: int
    waits_used: int
    held: int
    num_cached: int
    checkpoints_left: int

class OutputCollector:
    def __init__(self, *, sequence_bits: int) -> None: ...
    def open(self, request: int, /) -> None: ...
    def close(self, request: int, /) -> None: ...
    def __len__(self) -> int: ...
    def add(self, records: bytes, /) -> list[int]: ...
    @property
    def has_pending(self) -> bool: ...
    def pop_pending(self) -> list[int]: ...
    def collect(self, request: int, /) -> bytes: ...

class Scheduler:
    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        enable_prefix_caching: bool = True,
        max_len: int = 0,
        max_window: int = 0,
        min_reserve: float = ...,
        max_draft: int = 0,
        max_samples: int = 0,
        step_costs: list[tuple[int, float]] = ...,
        max_step_time: float = 0.0,
        max_run_time: float = 0.0,
    ) -> None: ...
    def add(
        self,
        id: int,
        prompt: NDArray[np.int32],
        *,
        max_len: int,
        priority: int = 0,
        client: int = 0,
        order: int = 0,
        stop_tokens: list[int] = ...,
        stream_output: bool = False,
        salt: bytes = ...,
        budget: BudgetParams | None = None,
        thinking_tokens: int = -1,
        max_thinking: int = 0,
        checkpoints: list[tuple[int, int]] = ...,
        loop_repeats: int = 0,
        drafting: Drafting = ...,
        interactive: bool = False,
        pin: bool = False,
        min_tokens: int = 0,
        num_to_score: int = 0,
    ) -> None: ...
    def cached_blocks(self, tokens: NDArray[np.int32], salt: bytes) -> list[int]: ...
    def can_pin(self, tokens: NDArray[np.int32], salt: bytes) -> bool: ...
    def restore(
        self, tokens: NDArray[np.int32], salt: bytes, fill: Callable[[int, list[int]], None]
    ) -> bool: ...
    def pin(self, id: int, tokens: NDArray[np.int32], salt: bytes) -> bool: ...
    def unpin(self, id: int) -> None: ...
    def num_pinned(self, id: int) -> int: ...
    def schedule(self, batch: ScheduledBatch, time_to_deadline: float = ...) -> list[int]: ...
    def update(self, sampled: NDArray[np.int64]) -> None: ...
    def record_step_time(self, seconds: float) -> None: ...
    @property
    def decode_time(self) -> float: ...
    def begin_multi_step(
        self,
        batch: ScheduledBatch,
        device_batch: DeviceBatch,
        *,
        num_steps: int,
        max_inline_tokens: int,
    ) -> int: ...
    def extend_multi_step(self, batch: ScheduledBatch, num_steps: int) -> int: ...
    def apply_multi_step(self, sampled: NDArray[np.int32], seconds: float = 0.0) -> None: ...
    def cancel_step(self) -> None: ...
    @property
    def num_steps_in_flight(self) -> int: ...
    @property
    def outputs(self) -> list[tuple[int, int]]: ...
    @property
    def finished(self) -> list[int]: ...
    @property
    def forked(self) -> list[tuple[int, int]]: ...
    @property
    def appended(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]: ...
    def finish(self, id: int, reason: FinishReason) -> None: ...
    def limit_thinking(self, id: int, max_thinking: int, reason: EndReason) -> None: ...
    def stop_streaming(self, id: int) -> None: ...
    def remove(self, id: int) -> None: ...
    def collect_output_dict(self, id: int) -> CoreOutputDict: ...
    def collect_outputs(self) -> bytes: ...
    def collect_output(self, id: int) -> bytes: ...
    def collect_again(self, id: int, req_index: int, num_collected: int) -> bytes: ...
    def tokens(self, id: int) -> list[int]: ...
    def req_index(self, id: int) -> int: ...
    def blocks(self, id: int) -> list[int]: ...
    def num_settled(self, id: int) -> int: ...
    def num_computed(self, id: int) -> int: ...
    def has_unfinished(self) -> bool: ...
    def num_waiting(self, client: int) -> int: ...
    def tokens_served(self, client: int) -> int: ...
    def stats(self) -> SchedulerStats: ...
    def clear_cache(self) -> None: ...
    def check_integrity(self) -> None: ...

class DecodeLoop:
    """Decode steps without Python (csrc/engine/decode_loop.hpp)."""

    def __init__(
        self,
        batch: ScheduledBatch,
        graphs: cpu.GraphTable,
        sampler: cpu.Sampler,
        needs_python: NDArray[np.uint8],
        /,
    ) -> None: ...
    def run(
        self,
        scheduler: Scheduler,
        seconds: float,
        time_to_deadline: float,
        allowed: dict[int, NDArray[np.uint8]],
        /,
    ) -> bytes | list[int]: ...
    @property
    def logprobs(self) -> bytes: ...
    def interrupt(self) -> None: ...

class cpu:
    """CPU kernels: tensors are passed as addresses and sizes (csrc/cpu/ops.hpp)."""

    @staticmethod
    def isa() -> str: ...
    @staticmethod
    def set_isa(name: str, /) -> None: ...
    @staticmethod
    def num_threads() -> int: ...
    @staticmethod
    def set_num_threads(count: int, /) -> None: ...
    class RecordedStep:
        """Operations recorded once (csrc/cpu/recorded_step.hpp)."""

        def replay(self) -> None: ...
        def __len__(self) -> int: ...

    class GraphTable:
        """Recorded steps by (tokens, rows), each with its logits."""

        def __init__(self) -> None: ...
        def add(
            self, tokens: int, rows: int, step: cpu.RecordedStep, logits: int, stride: int, /
        ) -> None: ...
        def remove(self, tokens: int, rows: int, /) -> None: ...
        def clear(self) -> None: ...

    class Sampler:
        """Sampling state by req_index, and one call for a step (csrc/cpu/sampler.hpp)."""

        def __init__(
            self,
            columns: dict[str, NDArray[Any]],
            *,
            vocab_size: int,
            banned_ids: list[list[int]],
        ) -> None: ...
        def add_row(
            self,
            req_index: int,
            bias: list[tuple[int, float]],
            tokens: list[int],
            prompt_len: int,
            ends: list[int] = ...,
        ) -> None: ...
        def count_appended(
            self, req_indices: NDArray[np.int32], tokens: NDArray[np.int32], /
        ) -> None: ...
        def sample(
            self,
            logits: int,
            raw: int,
            stride: int,
            req_indices: NDArray[np.int32],
            positions: int,
            banned: NDArray[np.uint8] | None,
            allowed: dict[int, NDArray[np.uint8]],
            /,
        ) -> tuple[NDArray[np.int64], bytes]: ...

    class CollectiveError(RuntimeError): ...

    class Collective:
        """Sums and gathers among processes (csrc/cpu/collective.hpp)."""

        def __init__(self, memory: int, rank: int, ranks: int, /) -> None: ...
        @staticmethod
        def memory_bytes(ranks: int, /) -> int: ...
        def all_reduce(self, dtype: int, x: int, out: int, count: int, add: bool, /) -> None: ...
        def gather(self, x: int, out: int, rows: int, row_bytes: int, /) -> None:
            """``out`` 0: this rank receives nothing."""

        def abort(self) -> None: ...

    @staticmethod
    def record_into(step: RecordedStep | None, /) -> None: ...
    @staticmethod
    def linear(
        dtype: int,
        format: int,
        epilogue: int,
        x: int,
        panels: int,
        scales: int,
        bias: int,
        out: int,
        rows: int,
        columns: int,
        outputs: int,
        group: int,
        x_stride: int,
        out_stride: int,
        /,
    ) -> None: ...
    @staticmethod
    def embed(
        dtype: int,
        format: int,
        ids: int,
        panels: int,
        scales: int,
        out: int,
        rows: int,
        columns: int,
        outputs: int,
        group: int,
        first: int,
        /,
    ) -> None: ...
    @staticmethod
    def gather_rows(
        x: int, index: int, out: int, rows: int, row_bytes: int, x_rows: int, first: int, /
    ) -> None: ...
    @staticmethod
    def rms_norm(
        dtype: int,
        x: int,
        weight: int,
        out: int,
        rows: int,
        inner_rows: int,
        outer_stride: int,
        inner_stride: int,
        dim: int,
        eps: float,
        /,
    ) -> None: ...
    @staticmethod
    def add_rms_norm(
        dtype: int,
        x: int,
        residual: int,
        weight: int,
        out: int,
        rows: int,
        x_stride: int,
        residual_stride: int,
        dim: int,
        eps: float,
        /,
    ) -> None: ...
    @staticmethod
    def norm_residual(
        dtype: int,
        x: int,
        residual: int,
        weight: int,
        rows: int,
        x_stride: int,
        residual_stride: int,
        dim: int,
        eps: float,
        /,
    ) -> None: ...
    @staticmethod
    def silu_and_mul(
        dtype: int, gate_up: int, out: int, rows: int, stride: int, dim: int, /
    ) -> None: ...
    @staticmethod
    def gelu_and_mul(
        dtype: int, gate_up: int, out: int, rows: int, stride: int, dim: int, /
    ) -> None: ...
    @staticmethod
    def scale_rows(
        dtype: int, x: int, scales: int, positions: int, rows: int, stride: int, dim: int, /
    ) -> None: ...
    @staticmethod
    def rope_write(
        dtype: int,
        cache_dtype: int,
        q: int,
        k: int,
        v: int,
        cos_sin: int,
        k_cache: int,
        v_cache: int,
        positions: int,
        slots: int,
        tokens: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        q_stride: int,
        k_stride: int,
        v_stride: int,
        /,
    ) -> None: ...
    @staticmethod
    def paged_attention(
        dtype: int,
        cache_dtype: int,
        q: int,
        k_cache: int,
        v_cache: int,
        out: int,
        cu_seqlens_q: int,
        context_lens: int,
        block_table: int,
        sequences: int,
        block_table_stride: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        q_stride: int,
        scale: float,
        window: int,
        sinks: int,
        /,
    ) -> None: ...
    @staticmethod
    def sample(
        logits: int,
        out: int,
        rows: int,
        stride: int,
        size: int,
        temperature: int,
        top_k: int,
        top_p: int,
        min_p: int,
        seeds: int,
        positions: int,
        filtered: bool,
        logits_sanitized: bool,
        /,
    ) -> None: ...
    @staticmethod
    def score_rows(
        logits: int,
        count: int,
        stride: int,
        size: int,
        tokens: int,
        width: int,
        logprobs: int,
        ranks: int,
        top: int,
        top_tokens: int,
        /,
    ) -> None: ...
