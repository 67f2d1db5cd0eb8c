"""Refuses JSON schemas with keywords that an answer would not keep.

llguidance refuses most of what it does not implement, but it ignores keywords that it does not know
and formats of numbers. Here every keyword of every schema that an answer may meet is one that is
enforced, or one that only describes.
"""

from collections.abc import Iterator, Mapping
from typing import Any

SCHEMAS = ("additionalProperties", "additionalItems", "items")  # whose value is a schema
LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")  # of schemas
MAPPINGS = ("properties", "patternProperties")  # of schemas
ENFORCED = {
    *SCHEMAS,
    *LISTS,
    *MAPPINGS,
    "$ref",
    "type",
    "enum",
    "const",
    "required",
    "minProperties",
    "maxProperties",
    "minItems",
    "maxItems",
    "pattern",
    "format",
    "minLength",
    "maxLength",
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "multipleOf",
}
DESCRIPTIVE = {
    "$schema",
    "$id",
    "id",
    "$anchor",
    "$comment",
    "$defs",
    "definitions",
    "title",
    "description",
    "default",
    "examples",
    "example",
    "deprecated",
    "readOnly",
    "writeOnly",
    "contentEncoding",
    "contentMediaType",
    "discriminator",
    "externalDocs",
    "xml",
    "propertyOrdering",
    "strict",
}
EXTENSION = "x-"  # begins names that others may define
OPTIONS = "x-guidance"  # would change how llguidance reads the schema


def check_keywords(schema: Any) -> None:
    """Raises ValueError naming the first keyword that is not kept, and its place. ``schema``: as
    parsed from JSON."""
    pending, seen = [("#", schema)], set()
    targets = {path.split("/")[1] for path in _references(schema) if path.startswith("#/")}
    while pending:
        path, part = pending.pop()
        if not isinstance(part, Mapping) or path in seen:
            continue
        seen.add(path)
        for keyword, value in part.items():
            allowed = path == "#" and keyword in targets
            if not allowed and not _is_kept(keyword, value):
                raise ValueError(f"the keyword {keyword!r} at {path} is not supported")
        if part.get("format") == "unknown":  # llguidance accepts any string for it
            raise ValueError(f"the format 'unknown' at {path} is not supported")
        pending += _parts(path, part)
        reference = part.get("$ref")
        if isinstance(reference, str) and reference.startswith("#"):
            pending.append((reference, _resolve(schema, reference)))


def _is_kept(keyword: str, value: Any) -> bool:
    if keyword == "nullable":
        return value is False
    if keyword == OPTIONS:
        return False
    return keyword in ENFORCED or keyword in DESCRIPTIVE or keyword.startswith(EXTENSION)


def _parts(path: str, schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The schemas in a schema, with their places."""
    for keyword in SCHEMAS:
        if keyword in schema:
            yield f"{path}/{keyword}", schema[keyword]
    for keyword in LISTS:
        if isinstance(schema.get(keyword), list):
            yield from ((f"{path}/{keyword}/{i}", s) for i, s in enumerate(schema[keyword]))
    for keyword in MAPPINGS:
        if isinstance(schema.get(keyword), Mapping):
            yield from ((f"{path}/{keyword}/{name}", s) for name, s in schema[keyword].items())


def _references(schema: Any) -> Iterator[str]:
    """All references anywhere in a schema."""
    pending = [schema]
    while pending:
        part = pending.pop()
        if isinstance(part, Mapping):
            reference = part.get("$ref")
            if isinstance(reference, str):
                yield reference
            pending += part.values()
        elif isinstance(part, list):
            pending += part


def _resolve(schema: Any, reference: str) -> Any:
    """The schema that a reference names; None if there is none, which llguidance reports."""
    for part in reference.removeprefix("#").split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(schema, Mapping):
            schema = schema.get(name)
        elif isinstance(schema, list) and name.isdecimal() and int(name) < len(schema):
            schema = schema[int(name)]
        else:
            return None
    return schema
