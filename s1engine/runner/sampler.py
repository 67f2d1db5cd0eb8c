"""Sampling parameters of the persistent batch, and the choice of a sampler.

Every running sequence has a row (``req_index``) in the arrays here, from its admission to its end
or preemption. ``CpuSampler`` samples by one native call a step, ``TensorSampler`` by tensor
operations on any device; both draw as ``ops.torch_sampling`` defines it.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from s1engine.runner.device_batch import DeviceBatchBuffer
from s1engine.runner.input_batch import SampleRows
from s1engine.runner.interface import NewRequest, SchedulerOutput
from s1engine.runner.logits_processing import LogitsProcessing
from s1engine.sampling_params import NO_PENALTIES

NO_MASKS: dict[int, np.ndarray] = {}


@dataclass(slots=True)
class SamplerOutput:
    """The tokens of one step."""

    token_ids: np.ndarray  # [n] int64
    logprobs: bytes = b""
    """Of rows that want them (logprob_records.py), of the logits before any rule."""
    failures: dict[int, Exception] = field(default_factory=dict)
    """By req_index, errors of logits processors."""


class Sampler(ABC):
    """Parameters by req_index: arrays of length ``max_num_seqs``.

    Attributes:
        processing: the logits processors of all rows. They need Python in every step.
    """

    def __init__(self, max_num_seqs: int) -> None:
        self.temperature = np.zeros(max_num_seqs, np.float32)
        self.top_k = np.zeros(max_num_seqs, np.int32)
        self.top_p = np.ones(max_num_seqs, np.float32)
        self.min_p = np.zeros(max_num_seqs, np.float32)
        self.seeds = np.zeros(max_num_seqs, np.int64)
        self.num_logprobs = np.full(max_num_seqs, -1, np.int32)
        self.penalties = np.tile(np.array(NO_PENALTIES, np.float32), (max_num_seqs, 1))
        self._filters = np.zeros(max_num_seqs, np.bool_)
        self.processing = LogitsProcessing()

    def update_states(self, step: SchedulerOutput) -> None:
        """Counts the tokens that the step before appended, then adds the new requests."""
        if step.appended is not None:
            self._count_appended(*step.appended)
            self.processing.append(*step.appended)
        for request in step.new_requests:
            self.add_request(request)

    def add_request(self, request: NewRequest) -> None:
        """Sets the row of a sequence that has entered the persistent batch."""
        row, params = request.req_index, request.params
        greedy = params.temperature == 0
        self.temperature[row] = params.temperature
        self.top_k[row] = 0 if greedy else max(params.top_k, 0)
        self.top_p[row] = 1 if greedy else params.top_p
        self.min_p[row] = 0 if greedy else params.min_p
        self.seeds[row] = request.seed
        self.num_logprobs[row] = -1 if params.logprobs is None else params.logprobs
        self.penalties[row] = params.penalties
        self._filters[row] = self.top_k[row] > 0 or self.top_p[row] < 1 or self.min_p[row] > 0
        self.processing.add_request(request)
        self._add_rules(request)

    @abstractmethod
    def _add_rules(self, request: NewRequest) -> None:
        """Sets the logit bias of a new row, and counts its tokens if it has penalties."""

    @abstractmethod
    def _count_appended(self, req_indices: np.ndarray, tokens: np.ndarray) -> None:
        """Counts what one step has appended [n] int32, forced tokens included; ~id: dropped."""

    def write(self, device_batch: DeviceBatchBuffer, req_indices: np.ndarray) -> None:
        """Copies the parameters of these rows into the rows of a multi-step decode."""
        n = len(req_indices)
        for name in ("temperature", "top_k", "top_p", "min_p", "seeds"):
            getattr(device_batch, name)[:n] = getattr(self, name)[req_indices]
        device_batch.filtered = bool(self._filters[req_indices].any())

    def sample(
        self,
        logits: Tensor,
        rows: SampleRows,
        *,
        any_banned: bool,
        allowed_tokens: dict[int, np.ndarray] = NO_MASKS,
    ) -> SamplerOutput:
        """Samples a token for each row of ``logits`` [n, V] float32, which it overwrites.

        ``allowed_tokens``: bitmasks [ceil(V / 8)] uint8 by req_index, the lowest bit of a byte
        first; other ids are banned in these rows."""
        failures: dict[int, Exception] = {}
        raw = logits
        if self.processing.covers(rows.req_indices):
            wants_logprobs = (self.num_logprobs[rows.req_indices] >= 0).any()
            raw = logits.clone() if wants_logprobs else logits
            failures = self.processing.apply(logits, rows.req_indices)
        banned = rows.banned if any_banned else None
        ids, logprobs = self._sample(logits, raw, rows, banned, allowed_tokens)
        return SamplerOutput(ids, logprobs, failures)

    @abstractmethod
    def _sample(
        self,
        logits: Tensor,
        raw: Tensor,
        rows: SampleRows,
        banned: np.ndarray | None,
        allowed_tokens: dict[int, np.ndarray],
    ) -> tuple[np.ndarray, bytes]:
        """Ids, and log-probabilities (logprob_records.py) from the logits ``raw``, which may be
        ``logits`` itself. ``banned`` None: no row has a ban code."""
