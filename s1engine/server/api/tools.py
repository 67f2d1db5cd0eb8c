"""The tools of a request, and whether the model may, must or must not call them.

``required`` and a named function are enforced by a grammar of the answer, so thinking stays free;
``auto`` leaves it to the model. ``tool_call_parser`` parses what the model wrote.
"""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from s1engine.checks import shown
from s1engine.engine.schema_keywords import check_keywords
from s1engine.engine.structured_output import COMPACT, from_lark
from s1engine.errors import RequestError
from s1engine.server.api.body import JsonObjects, LenientBody, StrictBody
from s1engine.server.api.tool_call_parser import CLOSE, OPEN

MAX_TOOLS = 128
MAX_CALLS = 64  # of one answer that must call a tool
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


class ToolFields(StrictBody):
    """The fields of a chat about tools."""

    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    @property
    def offered(self) -> JsonObjects:
        """Return the tools for the chat template; none if none may be called."""
        if self.tool_choice == "none":
            return []
        return [
            tool.model_dump(exclude_none=True, exclude={"function": {"strict"}})
            for tool in self.tools or ()
        ]

    @property
    def must_call(self) -> bool:
        """Must the answer contain a tool call?"""
        return self.tool_choice not in (None, "none", "auto")

    def calls_grammar(self) -> str | None:
        """Return the grammar of an answer that must call a tool, else None. Raises RequestError."""
        if not self.must_call:
            return None
        functions = [tool.function for tool in self.tools or ()]
        once = self.parallel_tool_calls is False
        if isinstance(self.tool_choice, NamedTool):
            name, once = self.tool_choice.function.name, True
            functions = [function for function in functions if function.name == name]
            if not functions:
                raise RequestError(
                    f"tool_choice: no tool is named {shown(name)}", param="tool_choice"
                )
        if not functions:
            raise RequestError("tool_choice: there are no tools", param="tool_choice")
        try:
            for function in functions:
                check_keywords(function.parameters)
        except ValueError as error:
            raise RequestError(f"tools: {function.name}: {error}", param="tools") from error
        return from_lark(_calls_grammar(functions, 1 if once else MAX_CALLS))


def _calls_grammar(functions: Sequence[Function], most: int) -> str:
    """Return a grammar of up to ``most`` calls in the format of Qwen's template."""
    choices = " | ".join(f"call{i}" for i in range(len(functions)))
    more = f' ("\\n" call){{0,{most - 1}}}' if most > 1 else ""
    rules = [f"start: call{more}", f"call: {choices}"]
    for i, function in enumerate(functions):
        schema = {"type": "object", **(function.parameters or {}), "x-guidance": SPACED}
        begin = json.dumps(f'{OPEN}\n{{"name": "{function.name}", "arguments": ')
        rules.append(f"call{i}: {begin} arguments{i} {json.dumps('}' + chr(10) + CLOSE)}")
        rules.append(f"arguments{i}: %json {json.dumps(schema)}")
    return "\n".join(rules)
