"""The result of a bench: one JSON object with command, machine, versions and commit."""

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from s1engine.machine import cpu_name, source_commit

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
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "s1engine": __version__,
        "commit": source_commit(),
    }
