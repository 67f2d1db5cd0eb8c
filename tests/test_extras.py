"""A plain installation embeds: what the engine imports, and what the extras bring beyond that."""

import ast
import json
import re
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from s1engine.errors import RequestError
from s1engine.extras import EXTRAS, require_extra
from tests.test_layering import imports, modules, part

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DECLARED: dict[str, list[str]] = PROJECT["optional-dependencies"]
UNTESTED = {"hub", "harness"}  # not installed for the tests
TOOLS = ("dev", "release")  # extras of which the package imports nothing

# Extras whose packages a part of s1engine may import, or a single module of a part.
MAY_IMPORT = {
    "server": ("server", "ray", "otel"),
    "eval": ("eval", "hub", "harness", "ray"),
    "charts": ("eval",),
    "bench": ("eval",),
    "training": ("train",),
    "s1engine.cli.serve": ("server",),
    "s1engine.engine.ray_cluster": ("ray",),
}
# Packages that torch brings for GPUs, or that are used only where they are installed.
OPTIONAL = {"triton": ("kernels", "ops", "bench"), "liger_kernel": ("training",)}

# Hides what argv[1] lists from imports, then runs the script argv[2].
HIDE = """
import importlib.machinery, json, sys
hidden = set(json.loads(sys.argv[1]))
class Visible(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Visible
exec(sys.argv[2])
"""

EMBED = """
from s1engine import LLM, AsyncLLMEngine, SamplingParams, ThinkingBudget
from s1engine.cli import main
QUESTION = "a=3 b=a+4 c=b*2 c?"
params = SamplingParams(temperature=0, max_tokens=64, thinking=ThinkingBudget(max_tokens=16))
llm = LLM()
(text,) = llm.generate([QUESTION], SamplingParams(temperature=0, max_tokens=4))
(answer,) = llm.chat([{"role": "user", "content": QUESTION}], params)
status = main(["generate", "--prompt", QUESTION, "--max-tokens", "4"])
print(len(text.outputs[0].token_ids), answer.outputs[0].thinking.tokens, status)
"""

COMMANDS = """
from s1engine.cli import main
from s1engine.training.curate.__main__ import main as curate
statuses = main(["serve"]), main(["eval", "--task", "arithmetic", "--help"]), curate(["x.yaml"])
print(*statuses)
"""


def expanded(requirements: Iterable[str]) -> Iterator[Requirement]:
    """Requirements; those on extras of this project are replaced by what the extras hold."""
    for requirement in map(Requirement, requirements):
        if requirement.name == PROJECT["name"]:
            for extra in requirement.extras:
                yield from expanded(DECLARED[extra])
        else:
            yield requirement


def distributions(requirements: Iterable[str]) -> set[str]:
    """Names of the installed distributions that these requirements bring, directly or not."""
    brought: set[tuple[str, str]] = set()
    todo = list(expanded(requirements))
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras}:
            if (name, extra) in brought:
                continue
            brought.add((name, extra))
            todo += needs(name, extra)
    return {name for name, _ in brought}


def needs(name: str, extra: str) -> Iterator[Requirement]:
    try:
        lines = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return
    for requirement in map(Requirement, lines):
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            yield requirement


def import_names(wanted: set[str]) -> set[str]:
    """Top-level names that the installed ones of these distributions hold."""
    return {
        name
        for name, holders in metadata.packages_distributions().items()
        if wanted & set(map(canonicalize_name, holders))
    }


BASE = import_names(distributions(PROJECT["dependencies"]))


def run_plainly(script: str) -> subprocess.CompletedProcess[str]:
    """Runs a script that can import only what a plain installation has."""
    everything = import_names({canonicalize_name(d.name) for d in metadata.distributions()})
    hidden = everything - BASE - {"s1engine"}
    assert {"fastapi", "matplotlib", "pytest"} <= hidden
    return subprocess.run(
        [sys.executable, "-c", HIDE, json.dumps(sorted(hidden)), script],
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_plain_installation_generates_and_chats() -> None:
    done = run_plainly(EMBED)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == "4 16 0"


def test_a_command_without_its_extra_is_one_line() -> None:
    done = run_plainly(COMMANDS)
    assert done.stdout.split() == ["2", "2", "1"], done.stderr[-4000:]
    lines = done.stderr.splitlines()
    assert [re.findall(r"pip install 's1engine\[(\w+)\]'", line) for line in lines] == [
        ["server"],
        ["eval"],
        ["train"],
    ]


def test_the_hidden_packages_are_missed() -> None:
    done = run_plainly("import s1engine.server.app")
    assert done.returncode == 1
    assert done.stderr.endswith("ModuleNotFoundError: No module named 'fastapi'\n")


def third_party(tree: ast.Module, name: str) -> set[str]:
    tops = {target.partition(".")[0] for target in imports(tree, name, set())}
    return {top for top in tops if top != "s1engine" and top not in sys.stdlib_module_names}


def allowed_extras(module: str) -> set[str]:
    return {*MAY_IMPORT.get(part(module), ()), *MAY_IMPORT.get(module, ())}


def test_each_import_belongs_to_the_base_or_to_the_extra_of_its_folder() -> None:
    held = {extra: import_names(distributions(DECLARED[extra])) for extra in EXTRAS}
    for extra in UNTESTED:
        held[extra] |= {module.partition(".")[0] for module in EXTRAS[extra]}
    wrong = []
    for module, path in modules(ROOT).items():
        if module.startswith("s1engine.bench.studies"):
            continue  # not installed
        may = BASE.union(*(held[extra] for extra in allowed_extras(module)))
        may |= {name for name, parts in OPTIONAL.items() if part(module) in parts}
        wrong += [
            f"{module}: {top}" for top in third_party(ast.parse(path.read_text()), module) - may
        ]
    assert sorted(wrong) == []


def test_the_table_of_extras_is_that_of_pyproject() -> None:
    odd_names = {"yaml": "pyyaml"}
    declared = {
        extra: {
            canonicalize_name(f"{r.name}-{inner}" if inner else r.name)
            for r in expanded(DECLARED[extra])
            for inner in r.extras or {""}
        }
        for extra in DECLARED
        if extra not in ("all", *TOOLS)
    }
    table = {
        extra: {canonicalize_name(odd_names.get(module, module)) for module in names}
        for extra, names in EXTRAS.items()
    }
    assert table == declared


def test_all_is_every_extra_and_make_installs_what_the_tests_need() -> None:
    (everything,) = map(Requirement, DECLARED["all"])
    assert everything.name == PROJECT["name"] and everything.extras == set(EXTRAS)
    rule = re.compile(r"^\$\(stamps\)/(?:torch|dev):.*\n((?:\t.*\n)+)", re.MULTILINE)
    lines = "".join(rule.findall((ROOT / "Makefile").read_text()))
    words = " ".join(re.findall(r"\$\(call locked,([a-z ]+)\)", lines)).split()
    extras_of = runpy.run_path(str(ROOT / ".ci" / "constraints.py"))["SECTIONS"]
    installed = {extra for word in words if word in extras_of for extra in extras_of[word][0]}
    assert installed == {*EXTRAS, "dev"} - UNTESTED


def test_a_missing_package_names_its_extra_and_the_field(monkeypatch: pytest.MonkeyPatch) -> None:
    for extra in set(EXTRAS) - UNTESTED:
        require_extra(extra)
    monkeypatch.setitem(sys.modules, "ray", None)  # an import of it fails
    with pytest.raises(RequestError, match=r"package ray .* 's1engine\[ray\]'") as error:
        require_extra("ray", param="replicas")
    assert error.value.param == "replicas"
