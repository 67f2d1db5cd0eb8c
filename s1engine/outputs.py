"""The output of a request: streamed chunks, and the finished whole.

Plain data with ``to_json``. Knows nothing of HTTP: the server formats it into its own schemas.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from s1engine.prompt_logprobs import PromptLogprobs

FinishReason = Literal["stop", "length", "abort", "deadline"]
EndReason = Literal[
    "natural",
    "budget",
    "deadline",
    "client",
    "loop",
    "converged",
    "length",
    "abort",
    "overload",
]


@dataclass(frozen=True, slots=True)
class ThinkingUsage:
    """How one sample thought."""

    tokens: int
    """Tokens between start and end delimiter, including injected wait tokens."""
    forced_tokens: int
    """All injected tokens: wait texts, forced and natural ends, final texts."""
    waits_used: int
    """Number of the model's ends that the wait text replaced."""
    end_reason: EndReason | None
    """Why the thinking ended; None while the sample thinks."""
    budget: int
    """The effective maximum, limited by max_tokens, context and answer reserve."""


@dataclass(frozen=True, slots=True)
class RowLogprobs:
    """Raw log-probabilities at one sampled position."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of one generated token under the model's raw distribution."""

    token_id: int
    logprob: float
    """0 for a forced token, whose probability is 1."""
    top: tuple[tuple[int, float], ...]
    """The k likeliest tokens and their log-probabilities, best first."""
    forced: bool
    thinking: bool = False
    """It belongs to the thinking or its delimiters, not to the answer."""
    shown: bytes = b""
    """What it adds to the text or the reasoning, in UTF-8: nothing for a special token, a
    delimiter, an end and newlines directly after a delimiter. Tokens of a stop string, and of a
    marker that is spelt out in an answer, keep their bytes."""


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One finished sample."""

    index: int
    text: str
    """The answer; everything, if the sample did not think."""
    reasoning: str | None
    """The thinking; None if the sample did not think."""
    token_ids: list[int]
    """All generated tokens, including forced ones."""
    forced: list[int]
    """0 or 1 per token: 1 if it was injected, not sampled."""
    finish_reason: FinishReason
    """``stop``: the model's own end, a stop string or a stop id. ``length``: max_tokens or the
    context. ``abort``: cancelled. ``deadline``: the request's deadline has passed."""
    stop_reason: str | int | None
    """The stop string or id that ended the answer; None for the model's own end."""
    thinking: ThinkingUsage | None
    logprobs: list[TokenLogprob] | None
    self_opened_tokens: int = 0
    """Thinking tokens of a sample that was not to think: the model opened the thinking itself."""

    def to_json(self) -> dict[str, Any]:
        """The object that ``s1engine generate --json`` prints for this sample."""
        thinking = self.thinking
        return {
            "text": self.text,
            "reasoning": self.reasoning,
            "token_ids": self.token_ids,
            "forced": self.forced,
            "finish_reason": self.finish_reason,
            "thinking": {
                "tokens": thinking.tokens if thinking else 0,
                "forced_tokens": thinking.forced_tokens if thinking else 0,
                "waits_used": thinking.waits_used if thinking else 0,
                "end_reason": thinking.end_reason if thinking else None,
                "budget": thinking.budget if thinking else None,
            },
        }


@dataclass(frozen=True, slots=True)
class CheckpointOutput:
    """The answer at a smaller budget, equal to that of a separate request with this budget."""

    budget: int
    output: CompletionOutput
    shared: bool = False
    """True if the thinking ended before this budget: this is then the sample's own answer."""

    def to_json(self) -> dict[str, Any]:
        """One object of ``checkpoints``."""
        return {"budget": self.budget, "index": self.output.index, **self.output.to_json()}


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a request over all its samples."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    """Prompt tokens of the first sample that the prefix cache held."""
    reasoning_tokens: int
    checkpoint_tokens: int = 0
    """Tokens of answers at checkpoints; completion_tokens does not include them."""

    def to_json(self) -> dict[str, Any]:
        """OpenAI's usage fields, and ours."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "cached_tokens": self.cached_tokens,
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
            "checkpoint_tokens": self.checkpoint_tokens,
        }


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds since the request arrived."""

    queue_s: float
    """Until the request was first scheduled."""
    ttft_s: float
    """Until the first token."""
    total_s: float
    """Until the last sample finished."""


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A finished request."""

    request_id: str
    prompt_token_ids: list[int]
    """The prompt as the model computes it: chat template applied, thinking opened."""
    outputs: list[CompletionOutput]
    usage: Usage
    timing: Timing
    checkpoints: list[CheckpointOutput] = field(default_factory=list)
    """By sample, then by budget; checkpoints that a deadline or the client cut off are missing."""
    prompt_logprobs: PromptLogprobs | None = None
    """Of each token of the prompt as it was given, without what opens or closes the thinking."""

    def to_json(self) -> dict[str, Any]:
        """The object that ``s1engine generate --json`` prints for this request."""
        scores = self.prompt_logprobs
        return {
            "prompt_token_ids": self.prompt_token_ids,
            **({} if scores is None else {"prompt_logprobs": [i and i.to_json() for i in scores]}),
            "outputs": [output.to_json() for output in self.outputs],
            "checkpoints": [checkpoint.to_json() for checkpoint in self.checkpoints],
            "usage": self.usage.to_json(),
            "timing": {
                "queue_s": self.timing.queue_s,
                "ttft_s": self.timing.ttft_s,
                "total_s": self.timing.total_s,
            },
        }


@dataclass(frozen=True, slots=True)
class Chunk:
    """New output of one sample; concatenated, the chunks equal the finished output."""

    index: int
    text: str = ""
    reasoning: str = ""
    token_ids: list[int] = field(default_factory=list)
    forced: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    """Set on the last chunk of a sample."""
    prompt_logprobs: PromptLogprobs | None = None
    """On the first chunk of a sample, if asked for."""
