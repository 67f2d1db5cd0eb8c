"""The layering of the code, proved from the source: no module imports from a layer above its own.

Every import statement counts, those inside functions and under TYPE_CHECKING included. A new
module has to be given a layer here before this test passes.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What each part of s1engine may import of s1engine, besides itself. "leaves" are single files.
LEAVES = {"errors", "config", "sampling_params", "outputs", "tokenizer", "chat_template"}
LEAVES |= {"prompt_logprobs"}
LEAVES |= {
    "template_environment",
    "template_meters",
    "template_prices",
    "tool_formats",
    "tool_prompt",
    "template_work",
    "tokenizer_files",
    "reasoning",
    "reasoning_specs",
    "extras",
    "flags",
    "logs",
    "logprob_records",
    "checks",
    "options",
    "machine",
    "profiling",
    "progress",
    "tokenizer_json",
    "gguf_file",
    "model_files",
    "gguf_tokenizer",
}
BASE = LEAVES | {"__init__", "_core"}
ALLOWED = {
    **{leaf: LEAVES for leaf in LEAVES},
    "kernels": set(),
    "ops": BASE,
    "models": BASE | {"ops"},
    "runner": BASE | {"ops", "models"},
    "engine": BASE | {"ops", "models", "runner"},
    "server": BASE | {"engine"},
    "charts": set(),
    "eval": BASE | {"engine", "charts"},
    "plan": BASE | {"ops", "models", "runner", "engine", "charts"},
    "bench": BASE
    | {
        "ops",
        "models",
        "runner",
        "engine",
        "server",
        "charts",
        "eval",
        "plan",
        "kernels",
        "training",
    },
    "cli": BASE
    | {"ops", "models", "runner", "engine", "server", "charts", "eval", "plan", "bench"},
    "training": BASE | {"ops", "models", "runner", "engine", "eval", "plan"},
}
KERNELS_IMPORTER = "s1engine.ops.triton_ops"
KERNELS_OUTSIDE = {"torch", "triton", "functools"}
# The compile report and its cases may import the standard library; no kernel imports them.
COMPILE_TOOLS = {"s1engine.kernels.compile_report", "s1engine.kernels.compile_cases"}
LAZY_EXPORTS = "s1engine"

INCLUDE = re.compile(r'^\s*#\s*include\s+(<[^>]+>|"[^"]+")', re.MULTILINE)
STANDARD_HEADER = re.compile(r"<[a-z_]+>")
MACHINE_HEADERS = {"<immintrin.h>", "<arm_neon.h>", "<sys/auxv.h>"}


def modules(root: Path) -> dict[str, Path]:
    """Import name and file of every module, the mapped folders in their place in the package."""
    found = {}
    for folder, name in (("s1engine", "s1engine"), *mapped()):
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            found[".".join([name, *(part for part in parts if part != "__init__")])] = path
    return found


def mapped() -> list[tuple[str, str]]:
    return [(folder, f"s1engine.{folder}") for folder in ("kernels", "training", "bench")]


def imports(tree: ast.AST, name: str, known: set[str]) -> Iterator[str]:
    """Names of the modules that a module imports; `from package import module` names the module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node, name, known)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner in known else base


def absolute(node: ast.ImportFrom, name: str, known: set[str]) -> str:
    """The module that a `from` names; a dot too many would leave the package and fails."""
    if node.level == 0:
        assert node.module is not None
        return node.module
    is_package = any(other.startswith(f"{name}.") for other in known)
    above = name.split(".")[: -node.level + is_package or None]
    return ".".join([*above, *([node.module] if node.module else [])])


def without_functions(tree: ast.Module) -> ast.Module:
    """What runs when the module is loaded."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [ast.Pass()]
    return tree


def part(module: str) -> str:
    """The part of s1engine that a module belongs to: its first name below the package."""
    return module.split(".")[1] if "." in module else "__init__"


def violations(root: Path) -> list[str]:
    """Every import that the layering forbids, as `importer -> imported`."""
    found = modules(root)
    known = {*found, "s1engine._core"}
    wrong = []
    for name, path in found.items():
        if name == LAZY_EXPORTS:
            continue
        for target in imports(ast.parse(path.read_text()), name, known):
            if not is_allowed(name, target):
                wrong.append(f"{name} -> {target}")
    return wrong


def is_allowed(name: str, target: str) -> bool:
    top = target.partition(".")[0]
    if part(name) == "kernels" and top != "s1engine":
        is_tool = name in COMPILE_TOOLS
        return top in KERNELS_OUTSIDE or (is_tool and top in sys.stdlib_module_names)
    if target in COMPILE_TOOLS:
        return name in COMPILE_TOOLS
    if top != "s1engine":
        return True
    if part(target) == "kernels" and name == KERNELS_IMPORTER:
        return True
    return part(target) == part(name) or part(target) in ALLOWED.get(part(name), set())


def cycle(root: Path) -> list[str]:
    """Modules that import each other in a circle when loaded, and those that need them."""
    found = modules(root)
    graph = {}
    for name, path in found.items():
        tree = without_functions(ast.parse(path.read_text()))
        graph[name] = set(imports(tree, name, set(found))) & {*found} - {name}
    graph.pop(LAZY_EXPORTS, None)
    while free := [name for name, targets in graph.items() if not targets & {*graph}]:
        for name in free:
            del graph[name]
    return sorted(graph)


def include_violations(root: Path) -> list[str]:
    """Every #include under csrc that breaks its folder's rule, as `file: header`."""
    return [
        f"{path.relative_to(root)}: {header}"
        for path in sorted((root / "csrc").rglob("*.*"))
        for header in INCLUDE.findall(path.read_text())
        if not may_include(path, header, root / "csrc")
    ]


