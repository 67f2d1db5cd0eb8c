"""Finished outputs and chunks in the shape of OpenAI's objects. Plain data in, plain data out.

Thinking stands in ``reasoning`` and, for older clients, ``reasoning_content``, apart from the
answer; what is ours beyond OpenAI's schema stands in ``usage.thinking`` and ``choices[].thinking``.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

from s1engine.outputs import (
    CheckpointOutput,
    Chunk,
    CompletionOutput,
    RequestOutput,
    ThinkingUsage,
    TokenLogprob,
    Usage,
)
from s1engine.tokenizer import Tokenizer

Json = dict[str, Any]


def usage(outputs: Sequence[RequestOutput]) -> Json:
    """Token counts over all prompts and samples of one HTTP request."""
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
    """Sums over samples; end reason and budget only where all samples agree."""
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


class Answers(ABC):
    """Objects of one route for one request.

    Args:
        token_ids: add ids and the mask of forced ones to each choice.
    """

    kind: str

    def __init__(self, tokenizer: Tokenizer, *, token_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._token_ids = token_ids

    @abstractmethod
    def choice(self, index: int, sample: CompletionOutput) -> Json:
        """A finished sample."""

    @abstractmethod
    def delta(self, index: int, chunk: Chunk) -> Json:
        """What a sample gained in a step."""

    def event(self, first: int, event: Chunk | CheckpointOutput) -> Json:
        """What is new in an event of a stream; ``first`` is the index of its prompt's first
        choice. A checkpoint comes without choices, as usage does."""
        if isinstance(event, Chunk):
            return {"choices": [self.delta(first + event.index, event)]}
        return {"choices": [], "checkpoint": self.checkpoint(first, event)}

    def checkpoint(self, first: int, checkpoint: CheckpointOutput) -> Json:
        """The answer of a choice at a smaller budget."""
        sample = checkpoint.output
        return {
            "index": first + sample.index,
            "budget": checkpoint.budget,
            "text": sample.text,
            "completion_tokens": len(sample.token_ids),
            "finish_reason": sample.finish_reason,
            "thinking": thinking_total([sample.thinking]),
            **(_tokens(sample) if self._token_ids else {}),
        }


class ChatAnswers(Answers):
    """Objects of ``/v1/chat/completions`` for one request."""

    kind = "chat.completion"

    def __init__(self, tokenizer: Tokenizer, *, token_ids: bool) -> None:
        super().__init__(tokenizer, token_ids=token_ids)
        self._begun: set[int] = set()  # choices whose first chunk is out

    def choice(self, index: int, sample: CompletionOutput) -> Json:
        message = {
            "role": "assistant",
            "content": sample.text,
            "reasoning": sample.reasoning,
            "reasoning_content": sample.reasoning,
        }
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(sample.logprobs),
            "finish_reason": sample.finish_reason,
            "stop_reason": sample.stop_reason,
            "thinking": thinking_total([sample.thinking]) if sample.thinking else None,
            **(_tokens(sample) if self._token_ids else {}),
        }

    def delta(self, index: int, chunk: Chunk) -> Json:
        delta: Json = {} if index in self._begun else {"role": "assistant"}
        self._begun.add(index)
        if chunk.reasoning:
            delta |= {"reasoning": chunk.reasoning, "reasoning_content": chunk.reasoning}
        if chunk.text or "role" in delta:
            delta["content"] = chunk.text
        return {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs(chunk.logprobs),
            "finish_reason": chunk.finish_reason,
            **(_tokens(chunk) if self._token_ids else {}),
        }

    def _logprobs(self, entries: list[TokenLogprob] | None) -> Json | None:
        if entries is None:
            return None
        return {"content": [self._entry(entry) for entry in entries]}

    def _entry(self, entry: TokenLogprob) -> Json:
        top = [self._token(token, logprob) for token, logprob in entry.top]
        own = self._token(entry.token_id, entry.logprob)
        return {**own, "top_logprobs": top, "forced": entry.forced}

    def _token(self, token: int, logprob: float) -> Json:
        data = self._tokenizer.token_bytes(token)
        return {"token": data.decode(errors="replace"), "bytes": list(data), "logprob": logprob}


class CompletionAnswers(Answers):
    """Objects of ``/v1/completions`` for one request."""

    kind = "text_completion"

    def __init__(self, tokenizer: Tokenizer, *, token_ids: bool) -> None:
        super().__init__(tokenizer, token_ids=token_ids)
        self._offsets: dict[int, int] = {}  # characters of each choice's tokens so far

    def choice(self, index: int, sample: CompletionOutput) -> Json:
        return {
            "index": index,
            "text": sample.text,
            "reasoning": sample.reasoning,
            "logprobs": self._logprobs(index, sample.logprobs),
            "finish_reason": sample.finish_reason,
            "stop_reason": sample.stop_reason,
            "thinking": thinking_total([sample.thinking]) if sample.thinking else None,
            **(_tokens(sample) if self._token_ids else {}),
        }

    def delta(self, index: int, chunk: Chunk) -> Json:
        return {
            "index": index,
            "text": chunk.text,
            **({"reasoning": chunk.reasoning} if chunk.reasoning else {}),
            "logprobs": self._logprobs(index, chunk.logprobs),
            "finish_reason": chunk.finish_reason,
            **(_tokens(chunk) if self._token_ids else {}),
        }

    def _logprobs(self, index: int, entries: list[TokenLogprob] | None) -> Json | None:
        if entries is None:
            return None
        texts = [self._text(entry.token_id) for entry in entries]
        offset = self._offsets.get(index, 0)
        offsets = []
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        self._offsets[index] = offset
        return {
            "tokens": texts,
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [
                {self._text(token): logprob for token, logprob in entry.top} for entry in entries
            ],
            "text_offset": offsets,
            "forced": [int(entry.forced) for entry in entries],
        }

    def _text(self, token: int) -> str:
        return self._tokenizer.token_bytes(token).decode(errors="replace")


def _tokens(source: CompletionOutput | Chunk) -> Json:
    return {"token_ids": source.token_ids, "forced": source.forced}


def error_object(
    message: str, kind: str, param: str | None = None, code: str | None = None
) -> Json:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
