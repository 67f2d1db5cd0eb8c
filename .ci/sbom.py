"""Writes an SBOM in CycloneDX's format: ``python sbom.py ENVIRONMENT FILE``, or ``make sbom``.

ENVIRONMENT is a virtual environment that holds what s1engine runs with, FILE becomes one JSON
object. Each component must have a licence: the build ends with an error for one that declares none
and is not in UNDECLARED.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
UNDECLARED = {  # read in the packages' licence files
    "protobuf": "BSD-3-Clause",
    "transformers": "Apache-2.0",
}


def complete(bom: dict[str, Any], version: str) -> dict[str, Any]:
    """Add our version, and the licences of UNDECLARED. Exits if a component has no licence."""
    bom["metadata"]["component"]["version"] = version
    for component in bom["components"]:
        licence = UNDECLARED.get(component["name"])
        if not component.get("licenses") and licence is not None:
            component["licenses"] = [{"license": {"id": licence}}]
    missing = [part["name"] for part in bom["components"] if not part.get("licenses")]
    if missing:
        sys.exit(f"error: no licence is known of {', '.join(missing)}: read it, then UNDECLARED")
    return bom


def main(environment: str, target: str) -> None:
    """Write the SBOM of an environment."""
    command = [sys.executable, "-m", "cyclonedx_py", "environment", "--output-reproducible"]
    command += ["--pyproject", str(ROOT / "pyproject.toml"), "--mc-type", "library"]
    done = subprocess.run([*command, environment], check=True, stdout=subprocess.PIPE, text=True)
    init = (ROOT / "s1engine" / "__init__.py").read_text()
    match = re.search(r'^__version__ = "(.+)"', init, re.MULTILINE)
    assert match
    bom = complete(json.loads(done.stdout), match[1])
    Path(target).write_text(json.dumps(bom, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