def may_include(path: Path, header: str, csrc: Path) -> bool:
    """Folders see the standard library and themselves, engine/ also the two others; bindings.cpp
    sees all and pybind11."""
    if STANDARD_HEADER.fullmatch(header):
        return True
    if header.startswith('"'):
        sees_all = path.parent in (csrc, csrc / "engine")
        bases = [path.parent, csrc] if sees_all else [path.parent]
        return ".." not in header and any((base / header.strip('"')).exists() for base in bases)
    if path.name == "bindings.cpp":
        return header.startswith("<pybind11/")
    return path.parent.name == "cpu" and header in MACHINE_HEADERS


def test_every_module_has_a_layer() -> None:
    assert {part(name) for name in modules(ROOT)} - {"__init__"} <= set(ALLOWED)


def test_nothing_imports_upward() -> None:
    assert violations(ROOT) == []


def test_no_import_cycles() -> None:
    assert cycle(ROOT) == []


def test_native_code_includes_only_what_its_folder_may() -> None:
    assert include_violations(ROOT) == []


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("s1engine/ops/x.py", "from s1engine.models import decoder"),
        ("s1engine/ops/x.py", "from ..models.decoder import Decoder"),
        ("s1engine/ops/x.py", "from .. import models"),
        ("s1engine/ops/cpu_ops.py", "def late():\n    import s1engine.kernels.attention"),
        ("s1engine/models/x.py", "import s1engine.runner.sampler as s"),
        ("s1engine/eval/x.py", "from s1engine.server.app import app"),
        ("s1engine/charts/x.py", "from s1engine.errors import RequestError"),
        ("s1engine/plan/x.py", "from s1engine.eval.report import write_report"),
        ("s1engine/engine/x.py", "from s1engine import training"),
        ("s1engine/cli.py", "from s1engine.training.sft import main"),
        ("s1engine/errors.py", "from s1engine import _core"),
        ("s1engine/novel/x.py", "from s1engine.errors import RequestError"),
        ("kernels/x.py", "import numpy"),
        ("kernels/x.py", "import json"),
        ("kernels/compile_report.py", "import numpy"),
        ("kernels/x.py", "from s1engine.errors import RequestError"),
    ],
)
def test_a_wrong_import_is_seen(tmp_path: Path, file: str, text: str) -> None:
    packages = dict.fromkeys(
        ("s1engine/models/__init__.py", "training/__init__.py", "kernels/__init__.py"), ""
    )
    root = write_tree(tmp_path, {**packages, file: text})
    assert len(violations(root)) == 1


def test_right_imports_pass(tmp_path: Path) -> None:
    files = {
        "kernels/x.py": "import torch, triton.language as tl\nfrom s1engine.kernels import y",
        "kernels/y.py": "",
        "s1engine/ops/triton_ops.py": "from s1engine.kernels import x\nfrom s1engine import _core",
        "s1engine/cli.py": "from s1engine import __version__\nfrom s1engine.ops import triton_ops",
    }
    root = write_tree(tmp_path, files)
    assert violations(root) == []
    assert cycle(root) == []


def test_a_cycle_is_seen(tmp_path: Path) -> None:
    files = {
        "s1engine/ops/a.py": "from s1engine.ops import b",
        "s1engine/ops/b.py": "from .a import x",
        "s1engine/ops/c.py": "from s1engine.ops import d",
        "s1engine/ops/d.py": "def late():\n    from s1engine.ops import c",
    }
    assert cycle(write_tree(tmp_path, files)) == ["s1engine.ops.a", "s1engine.ops.b"]


@pytest.mark.parametrize(
    ("file", "header"),
    [
        ("csrc/core/a.hpp", "<torch/torch.h>"),
        ("csrc/core/a.hpp", "<pybind11/pybind11.h>"),
        ("csrc/core/a.hpp", "<immintrin.h>"),
        ("csrc/core/a.cpp", '"cpu/b.hpp"'),
        ("csrc/core/a.cpp", '"../cpu/b.hpp"'),
        ("csrc/cpu/a.cpp", "<ATen/ATen.h>"),
        ("csrc/engine/a.cpp", "<pybind11/pybind11.h>"),
        ("csrc/bindings.cpp", "<torch/extension.h>"),
    ],
)
def test_a_wrong_include_is_seen(tmp_path: Path, file: str, header: str) -> None:
    files = {"csrc/cpu/b.hpp": "#include <vector>\n", file: f"#include {header}\n"}
    assert include_violations(write_tree(tmp_path, files)) == [f"{file}: {header}"]
