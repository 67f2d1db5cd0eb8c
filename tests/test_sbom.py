"""The SBOM of a release: each component has a licence, which is known before the build."""

import runpy
from importlib.metadata import PackageMetadata, PackageNotFoundError, metadata
from pathlib import Path
from typing import Any

import pytest

from tests.test_constraints import sections

SBOM = runpy.run_path(str(Path(__file__).resolve().parent.parent / ".ci" / "sbom.py"))
LICENCE = "License :: "


def component(name: str, *licences: str) -> dict[str, Any]:
    return {"name": name, "licenses": [{"license": {"id": licence}} for licence in licences]}


def test_a_component_without_a_licence_ends_the_build() -> None:
    known = next(iter(SBOM["UNDECLARED"]))
    bom = {"metadata": {"component": {}}, "components": [component("a", "MIT"), component(known)]}
    whole = SBOM["complete"](bom, "1.2.3")
    assert whole["metadata"]["component"]["version"] == "1.2.3"
    assert all(part["licenses"] for part in whole["components"])
    bom["components"].append(component("strange"))  # type: ignore[attr-defined]
    with pytest.raises(SystemExit, match="strange"):
        SBOM["complete"](bom, "1.2.3")


def declares_licence(found: PackageMetadata) -> bool:
    classifiers = found.get_all("Classifier") or []
    named = found.get("License-Expression") or found.get("License")
    return bool(named) or any(line.startswith(LICENCE) for line in classifiers)


def test_the_licence_of_all_that_a_server_runs_with_is_known() -> None:
    silent, seen = set(), 0
    for name, *_ in (*sections()["server"], *sections()["otel"]):
        try:
            found = metadata(name)
        except PackageNotFoundError:  # of another platform
            continue
        seen += 1
        if not declares_licence(found):
            silent.add(name)
    assert seen > 50 and silent <= SBOM["UNDECLARED"].keys()
