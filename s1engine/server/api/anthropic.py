"""``/v1/messages`` and ``/v1/messages/count_tokens``, Anthropic's API: a body becomes a chat.

``thinking.budget_tokens`` is exact, like every budget, and may be of any size; our own thinking
fields are accepted too. A chat that ends in an assistant's turn is continued.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from s1engine.errors import RequestError
from s1engine.server.anthropic_errors import NO_THREADS
from s1engine.server.api.anthropic_blocks import text_of, to_messages
from s1engine.server.api.body import JsonObjects, LenientBody, StrictBody, Strings
from s1engine.server.api.chat_completions import ChatRequest
from s1engine.server.api.field_rules import INERT, UNSUPPORTED, FieldRules
from s1engine.server.api.response_formatter import Json
from s1engine.server.api.thinking_fields import ThinkingFields, ThinkingSwitch
from s1engine.server.request_notes import current_notes

MAX_MESSAGES_TOOLS = 128
OWN_TOOLS = (None, "custom")  # types of tools that the request describes itself
OWN_INERT = frozenset({"betas", "container", "diagnostics", "fallbacks", "speed"})


class Message(LenientBody):
    """One turn."""

    role: Literal["user", "assistant", "system"]
    content: str | JsonObjects


class MessagesTool(LenientBody):
    """One of ``tools``."""

    type: str | None = None
    name: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None

    def to_chat(self) -> Json:
        """Convert to a tool of a chat. Raises RequestError."""
        if self.name is None or self.input_schema is None:
            missing = "name" if self.name is None else "input_schema"
            raise RequestError(f"tools: {missing} is missing", param="tools")
        function: Json = {"name": self.name, "parameters": self.input_schema}
        function |= {} if self.description is None else {"description": self.description}
        function |= {} if self.strict is None else {"strict": self.strict}
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
            if self.name is None:
                raise RequestError("tool_choice: name is missing", param="tool_choice")
            choice = {"type": "function", "function": {"name": self.name}}
        fields: Json = {"tool_choice": choice}
        if self.disable_parallel_tool_use is not None:
            fields["parallel_tool_calls"] = not self.disable_parallel_tool_use
        return fields


class OutputFormat(StrictBody):
    """``output_config.format``."""

    rules = FieldRules(frozenset({"name", "strict"}), place="output_config.")

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")

    def to_chat(self) -> Json:
        """Convert to a chat's ``response_format``."""
        return {"type": "json_schema", "json_schema": {"schema": self.schema_}}


class OutputConfig(StrictBody):
    """``output_config``."""

    rules = FieldRules(frozenset({"task_budget"}), place="output_config.")

    effort: str | None = None
    format: OutputFormat | None = None


class DisplayedThinking(ThinkingSwitch):
    """``thinking``, and whether the response shows it."""

    display: Literal["summarized", "omitted"] | None = None


class MessagesRequest(ThinkingFields):
    """Body of ``POST /v1/messages``."""

    rules = FieldRules(INERT | OWN_INERT, {**UNSUPPORTED, "mcp_servers": ()})

    model: str | None = None
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1)]
    max_tokens: int
    system: str | JsonObjects | None = None
    stop_sequences: Strings | None = None
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    tools: (
        Annotated[list[MessagesTool], Field(fail_fast=True, max_length=MAX_MESSAGES_TOOLS)] | None
    ) = None
    tool_choice: ToolChoice | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    thinking: DisplayedThinking | None = None
    thread: dict[str, Any] | None = None
    seed: int | None = None
    timeout: Annotated[float | None, Field(gt=0)] = None

    @property
    def shows_thinking(self) -> bool:
        """Does the response hold the text of the thinking?"""
        return self.thinking is None or self.thinking.display != "omitted"

    def to_chat(self) -> ChatRequest:
        """Convert to a chat. Raises RequestError."""
        if self.thread is not None:
            raise RequestError(
                "thread is not supported: no message is stored; send the whole conversation",
                param="thread",
                code=NO_THREADS,
            )
        same = {*ThinkingFields.model_fields, "model", "max_tokens", "stream", "temperature"}
        same |= {"top_p", "top_k", "seed", "timeout", "stop_sequences"}
        fields = self.model_dump(include=same, exclude={"thinking": {"display"}}, exclude_none=True)
        fields |= self._output()
        fields |= self.tool_choice.to_chat() if self.tool_choice else {}
        fields["tools"] = self._functions()
        return ChatRequest.model_validate({**fields, "messages": self._turns()})

    def _turns(self) -> list[Json]:
        turns = [
            chat
            for i, turn in enumerate(self.messages)
            for chat in to_messages(turn.role, turn.content, f"messages[{i}]")
        ]
        if self.system is not None:
            turns.insert(0, {"role": "system", "content": text_of(self.system, "system")})
        return turns

    def _output(self) -> Json:
        """The effort, unless thinking is off, and the structure of the answer."""
        config = self.output_config or OutputConfig()
        fields: Json = {}
        thinks = self.thinking is None or self.thinking.type != "disabled"
        if config.effort is not None and thinks:
            fields["reasoning_effort"] = config.effort
        structure = config.format or self.output_format
        if structure is not None:
            fields["response_format"] = structure.to_chat()
        return fields

    def _functions(self) -> list[Json]:
        """The tools of a chat. Those that only Anthropic's servers or models know are left out and
        named, unless they must be called."""
        functions = []
        for i, tool in enumerate(self.tools or ()):
            if tool.type in OWN_TOOLS:
                functions.append(tool.to_chat())
                continue
            choice = self.tool_choice
            if choice is not None and choice.type == "tool" and choice.name == tool.name:
                raise RequestError(
                    f"tools[{i}]: tools of type {tool.type} are not supported", param="tool_choice"
                )
            current_notes().ignored[f"tools[{i}].{tool.type}"] = None
        return functions


class CountTokensRequest(MessagesRequest):
    """Body of ``POST /v1/messages/count_tokens``."""

    max_tokens: int = 1
