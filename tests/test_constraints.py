"""constraints.txt: exact, hashed, all that pyproject.toml asks for, and what is installed here."""

import json
import re
import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "constraints.txt").read_text()
PIN = re.compile(
    r"^(\S+)==(\S+)(?: ; (.*?))?(?: \\)?\n((?:    --hash=\S+(?: \\)?\n)*)", re.MULTILINE
)
HASHES = re.compile(r"--hash=sha256:[0-9a-f]{64}\b")
# torch and triton of the environment depend on the device
APART = ("torch", "cuda", "triton", "demo", "constraints")


def sections() -> dict[str, list[tuple[str, str, str | None, int]]]:
    """Name, version, marker and number of hashes of the packages of each section."""
    parts = re.split(r"^# for (\w+):.*\n", TEXT, flags=re.MULTILINE)
    return {
        name: [
            (n, v, marker or None, len(HASHES.findall(h))) for n, v, marker, h in PIN.findall(text)
        ]
        for name, text in zip(parts[1::2], parts[2::2], strict=True)
    }


def environment() -> dict[str, str]:
    """Versions of what is installed on this machine for the tests, torch left out."""
    return {
        name: pinned
        for section, packages in sections().items()
        if section not in APART
        for name, pinned, marker, _ in packages
        if marker is None or Marker(marker).evaluate()
    }


def test_every_line_is_a_pin_or_a_hash() -> None:
    lines = [line for line in TEXT.splitlines() if line and not line.startswith("#")]
    packages = [package for section in sections().values() for package in section]
    assert len(lines) == len(packages) + sum(hashes for *_, hashes in packages) > 1000


def test_all_but_torch_is_hashed() -> None:
    without = [(s, name) for s, packages in sections().items() for name, *_, n in packages if not n]
    assert without == [("torch", "torch")]


def test_all_that_make_clients_installs_is_pinned_and_hashed() -> None:
    locks = sorted((ROOT / "tests/clients/locks").glob("*.txt"))
    assert {lock.stem for lock in locks} == {p.stem for p in locks[0].parent.glob("*.in")}
    for lock in locks:
        text = lock.read_text()
        packages = PIN.findall(text)
        assert all(HASHES.search(hashes) for *_, hashes in packages) and len(packages) > 30
        assert len(text.splitlines()) == len(packages) + len(HASHES.findall(text))
    npm = json.loads((ROOT / "tests/clients/javascript/package-lock.json").read_text())
    wanted = json.loads((ROOT / "tests/clients/javascript/package.json").read_text())
    packages = {name: entry for name, entry in npm["packages"].items() if name}
    assert all(entry["integrity"].startswith("sha512-") for entry in packages.values())
    for name, exact in wanted["dependencies"].items():
        assert packages[f"node_modules/{name}"]["version"] == exact


def test_no_package_has_two_versions_in_one_environment() -> None:
    listed = sections()
    for device in ("cuda", "triton"):
        names = [
            name
            for section, packages in listed.items()
            if section not in APART or section == device
            for name, _, marker, _ in packages
            if marker is None or Marker(marker).evaluate()
        ]
        assert len(names) == len(set(names))
    assert (
        dict(p[:2] for p in listed["torch"])["torch"]
        == dict(p[:2] for p in listed["cuda"])["torch"]
    )


def test_it_holds_all_that_pyproject_asks_for_and_all_that_this_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    asked = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    asked += [
        line for name in ("server", "eval", "train", "otel", "ray", "dev") for line in extras[name]
    ]
    pinned = environment()
    asked += [line for name in pinned for line in requires_of(name)]
    wrong = []
    for line in asked:
        need = Requirement(line)
        name = canonicalize_name(need.name)
        if name in ("torch", "triton") or (need.marker and not need.marker.evaluate({"extra": ""})):
            continue
        if name not in pinned or not need.specifier.contains(pinned[name], prereleases=True):
            wrong.append(line)
    assert wrong == []


def requires_of(name: str) -> list[str]:
    try:
        return requires(name) or []
    except PackageNotFoundError:
        return []


def test_these_tests_run_with_it() -> None:
    """`make test` installs exactly these versions."""
    found = {name: version(name) for name in environment() if is_installed(name)}
    assert len(found) > 100
    assert {n: v for n, v in found.items() if v != environment()[n]} == {}


def is_installed(name: str) -> bool:
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False
