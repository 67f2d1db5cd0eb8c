"""``s1engine bench``: measurements that print one JSON object as the last line on stdout.

A bench is a module with ``add_arguments(parser)`` and ``run(args) -> result``. This file knows the
shipped benches; ``studies/__main__.py`` runs the others of a checkout through the same functions.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

from s1engine.bench.result import PROGRAM, where, write_result

BENCHES = {  # subcommand: module of s1engine.bench
    "host": "host",
    "throughput": "throughput",
    "cpu": "cpu",
    "embed": "embed",
    "latency": "latency",
    "kernels": "kernel_speed",
    "tune": "tune",
    "budget": "budget",
    "serve": "serve",
    "plan": "plan_accuracy",
    "qualify": "qualify",
    "compare": "compare",
}


def add_arguments(parser: argparse.ArgumentParser, benches: Mapping[str, str] = BENCHES) -> None:
    """Add one subcommand for each bench."""
    subparsers = parser.add_subparsers(dest="bench", required=True)
    for name, module in benches.items():
        bench = import_module(f"s1engine.bench.{module}")
        assert bench.__doc__ is not None
        subparser = subparsers.add_parser(name, help=bench.__doc__.splitlines()[0])
        bench.add_arguments(subparser)
        subparser.add_argument("--save", type=Path, help="also write the JSON object to this file")
        subparser.set_defaults(measure=bench.run)


def run(args: argparse.Namespace, program: str = PROGRAM) -> int:
    """Run the chosen bench: progress on stderr, the result as the last line on stdout."""
    print(f"{args.bench}: measuring", file=sys.stderr)
    result = {"bench": args.bench, **args.measure(args), "where": where(program)}
    if args.save:
        write_result(args.save, result)
    print(json.dumps(result))
    return int(bool(result.get("failures")))
