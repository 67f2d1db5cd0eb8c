"""The tools of a request, and whether the model may, must or must not call them.

``required`` and a named function are enforced by a grammar of the answer, so thinking stays free;
``auto`` leaves it to the model. With a structured answer, the grammar is calls or that structure.
``tool_call_parser`` parses what the model wrote.
"""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from s1engine.checks import shown
from s1engine.engine.schema_keywords import check_keywords
from s1engine.engine.structured_output import COMPACT, either, from_lark
from s1engine.errors import RequestError
from s1engine.server.api.body import JsonObjects, LenientBody, StrictBody
from s1engine.tool_prompt import CLOSE, OPEN

MAX_TOOLS = 128
MAX_CALLS = 64  # of one answer that must call a tool
BY_NAME = frozenset({"properties", "$defs", "definitions"})  # keywords that hold schemas by name
SCHEMAS = frozenset({"items", "prefixItems", "anyOf", "oneOf", "additionalProperties"})
OPENERS = frozenset({"additionalProperties", "patternProperties", "unevaluatedProperties"})
SPACED = COMPACT | {"item_separator": ", ", "key_separator": ": "}  # as models are trained


class Function(LenientBody):
    """A function that a model may call."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(LenientBody):
    """One of ``tools``."""

    type: Literal["function"]
    function: Function


class FunctionName(LenientBody):
    """The function that the model must call."""

    name: str


class NamedTool(LenientBody):
    """``tool_choice`` of one function."""

    type: Literal["function"]
    function: FunctionName


class ToolSubset(LenientBody):
    """Some of the tools."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(fail_fast=True, min_length=1, max_length=MAX_TOOLS)]


class AllowedTools(LenientBody):
    """``tool_choice`` among some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: ToolSubset


class ToolFields(StrictBody):
    """The fields of a chat about tools."""

    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedTools | None = None
    parallel_tool_calls: bool | None = None

    @property
    def offered(self) -> JsonObjects:
        """Return the tools for the chat template: those that may be called. Raises RequestError."""
        if self.tool_choice == "none":
            return []
        allowed = None
        if isinstance(self.tool_choice, AllowedTools):
            allowed = {tool.function.name for tool in self._callable}
        return [
            tool.model_dump(exclude_none=True, exclude={"function": {"strict"}})
            for tool in self.tools or ()
            if allowed is None or tool.function.name in allowed
        ]

    @property
    def must_call(self) -> bool:
        """Must the answer contain a tool call?"""
        if isinstance(self.tool_choice, AllowedTools):
            return self.tool_choice.allowed_tools.mode == "required"
        return self.tool_choice not in (None, "none", "auto")

    @property
    def once(self) -> bool:
        """May the answer contain one call only?"""
        return self.parallel_tool_calls is False or isinstance(self.tool_choice, NamedTool)

    @property
    def parameters(self) -> dict[str, dict[str, Any]]:
        """The schemas of each tool's parameters."""
        functions = [tool.function for tool in self.tools or ()]
        found = {f.name: (f.parameters or {}).get("properties") for f in functions}
        return {name: own for name, own in found.items() if isinstance(own, dict)}

    @property
    def _callable(self) -> list[Tool]:
        """The tools that may be called. Raises RequestError for a name that no tool has."""
        tools = self.tools or []
        if isinstance(self.tool_choice, NamedTool):
            names = [self.tool_choice.function.name]
        elif isinstance(self.tool_choice, AllowedTools):
            names = [tool.function.name for tool in self.tool_choice.allowed_tools.tools]
        else:
            return tools
        known = {tool.function.name: tool for tool in tools}
        for name in names:
            if name not in known:
                message = f"tool_choice: no tool is named {shown(name)}"
                raise RequestError(message, param="tool_choice")
        return [known[name] for name in names]

    def calls_grammar(self, answer: str | None = None) -> str:
        """Return the grammar of an answer that calls tools, or else follows the grammar ``answer``.
        Raises RequestError."""
        functions = [tool.function for tool in self._callable]
        if not functions:
            raise RequestError("tool_choice: there are no tools", param="tool_choice")
        try:
            for function in functions:
                check_keywords(function.parameters)
        except ValueError as error:
            raise RequestError(f"tools: {function.name}: {error}", param="tools") from error
        calls = from_lark(_calls_grammar(functions, 1 if self.once else MAX_CALLS))
        return calls if answer is None else either(calls, answer)


def _calls_grammar(functions: Sequence[Function], most: int) -> str:
    """Return a grammar of up to ``most`` calls in the format of Qwen's template."""
    choices = " | ".join(f"call{i}" for i in range(len(functions)))
    more = f' ("\\n" call){{0,{most - 1}}}' if most > 1 else ""
    rules = [f"start: call{more}", f"call: {choices}"]
    for i, function in enumerate(functions):
        schema = {"type": "object", **closed(function.parameters or {}), "x-guidance": SPACED}
        begin = json.dumps(f'{OPEN}\n{{"name": "{function.name}", "arguments": ')
        rules.append(f"call{i}: {begin} arguments{i} {json.dumps('}' + chr(10) + CLOSE)}")
        rules.append(f"arguments{i}: %json {json.dumps(schema)}")
    return "\n".join(rules)


def closed(schema: Any) -> Any:
    """Return a schema whose objects have no properties beside those that it lists, unless it says
    so: clients leave that out, and a weak model would add properties without end."""
    if "allOf" in json.dumps(schema):
        return schema  # parts of one object must leave room for each other
    return _closed(schema)


def _closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [*map(_closed, schema)]
    if not isinstance(schema, dict):
        return schema
    inner = {
        name: {key: _closed(part) for key, part in value.items()}
        if name in BY_NAME and isinstance(value, dict)
        else _closed(value)
        if name in SCHEMAS
        else value
        for name, value in schema.items()
    }
    lists = isinstance(schema.get("properties"), dict) and bool(schema["properties"])
    return (
        {"additionalProperties": False, **inner} if lists and not OPENERS & set(schema) else inner
    )
