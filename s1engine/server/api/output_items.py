"""The output of a response as items, and the events that show how they grow.

Both come from one place, so a stream's items are those of the whole response. Events are JSON
objects without their numbers. Knows no HTTP.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from s1engine.server.api.free_text import FreeTextParser
from s1engine.server.api.response_formatter import Json, ResponseHead, call_id
from s1engine.server.api.response_items import sealed
from s1engine.server.api.response_tools import OfferedTool, ResponseTools
from s1engine.server.api.tool_call_parser import CallBegin

Events = Iterator[Json]


class OpenItem(ABC):
    """An item that grows.

    Args:
        index: of the item in the output.
        item: as it begins.
    """

    def __init__(self, index: int, item: Json) -> None:
        self.kind: str = item["type"]
        self._index = index
        self._item = item
        self._texts: list[str] = []

    def begin(self) -> Events:
        """Yield the first events."""
        item = {**self._item, "status": "in_progress"}
        yield {"type": "response.output_item.added", "output_index": self._index, "item": item}

    @abstractmethod
    def grow(self, text: str) -> Events:
        """Yield the events for more of the item's text."""

    def close(self, status: str) -> Events:
        """Yield the last events; ``item`` is then complete."""
        yield from self._close_text("".join(self._texts))
        self.item = {**self._item, "status": status}
        yield {"type": "response.output_item.done", "output_index": self._index, "item": self.item}

    @abstractmethod
    def _close_text(self, text: str) -> Events:
        """Set the item's text and yield the events before the item's last one."""

    def _event(self, kind: str, **fields: Any) -> Json:
        place = {"item_id": self._item["id"], "output_index": self._index}
        return {"type": f"response.{kind}", **place, **fields}


class OpenText(OpenItem):
    """A message or reasoning: an item with one part."""

    def __init__(self, index: int, item: Json) -> None:
        super().__init__(index, item)
        is_message = self.kind == "message"
        self._name = "output_text" if is_message else "reasoning_text"
        self._logprobs: Json = {"logprobs": []} if is_message else {}
        self._annotations: Json = {"annotations": []} if is_message else {}

    def begin(self) -> Events:
        yield from super().begin()
        yield self._event("content_part.added", content_index=0, part=self._part(""))

    def grow(self, text: str) -> Events:
        self._texts.append(text)
        yield self._event(f"{self._name}.delta", content_index=0, delta=text, **self._logprobs)

    def _close_text(self, text: str) -> Events:
        part = self._part(text)
        self._item = {**self._item, "content": [part]}
        if "encrypted_content" in self._item:
            self._item["encrypted_content"] = sealed(text)
        yield self._event(f"{self._name}.done", content_index=0, text=text, **self._logprobs)
        yield self._event("content_part.done", content_index=0, part=part)

    def _part(self, text: str) -> Json:
        return {"type": self._name, "text": text, **self._annotations, **self._logprobs}


class OpenFunctionCall(OpenItem):
    """A call of a function."""

    def grow(self, text: str) -> Events:
        self._texts.append(text)
        yield self._event("function_call_arguments.delta", delta=text)

    def _close_text(self, text: str) -> Events:
        self._item = {**self._item, "arguments": text}
        name = self._item["name"]
        yield self._event("function_call_arguments.done", name=name, arguments=text)


class OpenCustomCall(OpenItem):
    """A call of a custom tool, whose input is inside the arguments that the model writes."""

    def __init__(self, index: int, item: Json) -> None:
        super().__init__(index, item)
        self._parser = FreeTextParser()

    def grow(self, text: str) -> Events:
        yield from self._grow_input(self._parser.push(text))

    def _grow_input(self, text: str) -> Events:
        if text:
            self._texts.append(text)
            yield self._event("custom_tool_call_input.delta", delta=text)

    def _close_text(self, text: str) -> Events:
        yield from self._grow_input(self._parser.push("", last=True))
        text = "".join(self._texts)
        self._item = {**self._item, "input": text}
        yield self._event("custom_tool_call_input.done", input=text)


class OutputItems:
    """The items of one response.

    Args:
        encrypted: reasoning items have ``encrypted_content``.
    """

    def __init__(self, head: ResponseHead, tools: ResponseTools, encrypted: bool) -> None:
        self._head = head
        self._tools = tools
        self._encrypted = encrypted
        self._open: OpenItem | None = None
        self.items: list[Json] = []
        """Complete ones."""

    def add_reasoning(self, text: str) -> Events:
        """Yield the events for more thinking."""
        if self._open is None or self._open.kind != "reasoning":
            own: Json = {"encrypted_content": None} if self._encrypted else {}
            yield from self._begin("reasoning", "rs", OpenText, summary=[], content=[], **own)
        yield from self._grow(text)

    def add_text(self, text: str) -> Events:
        """Yield the events for more text."""
        if self._open is None or self._open.kind != "message":
            yield from self._begin("message", "msg", OpenText, role="assistant", content=[])
        yield from self._grow(text) if text else ()

    def add_call(self, begin: CallBegin) -> Events:
        """Yield the events for the begin of a call."""
        tool = self._tools.called(begin.name)
        fields: Json = {"call_id": call_id(self._head, 0, begin.index), **_names(tool)}
        if tool.kind == "custom":
            yield from self._begin("custom_tool_call", "ctc", OpenCustomCall, **fields, input="")
        else:
            yield from self._begin("function_call", "fc", OpenFunctionCall, **fields, arguments="")

    def add_arguments(self, text: str) -> Events:
        """Yield the events for more arguments of the current call."""
        yield from self._grow(text)

    def end(self, status: str) -> Events:
        """Yield the last events. An answer without text and calls is an empty message.

        Args:
            status: of the last item.
        """
        kinds = {item["type"] for item in self.items} | {self._open.kind if self._open else ""}
        if kinds <= {"", "reasoning"}:
            yield from self.add_text("")
        yield from self._close(status)

    def _begin(self, kind: str, prefix: str, opened: type[OpenItem], **fields: Any) -> Events:
        yield from self._close("completed")
        index = len(self.items)
        item = {"id": f"{prefix}_{self._head.id}_{index}", "type": kind, **fields}
        self._open = opened(index, item)
        yield from self._open.begin()

    def _grow(self, text: str) -> Events:
        assert self._open is not None
        yield from self._open.grow(text)

    def _close(self, status: str) -> Events:
        if self._open is not None:
            yield from self._open.close(status)
            self.items.append(self._open.item)
            self._open = None


def _names(tool: OfferedTool) -> Json:
    own = {} if tool.namespace is None else {"namespace": tool.namespace}
    return {"name": tool.name, **own}
