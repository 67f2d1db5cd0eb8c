"""The tools of a request, and whether the model may, must or must not call them.

``required`` and a named function are enforced by a grammar of the answer, so thinking stays free;
``auto`` leaves it to the model, except that calls of strict functions keep to their schemas. With a
structured answer, the grammar is calls or that structure. ``tool_call_parser`` parses what the
model wrote.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, field_validator

from s1engine.checks import shown
from s1engine.engine.schema_keywords import check_keywords
from s1engine.engine.structured_output import either, from_lark
from s1engine.errors import RequestError
from s1engine.server.api.body import JsonObjects, LenientBody, StrictBody
from s1engine.server.api.calls_grammar import calls_grammar
from s1engine.tool_formats import HERMES, ToolFormat

MAX_TOOLS = 128
MAX_CALLS = 64  # of one answer that must call a tool
MAX_REFERENCES = 8  # that lead from a parameter's schema to its own


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
    _tool_format: ToolFormat = PrivateAttr(default=HERMES)

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _nest_choice(cls, choice: Any) -> Any:
        """Rewrite the other spellings: ``any``, and the flat shapes of the Responses API."""
        if choice == "any":
            return "required"
        if not isinstance(choice, dict):
            return choice
        if choice.get("type") == "function" and "function" not in choice and "name" in choice:
            return {"type": "function", "function": {"name": choice["name"]}}
        if choice.get("type") == "allowed_tools" and "allowed_tools" not in choice:
            tools = choice.get("tools")
            if isinstance(tools, list):
                tools = [cls._nest_choice(tool) for tool in tools]
            return {"type": "allowed_tools", "allowed_tools": {**choice, "tools": tools}}
        return choice

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
        return {tool.function.name: properties_of(tool.function) for tool in self.tools or ()}

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

    @property
    def is_strict(self) -> bool:
        """Must calls keep to their schemas even where the model need not call?"""
        return any(tool.function.strict for tool in self.tools or ()) and bool(self.offered)

    def use_tool_format(self, fmt: ToolFormat) -> None:
        """Calls are written in this format."""
        self._tool_format = fmt

    def calls_grammar(self, answer: str | None = None, *, free: bool = False) -> str:
        """Return the grammar of an answer that calls tools, or else follows the grammar ``answer``;
        ``free``: of any text with such calls. Raises RequestError."""
        functions = [tool.function for tool in self._callable]
        if not functions:
            raise RequestError("tool_choice: there are no tools", param="tool_choice")
        try:
            for function in functions:
                check_keywords(function.parameters)
        except ValueError as error:
            raise RequestError(f"tools: {function.name}: {error}", param="tools") from error
        most = 1 if self.once else MAX_CALLS
        try:
            calls = from_lark(calls_grammar(self._tool_format, functions, most, free=free))
        except ValueError as error:
            raise RequestError(f"tools: {error}", param="tools") from error
        return calls if answer is None else either(calls, answer)


def properties_of(function: Function) -> dict[str, Any]:
    """Return the schema of each parameter. References to definitions of the function are followed
    where they are all that a schema says."""
    whole = function.parameters or {}
    properties = whole.get("properties")
    if not isinstance(properties, dict):
        return {}
    return {name: _followed(schema, whole) for name, schema in properties.items()}


def _followed(schema: Any, whole: dict[str, Any]) -> Any:
    for _ in range(MAX_REFERENCES):
        if not isinstance(schema, dict) or not isinstance(schema.get("$ref"), str):
            break
        found: Any = whole
        for key in schema["$ref"].removeprefix("#").split("/")[1:]:
            found = found.get(key) if isinstance(found, dict) else None
        schema = found
    return schema
