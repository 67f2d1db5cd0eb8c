"""Sampling state by req_index, and one call of ``ops.sample`` a step.

Every running sequence has a req_index, an index into the arrays here, from admission to its end or
preemption. A step gathers the rows it samples, so nothing loops over sequences; rules that few
requests use (bias, penalties, log-probabilities) cost nothing while no admitted request uses them.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from s1engine.ops import Ops, Penalties, SamplingMetadata
from s1engine.outputs import RowLogprobs
from s1engine.runner.device_batch import DeviceBatchBuffer
from s1engine.runner.input_batch import SampleRows
from s1engine.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class SamplerOutput:
    """One token for each sampling row, and log-probabilities by req_index where asked for."""

    token_ids: np.ndarray  # [n] int64
    logprobs: dict[int, RowLogprobs]


@dataclass(frozen=True, slots=True)
class _Gathered:
    """Sampling parameters of the rows of a step, in its order."""

    rows: SampleRows
    req_indices: np.ndarray  # [n] int32, a copy: the buffer behind ``rows`` changes
    metadata: SamplingMetadata  # without bans and penalties, which change every step
    penalised: bool
    logprobs: bool


class Sampler:
    """Arrays of length ``max_num_seqs``, indexed by req_index."""

    def __init__(
        self,
        *,
        max_num_seqs: int,
        vocab_size: int,
        triggers: tuple[int, ...],
        ops: Ops,
        device: str,
    ) -> None:
        self._ops = ops
        self._device = device
        self._vocab_size = vocab_size
        self._triggers = np.array(triggers, np.int64)
        self._temperature = np.zeros(max_num_seqs, np.float32)
        self._top_k = np.zeros(max_num_seqs, np.int32)
        self._top_p = np.ones(max_num_seqs, np.float32)
        self._min_p = np.zeros(max_num_seqs, np.float32)
        self._seeds = np.zeros(max_num_seqs, np.int64)
        self._num_logprobs = np.full(max_num_seqs, -1, np.int32)
        self._filters = np.zeros(max_num_seqs, np.bool_)
        self._biased = np.zeros(max_num_seqs, np.bool_)
        self._bias: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._penalised = np.zeros(max_num_seqs, np.bool_)
        self._penalties = np.tile(np.array([1, 0, 0], np.float32), (max_num_seqs, 1))
        self._in_prompt: Tensor | None = None  # [max_num_seqs, V] bool, made on first use
        self._output_counts: Tensor | None = None  # [max_num_seqs, V] int32
        self._gathered: _Gathered | None = None
        self.masks: dict[int, np.ndarray] = {}
        """[V] bool by req_index: ids that may be sampled next. Rows not named are free."""

    def add_request(
        self, req_index: int, params: SamplingParams, seed: int, tokens: list[int], prompt_len: int
    ) -> None:
        """Prepares a req_index for a sequence whose tokens so far are ``tokens``."""
        self._gathered = None
        greedy = params.temperature == 0
        self._temperature[req_index] = params.temperature
        self._top_k[req_index] = 0 if greedy else max(params.top_k, 0)
        self._top_p[req_index] = 1 if greedy else params.top_p
        self._min_p[req_index] = 0 if greedy else params.min_p
        self._seeds[req_index] = seed
        self._num_logprobs[req_index] = -1 if params.logprobs is None else params.logprobs
        self._filters[req_index] = (
            self._top_k[req_index] > 0 or self._top_p[req_index] < 1 or self._min_p[req_index] > 0
        )
        self._biased[req_index] = bool(params.logit_bias)
        if params.logit_bias:
            ids = np.fromiter(params.logit_bias, np.int64)
            self._bias[req_index] = ids, np.fromiter(params.logit_bias.values(), np.float32)
        penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        self._penalties[req_index] = penalties
        self._penalised[req_index] = penalties != (1, 0, 0)
        if self._penalised[req_index]:
            self._count(req_index, tokens, prompt_len)

    def _count(self, req_index: int, tokens: list[int], prompt_len: int) -> None:
        if self._output_counts is None or self._in_prompt is None:
            shape = (len(self._seeds), self._vocab_size)
            self._output_counts = torch.zeros(shape, dtype=torch.int32, device=self._device)
            self._in_prompt = torch.zeros(shape, dtype=torch.bool, device=self._device)
        ids = torch.tensor(tokens, dtype=torch.int64, device=self._device)
        ids[ids >= self._vocab_size] = 0  # padded ids of a raw prompt are never sampled
        self._in_prompt[req_index] = False
        self._in_prompt[req_index, ids[:prompt_len]] = True
        self._output_counts[req_index] = torch.bincount(
            ids[prompt_len:], minlength=self._vocab_size
        )

    def count_tokens(self, req_indices: np.ndarray, tokens: np.ndarray) -> None:
        """Counts the tokens that the step appended, forced ones included."""
        if self._output_counts is not None:
            rows = torch.from_numpy(req_indices).to(self._device, torch.int64)
            ids = torch.from_numpy(tokens).to(self._device, torch.int64)
            one = torch.ones((), dtype=torch.int32, device=self._device)
            self._output_counts.index_put_((rows, ids), one, accumulate=True)

    def needs_single_step(self, req_indices: np.ndarray) -> bool:
        """Does one of these rows sample by rules that only ``sample`` knows: bias, penalties,
        log-probabilities?"""
        rules = (
            self._biased[req_indices]
            | self._penalised[req_indices]
            | (self._num_logprobs[req_indices] >= 0)
        )
        return bool(rules.any())

    def write(self, lanes: DeviceBatchBuffer, req_indices: np.ndarray) -> None:
        """How the sequences in these req_indices sample, for the lanes of a run."""
        n = len(req_indices)
        for name in ("temperature", "top_k", "top_p", "min_p", "seeds"):
            getattr(lanes, name)[:n] = getattr(self, f"_{name}")[req_indices]
        lanes.filtered = bool(self._filters[req_indices].any())

    def sample(self, logits: Tensor, rows: SampleRows, any_banned: bool) -> SamplerOutput:
        """Samples one token for each row of ``logits`` [n, V] float32."""
        gathered = self._gather(rows)
        metadata = gathered.metadata
        if any_banned:
            metadata = replace(metadata, banned=self._gather_banned(rows))
        if gathered.penalised:
            metadata = replace(metadata, penalties=self._gather_penalties(rows.req_indices))
        raw = logits.clone() if gathered.logprobs else logits
        if self.masks:
            self._mask(logits, rows.req_indices)
        if not gathered.logprobs:
            return SamplerOutput(self._ops.sample(logits, metadata).cpu().numpy(), {})
        ids = self._ops.sample(logits, metadata)
        return SamplerOutput(ids.cpu().numpy(), self._logprobs(raw, ids, rows.req_indices))

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)

    def _gather(self, rows: SampleRows) -> _Gathered:
        """The parameters of these rows; kept while the same req_indices go on sampling."""
        last = self._gathered
        if (
            last is None
            or last.rows is not rows
            or not np.array_equal(last.req_indices, rows.req_indices)
        ):
            self._gathered = last = self._gather_anew(rows)
        return last

    def _gather_anew(self, rows: SampleRows) -> _Gathered:
        req_indices = rows.req_indices
        temperature = self._temperature[req_indices]
        metadata = SamplingMetadata(
            temperature=self._tensor(temperature),
            top_k=self._tensor(self._top_k[req_indices]),
            top_p=self._tensor(self._top_p[req_indices]),
            min_p=self._tensor(self._min_p[req_indices]),
            seeds=self._tensor(self._seeds[req_indices]),
            positions=rows.positions,
            all_greedy=not temperature.any(),
            filtered=bool(self._filters[req_indices].any()),
            bias=self._gather_bias(req_indices),
        )
        return _Gathered(
            rows=rows,
            req_indices=req_indices.copy(),
            metadata=metadata,
            penalised=bool(self._penalised[req_indices].any()),
            logprobs=bool((self._num_logprobs[req_indices] >= 0).any()),
        )

    def _gather_banned(self, rows: SampleRows) -> tuple[Tensor, Tensor]:
        banned = np.flatnonzero(rows.banned)
        return (
            self._tensor(np.repeat(banned, len(self._triggers))),
            self._tensor(np.tile(self._triggers, len(banned))),
        )

    def _gather_bias(self, req_indices: np.ndarray) -> tuple[Tensor, Tensor, Tensor] | None:
        biased = np.flatnonzero(self._biased[req_indices])
        if not len(biased):
            return None
        biases = [self._bias[int(req_indices[row])] for row in biased]
        rows = np.repeat(biased, [len(ids) for ids, _ in biases])
        ids = np.concatenate([ids for ids, _ in biases])
        values = np.concatenate([values for _, values in biases])
        return self._tensor(rows), self._tensor(ids), self._tensor(values)

    def _gather_penalties(self, req_indices: np.ndarray) -> Penalties:
        assert self._in_prompt is not None and self._output_counts is not None
        index = self._tensor(req_indices.astype(np.int64))
        values = self._penalties[req_indices]
        neutral = ~self._penalised[req_indices]
        counts = self._output_counts[index]
        prompt = self._in_prompt[index]
        if neutral.any():  # req_indices without penalties keep stale counts
            counts[self._tensor(neutral)] = 0
            prompt[self._tensor(neutral)] = False
        return Penalties(
            repetition=self._tensor(values[:, 0]),
            presence=self._tensor(values[:, 1]),
            frequency=self._tensor(values[:, 2]),
            in_prompt=prompt,
            output_counts=counts,
        )

    def _mask(self, logits: Tensor, req_indices: np.ndarray) -> None:
        masked = [
            row for row, req_index in enumerate(req_indices.tolist()) if req_index in self.masks
        ]
        if masked:
            allowed = self._tensor(np.stack([self.masks[int(req_indices[row])] for row in masked]))
            index = self._tensor(np.array(masked))
            logits[index] = logits[index].masked_fill(~allowed, float("-inf"))

    def _logprobs(
        self, raw: Tensor, ids: Tensor, req_indices: np.ndarray
    ) -> dict[int, RowLogprobs]:
        asked = self._num_logprobs[req_indices]
        rows = np.flatnonzero(asked >= 0)
        index = self._tensor(rows)
        k = int(asked.max())
        own, values, top_ids = self._ops.logprobs(raw[index], ids[index], k)
        found = {}
        for i, row in enumerate(rows):
            best = zip(top_ids[i].tolist(), values[i].tolist(), strict=True)
            top = tuple(best)[: asked[row]]
            found[int(req_indices[row])] = RowLogprobs(float(own[i]), top)
        return found
