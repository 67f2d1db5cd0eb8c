"""Every keyword of a JSON schema is enforced or only describes; any other one is refused by name
and place."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s1engine.engine.schema_keywords import DESCRIPTIVE, ENFORCED, check_keywords

LEAF: Any = {"type": "integer", "minimum": 0}
SCHEMAS = st.recursive(
    st.fixed_dictionaries({"type": st.just("string"), "title": st.text(max_size=3)}),
    lambda inner: st.one_of(
        st.fixed_dictionaries({"properties": st.dictionaries(st.text("ab/~", max_size=2), inner)}),
        st.fixed_dictionaries({"anyOf": st.lists(inner, min_size=1, max_size=3)}),
        st.fixed_dictionaries({"items": inner, "additionalProperties": inner}),
        st.fixed_dictionaries({"prefixItems": st.lists(inner, max_size=2), "items": st.booleans()}),
    ),
    max_leaves=6,
)
UNKNOWN = st.sampled_from(["foo", "not", "uniqueItems", "if", "Minimum", "x-guidance", "nullable"])


def schemas_in(schema: dict[str, Any]) -> list[dict[str, Any]]:
    found = [schema]
    for keyword in ("properties", "anyOf", "prefixItems", "items", "additionalProperties"):
        value = schema.get(keyword)
        parts = value if isinstance(value, list) else [value]
        if keyword == "properties" and isinstance(value, dict):
            parts = list(value.values())
        for part in parts:
            if isinstance(part, dict):
                found += schemas_in(part)
    return found


@settings(max_examples=25)
@given(SCHEMAS, UNKNOWN, st.data())
def test_an_unknown_keyword_anywhere_is_named(
    schema: dict[str, Any], keyword: str, data: st.DataObject
) -> None:
    check_keywords(schema)
    schema = json.loads(json.dumps(schema))
    data.draw(st.sampled_from(schemas_in(schema)))[keyword] = True
    with pytest.raises(ValueError, match=f"'{keyword}' at #"):
        check_keywords(schema)


@settings(max_examples=25)
@given(SCHEMAS, st.data())
def test_descriptions_are_allowed_anywhere(schema: dict[str, Any], data: st.DataObject) -> None:
    place = data.draw(st.sampled_from(schemas_in(schema)))
    place |= dict.fromkeys(DESCRIPTIVE - {"$defs", "definitions"}, "x")
    place["x-ours"], place["nullable"] = 1, False
    check_keywords(schema)


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"properties": {"a": {"items": {"foo": 1}}}}, "'foo' at #/properties/a/items"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"not": {}}}}, "'not' at #/$defs/a"),
        ({"$ref": "#/parts/a", "parts": {"a": {"foo": 1}}}, "'foo' at #/parts/a"),
        ({"anyOf": [LEAF, {"allOf": [{"foo": 1}]}]}, "'foo' at #/anyOf/1/allOf/0"),
        ({"parts": {}}, "'parts' at #"),
        ({"type": "string", "format": "unknown"}, "'unknown' at #"),
    ],
)
def test_the_place_is_named(schema: Any, place: str) -> None:
    with pytest.raises(ValueError) as error:
        check_keywords(schema)
    assert place in str(error.value)


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {"properties": {"not": LEAF, "foo": True}},
        {"enum": [{"foo": 1}], "default": {"foo": 1}, "examples": [{"foo": 1}]},
        {"$defs": {"unused": {"not": {}}}, "type": "string"},
        {"$ref": "#/parts/a", "parts": {"a": LEAF}},
        {"$ref": "#", "title": "endless"},
        {"properties": {"a": {"$ref": "#/properties/b"}, "b": {"$ref": "#/properties/a"}}},
        {"$ref": "#/missing/a"},
    ],
)
def test_what_is_no_keyword_is_not_checked(schema: Any) -> None:
    check_keywords(schema)


def test_keywords_are_of_one_kind() -> None:
    assert not ENFORCED & DESCRIPTIVE
