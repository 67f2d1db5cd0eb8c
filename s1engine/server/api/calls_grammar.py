"""Grammars of tool calls, in the format that the model writes, in llguidance's Lark syntax.

``call_syntax`` reads what these grammars allow.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from keyword import iskeyword
from typing import Any, Protocol

from s1engine.engine.structured_output import COMPACT
from s1engine.server.api.xml_calls import kinds_of
from s1engine.tool_formats import ToolFormat
from s1engine.tool_prompt import CLOSE, OPEN

BY_NAME = frozenset({"properties", "$defs", "definitions"})  # keywords that hold schemas by name
DEFINITIONS = ("$defs", "definitions")
SCHEMAS = frozenset({"items", "prefixItems", "anyOf", "oneOf", "additionalProperties"})
OPENERS = frozenset({"additionalProperties", "patternProperties", "unevaluatedProperties"})
SPACED = COMPACT | {"item_separator": ", ", "key_separator": ": "}  # as models are trained
TEXT = "TEXT: /(.|\\n)*/"


class NamedSchema(Protocol):
    """A function that may be called: its name, and the schema of its parameters."""

    @property
    def name(self) -> str: ...
    @property
    def parameters(self) -> dict[str, Any] | None: ...


def calls_grammar(
    fmt: ToolFormat, functions: Sequence[NamedSchema], most: int, *, free: bool = False
) -> str:
    """Return a grammar of up to ``most`` calls. ``free``: or of text with such calls, or of text
    alone. Raises ValueError for a function that the format cannot call."""
    writer = WRITERS[fmt.name](fmt)
    bodies = [rule for i, f in enumerate(functions) for rule in writer.body_rules(i, f)]
    body = f"body: {' | '.join(f'body{i}' for i in range(len(functions)))}"
    return "\n".join([*writer.start_rules(most, free), body, *bodies])


class HermesWriter:
    """Calls in ``<tool_call>``, each with both tags."""

    opener, closer, separator = OPEN, CLOSE, "\n"
    key, edge = "arguments", "\n"  # of a call in JSON; before and after it

    def __init__(self, fmt: ToolFormat) -> None:
        self._ids = fmt.ids

    def mark(self, text: str) -> str:
        """Return a marker: a special token, or a text."""
        return f"<[{self._ids[text]}]>" if text in self._ids else json.dumps(text)

    def start_rules(self, most: int, free: bool) -> Iterator[str]:
        """Return the rules of calls over ``body``."""
        end = f" {self.mark(self.closer)}" if self.closer else ""
        if not free:
            yield f"start: {_repeated('call', self.separator, most)}"
            yield f"call: {self.mark(self.opener)} body{end}"
            return
        yield f"start: {f'call{{0,{most}}}' if most > 1 else 'call?'} TEXT"
        yield f"call: opener body{end}"
        if self.opener in self._ids:
            yield f"opener: TEXT {self.mark(self.opener)}"
        else:
            yield f"opener[lazy]: TEXT {self.mark(self.opener)}"
        yield TEXT

    def body_rules(self, i: int, function: NamedSchema) -> Iterator[str]:
        """Return the rules of the ``i``-th function's call without its markers."""
        begin = json.dumps(f'{self.edge}{{"name": "{function.name}", "{self.key}": ')
        yield f"body{i}: {begin} arguments{i} {json.dumps('}' + self.edge)}"
        yield f"arguments{i}: {_json(_object(function))}"


class XmlWriter(HermesWriter):
    """Calls in Qwen3-Coder's XML."""

    def body_rules(self, i: int, function: NamedSchema) -> Iterator[str]:
        parameters = [*_parameters(function)]
        parts = [
            f"p{i}_{j}" + ("" if needed else "?") for j, (_, _, needed) in enumerate(parameters)
        ]
        yield " ".join([
            f"body{i}: {json.dumps(f'{chr(10)}<function={function.name}>{chr(10)}')}", *parts,
            json.dumps(f"</function>{chr(10)}"),
        ])  # fmt: skip
        for j, (name, schema, _) in enumerate(parameters):
            begin, end = json.dumps(f"<parameter={name}>\n"), json.dumps("\n</parameter>\n")
            kinds = kinds_of(schema)
            if kinds and "string" not in kinds:
                yield f"p{i}_{j}: {begin} v{i}_{j} {end}"
                yield f"v{i}_{j}: {_json(schema)}"
            elif texts := _texts(schema):
                yield f"p{i}_{j}: {begin} ({' | '.join(map(json.dumps, texts))}) {end}"
            else:
                yield f"p{i}_{j}: {begin} v{i}_{j}"
                yield f"v{i}_{j}[suffix={end}]: /(.|\\n)*/"


