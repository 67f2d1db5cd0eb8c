"""The interface between methods and models: requests go in, responses come out as they finish.

A backend runs all submitted requests at once. A method may submit more while it reads responses, so
trying again needs no barrier.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from s1engine.sampling_params import SamplingParams

Segment = tuple[str, bool]  # text, and whether it was injected


@dataclass(frozen=True, slots=True)
class EvalRequest:
    """One prompt, sampled ``params.n`` times."""

    key: int
    """The method's own number of the request."""
    prompt: str
    params: SamplingParams
    trace: bool = False
    """Return the text in segments too."""


@dataclass(frozen=True, slots=True)
class EvalSample:
    """One sampled output."""

    text: str
    """The answer, without the thinking."""
    thinking_tokens: int
    output_tokens: int
    """All generated tokens, forced ones included."""
    forced_tokens: int = 0
    waits_used: int = 0
    end_reason: str | None = None
    finish_reason: str | None = None
    mean_logprob: float | None = None
    """Mean log-probability of the sampled tokens, if the request wants log-probabilities."""
    estimated: bool = False
    """The server does not count thinking tokens: estimated from the lengths of the texts."""
    segments: tuple[Segment, ...] = ()


@dataclass(frozen=True, slots=True)
class EvalResponse:
    """The samples of a request, or the error."""

    request: EvalRequest
    samples: tuple[EvalSample, ...]
    seconds: float
    """From submission to the end of the last sample."""
    error: str | None = None
    checkpoints: tuple[tuple[int, EvalSample], ...] = ()
    """Budget and answer of each checkpoint in ``request.params``, of the first sample."""


class Backend(Protocol):
    """A model that answers requests."""

    @property
    def name(self) -> str:
        """The model's name in the results."""

    @property
    def max_thinking(self) -> int | None:
        """The largest useful budget, in tokens; None if unknown."""

    @property
    def can_think(self) -> bool:
        """Whether the model can keep a thinking budget; True if unknown."""

    @property
    def generated_tokens(self) -> int:
        """Total tokens generated so far, for a progress bar."""

    def submit(self, request: EvalRequest) -> None:
        """Starts a request. Its errors come back in its response."""

    def responses(self) -> Iterator[EvalResponse]:
        """Yields until no submitted request is left. Closing the iterator drops the rest."""
