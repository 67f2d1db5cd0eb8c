"""Tool calls in the XML format of Qwen3-Coder and Qwen3.5, inside of the tags of Hermes' format.

    <tool_call>
    <function=f>
    <parameter=city>
    Oslo
    </parameter>
    </function>
    </tool_call>

Values become JSON by the types of the tool's parameters.
"""

import json
from collections.abc import Mapping
from typing import Any

FUNCTION, END_FUNCTION = "<function=", "</function>"
PARAMETER, END_PARAMETER = "<parameter=", "</parameter>"

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
    while rest:
        begin, _, after = rest.partition(">")
        value, ended, rest = after.partition(END_PARAMETER)
        key = begin.removeprefix(PARAMETER).strip()
        if not (begin.startswith(PARAMETER) and ended and key) or "<" in key:
            return None
        text = value.removeprefix("\n").removesuffix("\n")
        arguments[key] = _typed(text, properties.get(key))
        rest = rest.strip()
    return name, json.dumps(arguments, ensure_ascii=False)


def _typed(text: str, schema: Any) -> Any:
    """Return a value as its schema wants it: text, unless the schema is of other types only."""
    kinds = schema.get("type") if isinstance(schema, dict) else None
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if kinds == [None] and isinstance(schema, dict) and "anyOf" in schema:
        kinds = [part.get("type") for part in schema["anyOf"] if isinstance(part, dict)]
    if "string" in kinds or kinds == [None]:
        return None if text == "null" and "null" in kinds else text
    try:
        value = json.loads(text)
        json.dumps(value, allow_nan=False)  # NaN and infinity are no JSON
        return value
    except (ValueError, RecursionError):
        return {"True": True, "False": False, "None": None}.get(text.strip(), text)