class MistralWriter(HermesWriter):
    """A list of calls after one marker, or a marker before each call, where ``[ARGS]`` is one."""

    opener, closer, separator = "[TOOL_CALLS]", "", ""
    edge = ""

    def __init__(self, fmt: ToolFormat) -> None:
        super().__init__(fmt)
        self._named = "[ARGS]" in fmt.ids

    def start_rules(self, most: int, free: bool) -> Iterator[str]:
        if self._named:
            yield from super().start_rules(most, free)
            return
        opener, calls = self.mark(self.opener), _repeated("body", ", ", most)
        if not free:
            yield f'start: {opener} "[" {calls} "]"'
            return
        lazy = "" if self.opener in self._ids else "[lazy]"
        yield f'start: opener "[" {calls} "]" | TEXT'
        yield f"opener{lazy}: TEXT {opener}"
        yield TEXT

    def body_rules(self, i: int, function: NamedSchema) -> Iterator[str]:
        if not self._named:
            yield from super().body_rules(i, function)
            return
        yield f"body{i}: {json.dumps(function.name)} {self.mark('[ARGS]')} arguments{i}"
        yield f"arguments{i}: {_json(_object(function))}"


class BareWriter(HermesWriter):
    """Calls that are the whole answer, without a marker."""

    key, edge = "parameters", ""
    first = "{"  # character of calls

    def start_rules(self, most: int, free: bool) -> Iterator[str]:
        yield f"start: {'calls | OTHER | ' + json.dumps('') if free else 'calls'}"
        yield f"calls: {self.calls(most)}"
        if free:
            yield f"OTHER: /[ \\n]*[^ \\n\\{self.first}](.|\\n)*/"

    def calls(self, most: int) -> str:
        return _repeated("body", "; ", most)


class PythonicWriter(BareWriter):
    """A list of calls in the syntax of Python; values are JSON, whose words are read too."""

    first = "["

    def calls(self, most: int) -> str:
        return f'"[" {_repeated("body", ", ", most)} "]"'

    def body_rules(self, i: int, function: NamedSchema) -> Iterator[str]:
        parameters = [*_parameters(function)]
        for name in (*function.name.split("."), *(name for name, _, _ in parameters)):
            if not name.isidentifier() or iskeyword(name):
                raise ValueError(
                    f"{function.name}: this model writes calls in Python's syntax, where {name!r} "
                    "is no name"
                )
        yield f'body{i}: {json.dumps(f"{function.name}(")} {_listed(i, parameters)} ")"'
        for j, (name, schema, _) in enumerate(parameters):
            yield f"p{i}_{j}: {json.dumps(f'{name}=')} v{i}_{j}"
            yield f"v{i}_{j}: {_json(schema)}"


WRITERS: dict[str, type[HermesWriter]] = {
    "hermes": HermesWriter,
    "openai": HermesWriter,
    "qwen3_coder": XmlWriter,
    "llama3_json": BareWriter,
    "mistral": MistralWriter,
    "pythonic": PythonicWriter,
}


def _repeated(rule: str, separator: str, most: int) -> str:
    if most == 1:
        return rule
    more = f"{json.dumps(separator)} {rule}" if separator else rule
    return f"{rule} ({more}){{0,{most - 1}}}"


def _listed(i: int, parameters: Sequence[tuple[str, Any, bool]]) -> str:
    """Return needed parameters first, then the others in their order, with commas between."""
    needed = [j for j, part in enumerate(parameters) if part[2]]
    others = [j for j, part in enumerate(parameters) if not part[2]]
    names = [f"p{i}_{j}" for j in needed]
    later = [f'(", " p{i}_{j})?' for j in others]
    if needed or not others:
        return " ".join([' ", " '.join(names), *later])
    starts = [" ".join([f"p{i}_{j}", *later[at + 1 :]]) for at, j in enumerate(others)]
    return f"({' | '.join(starts)})?"


def _json(schema: Any) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': SPACED})}"


def _object(function: NamedSchema) -> dict[str, Any]:
    """Return the schema of all arguments; a function without parameters has none."""
    if not function.parameters:
        return {"type": "object", "additionalProperties": False}
    return {"type": "object", **closed(function.parameters)}


def _parameters(function: NamedSchema) -> Iterator[tuple[str, Any, bool]]:
    """Return name, schema with the function's definitions, and whether it is required."""
    whole = closed(function.parameters or {})
    properties, required = whole.get("properties"), whole.get("required")
    if not isinstance(properties, Mapping):
        return
    definitions = {name: whole[name] for name in DEFINITIONS if name in whole}
    for name, schema in properties.items():
        own = {**definitions, **schema} if isinstance(schema, dict) else definitions
        yield name, own, isinstance(required, list) and name in required


def _texts(schema: Mapping[str, Any]) -> list[str]:
    """Return the texts that a schema allows, if it lists them."""
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    usable = isinstance(values, list) and all(isinstance(value, str) for value in values)
    return values if usable else []


def closed(schema: Any) -> Any:
    """Return a schema whose objects have no properties beside those that it lists, unless it says
    so: clients leave that out, and a weak model would add properties without end."""
    if "allOf" in json.dumps(schema):
        return schema  # parts of one object must leave room for each other
    return _closed(schema)


def _closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [*map(_closed, schema)]
    if not isinstance(schema, dict):
        return schema
    inner = {
        name: {key: _closed(part) for key, part in value.items()}
        if name in BY_NAME and isinstance(value, dict)
        else _closed(value)
        if name in SCHEMAS
        else value
        for name, value in schema.items()
    }
    lists = isinstance(schema.get("properties"), dict) and bool(schema["properties"])
    return (
        {"additionalProperties": False, **inner} if lists and not OPENERS & set(schema) else inner
    )
