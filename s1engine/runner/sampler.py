"""Sampling parameters of the persistent batch, and the choice of a sampler.

Every running sequence has a row (``req_index``) in the arrays here, from its admission to its end
or preemption. ``CpuSampler`` samples by one native call a step, ``TensorSampler`` by tensor
operations on any device; both draw as ``ops.torch_sampling`` defines it.
"""

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from s1engine.ops import Ops
from s1engine.outputs import RowLogprobs
from s1engine.runner.device_batch import DeviceBatchBuffer
from s1engine.runner.input_batch import SampleRows
from s1engine.runner.interface import NewRequest, SchedulerOutput
from s1engine.sampling_params import NO_PENALTIES

NO_MASKS: dict[int, np.ndarray] = {}


class Sampler(ABC):
    """Parameters by req_index: arrays of length ``max_num_seqs``."""

    def __init__(self, max_num_seqs: int) -> None:
        self.temperature = np.zeros(max_num_seqs, np.float32)
        self.top_k = np.zeros(max_num_seqs, np.int32)
        self.top_p = np.ones(max_num_seqs, np.float32)
        self.min_p = np.zeros(max_num_seqs, np.float32)
        self.seeds = np.zeros(max_num_seqs, np.int64)
        self.num_logprobs = np.full(max_num_seqs, -1, np.int32)
        self.penalties = np.tile(np.array(NO_PENALTIES, np.float32), (max_num_seqs, 1))
        self._filters = np.zeros(max_num_seqs, np.bool_)

    def update_states(self, step: SchedulerOutput) -> None:
        """Counts the tokens that the step before appended, then adds the new requests."""
        if step.appended is not None:
            self._count_appended(*step.appended)
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

    @abstractmethod
    def sample(
        self,
        logits: Tensor,
        rows: SampleRows,
        *,
        any_banned: bool,
        allowed_tokens: dict[int, np.ndarray] = NO_MASKS,
    ) -> tuple[np.ndarray, dict[int, RowLogprobs]]:
        """Samples a token for each row of ``logits`` [n, V] float32, which it overwrites. Returns
        the ids [n] int64, and log-probabilities by req_index where asked for.

        ``allowed_tokens``: bitmasks [ceil(V / 8)] uint8 by req_index, the lowest bit of a byte
        first; other ids are banned in these rows."""


def row_logprobs(
    ops: Ops, raw: Tensor, ids: Tensor, req_indices: np.ndarray, wanted: np.ndarray
) -> dict[int, RowLogprobs]:
    """Log-probabilities of the sampled ids [n], from logits [n, V] before any rule, by req_index.
    ``wanted`` [n]: how many likeliest tokens to report beside; -1: a row reports nothing."""
    rows = np.flatnonzero(wanted >= 0)
    index = torch.from_numpy(rows).to(raw.device)
    own, values, top_ids = ops.logprobs(raw[index], ids[index], int(wanted.max()))
    logprobs = {}
    for i, row in enumerate(rows):
        best = zip(top_ids[i].tolist(), values[i].tolist(), strict=True)
        top = tuple(best)[: wanted[row]]
        logprobs[int(req_indices[row])] = RowLogprobs(float(own[i]), top)
    return logprobs
