"""Command-line flags from a dataclass: one flag per field, with the field's name and docstring.

Knows no field by name. The namespace holds only flags that are on the command line, so only the
dataclass defines defaults and checks values.
"""

import argparse
import ast
import inspect
import textwrap
import types
from dataclasses import MISSING, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def add_flags(parser: argparse._ActionsContainer, cls: type, skip: tuple[str, ...] = ()) -> None:
    """Adds a flag for each field of dataclass ``cls``, whose types are int, float, str, bool or
    names (a Literal), or one of them or None. A bool gets ``--name`` and ``--no-name``; a type that
    may be a tuple takes several values."""
    docs = field_docs(cls)
    hints = get_type_hints(cls)
    for field in fields(cls):
        if field.name in skip:
            continue
        kind, several = _plain_type(hints[field.name])
        options: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS}
        options["help"] = _help(docs.get(field.name, ""), field.default)
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": kind, "metavar": {int: "N", float: "F", str: "S"}[kind]}
            options |= {"nargs": "+"} if several else {}
        parser.add_argument(f"--{field.name.replace('_', '-')}", **options)


def given_values(args: argparse.Namespace, cls: type) -> dict[str, Any]:
    """The fields of ``cls`` that are on the command line."""
    return {f.name: getattr(args, f.name) for f in fields(cls) if hasattr(args, f.name)}


def field_docs(cls: type) -> dict[str, str]:
    """The docstrings below the fields of a class, by field, each on one line."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for field, doc in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr):
            assert isinstance(field.target, ast.Name) and isinstance(doc.value, ast.Constant)
            docs[field.target.id] = " ".join(str(doc.value.value).split())
    return docs


def _help(doc: str, default: object) -> str:
    shown = "" if default in (None, MISSING) else f" (default: {default})"
    return f"{doc.replace('``', '')}{shown}".replace("%", "%%")


def _plain_type(hint: Any) -> tuple[type, bool]:
    """The type of a value on the command line, and whether it may have several: ``int`` and False
    for ``int | None``."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    several = any(get_origin(kind) is tuple for kind in kinds)
    (plain,) = (k for k in kinds if k is not type(None) and get_origin(k) is not tuple)
    if get_origin(plain) is Literal:
        return str, several
    assert plain in (int, float, str, bool), hint
    return plain, several
