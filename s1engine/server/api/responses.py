"""``POST /v1/responses``, OpenAI's newer API: its body becomes a chat, its response output items.

Nothing is stored, so ``previous_response_id`` is an error. Thinking is an item ``reasoning`` with
its full text; one in ``input`` reaches the chat template with the item after it. Our own thinking
fields are accepted beside ``reasoning.effort``. Tool calls are items ``function_call``, and their
results items ``function_call_output``.
"""

import time
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from s1engine.errors import RequestError
from s1engine.outputs import RequestOutput
from s1engine.server.api.block_formatter import BlockResponseFormatter
from s1engine.server.api.body import JsonObjects
from s1engine.server.api.chat_completions import ChatRequest
from s1engine.server.api.response_formatter import Json, ResponseHead, call_id, sse, thinking_usage
from s1engine.server.api.thinking_fields import ThinkingFields
from s1engine.server.api.tool_call_parser import CallBegin
from s1engine.server.api.tools import Function, FunctionName

TEXT_PARTS = ("input_text", "output_text", "text")


class FunctionTool(Function):
    """One of ``tools``."""

    type: Literal["function"]

    def to_chat(self) -> Json:
        """Convert to a tool of a chat."""
        function = self.model_dump(exclude={"type"}, exclude_none=True)
        return {"type": "function", "function": function}


class FunctionChoice(FunctionName):
    """``tool_choice`` of one function."""

    type: Literal["function"]


