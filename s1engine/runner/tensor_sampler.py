"""The sampler of any device: one call of ``ops.sample`` a step.

A step gathers the rows that it samples, so nothing loops over sequences. Rules that few requests
use (bias, penalties, log-probabilities) cost nothing while no running request uses them.
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
from s1engine.runner.thinking_ends import ThinkingEnds
from s1engine.sampling_params import NO_PENALTIES


@dataclass(frozen=True, slots=True)
class _Gathered:
    """Sampling parameters of the rows of a step, in its order."""

    rows: SampleRows
    req_indices: np.ndarray  # [n] int32, a copy: the buffer behind ``rows`` changes
    metadata: SamplingMetadata  # without bans and penalties, which change every step
    penalised: bool
    logprobs: bool


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
    ) -> None:
        super().__init__(max_num_seqs)
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
        row, prompt_len = request.req_index, request.prompt_len
        ids = torch.tensor(request.token_ids, dtype=torch.int64, device=self._device)
        prompt, output = (part[part < self._vocab_size] for part in ids.tensor_split([prompt_len]))
        self._in_prompt[row] = False
        self._in_prompt[row, prompt] = True
        self._output_counts[row] = torch.bincount(output, minlength=self._vocab_size)

    def _count_appended(self, req_indices: np.ndarray, tokens: np.ndarray) -> None:
        if self._output_counts is None:
            return
        rows = torch.from_numpy(req_indices).to(self._device, torch.int64)
        ids = torch.from_numpy(tokens).to(self._device, torch.int64)
        change = torch.where(ids < 0, -1, 1).to(torch.int32)
        ids = torch.where(ids < 0, ~ids, ids)  # ~id: dropped again
        self._output_counts.index_put_((rows, ids), change, accumulate=True)

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
        if gathered.penalised:
            metadata = replace(metadata, penalties=self._gather_penalties(rows.req_indices))
        if gathered.logprobs and raw is logits:
            raw = logits.clone()
        if allowed_tokens:
            self._mask(logits, rows.req_indices, allowed_tokens)
        ids = self._ops.sample(logits, metadata)
        logprobs = self._logprobs(raw, ids, rows.req_indices) if gathered.logprobs else b""
        return ids.cpu().numpy(), logprobs

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)

    def _gather(self, rows: SampleRows) -> _Gathered:
        """The parameters of these rows; cached while the same sequences go on sampling."""
        last = self._gathered
        if (
            last is None
            or last.rows is not rows
            or not np.array_equal(last.req_indices, rows.req_indices)
        ):
            self._gathered = last = self._gather_anew(rows)
        return last

    def _gather_anew(self, rows: SampleRows) -> _Gathered:
        index = rows.req_indices
        temperature = self.temperature[index]
        metadata = SamplingMetadata(
            temperature=self._tensor(temperature),
            top_k=self._tensor(self.top_k[index]),
            top_p=self._tensor(self.top_p[index]),
            min_p=self._tensor(self.min_p[index]),
            seeds=self._tensor(self.seeds[index]),
            positions=rows.positions,
            all_greedy=not temperature.any(),
            filtered=bool(self._filters[index].any()),
            bias=self._gather_bias(index),
        )
        return _Gathered(
            rows=rows,
            req_indices=index.copy(),
            metadata=metadata,
            penalised=bool(self._penalised[index].any()),
            logprobs=bool((self.num_logprobs[index] >= 0).any()),
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

    def _gather_penalties(self, req_indices: np.ndarray) -> Penalties:
        assert self._in_prompt is not None and self._output_counts is not None
        index = self._tensor(req_indices.astype(np.int64))
        values = self.penalties[req_indices]
        neutral = ~self._penalised[req_indices]
        counts = self._output_counts[index]
        prompt = self._in_prompt[index]
        if neutral.any():  # rows without penalties hold stale counts
            counts[self._tensor(neutral)] = 0
            prompt[self._tensor(neutral)] = False
        return Penalties(
            repetition=self._tensor(values[:, 0]),
            presence=self._tensor(values[:, 1]),
            frequency=self._tensor(values[:, 2]),
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

    def _logprobs(self, raw: Tensor, ids: Tensor, req_indices: np.ndarray) -> bytes:
        """Of the sampled ids, from logits before any rule."""
        wanted = self.num_logprobs[req_indices]
        rows = np.flatnonzero(wanted >= 0)
        index = self._tensor(rows)
        arrays = self._ops.logprobs(raw[index], ids[index], int(wanted.max()))
        return pack_logprobs(
            req_indices[rows].tolist(), wanted[rows].tolist(), *(p.cpu().numpy() for p in arrays)
        )
