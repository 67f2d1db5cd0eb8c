"""What users install: a wheel with only s1engine in it, built from an sdist that suffices."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest

import s1engine._core

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.timeout(900)  # builds distributions

MAPPED = ("kernels", "training", "bench")
STUDIES = "s1engine/bench/studies/"  # run from a checkout, not installed


def python(*args: str, cwd: Path, **variables: str) -> str:
    """Runs this interpreter elsewhere; its output, or a failure that shows it."""
    done = subprocess.run(
        [sys.executable, *args],
        cwd=cwd,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


SETUP = """
import runpy, sys, setuptools, pybind11.setup_helpers
sys.platform = {platform!r}
setuptools.setup = lambda **given: print(*given["ext_modules"][0].extra_compile_args)
runpy.run_path("setup.py")
"""


def run_setup(platform: str) -> subprocess.CompletedProcess[str]:
    """Runs setup.py as on another platform; prints the compiler's flags, builds nothing."""
    command = [sys.executable, "-c", SETUP.format(platform=platform)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_extension_is_built_for_any_cpu() -> None:
    flags = run_setup("linux").stdout.split()
    assert "-O3" in flags
    assert [flag for flag in flags if flag.startswith(("-m", "-ffast", "-Ofast"))] == []


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_other_systems_are_refused_in_one_line(platform: str) -> None:
    done = run_setup(platform)
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: s1engine runs on Linux") and platform in line


def test_wheels_are_built_for_every_declared_python() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    marker = "Programming Language :: Python :: 3."
    minors = [c.removeprefix(marker) for c in settings["project"]["classifiers"] if marker in c]
    assert settings["project"]["requires-python"] == f">=3.{minors[0]}"
    pattern = settings["tool"]["cibuildwheel"]["build"]
    built = [n for n in range(8, 30) if fnmatch(f"cp3{n}-manylinux_x86_64", pattern)]
    assert built == [int(minor) for minor in minors]


def test_actions_are_pinned_to_commits() -> None:
    workflows = "".join(path.read_text() for path in ROOT.glob(".github/workflows/*.yml"))
    used = re.findall(r"uses: (\S+)", workflows)
    assert used and [name for name in used if not re.search(r"@[0-9a-f]{40}$", name)] == []


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    python("-m", "build", "--sdist", "--no-isolation", "-o", str(folder), str(ROOT), cwd=folder)
    return only(folder, "*.tar.gz")


COMPILER = """#!/bin/sh
case " $* " in *" -c "*) exec g++ "$@" -E;; esac
for word; do case $word in *_core*.so) exec cp {extension} "$word";; esac; done
"""


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, so that nothing outside it can have helped. The compiler only reads the
    sources with all that they include, and links by a copy of this environment's extension."""
    folder = tmp_path_factory.mktemp("wheel")
    compiler = tmp_path_factory.mktemp("compiler") / "g++"
    compiler.write_text(COMPILER.format(extension=s1engine._core.__file__))
    compiler.chmod(0o700)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder)]
    tools = {"CC": str(compiler), "CXX": str(compiler)}
    python("-m", "pip", "wheel", *options, str(sdist), cwd=folder, **tools)
    return only(folder, "*.whl")


@pytest.fixture(scope="module")
def target(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    options = ["--no-deps", "--no-index", "--target", str(folder)]
    python("-m", "pip", "install", *options, str(wheel), cwd=folder)
    return folder


def sources(root: Path, pattern: str) -> set[str]:
    return {str(path.relative_to(root)) for path in root.glob(pattern) if path.is_file()}


def test_sdist_holds_all_native_sources(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert sources(ROOT, "csrc/**/*") <= held


def test_wheel_holds_only_the_package(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"s1engine", only_dist_info(tops)}
    assert not [name for name in names if name.endswith((".cpp", ".hpp", ".inc", ".o"))]
    assert not [name for name in names if name.startswith(STUDIES)]


def only_dist_info(tops: set[str]) -> str:
    (name,) = (top for top in tops if top.endswith(".dist-info"))
    return name


def test_wheel_holds_the_whole_package(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = sources(ROOT, "s1engine/**/*.py") | sources(ROOT, "s1engine/**/*.pyi")
    expected |= sources(ROOT, "s1engine/assets/**/*")
    expected |= sources(ROOT, "s1engine/server/playground/**/*") | {"s1engine/py.typed"}
    expected |= sources(ROOT, "s1engine/charts/page/**/*")
    expected |= {f"s1engine/{name}" for name in sources(ROOT, "training/sft/configs/*.yaml")}
    for folder in MAPPED:
        expected |= {f"s1engine/{name}" for name in sources(ROOT, f"{folder}/**/*.py")}
    expected = {name for name in expected if not name.startswith(STUDIES)}
    assert expected <= names, sorted(expected - names)
    assert [name for name in names if name.startswith("s1engine/_core.") and name.endswith(".so")]


def test_installed_package_imports(target: Path, tmp_path: Path) -> None:
    """Isolated (-I: no cwd, no PYTHONPATH), with the target before this environment's packages."""
    imports = ", ".join(["s1engine._core", *(f"s1engine.{folder}" for folder in MAPPED)])
    code = (
        f"import sys; sys.path.insert(0, {str(target)!r}); import s1engine; "
        f"assert 'torch' not in sys.modules; import {imports}; print(s1engine.__file__); "
        "print(*(name for name in s1engine.__all__ if getattr(s1engine, name)))"
    )
    place, exports = python("-I", "-c", code, cwd=tmp_path).splitlines()
    assert Path(place).is_relative_to(target)
    assert exports.split() == s1engine.__all__


def test_editable_package_imports_from_anywhere(tmp_path: Path) -> None:
    names = ", ".join(f"s1engine.{folder}" for folder in MAPPED)
    code = f"import s1engine._core, {names}; print(s1engine.training.__file__)"
    assert Path(python("-I", "-c", code, cwd=tmp_path).strip()).exists()
