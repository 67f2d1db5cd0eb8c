"""``POST /tokenize`` and ``POST /detokenize``, as in vLLM: their bodies."""

from typing import Annotated, Any

from pydantic import Field

from s1engine.chat_template import TURN_OPTIONS
from s1engine.errors import RequestError
from s1engine.server.api.body import JsonObjects, RequestBody, TokenIds
from s1engine.server.api.chat_completions import ChatRequest
from s1engine.server.api.field_rules import INERT, SAMPLING, UNSUPPORTED, FieldRules
from s1engine.server.api.thinking_fields import ThinkingFields
from s1engine.server.api.tools import Tool

MAX_TEXT_CHARS = 2**20  # of a text to tokenize
CHAT_FIELDS = {*ThinkingFields.model_fields, *TURN_OPTIONS, "chat_template_kwargs", "tools"}


class TokenizeRequest(ThinkingFields):
    """Body of ``POST /tokenize``: either a text or a chat. Fields of sampling are inert."""

    rules = FieldRules(INERT | SAMPLING, UNSUPPORTED)

    model: str | None = None
    prompt: Annotated[str | None, Field(max_length=MAX_TEXT_CHARS)] = None
    messages: JsonObjects | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    add_special_tokens: Annotated[
        bool | None,
        Field(
            description="Add what the tokenizer adds, such as beginning of text; default: true "
            "for a text. A chat gets what its template writes"
        ),
    ] = None
    return_token_strs: Annotated[
        bool, Field(description="Add token_strs, the tokens as the vocabulary spells them")
    ] = False
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def to_chat(self) -> ChatRequest:
        """Convert to a chat. Raises RequestError."""
        if self.add_special_tokens:
            message = "add_special_tokens: a chat gets what its template writes"
            raise RequestError(message, param="add_special_tokens")
        fields = self.model_dump(include=CHAT_FIELDS, exclude_none=True)
        return ChatRequest.model_validate({"messages": self.messages, **fields})


class DetokenizeRequest(RequestBody):
    """Body of ``POST /detokenize``."""

    rules = FieldRules(INERT | SAMPLING, UNSUPPORTED)

    model: str | None = None
    tokens: TokenIds
