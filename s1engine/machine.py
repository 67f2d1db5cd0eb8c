"""The machine and the software that this process runs on, as plain data for reports.

Reads what the system shows; measures nothing and needs no model.
"""

import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "numpy", "llguidance")
# Of the flags that Linux shows for a CPU, those that decide which kernels it can run.
INSTRUCTION_SETS = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16"),
    *("avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve"),
)
VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "TRITON_INTERPRET")
SECRET_PARTS = ("KEY", "TOKEN", "SECRET", "PASSWORD")
PACKAGE = Path(__file__).parent


def software() -> dict[str, Any]:
    """Commit of this package; versions of Python, PACKAGES (None: not installed) and the OS."""
    return {
        "commit": source_commit(),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "os": platform.platform(),
    }


def hardware() -> dict[str, Any]:
    """CPU, memory and GPUs."""
    flags = _cpu_facts().get("flags") or _cpu_facts().get("Features") or ""
    sets = [name for name in INSTRUCTION_SETS if name in flags.split()]
    total, available = _memory_bytes()
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),  # by this process
        "instruction_sets": sets,
        "memory_bytes": total,
        "available_memory_bytes": available,
        "gpus": _gpus(),
    }


def environment() -> dict[str, str]:
    """The S1ENGINE_* variables and VARIABLES that are set; the values of secrets are hidden."""
    names = [name for name in os.environ if name.startswith("S1ENGINE_") or name in VARIABLES]
    return {name: _hide_secret(name, os.environ[name]) for name in sorted(names)}


def cpu_name() -> str:
    """The model name of the CPU."""
    return _cpu_facts().get("model name") or platform.processor() or platform.machine()


def source_commit() -> str | None:
    """The commit that this package was installed from: of its checkout, marked if dirty, else the
    one that pip recorded; None if neither is known."""
    tracked = _git("ls-files", "--error-unmatch", "__init__.py")
    if tracked is not None:
        return _git("describe", "--always", "--dirty", "--exclude", "*")
    try:
        recorded = metadata.distribution("s1engine").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return None
    commit: str | None = json.loads(recorded or "{}").get("vcs_info", {}).get("commit_id")
    return commit


def _git(*words: str) -> str | None:
    """Output of a git command in the package's folder; None if it fails."""
    try:
        done = subprocess.run(
            ["git", *words], cwd=PACKAGE, capture_output=True, text=True, check=False
        )
    except OSError:  # git is not installed
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _hide_secret(name: str, value: str) -> str:
    return "(hidden)" if any(part in name for part in SECRET_PARTS) else value


def _cpu_facts() -> dict[str, str]:
    """What Linux shows for the first core; empty elsewhere."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().partition("\n\n")[0].splitlines() if file.exists() else []
    pairs = [line.split(":", 1) for line in lines if ":" in line]
    return {name.strip(): value.strip() for name, value in pairs}


def _memory_bytes() -> tuple[int | None, int | None]:
    """Memory of the machine: all, and what new programs can use."""
    file = Path("/proc/meminfo")
    if not file.exists():
        return None, None
    facts = dict(line.split(":", 1) for line in file.read_text().splitlines())
    total, available = (int(facts[name].split()[0]) for name in ("MemTotal", "MemAvailable"))
    return total * 1024, available * 1024


def _gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        {
            "name": gpu.name,
            "capability": f"{gpu.major}.{gpu.minor}",
            "memory_bytes": gpu.total_memory,
            "cuda": torch.version.cuda,
        }
        for gpu in properties
    ]
