"""The tools of the Responses API, shown to the model as functions of a chat.

- A ``function`` is one already; a ``namespace`` holds functions.
- A ``custom`` tool takes free text, so it becomes a function with the one argument ``input``.
- Tools that a provider runs itself (``web_search``, ``mcp``...) are dropped, which the response's
  header says; to demand a call of one is an error.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ValidationError

from s1engine.checks import shown
from s1engine.errors import RequestError
from s1engine.server.api.body import JsonObject, JsonObjects
from s1engine.server.api.free_text import INPUT
from s1engine.server.api.request_fields import first_error
from s1engine.server.api.tools import MAX_TOOLS, Function, FunctionName
from s1engine.server.request_notes import MAX_UNKNOWN_FIELDS, current_notes, header_safe

T = TypeVar("T", bound=BaseModel)

FREE_TEXT = {
    "type": "object",
    "properties": {INPUT: {"type": "string"}},
    "required": [INPUT],
    "additionalProperties": False,
}
CALLABLE = ("function", "custom")


class FunctionTool(Function):
    """A function among ``tools``."""

    type: Literal["function"]


class CustomTool(FunctionName):
    """A tool that takes free text."""

    type: Literal["custom"]
    description: str | None = None
    format: JsonObject | None = None


class Namespace(FunctionName):
    """A group of functions."""

    type: Literal["namespace"]
    tools: JsonObjects


@dataclass(frozen=True, slots=True)
class OfferedTool:
    """A tool that the model may call."""

    kind: str
    """One of CALLABLE."""
    name: str
    namespace: str | None
    function: JsonObject
    """As the model sees it; its name differs if another namespace has the same one."""
    grammar: str | None = None
    """The field with the grammar of a custom tool, which is shown to the model but not enforced."""

    @property
    def shown_name(self) -> str:
        """The name that the model sees."""
        return str(self.function["name"])


class ResponseTools:
    """The tools of one request.

    Raises RequestError naming the tool.
    """

    def __init__(self, tools: Sequence[JsonObject]) -> None:
        self._by_shown_name: dict[str, OfferedTool] = {}
        self._shown_names: dict[tuple[str | None, str], str] = {}
        for i, tool in enumerate(tools):
            self._add(tool, f"tools[{i}]")

    def _add(self, tool: JsonObject, where: str, namespace: str | None = None) -> None:
        kind = tool.get("type")
        if kind == "function":
            function = validated(FunctionTool, tool, where)
            fields = function.model_dump(exclude={"type"}, exclude_none=True)
            self._offer("function", function.name, namespace, fields, where)
        elif kind == "custom":
            custom = validated(CustomTool, tool, where)
            grammar = None if _is_text(custom.format) else f"{where}.format"
            if grammar is not None:
                _drop(grammar)
            fields = _as_function(custom)
            self._offer("custom", custom.name, namespace, fields, where, grammar)
        elif kind == "namespace" and namespace is None:
            group = validated(Namespace, tool, where)
            for i, inner in enumerate(group.tools):
                self._add(inner, f"{where}.tools[{i}]", group.name)
        elif isinstance(kind, str):
            _drop(f"{where}.{kind}")
        else:
            raise RequestError(f"{where}.type is missing", param=where)

    def _offer(
        self,
        kind: str,
        name: str,
        namespace: str | None,
        function: JsonObject,
        where: str,
        grammar: str | None = None,
    ) -> None:
        if namespace is not None and name in self._by_shown_name:
            function["name"] = f"{namespace}__{name}"
        tool = OfferedTool(kind, name, namespace, function, grammar)
        if tool.shown_name in self._by_shown_name:
            message = f"{where}: another tool is named {shown(tool.shown_name)}"
            raise RequestError(message, param=where)
        if len(self._by_shown_name) == MAX_TOOLS:
            raise RequestError(f"tools: at most {MAX_TOOLS} are allowed", param="tools")
        self._by_shown_name[tool.shown_name] = tool
        self._shown_names[namespace, name] = tool.shown_name

    def to_chat(self) -> JsonObjects:
        """Return the tools of a chat."""
        offered = self._by_shown_name.values()
        return [{"type": "function", "function": tool.function} for tool in offered]

    def called(self, shown_name: str) -> OfferedTool:
        """Return the tool that the model calls, which may be one that it made up."""
        made_up = OfferedTool("function", shown_name, None, {"name": shown_name})
        return self._by_shown_name.get(shown_name, made_up)

    def shown_name(self, name: Any, namespace: Any = None) -> Any:
        """Return the name that the model sees for a tool that an earlier turn called."""
        try:
            return self._shown_names.get((namespace, name), name)
        except TypeError:  # unhashable; the chat refuses it
            return name

    # --- tool_choice ---

    def choice(self, choice: str | JsonObject | None) -> Any:
        """Convert ``tool_choice`` to that of a chat. Raises RequestError."""
        if not isinstance(choice, dict):
            if choice == "required":
                _check_enforced(list(self._by_shown_name.values()))
            return choice
        if choice.get("type") == "allowed_tools":
            return self._allowed(choice)
        tool = self._chosen(choice)
        _check_enforced([tool])
        return _named(tool)

    def _allowed(self, choice: JsonObject) -> JsonObject:
        mode, tools = choice.get("mode"), choice.get("tools")
        if mode not in ("auto", "required") or not isinstance(tools, list):
            message = "tool_choice: allowed_tools needs a mode (auto or required) and tools"
            raise RequestError(message, param="tool_choice")
        kinds = [tool.get("type") if isinstance(tool, dict) else None for tool in tools]
        allowed = [
            self._chosen(tool) for tool, kind in zip(tools, kinds, strict=True) if kind in CALLABLE
        ]
        if mode == "required":
            _check_enforced(allowed)
        inner = {"mode": mode, "tools": [_named(tool) for tool in allowed]}
        return {"type": "allowed_tools", "allowed_tools": inner}

    def _chosen(self, choice: JsonObject) -> OfferedTool:
        kind, name = choice.get("type"), choice.get("name")
        if kind not in CALLABLE:
            raise RequestError(
                f"tool_choice: a tool of type {shown(kind)} is not supported; functions and "
                "custom tools are",
                param="tool_choice",
            )
        tool = self._by_shown_name.get(str(self.shown_name(name, choice.get("namespace"))))
        if tool is None or tool.kind != kind:
            message = f"tool_choice: no {kind} tool is named {shown(name)}"
            raise RequestError(message, param="tool_choice")
        return tool


def validated(kind: type[T], value: Any, where: str) -> T:
    """Validate an object inside a body. Raises RequestError with its place."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = first_error(error.errors())
        raise RequestError(f"{where}.{first}", param=f"{where}.{first.param}") from error


