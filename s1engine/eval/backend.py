"""The seam between methods and what answers them: asks go in, replies come out as they are ready.

A backend keeps everything that was submitted going at once. More may be submitted while replies are
read, so a method that tries again needs no barrier.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from s1engine.sampling_params import SamplingParams

Segment = tuple[str, bool]  # text, and was it injected?


@dataclass(frozen=True, slots=True)
class EvalRequest:
    """One prompt, sampled ``params.n`` times."""

    key: int
    """By which a method knows its ask again."""
    prompt: str
    params: SamplingParams
    trace: bool = False
    """Return the text in segments, too."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer."""

    text: str
    """Without its thinking."""
    thinking_tokens: int
    output_tokens: int
    """Everything generated, forced tokens included."""
    forced_tokens: int = 0
    waits_used: int = 0
    end_reason: str | None = None
    finish_reason: str | None = None
    mean_logprob: float | None = None
    """Mean log-probability of the sampled tokens, if the ask wanted log-probabilities."""
    estimated: bool = False
    """The server did not say how many tokens were thinking: told from the length of the texts."""
    segments: tuple[Segment, ...] = ()


@dataclass(frozen=True, slots=True)
class EvalResponse:
    """What came of an ask: samples, or why there are none."""

    request: EvalRequest
    samples: tuple[Sample, ...]
    seconds: float
    """From submission until the last sample was finished."""
    error: str | None = None
    checkpoints: tuple[tuple[int, Sample], ...] = ()
    """Budget and answer of each checkpoint that ``ask.params`` has, of the first sample."""


class Backend(Protocol):
    """Something that answers."""

    @property
    def name(self) -> str:
        """The model, as results name it."""

    @property
    def max_thinking(self) -> int | None:
        """The largest budget that can have a meaning; None if that is unknown."""

    @property
    def can_think(self) -> bool:
        """Can it keep to a thinking budget, as far as it is known?"""

    @property
    def generated_tokens(self) -> int:
        """Tokens generated so far, over everything; for a progress bar."""

    def submit(self, request: EvalRequest) -> None:
        """Starts an ask. What is wrong with it comes back in its reply."""

    def responses(self) -> Iterator[EvalResponse]:
        """Yields until nothing that was submitted is outstanding. Whoever stops reading early
        drops what is left."""
