"""The structure of an answer as request fields, converted to fields of SamplingParams.

OpenAI's ``response_format``, vLLM's ``structured_outputs``, and the names of other engines and of
older versions, which ``spellings`` lists.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from s1engine.errors import RequestError
from s1engine.sampling_params import MAX_CHOICES, STRUCTURES
from s1engine.server.api.body import RequestBody, StrictBody, Strings
from s1engine.server.api.field_rules import FieldRules
from s1engine.server.api.spellings import resolve, sent_fields

ANY_OBJECT = {"type": "object"}
INERT_OPTIONS = frozenset({"backend", "disable_fallback"})
NEUTRAL_OPTIONS = {
    "disable_any_whitespace": (True, False),  # no whitespace is generated in any case
    "disable_additional_properties": (False,),
    "whitespace_pattern": (),
    "structural_tag": (),
}

Schema = dict[str, Any] | str
Choice = Annotated[Strings, Field(min_length=1, max_length=MAX_CHOICES)]


class JsonSchema(StrictBody):
    """``response_format.json_schema``."""

    rules = FieldRules(place="response_format.json_schema.")

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(JsonSchema):
    """``response_format``; the schema may stand in ``json_schema`` or beside ``type``."""

    rules = FieldRules(place="response_format.")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @property
    def required_schema(self) -> dict[str, Any] | None:
        """The schema of the answer, None if it is free. Raises RequestError."""
        if self.type == "text":
            return None
        inner = self.json_schema.schema_ if self.json_schema else None
        schema = self.schema_ if inner is None else inner
        if schema is None and self.type == "json_object":
            return ANY_OBJECT
        if schema is None:
            message = "response_format: json_schema.schema is missing"
            raise RequestError(message, param="response_format")
        return schema


class StructuredOutputs(StrictBody):
    """``structured_outputs``: one of its fields."""

    rules = FieldRules(INERT_OPTIONS, NEUTRAL_OPTIONS, place="structured_outputs.")

    json_: Schema | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: Choice | None = None
    grammar: str | None = None


class StructureFields(RequestBody):
    """The fields of a request about the structure of its answer."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_json_object: bool | None = None
    guided_regex: str | None = None
    guided_choice: Choice | None = None
    guided_grammar: str | None = None
    json_schema: Schema | None = None
    regex: str | None = None
    ebnf: str | None = None
    grammar: str | None = None

    def structure(self) -> dict[str, Any]:
        """Return the fields of SamplingParams with the structure of the answer. Raises
        RequestError."""
        given = self._given_structures()
        if len(given) > 1:
            (first, *_), (second, *_) = given[:2]
            message = f"{first} and {second} exclude one another: an answer has one structure"
            raise RequestError(message, param=second.partition(".")[0])
        if not given and self.structured_outputs is not None:
            raise RequestError("structured_outputs is empty", param="structured_outputs")
        return {field: value for _, field, value in given}

    def _given_structures(self) -> list[tuple[str, str, Any]]:
        """Each structure of the answer: the name that was sent, the field, its value."""
        schema = self.response_format.required_schema if self.response_format else None
        given: list[tuple[str, str, Any]] = []
        if schema is not None:
            given.append(("response_format", "json_schema", schema))
        for field in STRUCTURES:
            if (value := resolve(self, field)) is not None:
                given.append((sent_fields(self, field)[0][0], field, value))
        if resolve(self, "json_object"):
            given.append((sent_fields(self, "json_object")[0][0], "json_schema", ANY_OBJECT))
        return given

    @property
    def structure_field(self) -> str | None:
        """The field that the structure of the answer came from, as it was sent."""
        given = self._given_structures()
        return given[0][0] if given else None
