"""Logits processors of the persistent batch: Python callables that edit one sequence's logits.

Owns the tokens of the sequences that have processors, by req_index. An error of a processor is
returned, not raised: it concerns one sequence only.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from s1engine.ops.torch_sampling import sanitize_logits
from s1engine.runner.interface import NewRequest
from s1engine.sampling_params import LogitsProcessor


class LogitsProcessing:
    """The processors of all rows. One thread steps."""

    def __init__(self) -> None:
        self._rows: dict[int, _ProcessedRow] = {}

    def add_request(self, request: NewRequest) -> None:
        """Sets the row of a sequence that has entered the persistent batch."""
        self._rows.pop(request.req_index, None)
        processors = request.params.logits_processors
        if processors:
            self._rows[request.req_index] = _ProcessedRow(processors, request.token_ids)

    def append(self, req_indices: np.ndarray, tokens: np.ndarray) -> None:
        """Follows the tokens [n] int32 that a step has appended; ~id: the last one was dropped."""
        if self._rows:
            for req_index, token in zip(req_indices.tolist(), tokens.tolist(), strict=True):
                row = self._rows.get(req_index)
                if row is not None:
                    row.append(token)

    def covers(self, req_indices: np.ndarray) -> bool:
        """Has one of these rows a processor?"""
        return bool(self._rows) and any(i in self._rows for i in req_indices.tolist())

    def apply(self, logits: Tensor, req_indices: np.ndarray) -> dict[int, Exception]:
        """Edits the rows of ``logits`` [n, V] float32 that have processors, in place. Returns the
        errors of processors by req_index."""
        errors: dict[int, Exception] = {}
        for i, req_index in enumerate(req_indices.tolist()):
            row = self._rows.get(req_index)
            if row is None:
                continue
            values = sanitize_logits(logits[i]).cpu().numpy()
            try:
                row.apply(values)
            except Exception as error:
                errors[req_index] = error
            if logits.device.type != "cpu":  # there, values are a view
                logits[i] = torch.from_numpy(values)
        return errors


class _ProcessedRow:
    """One sequence: its processors and its tokens so far."""

    def __init__(self, processors: Sequence[LogitsProcessor], token_ids: list[int]) -> None:
        self._processors = processors
        self._length = len(token_ids)
        self._tokens = np.array(token_ids, np.int32)

    def append(self, token: int) -> None:
        if token < 0:
            self._length -= 1
            return
        if self._length == len(self._tokens):
            self._tokens = np.concatenate([self._tokens, np.zeros_like(self._tokens)])
        self._tokens[self._length] = token
        self._length += 1

    def apply(self, logits: np.ndarray) -> None:
        """Edits ``logits`` [V] in place. ValueError: a result is not as LogitsProcessor says."""
        tokens = self._tokens[: self._length]
        tokens.flags.writeable = False
        for process in self._processors:
            result = process(tokens, logits)
            if result is not None and result is not logits:
                _check_form(process, result, logits)
                logits[:] = result
            if not np.isfinite(logits.max()):
                raise ValueError(f"{_name(process)} left NaN, infinity, or no token to sample")


def _check_form(process: LogitsProcessor, result: object, logits: np.ndarray) -> None:
    if not isinstance(result, np.ndarray):
        raise ValueError(f"{_name(process)} must return an array or None, got {type(result)}")
    if result.shape != logits.shape or result.dtype != np.float32:
        raise ValueError(
            f"{_name(process)} must return float32 of shape {logits.shape}, "
            f"got {result.dtype} of shape {result.shape}"
        )


def _name(process: LogitsProcessor) -> str:
    return f"logits processor {getattr(process, '__qualname__', type(process).__qualname__)}"
