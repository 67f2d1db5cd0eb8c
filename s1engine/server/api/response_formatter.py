"""Base of the response formatters: a response is one JSON object, or a stream of events.

Plain data in, plain data out; each API has a file of its own.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from s1engine.outputs import CheckpointOutput, Chunk, RequestOutput, ThinkingUsage, Usage

Json = dict[str, Any]


def usage(outputs: Sequence[RequestOutput]) -> Json:
    """Return token counts over all prompts and samples of one HTTP request."""
    total = _total([output.usage for output in outputs])
    checkpoint_tokens = sum(output.usage.checkpoint_tokens for output in outputs)
    samples = [sample for output in outputs for sample in output.outputs]
    thinking = thinking_total([sample.thinking for sample in samples])
    return {
        "prompt_tokens": total.prompt_tokens,
        "completion_tokens": total.completion_tokens,
        "total_tokens": total.prompt_tokens + total.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": total.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": total.reasoning_tokens},
        "checkpoint_tokens": checkpoint_tokens,
        "thinking": thinking,
    }


def _total(usages: Iterable[Usage]) -> Usage:
    prompt = completion = cached = reasoning = 0
    for one in usages:
        prompt += one.prompt_tokens
        completion += one.completion_tokens
        cached += one.cached_tokens
        reasoning += one.reasoning_tokens
    return Usage(prompt, completion, cached, reasoning)


def thinking_total(samples: Sequence[ThinkingUsage | None]) -> Json:
    """Sum over samples; end reason and budget are None unless all samples agree."""
    used = [sample for sample in samples if sample is not None]
    reasons = {sample.end_reason for sample in used}
    budgets = {sample.budget for sample in used}
    return {
        "tokens": sum(sample.tokens for sample in used),
        "forced_tokens": sum(sample.forced_tokens for sample in used),
        "waits_used": sum(sample.waits_used for sample in used),
        "end_reason": reasons.pop() if len(reasons) == 1 else None,
        "budget": budgets.pop() if len(budgets) == 1 else None,
    }


def thinking_usage(output: RequestOutput) -> Json:
    """Return our own fields in the usage of APIs that have no other place for them."""
    return {
        "thinking": thinking_total([sample.thinking for sample in output.outputs]),
        "checkpoints": [checkpoint.to_json() for checkpoint in output.checkpoints],
    }


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """Fields that identify a response in each of its objects."""

    id: str
    created: int
    model: str
    prompt_tokens: int = 0
    """Of all prompts together."""


def call_id(head: ResponseHead, choice: int, index: int) -> str:
    """Return the id of a tool call, which its result will refer to."""
    own = head.id.replace("-", "_").partition("_")[2]
    return f"call_{own}_{choice}_{index}"


class ResponseFormatter(ABC):
    """Formats the response to one HTTP request, as one object or as events of a stream.

    Args:
        samples: choices of each prompt.
    """

    def __init__(self, head: ResponseHead, samples: int) -> None:
        self.head = head
        self._samples = samples

    @abstractmethod
    def format_response(self, outputs: Sequence[RequestOutput]) -> Json:
        """Return the object of a response without a stream; one output for each prompt."""

    def begin_events(self) -> Iterable[bytes]:
        """Return the events before any output."""
        return ()

    @abstractmethod
    def chunk_events(self, prompt: int, event: Chunk | CheckpointOutput) -> Iterable[bytes]:
        """Return the events for new output of the prompt with this index."""

    @abstractmethod
    def end_events(self, outputs: Sequence[RequestOutput]) -> Iterable[bytes]:
        """Return the last events; ``outputs`` come in any order."""

    def error_events(self, message: str, code: str) -> Iterable[bytes]:
        """Return the events that end a stream after an error."""
        return (sse(error_object(message, "server_error", code=code)), DONE)


def sse(value: Json, name: str | None = None) -> bytes:
    """Encode a server-sent event."""
    start = b"data: " if name is None else f"event: {name}\ndata: ".encode()
    return b"".join((start, msgspec.json.encode(value), b"\n\n"))


DONE = b"data: [DONE]\n\n"


def error_object(
    message: str, kind: str, param: str | None = None, code: str | None = None
) -> Json:
    """Return OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
