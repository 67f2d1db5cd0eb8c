"""The bases of request bodies and objects in them: which fields pass, and bad ones cost little.

``field_rules`` says what becomes of fields that a class does not declare.

A body of a megabyte may hold hundreds of thousands of wrong values. Pydantic collects all errors,
which takes seconds and a gigabyte. So the sizes of lists and objects are checked before their
items, and a list ends its validation at the first error.
"""

from typing import Annotated, Any, ClassVar

import msgspec
from pydantic import BaseModel, ConfigDict, Field, model_validator

from s1engine.chat_template import MAX_MESSAGES
from s1engine.errors import RequestError
from s1engine.server.api.field_rules import INERT, UNSUPPORTED, FieldRules
from s1engine.server.api.spellings import check_same

MAX_FIELDS = 256
MAX_ITEMS = 1024  # of a field that is a list or an object
LONG_FIELDS = {
    **dict.fromkeys(("messages", "content", "input"), MAX_MESSAGES),
    "prompt": 2**20,  # token ids
    "tokens": 2**18,
}

JsonObject = dict[str, Any]
JsonObjects = Annotated[list[JsonObject], Field(fail_fast=True)]
Strings = Annotated[list[str], Field(fail_fast=True)]
TokenIds = Annotated[list[int], Field(fail_fast=True)]


class StrictBody(BaseModel):
    """A JSON object with declared fields; its rules say what becomes of others."""

    model_config = ConfigDict(strict=True)
    rules: ClassVar[FieldRules] = FieldRules()
    declared: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        fields = cls.model_fields.items()
        cls.declared = frozenset(field.alias or name for name, field in fields)

    @model_validator(mode="before")
    @classmethod
    def _check_fields(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if len(values) > MAX_FIELDS:
            raise RequestError(
                f"the body has {len(values)} fields; at most {MAX_FIELDS} are allowed", param="body"
            )
        for name, value in values.items():
            limit = LONG_FIELDS.get(name, MAX_ITEMS)
            if isinstance(value, list | dict) and len(value) > limit:
                raise RequestError(
                    f"{name} has {len(value)} items; at most {limit} are allowed", param=name
                )
        return cls.rules.kept(values, cls.declared)


class LenientBody(StrictBody):
    """An object that clients extend freely, such as a tool: its other fields are inert."""

    rules = FieldRules(lenient=True)


class RequestBody(StrictBody):
    """The whole body of a request."""

    rules = FieldRules(INERT, UNSUPPORTED)

    @model_validator(mode="before")
    @classmethod
    def _check_texts(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for name, value in values.items():
            check_text(name, value)
        return unwrapped(values)


def unwrapped(values: dict[str, Any]) -> dict[str, Any]:
    """Return a body whose fields may also be in ``extra_body``, where OpenAI's clients take them
    from. Raises RequestError if two differ."""
    extra = values.get("extra_body")
    if not isinstance(extra, dict):
        return values
    body = {name: value for name, value in values.items() if name != "extra_body"}
    for name, value in extra.items():
        if value is not None and body.get(name) is not None:
            check_same(name, body[name], f"extra_body.{name}", value)
    return {**extra, **{name: value for name, value in body.items() if value is not None}}


def check_text(param: str, value: Any) -> None:
    """Rejects a JSON value with a lone surrogate, which UTF-8 cannot encode, at any depth."""
    try:
        msgspec.json.encode(value)
    except UnicodeEncodeError as error:
        raise RequestError(f"{param} holds a lone surrogate", param=param) from error
    except RecursionError as error:
        raise RequestError(f"{param} is nested too deeply", param=param) from error