def _drop(name: str) -> None:
    """Note what is not done with the tools. Raises RequestError if the server is strict, or if
    there is too much of it."""
    notes = current_notes()
    if notes.strict or len(notes.ignored) >= MAX_UNKNOWN_FIELDS:
        param = name.partition(".")[0]
        raise RequestError(f"{header_safe(name)} is not supported", param=param)
    notes.ignored[name] = None


def _is_text(form: JsonObject | None) -> bool:
    return form is None or form.get("type") == "text"


def _as_function(tool: CustomTool) -> JsonObject:
    """Return the function that the model sees; the grammar is part of its description."""
    lines = [tool.description or "", f"{INPUT} is free text."]
    if tool.format is not None and not _is_text(tool.format):
        inner = tool.format.get("grammar")
        form = inner if isinstance(inner, dict) else tool.format
        syntax, definition = form.get("syntax"), form.get("definition")
        if syntax not in ("lark", "regex") or not isinstance(definition, str):
            message = "tools: the format of a custom tool is text, or a grammar: lark or regex"
            raise RequestError(message, param="tools")
        lines.append(f"It matches this {syntax} grammar:\n{definition}")
    description = "\n".join(filter(None, lines))
    return {"name": tool.name, "description": description, "parameters": FREE_TEXT}


def _named(tool: OfferedTool) -> JsonObject:
    return {"type": "function", "function": {"name": tool.shown_name}}


def _check_enforced(tools: Sequence[OfferedTool]) -> None:
    """Check that a call that must come can be enforced."""
    for tool in tools:
        if tool.grammar is not None:
            raise RequestError(
                f"{tool.grammar}: the grammar of {shown(tool.name)} cannot be enforced; "
                "set tool_choice to auto, or leave the format out",
                param="tools",
            )
