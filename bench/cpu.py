"""This engine on a CPU beside llama.cpp, OpenVINO, vLLM and transformers: one call, same weights.

Every engine is a process with as many threads, in an environment of its own that --peer or
S1ENGINE_PEERS names; those that are not there are said to be absent. A section is a shape, a
precision and a case; ``--into`` gathers sections of many calls in one file, table and figure.
"""

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from s1engine.bench import cpu_report
from s1engine.bench.command import where
from s1engine.bench.cpu_cases import BITS, CASES
from s1engine.bench.cpu_engines import ADAPTERS, absent, environments
from s1engine.bench.cpu_section import Plan, Section
from s1engine.bench.shapes import NAMES, shape


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Every chosen section; rows also go to ``--into``, with a table and a figure beside it."""
    # SystemExit, so that engines, which have sessions of their own, are closed on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    places = environments(args.peer)
    args.work.mkdir(parents=True, exist_ok=True)
    reasons = {name: absent(name, places) for name in args.engines}
    missing = {name: reason for name, reason in reasons.items() if reason}
    for name, reason in missing.items():
        print(f"absent: {name}: {reason}", file=sys.stderr)
    plan = Plan(
        engines={name: places[name] for name in args.engines if name not in missing},
        work=args.work,
        threads=args.threads,
        rounds=args.rounds,
        limit_s=args.limit_s,
        split=args.split,
    )
    about = {**where(), "threads": args.threads}
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    for section in _sections(args, plan):
        found = section.run()
        if args.into and found:  # at once: a call that is cut short keeps what it has
            cpu_report.gather(args.into, found, about)
        rows += found
        failures += section.failures
    print(cpu_report.table(rows), file=sys.stderr)
    return {"absent": missing, "rows": rows, "failures": failures}


def _sections(args: argparse.Namespace, plan: Plan) -> list[Section]:
    return [
        Section(plan, name, shape(name), precision, case, CASES[case].scaled(args.scale))
        for name in args.shape
        for precision in args.precision
        for case in args.case
    ]


def _some_of(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    """Parser of a comma-separated list."""

    def parse(text: str) -> list[str]:
        for word in text.split(","):
            if word not in allowed:
                raise argparse.ArgumentTypeError(f"{word!r} is none of {', '.join(allowed)}")
        return text.split(",")

    return parse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``s1engine bench cpu``."""

    def add_list(flag: str, default: str, allowed: Sequence[str]) -> None:
        parse, names = _some_of(allowed), ",".join(allowed)
        parser.add_argument(flag, default=parse(default), type=parse, help=f"of {names}")

    add_list("--shape", "25M", NAMES)
    add_list("--case", ",".join(CASES), list(CASES))
    add_list("--precision", "bf16", list(BITS))
    add_list("--engines", ",".join(ADAPTERS), list(ADAPTERS))
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME=FOLDER", help="its environment"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--limit-s", type=float, default=150, help="a section begins no round that would end later"
    )
    parser.add_argument(
        "--split",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="run each round to the first tokens too, to tell prefill from decoding",
    )
    parser.add_argument("--scale", type=float, default=1.0, help="of all lengths, for a quick look")
    parser.add_argument("--work", type=Path, default=Path("build/bench_cpu"), help="models, logs")
    parser.add_argument("--into", type=Path, help="result file that keeps other sections' rows")
