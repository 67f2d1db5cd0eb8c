"""``POST /v1/messages``, Anthropic's API: its body becomes a chat, its response is blocks.

Thinking is a block before the text; that of earlier turns reaches the chat template, which decides
whether the model sees it. ``thinking.budget_tokens`` is exact, like every budget; our own thinking
fields are accepted too. A chat that ends in an assistant's turn is continued. Tool calls are blocks
after the text; without a stream, a call whose arguments are not a JSON object stays text.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from s1engine.errors import RequestError
from s1engine.outputs import CompletionOutput, RequestOutput
from s1engine.server.api.block_formatter import BlockResponseFormatter
from s1engine.server.api.body import JsonObjects, LenientBody, Strings
from s1engine.server.api.chat_completions import ChatRequest
from s1engine.server.api.response_formatter import Json, ResponseHead, call_id, sse, thinking_usage
from s1engine.server.api.thinking_fields import ThinkingFields
from s1engine.server.api.tool_call_parser import CallBegin, ParsedAnswer

STOP_REASONS = {
    "stop": "end_turn",
    "length": "max_tokens",
    "deadline": "max_tokens",
    "abort": "end_turn",
}
THINKING_BLOCKS = ("thinking", "redacted_thinking")  # the latter holds no text


class Message(LenientBody):
    """One turn."""

    role: Literal["user", "assistant"]
    content: str | JsonObjects

    def turns(self) -> list[Json]:
        """Convert to messages of a chat; each tool result becomes a message before the text.

        Raises RequestError for an unknown block.
        """
        if isinstance(self.content, str):
            return [{"role": self.role, "content": self.content}]
        kind = "tool_use" if self.role == "assistant" else "tool_result"
        tools = [block for block in self.content if block.get("type") == kind]
        others = [block for block in self.content if block.get("type") != kind]
        if self.role == "assistant":
            return [_answer(tools, others)]
        if not tools:
            return [{"role": self.role, "content": _text("messages", others)}]
        texts = [{"role": "user", "content": _text("messages", others)}] if others else []
        return [*map(_result, tools), *texts]


def _answer(tools: Sequence[Json], others: Sequence[Json]) -> Json:
    """Return an assistant's message of its blocks."""
    thinking = [block for block in others if block.get("type") in THINKING_BLOCKS]
    texts = [block for block in others if block.get("type") not in THINKING_BLOCKS]
    message: Json = {"role": "assistant", "content": _text("messages", texts)}
    reasoning = "".join(_thinking(block) for block in thinking)
    if reasoning:
        message["reasoning_content"] = reasoning
    if tools:
        message["tool_calls"] = [_call(block) for block in tools]
    return message


def _thinking(block: Json) -> str:
    text = block.get("thinking", "")
    if not isinstance(text, str):
        raise RequestError("messages: a thinking block must hold text", param="messages")
    return text


def _call(block: Json) -> Json:
    function = {"name": block.get("name"), "arguments": block.get("input")}
    return {"id": block.get("id"), "type": "function", "function": function}


def _result(block: Json) -> Json:
    content = block.get("content")
    if isinstance(content, list):
        content = _text("messages", content)
    name = block.get("tool_use_id")
    return {"role": "tool", "tool_call_id": name, "content": "" if content is None else content}


class MessagesTool(LenientBody):
    """One of ``tools``."""

    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any]

    def to_chat(self) -> Json:
        """Convert to a tool of a chat."""
        function: Json = {"name": self.name, "parameters": self.input_schema}
        if self.description is not None:
            function["description"] = self.description
        return {"type": "function", "function": function}


