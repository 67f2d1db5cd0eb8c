"""Tool calls in the syntax of Python: ``[f(city="Oslo", days=[1, 2]), g()]``.

Nothing is executed: the text is parsed, and only literals are values.
"""

import ast
import json
from collections.abc import Mapping
from typing import Any

from s1engine.server.api.xml_calls import Properties

WORDS = {"true": True, "false": False, "null": None}  # JSON's, which models mix in
BROKEN = (SyntaxError, ValueError, TypeError, RecursionError, MemoryError)


def parse_pythonic_calls(
    text: str, tools: Mapping[str, Properties]
) -> list[tuple[str, str]] | None:
    """Return names and arguments, as JSON text; None if the text is no list of calls. Arguments
    without a name are the tool's parameters in their order."""
    try:
        body = ast.parse(text.strip(), mode="eval").body
        if not isinstance(body, ast.List) or not body.elts:
            return None
        return [_call(node, tools) for node in body.elts]
    except BROKEN:
        return None


def _call(node: ast.expr, tools: Mapping[str, Properties]) -> tuple[str, str]:
    """Raises one of BROKEN."""
    if not isinstance(node, ast.Call):
        raise ValueError("no call")
    name = ast.unparse(node.func)
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError("not a name")
    arguments = dict(zip(tools.get(name, ()), map(_value, node.args), strict=False))
    if len(arguments) < len(node.args):
        raise ValueError("more arguments than parameters")
    for keyword in node.keywords:
        if keyword.arg is None or keyword.arg in arguments:
            raise ValueError("an argument has no name, or is given twice")
        arguments[keyword.arg] = _value(keyword.value)
    return name, json.dumps(arguments, ensure_ascii=False, allow_nan=False)


def _value(node: ast.expr) -> Any:
    """Return the value of a literal. Raises one of BROKEN."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | None):
        return node.value
    if isinstance(node, ast.Name):
        if node.id not in WORDS:
            raise ValueError("no literal")
        return WORDS[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        keys = [_value(key) if key else None for key in node.keys]
        if not all(isinstance(key, str) for key in keys):
            raise ValueError("a key is no text")
        return dict(zip(keys, map(_value, node.values), strict=True))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        number = _value(node.operand)
        if isinstance(number, int | float) and not isinstance(number, bool):
            return -number
    raise ValueError("no literal")
