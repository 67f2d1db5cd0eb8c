"""What responses of OpenAI's chats and completions share: choices, checkpoints, usage.

Thinking is in ``reasoning``, and for older clients in ``reasoning_content``. Our own figures beyond
OpenAI's schema are in ``usage.thinking`` and ``choices[].thinking``.
"""

from abc import abstractmethod
from collections.abc import Iterable, Sequence

from s1engine.outputs import (
    CheckpointOutput,
    Chunk,
    CompletionOutput,
    RequestOutput,
)
from s1engine.prompt_logprobs import PromptLogprobs
from s1engine.server.api.logprobs import prompt_logprobs
from s1engine.server.api.request_fields import HttpFields
from s1engine.server.api.response_formatter import (
    DONE,
    Json,
    ResponseFormatter,
    ResponseHead,
    sse,
    thinking_total,
    usage,
)
from s1engine.server.json_pieces import INLINE_ITEMS, event_pieces
from s1engine.tokenizer import Tokenizer


class OpenAIFormatter(ResponseFormatter):
    """A response of choices; the last event of a stream holds the usage if requested.

    Args:
        body: the request.
    """

    kind: str
    chunk_kind: str

    def __init__(
        self, head: ResponseHead, samples: int, tokenizer: Tokenizer, body: HttpFields
    ) -> None:
        super().__init__(head, samples)
        self._tokenizer = tokenizer
        self._token_ids = body.return_token_ids
        self._stream_usage = body.stream_usage
        self._prompt_logprobs = body.prompt_logprobs
        self._completion_tokens = 0  # streamed so far

    def format_response(self, outputs: Sequence[RequestOutput]) -> Json:
        choices = [
            self.choice(i * self._samples + sample.index, sample, output.prompt_logprobs)
            for i, output in enumerate(outputs)
            for sample in output.outputs
        ]
        checkpoints = [
            self.checkpoint(i * self._samples, checkpoint)
            for i, output in enumerate(outputs)
            for checkpoint in output.checkpoints
        ]
        answer = {**self._object(self.kind), "choices": choices, "usage": usage(outputs)}
        return answer | ({"checkpoints": checkpoints} if checkpoints else {})

    def chunk_events(self, prompt: int, event: Chunk | CheckpointOutput) -> Iterable[bytes]:
        """Format a chunk as a choice; a checkpoint has no choices, like usage."""
        first = prompt * self._samples
        if isinstance(event, Chunk):
            new: Json = {"choices": [self.delta(first + event.index, event)]}
            if self._stream_usage.continuous_usage_stats:
                new["usage"] = self._usage_so_far(event)
        else:
            new = {"choices": [], "checkpoint": self.checkpoint(first, event)}
        if isinstance(event, Chunk) and _is_long(event):
            yield from event_pieces(self._object(self.chunk_kind) | new)
        else:
            yield sse(self._object(self.chunk_kind) | new)

    def end_events(self, outputs: Sequence[RequestOutput]) -> Iterable[bytes]:
        if self._stream_usage.include_usage:
            yield sse(self._object(self.chunk_kind) | {"choices": [], "usage": usage(outputs)})
        yield DONE

    def _usage_so_far(self, chunk: Chunk) -> Json:
        self._completion_tokens += len(chunk.token_ids)
        prompt, completion = self.head.prompt_tokens, self._completion_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }

    def _object(self, kind: str) -> Json:
        head = self.head
        return {"id": head.id, "object": kind, "created": head.created, "model": head.model}

    def prompt_fields(self, scores: PromptLogprobs | None) -> Json:
        """Return the field of ``prompt_logprobs``, if it was sent."""
        if scores is None or self._prompt_logprobs is None:
            return {}
        own = prompt_logprobs(scores, self._prompt_logprobs, self._tokenizer)
        return {"prompt_logprobs": own}

    @abstractmethod
    def choice(self, index: int, sample: CompletionOutput, prompt: PromptLogprobs | None) -> Json:
        """Format a finished sample of a prompt."""

    @abstractmethod
    def delta(self, index: int, chunk: Chunk) -> Json:
        """Format new text of a sample."""

    def checkpoint(self, first: int, checkpoint: CheckpointOutput) -> Json:
        """Format an answer at a smaller budget; ``first``: index of the prompt's first choice."""
        sample = checkpoint.output
        return {
            "index": first + sample.index,
            "budget": checkpoint.budget,
            "text": sample.text,
            "reasoning_chars": len(sample.reasoning or ""),
            "completion_tokens": len(sample.token_ids),
            "finish_reason": shown_reason(sample.finish_reason),
            "thinking": thinking_total([sample.thinking]),
            **(token_fields(sample) if self._token_ids else {}),
        }


def _is_long(chunk: Chunk) -> bool:
    """Does the chunk hold lists that are made while they are sent?"""
    return len(chunk.token_ids) + len(chunk.prompt_logprobs or ()) > INLINE_ITEMS


def shown_reason(finish_reason: str | None) -> str | None:
    """Return the reason that clients know: a deadline cut the output, as max_tokens does."""
    return "length" if finish_reason == "deadline" else finish_reason


def token_fields(source: CompletionOutput | Chunk) -> Json:
    """Return the fields of ``return_token_ids``."""
    return {"token_ids": source.token_ids, "forced": source.forced}
