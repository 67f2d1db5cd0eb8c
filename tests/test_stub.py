"""s1engine/_core.pyi names what the extension has, no more and no less."""

import ast
from pathlib import Path
from typing import Any

from s1engine import _core

STUB = Path(__file__).resolve().parent.parent / "s1engine" / "_core.pyi"
TYPES_ONLY = {"CoreOutputDict"}  # a TypedDict: at run time a plain dict


def declared(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """Public names of a stub's module or class."""
    names: dict[str, ast.stmt] = {}
    for node in body:
        if isinstance(node, ast.AnnAssign | ast.Assign):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            assert isinstance(target, ast.Name)
            names[target.id] = node
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            names[node.name] = node
    return {name: node for name, node in names.items() if not name.startswith("_")}


def present(owner: Any) -> set[str]:
    """Public names that something has itself; pybind11's additions to enums left out."""
    enum = {"name", "value"} if hasattr(owner, "__members__") else set()
    return {name for name in vars(owner) if not name.startswith("_")} - enum


def test_the_stub_and_the_extension_agree() -> None:
    names = declared(ast.parse(STUB.read_text()).body)
    assert set(names) - TYPES_ONLY == present(_core)
    for name, node in names.items():
        if isinstance(node, ast.ClassDef) and name not in TYPES_ONLY:
            assert set(declared(node.body)) == present(getattr(_core, name)), name
