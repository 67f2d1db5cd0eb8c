"""The documents describe the code that is there: variables, commands, folders, files, links."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from s1engine.bench.command import BENCHES
from s1engine.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
CODE = ("s1engine", "kernels", "training", "bench")
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
VARIABLE = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+|RANK")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#([^)\s]*))?\)")
CODE_PATH = re.compile(r"`((?:s1engine|kernels|training|bench|tests|csrc|docs|examples)/[\w./-]*)`")
ENVIRON_CALLS = ("os.environ.", "os.getenv")
PUBLIC = {"PATH"}  # variables of every system


def read(pattern: str) -> str:
    return "\n".join(path.read_text() for path in sorted(ROOT.glob(pattern)))


def environment_variables(tree: ast.AST) -> Iterator[str]:
    """Names that a module reads from or writes to ``os.environ``, and names of ours anywhere."""
    names = {
        target.id: node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        for key in (*_environ_keys(node), *_own_names(node)):
            name = names.get(key.id) if isinstance(key, ast.Name) else getattr(key, "value", None)
            if isinstance(name, str) and VARIABLE.fullmatch(name):
                yield name


def _environ_keys(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.Subscript) and _is_environ(node.value):
        yield node.slice
    elif isinstance(node, ast.Compare) and any(map(_is_environ, node.comparators)):
        yield node.left
    elif isinstance(node, ast.Call) and ast.unparse(node.func).startswith(ENVIRON_CALLS):
        yield from node.args[:1]


def _own_names(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.Constant) and str(node.value).startswith("S1ENGINE_"):
        yield node


def _is_environ(node: ast.AST) -> bool:
    return ast.unparse(node) == "os.environ"


def test_every_environment_variable_is_described() -> None:
    page = (ROOT / "docs" / "DEBUGGING.md").read_text()
    used = {
        name
        for folder in CODE
        for path in (ROOT / folder).rglob("*.py")
        if "studies" not in path.parts
        for name in environment_variables(ast.parse(path.read_text()))
    }
    assert {"S1ENGINE_LOG_LEVEL", "RAY_AUTH_TOKEN"} <= used
    assert sorted(name for name in used - PUBLIC if f"`{name}`" not in page) == []


def test_variables_are_found_in_every_form() -> None:
    code = """
import os
KEY = "A_KEY"
os.environ["B_KEY"]; os.environ.get(KEY); os.getenv("C_KEY"); "D_KEY" in os.environ
os.environ.setdefault("E_KEY", "1"); x = "S1ENGINE_F"; y = "NOT_ONE"
"""
    found = set(environment_variables(ast.parse(code)))
    assert found == {"A_KEY", "B_KEY", "C_KEY", "D_KEY", "E_KEY", "S1ENGINE_F"}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_subcommand_is_described(command: str) -> None:
    assert f"`s1engine {command}`" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("bench", BENCHES)
def test_every_bench_is_described(bench: str) -> None:
    assert f"`s1engine bench {bench}`" in read("docs/*.md")


def test_every_top_level_folder_is_described() -> None:
    page = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
    ignored = {line.strip("/ \n") for line in (ROOT / ".gitignore").read_text().splitlines()}
    folders = [
        path.name
        for path in ROOT.iterdir()
        if path.is_dir() and path.name not in ignored and not path.name.startswith((".", "__"))
    ]
    assert "csrc" in folders
    folders = [name for name in folders if not name.endswith(".egg-info")]
    assert [name for name in folders if f"(../{name}" not in page and name != "docs"] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    links = [target for target, _ in LINK.findall(text) if "://" not in target]
    missing = [target for target in links if not (page.parent / target).exists()]
    if page.name != "CHANGELOG.md":
        paths = [path for path in CODE_PATH.findall(text) if "NAME" not in path]  # of a recipe
        missing += [path for path in paths if not (ROOT / path).exists()]
    assert missing == []


def test_every_page_is_reached_from_the_readme() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        for target, _ in LINK.findall(page.read_text()):
            if "://" not in target and (page.parent / target).exists():
                waiting.append((page.parent / target).resolve())
    assert [page.name for page in PAGES if page.resolve() not in reached] == []
