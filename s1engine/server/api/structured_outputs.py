"""The structure of an answer as request fields, converted to a grammar.

OpenAI's ``response_format``, and vLLM's ``structured_outputs`` for regular expressions and choices.
"""

import json
from typing import Any, Literal

from llguidance import LLMatcher
from pydantic import BaseModel, Field

from s1engine.errors import RequestError
from s1engine.server.api.thinking_fields import STRICT

# A model that may write blanks anywhere might never stop writing blanks.
COMPACT: Any = {"whitespace_flexible": False}


class JsonSchema(BaseModel):
    """``response_format.json_schema``."""

    model_config = STRICT

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """``response_format``."""

    model_config = STRICT

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(BaseModel):
    """``structured_outputs``: one of its fields."""

    model_config = STRICT

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = Field(default=None, min_length=1, max_length=1024)


def build_grammar(form: ResponseFormat | None, outputs: StructuredOutputs | None) -> str | None:
    """Return the grammar of a request, None if it has none. Raises RequestError."""
    grammars: list[str] = []
    if form is not None and form.type == "json_object":
        grammars.append(_from_schema({"type": "object"}, "response_format"))
    elif form is not None and form.type == "json_schema":
        if form.json_schema is None or form.json_schema.schema_ is None:
            raise RequestError(
                "response_format: json_schema.schema is missing", param="json_schema"
            )
        grammars.append(_from_schema(form.json_schema.schema_, "response_format"))
    if outputs is not None:
        if outputs.json_ is not None:
            grammars.append(_from_schema(outputs.json_, "structured_outputs"))
        if outputs.regex is not None:
            grammars.append(LLMatcher.grammar_from_regex(outputs.regex))
        if outputs.choice is not None:
            choices = " | ".join(json.dumps(choice) for choice in outputs.choice)
            grammars.append(LLMatcher.grammar_from_lark(f"start: {choices}"))
        if not grammars:
            raise RequestError("structured_outputs is empty", param="structured_outputs")
    if len(grammars) > 1:
        raise RequestError("ask for one structure only", param="structured_outputs")
    return grammars[0] if grammars else None


def _from_schema(schema: dict[str, Any] | str, param: str) -> str:
    text = schema if isinstance(schema, str) else json.dumps(schema)
    try:
        return LLMatcher.grammar_from_json_schema(text, overrides=COMPACT)
    except Exception as error:  # llguidance has no error types
        raise RequestError(f"{param}: the schema is not usable: {error}", param=param) from error
