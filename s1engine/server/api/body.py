"""The bases of request bodies and objects in them: unknown fields are errors, bad ones cost little.

A body of a megabyte may hold hundreds of thousands of wrong values. Pydantic collects all errors,
which takes seconds and a gigabyte. So the sizes of lists and objects are checked before their
items, and a list ends its validation at the first error.
"""

from typing import Annotated, Any

import msgspec
from pydantic import BaseModel, ConfigDict, Field, model_validator

from s1engine.chat_template import MAX_MESSAGES
from s1engine.errors import RequestError

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
    """A JSON object with known fields."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _check_sizes(cls, values: Any) -> Any:
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
        return values


class RequestBody(StrictBody):
    """The whole body of a request."""

    @model_validator(mode="before")
    @classmethod
    def _check_texts(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for name, value in values.items():
                check_text(name, value)
        return values


def check_text(param: str, value: Any) -> None:
    """Rejects a JSON value with a lone surrogate, which UTF-8 cannot encode, at any depth."""
    try:
        msgspec.json.encode(value)
    except UnicodeEncodeError as error:
        raise RequestError(f"{param} holds a lone surrogate", param=param) from error
    except RecursionError as error:
        raise RequestError(f"{param} is nested too deeply", param=param) from error
