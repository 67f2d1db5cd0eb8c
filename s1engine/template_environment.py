"""What a chat template of the hub may use: Jinja's immutable sandbox, and its names and filters.

Block trimming, names and JSON are those of transformers; ``from_json`` is other engines'. Knows no
messages.
"""

import json
import traceback
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node, Scope
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_RENDERED_CHARS = 2**25
_FILE_NAME = "<template>"  # Jinja's name for a template from text


def failing_line(error: Exception) -> int | None:
    """The template's line where ``error`` was raised: Jinja gives its frames these numbers."""
    if isinstance(error, TemplateSyntaxError):
        return error.lineno
    frames = traceback.walk_tb(error.__traceback__)
    lines = [line for frame, line in frames if frame.f_code.co_filename == _FILE_NAME]
    return lines[-1] if lines else None


class RefusedError(TemplateError):
    """The template called ``raise_exception``."""


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox that also rejects a sequence repeated beyond the bound of the output."""

    intercepted_binops = frozenset({"*"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        for sequence, count in ((left, right), (right, left)):
            repeats = isinstance(sequence, str | list | tuple) and isinstance(count, int)
            if repeats and len(sequence) * count > MAX_RENDERED_CHARS:
                raise SecurityError(f"it repeats a value {count} times")
        return super().call_binop(context, operator, left, right)


class _GenerationTag(Extension):
    """Renders ``{% generation %}``, which marks the assistant's part for trainers, as its content.
    Variables set inside it are local to it, as in transformers."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's declaration)

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return Scope(body).set_lineno(line)


def create_environment() -> ImmutableSandboxedEnvironment:
    """An environment with the block trimming, names and JSON that templates of the hub expect."""
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters.update(tojson=_to_json, from_json=_from_json, fromjson=_from_json)
    environment.globals.update(
        raise_exception=_refuse,
        strftime_now=_strftime_now,
        namespace=_namespace,
        dict=_Dict(),
        from_json=_from_json,
    )
    return environment


def _refuse(message: object) -> None:
    raise RefusedError(str(message))


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


class _Namespace(Namespace):
    """A namespace without names that begin with an underscore."""

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _namespace(*args: Any, **values: Any) -> Namespace:
    fields = dict(*args, **values)
    for name in fields:
        _check_name(name)
    return _Namespace(fields)


def _check_name(name: object) -> None:
    if str(name).startswith("_"):
        raise SecurityError("names in a namespace must not begin with an underscore")


class _Dict:
    """``dict`` of Python, as far as templates need it."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """A dictionary of these keys."""
        return dict.fromkeys(*args)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **how: Any) -> str:
    """Plain JSON; Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **how)


def _from_json(text: Any) -> Any:
    """The value of a JSON text; a value that is no text is returned as it is."""
    return json.loads(text) if isinstance(text, str) else text
