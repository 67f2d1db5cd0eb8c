"""A request in its compiled form: token ids, limits, and the effective thinking budget.

Plain data that can cross processes. RequestCompiler creates it; afterwards a user error in it is
impossible.
"""

import time
from dataclasses import dataclass, field

import numpy as np

from s1engine import _core
from s1engine.errors import RequestError
from s1engine.reasoning import AnswerMarkers
from s1engine.sampling_params import NO_PENALTIES, SamplingParams


@dataclass(frozen=True, slots=True)
class CompiledBudget:
    """A thinking budget in token ids, fitted into what max_tokens and the context leave."""

    wait: list[int]  # replaces an ignored end of thinking
    forced_end: list[int]
    delimiter_len: int  # leading tokens of forced_end that belong to the delimiter
    min_thinking: int
    num_waits: int
    tokens_thought: int  # thinking tokens that the prompt already contains
    max_thinking: int  # effective maximum, tokens_thought included
    checkpoints: tuple[int, ...]
    loop_repeats: int  # 0: no loop detection
    calls: bool = False  # the answer may call tools
    end_markers: tuple[str, ...] = ()  # of the format: ends that the model writes in several tokens

    def core_params(self, core_format: _core.BudgetFormat | None) -> _core.BudgetParams:
        """The part of the budget that the scheduler's state machine needs."""
        assert core_format is not None, "only a model with a reasoning format thinks"
        return _core.BudgetParams(
            format=core_format,
            wait=self.wait,
            forced_end=self.forced_end,
            delimiter_len=self.delimiter_len,
            min_thinking=self.min_thinking,
            num_waits=self.num_waits,
        )


@dataclass(slots=True)
class Request:
    """A validated request, ready for the scheduler."""

    request_id: str
    number: int  # unique among the requests that this process compiles
    prompt: np.ndarray  # [prompt_len] int32, thinking opened
    params: SamplingParams  # the structure of the answer is a grammar
    max_len: int  # prompt and output together
    stop_tokens: list[int]
    budget: CompiledBudget | None  # None: the request does not think
    markers: AnswerMarkers | None  # that its answers do not show
    stream: bool
    priority: int
    salt: bytes  # 16 bytes
    num_given: int = 0  # leading prompt tokens that the user gave; the engine added the others
    pin: bool = False  # its full blocks are pinned, its one token is dropped
    client: int = 0  # that shares the engine fairly with others
    arrival: float = field(default_factory=time.monotonic)  # deadlines count from it

    @property
    def needs_output_processing(self) -> bool:
        """True if its own text decides how it goes on (stop strings, agreeing checkpoints), so
        that the engine itself must build that text step by step."""
        budget = self.params.thinking
        if self.params.stop:
            return True
        return budget is not None and budget.early_exit is not None

    @property
    def num_to_score(self) -> int:
        """Leading prompt tokens whose logits are wanted, because each scores the next one."""
        return 0 if self.params.prompt_logprobs is None else max(self.num_given - 1, 0)

    @property
    def thinking_deadline(self) -> float | None:
        """Time (monotonic, s) at which thinking must end."""
        budget = self.params.thinking
        return None if self.budget is None or budget is None else self._at(budget.deadline_ms)

    @property
    def first_token_deadline(self) -> float | None:
        """Time at which the request ends if it has no token yet."""
        return self._at(self.params.first_token_deadline_ms)

    @property
    def deadline(self) -> float | None:
        """Time at which the request ends."""
        return self._at(self.params.deadline_ms)

    def _at(self, milliseconds: int | None) -> float | None:
        return None if milliseconds is None else self.arrival + milliseconds / 1000

    @property
    def interactive(self) -> bool:
        """True if a reader or a deadline waits for its tokens, so that no step should be long."""
        deadlines = self.thinking_deadline, self.first_token_deadline, self.deadline
        return self.stream or any(at is not None for at in deadlines)


def id_is_taken(request: Request) -> RequestError:
    """The error of a request whose id a live request has."""
    message = f"request_id {request.request_id!r} is taken by a live request"
    return RequestError(message, param="request_id")


def drafting_mode(params: SamplingParams) -> _core.Drafting:
    """When the scheduler may draft tokens for a request with these parameters.

    NEVER with penalties and logits processors, which depend on tokens that a draft can only guess,
    and with log-probabilities, which come one row per step. THINKING with a grammar, which limits
    the answer alone. Else ALWAYS.
    """
    ruled = params.penalties != NO_PENALTIES or params.logits_processors
    if ruled or params.logprobs is not None:
        return _core.Drafting.NEVER
    return _core.Drafting.ALWAYS if params.grammar is None else _core.Drafting.THINKING