class ToolChoice(LenientBody):
    """``tool_choice``."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    def to_chat(self) -> Json:
        """Convert to fields of a chat."""
        choice: Any = {"any": "required"}.get(self.type, self.type)
        if self.type == "tool":
            choice = {"type": "function", "function": {"name": self.name}}
        fields: Json = {"tool_choice": choice}
        if self.disable_parallel_tool_use is not None:
            fields["parallel_tool_calls"] = not self.disable_parallel_tool_use
        return fields


class MessagesRequest(ThinkingFields):
    """Body of ``POST /v1/messages``."""

    model: str | None = None
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1)]
    max_tokens: int
    system: str | JsonObjects | None = None
    stop_sequences: Strings | None = None
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    tools: Annotated[list[MessagesTool], Field(fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    seed: int | None = None
    timeout: Annotated[float | None, Field(gt=0)] = None

    def to_chat(self) -> ChatRequest:
        """Convert to a chat. Raises RequestError."""
        system = self.system
        turns = [chat for turn in self.messages for chat in turn.turns()]
        if system is not None:
            text = system if isinstance(system, str) else _text("system", system)
            turns.insert(0, {"role": "system", "content": text})
        same = {*ThinkingFields.model_fields, "model", "max_tokens", "stream", "temperature"}
        same |= {"top_p", "top_k", "seed", "timeout"}
        fields = self.model_dump(include=same, exclude_none=True)
        fields |= self.tool_choice.to_chat() if self.tool_choice else {}
        fields["tools"] = [tool.to_chat() for tool in self.tools or ()]
        return ChatRequest.model_validate(
            {**fields, "messages": turns, "stop": self.stop_sequences}
        )


def _text(param: str, blocks: Sequence[dict[str, Any]]) -> str:
    texts = []
    for block in blocks:
        if block.get("type") != "text" or not isinstance(block.get("text"), str):
            raise RequestError(f"{param}: only blocks of text are supported", param=param)
        texts.append(block["text"])
    return "".join(texts)


class MessagesFormatter(BlockResponseFormatter):
    """Formats a message, or its events."""

    def __init__(self, head: ResponseHead, samples: int, calls: bool, once: bool) -> None:
        super().__init__(head, samples, calls, once)
        self._called = False
        self._open: str | None = None  # kind of the current block
        self._blocks = 0

    def format_response(self, outputs: Sequence[RequestOutput]) -> Json:
        (output,) = outputs
        (sample,) = output.outputs
        content: list[Json] = []
        if sample.reasoning:
            content.append({"type": "thinking", "thinking": sample.reasoning, "signature": ""})
        answer = self.parse_answer(sample.text)
        inputs = [_object(call.arguments) for call in answer.calls]
        if None in inputs:
            answer, inputs = ParsedAnswer(sample.text), []
        if answer.text or not answer.calls:
            content.append({"type": "text", "text": answer.text})
        for i, call in enumerate(answer.calls):
            content.append(self._tool_use(i, call.name) | {"input": inputs[i]})
        self._called = bool(answer.calls)
        return self._message(content, self._reason(sample)) | {"usage": _usage(output)}

    def _tool_use(self, index: int, name: str) -> Json:
        call = call_id(self.head, 0, index)
        return {"type": "tool_use", "id": call, "name": name, "input": {}}

    def _message(self, content: list[Json], reason: Json) -> Json:
        head = self.head
        kind = {"id": head.id, "type": "message", "role": "assistant", "model": head.model}
        return {**kind, "content": content, **reason}

    def begin_events(self) -> Iterable[bytes]:
        reason = {"stop_reason": None, "stop_sequence": None}
        usage = {"usage": {"input_tokens": 0, "output_tokens": 0}}
        yield _event("message_start", message=self._message([], reason) | usage)

    def reasoning_events(self, text: str) -> Iterable[bytes]:
        return self._grow("thinking", {"type": "thinking_delta"}, text)

    def text_events(self, text: str) -> Iterable[bytes]:
        return self._grow("text", {"type": "text_delta"}, text)

    def tool_call_events(self, begin: CallBegin) -> Iterable[bytes]:
        yield from self._close()
        yield self._start("tool_use", self._tool_use(begin.index, begin.name))
        self._called = True

    def argument_events(self, text: str) -> Iterable[bytes]:
        delta = {"type": "input_json_delta", "partial_json": text}
        yield _event("content_block_delta", index=self._blocks, delta=delta)

    def _grow(self, kind: str, delta: Json, text: str) -> Iterable[bytes]:
        if self._open != kind:
            yield from self._close()
            block: Json = {"type": kind, kind: ""}
            block |= {"signature": ""} if kind == "thinking" else {}
            yield self._start(kind, block)
        yield _event("content_block_delta", index=self._blocks, delta=delta | {kind: text})

    def _start(self, kind: str, block: Json) -> bytes:
        self._open = kind
        return _event("content_block_start", index=self._blocks, content_block=block)

    def _close(self) -> Iterable[bytes]:
        if self._open is not None:
            yield _event("content_block_stop", index=self._blocks)
            self._blocks += 1
            self._open = None

    def end_events(self, outputs: Sequence[RequestOutput]) -> Iterable[bytes]:
        yield from self._close()
        (output,) = outputs
        yield _event("message_delta", delta=self._reason(output.outputs[0]), usage=_usage(output))
        yield _event("message_stop")

    def _reason(self, sample: CompletionOutput) -> Json:
        if isinstance(sample.stop_reason, str) and not self._called:
            return {"stop_reason": "stop_sequence", "stop_sequence": sample.stop_reason}
        called = self._called and sample.finish_reason == "stop"
        reason = "tool_use" if called else STOP_REASONS[sample.finish_reason]
        return {"stop_reason": reason, "stop_sequence": None}

    def error_events(self, message: str, code: str) -> Iterable[bytes]:
        yield _event("error", error={"type": "api_error", "message": message, "code": code})


def _event(kind: str, **fields: Any) -> bytes:
    return sse({"type": kind, **fields}, kind)


def _object(text: str) -> Json | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _usage(output: RequestOutput) -> Json:
    usage = output.usage
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion_tokens,
        **thinking_usage(output),
    }
