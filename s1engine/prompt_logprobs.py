"""Log-probabilities of the tokens of a prompt, packed: 8 + 8 k bytes a token for k alternatives.

A part is what one step of the engine has computed; parts cross processes as bytes.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class PromptLogprob:
    """Of one token of a prompt, under the model's raw distribution after the tokens before it."""

    token_id: int
    logprob: float
    """-infinity for an id that is never sampled."""
    rank: int
    """1 for the likeliest token; equal ones rank by rising id."""
    top: tuple[tuple[int, float], ...]
    """The k likeliest tokens and their log-probabilities, best first."""

    def to_json(self) -> dict[str, Any]:
        """The object that ``s1engine generate --json`` prints."""
        fields = {"token_id": self.token_id, "logprob": self.logprob, "rank": self.rank}
        return fields | {"top": self.top}


@dataclass(frozen=True, slots=True)
class PromptLogprobsPart:
    """Consecutive tokens of one sequence's prompt."""

    seq_id: int
    first: int
    """Position of the first token in its sequence."""
    width: int
    """k"""
    data: bytes
    """For n tokens, little-endian: logprobs [n] float32, ranks [n] int32, top [n, k] float32 and
    top_ids [n, k] int32."""

    @classmethod
    def pack(
        cls,
        seq_id: int,
        first: int,
        logprobs: NDArray[np.float32],
        ranks: NDArray[np.int32],
        top: NDArray[np.float32],
        top_ids: NDArray[np.int32],
    ) -> "PromptLogprobsPart":
        """The part that holds these arrays."""
        data = b"".join(
            np.ascontiguousarray(array, kind).tobytes()
            for array, kind in ((logprobs, "<f4"), (ranks, "<i4"), (top, "<f4"), (top_ids, "<i4"))
        )
        return cls(seq_id, first, top.shape[1], data)

    def arrays(self) -> tuple[NDArray[np.generic], ...]:
        """The arrays of ``pack``."""
        n, k = len(self.data) // (8 + 8 * self.width), self.width
        shapes = (n,), (n,), (n, k), (n, k)
        arrays, at = [], 0
        for kind, shape in zip(("<f4", "<i4", "<f4", "<i4"), shapes, strict=True):
            array = np.frombuffer(self.data, kind, int(np.prod(shape)), at)
            arrays.append(array.reshape(shape))
            at += array.nbytes
        return tuple(arrays)


class PromptLogprobs(Sequence[PromptLogprob | None]):
    """Items of all tokens of a prompt, made when they are read; the first is None."""

    def __init__(self, token_ids: Sequence[int], parts: Iterable[PromptLogprobsPart]) -> None:
        """``parts``: cover the tokens from the second on, in order. If they end early, because the
        request was aborted, so does the sequence."""
        columns = [part.arrays() for part in parts]
        self._columns = [np.concatenate(arrays) for arrays in zip(*columns, strict=True)]
        known = len(self._columns[0]) if columns else 0
        self._token_ids = token_ids[: known + 1]

    @property
    def token_ids(self) -> Sequence[int]:
        """The tokens."""
        return self._token_ids

    def __len__(self) -> int:
        return len(self._token_ids)

    @overload
    def __getitem__(self, index: int) -> PromptLogprob | None: ...
    @overload
    def __getitem__(self, index: slice) -> list[PromptLogprob | None]: ...
    def __getitem__(self, index: int | slice) -> PromptLogprob | list[PromptLogprob | None] | None:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        if at == 0:
            return None
        logprob, rank, top, top_ids = (column[at - 1] for column in self._columns)
        pairs = zip(top_ids.tolist(), top.tolist(), strict=True)
        return PromptLogprob(self._token_ids[at], float(logprob), int(rank), tuple(pairs))

    def __iter__(self) -> Iterator[PromptLogprob | None]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PromptLogprobs) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]
