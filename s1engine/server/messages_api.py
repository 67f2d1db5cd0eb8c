"""``POST /v1/messages`` in Anthropic's shape: its body as a chat, and its answer as blocks.

Thinking is a block of its own before the text. ``thinking.budget_tokens`` is exact here, as every
budget is; our own thinking fields may stand beside it.
"""

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from s1engine.errors import RequestError
from s1engine.outputs import CheckpointOutput, Chunk, CompletionOutput, RequestOutput
from s1engine.server.answers import Answers, Head, Json, sse, thinking_total
from s1engine.server.protocol import ChatRequest
from s1engine.server.thinking import STRICT, ThinkingFields

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "abort": "end_turn"}
SILENT_BLOCKS = ("thinking", "redacted_thinking")  # of earlier turns: not shown to the model again


class Message(BaseModel):
    """One turn."""

    model_config = STRICT

    role: Literal["user", "assistant"]
    content: str | list[dict[str, Any]]

    def text(self) -> str:
        """All its text. Raises RequestError on what is no text."""
        return self.content if isinstance(self.content, str) else _text("messages", self.content)


class MessagesRequest(ThinkingFields):
    """Body of ``POST /v1/messages``."""

    model: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: int
    system: str | list[dict[str, Any]] | None = None
    stop_sequences: list[str] | None = None
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    metadata: dict[str, Any] | None = None
    seed: int | None = None
    timeout: Annotated[float | None, Field(gt=0)] = None

    def chat(self) -> ChatRequest:
        """The same as a chat. Raises RequestError."""
        system = self.system
        turns = [{"role": turn.role, "content": turn.text()} for turn in self.messages]
        if system is not None:
            text = system if isinstance(system, str) else _text("system", system)
            turns.insert(0, {"role": "system", "content": text})
        same = {*ThinkingFields.model_fields, "model", "max_tokens", "stream", "temperature"}
        same |= {"top_p", "top_k", "seed", "timeout"}
        fields = self.model_dump(include=same, exclude_none=True)
        return ChatRequest.model_validate(
            {**fields, "messages": turns, "stop": self.stop_sequences}
        )


def _text(param: str, blocks: Sequence[dict[str, Any]]) -> str:
    texts = []
    for block in blocks:
        if block.get("type") in SILENT_BLOCKS:
            continue
        if block.get("type") != "text" or not isinstance(block.get("text"), str):
            raise RequestError(f"{param}: only blocks of text are supported", param=param)
        texts.append(block["text"])
    return "".join(texts)


class MessagesAnswers(Answers):
    """A message, or the events of one."""

    def __init__(self, head: Head, samples: int) -> None:
        super().__init__(head, samples)
        self._open: str | None = None  # kind of the block that grows
        self._blocks = 0

    def whole(self, outputs: Sequence[RequestOutput]) -> Json:
        (output,) = outputs
        (sample,) = output.outputs
        content: list[Json] = []
        if sample.reasoning:
            content.append({"type": "thinking", "thinking": sample.reasoning, "signature": ""})
        content.append({"type": "text", "text": sample.text})
        return self._message(content, _reason(sample)) | {"usage": _usage(output)}

    def _message(self, content: list[Json], reason: Json) -> Json:
        head = self.head
        kind = {"id": head.id, "type": "message", "role": "assistant", "model": head.model}
        return {**kind, "content": content, **reason}

    def begin(self) -> Iterable[bytes]:
        reason = {"stop_reason": None, "stop_sequence": None}
        usage = {"usage": {"input_tokens": 0, "output_tokens": 0}}
        yield _event("message_start", message=self._message([], reason) | usage)

    def event(self, prompt: int, event: Chunk | CheckpointOutput) -> Iterable[bytes]:
        """Checkpoints, for which this shape has no place, come with the usage."""
        if not isinstance(event, Chunk):
            return
        if event.reasoning:
            yield from self._grow("thinking", {"type": "thinking_delta"}, event.reasoning)
        if event.text:
            yield from self._grow("text", {"type": "text_delta"}, event.text)

    def _grow(self, kind: str, delta: Json, text: str) -> Iterable[bytes]:
        if self._open != kind:
            yield from self._close()
            block: Json = {"type": kind, kind: ""}
            block |= {"signature": ""} if kind == "thinking" else {}
            yield _event("content_block_start", index=self._blocks, content_block=block)
            self._open = kind
        yield _event("content_block_delta", index=self._blocks, delta=delta | {kind: text})

    def _close(self) -> Iterable[bytes]:
        if self._open is not None:
            yield _event("content_block_stop", index=self._blocks)
            self._blocks += 1
            self._open = None

    def end(self, outputs: Sequence[RequestOutput]) -> Iterable[bytes]:
        yield from self._close()
        (output,) = outputs
        yield _event("message_delta", delta=_reason(output.outputs[0]), usage=_usage(output))
        yield _event("message_stop")

    def failed(self, message: str, code: str) -> Iterable[bytes]:
        yield _event("error", error={"type": "api_error", "message": message, "code": code})


def _event(kind: str, **fields: Any) -> bytes:
    return sse({"type": kind, **fields}, kind)


def _reason(sample: CompletionOutput) -> Json:
    if isinstance(sample.stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": sample.stop_reason}
    return {"stop_reason": STOP_REASONS[sample.finish_reason], "stop_sequence": None}


def _usage(output: RequestOutput) -> Json:
    usage = output.usage
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion_tokens,
        "thinking": thinking_total([sample.thinking for sample in output.outputs]),
        "checkpoints": [checkpoint.to_json() for checkpoint in output.checkpoints],
    }
