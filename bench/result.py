"""The result of a bench: one JSON object with the command, machine, versions and commit behind
it."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

PROGRAM = "s1engine"


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a result file, indented by one space."""
    path.write_text(json.dumps(result, indent=1) + "\n")


def where(program: str = PROGRAM) -> dict[str, Any]:
    """Command, machine, versions and commit of this measurement."""
    import torch

    from s1engine import __version__

    return {
        "command": " ".join([program, *sys.argv[1:]]),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "s1engine": __version__,
        "commit": _commit(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str | None:
    """Short hash of the checkout that holds this file, marked if dirty; None without git or
    outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except OSError:  # git is not installed
        return None
    return done.stdout.strip() or None
