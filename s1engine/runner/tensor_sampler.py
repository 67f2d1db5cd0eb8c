"""The sampler of any device: one call of ``ops.sample`` a step.

A step gathers the rows that it samples, so nothing loops over sequences. What it gathers is copied
to the device once, for as long as the same rows go on sampling, and no copy waits for the device.
Rules that few requests use (bias, penalties, log-probabilities) cost nothing while no running
request uses them.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from s1engine import _core
from s1engine.logprob_records import pack_logprobs
from s1engine.ops import Ops, Penalties, SamplingMetadata
from s1engine.runner.input_batch import SampleRows
from s1engine.runner.interface import NewRequest
from s1engine.runner.sampler import Sampler
from s1engine.runner.sampling_columns import SamplingColumns
from s1engine.runner.thinking_ends import ThinkingEnds
from s1engine.sampling_params import NO_PENALTIES


@dataclass(frozen=True, slots=True)
class _PenaltyRows:
    """Of all rows of a step, on the device."""

    req_indices: Tensor  # [n] int64
    neutral: Tensor | None  # rows without penalties, int64: what is counted for them is stale
    repetition: Tensor  # [n] float32, as the next two
    presence: Tensor
    frequency: Tensor


@dataclass(frozen=True, slots=True)
class _Gathered:
    """Sampling parameters of the rows of a step, in its order."""

    rows: SampleRows
    key: bytes  # the req_indices: the buffer behind ``rows`` changes
    metadata: SamplingMetadata  # without bans and penalties, which change every step
    penalties: _PenaltyRows | None
    logprob_rows: np.ndarray  # that want log-probabilities, int64
    logprob_index: Tensor  # the same on the device


class TensorSampler(Sampler):
    """Sampling state in arrays and tensors, for every ``Ops``."""

    def __init__(
        self,
        max_num_seqs: int,
        *,
        vocab_size: int,
        ends: ThinkingEnds,
        ops: Ops,
        device: str,
        max_samples: int = 0,
    ) -> None:
        super().__init__(max_num_seqs)
        self._columns = SamplingColumns(max(max_samples, max_num_seqs), device)
        self._ops = ops
        self._device = device
        self._vocab_size = vocab_size
        self._ends = ends
        self._row_ends: dict[int, np.ndarray] = {}  # by req_index
        self._biased = np.zeros(max_num_seqs, np.bool_)
        self._bias: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._penalised = np.zeros(max_num_seqs, np.bool_)
        self._in_prompt: Tensor | None = None  # [max_num_seqs, V] bool, allocated on first use
        self._output_counts: Tensor | None = None  # [max_num_seqs, V] int32
        self._gathered: _Gathered | None = None

    def _add_rules(self, request: NewRequest) -> None:
        self._gathered = None
        row, params = request.req_index, request.params
        self._row_ends[row] = np.array([t for t in request.ends if t < self._vocab_size], np.int64)
        self._biased[row] = bool(params.logit_bias)
        if params.logit_bias:
            ids = np.fromiter(params.logit_bias, np.int64)
            self._bias[row] = ids, np.fromiter(params.logit_bias.values(), np.float32)
        self._penalised[row] = params.penalties != NO_PENALTIES
        if self._penalised[row]:
            self._count_tokens(request)

    def _count_tokens(self, request: NewRequest) -> None:
        """Counts the tokens that a sequence with penalties has so far."""
        if self._output_counts is None or self._in_prompt is None:
            shape = (len(self.seeds), self._vocab_size)
            self._output_counts = torch.zeros(shape, dtype=torch.int32, device=self._device)
            self._in_prompt = torch.zeros(shape, dtype=torch.bool, device=self._device)
        row = request.req_index
        both = np.split(np.array(request.token_ids, np.int64), [request.prompt_len])
        prompt, output = (self._tensor(ids[ids < self._vocab_size]) for ids in both)
        self._in_prompt[row] = False
        self._in_prompt[row].index_fill_(0, prompt, True)
        self._output_counts[row] = 0
        self._output_counts[row].index_add_(0, output, torch.ones_like(output, dtype=torch.int32))

    def _count_appended(self, req_indices: np.ndarray, tokens: np.ndarray) -> None:
        if self._output_counts is None:
            return
        change = np.where(tokens < 0, -1, 1)
        ids = np.where(tokens < 0, ~tokens, tokens)  # ~id: dropped again
        rows, ids, change = self._tensor(np.stack([req_indices, ids, change]).astype(np.int64))
        self._output_counts.index_put_((rows, ids), change.to(torch.int32), accumulate=True)

    def _sample(
        self,
        logits: Tensor,
        raw: Tensor,
        rows: SampleRows,
        banned: np.ndarray | None,
        allowed_tokens: dict[int, np.ndarray],
    ) -> tuple[np.ndarray, bytes]:
        gathered = self._gather(rows)
        metadata = gathered.metadata
        if banned is not None:
            metadata = replace(metadata, banned=self._gather_banned(banned, rows.req_indices))
        if gathered.penalties is not None:
            metadata = replace(metadata, penalties=self._count_penalties(gathered.penalties))
        wants_logprobs = len(gathered.logprob_rows) > 0
        if wants_logprobs and raw is logits:
            raw = logits.clone()
        if allowed_tokens:
            self._mask(logits, rows.req_indices, allowed_tokens)
        ids = self._ops.sample(logits, metadata)
        logprobs = self._logprobs(raw, ids, gathered) if wants_logprobs else b""
        return ids.cpu().numpy(), logprobs

    def _tensor(self, array: np.ndarray) -> Tensor:
        """On the device, for the work that is launched next; the host does not wait."""
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self._device == "cpu":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def _gather(self, rows: SampleRows) -> _Gathered:
        """The parameters of these rows; cached while the same sequences go on sampling."""
        last, key = self._gathered, rows.req_indices.tobytes()
        if last is None or last.key != key:
            self._gathered = last = self._gather_anew(rows, key)
        elif last.rows is not rows:  # views of another size of step
            metadata = replace(last.metadata, positions=rows.positions)
            self._gathered = last = replace(last, rows=rows, metadata=metadata)
        return last

    def _gather_anew(self, rows: SampleRows, key: bytes) -> _Gathered:
        index, columns, n = rows.req_indices, self._columns, len(rows.req_indices)
        columns.write(self, index)
        logprob_rows = np.flatnonzero(self.num_logprobs[index] >= 0)
        metadata = SamplingMetadata(
            temperature=columns.column("temperature", n),
            top_k=columns.column("top_k", n),
            top_p=columns.column("top_p", n),
            min_p=columns.column("min_p", n),
            seeds=columns.column("seeds", n),
            positions=rows.positions,
            all_greedy=not self.temperature[index].any(),
            filtered=bool(self._filters[index].any()),
            bias=self._gather_bias(index),
        )
        return _Gathered(
            rows=rows,
            key=key,
            metadata=metadata,
            penalties=self._gather_penalties(index),
            logprob_rows=logprob_rows,
            logprob_index=self._tensor(logprob_rows),
        )

    def _gather_banned(self, codes: np.ndarray, req_indices: np.ndarray) -> tuple[Tensor, Tensor]:
        rows = np.flatnonzero(codes)
        ids = [
            self._row_ends[int(req_indices[row])]
            if codes[row] == _core.BAN_ENDS
            else self._ends.ids(int(codes[row]))
            for row in rows
        ]
        return (
            self._tensor(np.repeat(rows, [len(own) for own in ids])),
            self._tensor(np.concatenate(ids)),
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

    def _gather_penalties(self, req_indices: np.ndarray) -> _PenaltyRows | None:
        penalised = self._penalised[req_indices]
        if not penalised.any():
            return None
        repetition, presence, frequency = self._tensor(self.penalties[req_indices].T)
        return _PenaltyRows(
            req_indices=self._tensor(req_indices.astype(np.int64)),
            neutral=None if penalised.all() else self._tensor(np.flatnonzero(~penalised)),
            repetition=repetition,
            presence=presence,
            frequency=frequency,
        )

    def _count_penalties(self, rows: _PenaltyRows) -> Penalties:
        """With the tokens so far."""
        assert self._in_prompt is not None and self._output_counts is not None
        counts = self._output_counts[rows.req_indices]
        prompt = self._in_prompt[rows.req_indices]
        if rows.neutral is not None:
            counts.index_fill_(0, rows.neutral, 0)
            prompt.index_fill_(0, rows.neutral, False)
        return Penalties(
            repetition=rows.repetition,
            presence=rows.presence,
            frequency=rows.frequency,
            in_prompt=prompt,
            output_counts=counts,
        )

    def _mask(
        self, logits: Tensor, req_indices: np.ndarray, allowed_tokens: dict[int, np.ndarray]
    ) -> None:
        """Bans all other ids in the rows that ``allowed_tokens`` names."""
        masks = {
            row: allowed_tokens[req_index]
            for row, req_index in enumerate(req_indices.tolist())
            if req_index in allowed_tokens
        }
        if masks:
            index = self._tensor(np.array(list(masks)))
            bits = np.unpackbits(np.stack(list(masks.values())), axis=1, bitorder="little")
            allowed = self._tensor(bits[:, : self._vocab_size].astype(np.bool_))
            logits[index] = logits[index].masked_fill(~allowed, float("-inf"))

    def _logprobs(self, raw: Tensor, ids: Tensor, gathered: _Gathered) -> bytes:
        """Of the sampled ids, from logits before any rule."""
        index = gathered.logprob_index
        req_indices = gathered.rows.req_indices[gathered.logprob_rows]
        wanted = self.num_logprobs[req_indices]
        arrays = self._ops.logprobs(raw[index], ids[index], int(wanted.max()))
        return pack_logprobs(
            req_indices.tolist(), wanted.tolist(), *(p.cpu().numpy() for p in arrays)
        )
