"""Responses of Anthropic's API: a message of blocks, or its events.

Thinking is a block before the text, tool calls are blocks after it. Without a stream, a call whose
arguments are not a JSON object is text; the calls beside it stay calls.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from s1engine.outputs import CompletionOutput, RequestOutput
from s1engine.server.api.block_formatter import BlockResponseFormatter
from s1engine.server.api.call_syntax import ToolCall
from s1engine.server.api.response_formatter import Json, ResponseHead, call_id, sse, thinking_usage
from s1engine.server.api.tool_call_parser import CallBegin, ToolCallParser
from s1engine.tool_prompt import OPEN

STOP_REASONS = {
    "stop": "end_turn",
    "length": "max_tokens",
    "deadline": "max_tokens",
    "abort": "end_turn",
}
SIGNATURE = "unsigned"  # of thinking; clients drop blocks that have none


class MessagesFormatter(BlockResponseFormatter):
    """Formats a message, or its events.

    Args:
        shows_thinking: else a block of thinking is empty.
    """

    def __init__(
        self,
        head: ResponseHead,
        samples: int,
        parser: ToolCallParser | None,
        shows_thinking: bool,
    ) -> None:
        super().__init__(head, samples, parser)
        self._shows_thinking = shows_thinking
        self._called = False
        self._open: str | None = None  # kind of the current block
        self._blocks = 0

    def format_response(self, outputs: Sequence[RequestOutput]) -> Json:
        (output,) = outputs
        (sample,) = output.outputs
        content: list[Json] = []
        if sample.reasoning:
            text = sample.reasoning if self._shows_thinking else ""
            content.append({"type": "thinking", "thinking": text, "signature": SIGNATURE})
        blocks = self.answer_blocks(sample.text)
        calls = [block for block in blocks if isinstance(block, ToolCall)]
        if calls and all(_object(call.arguments) is None for call in calls):
            blocks = [sample.text]
        num_calls = 0
        for block in blocks:
            if isinstance(block, str):
                _add_text(content, block)
                continue
            arguments = _object(block.arguments)
            if arguments is None:
                _add_text(content, _as_text(block))
            else:
                content.append(self._tool_use(num_calls, block.name) | {"input": arguments})
                self._called = True
            num_calls += 1
        return self._message(content, self._reason(sample)) | {"usage": _usage(output)}

    def _tool_use(self, index: int, name: str) -> Json:
        call = call_id(self.head, 0, index)
        return {"type": "tool_use", "id": call, "name": name, "input": {}}

    def _message(self, content: list[Json], reason: Json) -> Json:
        head = self.head
        kind = {"id": head.id, "type": "message", "role": "assistant", "model": head.model}
        return {**kind, "content": content, **reason}

    # --- events ---

    def begin_events(self) -> Iterable[bytes]:
        reason = {"stop_reason": None, "stop_sequence": None}
        usage = {"input_tokens": self.head.prompt_tokens, "output_tokens": 0}
        yield _event("message_start", message=self._message([], reason) | {"usage": usage})

    def reasoning_events(self, text: str) -> Iterable[bytes]:
        return self._grow("thinking", {"type": "thinking_delta"}, text)

    def text_events(self, text: str) -> Iterable[bytes]:
        return self._grow("text", {"type": "text_delta"}, text)

    def tool_call_events(self, begin: CallBegin) -> Iterable[bytes]:
        yield from self._close()
        yield self._start("tool_use", self._tool_use(begin.index, begin.name))
        self._called = True

    def argument_events(self, text: str) -> Iterable[bytes]:
        yield self._delta({"type": "input_json_delta", "partial_json": text})

    def _grow(self, kind: str, delta: Json, text: str) -> Iterable[bytes]:
        if self._open != kind:
            yield from self._close()
            block: Json = {"type": kind, kind: ""}
            block |= {"signature": ""} if kind == "thinking" else {}
            yield self._start(kind, block)
        if kind != "thinking" or self._shows_thinking:
            yield self._delta(delta | {kind: text})

    def _delta(self, delta: Json) -> bytes:
        return _event("content_block_delta", index=self._blocks, delta=delta)

    def _start(self, kind: str, block: Json) -> bytes:
        self._open = kind
        return _event("content_block_start", index=self._blocks, content_block=block)

    def _close(self) -> Iterable[bytes]:
        if self._open is None:
            return
        if self._open == "thinking":
            yield self._delta({"type": "signature_delta", "signature": SIGNATURE})
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


def _add_text(content: list[Json], text: str) -> None:
    """Append a block of text, or extend the last one."""
    if content and content[-1]["type"] == "text":
        content[-1]["text"] += text
    else:
        content.append({"type": "text", "text": text})


def _as_text(call: ToolCall) -> str:
    """Write a call whose arguments are no object as the model began it."""
    return f'{OPEN}\n{{"name": {json.dumps(call.name)}, "arguments": {call.arguments}'


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
