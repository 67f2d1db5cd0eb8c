"""Answers in the shape of OpenAI's chats and completions.

Thinking stands in ``reasoning`` and, for older clients, ``reasoning_content``, apart from the
answer; what is ours beyond OpenAI's schema stands in ``usage.thinking`` and ``choices[].thinking``.
"""

from abc import abstractmethod
from collections.abc import Iterable, Sequence

from s1engine.outputs import (
    CheckpointOutput,
    Chunk,
    CompletionOutput,
    RequestOutput,
    TokenLogprob,
)
from s1engine.server.api.request_fields import ChatRequest, HttpFields
from s1engine.server.api.response_formatter import (
    DONE,
    Head,
    Json,
    ResponseFormatter,
    call_id,
    sse,
    thinking_total,
    usage,
)
from s1engine.server.api.tool_call_parser import CallBegin, Said, ToolCallParser, parse_tool_calls
from s1engine.tokenizer import Tokenizer


class OpenAIFormatter(ResponseFormatter):
    """What chats and completions share: choices, and usage in the last event if asked for.

    Args:
        body: the request.
    """

    kind: str
    chunk_kind: str

    def __init__(self, head: Head, samples: int, tokenizer: Tokenizer, body: HttpFields) -> None:
        super().__init__(head, samples)
        self._tokenizer = tokenizer
        self._token_ids = body.return_token_ids
        self._usage = body.includes_usage

    def whole(self, outputs: Sequence[RequestOutput]) -> Json:
        choices = [
            self.choice(i * self._samples + sample.index, sample)
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

    def event(self, prompt: int, event: Chunk | CheckpointOutput) -> Iterable[bytes]:
        """A checkpoint comes without choices, as usage does."""
        first = prompt * self._samples
        if isinstance(event, Chunk):
            new: Json = {"choices": [self.delta(first + event.index, event)]}
        else:
            new = {"choices": [], "checkpoint": self.checkpoint(first, event)}
        yield sse(self._object(self.chunk_kind) | new)

    def end(self, outputs: Sequence[RequestOutput]) -> Iterable[bytes]:
        if self._usage:
            yield sse(self._object(self.chunk_kind) | {"choices": [], "usage": usage(outputs)})
        yield DONE

    def _object(self, kind: str) -> Json:
        head = self.head
        return {"id": head.id, "object": kind, "created": head.created, "model": head.model}

    @abstractmethod
    def choice(self, index: int, sample: CompletionOutput) -> Json:
        """A finished sample."""

    @abstractmethod
    def delta(self, index: int, chunk: Chunk) -> Json:
        """What a sample gained."""

    def checkpoint(self, first: int, checkpoint: CheckpointOutput) -> Json:
        """The answer of a choice at a smaller budget; ``first`` is its prompt's first choice."""
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


class ChatFormatter(OpenAIFormatter):
    """Objects of ``/v1/chat/completions`` for one request."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(self, head: Head, samples: int, tokenizer: Tokenizer, body: ChatRequest) -> None:
        super().__init__(head, samples, tokenizer, body)
        self._begun: set[int] = set()  # choices whose first chunk is out
        self._calls = bool(body.offered)
        self._parsers: dict[int, ToolCallParser] = {}  # of streamed choices
        self._called: set[int] = set()  # choices that have called a tool

    def choice(self, index: int, sample: CompletionOutput) -> Json:
        said = parse_tool_calls(sample.text) if self._calls else Said(sample.text)
        message: Json = {
            "role": "assistant",
            "content": said.text if said.text or not said.calls else None,
            "reasoning": sample.reasoning,
            "reasoning_content": sample.reasoning,
        }
        if said.calls:
            message["tool_calls"] = [
                self._call(index, i, call.name, call.arguments) for i, call in enumerate(said.calls)
            ]
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(sample.logprobs),
            "finish_reason": _reason(sample.finish_reason, bool(said.calls)),
            "stop_reason": sample.stop_reason,
            "thinking": thinking_total([sample.thinking]) if sample.thinking else None,
            **(_tokens(sample) if self._token_ids else {}),
        }

    def delta(self, index: int, chunk: Chunk) -> Json:
        delta: Json = {} if index in self._begun else {"role": "assistant"}
        self._begun.add(index)
        if chunk.reasoning:
            delta |= {"reasoning": chunk.reasoning, "reasoning_content": chunk.reasoning}
        text = self._read(index, chunk, delta) if self._calls else chunk.text
        if text or "role" in delta:
            delta["content"] = text
        return {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs(chunk.logprobs),
            "finish_reason": _reason(chunk.finish_reason, index in self._called),
            **(_tokens(chunk) if self._token_ids else {}),
        }

    def _read(self, index: int, chunk: Chunk, delta: Json) -> str:
        """What of a chunk is text; its calls go into the delta."""
        parser = self._parsers.setdefault(index, ToolCallParser())
        text, calls = "", []
        for piece in parser.push(chunk.text, last=chunk.finish_reason is not None):
            if isinstance(piece, str):
                text += piece
            elif isinstance(piece, CallBegin):
                call = self._call(index, piece.index, piece.name, "")
                calls.append({"index": piece.index, **call})
            elif calls and calls[-1]["index"] == piece.index:
                calls[-1]["function"]["arguments"] += piece.text
            else:
                calls.append({"index": piece.index, "function": {"arguments": piece.text}})
        if calls:
            self._called.add(index)
            delta["tool_calls"] = calls
        return text

    def _call(self, choice: int, index: int, name: str, arguments: str) -> Json:
        function = {"name": name, "arguments": arguments}
        return {"id": call_id(self.head, choice, index), "type": "function", "function": function}

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


class CompletionFormatter(OpenAIFormatter):
    """Objects of ``/v1/completions`` for one request."""

    kind = chunk_kind = "text_completion"

    def __init__(self, head: Head, samples: int, tokenizer: Tokenizer, body: HttpFields) -> None:
        super().__init__(head, samples, tokenizer, body)
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


def _reason(finish_reason: str | None, called: bool) -> str | None:
    return "tool_calls" if called and finish_reason == "stop" else finish_reason


def _tokens(source: CompletionOutput | Chunk) -> Json:
    return {"token_ids": source.token_ids, "forced": source.forced}
