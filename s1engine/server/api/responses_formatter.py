"""Formats the response to ``POST /v1/responses``, whole or as events."""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from s1engine.outputs import Chunk, RequestOutput
from s1engine.server.api.block_formatter import BlockResponseFormatter
from s1engine.server.api.output_items import OutputItems
from s1engine.server.api.response_formatter import Json, ResponseHead, sse, thinking_usage
from s1engine.server.api.response_tools import ResponseTools
from s1engine.server.api.responses import ENCRYPTED, ResponsesRequest
from s1engine.server.api.tool_call_parser import CallBegin, ToolCallParser

CUT = ("length", "deadline")  # finish reasons of an incomplete response


class ResponsesFormatter(BlockResponseFormatter):
    """Formats a response, or its events.

    Args:
        body: the request; the response repeats some of its fields.
        tools: of the body.
        parser: of the answer; None: it cannot call tools.
        store: keeps a finished response; None: nothing is stored.
    """

    def __init__(
        self,
        head: ResponseHead,
        samples: int,
        body: ResponsesRequest,
        tools: ResponseTools,
        parser: ToolCallParser | None,
        store: Callable[[Json], None] | None = None,
    ) -> None:
        super().__init__(head, samples, parser)
        self._body = body
        self._store = store
        self._output = OutputItems(head, tools, encrypted=ENCRYPTED in (body.include or ()))
        self._sequence_number = 0
        self._streams = True

    def format_response(self, outputs: Sequence[RequestOutput]) -> Json:
        """Return what the events of one large chunk add up to."""
        (output,) = outputs
        (sample,) = output.outputs
        self._streams = False
        reasoning = sample.reasoning or ""
        chunk = Chunk(0, sample.text, reasoning, finish_reason=sample.finish_reason)
        for _ in self.chunk_events(0, chunk):
            pass
        for _ in self._end(output):
            pass
        return self._finished(output)

    # --- events ---

    def begin_events(self) -> Iterable[bytes]:
        response = self._response("in_progress")
        yield from self._encoded({"type": "response.created", "response": response})
        yield from self._encoded({"type": "response.in_progress", "response": response})

    def reasoning_events(self, text: str) -> Iterable[bytes]:
        return self._encoded(*self._output.add_reasoning(text))

    def text_events(self, text: str) -> Iterable[bytes]:
        return self._encoded(*self._output.add_text(text))

    def tool_call_events(self, begin: CallBegin) -> Iterable[bytes]:
        return self._encoded(*self._output.add_call(begin))

    def argument_events(self, text: str) -> Iterable[bytes]:
        return self._encoded(*self._output.add_arguments(text))

    def end_events(self, outputs: Sequence[RequestOutput]) -> Iterable[bytes]:
        (output,) = outputs
        yield from self._end(output)
        response = self._finished(output)
        yield from self._encoded({"type": f"response.{response['status']}", "response": response})

    def error_events(self, message: str, code: str) -> Iterable[bytes]:
        yield from self._encoded({"type": "error", "code": code, "message": message, "param": None})
        error = {"code": "server_error", "message": message}
        response = self._response("failed") | {"error": error}
        yield from self._encoded({"type": "response.failed", "response": response})

    def _end(self, output: RequestOutput) -> Iterable[bytes]:
        return self._encoded(*self._output.end(_status(output)))

    def _encoded(self, *events: Json) -> Iterable[bytes]:
        """Encode events; none without a stream."""
        for event in events if self._streams else ():
            kind = event["type"]
            yield sse({**event, "sequence_number": self._sequence_number}, kind)
            self._sequence_number += 1

    # --- the response ---

    def _finished(self, output: RequestOutput) -> Json:
        response = self._response(_status(output), output)
        if self._store is not None:
            self._store(response)
        return response

    def _response(self, status: str, output: RequestOutput | None = None) -> Json:
        body = self._body
        reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": self.head.id,
            "object": "response",
            "created_at": self.head.created,
            "completed_at": int(time.time()) if output else None,
            "status": status,
            "background": False,
            "incomplete_details": reason,
            "error": None,
            "model": self.head.model,
            "instructions": body.instructions,
            "output": list(self._output.items),
            "usage": None if output is None else _usage(output),
            "max_output_tokens": body.max_output_tokens,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "text": {"format": (body.text and body.text.format) or {"type": "text"}},
            "tools": body.tools or [],
            "tool_choice": body.tool_choice or "auto",
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "reasoning": {"effort": body.reasoning and body.reasoning.effort, "summary": None},
            "truncation": body.truncation or "disabled",
            "previous_response_id": body.previous_response_id,
            "store": self._store is not None,
            "metadata": body.metadata or {},
        }


def _status(output: RequestOutput) -> str:
    return "incomplete" if output.outputs[0].finish_reason in CUT else "completed"


def _usage(output: RequestOutput) -> Json:
    usage: Any = output.usage
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        **thinking_usage(output),
    }
