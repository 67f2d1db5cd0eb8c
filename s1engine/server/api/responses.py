"""``POST /v1/responses``, OpenAI's newer API: its body, which becomes a chat.

Thinking is an item ``reasoning`` with its full text; one in ``input`` reaches the chat template
with the item after it. The fields of sampling and thinking of chats are accepted too, beside
``max_output_tokens`` and ``reasoning.effort``.
"""

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, ValidationError

from s1engine.errors import RequestError
from s1engine.server.api.body import JsonObject, JsonObjects, StrictBody, Strings
from s1engine.server.api.chat_completions import ChatRequest
from s1engine.server.api.field_rules import INERT, UNSUPPORTED, FieldRules
from s1engine.server.api.request_fields import GenerationFields, request_error
from s1engine.server.api.response_formatter import Json
from s1engine.server.api.response_items import ChatTurns
from s1engine.server.api.response_tools import ResponseTools, validated

MESSAGE = re.compile(r"\bmessages\[(\d+)\]")
SAME_AS_CHAT = frozenset(GenerationFields.model_fields) | {
    *("model", "stream", "timeout", "parallel_tool_calls")
}
ENCRYPTED = "reasoning.encrypted_content"  # in ``include``


class AnswerFormat(StrictBody):
    """``text.format``: the structure of the answer."""

    rules = FieldRules(place="text.format.")

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: JsonObject | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextOptions(StrictBody):
    """``text``."""

    rules = FieldRules(frozenset({"verbosity"}), place="text.")

    format: JsonObject | None = None

    def response_format(self) -> Json | None:
        """Convert ``format`` to a chat's ``response_format``. Raises RequestError."""
        if self.format is None:
            return None
        form = validated(AnswerFormat, self.format, "text.format")
        if form.type == "json_schema" and form.schema_ is None:
            raise RequestError("text.format.schema is missing", param="text.format")
        schema = {} if form.schema_ is None else {"schema": form.schema_}
        return {"type": form.type, **schema}


class ResponsesRequest(GenerationFields):
    """Body of ``POST /v1/responses``."""

    rules = FieldRules(
        INERT | {"max_tool_calls", "stream_options"},
        {**UNSUPPORTED, "prompt": (), "logprobs": (False,), "top_logprobs": (0,)},
    )

    model: str | None = None
    input: str | Annotated[JsonObjects, Field(min_length=1)]
    instructions: str | None = None
    stream: bool = False
    timeout: Annotated[float | None, Field(gt=0)] = None
    text: TextOptions | None = None
    truncation: Annotated[
        Literal["disabled", "auto"] | None,
        Field(description="Nothing is left out in either case: a longer input is an error"),
    ] = None
    tools: JsonObjects | None = None
    tool_choice: Literal["none", "auto", "required"] | JsonObject | None = None
    parallel_tool_calls: bool | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    include: Strings | None = None
    metadata: Any = None
    n: Literal[1] | None = None

    @property
    def items(self) -> JsonObjects:
        """The input as items."""
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        return self.input

    def to_chat(
        self, tools: ResponseTools | None = None, earlier: Sequence[JsonObject] = ()
    ) -> "ResponsesChat":
        """Convert to a chat. Raises RequestError.

        Args:
            tools: those of the body, parsed.
            earlier: items of the conversation before the input.
        """
        tools = ResponseTools(self.tools or ()) if tools is None else tools
        turns = ChatTurns(tools)
        if self.instructions is not None:
            turns.add({"role": "system", "content": self.instructions}, "instructions")
        turns.add_all(earlier, "previous_response_id")
        turns.add_all(self.items)
        if not turns.messages:
            raise RequestError("input has no message", param="input")
        same = self.model_fields_set & SAME_AS_CHAT
        fields = self.model_dump(include=same, exclude_none=True, by_alias=True)
        fields |= {"messages": turns.messages, "tools": tools.to_chat()}
        fields["tool_choice"] = tools.choice(self.tool_choice)
        if self.text is not None and (form := self.text.response_format()) is not None:
            if "response_format" in fields:
                raise RequestError("text.format and response_format differ", param="text")
            fields["response_format"] = form
        return ResponsesChat.of(fields, turns.places)


class ResponsesChat(ChatRequest):
    """The chat that a request becomes. Errors name the places in the request."""

    _places: list[str] = PrivateAttr(default_factory=list)

    @classmethod
    def of(cls, fields: Json, places: list[str]) -> "ResponsesChat":
        """Create the chat whose messages come from these places. Raises RequestError."""
        try:
            chat = cls.model_validate(fields)
        except ValidationError as error:
            raise _placed(request_error(error), places) from error
        chat._places = places
        return chat

    @property
    def structure_field(self) -> str | None:
        field = super().structure_field
        return "text.format" if field == "response_format" else field

    def renamed_error(self, error: RequestError) -> RequestError:
        return _placed(super().renamed_error(error), self._places)


def _placed(error: RequestError, places: Sequence[str]) -> RequestError:
    """Return an error about a message with the place that it comes from."""

    def place(match: re.Match[str]) -> str:
        i = int(match[1])
        return places[i] if i < len(places) else match[0]

    param = error.param and MESSAGE.sub(place, error.param)
    param = "input" if param == "messages" else param
    return RequestError(MESSAGE.sub(place, str(error)), param=param, code=error.code)
