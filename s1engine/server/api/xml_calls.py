"""Tool calls in the XML format of Qwen3-Coder and Qwen3.5, inside of the tags of Hermes' format.

    <tool_call>
    <function=f>
    <parameter=city>
    Oslo
    </parameter>
    </function>
    </tool_call>

Values become JSON by the types of the tool's parameters, and may hold closing tags.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

FUNCTION, END_FUNCTION = "<function=", "</function>"
PARAMETER, END_PARAMETER = "<parameter=", "</parameter>"
BETWEEN = re.compile(rf"{END_PARAMETER}\s*(?={PARAMETER})")
TYPES = frozenset({"null", "boolean", "number", "integer", "string", "array", "object"})

Properties = Mapping[str, Any]
"""The schema of each parameter of a tool."""


def parse_xml_call(body: str, tools: Mapping[str, Properties]) -> tuple[str, str] | None:
    """Return name and arguments, as JSON text, of what stands between the tags; None if it is no
    call."""
    inside = body.strip()
    if not (inside.startswith(FUNCTION) and inside.endswith(END_FUNCTION)):
        return None
    name, closed, rest = inside[len(FUNCTION) : -len(END_FUNCTION)].partition(">")
    name, rest = name.strip(), rest.strip()
    if not (name and closed):
        return None
    properties = tools.get(name, {})
    arguments: dict[str, Any] = {}
    for part in BETWEEN.split(rest.removesuffix(END_PARAMETER)) if rest else ():
        begin, closed, value = part.partition(">")
        key = begin.removeprefix(PARAMETER).strip()
        if not (rest.endswith(END_PARAMETER) and begin.startswith(PARAMETER) and closed and key):
            return None
        if "<" in key:
            return None
        text = value.removeprefix("\n").removesuffix("\n")
        arguments[key] = _typed(text, properties.get(key))
    return name, json.dumps(arguments, ensure_ascii=False)


def is_cut(body: str) -> bool:
    """Does a call in XML go on after ``body``? Its values may hold any closing tag."""
    inside = body.strip()
    return inside.startswith(FUNCTION) and not inside.endswith(END_FUNCTION)


def _typed(text: str, schema: Any) -> Any:
    """Return a value as its schema wants it: text, unless the schema is of other types only."""
    kinds = kinds_of(schema)
    if "string" in kinds or not kinds:
        return None if text == "null" and "null" in kinds else text
    try:
        value = json.loads(text)
        json.dumps(value, allow_nan=False)  # NaN and infinity are no JSON
        return value
    except (ValueError, RecursionError):
        return {"True": True, "False": False, "None": None}.get(text.strip(), text)


def kinds_of(schema: Any) -> set[str]:
    """Return the types of JSON that a schema allows, as far as it names them; empty: any."""
    if not isinstance(schema, dict):
        return set()
    kinds = schema.get("type", [])
    if kinds:
        return {kinds} if isinstance(kinds, str) else {kind for kind in kinds if kind in TYPES}
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return {_kind(value) for value in values} if isinstance(values, list) else set()
    for name in ("anyOf", "oneOf", "allOf"):
        if isinstance(schema.get(name), list):
            parts = [kinds_of(part) for part in schema[name]]
            return set().union(*parts) if all(parts) or name == "allOf" else set()
    return set()


def _kind(value: Any) -> str:
    """Return the type of a value of JSON."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, str):
        return "string"
    return "array" if isinstance(value, list) else "object"