class ResponsesRequest(ThinkingFields):
    """Body of ``POST /v1/responses``."""

    model: str | None = None
    input: str | Annotated[JsonObjects, Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: int | None = None
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    timeout: Annotated[float | None, Field(gt=0)] = None
    text: dict[str, Any] | None = None
    truncation: Literal["disabled"] | None = None
    tools: Annotated[list[FunctionTool], Field(fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    previous_response_id: None = None
    background: Literal[False] | None = None
    metadata: Any = None

    def to_chat(self) -> ChatRequest:
        """Convert to a chat. Raises RequestError."""
        items: list[Json] = [{"role": "user", "content": self.input}]
        if not isinstance(self.input, str):
            items = _turns(self.input)
        if self.instructions is not None:
            items.insert(0, {"role": "system", "content": self.instructions})
        same = {*ThinkingFields.model_fields, "model", "stream", "temperature", "top_p", "seed"}
        fields = self.model_dump(include={*same, "timeout"}, exclude_none=True)
        fields |= {"messages": items, "max_tokens": self.max_output_tokens}
        fields["tools"] = [tool.to_chat() for tool in self.tools or ()]
        fields["parallel_tool_calls"] = self.parallel_tool_calls
        fields["tool_choice"] = self.tool_choice
        if isinstance(self.tool_choice, FunctionChoice):
            name = {"name": self.tool_choice.name}
            fields["tool_choice"] = {"type": "function", "function": name}
        return ChatRequest.model_validate(fields | _response_format(self.text))


def _response_format(text: dict[str, Any] | None) -> Json:
    """Convert ``text.format`` to a chat's ``response_format``, which is one level deeper."""
    form = (text or {}).get("format")
    if form is None:
        return {}
    if isinstance(form, dict) and form.get("type") == "json_schema":
        inner = {name: value for name, value in form.items() if name != "type"}
        return {"response_format": {"type": "json_schema", "json_schema": inner}}
    return {"response_format": form}


def _turns(items: Iterable[Json]) -> list[Json]:
    """Convert items to messages; a call joins the assistant's message before it, and reasoning the
    assistant's message or call after it."""
    turns: list[Json] = []
    reasoning = ""
    for item in items:
        if item.get("type") == "reasoning":
            reasoning += _reasoning_text(item)
            continue
        if item.get("type") == "function_call":
            if not turns or turns[-1]["role"] != "assistant" or reasoning:
                turns.append({"role": "assistant", "content": ""})
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            turns[-1].setdefault("tool_calls", []).append(call)
        elif item.get("type") == "function_call_output":
            output, name = _joined_text(item.get("output")), item.get("call_id")
            turns.append({"role": "tool", "tool_call_id": name, "content": output})
        else:
            turns.append(_turn(item))
        if reasoning and turns[-1]["role"] == "assistant":
            turns[-1]["reasoning_content"] = reasoning
        reasoning = ""
    return turns


def _reasoning_text(item: Json) -> str:
    """Return the full text of a reasoning item, else its summary."""
    parts = item.get("content") or item.get("summary") or []
    texts = [part.get("text") for part in parts] if _are_objects(parts) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise RequestError("input: reasoning must consist of texts", param="input")
    return "".join(map(str, texts))


def _are_objects(parts: Any) -> bool:
    return isinstance(parts, list) and all(isinstance(part, dict) for part in parts)


def _turn(item: Json) -> Json:
    content = item.get("content")
    if item.get("type", "message") != "message" or not isinstance(content, str | list):
        raise RequestError("input: only messages of text are supported", param="input")
    role = "system" if item.get("role") == "developer" else item.get("role")
    return {"role": role, "content": _joined_text(content)}


def _joined_text(content: Any) -> Any:
    """Join a list of text parts; anything else is returned as it is."""
    if not isinstance(content, list):
        return content
    for part in content:
        typed = isinstance(part, dict) and part.get("type") in TEXT_PARTS
        if not typed or not isinstance(part.get("text"), str):
            raise RequestError("input: only parts of text are supported", param="input")
    return "".join(part["text"] for part in content)


class ResponsesFormatter(BlockResponseFormatter):
    """Formats a response, or its events.

    Args:
        body: the request; the response repeats some of its fields.
    """

    def __init__(
        self,
        head: ResponseHead,
        samples: int,
        body: ResponsesRequest,
        calls: bool,
        once: bool,
    ) -> None:
        super().__init__(head, samples, calls, once)
        self._body = body
        self._sequence_number = 0
        self._items: list[Json] = []
        self._text = ""  # of the last item, while it is open
        self._last_call = CallBegin(0, "")
        self._is_open = False

    def format_response(self, outputs: Sequence[RequestOutput]) -> Json:
        (output,) = outputs
        (sample,) = output.outputs
        items = [self._item(0, "reasoning", sample.reasoning)] if sample.reasoning else []
        answer = self.parse_answer(sample.text)
        if answer.text or not answer.calls:
            items.append(self._item(len(items), "message", answer.text))
        for i, call in enumerate(answer.calls):
            items.append(self._call(len(items), i, call.name, call.arguments))
        return self._response(items, output)

    def _response(self, items: list[Json], output: RequestOutput | None) -> Json:
        body = self._body
        cut = output is not None and output.outputs[0].finish_reason in ("length", "deadline")
        status = "in_progress" if output is None else "incomplete" if cut else "completed"
        return {
            "id": self.head.id,
            "object": "response",
            "created_at": self.head.created,
            "completed_at": int(time.time()) if output else None,
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "error": None,
            "model": self.head.model,
            "instructions": body.instructions,
            "output": items,
            "usage": None if output is None else _usage(output),
            "max_output_tokens": body.max_output_tokens,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "text": body.text or {"format": {"type": "text"}},
            "tools": [tool.model_dump(exclude_none=True) for tool in body.tools or ()],
            "tool_choice": _choice(body),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "metadata": body.metadata or {},
        }

    def _item(self, index: int, kind: str, text: str, status: str = "completed") -> Json:
        prefix = "rs" if kind == "reasoning" else "msg"
        item: Json = {"id": f"{prefix}_{self.head.id}_{index}", "type": kind, "status": status}
        content = [_part_of(kind, text)] if text else []
        own: Json = {"summary": []} if kind == "reasoning" else {"role": "assistant"}
        return item | own | {"content": content}

    def _call(self, index: int, number: int, name: str, arguments: str, status: str = "") -> Json:
        """Return the item of call ``number``."""
        call = call_id(self.head, 0, number)
        own = {"id": f"fc_{self.head.id}_{index}", "call_id": call, "name": name}
        done = {"arguments": arguments, "status": status or "completed"}
        return {"type": "function_call", **own, **done}

    # --- events ---

    def begin_events(self) -> Iterable[bytes]:
        yield self._event("response.created", response=self._response([], None))
        yield self._event("response.in_progress", response=self._response([], None))

    def reasoning_events(self, text: str) -> Iterable[bytes]:
        return self._grow("reasoning", "response.reasoning_text.delta", text)

    def text_events(self, text: str) -> Iterable[bytes]:
        return self._grow("message", "response.output_text.delta", text)

    def tool_call_events(self, begin: CallBegin) -> Iterable[bytes]:
        yield from self._close()
        index = len(self._items)
        self._items.append(self._call(index, begin.index, begin.name, "", "in_progress"))
        self._is_open, self._text, self._last_call = True, "", begin
        added = self._items[-1]
        yield self._event("response.output_item.added", output_index=index, item=added)

    def argument_events(self, text: str) -> Iterable[bytes]:
        self._text += text
        yield self._event(
            "response.function_call_arguments.delta", **self._item_position(), delta=text
        )

    def _grow(self, kind: str, name: str, text: str) -> Iterable[bytes]:
        if not self._is_open or self._items[-1]["type"] != kind:
            yield from self._close()
            yield from self._begin_item(kind)
        self._text += text
        yield self._event(name, **self._item_position(), delta=text, **_logprobs(kind))

    def _item_position(self) -> Json:
        item = self._items[-1]
        position = {"item_id": item["id"], "output_index": len(self._items) - 1}
        return position if item["type"] == "function_call" else position | {"content_index": 0}

    def _begin_item(self, kind: str) -> Iterable[bytes]:
        index = len(self._items)
        self._items.append(self._item(index, kind, "", "in_progress"))
        self._is_open, self._text = True, ""
        added = self._items[-1]
        yield self._event("response.output_item.added", output_index=index, item=added)
        part = _part_of(kind, "")
        yield self._event("response.content_part.added", **self._item_position(), part=part)

    def _close(self) -> Iterable[bytes]:
        if not self._is_open:
            return
        kind, index, text = self._items[-1]["type"], len(self._items) - 1, self._text
        if kind == "function_call":
            call = self._last_call
            self._items[-1] = self._call(index, call.index, call.name, text)
            event = "response.function_call_arguments.done"
            yield self._event(event, **self._item_position(), name=call.name, arguments=text)
        else:
            yield from self._close_text(kind, index, text)
        done = self._items[-1]
        yield self._event("response.output_item.done", output_index=index, item=done)
        self._is_open = False

    def _close_text(self, kind: str, index: int, text: str) -> Iterable[bytes]:
        name = "reasoning_text" if kind == "reasoning" else "output_text"
        position = self._item_position()
        yield self._event(f"response.{name}.done", **position, text=text, **_logprobs(kind))
        part = _part_of(kind, text)
        yield self._event("response.content_part.done", **position, part=part)
        self._items[-1] = self._item(index, kind, text)

    def end_events(self, outputs: Sequence[RequestOutput]) -> Iterable[bytes]:
        yield from self._close()
        response = self._response(self._items, outputs[0])
        yield self._event(f"response.{response['status']}", response=response)

    def error_events(self, message: str, code: str) -> Iterable[bytes]:
        yield self._event("error", message=message, code=code, param=None)

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._sequence_number += 1
        return sse({"type": kind, "sequence_number": self._sequence_number - 1, **fields}, kind)


def _choice(body: ResponsesRequest) -> Any:
    choice = body.tool_choice
    if isinstance(choice, FunctionChoice):
        return choice.model_dump()
    return choice or ("auto" if body.tools else "none")


def _logprobs(kind: str) -> Json:
    return {"logprobs": []} if kind == "message" else {}


def _part_of(kind: str, text: str) -> Json:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": []}


def _usage(output: RequestOutput) -> Json:
    usage = output.usage
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        **thinking_usage(output),
    }
