"""``s1engine bench``: measurements whose last line on stdout is one JSON object.

Every result says what was run where: command, machine, versions, commit.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

# name: module with add_arguments(parser) and run(args) -> result
BENCHES = {
    "host": "host",
    "throughput": "throughput",
    "cpu": "cpu",
    "latency": "latency",
    "speculation": "studies.draft_acceptance",
    "drafts": "studies.draft_speedup",
    "kernels": "kernel_speed",
    "tune": "tune",
    "kv-cache": "studies.quantized_kv_cache",
    "ranks": "studies.tensor_parallel",
    "quantization": "studies.quantized_weights",
    "budget": "budget",
    "harness": "studies.eval_overhead",
    "http": "studies.http_cost",
    "serve": "serve",
    "replicas": "studies.replica_cost",
    "servers": "studies.servers",
    "train": "studies.training_speed",
    "miniature": "studies.miniature",
    "plan": "plan_accuracy",
    "qualify": "qualify",
    "compare": "compare",
}


def _bench(name: str) -> ModuleType:
    return import_module(f"s1engine.bench.{BENCHES[name]}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One subcommand for each bench."""
    benches = parser.add_subparsers(dest="bench", required=True)
    for name in BENCHES:
        bench = _bench(name)
        assert bench.__doc__ is not None
        own = benches.add_parser(name, help=bench.__doc__.splitlines()[0])
        bench.add_arguments(own)
        own.add_argument("--save", type=Path, help="write the JSON object to this file too")


def run(args: argparse.Namespace) -> int:
    """Runs the chosen bench; progress on stderr, the result as the last line on stdout."""
    print(f"{args.bench}: measuring", file=sys.stderr)
    result = {"bench": args.bench, **_bench(args.bench).run(args), "where": where()}
    if args.save:
        args.save.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return int(bool(result.get("failures")))


def where() -> dict[str, Any]:
    """Command, machine, versions and commit of this measurement."""
    import torch

    from s1engine import __version__

    return {
        "command": "s1engine " + " ".join(sys.argv[1:]),
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
    """Short hash of the checkout this file stands in, marked if it has changes; None outside
    of one and without git."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        found = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except OSError:  # no git here
        return None
    return found.stdout.strip() or None
