"""The structure of an answer as request fields, converted to fields of SamplingParams.

OpenAI's ``response_format``, and vLLM's ``structured_outputs`` for regular expressions and choices.
"""

from typing import Any, Literal

from pydantic import Field

from s1engine.errors import RequestError
from s1engine.server.api.body import StrictBody, Strings
from s1engine.server.api.field_rules import FieldRules


class JsonSchema(StrictBody):
    """``response_format.json_schema``."""

    rules = FieldRules(place="response_format.json_schema.")

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(StrictBody):
    """``response_format``."""

    rules = FieldRules(place="response_format.")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(StrictBody):
    """``structured_outputs``: one of its fields."""

    rules = FieldRules(place="structured_outputs.")

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Strings | None = Field(default=None, min_length=1, max_length=1024)


def structure_fields(
    form: ResponseFormat | None, outputs: StructuredOutputs | None
) -> dict[str, Any]:
    """Return the fields of SamplingParams with the structure of the answer. Raises RequestError."""
    schema: dict[str, Any] | None = None
    if form is not None and form.type == "json_object":
        schema = {"type": "object"}
    elif form is not None and form.type == "json_schema":
        schema = None if form.json_schema is None else form.json_schema.schema_
        if schema is None:
            message = "response_format: json_schema.schema is missing"
            raise RequestError(message, param="response_format")
    if outputs is None:
        return {} if schema is None else {"json_schema": schema}
    given = {"json_schema": outputs.json_, "regex": outputs.regex, "choice": outputs.choice}
    fields = {name: value for name, value in given.items() if value is not None}
    if not fields:
        raise RequestError("structured_outputs is empty", param="structured_outputs")
    if schema is not None:
        message = "response_format and structured_outputs exclude one another"
        raise RequestError(message, param="structured_outputs")
    return fields
