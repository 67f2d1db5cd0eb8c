"""s1engine/_core.pyi declares exactly the names of the extension."""

import ast
from pathlib import Path
from typing import Any

from s1engine import _core

STUB = Path(__file__).resolve().parent.parent / "s1engine" / "_core.pyi"
TYPES_ONLY = {"CoreOutputDict"}  # a TypedDict: a plain dict at run time


def declared_names(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """Public names that a module or class of the stub declares."""
    names: dict[str, ast.stmt] = {}
    for node in body:
        if isinstance(node, ast.AnnAssign | ast.Assign):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            assert isinstance(target, ast.Name)
            names[target.id] = node
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            names[node.name] = node
    return {name: node for name, node in names.items() if not name.startswith("_")}


def existing_names(owner: Any) -> set[str]:
    """Public names of ``owner`` itself, without pybind11's additions to enums."""
    enum = {"name", "value"} if hasattr(owner, "__members__") else set()
    return {name for name in vars(owner) if not name.startswith("_")} - enum


def test_the_stub_and_the_extension_agree() -> None:
    names = declared_names(ast.parse(STUB.read_text()).body)
    assert set(names) - TYPES_ONLY == existing_names(_core)
    for name, node in names.items():
        if isinstance(node, ast.ClassDef) and name not in TYPES_ONLY:
            assert set(declared_names(node.body)) == existing_names(getattr(_core, name)), name
