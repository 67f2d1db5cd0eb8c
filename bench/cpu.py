"""This engine on a CPU beside llama.cpp, OpenVINO, vLLM and transformers: one call, same weights.

Every engine is a process with the same number of threads, in its own environment, named by --peer
or S1ENGINE_PEERS. Engines without an environment or a driver (``studies/peers``) are reported as
absent. A section is a shape, a precision and a case; ``--into`` collects the sections of many calls
in one file, table and figure.
"""

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from s1engine.bench import cpu_report
from s1engine.bench.cpu_cases import BITS, CASES
from s1engine.bench.cpu_engines import ADAPTERS, absent, environments
from s1engine.bench.cpu_section import Section, SectionOptions
from s1engine.bench.result import where
from s1engine.bench.shapes import NAMES, shape


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run every chosen section; rows also go to ``--into``, with a table and a figure beside it."""
    # SystemExit on SIGTERM, so that the engines, which have their own sessions, are closed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    folders = environments(args.peer)
    args.work.mkdir(parents=True, exist_ok=True)
    reasons = {name: absent(name, folders) for name in args.engines}
    missing = {name: reason for name, reason in reasons.items() if reason}
    for name, reason in missing.items():
        print(f"absent: {name}: {reason}", file=sys.stderr)
    options = SectionOptions(
        engines={name: folders[name] for name in args.engines if name not in missing},
        work=args.work,
        threads=args.threads,
        rounds=args.rounds,
        limit_s=args.limit_s,
        split=args.split,
    )
    about = {**where(), "threads": args.threads}
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    for section in _sections(args, options):
        new = section.run()
        if args.into and new:  # after each section: an interrupted call keeps its rows
            cpu_report.merge_rows(args.into, new, about)
        rows += new
        failures += section.failures
    print(cpu_report.table(rows), file=sys.stderr)
    return {"absent": missing, "rows": rows, "failures": failures}


def _sections(args: argparse.Namespace, options: SectionOptions) -> list[Section]:
    return [
        Section(options, name, shape(name), precision, case, CASES[case].scaled(args.scale))
        for name in args.shape
        for precision in args.precision
        for case in args.case
    ]


def _list_of(allowed: Sequence[str]) -> Callable[[str], list[str]]:
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
        parse, names = _list_of(allowed), ",".join(allowed)
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
        "--limit-s", type=float, default=150, help="start no round that would end after this"
    )
    parser.add_argument(
        "--split",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also time each round to the first tokens, to separate prefill from decoding",
    )
    parser.add_argument("--scale", type=float, default=1.0, help="of all lengths, for a quick look")
    parser.add_argument("--work", type=Path, default=Path("build/bench_cpu"), help="models, logs")
    parser.add_argument("--into", type=Path, help="result file; rows of other sections are kept")
